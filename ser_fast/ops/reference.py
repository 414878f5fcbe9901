"""The oracle: every operation in plain PyTorch, written like its formula, on any device.

It stores what the kernels never store (resampling matrices, similarity matrices) and is what they are tested against.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ser_fast.interpolation import axis_weights
from ser_fast.lattice import positions

# ---------------------------------------------------------------- group_action


def resampling_matrix(
    linear: Tensor,
    offset: Tensor,
    size_in: Sequence[int],
    size_out: Sequence[int],
    interpolation: str,
    padding: str,
    antialias: bool,
) -> Tensor:
    """W_g: (B, h*w, H*W) float64. W[o, (i, j)] = W_y[o, i] W_x[o, j], each row of the two from one axis.

    linear (B, 2, 2) and offset (B, 2) are a LatticeMap's. On each axis the kernel's step is the length of that row of
    `linear`: how far the preimage of a token reaches along the axis.
    """
    y, x = positions(linear, offset, size_in, size_out)  # (B, h*w)
    step = linear.norm(dim=-1)  # (B, 2)
    exact = ((linear == 0) | (linear.abs() == 1)).flatten(1).all(-1) & (step == 1).all(-1)
    rows, columns = (
        axis_weights(
            position,
            step[:, axis],
            exact,
            size_in[axis],
            interpolation=interpolation,
            padding=padding,
            antialias=antialias,
        )
        for axis, position in enumerate((y, x))
    )
    return (rows[:, :, :, None] * columns[:, :, None, :]).flatten(2)


def _apply(weights: Tensor, x: Tensor) -> Tensor:
    """W x per sample, (B, R, N) and (B, N, C) to (B, R, C); a row with a single weight of 1 copies bit for bit."""
    if x.shape[1] == 0:
        return x.new_zeros(weights.shape[0], weights.shape[1], x.shape[2])
    accumulate = torch.promote_types(x.dtype, torch.float32)
    blended = (weights.to(accumulate) @ x.to(accumulate)).to(x.dtype)
    used = weights != 0
    copied = (used.sum(-1) == 1) & (weights.sum(-1) == 1)  # (B, R)
    sample, source = torch.arange(x.shape[0], device=x.device)[:, None], used.int().argmax(-1)
    # A product would turn -0 into 0, and 0 x Inf into NaN; `gather` on CPU rewrites the bits of a bfloat16 NaN.
    out = torch.where(copied[..., None], x[sample, source], blended)
    return torch.where(used.any(-1)[..., None], out, torch.zeros_like(out))


def group_action(
    x: Tensor,
    linear: Tensor,
    offset: Tensor,
    size_in: Sequence[int],
    size_out: Sequence[int],
    interpolation: str,
    padding: str,
    antialias: bool,
) -> Tensor:
    """(B, H*W, C) to (B, h*w, C):  out = W_g x."""
    return _apply(resampling_matrix(linear, offset, size_in, size_out, interpolation, padding, antialias), x)


def group_action_transpose(
    x: Tensor,
    linear: Tensor,
    offset: Tensor,
    size_in: Sequence[int],
    size_out: Sequence[int],
    interpolation: str,
    padding: str,
    antialias: bool,
) -> Tensor:
    """(B, h*w, C) to (B, H*W, C):  out = W_g^T x."""
    weights = resampling_matrix(linear, offset, size_in, size_out, interpolation, padding, antialias)
    return _apply(weights.mT, x)
