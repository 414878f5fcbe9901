"""What a call of a small operation costs beside its kernels: checks, torch's dispatcher, autograd, in microseconds.

A time is of ten calls, so 1 ms is 100 us a call. The floor is the backend's own functions, called directly with
the arguments that the operators give them.
"""

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from ser_fast import LatticeMap, group_action, nt_xent
from ser_fast.ops.backends import choose, implementation
from ser_fast.ops.contract import GroupAction, LossGradient, NTXent

CALLS = 10
BATCH, SIDE, CHANNELS = 2, 7, 32
ROWS, DIM, TEMPERATURE = 64, 32, 0.3
WAYS = ("forward", "forward and backward")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Kernels so small gain nothing from threads, which would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _repeated(call: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def calls(x: Tensor) -> Tensor:
        for _ in range(CALLS):
            out = call(x)
        return out

    return calls


def _gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    out = function(x)
    return torch.autograd.grad(out, x, torch.ones_like(out))[0]


@pytest.mark.parametrize("way", WAYS)
def bench_group_action_call(compare, backends, device, way: str) -> None:
    x = torch.randn(BATCH, SIDE * SIDE, CHANNELS, device=device)
    g = LatticeMap.rotate((SIDE, SIDE), torch.tensor([10.0, 30.0])).to(device)
    kernels = implementation(choose("group_action", "auto", x))
    action = GroupAction(g.linear, g.offset, g.size_in, g.size_out, "bicubic", "border", False)

    def call(x: Tensor, backend: str) -> Tensor:
        function = partial(group_action, g=g, backend=backend)
        return function(x) if way == "forward" else _gradient(function, x)

    def bare(x: Tensor) -> Tensor:
        out = kernels.group_action(x, action)
        return out if way == "forward" else kernels.group_action_transpose(torch.ones_like(out), action)

    compare(
        "group_action",
        {backend: _repeated(partial(call, backend=backend)) for backend in backends},
        x,
        oracle=partial(call, backend="reference"),
        floor=_repeated(bare),
        calls=CALLS,
        direction=way,
        B=BATCH,
        lattice=f"{SIDE}x{SIDE}",
        C=CHANNELS,
    )


@pytest.mark.parametrize("way", WAYS)
def bench_nt_xent_call(compare, backends, device, way: str) -> None:
    x = torch.randn(2, ROWS, DIM, device=device)
    image, valid = torch.arange(ROWS, device=device) // 4, torch.ones(ROWS, dtype=torch.bool, device=device)
    nothing = torch.empty(0, dtype=torch.uint8, device=device)
    kernels = implementation(choose("nt_xent", "auto", x))

    def call(x: Tensor, backend: str) -> Tensor:
        def function(x: Tensor) -> Tensor:
            return nt_xent(*x, temperature=TEMPERATURE, image=image, valid=valid, backend=backend)

        return function(x) if way == "forward" else _gradient(function, x)

    def bare(x: Tensor) -> Tensor:
        inputs = NTXent(*x, image, valid, TEMPERATURE, normalize=True)
        loss = kernels.nt_xent(inputs, nothing)
        if way == "forward":
            return loss.mean()
        return torch.stack(kernels.nt_xent_backward(inputs, LossGradient(torch.ones_like(loss), loss), nothing))

    compare(
        "nt_xent",
        {backend: _repeated(partial(call, backend=backend)) for backend in backends},
        x,
        oracle=partial(call, backend="reference"),
        floor=_repeated(bare),
        calls=CALLS,
        direction=way,
        T=ROWS,
        D=DIM,
    )
