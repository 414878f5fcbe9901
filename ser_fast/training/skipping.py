"""A step that is not finite leaves no trace. The device decides that: the host looks when the next step is queued."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ser_fast.distributed import world_size


def not_finite(values: Sequence[Tensor]) -> Tensor:
    """1.0 where one of the scalars, on any rank, is not finite, else 0.0; a float32 scalar on their device."""
    skip = (~torch.stack(list(values)).isfinite().all()).float()
    if world_size() > 1:  # one rank's loss may be infinite where the gradient, which all share, is not
        dist.all_reduce(skip, dist.ReduceOp.MAX)
    return skip


def step_unless(skip: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Take the optimizer's step unless the scalar `skip` is 1.

    Fused kernels look at it on the device, and then change no parameter, moment or count of steps. Optimizers that are
    not fused are the CPU's, where a look waits for nothing.
    """
    if optimizer.defaults["fused"]:
        optimizer.found_inf = skip  # type: ignore[attr-defined]
        optimizer.step()
    elif not skip:
        optimizer.step()


class SavedBuffers:
    """The buffers of a module as they are: running statistics, a center.

    Args:
        module: whose buffers change in place.
    """

    def __init__(self, module: nn.Module) -> None:
        self._alike: dict[torch.dtype, list[Tensor]] = {}
        for buffer in module.buffers():
            self._alike.setdefault(buffer.dtype, []).append(buffer)
        self._values = [_joined(buffers) for buffers in self._alike.values()]

    def restore_where(self, skip: Tensor) -> None:
        """Set the buffers back if the scalar `skip` is 1."""
        for buffers, values in zip(self._alike.values(), self._values, strict=True):
            kept = torch.where(skip > 0, values, _joined(buffers))
            parts = kept.split([buffer.numel() for buffer in buffers])
            torch._foreach_copy_(buffers, [part.view_as(buffer) for part, buffer in zip(parts, buffers, strict=True)])


def _joined(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])
