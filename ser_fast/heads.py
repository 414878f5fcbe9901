"""The heads of objectives and add-ons: multi-layer perceptrons whose batch normalization spans all ranks."""

import itertools
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ser_fast.distributed import all_reduce_sum, count_rows, world_size


def moments(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance over all ranks' rows, with gradients to every rank's.

    Args:
        rows: (B_rank, D), of any number on each rank.

    Returns:
        (D,), (D,) and the number of rows, a scalar.
    """
    count = count_rows(rows)
    mean = all_reduce_sum(rows.sum(0)) / count
    # Two passes: the mean of the squares less the square of the mean loses digits where the mean is large.
    return mean, all_reduce_sum((rows - mean).square().sum(0)) / count, count


class SyncBatchNorm1d(nn.BatchNorm1d):
    """Batch normalization by the statistics of all ranks' rows, so that N ranks give what one rank gives.

    On one rank it is nn.BatchNorm1d to the bit; the state dict is nn.BatchNorm1d's. Unlike nn.SyncBatchNorm it runs on
    any device, and takes other numbers of rows on each rank.

    Args:
        num_features: D.
        affine: learn a scale and a shift.
    """

    def __init__(self, num_features: int, *, affine: bool = True) -> None:
        super().__init__(num_features, affine=affine)

    def forward(self, rows: Tensor) -> Tensor:  # (B_rank, D) -> (B_rank, D)
        if not self.training or world_size() == 1:
            return super().forward(rows)
        wide = rows.float() if rows.dtype in (torch.bfloat16, torch.float16) else rows
        mean, variance, count = moments(wide)
        self._track(mean.detach(), variance.detach() * count / (count - 1))
        normalized = (wide - mean) * (variance + self.eps).rsqrt()
        if self.affine:
            normalized = normalized * self.weight + self.bias
        return normalized.to(rows.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, unbiased_variance: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(unbiased_variance.to(self.running_var.dtype), self.momentum)


class MLP(nn.Sequential):
    """nn.Sequential with a forward pass of its own: torch.compile leaves alone what is defined in torch."""

    def forward(self, rows: Tensor) -> Tensor:
        for layer in self:
            rows = layer(rows)
        return rows


def mlp(widths: Sequence[int], *, last: Literal["linear", "bias", "norm", "affine"] = "linear") -> MLP:
    """Linear layers; after each but the last, batch normalization over all ranks, and ReLU.

    Args:
        widths: (D_in, ..., D_out), two or more.
        last: how it ends: with the "linear" layer, with one that has a "bias" (the others have none, since a batch
            normalization would take it away), or with a batch "norm" without or with its "affine" map.

    Example:
        >>> mlp([384, 4096, 4096, 256], last="norm")  # the projector of MoCo-v3
    """
    layers: list[nn.Module] = []
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
        at_end = i == len(widths) - 2
        layers.append(nn.Linear(fan_in, fan_out, bias=at_end and last == "bias"))
        if not at_end or last in ("norm", "affine"):
            layers.append(SyncBatchNorm1d(fan_out, affine=not at_end or last == "affine"))
        if not at_end:
            layers.append(nn.ReLU(inplace=True))
    return MLP(*layers)
