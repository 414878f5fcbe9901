"""Random calls of the operations, each against the oracle in float64; the same ones every time.

A failing case says its seed: `pytest tests/test_fuzz.py -k "seed-17"` runs its block of cases again.
"""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch
from cases.group_action import away_from_ties
from torch import Tensor

from ser_fast.interpolation import INTERPOLATIONS, PADDINGS
from ser_fast.lattice import LatticeMap
from ser_fast.ops.backends import reason_not
from ser_fast.ops.group_action import group_action
from ser_fast.ops.nt_xent import info_nce, nt_xent

T = TypeVar("T")
f32, f64, bf16, f16 = torch.float32, torch.float64, torch.bfloat16, torch.float16

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(reason_not("cpu", "cpu") is not None, reason="no native extension"),
    pytest.mark.usefixtures("poisoned"),
]

SEEDS = 20  # blocks of cases
ACTIONS, LOSSES = 150, 70  # cases a block


class Draw:
    """Choices from a seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def whole(self, least: int, most: int) -> int:
        return int(torch.randint(least, most + 1, (), generator=self.generator))

    def one(self, choices: list[T]) -> T:
        return choices[self.whole(0, len(choices) - 1)]

    def chance(self, share: float) -> bool:
        return bool(torch.rand((), generator=self.generator) < share)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=f64, generator=self.generator)


# What is lost to rounding: of a half-precision result, and in sums of float32.
BUDGET = {f64: 1e-11, f32: 2e-5, bf16: 2**-7, f16: 2**-9}


def assert_near(actual: Tensor, expected: Tensor, budget: float, case: object) -> None:
    """NaN and Inf are where they are expected, and the rest is near, relative to the largest."""
    assert actual.shape == expected.shape, case
    actual = actual.to(f64)
    assert torch.equal(actual.isfinite(), expected.isfinite()), f"{case}: other places are not finite"
    known = expected.isfinite()
    if known.any():
        worst = (actual - expected)[known].abs().max().item()
        assert worst <= budget * max(1.0, expected[known].abs().max().item()), f"{case}: off by {worst}"


# ---------------------------------------------------------------- group_action


def some_map(draw: Draw, batch: int) -> LatticeMap:
    sides = [1, 1, 2, 3, 5, 6, 9, 14]
    size, size_out = ((draw.one(sides), draw.one(sides)) for _ in range(2))
    kind = draw.one(["d4", "resize", "crop", "rotate", "shift", "general", "composed", "empty"])
    codes = torch.randint(8, (batch,), generator=draw.generator)
    angle = 360 * torch.rand(batch, dtype=f64, generator=draw.generator)
    box = torch.rand(batch, 4, dtype=f64, generator=draw.generator) * 4 + torch.tensor([-1.0, -1.0, 0.3, 0.3])
    # A box may leave the lattice, not lie outside.
    corner, extent = box[:, :2], box[:, 2:]
    corner.clamp_(0.1 - extent, torch.tensor([size[0], size[0] if kind == "composed" else size[1]]) - 0.1)
    if kind == "d4":
        return LatticeMap.d4((size[0], size[0]), codes)
    if kind == "resize":
        return LatticeMap.resize(size, size_out, batch=batch)
    if kind == "crop":
        return LatticeMap.crop(size, box, size_out)
    if kind == "rotate":
        return LatticeMap.rotate(size, angle)
    if kind == "shift":
        return LatticeMap.affine(size, torch.eye(2), (4 * draw.normal(batch, 2)).round(), size_out)
    if kind == "composed":
        g = LatticeMap.d4((size[0], size[0]), codes)
        return LatticeMap.relative(LatticeMap.crop(g.size_out, box, size_out), LatticeMap.rotate(g.size_out, angle))
    if kind == "empty":
        return LatticeMap.affine(size, torch.eye(2), None, (0, size_out[1]))
    scale = 10 ** (draw.whole(-10, 10) / 10)
    linear = scale * (torch.eye(2, dtype=f64) + 0.7 * draw.normal(batch, 2, 2))
    return LatticeMap.affine(size, linear, draw.one([0.5, 3.0, 100.0]) * draw.normal(batch, 2), size_out)


def act(draw: Draw) -> None:
    batch, channels = draw.one([0, 1, 2, 3]), draw.one([1, 3, 8, 24, 130])
    g, dtype = some_map(draw, batch), draw.one([f32, f32, f64, bf16, f16])
    options: dict[str, Any] = {
        "interpolation": draw.one(list(INTERPOLATIONS)),
        "padding": draw.one(list(PADDINGS)),
        "antialias": draw.chance(0.4),
    }
    x = draw.normal(batch, *g.size_in, channels).to(dtype)
    if draw.chance(0.3):  # laid out in another way
        x = x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)
    weight = draw.normal(batch, *g.size_out, channels).to(dtype)
    case = (g.size_in, g.size_out, batch, channels, dtype, options, g.linear.tolist(), g.offset.tolist())

    def run(x: Tensor, weight: Tensor, backend: str) -> tuple[Tensor, Tensor]:
        x = x.clone().requires_grad_()
        out = group_action(x, g, backend=backend, **options)
        (gradient,) = torch.autograd.grad(out, x, weight)
        return out.detach(), gradient

    expected = run(x.to(f64), weight.to(f64), "reference")
    found = run(x, weight, "cpu")
    if options["interpolation"] in ("nearest", "area") and not away_from_ties(g).all():
        return  # which of two tokens is nearer, a last bit decides
    for actual, of in zip(found, expected, strict=True):
        assert actual.dtype == dtype, case
        assert_near(actual, of, BUDGET[dtype], case)


# ---------------------------------------------------------------- nt_xent, info_nce


def contrast(draw: Draw) -> None:
    function: Callable[..., Tensor] = draw.one([nt_xent, info_nce])
    rows, dim = draw.one([0, 1, 2, 5, 17, 60, 300]), draw.one([1, 2, 8, 33])
    keys = rows if function is nt_xent or draw.chance(0.4) else rows + draw.one([0, 1, 40])
    dtype = draw.one([f32, f32, f64, bf16, f16])
    options: dict[str, Any] = {
        "temperature": draw.one([0.01, 0.029, 0.03, 0.07, 0.3, 1.0, 20.0]),
        "normalize": draw.chance(0.85),
        "reduction": "none",
    }
    images = draw.one([1, 2, max(1, rows // 3), 10 * rows + 1])
    numbers = torch.randint(images, (keys,), generator=draw.generator) * draw.one([1, -(2**40)])
    if draw.chance(0.7):
        options["image"] = numbers[:rows]
        if keys != rows:
            options["key_image"] = numbers
    if draw.chance(0.4):
        options["valid"] = torch.rand(rows, generator=draw.generator) < 0.8
    if function is info_nce and keys and draw.chance(0.4):
        options["positive"] = torch.randint(keys, (rows,), generator=draw.generator)
    if function is info_nce and draw.chance(0.3):
        options["key_valid"] = torch.rand(keys, generator=draw.generator) < 0.8
    scale = 1.0 if options["normalize"] else math.sqrt(options["temperature"]) / 2
    x, y = scale * draw.normal(rows, dim), scale * draw.normal(keys, dim)
    if draw.chance(0.4):  # views that agree
        y[:rows] = x + 0.3 * y[:rows]
    for z in (x, y):
        for row in range(len(z)):
            if draw.chance(0.05):  # duplicates, rows of zeros, short and long rows
                longer = 1e3 if options["normalize"] else 1.0  # similarities must not be large
                z[row] = draw.one([z[0].clone(), z[row] * 0, z[row] * 1e-3, z[row] * longer])
    x, y = x.to(dtype), y.to(dtype)
    poisoned = rows > 0 and draw.chance(0.1)
    if poisoned:
        x[draw.whole(0, rows - 1), 0] = draw.one([math.nan, math.inf])
    need = draw.one([(True, True), (True, False), (False, True)])
    if function is nt_xent:
        need = (True, True)
    weight = draw.normal(2 * rows if function is nt_xent else rows)
    case = (function.__name__, rows, keys, dim, dtype, need, options)

    def run(x: Tensor, y: Tensor, backend: str) -> tuple[Tensor, ...]:
        x, y = x.clone().requires_grad_(need[0]), y.clone().requires_grad_(need[1])
        loss = function(x, y, backend=backend, **options)
        wanted = [z for z in (x, y) if z.requires_grad]
        return loss.detach(), *torch.autograd.grad((weight.to(loss.dtype) * loss).sum(), wanted)

    expected = run(x.to(f64), y.to(f64), "reference")
    found = run(x, y, "cpu")
    # Similarities are as large as 1 / temperature, and are rounded before they are powers.
    budget = max(BUDGET[dtype], (4e-15 if dtype == f64 else 4e-6) / options["temperature"])
    assert_near(found[0], expected[0], budget if dtype in (f64, f32) else 2e-6 / options["temperature"] + 1e-5, case)
    for actual, of in zip(found[1:], expected[1:], strict=True):
        assert actual.dtype == dtype, case
        if not poisoned:  # which gradients a row of NaN reaches is not said
            assert_near(actual, of.to(dtype).to(f64) if dtype == f16 else of, budget, case)


@pytest.mark.parametrize("seed", range(SEEDS), ids=lambda seed: f"seed-{seed}")
@pytest.mark.parametrize(("cases", "run"), [(ACTIONS, act), (LOSSES, contrast)], ids=["group_action", "losses"])
def test_random_calls_agree_with_the_oracle(cases: int, run: Callable[[Draw], None], seed: int) -> None:
    for case in range(cases):
        number = 1000 * seed + case
        try:
            run(Draw(number))
        except Exception as error:
            raise AssertionError(f"seed {seed}, case {case}, Draw({number}): {error}") from error
