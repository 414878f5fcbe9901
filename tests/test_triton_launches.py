"""What the Triton kernels launch and allocate, and that lattices that change from step to step compile nothing new."""

from importlib import import_module
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ser_fast.lattice import LatticeMap
from ser_fast.ops.backends import implementation, reason_not
from ser_fast.ops.contract import GroupAction
from ser_fast.ops.group_action import group_action
from ser_fast.ops.nt_xent import info_nce, nt_xent

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.skipif(reason_not("triton", DEVICE) is not None, reason="triton can't run here"),
    pytest.mark.usefixtures("poisoned"),
]


class Recorder(TorchDispatchMode):
    """Takes a kernel's launches instead of running them; the sizes in bytes of what torch allocates meanwhile."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kernel: Any) -> None:
        super().__init__()
        self.launches: list[dict[str, Any]] = []
        self.allocated: list[int] = []
        # kernel[grid](...) is kernel.run(..., grid=grid), compiled or interpreted.
        monkeypatch.setattr(kernel, "run", lambda *args, **options: self.launches.append(options))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in inputs:
                self.allocated.append(x.untyped_storage().nbytes())
        return out


@pytest.fixture
def kernels() -> ModuleType:
    return import_module("ser_fast.kernels.group_action")


def test_the_action_is_one_kernel_and_one_tensor_each_way(monkeypatch, kernels):
    g = LatticeMap.resize((9, 6), (5, 7), batch=2).to(DEVICE)
    x = torch.randn(2, 54, 24, device=DEVICE)
    recorder = Recorder(monkeypatch, kernels._resample)
    action = GroupAction(g.linear, g.offset, g.size_in, g.size_out, "bicubic", "border", False)
    with recorder:
        out = implementation("triton").group_action(x, action)
        implementation("triton").group_action_transpose(out, action)
    assert len(recorder.launches) == 2
    assert recorder.allocated == [2 * 35 * 24 * 4, 2 * 54 * 24 * 4]  # the outputs; W would take 2 * 35 * 54 * 4


def test_lattices_batches_and_maps_share_one_compilation(monkeypatch, kernels):
    """A launch is compiled for its constants, the types, and whether 16 divides an integer: the channels alone."""
    recorder = Recorder(monkeypatch, kernels._resample)
    for batch, size, size_out in [(1, (4, 6), (7, 16)), (3, (16, 1), (3, 5)), (2, (8, 8), (1, 1))]:
        g = LatticeMap.resize(size, size_out, batch=batch).to(DEVICE)
        group_action(torch.randn(batch, *size, 32, device=DEVICE), g, backend="triton")
    constants = [{name: value for name, value in launch.items() if name != "grid"} for launch in recorder.launches]
    assert constants[0] == constants[1] == constants[2]
    kernel = kernels._resample
    unspecialised = kernel.kwargs["do_not_specialize"] if hasattr(kernel, "kwargs") else kernel.do_not_specialize
    assert set(unspecialised) == {"height", "width", "height_out", "width_out"}


def test_losses_launch_on_the_device_of_their_tensors(monkeypatch):
    """Whatever device is current: each launch is within the guard of the tensors' own."""
    guarded, outside = [], []

    class Guard:
        def __init__(self, x: Tensor) -> None:
            self.x = x

        def __enter__(self) -> None:
            guarded.append(self.x)

        def __exit__(self, *error: object) -> None:
            guarded.append(None)

    kernel_type = type(import_module("ser_fast.kernels.nt_xent_rows")._prepare)
    run = kernel_type.run

    def recorded(self: Any, *args: Any, **options: Any) -> Any:
        if not guarded or guarded[-1] is None:
            outside.append(self.fn.__name__)
        return run(self, *args, **options)

    monkeypatch.setattr(kernel_type, "run", recorded)
    monkeypatch.setattr(torch.cuda, "device_of", Guard)
    for dtype, dim in ((torch.bfloat16, 8), (torch.bfloat16, 300), (torch.float32, 8)):
        x, y = (torch.randn(4, dim, device=DEVICE).to(dtype).requires_grad_() for _ in range(2))
        for loss in (
            nt_xent(x, y, temperature=0.2, backend="triton"),
            info_nce(x, y, temperature=0.2, backend="triton"),
        ):
            loss.backward()
        info_nce(x, y.detach(), temperature=0.2, backend="triton").backward()
    assert len(guarded) > 20
    assert all(x.device.type == DEVICE for x in guarded[::2])
    assert outside == []
