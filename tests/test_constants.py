"""What Python and C++ both know is the same: ser_fast._C exports C++'s numbers and the order of its enumerations."""

import importlib

import pytest
import torch

from ser_fast.interpolation import INTERPOLATIONS, PADDINGS
from ser_fast.ops import gpu_kernels

_C = pytest.importorskip("ser_fast._C")


def test_enumerations_have_one_order():
    assert _C.INTERPOLATIONS == INTERPOLATIONS
    assert _C.PADDINGS == PADDINGS
    for names, enumeration in ((_C.SOURCES, gpu_kernels.Source), (_C.SIDES, gpu_kernels.Side)):
        assert tuple(member.name.lower() for member in enumeration) == names
        assert [member.value for member in enumeration] == list(range(len(names)))


def test_dtypes_are_those_of_torch():
    assert [getattr(torch, name).itemsize for name in _C.DTYPES] == [4, 8, 2, 2]


def test_numbers_of_the_gpu_losses():
    assert (_C.SPAN, _C.KEPT_EXPONENT) == (gpu_kernels.SPAN, gpu_kernels.KEPT_EXPONENT)
    assert _C.LARGEST_WEIGHT == gpu_kernels.LARGEST_WEIGHT
    table = gpu_kernels.Table.empty(torch.empty(0), 5 * _C.TILE)
    assert len(table.packed) * _C.SPAN == (2 * _C.SPAN + 3) * 5 * _C.TILE


@pytest.mark.parametrize(
    ("shared", "stationary", "detached", "tile_of_512"),
    [(99, 128, 128, None), (163, 256, 512, (64, 32)), (227, 256, 512, (64, 64))],  # KB: sm_86, sm_80, sm_90
)
def test_tiles_of_the_cuda_kernels(shared, stationary, detached, tile_of_512, monkeypatch):
    cuda = importlib.import_module("ser_fast.ops.cuda")
    monkeypatch.setattr(cuda, "_shared_memory", lambda device: shared << 10)
    kernels, device = cuda.CUDAKernels(), torch.device("cpu")
    assert (kernels.largest_stationary(device), kernels.largest_detached(device)) == (stationary, detached)
    for columns in (64, 128, 256):
        if columns <= detached:
            assert kernels.stationary_tile(device, columns) == (128, 64)
    if tile_of_512 is not None:
        assert kernels.stationary_tile(device, 512) == tile_of_512
