"""group_action on every backend that runs here: its cases, as an operator of torch, and its errors."""

from functools import partial

import pytest
import torch
from cases.group_action import *  # noqa: F403, the tests of one backend
from cases.group_action import GRADIENT_OPTIONS, bf16, f32, f64, some_map
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad

from ser_fast.lattice import LatticeMap
from ser_fast.ops.backends import BACKENDS, reason_not
from ser_fast.ops.group_action import group_action

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize(("interpolation", "padding", "antialias"), GRADIENT_OPTIONS)
def test_gradcheck_to_second_order(backend, interpolation, padding, antialias):
    options = {"interpolation": interpolation, "padding": padding, "antialias": antialias, "backend": backend}
    x = torch.randn(2, 3, 4, 2, dtype=f64, requires_grad=True)
    g = some_map((3, 4), (2, 5), batch=2)
    assert torch.autograd.gradcheck(lambda x: group_action(x, g, **options), (x,))
    assert torch.autograd.gradgradcheck(lambda x: group_action(x, g, **options), (x,))


@pytest.mark.parametrize("required", [False, True])
def test_forward_mode(backend, required):
    """The action is linear: its tangent is the action on the tangent; of its transpose, too."""
    x, v = torch.randn(2, 2, 3, 4, 2, dtype=f64)
    g = some_map((3, 4), (2, 5), batch=2)
    act = partial(group_action, g=g, backend=backend)
    out, tangent = torch.func.jvp(act, (x,), (v,))
    torch.testing.assert_close((out, tangent), (act(x), act(v)), rtol=0, atol=0)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.requires_grad_(required), v)
        primal, tangent = forward_ad.unpack_dual(act(dual))
    assert primal.requires_grad == required
    torch.testing.assert_close(tangent, act(v), rtol=0, atol=0)
    if required:
        assert torch.autograd.gradcheck(act, (x.detach().requires_grad_(),), check_forward_ad=True)


@pytest.mark.parametrize(
    "g",
    [
        some_map((5, 7), (6, 8)),
        LatticeMap.d4((5, 5), torch.tensor([1, 6, 3])),
        LatticeMap.resize((4, 4), (2, 3), batch=3),
    ],
)
@pytest.mark.parametrize("op", ["group_action", "group_action_transpose"])
@pytest.mark.parametrize("dtype", [f32, bf16])
def test_opcheck(backend, op, g, dtype):
    size = g.size_in if op == "group_action" else g.size_out
    x = torch.randn(3, size[0] * size[1], 4).to(dtype).requires_grad_()
    arguments = (x, g.linear, g.offset, g.size_in, g.size_out, "bicubic", "border", False, backend)
    torch.library.opcheck(getattr(torch.ops.ser_fast, op), arguments)


def test_compiles_once_for_many_lattices(backend):
    counter, compiled = CompileCounterWithBackend("aot_eager"), []

    @torch.compile(fullgraph=True, backend=counter, dynamic=True)
    def step(x: Tensor, g0: LatticeMap, g1: LatticeMap) -> tuple[Tensor, Tensor]:
        return group_action(x, LatticeMap.relative(g0, g1), return_valid=True, backend=backend)

    # Lengths that are equal in the first call would be taken for one symbol.
    for size, middle, size_out in [((4, 6), (5, 8), (7, 9)), ((5, 5), (7, 6), (8, 9)), ((7, 3), (4, 4), (5, 2))]:
        g0, g1 = some_map(middle, size), some_map(middle, size_out)
        x = torch.randn(3, *size, 2, requires_grad=True)
        out, valid = step(x, g0, g1)
        compiled.append(counter.frame_count)
        g = LatticeMap.relative(g0, g1)
        expected = group_action(x, g, backend=backend)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)
        assert torch.equal(valid, g.valid())
        y = torch.randn_like(out)
        gradients = (torch.autograd.grad(values, x, y)[0] for values in (out, expected))
        torch.testing.assert_close(*gradients, rtol=0, atol=1e-5)
    assert len(set(compiled)) == 1


# ---------------------------------------------------------------- errors

X, G = torch.zeros(2, 4, 6, 3), LatticeMap.identity((4, 6))
LEARNED = LatticeMap(G.linear.clone().requires_grad_(), G.offset, (4, 6), (4, 6))


@pytest.mark.parametrize(
    ("error", "match", "changed"),
    [
        (TypeError, "x: got .*int64", {"x": X.long()}),
        (TypeError, "x: got .*complex64", {"x": X.to(torch.complex64)}),
        (TypeError, "x: got .*list", {"x": X.tolist()}),
        (TypeError, "x: got a tensor of the layout sparse_coo, takes a dense one", {"x": X.to_sparse()}),
        (ValueError, r"g.size_out: got \(65536, 65536\), takes .*fewer than 2", {"g": G.on((4, 6), (2**16, 2**16))}),
        (TypeError, "g: got .*Tensor", {"g": torch.eye(2)}),
        (TypeError, "g: got .*NoneType", {"g": None}),
        (ValueError, r"x: got shape \(2, 6, 4, 3\).*size_in \(4, 6\)", {"x": X.transpose(1, 2)}),
        (ValueError, r"x: got shape \(2, 4, 5, 3\).*size_in \(4, 6\)", {"x": X[:, :, :5]}),
        (ValueError, r"x: got shape \(2, 23, 3\).*size_in \(4, 6\)", {"x": X.flatten(1, 2)[:, 1:]}),
        (ValueError, r"x: got shape \(4, 6\)", {"x": X[0, :, :, 0]}),
        (ValueError, r"x: got shape \(1, 2, 4, 6, 3\)", {"x": X[None]}),
        (ValueError, "g: got 3 maps for x with 2 samples", {"g": LatticeMap.identity((4, 6), batch=3)}),
        (ValueError, "g: got 0 maps for x with 2 samples", {"g": LatticeMap.identity((4, 6), batch=0)}),
        (ValueError, "g: got a map on meta for x on cpu", {"g": G.to("meta")}),
        (ValueError, "g: got a map that requires a gradient", {"g": LEARNED}),
        (ValueError, "interpolation: got 'cubic'.*'bicubic'", {"interpolation": "cubic"}),
        (ValueError, "interpolation: got None", {"interpolation": None}),
        (ValueError, "padding: got 'circular'.*'zeros', 'border', 'reflection'", {"padding": "circular"}),
        (ValueError, "backend: got 'fast'", {"backend": "fast"}),
    ],
)
def test_errors_name_the_argument(error, match, changed):
    with pytest.raises(error, match=match):
        group_action(**{"x": X, "g": G, **changed})


@pytest.mark.parametrize("name", [name for name in BACKENDS if reason_not(name, "cpu") is not None])
def test_a_backend_that_cannot_run_says_why(name):
    with pytest.raises(RuntimeError, match=f"group_action: backend='{name}' can't run here: ") as error:
        group_action(X, G, backend=name)
    assert reason_not(name, "cpu") in str(error.value)
