"""Checkpoints that are whole or absent: written beside their place, then moved there."""

from pathlib import Path
from typing import Any

import torch

from ser_fast.io import write_atomically

ENCODER = "encoder.safetensors"


def save_checkpoint(out: Path, state: dict[str, Any], *, keep: int) -> Path:
    """Write out/checkpoints/step_N.pt for state["step"] = N, and delete all but the newest `keep`."""
    path = out / "checkpoints" / f"step_{state['step']:08d}.pt"
    write_atomically(path, lambda partial: torch.save(state, partial))
    for old in list_checkpoints(out)[:-keep]:
        old.unlink()
    return path


def list_checkpoints(out: Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    return sorted((out / "checkpoints").glob("step_*.pt"))


def load_checkpoint(path: Path, device: torch.device) -> dict[str, Any]:
    """What `save_checkpoint` wrote.

    Raises:
        ValueError: the file is no checkpoint of this trainer.
    """
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch.load raises many types for a file that isn't its own
        raise ValueError(f"resume: {path} can't be read as a checkpoint: {error}") from error
    if not isinstance(state, dict) or not {"step", "config", "model", "optimizer"} <= state.keys():
        raise ValueError(f"resume: {path} is no checkpoint of this trainer")
    return state


def find_encoder(path: Path) -> Path:
    """The encoder's weights for a run's folder or a safetensors file.

    Raises:
        ValueError: there are none.
    """
    found = path / ENCODER if path.is_dir() else path
    if not found.is_file() or found.suffix != ".safetensors":
        raise ValueError(f"checkpoint: {path} is neither a run's folder with {ENCODER} nor a .safetensors file")
    return found
