"""What this machine has, and what can run on it."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys

import torch
from rich.table import Table

from ser_fast import __version__
from ser_fast.ops import backends
from ser_fast.ops.backends import BACKENDS, fastest, preferred, reason_not

PACKAGES = ("triton", "numpy", "torchvision", "timm", "kornia", "tyro")
EXTENSIONS = ("ser_fast._C", "ser_fast._C_cuda")
PATIENCE = 30.0  # seconds, with a driver that hangs


def describe_machine() -> dict[str, str]:
    """What the report of a fault has to say of the machine and of what is installed; no host, user or path."""
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    capability, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    said = {
        "ser-fast": __version__,
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "platform": platform.platform(),
        "cpu": f"{platform.machine()}, {os.cpu_count()} cores, {threads} threads, {capability}",
        "torch": f"{torch.__version__}, {built}",
        **{name: _version(name) for name in PACKAGES},
        **{name: _extension(name) for name in EXTENSIONS},
        "driver": _driver(),
    }
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(torch.device("cuda", index))
        memory = gpu.total_memory / 2**30
        said[f"cuda:{index}"] = f"{gpu.name}, capability {gpu.major}.{gpu.minor}, {memory:.0f} GiB"
    return said


def backend_tables() -> tuple[Table, Table]:
    """The backends of the kernels on each device, with the reason why one can't run; and what backend="auto" takes."""
    runs = Table(title=f"torch {torch.__version__}, CUDA {'available' if torch.cuda.is_available() else 'absent'}")
    for heading in ("backend", "on cpu tensors", "on cuda tensors"):
        runs.add_column(heading)
    for backend in BACKENDS:
        runs.add_row(backend, *(reason_not(backend, device) or "runs" for device in ("cpu", "cuda")))
    automatic = Table(title='what backend="auto" takes')
    for heading in ("tensors on", *backends.PREFERRED):
        automatic.add_column(heading)
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    for device in (torch.device("cpu"), *gpus):
        automatic.add_row(str(device), *(fastest(op, device) for op in backends.PREFERRED))
    if not gpus:
        starts = sorted({start for order in backends.PREFERRED.values() for start in order})
        for start, end in zip(starts, [*starts[1:], None], strict=True):
            capability = f"from {start}.0 on" if end is None else f"below {end}.0"
            row = (preferred(op, start) for op in backends.PREFERRED)
            automatic.add_row(f"a GPU of compute capability {capability}", *row)
    return runs, automatic


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _extension(module: str) -> str:
    """Built or not, and whether it is loaded: why one that is built does not load, the table of backends says."""
    if importlib.util.find_spec(module) is None:
        return "not built"
    return "built, loaded" if module in sys.modules else "built, not loaded"


def _driver() -> str:
    """The release of NVIDIA's driver, as its own tool has it."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "none found (nvidia-smi)"
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi does not answer: {type(error).__name__}"
    lines = (answer.stdout if answer.returncode == 0 else answer.stdout + answer.stderr).split("\n")
    said = ", ".join(sorted({line.strip() for line in lines if line.strip()}))
    return said if answer.returncode == 0 else f"nvidia-smi fails: {said}"
