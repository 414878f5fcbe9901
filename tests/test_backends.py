"""Which backend runs, what is said when one can't, and that importing the operations stays light."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ser_fast.ops import reference
from ser_fast.ops.backends import BACKENDS, PREFERRED, choose, implementations, reason_not, registered

X = torch.zeros(1)


DEVICES = {"cpu": "cpu", "triton": "cuda", "cuda": "cuda"}


@pytest.fixture
def complete() -> Iterator[None]:
    """An installation that misses no part, with a GPU."""
    with ExitStack() as stack:
        for name, device in DEVICES.items():
            stack.enter_context(registered(name, reference, device))
        yield


@pytest.fixture
def bare() -> Iterator[None]:
    """An installation of plain Python."""
    with ExitStack() as stack:
        for name, device in DEVICES.items():
            stack.enter_context(registered(name, f"no {name} in this box", device))
        yield


@pytest.mark.parametrize("device", ["cpu", "cuda", "meta"])
def test_the_reference_runs_anywhere(bare, device):
    assert reason_not("reference", device) is None


@pytest.mark.parametrize("backend", ["cpu", "triton", "cuda"])
def test_a_missing_part_is_the_reason(bare, backend):
    assert reason_not(backend, "cuda") == f"no {backend} in this box"


@pytest.mark.parametrize(
    ("backend", "runs", "fails"), [("cpu", "cpu", "cuda"), ("triton", "cuda", "cpu"), ("cuda", "cuda", "cpu")]
)
def test_a_wrong_device_is_the_reason(complete, backend, runs, fails):
    assert reason_not(backend, runs) is None
    reason = reason_not(backend, fails)
    assert runs in reason
    assert fails in reason


def test_auto_is_the_reference_where_nothing_else_runs(bare):
    assert choose("op", "auto", X) == "reference"


def test_auto_takes_the_native_kernels(complete):
    assert choose("op", "auto", X) == "cpu"
    assert choose("op", "auto", X.to("meta")) == "reference"


def test_auto_never_takes_the_interpreter(complete):
    with registered("triton", reference, "cpu"):
        assert reason_not("triton", "cpu") is None
        assert choose("op", "triton", X) == "triton"
        assert choose("op", "auto", X) == "cpu"
        with registered("cpu", "not here", "cpu"):
            assert choose("op", "auto", X) == "reference"


@pytest.mark.parametrize("interpreter", [None, "0", "1"])
def test_where_triton_runs(interpreter):
    """With a GPU, or on CPU tensors in the interpreter; else it isn't even imported, and the reason says so."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if interpreter is not None:
        environment["TRITON_INTERPRET"] = interpreter
    program = (
        "import sys; from ser_fast.ops.backends import reason_not; "
        "print([reason_not('triton', device) for device in ('cpu', 'cuda')], 'triton' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment
    )
    if interpreter == "1":
        expected = "[None, 'it runs on cpu tensors, not on cuda'] True"
    elif torch.cuda.is_available():
        expected = "['it runs on cuda tensors, not on cpu', None] True"
    else:
        assert "no GPU" in result.stdout
        assert result.stdout.endswith("False\n")
        return
    assert result.stdout.strip() == expected


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Any]:
    """What stands for a tensor on a GPU of a major compute capability."""

    def of(capability: int) -> Any:
        properties = SimpleNamespace(major=capability)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        return SimpleNamespace(device=torch.device("cuda", 0))

    return of


@pytest.mark.parametrize(
    ("op", "takes"),
    [
        ("group_action", {7: "triton", 8: "cuda", 9: "cuda", 10: "cuda", 12: "cuda"}),
        ("nt_xent", {7: "triton", 8: "cuda", 9: "triton", 10: "triton", 12: "cuda"}),
        ("info_nce", {7: "triton", 8: "cuda", 9: "triton", 10: "triton", 12: "cuda"}),
    ],
)
def test_auto_takes_the_preferred_on_a_gpu(complete, gpu, op, takes):
    assert {capability: choose(op, "auto", gpu(capability)) for capability in takes} == takes


@pytest.mark.parametrize("capability", [7, 8, 9])
@pytest.mark.parametrize("op", PREFERRED)
def test_auto_takes_the_other_where_the_preferred_is_missing(complete, gpu, op, capability):
    tensor = gpu(capability)
    first = choose(op, "auto", tensor)
    (other,) = {"triton", "cuda"} - {first}
    with registered(first, "not here", "cuda"):
        assert choose(op, "auto", tensor) == other
        with registered(other, "not here", "cuda"):
            assert choose(op, "auto", tensor) == "reference"


def test_what_is_registered_is_gone_afterwards():
    before = implementations(), [reason_not(name, device) for name in BACKENDS for device in ("cpu", "cuda")]
    with registered("cuda", reference, "cpu"):
        assert implementations()["cuda"] is reference
        assert reason_not("cuda", "cpu") is None
    assert before == (implementations(), [reason_not(name, device) for name in BACKENDS for device in ("cpu", "cuda")])


@pytest.mark.parametrize("op", PREFERRED)
@pytest.mark.parametrize("capability", [7, 9])
def test_an_explicit_request_is_not_a_preference(complete, gpu, op, capability):
    for name in ("triton", "cuda"):
        assert choose(op, name, gpu(capability)) == name


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_an_explicit_request_runs(complete, name):
    assert choose("op", name, X) == name


@pytest.mark.parametrize("name", ["cpu", "triton", "cuda"])
def test_an_explicit_request_never_falls_back(bare, name):
    with pytest.raises(RuntimeError, match=f"group_action: backend='{name}' .*no {name} in this box"):
        choose("group_action", name, X)


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_an_explicit_request_on_the_wrong_device(complete, name):
    with pytest.raises(RuntimeError, match=f"backend='{name}' .*cuda tensors, not on cpu"):
        choose("group_action", name, X)


@pytest.mark.parametrize("name", ["numba", "", "CPU", None])
def test_an_unknown_backend_is_named_with_what_is_taken(name):
    with pytest.raises(ValueError, match="backend: got") as error:
        choose("op", name, X)
    assert repr(name) in str(error.value)
    assert all(repr(known) in str(error.value) for known in ("auto", *BACKENDS))


@pytest.mark.parametrize(
    "statement", ["import ser_fast.ops.group_action, ser_fast.lattice", "from ser_fast import SERLoss"]
)
def test_the_import_takes_torch_alone(statement):
    heavy = {"timm", "torchvision", "matplotlib", "rich", "tyro", "skimage", "safetensors", "tensorboard", "PIL"}
    program = f"import sys; {statement}; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
