"""Fixtures shared by the test files, and how much of the matrix the interpreter takes."""

import os
from collections.abc import Callable, Iterator
from importlib import import_module
from zlib import crc32

import pytest
import torch

# Without a GPU the Triton kernels run on CPU tensors, in the interpreter; read when they are imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from ser_fast.ops.backends import BACKENDS, reason_not

torch.set_num_threads(1)

# What the interpreter runs whole by default: golden cases and every option, forward and backward. Of the other tests it
# runs one case in thirty-two, always the same ones; `--whole` runs all of them.
_WHOLE = ("test_golden", "test_every_option_is_its_formula", "test_the_gradient_is_the_adjoint")
_ONE_IN = 32


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--whole", action="store_true", help="run the whole matrix in Triton's interpreter, too (an hour)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--whole"):
        return

    def taken(item: pytest.Item) -> bool:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        if parameters.get("backend") != "triton":
            return True
        if parameters.get("dtype") == torch.float64:  # the same way through the kernels as float32
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
    """What torch allocates holds NaN, or the largest integer, until it is written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[name for name in BACKENDS if reason_not(name, "cpu") is None])
def backend(request: pytest.FixtureRequest) -> str:
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
