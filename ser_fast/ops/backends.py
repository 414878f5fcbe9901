"""Which backend runs an operation, and why another one can't.

`reference` is the oracle in plain PyTorch and runs anywhere. `cpu` (C++), `triton` and `cuda` are looked for once, at
import: what is missing is remembered as the reason that `choose` and `ser-fast doctor` give. Triton itself is imported
only where it can run: with a GPU, or under TRITON_INTERPRET=1, which runs its kernels on CPU tensors, slowly, as tests
of them.
"""

import importlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ser_fast.ops import reference
from ser_fast.ops.contract import Backend

BACKENDS = ("reference", "cpu", "triton", "cuda")

_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "y", "yes", "on", "true")  # as triton reads it
_DEVICES = {"cpu": "cpu", "triton": "cpu" if _INTERPRETED else "cuda", "cuda": "cuda"}

# Which of triton and cuda "auto" prefers where both can run: by operation, from each major compute capability on. None
# has been timed on a GPU yet; this is what the compiled kernels say. The CUDA kernels are built for 8.0 and later.
PREFERRED = {
    # CUDA reads a sample's tokens once, into shared memory; Triton builds W and multiplies by it.
    "group_action": {0: "triton", 8: "cuda"},
    # On 8.x and 12.x both multiply by mma.sync, CUDA in larger tiles a warp (64 x 64), and within the 99 KB of shared
    # memory that some of these chips have; in between Triton has the larger matrix instructions (wgmma, tcgen05).
    "nt_xent": {0: "triton", 8: "cuda", 9: "triton", 12: "cuda"},
    "info_nce": {0: "triton", 8: "cuda", 9: "triton", 12: "cuda"},
}


def _load() -> dict[str, Backend | str]:
    """Each backend that is here, and for the others what is missing."""
    found: dict[str, Backend | str] = {"reference": reference}
    if importlib.util.find_spec("triton") is None:
        found["triton"] = "triton is not installed"
    elif not _INTERPRETED and torch.cuda.device_count() == 0:  # unlike is_available, leaves CUDA to forked processes
        found["triton"] = "it runs on cuda tensors, and torch finds no GPU (TRITON_INTERPRET=1 runs it on the CPU)"
    else:
        try:
            from ser_fast.kernels import TritonBackend

            found["triton"] = TritonBackend()
        except ImportError as error:
            found["triton"] = f"triton does not load: {error}"
    if importlib.util.find_spec("ser_fast._C") is None:
        found["cpu"] = "the native extension ser_fast._C was not built"
    else:
        try:
            from ser_fast.ops import cpu

            found["cpu"] = cpu
        except (ImportError, OSError) as error:  # built for another torch or Python, or a library is missing
            found["cpu"] = f"the native extension ser_fast._C does not load: {error}"
    if isinstance(found["cpu"], str):
        found["cuda"] = found["cpu"]
    elif importlib.util.find_spec("ser_fast._C_cuda") is None:
        found["cuda"] = "the native extension ser_fast._C_cuda was not built"
    elif torch.cuda.device_count() == 0:
        found["cuda"] = "it runs on cuda tensors, and torch finds no GPU"
    else:
        try:
            importlib.import_module("ser_fast._C_cuda")  # registers the kernels
            from ser_fast.ops.cuda import CUDABackend

            found["cuda"] = CUDABackend()
        except (ImportError, OSError) as error:  # built for another torch or another CUDA
            found["cuda"] = f"the native extension ser_fast._C_cuda does not load: {error}"
    return found


_FOUND = _load()


def implementations() -> dict[str, Backend]:
    """Every backend that is here, by name."""
    return {name: found for name, found in _FOUND.items() if not isinstance(found, str)}


def implementation(name: str) -> Backend:
    """The backend of that name, which `choose` has found to be here.

    Raises:
        RuntimeError: there is none, where an operator is called by its name.
    """
    found = _FOUND.get(name, "there is no backend of that name")
    if isinstance(found, str):
        raise RuntimeError(f"backend: {name!r} can't run here: {found}")
    return found


@contextmanager
def registered(name: str, backend: Backend | str, device: str) -> Iterator[None]:
    """Have `backend` run as `name` on tensors of `device`, in place of what is there; for tests.

    A string takes the backend away, and is the reason that is given.
    """
    before = _FOUND[name], _DEVICES[name]
    _FOUND[name], _DEVICES[name] = backend, device
    try:
        yield
    finally:
        _FOUND[name], _DEVICES[name] = before


def reason_not(backend: str, device: str) -> str | None:
    """Why `backend` can't run on tensors of `device` ("cpu", "cuda", ...); None if it can."""
    if backend == "reference":
        return None
    found = _FOUND[backend]
    if isinstance(found, str):
        return found
    if _DEVICES[backend] != device:
        return f"it runs on {_DEVICES[backend]} tensors, not on {device}"
    return None


def preferred(op: str, capability: int) -> str:
    """Which of triton and cuda "auto" takes for `op` where both can run, on a GPU of that major compute capability."""
    table = PREFERRED[op]
    return table[max(least for least in table if least <= capability)]


def fastest(op: str, device: torch.device) -> str:
    """The backend that "auto" takes for `op` on tensors of `device`: never the interpreter."""
    candidates = ("cpu",) if device.type == "cpu" else ("triton", "cuda")
    able = [name for name in candidates if reason_not(name, device.type) is None]
    if len(able) > 1:
        return preferred(op, torch.cuda.get_device_properties(device).major)
    return able[0] if able else "reference"


def check_name(backend: str) -> None:
    """Raise ValueError for what is neither "auto" nor a backend's name."""
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend: got {backend!r}, takes 'auto' or one of {', '.join(map(repr, BACKENDS))}")


def choose(op: str, backend: str, tensor: Tensor) -> str:
    """The name of the backend that runs `op` on `tensor`.

    "auto" takes the fastest one that can run, never the interpreter; an explicit request runs or raises, and never
    falls back.

    Raises:
        ValueError: `backend` is no backend's name.
        RuntimeError: the backend asked for can't run here; the message says why.
    """
    if backend == "auto":
        return fastest(op, tensor.device)
    check_name(backend)
    reason = reason_not(backend, tensor.device.type)
    if reason is not None:
        raise RuntimeError(f"{op}: backend={backend!r} can't run here: {reason}")
    return backend
