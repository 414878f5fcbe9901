"""The backend `triton`: the operations as Triton kernels, behind the same signatures as `ser_fast.ops.reference`."""

from ser_fast.kernels.group_action import group_action, group_action_transpose
from ser_fast.kernels.nt_xent import (
    info_nce,
    info_nce_backward,
    info_nce_detached,
    kept_bytes,
    nt_xent,
    nt_xent_backward,
)

__all__ = [
    "group_action",
    "group_action_transpose",
    "info_nce",
    "info_nce_backward",
    "info_nce_detached",
    "kept_bytes",
    "nt_xent",
    "nt_xent_backward",
]
