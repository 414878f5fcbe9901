"""What a run says of the machine and the versions that it ran on."""

import importlib.metadata
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from ser_fast import __version__
from ser_fast.distributed import world_size

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


def peak_memory(device: torch.device) -> float:
    """Peak memory so far in MiB: allocated on a GPU, resident for a CPU process; 0 where the system doesn't tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if resource is None:
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB; bytes on macOS
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def describe_environment(device: torch.device) -> dict[str, Any]:
    """What a run must say to be repeated."""
    revision = None
    if shutil.which("git"):
        command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
        revision = subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    return {
        "command": sys.argv,
        "ser_fast": __version__,
        "git": revision,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: importlib.metadata.version(name) for name in ("torch", "torchvision", "timm", "numpy")},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or device.type,
        "threads": torch.get_num_threads(),
        "world_size": world_size(),
    }
