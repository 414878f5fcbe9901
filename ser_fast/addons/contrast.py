"""Contrastive losses of vectors over all ranks, for add-ons. Averaged over the ranks they are those of one rank."""

import torch
from torch import Tensor

from ser_fast.distributed import all_gather_rows, gather_counts, rank, world_size
from ser_fast.ops.nt_xent import info_nce


def symmetric(z0: Tensor, z1: Tensor, temperature: float) -> Tensor:
    """NT-Xent between z0 and z1 (T, D): negatives are all other rows of both sides, on all ranks.

    Source: SimCLR, arXiv 2002.05709, equation 1.
    """
    z0, z1 = _float32(z0), _float32(z1)
    counts, own = _own_rows(z0)
    key = torch.cat([all_gather_rows(z0, counts), all_gather_rows(z1, counts)])
    rows = torch.arange(sum(counts), device=z0.device)
    total = info_nce(
        torch.cat([z0, z1]),
        key,
        temperature=temperature,
        image=own.repeat(2),
        key_image=rows.repeat(2),
        positive=torch.cat([own + sum(counts), own]),
        reduction="sum",
    )
    return world_size() * total / (2 * sum(counts))


def cross_view(z0: Tensor, z1: Tensor, temperature: float) -> Tensor:
    """2 tau times the cross-entropy of z0 (T, D) among the rows of z1 alone, and of z1 among those of z0.

    Keys get no gradient, as in the released code of SER.

    Source: MoCo-v3, arXiv 2104.02057, algorithm 1.
    """
    z0, z1 = _float32(z0), _float32(z1)
    counts, own = _own_rows(z0)
    loss = z0.new_zeros(())
    for query, key in ((z0, z1), (z1, z0)):
        keys = all_gather_rows(key.detach(), counts)
        total = info_nce(query, keys, temperature=temperature, positive=own, reduction="sum")
        loss = loss + 2 * temperature * world_size() * total / sum(counts)
    return loss


def _own_rows(z: Tensor) -> tuple[list[int], Tensor]:
    """The number of rows of every rank, and which of all rows are this rank's."""
    counts = gather_counts(len(z), z.device)
    return counts, sum(counts[: rank()]) + torch.arange(len(z), device=z.device)


def _float32(z: Tensor) -> Tensor:
    return z.float() if z.dtype in (torch.bfloat16, torch.float16) else z
