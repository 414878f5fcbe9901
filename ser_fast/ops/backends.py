"""Which backend runs an operation, and why another one can't.

`reference` is the oracle in plain PyTorch and runs anywhere. `cpu` (C++), `triton` and `cuda` are looked for once, at
import: what is missing is remembered as the reason that `choose` and `ser-fast doctor` give.
"""

import importlib.util

from torch import Tensor

BACKENDS = ("reference", "cpu", "triton", "cuda")


def _missing_native() -> str | None:
    if importlib.util.find_spec("ser_fast._C") is None:
        return "the native extension ser_fast._C is not part of this installation"
    return None


def _missing_triton() -> str | None:
    if importlib.util.find_spec("ser_fast.kernels") is None:
        return "the Triton kernels ser_fast.kernels are not part of this installation"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    return None


_DEVICES = {"cpu": "cpu", "triton": "cuda", "cuda": "cuda"}
_MISSING = {"cpu": _missing_native(), "triton": _missing_triton(), "cuda": _missing_native()}


def reason_not(backend: str, device: str) -> str | None:
    """Why `backend` can't run on tensors of `device` ("cpu", "cuda", ...); None if it can."""
    if backend == "reference":
        return None
    if _MISSING[backend] is not None:
        return _MISSING[backend]
    if _DEVICES[backend] != device:
        return f"it runs on {_DEVICES[backend]} tensors, not on {device}"
    return None


def choose(op: str, backend: str, tensor: Tensor) -> str:
    """The name of the backend that runs `op` on `tensor`.

    "auto" takes the fastest one that can run; an explicit request is met or raises, and never falls back.

    Raises:
        ValueError: `backend` is no backend's name.
        RuntimeError: the backend asked for can't run here; the message says why.
    """
    device = tensor.device.type
    if backend == "auto":
        return next((name for name in ("cuda", "triton", "cpu") if reason_not(name, device) is None), "reference")
    if backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}, takes 'auto' or one of {', '.join(map(repr, BACKENDS))}")
    reason = reason_not(backend, device)
    if reason is not None:
        raise RuntimeError(f"{op}: backend={backend!r} can't run here: {reason}")
    return backend
