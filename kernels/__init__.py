"""The backend `triton`: the operations as Triton kernels."""

from torch import Tensor

from ser_fast.kernels.group_action import resample
from ser_fast.kernels.nt_xent import TritonKernels
from ser_fast.ops.contract import GroupAction
from ser_fast.ops.gpu_losses import GPULosses

__all__ = ["TritonBackend"]


class TritonBackend(GPULosses):
    """Every operation of `ser_fast.ops.contract.Backend` by Triton kernels."""

    def __init__(self) -> None:
        super().__init__(TritonKernels())

    def group_action(self, x: Tensor, action: GroupAction) -> Tensor:
        return resample(x, action, transpose=False)

    def group_action_transpose(self, x: Tensor, action: GroupAction) -> Tensor:
        return resample(x, action, transpose=True)
