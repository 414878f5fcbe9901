"""Which backend runs an operation, and why another one can't.

`reference` is the oracle in plain PyTorch and runs anywhere. `cpu` (C++), `triton` and `cuda` are looked for once, at
import: what is missing is remembered as the reason that `choose` and `ser-fast doctor` give. Triton itself is imported
only where it can run: with a GPU, or under TRITON_INTERPRET=1, which runs its kernels on CPU tensors, slowly, as tests
of them.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

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


def _load() -> tuple[dict[str, ModuleType], dict[str, str]]:
    """The modules of the backends that are here, and for the others what is missing."""
    modules = {"reference": importlib.import_module("ser_fast.ops.reference")}
    missing = {}
    if importlib.util.find_spec("triton") is None:
        missing["triton"] = "triton is not installed"
    elif not _INTERPRETED and torch.cuda.device_count() == 0:  # unlike is_available, leaves CUDA to forked processes
        missing["triton"] = "it runs on cuda tensors, and torch finds no GPU (TRITON_INTERPRET=1 runs it on the CPU)"
    else:
        try:
            modules["triton"] = importlib.import_module("ser_fast.kernels")
        except ImportError as error:
            missing["triton"] = f"triton does not load: {error}"
    if importlib.util.find_spec("ser_fast._C") is None:
        missing["cpu"] = "the native extension ser_fast._C was not built"
    else:
        try:
            modules["cpu"] = importlib.import_module("ser_fast.ops.native")
        except (ImportError, OSError) as error:  # built for another torch or Python, or a library is missing
            missing["cpu"] = f"the native extension ser_fast._C does not load: {error}"
    if "cpu" in missing:
        missing["cuda"] = missing["cpu"]
    elif importlib.util.find_spec("ser_fast._C_cuda") is None:
        missing["cuda"] = "the native extension ser_fast._C_cuda was not built"
    elif torch.cuda.device_count() == 0:
        missing["cuda"] = "it runs on cuda tensors, and torch finds no GPU"
    else:
        try:
            importlib.import_module("ser_fast._C_cuda")  # registers the kernels
            modules["cuda"] = importlib.import_module("ser_fast.ops.cuda")
        except (ImportError, OSError) as error:  # built for another torch or another CUDA
            missing["cuda"] = f"the native extension ser_fast._C_cuda does not load: {error}"
    return modules, missing


_MODULES, _MISSING = _load()


def implementations(name: str) -> dict[str, Callable[..., Any]]:
    """The function `name` of every backend that is here and has it, by backend."""
    return {backend: getattr(module, name) for backend, module in _MODULES.items() if hasattr(module, name)}


def reason_not(backend: str, device: str) -> str | None:
    """Why `backend` can't run on tensors of `device` ("cpu", "cuda", ...); None if it can."""
    if backend == "reference":
        return None
    if backend in _MISSING:
        return _MISSING[backend]
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


def choose(op: str, backend: str, tensor: Tensor) -> str:
    """The name of the backend that runs `op` on `tensor`.

    "auto" takes the fastest one that can run, never the interpreter; an explicit request is met or raises, and never
    falls back.

    Raises:
        ValueError: `backend` is no backend's name.
        RuntimeError: the backend asked for can't run here; the message says why.
    """
    if backend == "auto":
        return fastest(op, tensor.device)
    if backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}, takes 'auto' or one of {', '.join(map(repr, BACKENDS))}")
    reason = reason_not(backend, tensor.device.type)
    if reason is not None:
        raise RuntimeError(f"{op}: backend={backend!r} can't run here: {reason}")
    return backend
