"""nt_xent and info_nce on every backend that runs here: their cases, as operators of torch, and their errors."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from cases.nt_xent import *  # noqa: F403, the tests of one backend
from cases.nt_xent import IMAGE, LAYOUTS, SETTINGS, VALID, OpCalls, bf16, f32, f64, pair, rows, with_gradients
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from ser_fast.ops.backends import BACKENDS, reason_not
from ser_fast.ops.nt_xent import info_nce, nt_xent

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("normalize", [True, False])
def test_gradcheck(setting: Any, normalize: bool, backend: str) -> None:
    function, x, y, options = setting
    call = partial(function, temperature=0.3, reduction="none", normalize=normalize, backend=backend, **options)
    # Along one random direction where a call takes a tenth of a second: in Triton's interpreter.
    # A last bit between two backward passes is no wrong gradient; the same bits at any thread count: test_native.
    inputs = x.requires_grad_(), y.requires_grad_()
    assert torch.autograd.gradcheck(call, inputs, fast_mode=backend == "triton", nondet_tol=1e-12)


def test_oracle_rounds_half_precision_once(loss_function: Callable[..., Tensor]) -> None:
    x, y = rows(6, dtype=bf16), rows(6, seed=1, dtype=bf16)
    options = {"temperature": 0.1, "backend": "reference"}
    loss, *gradients = with_gradients(loss_function, x, y, **options)
    expected, *expected_gradients = with_gradients(loss_function, x.float(), y.float(), **options)
    assert torch.equal(loss, expected)
    assert all(map(torch.equal, gradients, (g.to(bf16) for g in expected_gradients)))


@pytest.mark.parametrize("layout", ["transposed", "offset"])
@pytest.mark.parametrize("dtype", [f64, bf16], ids=str)
@pytest.mark.parametrize("count", [0, 6])
def test_opcheck(
    loss_function: Callable[..., Tensor], count: int, dtype: torch.dtype, layout: str, backend: str
) -> None:
    x, y = (LAYOUTS[layout](z.detach()).requires_grad_() for z in pair(count, dtype=dtype))
    with OpCalls() as recorded:
        loss_function(x, y, temperature=0.2, image=IMAGE[:count], valid=VALID[:count], backend=backend).backward()
    (forward, inputs, _), (backward, gradient_inputs, _) = recorded.calls
    torch.library.opcheck(forward, (x, y, *inputs[2:]))
    torch.library.opcheck(backward, [x.detach() if isinstance(x, Tensor) else x for x in gradient_inputs])


@pytest.mark.parametrize("layout", ["transposed", "offset"])
@pytest.mark.parametrize("count", [0, 6])
def test_opcheck_detached(count: int, layout: str, backend: str) -> None:
    query, key = (LAYOUTS[layout](z.detach()) for z in pair(count))
    query.requires_grad_()
    with OpCalls() as recorded:
        info_nce(query, key, temperature=0.2, image=IMAGE[:count], valid=VALID[:count], backend=backend)
    ((forward, inputs, _),) = recorded.calls
    torch.library.opcheck(forward, (query, key, *inputs[2:]))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    "setting",
    [SETTINGS[name] for name in ("views", "views, image, valid", "keys, image, valid", "queue", "gathered, all")],
    indirect=True,
)
def test_compiles_in_one_graph(setting: Any, autocast: bool, backend: str) -> None:
    function, x, y, options = setting

    def step(x: Tensor, y: Tensor, **options: Any) -> Tensor:
        with torch.autocast("cpu", dtype=bf16, enabled=autocast):
            return function(x * 2, y * 2, temperature=0.2, backend=backend, **options) * 3

    torch.compiler.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=graphs)
    for repeats in (1, 2, 3, 4):  # the number of rows changes from step to step
        views = [z.float().repeat(repeats, 1) + rows(repeats * len(z), seed=repeats, dtype=f32) for z in (x, y)]
        repeated = {name: option.repeat(repeats) for name, option in options.items()}
        actual = with_gradients(compiled, *views, **repeated)
        torch.testing.assert_close(actual, with_gradients(step, *views, **repeated))
    assert graphs.frame_count <= 2  # one for the first size, one for all others


def test_never_waits_for_the_device(setting: Any) -> None:
    """Whatever reads a value of a meta tensor raises."""
    function, x, y, options = setting
    loss, *gradients = with_gradients(
        function, x.to("meta"), y.to("meta"), temperature=0.2, **{name: o.to("meta") for name, o in options.items()}
    )
    assert loss.is_meta
    assert [g.shape for g in gradients] == [x.shape, y.shape]


@pytest.mark.parametrize("detached", [False, True])
def test_no_second_derivative_and_no_forward_mode(
    loss_function: Callable[..., Tensor], detached: bool, backend: str
) -> None:
    """Gradients are made by kernels, and constants to autograd: what would be wrong is refused."""
    x, y = rows(6).requires_grad_(), rows(6, seed=1).requires_grad_(not detached)
    loss = loss_function(x, y, temperature=0.2, backend=backend)
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(gradient.square().sum(), x)
    with pytest.raises(RuntimeError, match="no derivative in forward mode"):
        torch.func.jvp(lambda x: loss_function(x, y.detach(), temperature=0.2, backend=backend), (rows(6),), (rows(6),))


@pytest.mark.parametrize("temperature", [np.float32(0.5), np.float64(0.5), np.int64(1)])
def test_numpy_numbers_are_temperatures(loss_function: Callable[..., Tensor], temperature: Any) -> None:
    x, y = rows(6), rows(6, seed=1)
    assert loss_function(x, y, temperature=temperature) == loss_function(x, y, temperature=float(temperature))


# ---------------------------------------------------------------- errors

X = torch.zeros(4, 3)
IDS = torch.arange(4)
BOTH = [  # positional arguments, options, and what the error names
    ((np.zeros((4, 3)), X), {}, TypeError, "{0}: got ndarray, takes a tensor"),
    ((X, [1.0]), {}, TypeError, "{1}: got list, takes a tensor"),
    ((X.long(), X), {}, TypeError, "{0}: got torch.int64, takes float32"),
    ((X.to_sparse(), X), {}, TypeError, "{0}: got a tensor of the layout sparse_coo, takes a dense one"),
    ((X[0], X), {}, ValueError, r"{0}: got shape \(3,\), takes rows"),
    ((X[:, :0], X[:, :0]), {}, ValueError, r"{0}: got shape \(4, 0\), takes rows"),
    ((X, X.double()), {}, TypeError, "{1}: got torch.float64, takes that of {0}, torch.float32"),
    ((X, X.to("meta")), {}, ValueError, "{1}: got device meta, takes that of {0}, cpu"),
    ((X, X), {"temperature": 0}, ValueError, "temperature: got 0.*, takes a number from 1e-30 to 1e30"),
    ((X, X), {"temperature": 1e-300}, ValueError, "temperature: got 1e-300, takes a number from 1e-30"),
    ((X, X), {"temperature": -0.1}, ValueError, "temperature: got -0.1, takes a number from 1e-30 to 1e30"),
    ((X, X), {"temperature": math.inf}, ValueError, "temperature: got inf, takes a number from 1e-30 to 1e30"),
    ((X, X), {"temperature": math.nan}, ValueError, "temperature: got nan, takes a number from 1e-30 to 1e30"),
    ((X, X), {"temperature": torch.ones(())}, TypeError, "temperature: got Tensor, takes a number, which has no grad"),
    ((X, X), {"temperature": "warm"}, TypeError, "temperature: got str, takes a number"),
    ((X, X), {"reduction": "average"}, ValueError, "reduction: got 'average', takes one of 'mean', 'sum', 'none'"),
    ((X, X), {"backend": "numpy"}, ValueError, "backend: got 'numpy'"),
    ((X, X), {"image": [0, 1, 2, 3]}, TypeError, "image: got list, takes a tensor or None"),
    ((X, X), {"image": torch.ones(4).long().to_sparse()}, TypeError, "image: got a tensor of the layout sparse_coo"),
    ((X, X), {"image": IDS.float()}, TypeError, "image: got torch.float32, takes one of torch.int64"),
    ((X, X), {"image": IDS[:3]}, ValueError, r"image: got shape \(3,\), takes \(4,\)"),
    ((X, X), {"image": IDS[:, None]}, ValueError, r"image: got shape \(4, 1\), takes \(4,\)"),
    ((X, X), {"image": IDS.to("meta")}, ValueError, "image: got device meta, takes that of the rows, cpu"),
    ((X, X), {"valid": IDS}, TypeError, "valid: got torch.int64, takes one of torch.bool"),
    ((X, X), {"valid": IDS[:2] > 0}, ValueError, r"valid: got shape \(2,\), takes \(4,\)"),
]
VIEWS = [
    ((X, X[:3]), {}, ValueError, r"z1: got shape \(3, 3\), takes that of z0, \(4, 3\)"),
    ((X, X[:, :2]), {}, ValueError, r"z1: got shape \(4, 2\), takes that of z0, \(4, 3\)"),
    ((X, X), {"memory_budget": -1}, ValueError, "memory_budget: got -1, takes 0 or a number of bytes"),
    ((X, X), {"memory_budget": 1e9}, TypeError, "memory_budget: got float, takes a whole number of bytes"),
]
KEYS = [
    ((X, X[:, :2]), {}, ValueError, "key: got 2 columns, takes those of query, 3"),
    ((X, X[:3]), {}, ValueError, "key: got 3 rows for 4 of query, takes at least as many unless positive is given"),
    ((X, X[:0]), {"positive": IDS}, ValueError, "key: got no rows for 4 of query, takes at least one"),
    ((X, X), {"key_image": IDS}, ValueError, "key_image: got a tensor without image, takes both or neither"),
    ((X, X.repeat(2, 1)), {"image": IDS}, ValueError, r"key_image: got None with .*, takes a \(8,\) tensor"),
    ((X, X), {"image": IDS, "key_image": IDS > 0}, TypeError, "key_image: got torch.bool, takes one of torch.int64"),
    ((X, X), {"key_valid": IDS}, TypeError, "key_valid: got torch.int64, takes one of torch.bool"),
    ((X, X), {"positive": IDS.float()}, TypeError, "positive: got torch.float32, takes one of torch.int64"),
    ((X, X), {"positive": IDS[:2]}, ValueError, r"positive: got shape \(2,\), takes \(4,\)"),
    ((X, X), {"positive": IDS + 1}, ValueError, "positive: got rows 1 to 4, takes 0 to 3"),
    ((X, X), {"positive": IDS - 1}, ValueError, "positive: got rows -1 to 2, takes 0 to 3"),
]


@pytest.mark.parametrize(
    ("function", "arguments", "options", "error", "message"),
    [
        *((nt_xent, *case[:3], case[3].format("z0", "z1")) for case in BOTH),
        *((info_nce, *case[:3], case[3].format("query", "key")) for case in BOTH),
        *((nt_xent, *case) for case in VIEWS),
        *((info_nce, *case) for case in KEYS),
    ],
)
def test_errors_name_the_argument(
    function: Callable[..., Tensor],
    arguments: tuple[Any, Any],
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match="^" + message):
        function(*arguments, **{"temperature": 0.2, **options})


def test_refuses_a_backend_that_can_not_run(loss_function: Callable[..., Tensor]) -> None:
    missing = [name for name in BACKENDS if reason_not(name, "cpu") is not None]
    for name in missing:
        with pytest.raises(RuntimeError, match=name):
            loss_function(X, X, temperature=0.2, backend=name)
