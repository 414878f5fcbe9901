"""The CUDA kernels (csrc/cuda): the operators of ser_fast._C that have one, on tensors of a GPU."""

from ser_fast.ops.native import group_action, group_action_transpose

__all__ = ["group_action", "group_action_transpose"]
