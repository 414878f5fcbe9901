"""The CUDA kernels executed on the host: csrc/cuda compiled by g++ against the twins in tests/host_cuda."""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from inspect import signature
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, NoReturn

import pytest
import test_group_action
import torch
from test_group_action import OPTIONS, assert_same_bits, assert_within, some_map, with_specials
from torch import Tensor

from ser_fast.interpolation import INTERPOLATIONS, PADDINGS
from ser_fast.lattice import LatticeMap
from ser_fast.ops import reference
from ser_fast.ops.backends import registered
from ser_fast.ops.contract import GroupAction
from ser_fast.ops.group_action import group_action

f32, f64, bf16, f16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
TYPES = (f32, f64, bf16, f16)  # as ser_fast::Type
ROOT = Path(__file__).parent.parent
CI = "CI" in os.environ  # there nothing may be missing: instead of a skip the tests fail, and say what is
FLAGS = ["-std=c++20", "-Wall", "-Wno-unknown-pragmas", "-fno-strict-aliasing", "-pthread", "-x", "c++"]
INCLUDE = ["-I", ROOT / "csrc", "-I", ROOT / "tests" / "host_cuda"]
AMPLE = 163 << 10  # bytes of shared memory a block, as sm_80 has


def missing(reason: str) -> NoReturn:
    pytest.fail(reason) if CI else pytest.skip(reason)


def run(*command: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)


@pytest.fixture(scope="session")
def library(tmp_path_factory) -> ctypes.CDLL:
    if shutil.which("g++") is None:
        missing("no g++ here")
    path = tmp_path_factory.mktemp("host_cuda") / "kernels.so"
    sources = [ROOT / "csrc" / "cuda" / "group_action.cu", ROOT / "tests" / "host_cuda" / "library.cpp"]
    built = run("g++", "-O1", "-fPIC", "-shared", *FLAGS, *INCLUDE, *sources, "-o", path)
    assert built.returncode == 0, built.stderr
    kernels = ctypes.CDLL(str(path))
    kernels.group_action.restype = ctypes.c_char_p
    return kernels


class Device(NamedTuple):
    """The host as a GPU with so many multiprocessors, and bytes of shared memory a block."""

    library: ctypes.CDLL

    def become(self, multiprocessors: int, shared: int) -> None:
        self.library.set_device(multiprocessors, shared)

    def act(self, x: Tensor, action: GroupAction, *, transpose: bool = False) -> Tensor:
        """As the backends have it."""
        tokens = action.size_in if transpose else action.size_out
        x, linear, offset = x.contiguous(), action.linear.contiguous(), action.offset.contiguous()
        out = x.new_full((x.shape[0], tokens[0] * tokens[1], x.shape[2]), 7)
        error = self.library.group_action(
            *(ctypes.c_void_p(tensor.data_ptr()) for tensor in (x, linear, offset, out)),
            TYPES.index(x.dtype),
            ctypes.c_int64(x.shape[0]),
            ctypes.c_int64(x.shape[2]),
            (ctypes.c_int64 * 4)(*action.size_in, *action.size_out),
            INTERPOLATIONS.index(action.interpolation),
            PADDINGS.index(action.padding),
            ctypes.c_bool(action.antialias),
            ctypes.c_bool(transpose),
        )
        if error is not None:
            raise RuntimeError(error.decode())
        return out

    def group_action(self, x: Tensor, action: GroupAction) -> Tensor:
        return self.act(x, action)

    def group_action_transpose(self, x: Tensor, action: GroupAction) -> Tensor:
        return self.act(x, action, transpose=True)


@pytest.fixture
def device(library) -> Device:
    device = Device(library)
    device.become(1, AMPLE)
    return device


@pytest.fixture
def backend(device) -> Iterator[str]:
    """The backend `cuda`, on CPU tensors."""
    with registered("cuda", device, "cpu"):
        yield "cuda"


# ---------------------------------------------------------------- the operator's own tests


# They ask what torch makes of the operator, or launch kernels by thousands; the values that they see, others see.
NOT_OF_KERNELS = ("test_compiles", "test_opcheck", "test_gradcheck")


def own_tests(module: ModuleType) -> dict[str, Callable[..., None]]:
    """The tests of an operator that take a backend."""
    return {
        name: test
        for name, test in vars(module).items()
        if name.startswith("test_") and "backend" in signature(test).parameters and not name.startswith(NOT_OF_KERNELS)
    }


globals().update(own_tests(test_group_action))


# ---------------------------------------------------------------- every way through the kernel

DEVICES = {
    "slabs by turns": (1, AMPLE),  # few multiprocessors: a block takes all slabs of its sample
    "a slab each": (10_000, AMPLE),
    "little memory": (1, 6 << 10),  # slabs are not staged, outputs come in chunks, and the transpose in tiles
}
MAPS = {
    "copy": LatticeMap.d4((6, 6), torch.tensor([0, 3, 5])),
    "separable": LatticeMap.crop((7, 6), torch.rand(3, 4, generator=torch.Generator().manual_seed(0)) * 2 + 2, (5, 8)),
    "turned": LatticeMap.d4((7, 5), 1) @ LatticeMap.resize((6, 9), (7, 5), batch=3),
    "general": some_map((7, 6), (5, 9)),
    "large": LatticeMap.rotate((12, 9), torch.tensor([20.0, 0.0, 250.0])),
}
SETTINGS = [
    ("bicubic", "border", False),
    ("bilinear", "zeros", False),
    ("lanczos3", "reflection", True),
    ("area", "border", False),
    ("nearest", "reflection", False),
]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("options", SETTINGS, ids=lambda options: options[0])
@pytest.mark.parametrize("g", MAPS.values(), ids=MAPS)
@pytest.mark.parametrize("machine", DEVICES.values(), ids=DEVICES)
def test_every_way_gives_the_same(device, machine, g, options, dtype):
    """Channels that fill some slabs, less than one, and that are no multiples of 16 bytes; there and back."""
    device.become(*machine)
    budget = {f32: 2e-6, f64: 1e-13, bf16: 2**-8, f16: 2**-10}[dtype]
    for channels in (24, 33, 264):
        for transpose in (False, True):
            size = g.size_out if transpose else g.size_in
            x = torch.randn(3, size[0] * size[1], channels).to(dtype)
            action = GroupAction(g.linear, g.offset, g.size_in, g.size_out, *options)
            oracle = reference.group_action_transpose if transpose else reference.group_action
            actual = device.act(x, action, transpose=transpose)
            assert_within(actual, oracle(x.to(f64), action), budget)
            if g is MAPS["copy"]:
                assert_same_bits(actual, oracle(x, action))


@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
@pytest.mark.parametrize("offset", [0, 1])
def test_memory_that_is_not_aligned(device, offset, dtype):
    g = MAPS["general"]
    x = torch.randn(3 * 42 * 16 + offset).to(dtype)[offset:].view(3, 42, 16)
    action = GroupAction(g.linear, g.offset, g.size_in, g.size_out, "bicubic", "border", False)
    assert_within(device.act(x, action), reference.group_action(x.to(f64), action), 2**-8)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("g", [LatticeMap.rotate((64, 64), 30.0), LatticeMap.resize((64, 64), (40, 23))])
@pytest.mark.parametrize("shared", [99 << 10, AMPLE, 227 << 10])
def test_large_lattices(device, shared, g, transpose):
    device.become(108, shared)
    size = g.size_out if transpose else g.size_in
    x = torch.randn(1, size[0] * size[1], 8).to(bf16)
    action = GroupAction(g.linear, g.offset, g.size_in, g.size_out, "bicubic", "border", False)
    oracle = reference.group_action_transpose if transpose else reference.group_action
    assert_within(device.act(x, action, transpose=transpose), oracle(x.float(), action), 2**-8)


@pytest.mark.parametrize("machine", DEVICES.values(), ids=DEVICES)
def test_the_gradient_of_a_d4_map_is_a_copy(device, backend, machine):
    device.become(*machine)
    for dtype in TYPES:
        x = torch.zeros(8, 6, 6, 24, dtype=dtype, requires_grad=True)
        g = LatticeMap.d4((6, 6), torch.arange(8))
        gradient = with_specials(torch.randn(8, 6, 6, 24).to(dtype))
        (actual,) = torch.autograd.grad(group_action(x, g, backend=backend), x, gradient)
        undone = group_action(gradient, g.inverse(), backend="reference")
        assert_same_bits(actual, undone)


# ---------------------------------------------------------------- sanitizers


class Drive(NamedTuple):
    """Kernels, what runs them and looks at the values, and a barrier that they can't do without."""

    kernels: str
    sources: tuple[Path, ...]
    before_a_barrier: str


CSRC, HOST_CUDA = ROOT / "csrc", ROOT / "tests" / "host_cuda"
CPU_KERNELS = tuple(CSRC / "cpu" / name for name in ("channel_vectors.cpp", "group_action.cpp", "taps.cpp"))
DRIVES = [
    Drive("group_action.cu", (*CPU_KERNELS, HOST_CUDA / "drive.cpp"), ""),
    Drive(
        "nt_xent_tiles.cu",
        (CSRC / "cuda" / "nt_xent_stationary.cu", HOST_CUDA / "drive_tiles.cpp"),
        "wait_copies<kStages - 2>();",
    ),
    Drive("nt_xent_panels.cu", (CSRC / "cuda" / "nt_xent_rows.cu", HOST_CUDA / "drive_rows.cpp"), ""),
]


@pytest.fixture(scope="session")
def sanitized(tmp_path_factory) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Builds kernels with a sanitizer, a thread of the system for each of CUDA's, and runs them."""

    def build_and_run(sanitizer: str, kernels: Path, sources: Sequence[Path]) -> subprocess.CompletedProcess[str]:
        folder = tmp_path_factory.mktemp("drive")
        flags = ["-g", "-O0", *FLAGS, *INCLUDE, f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
        empty = folder / "empty.cpp"
        empty.write_text("int main() {}")
        tried = run("g++", *flags, empty, "-o", folder / "empty") if shutil.which("g++") else None
        if tried is None or tried.returncode != 0 or run(folder / "empty").returncode != 0:
            missing(f"no {sanitizer} sanitizer here")
        options = ["-DHOST_CUDA_THREADS", "-DSER_FAST_PORTABLE"]
        built = run("g++", *flags, *options, kernels, *sources, "-o", folder / "drive")
        assert built.returncode == 0, built.stderr
        return run(folder / "drive")

    return build_and_run


@pytest.mark.parametrize("drive", DRIVES, ids=lambda drive: drive.kernels)
@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_kernels_are_clean(sanitized, sanitizer, drive):
    ran = sanitized(sanitizer, ROOT / "csrc" / "cuda" / drive.kernels, drive.sources)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


@pytest.mark.parametrize("drive", DRIVES, ids=lambda drive: drive.kernels)
def test_a_missing_barrier_is_found(sanitized, drive, tmp_path):
    whole = (ROOT / "csrc" / "cuda" / drive.kernels).read_text()
    start = whole.index("__syncthreads();", whole.index(drive.before_a_barrier))
    kernels = tmp_path / "kernels.cu"
    kernels.write_text(whole[:start] + whole[start:].replace("__syncthreads();", "", 1))
    ran = sanitized("thread", kernels, drive.sources)
    assert ran.returncode != 0
    # The sanitizer remembers few of the accesses to an address: it may miss a race that spoils a value.
    assert "data race" in ran.stderr or "a wrong value" in ran.stdout


# ---------------------------------------------------------------- geometry

WORDS = ("wide", "vector", "slab", "slabs", "group", "buffers", "tile", "tiles", "pool", "shared", "blocks")


def geometry(
    device: Device,
    dtype: torch.dtype,
    batch: int,
    channels: int,
    size_in: tuple[int, int],
    size_out: tuple[int, int],
    *,
    options: tuple[str, str, bool] = ("bicubic", "border", False),
    transpose: bool = False,
    aligned: bool = True,
) -> dict[str, int]:
    values = (ctypes.c_int64 * len(WORDS))()
    device.library.group_action_geometry(
        TYPES.index(dtype),
        ctypes.c_int64(batch),
        ctypes.c_int64(channels),
        (ctypes.c_int64 * 4)(*size_in, *size_out),
        INTERPOLATIONS.index(options[0]),
        PADDINGS.index(options[1]),
        *map(ctypes.c_bool, (options[2], transpose, aligned)),
        values,
    )
    return dict(zip(WORDS, values, strict=True))


LATTICES = [((14, 14), (12, 16)), ((1, 1), (3, 2)), ((64, 64), (64, 64)), ((200, 3), (9, 150))]


@pytest.mark.parametrize("shared", [99 << 10, AMPLE, 227 << 10])
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_launch_covers_everything_and_fits(device, options, transpose, shared):
    device.become(132, shared)
    for dtype in TYPES:
        for channels in (1, 7, 64, 100, 384, 512, 4096):
            for size_in, size_out in [
                ((14, 14), (12, 16)),
                ((1, 1), (3, 2)),
                ((64, 64), (64, 64)),
                ((200, 3), (9, 150)),
            ]:
                n = geometry(device, dtype, 256, channels, size_in, size_out, options=options, transpose=transpose)
                assert n["wide"] <= (channels * dtype.itemsize % 16 == 0)
                assert 0 < n["slab"] * n["vector"] * (n["slabs"] - 1) < channels or n["slabs"] == 1
                assert n["slab"] * n["vector"] * n["slabs"] >= channels
                assert n["blocks"] == 256 * n["tiles"] * -(-n["slabs"] // n["group"])
                written = size_in if transpose else size_out
                assert n["tile"] * n["tiles"] >= written[0] * written[1] > n["tile"] * (n["tiles"] - 1)
                assert n["shared"] <= shared
                assert n["shared"] // 8 < 2**16  # places of taps are 16 bits


def test_ser_s_own_setting_leaves_room_for_three_blocks(device):
    device.become(132, 227 << 10)
    for dtype in (f32, bf16, f16):
        for transpose in (False, True):
            n = geometry(device, dtype, 256, 512, (14, 14), (12, 16), transpose=transpose)
            assert n["wide"]
            assert n["slab"] >= 4  # 64 bytes of a token at a time
            assert n["buffers"] == 2
            assert 3 * (n["shared"] + (2 << 10)) <= 228 << 10
            assert n["blocks"] >= 3 * 132


def test_offsets_past_the_range_of_32_bits(device):
    n = geometry(device, bf16, 400_000, 4096, (14, 14), (14, 14))
    assert n["blocks"] == 400_000
    assert n["group"] * n["slab"] * n["vector"] >= 4096


@pytest.mark.parametrize(
    ("size", "match"), [((2**14, 2**14), "too many tokens"), ((1, 60_000), "too long for the shared memory")]
)
def test_a_lattice_that_is_too_large_says_so(device, size, match):
    g = LatticeMap.rotate((2, 2), 30.0)
    x, out = torch.zeros(1), torch.zeros(1)
    error = device.library.group_action(
        *(ctypes.c_void_p(tensor.data_ptr()) for tensor in (x, g.linear, g.offset, out)),
        *(0, ctypes.c_int64(1), ctypes.c_int64(1), (ctypes.c_int64 * 4)(*size, *size)),
        *(INTERPOLATIONS.index("bicubic"), 0, ctypes.c_bool(False), ctypes.c_bool(False)),
    )
    assert match in error.decode()
