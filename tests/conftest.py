"""Fixtures shared by the test files."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault(
        "TRITON_INTERPRET", "1"
    )  # runs the Triton kernels on CPU tensors; read when they are imported

from ser_fast.ops.backends import BACKENDS, reason_not

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=[name for name in BACKENDS if reason_not(name, "cpu") is None])
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that can run on CPU tensors in this installation; Triton's runs in its interpreter."""
    parameters = request.node.callspec.params
    if request.param == "triton" and parameters.get("dtype") == torch.float64:
        pytest.skip("the interpreter is slow, and float64 takes the same way through the Triton kernels as float32")
    return request.param
