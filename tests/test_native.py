"""What only the native CPU kernels promise: bits, accuracy, memory, sanitizers. The operators' own tests run
on every backend, this one too, and are elsewhere."""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases.native_build import CI, CSRC, ROOT, compiled, missing, reason_no_sanitizer, run
from torch import Tensor

from ser_fast.lattice import LatticeMap
from ser_fast.ops.backends import reason_not
from ser_fast.ops.group_action import group_action
from ser_fast.ops.nt_xent import info_nce, nt_xent

f32, f64, bf16 = torch.float32, torch.float64, torch.bfloat16

_REASON = reason_not("cpu", "cpu")
pytestmark = [
    pytest.mark.skipif(_REASON is not None and not CI, reason=str(_REASON)),
    pytest.mark.usefixtures("poisoned"),
]


def python(program: str, **options: Any) -> str:
    """What the program prints, in a process of its own."""
    result = run(sys.executable, "-c", program, **options)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.fixture
def at_threads() -> Iterator[Callable[..., list[Any]]]:
    """Calls a function at 1, 2 and 4 threads, three times each: memory is laid out anew every time."""

    def call(function: Callable[[], Any]) -> list[Any]:
        results = []
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            results += [function() for _ in range(3)]
        return results

    before = torch.get_num_threads()
    yield call
    torch.set_num_threads(before)


def worst(actual: Tensor, expected: Tensor) -> float:
    """The largest error, relative to the largest expected value."""
    return ((actual.to(f64) - expected).abs().max() / expected.abs().max()).item()


# ---------------------------------------------------------------- group_action

MAPS = {
    "copy": LatticeMap.d4((14, 14), torch.arange(8)),
    "separable": LatticeMap.crop((14, 14), torch.rand(8, 4, generator=torch.Generator().manual_seed(0)) + 4, (12, 16)),
    "turned": LatticeMap.d4((14, 14), 1) @ LatticeMap.resize((11, 9), (14, 14)),
    "general": LatticeMap.rotate((14, 14), torch.linspace(10, 80, 8)),
}


def moved(g: LatticeMap, x: Tensor, cotangent: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """W_g x and W_g^T cotangent."""
    x = x.detach().requires_grad_()
    out = group_action(x, g, **options)
    return out.detach(), *torch.autograd.grad(out, x, cotangent)


def tokens(g: LatticeMap, channels: int, dtype: torch.dtype = f32, batch: int = 8) -> tuple[Tensor, Tensor]:
    """x on the lattice that g takes, and a cotangent on the one it gives."""
    return torch.randn(batch, *g.size_in, channels).to(dtype), torch.randn(batch, *g.size_out, channels).to(dtype)


@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
@pytest.mark.parametrize("g", MAPS.values(), ids=MAPS)
def test_group_action_gives_the_same_bits_at_any_number_of_threads(at_threads, g, dtype):
    x, cotangent = tokens(g, 300, dtype)
    first, *others = at_threads(lambda: moved(g, x, cotangent, backend="cpu"))
    for other in others:
        torch.testing.assert_close(other, first, rtol=0, atol=0)


@pytest.mark.parametrize("channels", [1, 63, 64, 65, 255, 256, 257, 513])
@pytest.mark.parametrize("g", MAPS.values(), ids=MAPS)
def test_any_number_of_channels(g, channels):
    x, cotangent = tokens(g, channels)
    actual = moved(g, x, cotangent, backend="cpu")
    expected = moved(g, x.to(f64), cotangent.to(f64), backend="reference")
    assert max(map(worst, actual, expected)) <= 1e-6


@pytest.mark.parametrize(
    "g",
    [
        LatticeMap.rotate((64, 64), 30.0),
        LatticeMap.resize((64, 64), (40, 23)),
        LatticeMap.rotate((14, 14), torch.linspace(0, 360, 67)),  # D4 and others in one batch
        LatticeMap.rotate((14, 14), torch.tensor([20.0, 0.0, 45.0]).repeat(11)),
    ],
    ids=["large rotation", "large resize", "many maps", "repeated maps"],
)
def test_large_lattices_and_many_maps(g):
    x, cotangent = tokens(g, 5, batch=len(g))
    for options in ({}, {"interpolation": "lanczos3", "padding": "reflection", "antialias": True}):
        actual = moved(g, x, cotangent, backend="cpu", **options)
        expected = moved(g, x.to(f64), cotangent.to(f64), backend="reference", **options)
        assert max(map(worst, actual, expected)) <= 1e-6


@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("size", [(0, 3), (3, 0), (0, 0)])
def test_an_empty_lattice_gives_zeros(size, padding):
    g = LatticeMap.affine(size, torch.eye(2)[None] * 0.7, torch.zeros(1, 2), (2, 2))
    out, gradient = moved(g, *tokens(g, 3, batch=1), padding=padding, backend="cpu")
    assert out.shape == (1, 2, 2, 3)
    assert not out.any()
    assert gradient.shape == (1, *size, 3)


@pytest.mark.parametrize("turns", [0, 1])
def test_a_token_with_one_tap_keeps_its_bits(turns):
    """Of 5 x 5 to 7 x 7 every third token lies on the centre of every second one, and its neighbours do not."""
    g = LatticeMap.rot90((7, 7), turns) @ LatticeMap.resize((5, 5), (7, 7))
    x = torch.full((1, 5, 5, 70), -0.0, dtype=bf16)
    x.view(torch.int16)[:, 2, 2] = 0x7FA1  # a NaN
    out = group_action(x, g, interpolation="bilinear", backend="cpu")
    expected = group_action(x[:, ::2, ::2], LatticeMap.rot90((3, 3), turns), backend="reference")
    assert (out[:, ::3, ::3].view(torch.int16) == expected.view(torch.int16)).all()


@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
@pytest.mark.parametrize("transform", ["copy", "separable", "general"])
def test_an_output_past_the_cache_has_the_same_bits(transform, dtype):
    """Large outputs are written past the caches; a sample alone is not large."""
    size, batch, channels = (14, 14), 100, 320  # 25 MB in float32
    g = {
        "copy": LatticeMap.rot90(size, torch.arange(batch) % 4),
        "separable": LatticeMap.resize(size, (12, 16), batch=batch),
        "general": LatticeMap.rotate(size, torch.linspace(5, 85, batch)),
    }[transform]
    x = torch.randn(batch, *size, channels).to(dtype)
    out = group_action(x, g, backend="cpu")
    for sample in (0, 37, batch - 1):
        one = group_action(x[sample : sample + 1], g[sample : sample + 1], backend="cpu")
        assert torch.equal(out[sample : sample + 1], one)


# ---------------------------------------------------------------- nt_xent and info_nce

KINDS = {  # temperature, normalize: with a bound on the similarities, and without
    "bounded": (0.3, True),
    "cold": (0.01, True),
    "unnormalized": (0.3, False),
}


class Case:
    """Rows near their positives, ids in no order, and invalid rows; `keys` is None for nt_xent."""

    def __init__(self, count: int, keys: int | None, dim: int, kind: str, images: int, invalid: float = 0.1) -> None:
        temperature, normalize = KINDS[kind]
        scale = 1 if normalize else dim**-0.5
        self.function = nt_xent if keys is None else info_nce
        self.x = torch.randn(count, dim) * scale
        self.y = torch.randn(keys or count, dim) * scale / 2
        self.y[:count] += self.x
        ids = torch.randint(-(2**60), 2**60, (images,))
        image = ids[torch.randint(images, (len(self.y),))]
        self.options = {
            "image": image[:count],
            "valid": torch.rand(count) >= invalid,
            "temperature": temperature,
            "normalize": normalize,
        }
        if keys is not None:
            self.options |= {"key_image": image, "key_valid": torch.rand(keys) >= invalid}

    def __call__(self, backend: str, dtype: torch.dtype = f32) -> tuple[Tensor, Tensor, Tensor]:
        """The loss of each row, and the gradients of a sum that weighs every row otherwise."""
        x, y = (z.detach().to(dtype).requires_grad_() for z in (self.x, self.y))
        loss = self.function(x, y, reduction="none", backend=backend, **self.options)
        weight = torch.linspace(0.5, 1.5, len(loss), dtype=dtype)
        return loss.detach(), *torch.autograd.grad(weight @ loss, (x, y))

    def detached(self, backend: str, dtype: torch.dtype = f32) -> tuple[Tensor, Tensor]:
        """The loss of each row and its gradient in one pass, for keys that need none."""
        x = self.x.to(dtype).requires_grad_()
        loss = info_nce(x, self.y.to(dtype), reduction="none", backend=backend, **self.options)
        return loss.detach(), *torch.autograd.grad(loss.sum(), x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("count", "keys", "dim"),
    [
        (100, None, 384),  # one block, whose product must not be split
        (250, None, 384),  # two
        (617, None, 32),  # five, ragged
        (1277, None, 32),  # nine
        (2500, None, 16),  # nine of 512 rows, ragged
        (617, 1100, 32),
        (1300, 1300, 32),
        (1100, 4700, 16),
    ],
)
def test_losses_give_the_same_bits_at_any_number_of_threads(at_threads, count, keys, dim, kind):
    case = Case(count, keys, dim, kind, images=count // 10)
    first, *others = at_threads(lambda: case("cpu"))
    assert all(part.any() for part in first)
    for other in others:
        torch.testing.assert_close(other, first, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("count", "keys"), [(300, 300), (1300, 1700), (4400, 4700)])  # blocks of 128 and of 256 rows
def test_one_pass_gives_the_same_bits_at_any_number_of_threads(at_threads, count, keys, kind):
    case = Case(count, keys, 16, kind, images=count // 10)
    first, *others = at_threads(lambda: case.detached("cpu"))
    assert all(part.any() for part in first)
    for other in others:
        torch.testing.assert_close(other, first, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("count", "keys"), [(130, 200), (1150, 1150)])
def test_one_pass_is_accurate_as_float32_can_be(count, keys, kind):
    case = Case(count, keys, 64, kind, images=count // 20)
    exact, oracle, actual = case.detached("reference", f64), case.detached("reference"), case.detached("cpu")
    for theirs, ours, truth in zip(oracle, actual, exact, strict=True):
        assert worst(ours, truth) <= 2**-22 / case.options["temperature"]
        if kind != "cold":
            assert worst(ours, truth) <= worst(theirs, truth) + 1e-7


@pytest.mark.parametrize("count", [250, 2500])  # blocks of 256 rows and of 512
def test_kept_similarities_give_the_same_gradient(at_threads, count):
    case = Case(count, None, 32, "bounded", images=count // 10)
    computed = case("cpu")
    case.options["memory_budget"] = 2**40
    for kept in at_threads(lambda: case("cpu")):
        torch.testing.assert_close(kept, computed, rtol=0, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [64, 512])
@pytest.mark.parametrize(("count", "keys"), [(130, None), (1150, None), (130, 200), (1150, 1150)])
def test_accurate_as_float32_can_be(count, keys, dim, kind):
    case = Case(count, keys, dim, kind, images=count // 20)
    exact, oracle, actual = case("reference", f64), case("reference"), case("cpu")
    for theirs, ours, truth in zip(oracle, actual, exact, strict=True):
        # An exponent of 1/temperature is rounded a few times: at 0.3, 8e-7.
        assert worst(ours, truth) <= 2**-22 / case.options["temperature"]
        if kind != "cold":
            assert worst(ours, truth) <= worst(theirs, truth) + 1e-7


def one_large_image(case: Case) -> None:
    case.options["image"][:] = torch.arange(len(case.x)).clamp(min=600)


def one_image(case: Case) -> None:
    case.options["image"][:] = 3


def nothing_valid(case: Case) -> None:
    case.options["valid"][:] = False


def one_valid(case: Case) -> None:
    case.options["valid"][:] = torch.arange(len(case.x)) == 400


def nan_row(case: Case) -> None:
    case.x[700] = torch.nan
    case.options["valid"][700] = True


def invalid_nan_row(case: Case) -> None:
    case.x[700] = torch.nan
    case.options["valid"][700] = False


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keys", [None, 1100])
@pytest.mark.parametrize("make", [one_large_image, one_image, nothing_valid, one_valid, nan_row, invalid_nan_row])
def test_unusual_sets_of_rows(make, keys, kind):
    case = Case(900, keys, 7, kind, images=30)
    make(case)
    actual, expected = case("cpu", f64), case("reference", f64)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11, equal_nan=True)
    assert actual[0].isnan().any() == (make is nan_row)


MEMORY = """
import resource, torch
from ser_fast.ops.nt_xent import info_nce, nt_xent

def step(function, count):
    x, y = torch.randn(count, 16, requires_grad=True), torch.randn(count, 16, requires_grad=True)
    function(x, y, temperature={temperature}, backend="cpu").backward()

torch.set_num_threads(2)
step(nt_xent, 600)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(nt_xent, 8192)
step(info_nce, 16384)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.3, 0.01])
def test_no_matrix_of_similarities(temperature):
    """16384 x 16384 of float32 is 1024 MiB."""
    assert float(python(MEMORY.format(temperature=temperature))) < 100


# ---------------------------------------------------------------- the build

HIDDEN = {
    "not built": 'sys.modules["ser_fast._C"] = None',
    "does not load": """
import importlib.abc, importlib.machinery
class Broken(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        return importlib.machinery.ModuleSpec(name, self) if name == "ser_fast._C" else None
    def exec_module(self, module):
        raise ImportError("undefined symbol")
sys.meta_path.insert(0, Broken())
""",
}


@pytest.mark.slow
@pytest.mark.parametrize("how", HIDDEN)
def test_without_the_extension_the_reference_runs(how):
    program = f"import sys\n{HIDDEN[how]}\n" + (
        "import torch\n"
        "from ser_fast.ops.backends import choose, reason_not\n"
        "from ser_fast.ops.nt_xent import nt_xent\n"
        "z = torch.eye(3)\n"
        "assert nt_xent(z, z, temperature=0.5) == nt_xent(z, z, temperature=0.5, backend='reference')\n"
        "print(choose('nt_xent', 'auto', z), reason_not('cpu', 'cpu'), sep=': ')"
    )
    reason = {"not built": "was not built", "does not load": "does not load: undefined symbol"}[how]
    assert python(program) == f"reference: the native extension ser_fast._C {reason}"


# Each built as the compiler is told: for any machine, with one sanitizer, or to dispatch on what the processor has.
DRIVES = {
    "dispatching": ["-O3", "-Wno-uninitialized", "-Wno-maybe-uninitialized"],  # GCC 12 warns of its own intrinsics
    "address,undefined": ["-g", "-O1", "-DSER_FAST_PORTABLE", "-fno-sanitize-recover=all"],
    "thread": ["-g", "-O1", "-DSER_FAST_PORTABLE"],
}


@pytest.mark.parametrize("name", DRIVES)
def test_kernels_are_clean(name):
    flags = ["-std=c++20", "-Wall", "-pthread", "-I", CSRC, *DRIVES[name]]
    if name != "dispatching":
        flags.append(f"-fsanitize={name}")
        reason = reason_no_sanitizer(name)
        if reason is not None:
            missing(reason)
    ran = run(compiled([*sorted((CSRC / "cpu").glob("*.cpp")), ROOT / "tests" / "native" / "drive.cpp"], flags))
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")
