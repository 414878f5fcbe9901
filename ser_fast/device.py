"""The choice of a device by name, how to get there without waiting, and what layout a tensor has there."""

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor on a device, of another dtype if one is given. What goes to a GPU, nobody waits for.

    A copy from ordinary memory would wait for all that the GPU has to do; one from pinned memory takes its turn.
    """
    tensor = tensor if dtype is None else tensor.to(dtype)  # first: a copy that also converts is not pinned
    if tensor.device.type == "cpu" and device.type == "cuda" and not torch.compiler.is_compiling():
        tensor = tensor.pin_memory()
    # Compiled, a copy that is not waited for may be read too early.
    return tensor.to(device, non_blocking=device.type != "cpu" and not torch.compiler.is_compiling())


def require_dense(name: str, x: Tensor) -> None:
    """Raise TypeError for a tensor that is sparse, nested or otherwise not laid out by strides."""
    if x.layout != torch.strided:
        layout = str(x.layout).removeprefix("torch.")
        raise TypeError(f"{name}: got a tensor of the layout {layout}, takes a dense one (see x.to_dense())")


def choose_device(name: str) -> torch.device:
    """The device that "auto", "cpu" or "cuda" names.

    Raises:
        ValueError: it isn't there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device: got {name!r}, takes 'auto', 'cpu' or 'cuda'") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: got {name!r}, takes 'auto', 'cpu' or 'cuda'")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: got {name!r}, and torch sees no GPU")
    return device
