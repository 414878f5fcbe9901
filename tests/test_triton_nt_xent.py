"""What is particular to the Triton kernels of nt_xent and info_nce: tiles, paths and launches."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases.tiled import DEVICE, KINDS, check, every_kind_of_tile, oracle, rows, with_gradients
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ser_fast.ops import gpu_losses
from ser_fast.ops.backends import implementation, reason_not
from ser_fast.ops.contract import InfoNCE, LossGradient, NTXent
from ser_fast.ops.nt_xent import info_nce, nt_xent

if reason_not("triton", DEVICE) is not None:
    pytest.skip(f"triton: {reason_not('triton', DEVICE)}", allow_module_level=True)

import triton
import triton.language as tl
from check_triton import nt_xent_builds

from ser_fast.kernels import configs, nt_xent_rows, nt_xent_tiles
from ser_fast.kernels import nt_xent as launches

Config = configs.Config
SMALL = Config({"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 64, "GROUP": 2}, 4, 1)

pytestmark = pytest.mark.usefixtures("poisoned")
f16, f32, f64 = torch.float16, torch.float32, torch.float64
COUNT = 80  # rows a view


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles and panels so small that few rows make many of each kind."""
    monkeypatch.setattr(launches, "similarity_config", lambda capability: SMALL)
    running = {name: size for name, size in SMALL.tiles.items() if name != "GROUP"}
    monkeypatch.setattr(launches, "row_sums_config", lambda capability: Config(running, 4, 1))
    monkeypatch.setattr(launches, "stationary_config", lambda *_: Config({"BLOCK_M": 64, "BLOCK_N": 32}, 4, 1))
    monkeypatch.setattr(launches, "prepare_config", lambda columns: Config({"SPANS": 2}, 4, 1))
    monkeypatch.setattr(gpu_losses, "PANEL", 64)


# ---------------------------------------------------------------- tiles


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("function", [nt_xent, info_nce])
def test_tiles_of_every_kind(function: Callable[..., Tensor], kind: str) -> None:
    every_kind_of_tile(function, kind, 64, "triton")


@pytest.mark.parametrize("columns", [33, 128, 200, 512, 1024])
@pytest.mark.parametrize("capability", configs.CAPABILITIES)
def test_shipped_tiles(columns: int, capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each launch configuration once, with rows for more than one tile and a ragged last one."""
    monkeypatch.setattr(launches, "similarity_config", lambda _: configs._SIMILARITIES[capability])
    monkeypatch.setattr(launches, "row_sums_config", lambda _: configs._ROW_SUMS[capability])
    monkeypatch.setattr(launches, "stationary_config", lambda _, dim: configs._STATIONARY[capability, dim])
    x, y = rows(135, columns)
    options = {"temperature": 0.2, "image": torch.arange(135, device=DEVICE) // 9}
    check(with_gradients(nt_xent, x, y, backend="triton", **options), oracle(nt_xent, x, y, **options), 0.2)
    if columns in (33, 512):
        check(with_gradients(info_nce, x, y, backend="triton", **options), oracle(info_nce, x, y, **options), 0.2)


# ---------------------------------------------------------------- paths


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("path", "splits"), [("stationary", 1), ("stationary", 3), ("panel", 1), ("kept", 1)])
@pytest.mark.parametrize("temperature", [0.01, 0.1])
def test_backward_paths(temperature: float, path: str, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    largest = dict.fromkeys(configs.CAPABILITIES, 512 if path == "stationary" else 0)
    monkeypatch.setattr(launches, "LARGEST_STATIONARY", largest)
    monkeypatch.setattr(gpu_losses, "_splits", lambda row_blocks, tiles, device: min(splits, tiles))
    x, y = rows(COUNT, 40)
    options = {"temperature": temperature, "image": torch.arange(COUNT, device=DEVICE) // 7}
    if path == "kept":
        options["memory_budget"] = 1 << 30
        tiles = 6  # squares of 64 on and below the diagonal
        kept = implementation("triton").kept_bytes(COUNT, f16, temperature, True)
        assert kept == (2 * tiles * 64**2 if temperature >= 0.1 else 0)
    check(with_gradients(nt_xent, x, y, backend="triton", **options), oracle(nt_xent, x, y, **options), temperature)
    if path != "kept":
        actual = with_gradients(info_nce, x, y, backend="triton", **options)
        check(actual, oracle(info_nce, x, y, **options), temperature)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("temperature", "splits"), [(0.01, 1), (0.05, 3), (0.3, 3)])
def test_one_pass(temperature: float, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_losses, "_splits", lambda row_blocks, tiles, device: min(splits, tiles))
    query, key = rows(COUNT, 40)
    image = torch.arange(COUNT, device=DEVICE) // 7
    query.requires_grad_()
    loss = info_nce(query, key, temperature=temperature, image=image, reduction="none", backend="triton")
    weight = torch.linspace(0.5, 1.5, COUNT, device=DEVICE)
    (gradient,) = torch.autograd.grad((weight * loss).sum(), query)
    check((loss, gradient), oracle(info_nce, query, key, temperature=temperature, image=image)[:2], temperature)


@pytest.mark.usefixtures("small_tiles")
def test_library_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    """float64 rows over several panels, to the last digits; and none of it through float16."""
    x, y = rows(COUNT, 40, dtype=f64)
    for function in (nt_xent, info_nce):
        options = {"temperature": 0.02, "image": torch.arange(COUNT, device=DEVICE) // 7}
        actual = with_gradients(function, x, y, backend="triton", **options)
        torch.testing.assert_close(actual, oracle(function, x, y, **options), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("spread", [1.0, 1e-4, 1e-8])
def test_small_weights(spread: float) -> None:
    """Weights as of a mean over very many anchors, where a softmax entry times its weight is no float16."""
    x, y = rows(64, 40)
    x.requires_grad_()
    loss = nt_xent(x, y, temperature=0.3, backend="triton").float() * spread
    (gradient,) = torch.autograd.grad(loss * 1e3, x)  # the rows are float16, too
    z = x.detach().to(f64).requires_grad_()
    (expected,) = torch.autograd.grad(nt_xent(z, y.to(f64), temperature=0.3, backend="reference") * spread * 1e3, z)
    smallest = 2.0**-24  # of float16
    error = (gradient.to(f64) - expected).abs().max().item()
    assert error <= 4 * torch.finfo(f16).eps * expected.abs().max().item() + smallest


@pytest.mark.parametrize("temperature", [0.01, 0.3])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("function", [nt_xent, info_nce])
def test_nan_in_half_precision(function: Callable[..., Tensor], poison: float, temperature: float) -> None:
    x, y = rows(70, 40)
    valid = torch.arange(70, device=DEVICE) != 5
    x[5], x[2, 1] = poison, poison
    options = {"temperature": temperature, "backend": "triton", "valid": valid}
    loss, d_x, d_y = with_gradients(function, x, y, **options)
    assert loss[2].isnan()
    assert d_x[2].isnan().all()
    assert not d_x[5].any()
    assert not d_y[5].any()
    if function is nt_xent:  # the row is a negative of all others
        assert loss[valid.repeat(2)].isnan().all()
    x[2] = 1
    assert all(result.isfinite().all() for result in with_gradients(function, x, y, **options))


# ---------------------------------------------------------------- index arithmetic and sums


@triton.jit
def _triangle_of(t, out, N: tl.constexpr):
    n = tl.arange(0, N)
    i, j = nt_xent_tiles._triangle(tl.load(t + n))
    tl.store(out + n, i)
    tl.store(out + N + n, j)


@triton.jit
def _kept_of(r, c, out, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    n = tl.arange(0, N)
    tl.store(out + n, nt_xent_tiles._kept_at(tl.load(r + n), tl.load(c + n), BLOCK_M, BLOCK_N))


@triton.jit
def _add_all(values, out, N: tl.constexpr):
    nt_xent_tiles._add(out, tl.zeros((N,), tl.int32), tl.load(values + tl.program_id(0) * N + tl.arange(0, N)), 1)


def test_triangle() -> None:
    """The tile of a number is right next to every jump, for as many tiles as 2^20 rows have, and more."""
    sides = torch.tensor([1, 2, 3, 100, 3125, 8191, 8192, 65535, 65536, 2**22])
    jump = sides * (sides + 1) // 2
    t = torch.cat([jump - 1, jump, jump + 1, torch.tensor([0, 4])]).to(DEVICE)  # 32
    out = torch.empty(2, 32, dtype=torch.int64, device=DEVICE)
    _triangle_of[(1,)](t, out, N=32)
    i, j = out
    assert ((j >= 0) & (j <= i)).all()
    assert torch.equal(i * (i + 1) // 2 + j, t)


@pytest.mark.parametrize("capability", configs.CAPABILITIES)
def test_kept_offsets(capability: int) -> None:
    """Past 2^31, and within the bytes asked for."""
    count = 400_000
    tiles = configs._SIMILARITIES[capability].tiles
    block_m, block_n = tiles["BLOCK_M"], tiles["BLOCK_N"]
    r = torch.tensor([count - 1, count - 1, count - 1, 255, 256, 300_000, 128, 399_000], device=DEVICE)
    c = torch.tensor([count - 2, 0, 200_000, 3, 3, 299_999, 127, 398_999], device=DEVICE)
    out = torch.empty(8, dtype=torch.int64, device=DEVICE)
    _kept_of[(1,)](r, c, out, N=8, BLOCK_M=block_m, BLOCK_N=block_n)
    for row, column, at in zip(r.tolist(), c.tolist(), out.tolist(), strict=True):
        before = sum((i + 1) * (block_m // block_n) for i in range(row // block_m)) + column // block_n
        assert at == before * block_m * block_n + row % block_m * block_n + column % block_n
    assert out.max() > 2**31
    strips = math.ceil(count / block_m)
    assert out.max() < strips * (strips + 1) // 2 * block_m**2


def test_sums_are_exact_in_any_order() -> None:
    """Numbers from 2^-90 to 2^7 to the last bits of a float32, and the same integers in any order."""
    for top in (7, -21, -49):
        exponent = torch.linspace(top - 6, top, 256, dtype=f64)
        values = (2**exponent * (1 + torch.rand(256, dtype=f64)) / 2).to(DEVICE, f32)
        sums = torch.zeros(2, 4, dtype=torch.int64, device=DEVICE)
        _add_all[(8,)](values, sums[0], N=32)
        _add_all[(8,)](values.flip(0), sums[1], N=32)
        assert torch.equal(*sums)
        units = torch.tensor([2.0**-42, 2.0**-70, 2.0**-98, 0], dtype=f64, device=DEVICE)
        assert (sums[0].to(f64) * units).sum().item() == pytest.approx(values.to(f64).sum().item(), rel=1e-12)


# ---------------------------------------------------------------- launches and memory


class Allocations(TorchDispatchMode):
    """The sizes in bytes of what torch allocates."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not any(out is x for x in (*args, *(kwargs or {}).values())):
            self.sizes.append(out.untyped_storage().nbytes())
        return out


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """The kernels that are launched: their names and constants."""
    calls: list[tuple[str, dict[str, Any]]] = []
    kernel_type = type(nt_xent_rows._prepare)
    run = kernel_type.run

    def recorded(self: Any, *args: Any, **kwargs: Any) -> Any:
        constants = {name: value for name, value in kwargs.items() if name not in ("grid", "warmup")}
        calls.append((self.fn.__name__, constants))
        return run(self, *args, **kwargs)

    monkeypatch.setattr(kernel_type, "run", recorded)
    return calls


STEPS = {
    "nt_xent": ["_prepare", "_symmetric_sums", "_losses"],
    "nt_xent_backward": ["_prepare", "_gradient_weights", "_stationary_gradient", "_finish_gradient"],
    "info_nce_detached": ["_prepare", "_prepare", "_detached_sums", "_finish_detached"],
}


def step(name: str, count: int, dtype: torch.dtype = f16) -> Callable[[], Any]:
    """One operation on `count` rows, as its op calls it."""
    x, y = rows(count, 64, dtype=dtype)
    image, valid = torch.arange(count, device=DEVICE), torch.ones(count, dtype=torch.bool, device=DEVICE)
    loss, kept = torch.ones(2 * count, device=DEVICE), torch.empty(0, dtype=torch.uint8, device=DEVICE)
    views = NTXent(x, y, image, valid, 0.3, True)
    keys = InfoNCE(x, y, image, image, valid, valid, positive=image, temperature=0.3, normalize=True)
    backend = implementation("triton")
    calls: dict[str, Callable[[], Any]] = {
        "nt_xent": lambda: backend.nt_xent(views, kept),
        "nt_xent_backward": lambda: backend.nt_xent_backward(views, LossGradient(loss, loss), kept),
        "info_nce_detached": lambda: backend.info_nce_detached(keys),
    }
    return calls[name]


@pytest.mark.parametrize("name", STEPS)
def test_launches(name: str, launched: list[tuple[str, dict[str, Any]]]) -> None:
    """The kernels of a step, whose constants (what they are compiled for) the number of rows doesn't change."""
    step(name, 100)()
    first = list(launched)
    launched.clear()
    step(name, 171)()
    assert [kernel for kernel, _ in launched] == STEPS[name]
    assert launched == first


def test_sizes_are_not_specialized() -> None:
    for build in nt_xent_builds(90):
        kernel = build.kernel
        free = set(getattr(kernel, "kwargs", {}).get("do_not_specialize") or kernel.do_not_specialize)
        sizes = {name for name, kind in build.arguments.items() if kind == "i32"}
        assert sizes <= free, build.name


@pytest.mark.parametrize("dtype", [f16, f32])
@pytest.mark.parametrize("name", STEPS)
def test_memory_is_linear(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing has the size of the similarity matrix: the largest are the rows in float32, and a panel."""
    monkeypatch.setattr(gpu_losses, "PANEL", 128)
    count = 400
    call = step(name, count, dtype)
    with Allocations() as allocations:
        call()
    padded = 128 * math.ceil(2 * count / 128)
    assert max(allocations.sizes) <= max(4 * padded * 64, 4 * 128 * 128)
    assert 8 * max(allocations.sizes) < 4 * (2 * count) ** 2
