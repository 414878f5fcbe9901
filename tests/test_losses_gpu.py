"""The losses on a GPU, at real sizes, against float64 on the same device: `pytest -m gpu`."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ser_fast import LatticeMap, SERLoss, group_action, info_nce, nt_xent
from ser_fast.ops.backends import BACKENDS, reason_not

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU"),
]

f64, f32, bf16, f16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(params=[name for name in BACKENDS if name != "cpu" and reason_not(name, "cuda") is None])
def on_gpu(request: pytest.FixtureRequest) -> str:
    return request.param


def worst(actual: Tensor, expected: Tensor) -> float:
    """The largest error, relative to the largest expected value."""
    return ((actual.to(f64) - expected).abs().max() / expected.abs().max()).item()


def poison() -> None:
    """Memory that is allocated next holds NaN where nobody writes."""
    torch.full((2**27,), torch.nan, device="cuda")


# ---------------------------------------------------------------- nt_xent and info_nce


def both(function: Callable[..., Tensor], x: Tensor, y: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """The losses, and the gradients in x and y of their mean, weighted."""
    x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
    poison()
    loss = function(x, y, reduction="none", **options)
    weight = torch.linspace(0.5, 1.5, len(loss), device="cuda", dtype=loss.dtype)
    return loss.detach(), *torch.autograd.grad((weight * loss).mean(), (x, y))


# Half-precision rows take part in products as float16, rounded once: half an eps / temperature of s.
LOSS_BUDGET = {f32: 2e-6, bf16: 2e-3, f16: 2e-3}
GRADIENT_BUDGET = {f32: 1e-5, bf16: 1e-2, f16: 5e-3}


@pytest.mark.parametrize("dtype", LOSS_BUDGET, ids=str)
@pytest.mark.parametrize("temperature", [0.02, 0.1, 0.3])
@pytest.mark.parametrize("kept", [0, 2**40], ids=["computed again", "kept"])
@pytest.mark.parametrize(("rows", "dim"), [(1, 64), (300, 128), (1000, 256), (1177, 512), (4704, 512), (600, 1024)])
def test_nt_xent_against_float64(rows, dim, kept, temperature, dtype, on_gpu):
    x = torch.randn(rows, dim, dtype=dtype, device="cuda")
    y = (x + torch.randn_like(x)).to(dtype)
    options = {
        "temperature": temperature,
        "image": torch.arange(rows, device="cuda") // 50,
        "valid": torch.rand(rows, device="cuda") < 0.9,
    }
    actual = both(nt_xent, x, y, memory_budget=kept, backend=on_gpu, **options)
    expected = both(nt_xent, x.to(f64), y.to(f64), backend="reference", **options)
    scale = max(1.0, 0.1 / temperature)
    if expected[0].any():
        assert worst(actual[0], expected[0]) <= LOSS_BUDGET[dtype] * scale
        assert max(map(worst, actual[1:], expected[1:])) <= GRADIENT_BUDGET[dtype] * scale
    again = both(nt_xent, x, y, memory_budget=kept, backend=on_gpu, **options)
    assert all(map(torch.equal, actual, again))


@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
@pytest.mark.parametrize("keys_need_gradient", [True, False])
@pytest.mark.parametrize(("rows", "keys", "dim"), [(500, 900, 256), (2352, 2352, 512), (300, 4000, 384)])
def test_info_nce_against_float64(rows, keys, dim, keys_need_gradient, dtype, on_gpu):
    query, key = torch.randn(rows, dim, dtype=dtype, device="cuda"), torch.randn(keys, dim, dtype=dtype, device="cuda")
    key[:rows] += query
    image = torch.arange(keys, device="cuda") // 40
    options = {"temperature": 0.2, "image": image[:rows], "key_image": image, "reduction": "none"}
    results = []
    for kind, backend in ((dtype, on_gpu), (f64, "reference")):
        q, k = query.to(kind).requires_grad_(), key.to(kind).requires_grad_(keys_need_gradient)
        loss = info_nce(q, k, backend=backend, **options)
        results.append((loss.detach(), *torch.autograd.grad(loss.mean(), (q, k) if keys_need_gradient else (q,))))
    actual, expected = results
    assert worst(actual[0], expected[0]) <= LOSS_BUDGET[dtype]
    assert max(map(worst, actual[1:], expected[1:])) <= GRADIENT_BUDGET[dtype]


@pytest.mark.parametrize("rows", [20_000, 100_000])
def test_rows_of_a_large_nt_xent(rows, on_gpu):
    """Some rows by the definition: the matrix would not fit."""
    if on_gpu == "reference":
        pytest.skip("stores the matrix")
    x = torch.randn(rows, 512, dtype=bf16, device="cuda")
    y = (x + torch.randn_like(x)).to(bf16)
    loss, *_ = both(nt_xent, x, y, temperature=0.3, backend=on_gpu)
    u = torch.nn.functional.normalize(torch.cat([x, y]).to(f64), dim=1)
    for t in (0, rows // 3, rows - 1, rows + 5, 2 * rows - 1):
        s = u @ u[t] / 0.3
        positive = s[(t + rows) % (2 * rows)]
        s[t] = -torch.inf
        assert loss[t].item() == pytest.approx((s.logsumexp(0) - positive).item(), rel=2e-3)


# ---------------------------------------------------------------- SERLoss


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("with_keys", [False, True])
def test_ser_loss_under_autocast(compiled, with_keys, on_gpu):
    torch.compiler.reset()
    g0, g1 = LatticeMap.rot90((14, 14), 1).to("cuda"), LatticeMap.resize((14, 14), (12, 16)).to("cuda")
    ser = SERLoss(384, backend=on_gpu).cuda()
    exact = SERLoss(384, backend="reference").cuda().double()
    exact.load_state_dict(ser.state_dict())
    tokens = [torch.randn(16, *g.size_out, 384, device="cuda", requires_grad=True) for g in (g0, g1)]
    keys = [t.detach() + 0.1 * torch.randn_like(t) for t in tokens]
    call = torch.compile(ser, fullgraph=True) if compiled else ser
    with torch.autocast("cuda", dtype=bf16):
        loss = call(*tokens, g0, g1, *(keys if with_keys else ()))
    doubles = [t.detach().double().requires_grad_() for t in tokens]
    expected = exact(*doubles, g0, g1, *([k.double() for k in keys] if with_keys else ()))
    assert loss.item() == pytest.approx(expected.item(), rel=5e-3)
    used = [i for i in range(2) if not (with_keys and i == 0)]
    gradients = torch.autograd.grad(loss, [tokens[i] for i in used])
    for actual, truth in zip(gradients, torch.autograd.grad(expected, [doubles[i] for i in used]), strict=True):
        assert worst(actual, truth) <= 5e-2


def test_ser_loss_in_a_cuda_graph(on_gpu):
    if on_gpu == "reference":
        pytest.skip("the oracle waits for the device")
    g0, g1 = LatticeMap.identity((14, 14)).to("cuda"), LatticeMap.resize((14, 14), (12, 16)).to("cuda")
    ser = SERLoss(384, backend=on_gpu).cuda()
    tokens = [torch.randn(8, *g.size_out, 384, device="cuda") for g in (g0, g1)]

    def step() -> tuple[Tensor, ...]:
        inputs = [t.detach().requires_grad_() for t in tokens]
        with torch.autocast("cuda", dtype=bf16, cache_enabled=False):
            loss = ser(*inputs, g0, g1)
        return loss.detach(), *torch.autograd.grad(loss, inputs)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for t in tokens:
        t.normal_()
    graph.replay()
    torch.testing.assert_close(captured, step(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("op", ["group_action", "nt_xent", "info_nce"])
def test_never_waits_for_the_device(op, on_gpu):
    if on_gpu == "reference":
        pytest.skip("the oracle may")
    g = LatticeMap.resize((14, 14), (12, 16)).to("cuda")
    x = torch.randn(4, 196, 64, device="cuda", requires_grad=True)
    z = torch.randn(500, 64, device="cuda", requires_grad=True)
    call = {
        "group_action": lambda: group_action(x, g, backend=on_gpu).sum(),
        "nt_xent": lambda: nt_xent(z, z.flip(0), temperature=0.2, backend=on_gpu),
        "info_nce": lambda: info_nce(z, z.detach().flip(0), temperature=0.2, backend=on_gpu),
    }[op]
    call().backward()  # what is compiled or allocated once may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
