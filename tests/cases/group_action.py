"""group_action on one backend: against torch, PIL and a loop over the formula. Test files import all of these tests,
with a fixture `backend` of their own."""

import math
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ser_fast.interpolation import INTERPOLATIONS, PADDINGS
from ser_fast.lattice import LatticeMap, positions
from ser_fast.ops.group_action import group_action

f32, f64, bf16, f16 = torch.float32, torch.float64, torch.bfloat16, torch.float16

# Relative to the largest value: what a sum of a few taps in that precision may lose.
BUDGET = {f32: 1e-5, f64: 1e-12}

OPTIONS = list(product(INTERPOLATIONS, PADDINGS, (False, True)))
SIZES = [(5, 7), (6, 4), (5, 5), (1, 3), (1, 1)]


def some_map(size: tuple[int, int], size_out: tuple[int, int], batch: int = 3) -> LatticeMap:
    """Rotation, shear, zooms in and out and shifts past the edge; seeded apart from x."""
    generator = torch.Generator().manual_seed(size[0] + 10 * size_out[1])
    linear = torch.eye(2) * torch.tensor([0.6, 1.0, 1.7]).repeat(batch)[:batch, None, None]
    linear = linear + 0.5 * torch.rand(batch, 2, 2, generator=generator) - 0.25
    return LatticeMap.affine(size, linear, torch.randn(batch, 2, generator=generator), size_out)


def away_from_ties(g: LatticeMap) -> Tensor:
    """(B, h, w) bool: the preimage is not on the border between two tokens, where "nearest" is a convention."""
    fractions = [u - u.round() for u in positions(g.linear, g.offset, g.size_in, g.size_out)]
    return (torch.stack(fractions).abs() > 1e-3).all(0).unflatten(-1, g.size_out)


def assert_within(actual: Tensor, expected: Tensor, budget: float) -> None:
    """The largest error is at most `budget` times the largest expected value."""
    assert actual.shape == expected.shape
    scale = expected.abs().max().item() if expected.numel() else 1.0
    torch.testing.assert_close(actual.to(f64), expected.to(f64), rtol=0, atol=budget * scale)


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]
    bits, expected_bits = (values.detach().contiguous().view(integer) for values in (actual, expected))
    torch.testing.assert_close(bits, expected_bits, rtol=0, atol=0)


def with_specials(x: Tensor) -> Tensor:
    """x with the values a product with weights would damage; NaN, the infinities, both zeros, a denormal."""
    x.view(-1)[:6] = torch.tensor([-0.0, 0.0, math.inf, -math.inf, math.nan, 1e-40], dtype=x.dtype)[: x.numel()]
    return x


# ---------------------------------------------------------------- against torch


@pytest.mark.parametrize("dtype", [f32, f64])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize(("size", "size_out"), [((7, 9), (6, 8)), ((8, 5), (5, 12)), ((4, 4), (9, 9))])
def test_general_maps_agree_with_grid_sample(backend, interpolation, padding, dtype, size, size_out):
    g = some_map(size, size_out)
    x = torch.randn(3, *size, 4, dtype=dtype)
    grid = F.affine_grid(g.theta(f64), [3, 4, *size_out], align_corners=False)
    expected = F.grid_sample(x.to(f64).movedim(-1, 1), grid, interpolation, padding, align_corners=False).movedim(1, -1)
    actual = group_action(x, g, interpolation=interpolation, padding=padding, backend=backend)
    assert actual.dtype == dtype
    clear = away_from_ties(g) if interpolation == "nearest" else slice(None)
    assert_within(actual[clear], expected[clear], BUDGET[dtype])


RESIZES = [((7, 9), (12, 20)), ((12, 10), (5, 4)), ((13, 4), (5, 9)), ((6, 4), (6, 4)), ((14, 14), (7, 1))]


@pytest.mark.parametrize("dtype", [f32, f64])
@pytest.mark.parametrize(("size", "size_out"), RESIZES)
@pytest.mark.parametrize(
    ("interpolation", "mode", "antialias"),
    [
        ("nearest", "nearest-exact", False),
        ("bilinear", "bilinear", False),
        ("bicubic", "bicubic", False),
        ("bilinear", "bilinear", True),
        ("bicubic", "bicubic", True),
        ("catmull_rom", "bicubic", True),
        ("area", "area", False),
        ("area", "area", True),
    ],
)
def test_resizes_agree_with_interpolate(backend, interpolation, mode, antialias, size, size_out, dtype):
    x = torch.randn(2, *size, 3, dtype=dtype)
    expected = F.interpolate(
        x.to(f64).movedim(-1, 1), size_out, mode=mode, antialias=antialias and mode != "area"
    ).movedim(1, -1)
    g = LatticeMap.resize(size, size_out)
    actual = group_action(x, g, interpolation=interpolation, antialias=antialias, backend=backend)
    assert_within(actual, expected, BUDGET[dtype])


@pytest.mark.parametrize(("size", "size_out"), RESIZES)
@pytest.mark.parametrize(
    ("interpolation", "resample"),
    [
        ("nearest", Image.Resampling.BOX),
        ("bilinear", Image.Resampling.BILINEAR),
        ("bicubic", Image.Resampling.BICUBIC),
        ("lanczos3", Image.Resampling.LANCZOS),
    ],
)
def test_resizes_agree_with_pil(backend, interpolation, resample, size, size_out):
    x = torch.randn(*size)
    expected = torch.tensor(np.asarray(Image.fromarray(x.numpy()).resize(size_out[::-1], resample)))
    g = LatticeMap.resize(size, size_out)
    actual = group_action(x[None, :, :, None], g, interpolation=interpolation, antialias=True, backend=backend)
    assert_within(actual[0, :, :, 0], expected, 1e-5)  # PIL rounds to float32 between its two passes


# ---------------------------------------------------------------- against the formula


def sinc(t: float) -> float:
    return math.sin(math.pi * t) / (math.pi * t) if t else 1.0


def keys(t: float, a: float) -> float:
    t = abs(t)
    if t < 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0


def mitchell(t: float) -> float:
    t = abs(t)
    if t < 1:
        return (7 * t**3 - 12 * t**2 + 16 / 3) / 6
    return (-7 / 3 * t**3 + 12 * t**2 - 20 * t + 32 / 3) / 6 if t < 2 else 0.0


KERNELS = {
    "nearest": lambda t: float(-0.5 < t <= 0.5),
    "bilinear": lambda t: max(0.0, 1 - abs(t)),
    "bicubic": lambda t: keys(t, -0.75),
    "catmull_rom": lambda t: keys(t, -0.5),
    "mitchell": mitchell,
    "lanczos3": lambda t: sinc(t) * sinc(t / 3) if abs(t) < 3 else 0.0,
}


def fold(t: int, size: int, padding: str) -> int | None:
    """The token that stands for tap t."""
    if 0 <= t < size:
        return t
    if padding == "border":
        return min(max(t, 0), size - 1)
    while padding == "reflection" and not 0 <= t < size:
        t = -1 - t if t < 0 else 2 * size - 1 - t
    return None if padding == "zeros" else t


def axis_row(y: float, step: float, size: int, interpolation: str, padding: str, antialias: bool) -> list[float]:
    """One row of W on one axis, as the head of interpolation.py has it, for a map that is no whole shift."""
    area = interpolation == "area"
    cut = padding == "border" and (area or antialias)
    if cut:  # "nearest" gives a tie to the higher token, and past the last one there is none
        y = min(max(y, 0.0), size - (1e-3 if interpolation == "nearest" else 0.0))
    s = max(1.0, step) if antialias else 1.0
    row, total = [0.0] * size, 0.0
    reach = math.ceil(3 * s + step) + 1
    for t in range(math.floor(y) - reach, math.floor(y) + reach + 1):
        distance = t + 0.5 - y
        if cut and not 0 <= t < size:
            continue
        if area:  # the tokens that [y - step/2, y + step/2] overlaps
            k = float(abs(distance) < (step + 1) / 2)
        else:
            k = KERNELS["catmull_rom" if antialias and interpolation == "bicubic" else interpolation](distance / s)
        total += k
        token = fold(t, size, padding)
        if token is not None:
            row[token] += k
    return [weight / total for weight in row]


def by_the_formula(x: Tensor, g: LatticeMap, *options: str | bool) -> Tensor:
    """(B, H, W, C) to (B, h, w, C) in float64, token by token."""
    ys, xs = positions(g.linear, g.offset, g.size_in, g.size_out)
    out = torch.zeros(*ys.shape, x.shape[-1], dtype=f64)
    for sample, token in product(*map(range, ys.shape)):
        step_y, step_x = (math.hypot(*row) for row in g.linear[sample].tolist())
        rows = torch.tensor(axis_row(ys[sample, token].item(), step_y, g.size_in[0], *options), dtype=f64)
        columns = torch.tensor(axis_row(xs[sample, token].item(), step_x, g.size_in[1], *options), dtype=f64)
        out[sample, token] = torch.einsum("i,j,ijc->c", rows, columns, x[sample].to(f64))
    return out.unflatten(1, g.size_out)


@pytest.mark.parametrize(("interpolation", "padding", "antialias"), OPTIONS)
@pytest.mark.parametrize("g", [some_map((4, 6), (3, 5)), LatticeMap.resize((5, 3), (2, 4), batch=3)])
def test_every_option_is_its_formula(backend, g, interpolation, padding, antialias):
    x = torch.randn(3, *g.size_in, 2)
    expected = by_the_formula(x, g, interpolation, padding, antialias)
    clear = away_from_ties(g) if interpolation == "nearest" else slice(None)
    for dtype, budget in BUDGET.items():
        actual = group_action(
            x.to(dtype), g, interpolation=interpolation, padding=padding, antialias=antialias, backend=backend
        )
        assert_within(actual[clear], expected[clear], budget)


# ---------------------------------------------------------------- golden cases

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "group_action.npz")
MODES = ("bilinear", "bicubic")
GOLDEN_BUDGET = {f32: 2e-5, f64: 1e-12}  # absolute, from the README of the cases


def golden(name: str) -> Tensor:
    return torch.from_numpy(GOLDEN[name])


@pytest.mark.parametrize("dtype", [f32, f64])
def test_golden_features(backend, squares, dtype):
    x = golden("x")
    for case, (rows, columns, k_own, k_other, mode) in enumerate(GOLDEN["feat_params"].tolist()):
        squares(case)
        undone = LatticeMap.rot90((11, 13), -k_own)
        resize = LatticeMap.resize(undone.size_out, (rows, columns))
        g = LatticeMap.rot90((rows, columns), k_other) @ resize @ LatticeMap.vflip(undone.size_out) @ undone
        actual = group_action(x.to(dtype), g, interpolation=MODES[mode], backend=backend)
        torch.testing.assert_close(actual.to(f64), golden(f"feat_{case}"), rtol=0, atol=GOLDEN_BUDGET[dtype])


@pytest.mark.parametrize("dtype", [f32, f64])
def test_golden_images_of_mixed_flips(backend, squares, dtype):
    x = golden("img_x")
    flips = LatticeMap.d4((20, 20), golden("img_flags") @ torch.tensor([2, 4]))
    for case, (rows, columns, k, mode) in enumerate(GOLDEN["img_params"].tolist()):
        squares(case)
        g = LatticeMap.rot90((rows, columns), k) @ LatticeMap.resize((20, 20), (rows, columns)) @ flips
        actual = group_action(x.to(dtype), g, interpolation=MODES[mode], backend=backend)
        torch.testing.assert_close(actual.to(f64), golden(f"img_{case}"), rtol=0, atol=GOLDEN_BUDGET[dtype])


@pytest.mark.parametrize("dtype", [f32, f64])
@pytest.mark.parametrize("name", sorted(name for name in GOLDEN if name.startswith("resize_")))
@pytest.mark.parametrize("vertical", [False, True])
def test_golden_resizing_matrices(backend, name, vertical, dtype):
    _, mode, length, length_out = name.split("_")
    n, n_out = int(length), int(length_out)
    size, size_out = ((n, 1), (n_out, 1)) if vertical else ((1, n), (1, n_out))
    basis = torch.eye(n, dtype=dtype)[None]  # (1, N, C): the action on it is W
    g = LatticeMap.resize(size, size_out)
    actual = group_action(basis, g, interpolation=mode, backend=backend)[0]
    torch.testing.assert_close(actual.to(f64), golden(name), rtol=0, atol=GOLDEN_BUDGET[dtype])


def test_golden_column_major_order(backend):
    transpose = LatticeMap.d4((11, 13), 5)
    actual = group_action(golden("flat_in"), transpose, backend=backend)
    assert_same_bits(actual.reshape(-1, 2), golden("flat_ref_order"))


# ---------------------------------------------------------------- copies


def d4_image(x: Tensor, code: int) -> Tensor:
    return torch.rot90(x.flip(2) if code >= 4 else x, code % 4, dims=(1, 2))


@pytest.mark.parametrize(("interpolation", "padding", "antialias"), OPTIONS)
def test_d4_is_a_copy_whatever_the_options(backend, interpolation, padding, antialias):
    x = with_specials(torch.randn(2, 3, 4, 2))
    for code in range(8):
        out = group_action(
            x,
            LatticeMap.d4((3, 4), code),
            interpolation=interpolation,
            padding=padding,
            antialias=antialias,
            backend=backend,
        )
        assert_same_bits(out, d4_image(x, code))


@pytest.mark.parametrize("dtype", [f32, f64, bf16, f16])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("code", range(8))
def test_d4_and_its_gradient_are_copies(backend, size, code, dtype):
    x = with_specials(torch.randn(2, *size, 3).to(dtype)).requires_grad_()
    out = group_action(x, LatticeMap.d4(size, code), backend=backend)
    assert_same_bits(out, d4_image(x, code))
    gradient = with_specials(torch.randn_like(out.detach()))
    undo = code if code >= 4 else -code % 4
    assert_same_bits(torch.autograd.grad(out, x, gradient)[0], d4_image(gradient, undo))


def test_d4_per_sample_copies(backend):
    x = with_specials(torch.randn(8, 5, 5, 3))
    out = group_action(x, LatticeMap.d4((5, 5), torch.arange(8)), backend=backend)
    assert_same_bits(out, torch.cat([d4_image(x[code : code + 1], code) for code in range(8)]))


@pytest.mark.parametrize("shift", [(1, 0), (-2, 3), (0, -6), (9, 9)])
@pytest.mark.parametrize(("interpolation", "padding"), list(product(INTERPOLATIONS, PADDINGS)))
def test_whole_shifts_are_copies(backend, interpolation, padding, shift):
    x = with_specials(torch.randn(2, 4, 6, 2))
    g = LatticeMap.affine((4, 6), torch.eye(2), torch.tensor(shift, dtype=f64))
    expected = torch.zeros_like(x)
    for i, j in product(range(4), range(6)):
        row, column = fold(i + shift[0], 4, padding), fold(j + shift[1], 6, padding)
        if row is not None and column is not None:
            expected[:, i, j] = x[:, row, column]
    out = group_action(x, g, interpolation=interpolation, padding=padding, backend=backend)
    assert_same_bits(out, expected)


def test_nearest_is_a_copy_under_any_map(backend):
    g = some_map((5, 7), (6, 8))
    assert away_from_ties(g).all()
    x = with_specials(torch.randn(3, 5, 7, 2))
    y, z = (
        position.floor().long().clamp(0, n - 1)
        for position, n in zip(positions(g.linear, g.offset, g.size_in, g.size_out), g.size_in, strict=True)
    )
    expected = x[torch.arange(3)[:, None], y, z].unflatten(1, (6, 8))
    assert_same_bits(group_action(x, g, interpolation="nearest", backend=backend), expected)


@pytest.mark.parametrize("padding", PADDINGS)
def test_nearest_without_shrinking_needs_no_antialias(backend, padding):
    linear = torch.tensor([[0.9, 0.1], [-0.2, 0.7]]).expand(3, 2, 2)
    g = LatticeMap.affine((5, 7), linear, torch.tensor([[3.1, 4.2], [-3.3, -4.1], [0.0, 0.0]]))
    x = torch.randn(3, 5, 7, 2)
    plain, stretched = (
        group_action(x, g, interpolation="nearest", padding=padding, antialias=antialias, backend=backend)
        for antialias in (False, True)
    )
    assert_same_bits(stretched, plain)


# ---------------------------------------------------------------- what W is


@pytest.mark.parametrize(("interpolation", "antialias"), list(product(INTERPOLATIONS, (False, True))))
@pytest.mark.parametrize("padding", ["border", "reflection"])
def test_a_constant_map_stays_constant(backend, interpolation, padding, antialias):
    options = {"interpolation": interpolation, "padding": padding, "antialias": antialias, "backend": backend}
    x = torch.tensor([3.0, -0.7], dtype=f64).expand(3, 5, 7, 2)
    for g in (some_map((5, 7), (6, 8)), LatticeMap.resize((5, 7), (2, 20)), LatticeMap.resize((5, 7), (1, 1))):
        out = group_action(x, g, **options)
        torch.testing.assert_close(out, x[:, :1, :1].expand_as(out), rtol=0, atol=1e-13)


@pytest.mark.parametrize(("interpolation", "padding", "antialias"), OPTIONS)
def test_the_action_is_linear(backend, interpolation, padding, antialias):
    options = {"interpolation": interpolation, "padding": padding, "antialias": antialias, "backend": backend}
    g = some_map((5, 7), (6, 8))
    x, y = torch.randn(2, 3, 5, 7, 2, dtype=f64)
    combined = group_action(2 * x - 3 * y, g, **options)
    assert_within(combined, 2 * group_action(x, g, **options) - 3 * group_action(y, g, **options), 1e-13)


@pytest.mark.parametrize(("interpolation", "antialias"), list(product(INTERPOLATIONS, (False, True))))
def test_zeros_outside_are_exactly_zero(backend, interpolation, antialias):
    g = LatticeMap.affine((5, 7), torch.eye(2) * 1.1, torch.tensor([0.3, 30.0]))
    out = group_action(
        torch.randn(2, 5, 7, 3), g, interpolation=interpolation, padding="zeros", antialias=antialias, backend=backend
    )
    assert_same_bits(out, torch.zeros_like(out))


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_nan_stays_in_its_sample(backend, interpolation):
    g = some_map((5, 7), (6, 8))
    x = torch.randn(3, 5, 7, 2)
    expected = group_action(x, g, interpolation=interpolation, backend=backend)
    x[1] = math.nan
    out = group_action(x, g, interpolation=interpolation, backend=backend)
    assert out[1].isnan().all()
    assert torch.equal(out[[0, 2]], expected[[0, 2]])


# ---------------------------------------------------------------- maps at their limits


def by_hand(linear: list[float], offset: list[float], size: tuple[int, int], size_out: tuple[int, int]) -> LatticeMap:
    """One map, past the checks of the constructors."""
    return LatticeMap(torch.tensor(linear, dtype=f64).view(1, 2, 2), torch.tensor([offset], dtype=f64), size, size_out)


NO_MAP = [
    ([math.nan, 0, 0, 1], [0, 0]),
    ([1, 0, 0, math.inf], [0, 0]),
    ([1, 0.5, 0.5, 1], [0, -math.inf]),
    ([1, 0, 0, 1], [math.nan, 0]),
    ([1e200, 0, 0, 1], [0, 0]),
]


def test_a_map_with_a_number_that_is_none_takes_nothing(backend):
    for linear, offset in NO_MAP:
        g = by_hand(linear, offset, (3, 5), (4, 2))
        for interpolation, padding, antialias in GRADIENT_OPTIONS:
            x = torch.randn(2, 3, 5, 2, requires_grad=True)
            out, valid = group_action(
                *(x, g),
                interpolation=interpolation,
                padding=padding,
                antialias=antialias,
                return_valid=True,
                backend=backend,
            )
            assert_same_bits(out, torch.zeros_like(out))
            assert not valid.any()
            assert not torch.autograd.grad(out, x, torch.ones_like(out))[0].any()


def test_a_map_that_cannot_be_inverted_is_its_formula(backend):
    x = torch.randn(1, 5, 4, 2, requires_grad=True)
    for linear in ([0, 0, 0, 0], [1, 2, 0.5, 1], [0, 0, 0, 1.3]):
        g = by_hand(linear, [0.3, -0.4], (5, 4), (3, 9))
        out = group_action(x, g, backend=backend)
        assert_within(out.detach(), by_the_formula(x.detach(), g, "bicubic", "border", False), 1e-5)
        (gradient,) = torch.autograd.grad(out, x, torch.ones_like(out))
        (expected,) = torch.autograd.grad(group_action(x, g, backend="reference"), x, torch.ones_like(out))
        assert_within(gradient, expected, 1e-5)


@pytest.mark.parametrize("padding", PADDINGS)
def test_far_outside_the_lattice(backend, padding):
    """Positions of 4e6 to 4e9 tokens are as exact as near ones; farther out nothing changes."""
    x = torch.randn(1, 4, 6, 2, dtype=f64)
    for far in (4_000_000, 1 << 32):
        offset = [far - 8.0 * (padding == "reflection") + 0.3125, -0.25]
        near = [{"zeros": 40.0, "border": 40.0, "reflection": far % 8 + 0.3125}[padding], -0.25]
        if far < 1 << 32:
            found, expected = (
                group_action(x, by_hand([1, 0, 0, 1], place, (4, 6), (4, 6)), padding=padding, backend=backend)
                for place in (offset, near)
            )
            assert_within(found, expected, 1e-9)
        beyond = [
            group_action(x, by_hand([1, 0, 0, 1], [place, 0], (4, 6), (1, 6)), padding=padding, backend=backend)
            for place in (1e10, 1e30)
        ]
        assert_same_bits(*beyond)


@pytest.mark.parametrize(("interpolation", "padding"), list(product(INTERPOLATIONS, PADDINGS)))
def test_a_step_is_no_longer_than_sixteen_lattices(backend, interpolation, padding):
    """One output token, in the middle: its row depends on the step alone, and takes no time in proportion to it."""
    x = torch.randn(1, 3, 4, 2)
    options = {"interpolation": interpolation, "padding": padding, "antialias": True, "backend": backend}
    longest = group_action(x, by_hand([48, 0, 0, 64], [0, 0], (3, 4), (1, 1)), **options)
    for scale in (1e3, 1e9, 1e60):
        g = by_hand([scale, 0, 0, scale], [0, 0], (3, 4), (1, 1))
        assert_same_bits(group_action(x, g, **options), longest)


# ---------------------------------------------------------------- gradients

GRADIENT_OPTIONS = [
    ("bicubic", "border", False),
    ("bilinear", "zeros", True),
    ("mitchell", "reflection", False),
    ("area", "border", True),
    ("nearest", "zeros", False),
]


@pytest.mark.parametrize(("interpolation", "padding", "antialias"), OPTIONS)
@pytest.mark.parametrize("dtype", [f32, f64])
def test_the_gradient_is_the_adjoint(backend, interpolation, padding, antialias, dtype):
    options = {"interpolation": interpolation, "padding": padding, "antialias": antialias, "backend": backend}
    for g in (some_map((5, 7), (6, 8)), LatticeMap.resize((6, 4), (3, 9))):
        x = torch.randn(3, *g.size_in, 2, dtype=dtype, requires_grad=True)
        out = group_action(x, g, **options)
        y = torch.randn_like(out)
        (transposed,) = torch.autograd.grad(out, x, y)
        assert transposed.dtype == dtype
        forward = (out.detach().to(f64) * y).sum()
        backward = (x.detach().to(f64) * transposed).sum()
        assert abs(forward - backward) <= BUDGET[dtype] * (out.norm() * y.norm())


def test_the_gradient_is_deterministic(backend):
    x = torch.randn(3, 9, 9, 5, requires_grad=True)
    out = group_action(x, some_map((9, 9), (40, 40)), backend=backend)
    y = torch.randn_like(out)
    first, second = (torch.autograd.grad(out, x, y, retain_graph=True)[0] for _ in range(2))
    assert_same_bits(first, second)


def test_no_gradient_is_asked_of_the_map(backend):
    g = some_map((3, 4), (2, 5))
    out = group_action(torch.randn(3, 3, 4, 2), g, backend=backend)
    assert not out.requires_grad


# ---------------------------------------------------------------- dtypes, layouts, shapes


@pytest.mark.parametrize("dtype", [bf16, f16])
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_half_precision_is_rounded_once(backend, interpolation, dtype):
    g = some_map((5, 7), (6, 8))
    x = torch.randn(3, 5, 7, 4).to(dtype).requires_grad_()
    exact_x = x.detach().float().requires_grad_()
    out, exact = (group_action(values, g, interpolation=interpolation, backend=backend) for values in (x, exact_x))
    y = torch.randn(out.shape).to(dtype)
    (gradient,), (exact_gradient,) = torch.autograd.grad(out, x, y), torch.autograd.grad(exact, exact_x, y.float())
    for low, full in ((out, exact), (gradient, exact_gradient)):
        assert low.dtype == dtype
        # Half a unit in the last place, and what two float32 sums may differ by.
        torch.testing.assert_close(low.float(), full, rtol=torch.finfo(dtype).eps / 2, atol=5e-6)


@pytest.mark.parametrize(
    "strided",
    [
        lambda: torch.randn(3, 4, 5, 7).permute(0, 2, 3, 1),
        lambda: torch.randn(3, 7, 5, 4).transpose(1, 2),
        lambda: torch.randn(3, 5, 7, 8)[..., 1::2],
        lambda: torch.randn(6, 10, 7, 4)[::2, ::2],
        lambda: torch.randn(1, 5, 7, 4).expand(3, -1, -1, -1),
        lambda: torch.randn(3, 5, 7, 1).expand(-1, -1, -1, 4),
        lambda: torch.randn(3, 4, 35).mT,
    ],
    ids=["NCHW", "transposed", "channels", "rows", "one sample", "one channel", "tokens"],
)
@pytest.mark.parametrize("g", [some_map((5, 7), (6, 8)), LatticeMap.rot90((5, 7), 1)])
def test_any_strides(backend, strided, g):
    x = strided()
    assert not x.is_contiguous()
    assert_within(group_action(x, g, backend=backend), group_action(x.contiguous(), g, backend=backend), 1e-6)


@pytest.mark.parametrize("g", [some_map((5, 7), (6, 8)), LatticeMap.rot90((5, 7), 1)])
def test_any_strides_of_the_gradient(backend, g):
    x = torch.randn(3, 5, 7, 4, requires_grad=True)
    out = group_action(x, g, backend=backend)
    for y in (torch.ones(()).expand_as(out), torch.randn(3, 4, *g.size_out).permute(0, 2, 3, 1)):
        strided, contiguous = (
            torch.autograd.grad(out, x, gradient, retain_graph=True)[0] for gradient in (y, y.contiguous())
        )
        assert_within(strided, contiguous, 1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_both_layouts_agree(backend, size):
    g = some_map(size, (4, 3))
    x = torch.randn(3, *size, 2)
    expected = group_action(x, g, backend=backend)
    assert expected.shape == (3, 4, 3, 2)
    assert_same_bits(group_action(x.flatten(1, 2), g, backend=backend), expected.flatten(1, 2))


@pytest.mark.parametrize("channels", [0, 1, 7, 33, 130])
@pytest.mark.parametrize("size", [(5, 7), (1, 1), (1, 3)])
def test_channels_do_not_mix(backend, channels, size):
    g = some_map(size, (4, 3))
    x = torch.randn(3, *size, channels, dtype=f64, requires_grad=True)
    out = group_action(x, g, backend=backend)
    assert out.shape == (3, 4, 3, channels)
    for channel in range(channels):
        alone = group_action(x[..., channel : channel + 1], g, backend=backend)
        torch.testing.assert_close(out[..., channel : channel + 1], alone, rtol=0, atol=1e-14)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(gradient, gradient[..., :1].expand_as(gradient), rtol=0, atol=1e-14)


@pytest.mark.parametrize("maps", [0, 1])
def test_no_samples(backend, maps):
    x = torch.randn(0, 5, 7, 3, requires_grad=True)
    g = LatticeMap.resize((5, 7), (2, 3), batch=maps)
    out, valid = group_action(x, g, return_valid=True, backend=backend)
    assert out.shape == (0, 2, 3, 3)
    assert valid.shape == (0, 6)
    assert torch.autograd.grad(out.sum(), x)[0].shape == x.shape


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)])
def test_empty_lattices(backend, size):
    x = torch.randn(2, *size, 3, requires_grad=True)
    out, valid = group_action(x, LatticeMap.identity(size), return_valid=True, backend=backend)
    assert out.shape == x.shape
    assert valid.shape == (2, 0)
    assert torch.autograd.grad(out.sum(), x)[0].shape == x.shape
    assert group_action(x.flatten(1, 2), LatticeMap.rot90(size, 1), backend=backend).shape == (2, 0, 3)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_from_a_single_token(backend, interpolation):
    x = torch.randn(2, 1, 1, 3)
    out = group_action(x, LatticeMap.resize((1, 1), (3, 4)), interpolation=interpolation, backend=backend)
    torch.testing.assert_close(out, x.expand(2, 3, 4, 3), rtol=1e-6, atol=0)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_one_map_serves_every_sample(backend, interpolation):
    one = some_map((5, 7), (6, 8), batch=1)
    each = one[torch.zeros(3, dtype=torch.long)]
    x = torch.randn(3, 5, 7, 2)
    out, valid = group_action(x, one, interpolation=interpolation, return_valid=True, backend=backend)
    assert_same_bits(out, group_action(x, each, interpolation=interpolation, backend=backend))
    assert torch.equal(valid, each.valid())


@pytest.mark.parametrize("flat", [False, True])
def test_valid_is_that_of_the_map(backend, flat):
    g = some_map((5, 7), (6, 8))
    x = torch.randn(3, 5, 7, 2)
    out, valid = group_action(x.flatten(1, 2) if flat else x, g, return_valid=True, backend=backend)
    assert torch.equal(valid, g.valid())
    assert 0 < valid.sum() < valid.numel()
    assert_same_bits(out.reshape(3, 6, 8, 2), group_action(x, g, backend=backend))


def test_each_sample_follows_its_own_map(backend):
    g = some_map((5, 7), (6, 8))
    x = torch.randn(3, 5, 7, 2, dtype=f64)
    alone = [group_action(x[i : i + 1], g[i : i + 1], antialias=True, backend=backend) for i in range(3)]
    assert_within(group_action(x, g, antialias=True, backend=backend), torch.cat(alone), 1e-14)


# ---------------------------------------------------------------- autocast


@pytest.mark.parametrize("dtype", [bf16, f16])
def test_autocast_changes_nothing(backend, dtype):
    g = some_map((5, 7), (6, 8))
    x = torch.randn(3, 5, 7, 2, requires_grad=True)
    expected = group_action(x, g, backend=backend)
    with torch.autocast("cpu", dtype):
        out = group_action(x, g, backend=backend)
        gradient = torch.autograd.grad(out.square().sum(), x)[0]
    assert_same_bits(out, expected)
    assert_same_bits(gradient, torch.autograd.grad(expected.square().sum(), x)[0])
