"""Which backend runs, what is said when one can't, and that importing the operations stays light."""

import os
import subprocess
import sys

import pytest
import torch

from ser_fast.ops import backends
from ser_fast.ops.backends import BACKENDS, choose, reason_not

X = torch.zeros(1)


@pytest.fixture
def complete(monkeypatch: pytest.MonkeyPatch) -> None:
    """An installation that misses no part, with a GPU."""
    monkeypatch.setattr(backends, "_MISSING", {})
    monkeypatch.setitem(backends._DEVICES, "triton", "cuda")


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """An installation of plain Python."""
    monkeypatch.setattr(backends, "_MISSING", {name: f"no {name} in this box" for name in ("cpu", "triton", "cuda")})


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


def test_auto_never_takes_the_interpreter(complete, monkeypatch):
    monkeypatch.setitem(backends._DEVICES, "triton", "cpu")
    assert reason_not("triton", "cpu") is None
    assert choose("op", "triton", X) == "triton"
    assert choose("op", "auto", X) == "cpu"
    monkeypatch.setitem(backends._MISSING, "cpu", "not here")
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


@pytest.mark.parametrize(("missing", "best"), [((), "cuda"), (("cuda",), "triton"), (("cuda", "triton"), "reference")])
def test_auto_takes_the_fastest_on_a_gpu(complete, monkeypatch, missing, best):
    class OnGPU:
        device = torch.device("cuda")

    for name in missing:
        monkeypatch.setitem(backends._MISSING, name, "not here")
    assert choose("op", "auto", OnGPU()) == best


@pytest.mark.parametrize("op", ["nt_xent", "info_nce"])
def test_an_op_without_a_cuda_kernel(complete, op):
    class OnGPU:
        device = torch.device("cuda")

    assert choose(op, "auto", OnGPU()) == "triton"
    with pytest.raises(RuntimeError, match=f"backend='cuda' can't run here: this version has no CUDA kernel for {op}"):
        choose(op, "cuda", OnGPU())


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_an_explicit_request_is_met(complete, name):
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
