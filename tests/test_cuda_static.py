"""Every CUDA kernel, compiled for GPUs that need not be here: see tools/check_cuda.py."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

GATE = Path(__file__).parents[1] / "tools" / "check_cuda.py"


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc here")
def test_what_the_kernels_compile_to():
    """No spill, no limit passed, 16 bytes at a time, and no worse than the committed table."""
    result = subprocess.run([sys.executable, str(GATE), "--check"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
