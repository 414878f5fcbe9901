"""Fixtures shared by the test files, and how much of the matrix the interpreter takes."""

import os
import re
from collections.abc import Callable, Iterator
from importlib import import_module
from zlib import crc32

import pytest
import torch

# Without a GPU the Triton kernels run on CPU tensors, in the interpreter; read when they are imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from ser_fast.ops.backends import BACKENDS, reason_not

pytest.register_assert_rewrite("cases")
torch.set_num_threads(1)

# What the interpreter runs whole by default: golden cases and every option, forward and backward. Of the other tests it
# runs one case in thirty-two, always the same ones; `--whole` runs all of them.
_WHOLE = (
    "test_golden",
    "test_every_option_is_its_formula",
    "test_the_gradient_is_the_adjoint",
    "test_a_map_",
    "test_a_row_without_a_direction",
)
_ONE_IN = 32

# Slow by their kind: GPU kernels on the host or compiled, sanitizers, torch.compile, opcheck, ONNX.
_SLOW = re.compile(r"/test_(cuda|triton)_|::test_(opcheck|\w*compiles|kernels_are_clean|onnx)")
_INTERPRETER = (pytest.mark.slow, pytest.mark.interpreter)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--whole", action="store_true", help="run the whole matrix in Triton's interpreter, too (an hour)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if _SLOW.search(item.nodeid):
            item.add_marker(pytest.mark.slow)
    if config.getoption("--whole"):
        return

    def taken(item: pytest.Item) -> bool:
        if item.get_closest_marker("interpreter") is None:
            return True
        if item.callspec.params.get("dtype") == torch.float64:  # the same way through the kernels as float32
            return False
        return item.originalname.startswith(_WHOLE) or crc32(item.nodeid.encode()) % _ONE_IN == 0

    left_out = [item for item in items if not taken(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if taken(item)]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory of torch.empty and its like holds NaN, or the largest integer: what a kernel does not write shows."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(
    params=[
        pytest.param(name, marks=_INTERPRETER if name == "triton" else ())
        for name in BACKENDS
        if reason_not(name, "cpu") is None
    ]
)
def backend(request: pytest.FixtureRequest, poisoned: None) -> str:
    """Every backend that can run on CPU tensors in this installation; Triton's runs in its interpreter."""
    return request.param


@pytest.fixture
def squares(backend: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Lets group_action go by large squares of tokens in the interpreter, which are fewer; not in one case in eight."""

    def of_case(number: int) -> None:
        if backend == "triton":
            kernels, language = import_module("ser_fast.kernels.group_action"), import_module("triton.language")
            monkeypatch.setattr(kernels, "_EDGE", language.constexpr(8 if number % 8 == 0 else 32))

    return of_case
