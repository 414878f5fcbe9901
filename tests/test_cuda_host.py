"""The CUDA kernels executed on the host: csrc/cuda compiled by g++ against tests/host_cuda."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from subprocess import CompletedProcess
from typing import NamedTuple

import pytest
import torch
from cases.group_action import *  # noqa: F403, the operator's tests on one backend
from cases.group_action import OPTIONS, assert_same_bits, assert_within, some_map, with_specials
from cases.host_cuda import AMPLE, DTYPES, FLAGS, Device
from cases.native_build import CSRC, HOST_CUDA, compiled, missing, reason_no_sanitizer, run

from ser_fast.interpolation import INTERPOLATIONS, PADDINGS
from ser_fast.lattice import LatticeMap
from ser_fast.ops import reference
from ser_fast.ops.contract import GroupAction
from ser_fast.ops.group_action import group_action

pytestmark = pytest.mark.usefixtures("poisoned")
f32, f64, bf16, f16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


@pytest.fixture
def device() -> Device:
    return Device()


@pytest.fixture
def backend(device) -> Iterator[str]:
    """The backend `cuda`, on CPU tensors."""
    with device.registered():
        yield "cuda"


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
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
    for dtype in DTYPES:
        x = torch.zeros(8, 6, 6, 24, dtype=dtype, requires_grad=True)
        g = LatticeMap.d4((6, 6), torch.arange(8))
        gradient = with_specials(torch.randn(8, 6, 6, 24).to(dtype))
        (actual,) = torch.autograd.grad(group_action(x, g, backend=backend), x, gradient)
        undone = group_action(gradient, g.inverse(), backend="reference")
        assert_same_bits(actual, undone)


# ---------------------------------------------------------------- sanitizers


class Drive(NamedTuple):
    """Kernels, a program that checks their values, and a barrier: without it values are wrong, and no thread hangs."""

    kernels: str
    sources: tuple[Path, ...]
    before_a_barrier: str


CPU_KERNELS = tuple(CSRC / "cpu" / name for name in ("channel_vectors.cpp", "group_action.cpp", "taps.cpp"))
DRIVES = [
    Drive("group_action.cu", (*CPU_KERNELS, HOST_CUDA / "drive.cpp"), "wait_copies<0>();"),
    Drive(
        "nt_xent_tiles.cu",
        (CSRC / "cuda" / "nt_xent_stationary.cu", HOST_CUDA / "drive_tiles.cpp"),
        "wait_copies<kStages - 2>();",
    ),
    Drive("nt_xent_panels.cu", (CSRC / "cuda" / "nt_xent_rows.cu", HOST_CUDA / "drive_rows.cpp"), ""),
]


def sanitized(sanitizer: str, kernels: Path, sources: Sequence[Path]) -> CompletedProcess[str]:
    """What the kernels do in a program with a sanitizer, and with a thread of the system for each of CUDA's."""
    reason = reason_no_sanitizer(sanitizer)
    if reason is not None:
        missing(reason)
    options = ["-DHOST_CUDA_THREADS", "-DSER_FAST_PORTABLE", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    return run(compiled([kernels, *sources], ["-g", "-O0", *FLAGS, *options]), timeout=600)


@pytest.mark.parametrize("drive", DRIVES, ids=lambda drive: drive.kernels)
@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_kernels_are_clean(sanitizer, drive):
    ran = sanitized(sanitizer, CSRC / "cuda" / drive.kernels, drive.sources)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


@pytest.mark.parametrize("drive", DRIVES, ids=lambda drive: drive.kernels)
def test_a_missing_barrier_is_found(drive, tmp_path):
    whole = (CSRC / "cuda" / drive.kernels).read_text()
    start = whole.index("__syncthreads();", whole.index(drive.before_a_barrier))
    kernels = tmp_path / "kernels.cu"
    kernels.write_text(whole[:start] + whole[start:].replace("__syncthreads();", "", 1))
    ran = sanitized("thread", kernels, drive.sources)
    assert ran.returncode != 0
    # The sanitizer remembers few of the accesses to an address: it may miss a race that spoils a value.
    assert "data race" in ran.stderr or "a wrong value" in ran.stdout


# ---------------------------------------------------------------- geometry


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
    sizes = (*size_in, *size_out)
    numbers = INTERPOLATIONS.index(options[0]), PADDINGS.index(options[1])
    return device.kernels.geometry(
        DTYPES.index(dtype), batch, channels, sizes, *numbers, options[2], transpose, aligned
    )


LATTICES = [((14, 14), (12, 16)), ((1, 1), (3, 2)), ((64, 64), (64, 64)), ((200, 3), (9, 150))]


@pytest.mark.parametrize("shared", [99 << 10, AMPLE, 227 << 10])
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_launch_covers_everything_and_fits(device, options, transpose, shared):
    device.become(132, shared)
    for dtype in DTYPES:
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
    pointers = (tensor.data_ptr() for tensor in (torch.zeros(1), g.linear, g.offset, torch.zeros(1)))
    options = (INTERPOLATIONS.index("bicubic"), PADDINGS.index("zeros"), False, False)
    with pytest.raises(RuntimeError, match=match):
        device.kernels.group_action(*pointers, DTYPES.index(f32), 1, 1, (*size, *size), *options)
