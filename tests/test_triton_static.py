"""Every Triton kernel that is shipped, compiled for GPUs that need not be here: see benchmarks/static.py."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

STATIC = Path(__file__).parents[1] / "benchmarks" / "static.py"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_what_the_kernels_compile_to():
    """No spill, no limit passed, matrix instructions, wide loads, and no worse than the committed table."""
    # The interpreter takes the place of the compiler in a whole process, so this needs another.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, str(STATIC), "--check"], capture_output=True, text=True, env=environment, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
