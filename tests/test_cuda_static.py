"""Every CUDA kernel, compiled for GPUs that need not be here: see benchmarks/static_cuda.py."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

STATIC = Path(__file__).parents[1] / "benchmarks" / "static_cuda.py"


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc here")
def test_what_the_kernels_compile_to():
    """No spill, no limit passed, 16 bytes at a time, and no worse than the committed table."""
    result = subprocess.run([sys.executable, str(STATIC), "--check"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
