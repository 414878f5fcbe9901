"""The CUDA kernels (csrc/cuda) behind the same signatures as the oracle in `ser_fast.ops.reference`."""

import torch

from ser_fast.ops.native import group_action, group_action_transpose
from ser_fast.ops.tiled import TiledLosses

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

_native = torch.ops.ser_fast_native


class _Kernels:
    """Documented in `ser_fast.ops.tiled.Kernels`; tensors on the CPU are those of the kernels compiled for the host."""

    prepare = _native.nt_xent_prepare
    symmetric_sums = _native.nt_xent_symmetric_sums
    row_sums = _native.nt_xent_row_sums
    panel_row_sums = _native.nt_xent_panel_row_sums
    losses = _native.nt_xent_losses
    coefficients = _native.nt_xent_gradient_weights
    owner = _native.nt_xent_stationary_gradient
    panel = _native.nt_xent_gradient_panel
    finish = _native.nt_xent_finish_gradient
    detached = _native.nt_xent_detached_sums
    detached_finish = _native.nt_xent_finish_detached

    def row_block(self, device: torch.device) -> int:
        return 128

    def largest_row_block(self) -> int:
        return 128

    def running_blocks(self, device: torch.device) -> tuple[int, int]:
        return 128, 128

    def owner_blocks(self, device: torch.device, columns: int) -> tuple[int, int]:
        if columns <= 256:
            return 128, 64
        return 64, 64 if _shared_memory(device) >= 204 << 10 else 32

    def largest_owned(self, device: torch.device) -> int:
        return 256 if _shared_memory(device) >= 150 << 10 else 128

    def largest_detached(self, device: torch.device) -> int:
        return 512 if _shared_memory(device) >= 150 << 10 else 128


def _shared_memory(device: torch.device) -> int:
    """The bytes that a block can have."""
    if device.type == "cpu":
        return 163 << 10
    # torch's own stub lacks the attribute
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]


_operations = TiledLosses(_Kernels())
kept_bytes = _operations.kept_bytes
nt_xent = _operations.nt_xent
nt_xent_backward = _operations.nt_xent_backward
info_nce = _operations.info_nce
info_nce_backward = _operations.info_nce_backward
info_nce_detached = _operations.info_nce_detached
