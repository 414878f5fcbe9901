"""group_action by the operator of C++, which has a kernel for tensors of the CPU (csrc/cpu) and one for CUDA's."""

import importlib
from collections.abc import Sequence

import torch
from torch import Tensor

from ser_fast.interpolation import INTERPOLATIONS, PADDINGS
from ser_fast.ops.contract import GroupAction

importlib.import_module("ser_fast._C")  # registers the operators

# The kernels' enumerations have the order of these tuples.
_INTERPOLATION = {name: number for number, name in enumerate(INTERPOLATIONS)}
_PADDING = {name: number for number, name in enumerate(PADDINGS)}


def group_action(x: Tensor, action: GroupAction) -> Tensor:
    """(B, H*W, C) to (B, h*w, C):  out = W_g x."""
    return _resample(x, action, action.size_out, transpose=False)


def group_action_transpose(x: Tensor, action: GroupAction) -> Tensor:
    """(B, h*w, C) to (B, H*W, C):  out = W_g^T x."""
    return _resample(x, action, action.size_in, transpose=True)


def _resample(x: Tensor, action: GroupAction, size: Sequence[int], transpose: bool) -> Tensor:
    out = x.new_empty(x.shape[0], size[0] * size[1], x.shape[2])
    torch.ops.ser_fast_native.group_action(
        x.contiguous(),
        action.linear.contiguous(),
        action.offset.contiguous(),
        out,
        [*action.size_in, *action.size_out],
        _INTERPOLATION[action.interpolation],
        _PADDING[action.padding],
        action.antialias,
        transpose,
    )
    return out
