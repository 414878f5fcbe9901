"""The CUDA kernels of nt_xent and info_nce executed on the host, bindings included."""

import functools
import importlib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from cases.host_cuda import AMPLE, Device
from cases.nt_xent import *  # noqa: F403, the operators' tests on one backend
from cases.tiled import KINDS, check, every_kind_of_tile, oracle, with_gradients
from cases.tiled import rows as rows_of_views
from torch import Tensor

from ser_fast.ops import gpu_losses
from ser_fast.ops.nt_xent import info_nce, nt_xent

pytestmark = pytest.mark.usefixtures("poisoned")
f32, f64, bf16, f16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = (f32, f64, bf16, f16)
COLUMNS = (1, 33, 64, 200)
NOTHING = torch.empty(0, dtype=torch.int64)
TOP = 2.0**14  # as kernels have it


@pytest.fixture
def device() -> Device:
    return Device()


@pytest.fixture
def operators(device) -> Any:
    return torch.ops.ser_fast_native


@pytest.fixture
def backend(device) -> Iterator[str]:
    """The backend `cuda`, on CPU tensors."""
    with device.registered():
        yield "cuda"


# ---------------------------------------------------------------- rows, and what they become by formula


def real_of(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, f32)


def budget(dtype: torch.dtype) -> float:
    return 16 * torch.finfo(dtype).eps


def assert_within(actual: Tensor, expected: Tensor, scale: Tensor | float, eps: float) -> None:
    """|actual - expected| <= eps scale, but for what is subnormal; the same numbers are NaN or infinite."""
    subnormal = torch.finfo(actual.dtype).smallest_normal * torch.finfo(actual.dtype).eps
    actual, scale = actual.double(), torch.as_tensor(scale, dtype=f64).nan_to_num(0.0)
    torch.testing.assert_close(actual.isnan(), expected.isnan())
    exact = actual == expected  # also infinite ones
    assert (expected.isnan() | exact | ((actual - expected).abs() <= eps * scale + subnormal)).all()


def unit(x: Tensor, normalize: bool) -> Tensor:
    return x / x.norm(dim=1, keepdim=True).clamp(min=1e-12) if normalize else x


class Rows(NamedTuple):
    x0: Tensor  # (T, D)
    x1: Tensor  # (T, D) or (0, D)
    image: Tensor  # (T,)
    valid: Tensor  # (T,)
    normalize: bool
    u: Tensor  # (padded, DIM)
    table: Tensor
    exact: Tensor  # (count, D) float64: NaN for Inf, 0 where not valid
    take: Tensor  # (count,)

    @property
    def count(self) -> int:
        return len(self.exact)

    @property
    def padded(self) -> int:
        return len(self.u)

    @property
    def unit(self) -> Tensor:
        return unit(self.exact, self.normalize)


@functools.cache
def rows(
    operators: Any,
    dtype: torch.dtype,
    columns: int,
    *,
    views: bool,
    normalize: bool = True,
    seed: int = 0,
    offset: int = 0,
) -> Rows:
    """Rows of all sizes: a zero, a tiny one, a huge one, one that holds an Inf, and NaN where not valid.

    `offset`: where in memory they begin, in elements.
    """
    generator = torch.Generator().manual_seed(seed)
    t = 67 if views else 149
    x = torch.randn(2, t, columns, generator=generator, dtype=f64)
    valid = torch.rand(t, generator=generator) < 0.8
    valid[:10] = True
    valid[96:128] = True
    x[:, 1], x[:, 2] = 0, x[:, 2] * 1e-14
    x[:, 3] *= 10 if not normalize else 1e4 if dtype == f16 else 1e30
    x[0, 4, 0] = math.inf
    x[:, ~valid] = math.nan
    memory = torch.empty(x.numel() + offset, dtype=dtype)
    memory[offset:] = x.to(dtype).flatten()
    x0, x1 = memory[offset:].view(2, t, columns).unbind()
    x1 = x1 if views else x0[:0]
    image = torch.arange(t) // 5 * 2**55 - 2**59
    image[96:] = 7

    count = len(x0) + len(x1)
    padded, dim = -(-count // 128) * 128, -(-columns // 64) * 64
    half = dtype.itemsize == 2 and normalize
    u = torch.full((padded, dim), 7, dtype=f16 if half else real_of(dtype))
    table = torch.full((2 * padded + 3 * padded // 32,), 7)
    operators.nt_xent_prepare(x0, x1, image, valid, u, table, normalize)
    exact = torch.cat([x0, x1]).double()
    take = valid.repeat(2 if views else 1)
    exact = exact.where(exact.isfinite(), math.nan).where(take[:, None], 0)
    return Rows(x0, x1, image, valid, normalize, u, table, exact, take)


def pairs(
    operators: Any, dtype: torch.dtype, columns: int, views: bool, normalize: bool
) -> tuple[Rows, Rows, Tensor, Tensor]:
    """Queries, keys, the argument `positive`, and the key (count,) that it makes each query's, a valid one."""
    queries = rows(operators, dtype, columns, views=views, normalize=normalize)
    if views:
        return queries, queries, NOTHING, torch.arange(queries.count).roll(len(queries.x0))
    keys = rows(operators, dtype, columns, views=False, normalize=normalize, seed=1)
    candidates = keys.take.nonzero()[:, 0]
    chosen = torch.randint(len(candidates) // 3, (queries.count,), generator=torch.Generator().manual_seed(2))
    return queries, keys, candidates[chosen], candidates[chosen]


def similarities(queries: Rows, keys: Rows, partner: Tensor, temperature: float) -> Tensor:
    """(count,) s of the positives, 0 where not taken."""
    return ((queries.unit * keys.unit[partner]).sum(1) / temperature).where(queries.take, 0)


@pytest.mark.parametrize(("views", "normalize"), [(True, True), (False, True), (False, False)])
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prepare(operators, dtype, columns, views, normalize):
    x = rows(operators, dtype, columns, views=views, normalize=normalize)
    u = x.u[: x.count, :columns]
    assert_within(u, x.unit, x.unit.abs() + 1e-6 * normalize, budget(x.u.dtype) / 4)
    assert u[~x.take].eq(0).all()
    assert x.u[x.count :].eq(0).all()
    assert x.u[: x.count, columns:][x.exact.isfinite().all(1)].eq(0).all()

    image, take = torch.zeros(x.padded, dtype=torch.int64), torch.zeros(x.padded, dtype=torch.int64)
    image[: x.count], take[: x.count] = x.image.repeat(2 if views else 1), x.take.long()
    spans = image.view(-1, 32)
    expected = [image, take, spans.amin(1), spans.amax(1), take.view(-1, 32).amin(1)]
    assert torch.equal(x.table, torch.cat(expected))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_that_is_not_aligned(operators, dtype):
    aligned, moved = (rows(operators, dtype, 64, views=True, offset=offset) for offset in (0, 1))
    torch.testing.assert_close(moved.u, aligned.u, rtol=0, atol=0, equal_nan=True)


# ---------------------------------------------------------------- losses


def running_state(dtype: torch.dtype, splits: int, padded: int) -> tuple[Tensor, Tensor]:
    """State (2, splits, padded) and the log-sums (padded,) it stands for; rows without negatives, and a NaN."""
    generator = torch.Generator().manual_seed(3)
    top = 20 * torch.randn(splits, padded, generator=generator, dtype=f64)
    total = torch.rand(splits, padded, generator=generator, dtype=f64) * 100
    empty = torch.rand(splits, padded, generator=generator) < 0.3
    empty[:, 5:7] = True
    top[empty], total[empty] = -math.inf, 0
    total[0, 9] = math.nan
    state = torch.stack([top, total]).to(dtype)
    return state, ((state[0].double() * math.log(2)) + state[1].double().log()).logsumexp(0)


@pytest.mark.parametrize("temperature", [0.01, 0.2])
@pytest.mark.parametrize(("views", "normalize"), [(True, True), (False, True), (False, False)])
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_losses(operators, dtype, columns, views, normalize, temperature):
    queries, keys, positive, partner = pairs(operators, dtype, columns, views, normalize)
    state, negatives = running_state(real_of(dtype), 3, queries.padded)
    s = similarities(queries, keys, partner, temperature)
    expected = torch.logaddexp(negatives[: queries.count] - s, torch.zeros(())).where(queries.take, 0)
    loss = torch.full((queries.count,), 7, dtype=real_of(dtype))
    arguments = (queries.x0, queries.x1, keys.x0, keys.x1, positive, queries.table)
    operators.nt_xent_losses(*arguments, state, loss, temperature, views, False, normalize)
    assert_within(loss, expected, expected.abs() + s.abs() + 1 / temperature, budget(loss.dtype))
    assert (loss[5], loss[6]) == (0, 0)
    assert loss[9].isnan()


def test_losses_from_integers(operators):
    x = rows(operators, bf16, 64, views=True)
    generator = torch.Generator().manual_seed(4)
    sums = torch.randint(0, 2**50, (4, x.padded), generator=generator) * torch.tensor([[1], [1], [1], [0]])
    sums[:2, 20:], sums[2, 40:] = 0, 0  # small sums, and none
    sums[3, 50] = 1  # a NaN, and nothing else
    temperature = 0.07
    scale = torch.tensor(1 / (temperature * math.log(2)), dtype=f32).item()
    total = (sums[:3].double() * torch.tensor([[2.0**-42], [2.0**-70], [2.0**-98]], dtype=f64)).sum(0)
    s = similarities(x, x, torch.arange(x.count).roll(len(x.x0)), temperature)
    expected = torch.logaddexp(total.log()[: x.count] + scale * math.log(2) - s, torch.zeros(())).where(x.take, 0)
    expected[50] = math.nan
    loss = torch.full((x.count,), 7.0)
    operators.nt_xent_losses(x.x0, x.x1, x.x0, x.x1, NOTHING, x.table, sums, loss, temperature, True, True, True)
    assert_within(loss, expected, 1 / temperature, budget(f32))
    assert x.take[50]
    assert loss[60:67].eq(0).all()


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("temperature", [0.01, 0.2])
@pytest.mark.parametrize("views", [True, False])
@pytest.mark.parametrize("columns", [33, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_weights(operators, dtype, columns, views, temperature):
    """That a 2^(c s - shift) is what it should be, of which only the exponent of the shift is up to the kernel."""
    queries, keys, positive, partner = pairs(operators, dtype, columns, views, True)
    real, library, bounded = real_of(dtype), dtype.itemsize > 2, dtype.itemsize == 2 and temperature > 0.03
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(queries.count, generator=generator).to(real)
    loss = torch.rand(queries.count, generator=generator).to(real) * 3
    loss[7] = 0
    largest = torch.linalg.vector_norm(weight * torch.expm1(-loss), torch.inf).view(1)
    out = torch.full((3, queries.padded), 7, dtype=real)
    arguments = (queries.x0, queries.x1, keys.x0, keys.x1, positive, queries.table, weight, largest, loss)
    operators.nt_xent_gradient_weights(*arguments, out, temperature, views, bounded, library, True)
    a, shift, pull = out.double()[:, : queries.count]

    s = similarities(queries, keys, partner, temperature)
    w = weight.double() * (1 if library else TOP / largest.double())
    exact = (s + loss.double()) / math.log(2)
    if bounded:
        assert shift[queries.take].eq(1 / (temperature * math.log(2))).all() or shift[queries.take].std() == 0
    expected = (w * 2.0 ** (shift - exact)).where(queries.take, 0)
    assert_within(a, expected, expected.abs() * (1 + 1 / temperature), budget(real))
    if not bounded:
        assert (shift - exact)[queries.take & exact.isfinite()].abs().max() < 1e-4
    expected = (weight.double() * torch.expm1(-loss.double()) / temperature).where(queries.take, 0)
    assert_within(pull, expected, expected.abs(), budget(real))
    assert out[:, queries.count :].eq(0).all()
    assert out[:, : queries.count][:, ~queries.take].eq(0).all()


def through_unit(x: Rows, g: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of <unit(x), g> in x by autograd, and the scale (count, 1) of its terms."""
    leaf = x.exact.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(unit(leaf, x.normalize), leaf, g)
    lengths = x.exact.norm(dim=1, keepdim=True).clamp(min=1e-12) if x.normalize else 1
    if x.normalize:  # a shorter row has no direction, and no gradient
        gradient = gradient.where(~(x.exact.norm(dim=1, keepdim=True) < 1e-12), 0)
    gradient = gradient.where(x.take[:, None], 0)
    return gradient, g.abs().nan_to_num(0).amax(1, keepdim=True).clamp(min=1) / lengths


@pytest.mark.parametrize(
    ("side", "normalize"), [("views", True), ("query", True), ("key", True), ("views", False), ("key", False)]
)
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_finish_gradient(operators, dtype, columns, side, normalize):
    queries, keys, positive, partner = pairs(operators, dtype, columns, side == "views", normalize)
    real, library, temperature, splits = real_of(dtype), queries.u.dtype != f16, 0.2, 2
    x, y = (keys, queries) if side == "key" else (queries, keys)
    generator = torch.Generator().manual_seed(6)
    coefficients = torch.randn(3, queries.padded, generator=generator).to(real)
    coefficients[:, : queries.count][:, ~queries.take] = 0
    accumulated = torch.randn(splits, x.padded, x.u.shape[1], generator=generator).to(real)
    largest = torch.tensor([3.0], dtype=real)

    pull = coefficients[2, : queries.count].double()
    g = accumulated.double().sum(0)[: x.count, :columns] / temperature * (1 if library else 3.0 / TOP)
    order, first = NOTHING, NOTHING
    if side == "views":
        g = g + (pull + pull[partner])[:, None] * y.unit[partner]
    elif side == "query":
        g = g + pull[:, None] * y.unit[partner]
    else:
        terms = (pull[:, None] * queries.unit)[queries.take]
        g = g.index_add(0, partner[queries.take], terms)
        ordered, order = positive.masked_fill(~queries.take, keys.count).sort(stable=True)
        first = torch.searchsorted(ordered, torch.arange(keys.count + 1))
    expected, scale = through_unit(x, g)

    for d_dtype in {dtype, real}:
        d_x0, d_x1 = (torch.full(part.shape, 7, dtype=d_dtype) for part in (x.x0, x.x1))
        arguments = (x.x0, x.x1, y.x0, y.x1, x.table, coefficients, positive, order, first, accumulated, largest)
        number = ("views", "query", "key").index(side)
        operators.nt_xent_finish_gradient(*arguments, d_x0, d_x1, temperature, number, library, normalize)
        actual = torch.cat([d_x0, d_x1])
        fits = expected.abs() <= torch.finfo(d_dtype).max  # else it becomes infinite
        assert_within(
            actual.where(fits | expected.isnan(), 0), expected.where(fits | expected.isnan(), 0), scale, budget(d_dtype)
        )


@pytest.mark.parametrize("temperature", [0.01, 0.2])
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("dtype", [bf16, f16], ids=str)
def test_finish_detached(operators, dtype, columns, temperature):
    queries, keys, positive, partner = pairs(operators, dtype, columns, False, True)
    state, negatives = running_state(f32, 3, queries.padded)
    generator = torch.Generator().manual_seed(7)
    means = torch.randn(3, queries.padded, queries.u.shape[1], generator=generator)
    accumulated = means * state[1][..., None]  # (splits, padded, DIM)
    loss, gradient = torch.full((queries.count,), 7.0), torch.full((queries.count, columns), 7.0)
    operators.nt_xent_finish_detached(
        *(queries.x0, keys.x0, positive, queries.table, state, accumulated, loss, gradient, temperature, True)
    )
    s = similarities(queries, keys, partner, temperature)
    expected = torch.logaddexp(negatives[: queries.count] - s, torch.zeros(())).where(queries.take, 0)
    assert_within(loss, expected, expected.abs() + s.abs() + 1 / temperature, budget(f32))

    shares = (state[0].double() * math.log(2) + state[1].double().log() - negatives).exp()
    shares = shares.masked_fill(state[1] == 0, 0)  # (splits, padded), of the means
    mean = (shares[..., None] * means.double()).sum(0)[: queries.count, :columns]
    g = -torch.expm1(-expected)[:, None] / temperature * (mean - keys.unit[partner])
    expected, scale = through_unit(queries, g)
    assert_within(gradient, expected, scale * (1 + 1 / temperature), budget(f32))
    assert gradient[5:7].eq(0).all()


# ---------------------------------------------------------------- panels


def negatives_of(x: Rows, y: Rows) -> Tensor:
    """(padded, padded) bool"""
    return (x.table[: x.padded, None] != y.table[: y.padded]) & (
        (x.table[x.padded : 2 * x.padded, None] != 0) & (y.table[y.padded : 2 * y.padded] != 0)
    )


CORNERS = [(slice(0, 256), slice(0, 256)), (slice(128, 256), slice(0, 128)), (slice(0, 128), slice(128, 256))]


@pytest.mark.parametrize("dtype", [f32, f64], ids=str)
def test_panel_row_sums(operators, dtype):
    """Panels one after another, in two orders of size, with a NaN and rows without negatives."""
    x, y = (rows(operators, dtype, 33, views=views, seed=seed) for views, seed in ((True, 0), (False, 1)))
    s = 200 * torch.randn(x.padded, y.padded, generator=torch.Generator().manual_seed(8)).to(dtype)
    s[3, 4], s[20:22] = math.nan, -math.inf
    state = torch.zeros(2, 1, x.padded, dtype=dtype)
    state[0] = -math.inf
    for row in (slice(0, 128), slice(128, 256)):
        for columns in (slice(0, 128), slice(128, 256)):
            panel = s[row, columns].clone(memory_format=torch.contiguous_format)
            operators.nt_xent_panel_row_sums(panel, x.table, y.table, state, row.start, columns.start)
    expected = (s.double() * math.log(2)).masked_fill(~negatives_of(x, y), -math.inf).logsumexp(1)
    actual = state[0, 0].double() * math.log(2) + state[1, 0].double().log()
    assert_within(actual, expected, 1 + expected.abs(), budget(dtype))
    assert state[1, 0, 20:22].eq(0).all()


@pytest.mark.parametrize(("by_row", "by_key"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("dtype", [f32, f64], ids=str)
def test_panels_of_similarities(operators, dtype, by_row, by_key):
    x, y = (rows(operators, dtype, 33, views=views, seed=seed) for views, seed in ((True, 0), (False, 1)))
    generator = torch.Generator().manual_seed(9)
    s = torch.randn(x.padded, y.padded, generator=generator).to(dtype)
    of_x, of_y = (torch.randn(3, side.padded, generator=generator).to(dtype) for side in (x, y))
    expected = torch.zeros_like(s, dtype=f64)
    if by_row:
        expected += of_x[0].double()[:, None] * 2.0 ** (s.double() - of_x[1].double()[:, None])
    if by_key:
        expected += of_y[0].double() * 2.0 ** (s.double() - of_y[1].double())
    expected = expected.where(negatives_of(x, y), 0)
    for row, columns in CORNERS:
        panel = s[row, columns].clone(memory_format=torch.contiguous_format)
        arguments = (x.u, x.table, of_x, y.u, y.table, of_y, panel.new_empty(0, dtype=f16), panel)
        operators.nt_xent_gradient_panel(*arguments, 1.0, row.start, columns.start, 1, False, by_row, by_key)
        assert_within(panel, expected[row, columns], 10.0, budget(dtype))
        assert panel[~negatives_of(x, y)[row, columns]].eq(0).all()


def test_panels_of_what_was_kept(operators):
    """By tiles on and below the diagonal; those of one image were never written."""
    x = rows(operators, bf16, 33, views=True)
    x = x._replace(table=x.table.clone())
    x.table[: x.padded] = torch.arange(x.padded) // 5
    x.table[128:256] = 99  # the second tile of rows
    x.table[2 * x.padded : 2 * x.padded + x.padded // 32] = x.table[: x.padded].view(-1, 32).amin(1)
    x.table[2 * x.padded + x.padded // 32 : 2 * x.padded + x.padded // 16] = x.table[: x.padded].view(-1, 32).amax(1)
    generator = torch.Generator().manual_seed(10)
    p = torch.rand(x.padded, x.padded, generator=generator).tril(-1).to(f16)
    kept = torch.stack([p[:128, :128], p[128:, :128], torch.full((128, 128), math.nan, dtype=f16)])
    p[128:, 128:] = 0
    coefficients = torch.randn(3, x.padded, generator=generator)
    a = coefficients[0].double()
    expected = (p + p.T).double() * 2.0**-15 * (a[:, None] + a)
    for (row, columns), source in zip(CORNERS, (3, 2, 3), strict=True):
        panel = torch.full(expected[row, columns].shape, 7, dtype=f16)
        arguments = (x.u, x.table, coefficients, x.u, x.table, coefficients, kept.flatten(), panel)
        operators.nt_xent_gradient_panel(*arguments, 1.0, row.start, columns.start, source, True, True, True)
        assert_within(panel, expected[row, columns], 2.0**-14, torch.finfo(f16).eps)


def test_a_row_that_is_too_long_says_so(operators):
    query = torch.zeros(1, 100_000, dtype=bf16)
    table = torch.ones(2 * 128 + 12, dtype=torch.int64)
    state, accumulated = torch.zeros(2, 1, 128), torch.zeros(1, 128, 100_032)
    outputs = torch.zeros(1), torch.zeros(1, 100_000)
    with pytest.raises(RuntimeError, match="nt_xent_finish_detached on cuda: rows this long take more shared memory"):
        operators.nt_xent_finish_detached(
            query, query, torch.zeros(1).long(), table, state, accumulated, *outputs, 1.0, True
        )


# ---------------------------------------------------------------- tiles, paths, sizes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("function", [nt_xent, info_nce])
def test_tiles_of_every_kind(function, kind, backend, monkeypatch):
    every_kind_of_tile(function, kind, 128, backend)
    monkeypatch.setattr(gpu_losses, "PANEL", 128)
    monkeypatch.setattr(cuda_kernels(), "largest_stationary", lambda self, device: 0)
    every_kind_of_tile(function, kind, 128, backend)


def cuda_kernels() -> Any:
    return importlib.import_module("ser_fast.ops.cuda").CUDAKernels


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("path", ["stationary", "panel", "kept", "detached"])
@pytest.mark.parametrize("temperature", [0.01, 0.05, 0.2])
def test_paths(backend, temperature, path, splits, monkeypatch):
    """More than one tile each way, and shares of the keys of which some are empty."""
    if splits > 1 and path in ("panel", "kept"):
        pytest.skip("no walk over keys")
    monkeypatch.setattr(gpu_losses, "PANEL", 256)
    monkeypatch.setattr(gpu_losses, "_splits", lambda row_blocks, tiles, x: splits)
    monkeypatch.setattr(cuda_kernels(), "largest_stationary", lambda self, device: 512 if path == "stationary" else 0)
    x, y = rows_of_views(150, 40)
    options = {"temperature": temperature, "image": torch.arange(150) // 7}
    if path == "kept":
        options["memory_budget"] = 1 << 30
    if path == "detached":
        x.requires_grad_()
        loss = info_nce(x, y, reduction="none", backend=backend, **options)
        weight = torch.linspace(0.5, 1.5, 150)
        (gradient,) = torch.autograd.grad((weight * loss).sum(), x)
        check((loss.detach(), gradient), oracle(info_nce, x.detach(), y, **options)[:2], temperature)
        return
    for function in (nt_xent,) if path == "kept" else (nt_xent, info_nce):
        actual = with_gradients(function, x, y, backend=backend, **options)
        check(actual, oracle(function, x, y, **options), temperature)


@pytest.mark.parametrize("shared", [99 << 10, AMPLE, 227 << 10])
@pytest.mark.parametrize("columns", [64, 100, 200, 300, 512])
def test_columns(device, backend, columns, shared, monkeypatch):
    """Every width that has kernels of its own, on chips whose blocks have little shared memory and much."""
    device.become(1, shared)
    monkeypatch.setattr(importlib.import_module("ser_fast.ops.cuda"), "_shared_memory", lambda device: shared)
    x, y = rows_of_views(135, columns)
    options = {"temperature": 0.2, "image": torch.arange(135) // 9}
    check(with_gradients(nt_xent, x, y, backend=backend, **options), oracle(nt_xent, x, y, **options), 0.2)
    x.requires_grad_()
    loss = info_nce(x, y, reduction="none", backend=backend, **options)
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    x = x.detach().double().requires_grad_()
    expected = info_nce(x, y.double(), reduction="none", backend="reference", **options)
    check((loss.detach(), gradient), (expected.detach(), *torch.autograd.grad(expected.sum(), x)), 0.2)


@pytest.mark.parametrize("rows", [1, 128, 1000, 9408, 100_000, 400_000])
def test_every_pair_of_tiles_has_a_block(device, rows):
    tiles = -(-rows // 128)
    assert device.kernels.pairs_that_have_a_block(128 * tiles) == tiles * (tiles + 1) // 2


def test_columns_that_have_no_kernel(operators):
    u, table = torch.zeros(128, 320, dtype=f16), torch.zeros(2 * 128 + 12, dtype=torch.int64)
    state, out = torch.zeros(2, 1, 128), torch.zeros(1, 128, 320)
    with pytest.raises(RuntimeError, match="64, 128, 256 or 512 columns"):
        operators.nt_xent_detached_sums(u, table, u, table, state, out, 1.0, 128, True)


def test_too_little_shared_memory_says_so(device, operators):
    device.become(1, 48 << 10)
    u, table = torch.zeros(128, 64, dtype=f16), torch.zeros(2 * 128 + 12, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="more shared memory than a block has"):
        operators.nt_xent_symmetric_sums(u, table, torch.zeros(4, 128, dtype=torch.int64), u[:0].flatten(), 1.0, 128)
