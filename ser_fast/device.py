"""The choice of a device by name."""

import torch


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
