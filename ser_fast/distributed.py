"""All-gather of rows when every rank has its own number of them, and sums over the ranks, with gradients."""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """The number of ranks; 1 where torch.distributed isn't initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's rank; 0 where torch.distributed isn't initialised."""
    return dist.get_rank() if world_size() > 1 else 0


def gather_counts(count: int, device: torch.device) -> list[int]:
    """How many rows each rank has. Reads them on the host: lattices differ from rank to rank and step to step."""
    if world_size() == 1:
        return [count]
    counts = [torch.empty(1, dtype=torch.long, device=device) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor([count], device=device))
    return torch.cat(counts).tolist()


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int]) -> Tensor:  # (T_rank, ...) -> (sum of T, ...)
        ctx.counts = counts
        # Padded to the longest: gloo can't gather unequal sizes.
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # Every rank's loss saw these rows, so their gradient is the sum over the ranks. Keeping only the local
        # slice would lose every other rank's share.
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return grad.split(ctx.counts)[dist.get_rank()], None


def all_gather_rows(rows: Tensor, counts: list[int]) -> Tensor:
    """Every rank's rows, in the order of the ranks.

    Args:
        rows: (T_rank, ...), the same trailing shape and dtype on all ranks.
        counts: the T of every rank, from `gather_counts`.

    Returns:
        (sum of T, ...). Its gradient goes back to the rank that owns the row, summed over all ranks' losses.
    """
    return rows if world_size() == 1 else _GatherRows.apply(rows, counts)


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous().clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # Every rank's loss saw this rank's summand. dist.all_reduce alone would be a constant to autograd, and the
        # gradient, averaged over the ranks, 1/world_size of the true one.
        return _AllReduceSum.apply(grad)


def all_reduce_sum(x: Tensor) -> Tensor:
    """The sum of every rank's tensor, the same shape on all of them; its gradient is summed over all ranks' losses."""
    return x if world_size() == 1 else _AllReduceSum.apply(x)


def count_rows(rows: Tensor) -> Tensor:
    """How many rows all ranks have, a scalar of the dtype of `rows`: it stays on the device."""
    return all_reduce_sum(rows.new_tensor(float(len(rows))))


def mean_over_rows(values: Tensor) -> Tensor:
    """This rank's part of the mean over all ranks' values (B_rank, ...), which may have different numbers of them.

    Averaged over the ranks, as DistributedDataParallel averages gradients, the parts give the mean.
    """
    if world_size() == 1:
        return values.mean()
    return world_size() * values.sum() / (count_rows(values) * math.prod(values.shape[1:]))
