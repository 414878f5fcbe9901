"""Other systems: what Windows, macOS and MPS lack is not asked for by `import ser_fast` and the reference path."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ser_fast import LatticeMap, SERLoss, group_action, info_nce, lattice
from ser_fast.interpolation import INTERPOLATIONS, PADDINGS
from ser_fast.ops import contract

# What a Python on Windows or macOS does not have: POSIX's modules, triton, and extensions that need a compiler.
WINDOWS = """
import sys
absent = ("resource", "fcntl", "pwd", "grp", "termios", "triton", "ser_fast._C", "ser_fast._C_cuda")
sys.modules.update(dict.fromkeys(absent))
import torch  # before the system looks like another: torch itself loads other libraries there
sys.platform = "win32"
import ser_fast
from ser_fast import LatticeMap, SERLoss
torch.manual_seed(0)
ser = SERLoss(dim=16, hidden_dim=8, out_dim=8, backend="reference")
g0, g1 = LatticeMap.resize((4, 4), (3, 4), batch=2), LatticeMap.rot90((4, 4), torch.tensor([1, 2]))
tokens = torch.randn(2, 3, 4, 16, requires_grad=True)
loss = ser(tokens, torch.randn(2, 4, 4, 16), g0, g1)
loss.backward()
assert tokens.grad.abs().sum() > 0
ser.backend = "auto"
with torch.no_grad():
    assert ser(tokens, torch.randn(2, 4, 4, 16), g0, g1) > 0
import ser_fast.training.environment as environment
assert environment.peak_memory(torch.device("cpu")) == 0
print("done")
"""


def test_import_and_the_reference_path_take_nothing_that_windows_lacks() -> None:
    done = subprocess.run([sys.executable, "-c", WINDOWS], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("done\n", "")


class NoFloat64(TorchDispatchMode):
    """A device that has no float64, as MPS: no operator may take or give it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for value in torch.utils._pytree.tree_leaves((args, kwargs, out)):
            wide = value.dtype if isinstance(value, torch.Tensor) else value
            if wide is torch.float64:
                raise TypeError(f"{func}: float64")
        return out


@contextmanager
def maps_as_on_mps() -> Iterator[None]:
    """The CPU in the place of MPS: maps are kept as there."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (lattice, contract):
            patch.setattr(module, "precision", lambda device: torch.float32)
        yield


def test_maps_are_float32_on_mps_alone() -> None:
    assert lattice.precision(torch.device("mps")) is torch.float32
    assert lattice.precision(torch.device("cpu")) is torch.float64
    assert lattice.precision(torch.device("cuda", 1)) is torch.float64


def test_a_device_without_float64_refuses_it() -> None:
    with NoFloat64(), pytest.raises(TypeError, match="float64"):
        torch.zeros(2, dtype=torch.float64)


MAPS = {  # on the host, in float64
    "d4": LatticeMap.d4((6, 6), torch.arange(8)),
    "general": LatticeMap.rotate((6, 6), torch.linspace(5, 85, 8)) @ LatticeMap.resize((4, 5), (6, 6)),
    "crop": LatticeMap.crop((6, 6), torch.tensor([[0.5, 1, 4, 3.5]]).expand(8, 4), (5, 4)),
}


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("name", MAPS)
def test_the_reference_moves_tokens_without_float64(name: str, interpolation: str, padding: str) -> None:
    x = torch.randn(8, *MAPS[name].size_in, 3).requires_grad_()
    options = {"interpolation": interpolation, "padding": padding, "return_valid": True, "backend": "reference"}
    expected, expected_valid = group_action(x, MAPS[name], **options)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), x)
    with maps_as_on_mps():
        g = MAPS[name].to("cpu")
        with NoFloat64():
            out, valid = group_action(x, g, **options)
            (gradient,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(out, expected, rtol=0, atol=0 if name == "d4" else 2e-5)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=2e-4)
    assert torch.equal(valid, expected_valid)


@pytest.mark.parametrize("keys", [False, True])
def test_the_loss_takes_no_float64(keys: bool) -> None:
    ser = SERLoss(dim=16, hidden_dim=8, out_dim=8, backend="reference")
    tokens = [torch.randn(2, 3, 4, 16), torch.randn(2, 4, 4, 16)]
    momentum = [torch.randn_like(x) for x in tokens] if keys else []
    g0 = LatticeMap.resize((4, 4), (3, 4), batch=2)
    g1 = LatticeMap.rotate((4, 4), torch.tensor([10.0, 90.0]))
    expected = ser(*tokens, g0, g1, *momentum)
    with maps_as_on_mps():
        g0, g1 = g0.to("cpu"), g1.to("cpu")
        with NoFloat64():
            loss = ser(*(x.requires_grad_() for x in tokens), g0, g1, *momentum)
            loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


def test_info_nce_takes_no_float64() -> None:
    query, key, image = torch.randn(6, 5, requires_grad=True), torch.randn(6, 5), torch.arange(6) // 2
    expected = info_nce(query, key, temperature=0.3, image=image, backend="reference")
    with NoFloat64():
        loss = info_nce(query, key, temperature=0.3, image=image, backend="reference")
        loss.backward()
    assert torch.equal(loss, expected)
