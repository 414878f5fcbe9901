"""The CUDA kernels of csrc/cuda, compiled by g++ and executed on the host, as the backend `cuda` of CPU tensors."""

import functools
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor
from torch.utils.cpp_extension import include_paths, library_paths

from cases.native_build import CSRC, HOST_CUDA, INCLUDE, missing, module
from ser_fast.interpolation import INTERPOLATIONS, PADDINGS
from ser_fast.ops import backends
from ser_fast.ops.contract import GroupAction

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # as ser_fast::Type
FLAGS = ("-std=c++20", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-fno-strict-aliasing", "-pthread", *INCLUDE)
AMPLE = 163 << 10  # bytes of shared memory a block, as sm_80 has


@functools.cache
def kernels() -> ModuleType:
    """The host build as a module; having it means that the nt_xent_* of ser_fast_native take tensors of the CPU."""
    try:
        importlib.import_module("ser_fast._C")  # the schemas
    except ImportError as error:
        missing(f"no native extension: {error}")
    sources = [*sorted((CSRC / "cuda").glob("*.cu")), CSRC / "bindings_cuda.cpp", HOST_CUDA / "module.cpp"]
    torch_headers = [flag for folder in include_paths() for flag in ("-isystem", folder)]
    # -fno-gnu-unique: its own copy of the device's state, whatever other libraries have one.
    flags = [*FLAGS, "-O1", "-fno-gnu-unique", "-DSER_FAST_HOST", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    libraries = [*(f"-L{folder}" for folder in library_paths()), "-ltorch", "-ltorch_cpu", "-lc10"]
    return module("host_kernels", sources, [*flags, *torch_headers], libraries)


class Device:
    """The host as a GPU with so many multiprocessors, and bytes of shared memory a block."""

    def __init__(self) -> None:
        self.kernels = kernels()
        self.become(1, AMPLE)

    def become(self, multiprocessors: int, shared: int) -> None:
        self.kernels.set_device(multiprocessors, shared)

    def act(self, x: Tensor, action: GroupAction, *, transpose: bool = False) -> Tensor:
        """As the backends have it."""
        tokens = action.size_in if transpose else action.size_out
        x, linear, offset = x.contiguous(), action.linear.contiguous(), action.offset.contiguous()
        out = x.new_full((x.shape[0], tokens[0] * tokens[1], x.shape[2]), torch.nan)
        self.kernels.group_action(
            *(tensor.data_ptr() for tensor in (x, linear, offset, out)),
            *(DTYPES.index(x.dtype), x.shape[0], x.shape[2], (*action.size_in, *action.size_out)),
            *(INTERPOLATIONS.index(action.interpolation), PADDINGS.index(action.padding), action.antialias, transpose),
        )
        return out

    @contextmanager
    def registered(self) -> Iterator[None]:
        """The operators run these kernels as the backend `cuda`, on CPU tensors."""
        from ser_fast.ops.cuda import CUDABackend  # it needs the native extension

        device = self

        class HostBackend(CUDABackend):
            def group_action(self, x: Tensor, action: GroupAction) -> Tensor:
                return device.act(x, action)

            def group_action_transpose(self, x: Tensor, action: GroupAction) -> Tensor:
                return device.act(x, action, transpose=True)

        with backends.registered("cuda", HostBackend(), "cpu"):
            yield
