"""group_action on a GPU at real sizes, on the backends that are for one."""

from itertools import product

import pytest
import torch
from torch import Tensor

from ser_fast.interpolation import INTERPOLATIONS, PADDINGS
from ser_fast.lattice import LatticeMap
from ser_fast.ops.backends import reason_not
from ser_fast.ops.group_action import group_action

bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"),
]
BUDGET = {f32: 1e-5, bf16: 2**-8, f16: 2**-10}
BATCH = 64


@pytest.fixture(params=["triton", "cuda"])
def backend(request: pytest.FixtureRequest) -> str:
    reason = reason_not(request.param, "cuda")
    if reason is not None:
        pytest.skip(reason)
    return request.param


def there_and_back(g: LatticeMap, x: Tensor, cotangent: Tensor, **options: object) -> tuple[Tensor, Tensor]:
    """W_g x and W_g^T cotangent."""
    x = x.detach().requires_grad_()
    out = group_action(x, g, **options)
    return out.detach(), *torch.autograd.grad(out, x, cotangent)


def tokens(g: LatticeMap, channels: int, dtype: torch.dtype, batch: int = BATCH) -> tuple[Tensor, Tensor]:
    sizes = ((batch, *size, channels) for size in (g.size_in, g.size_out))
    return tuple(torch.randn(size, device="cuda").to(dtype) for size in sizes)


MAPS = {
    "d4 and resize": LatticeMap.d4((12, 12), torch.arange(BATCH) % 8) @ LatticeMap.resize((14, 14), (12, 12)),
    "rotation": LatticeMap.rotate((14, 14), torch.linspace(0, 360, BATCH)),
    "large rotation": LatticeMap.rotate((64, 64), torch.linspace(0, 360, BATCH)),
    "large resize": LatticeMap.resize((64, 64), (40, 23), batch=BATCH),
}


@pytest.mark.parametrize("options", [("bicubic", "border", False), ("lanczos3", "reflection", True)], ids=str)
@pytest.mark.parametrize("channels", [512, 100, 7])
@pytest.mark.parametrize("dtype", BUDGET, ids=str)
@pytest.mark.parametrize("g", MAPS.values(), ids=MAPS)
def test_values(backend, g, dtype, channels, options):
    names = dict(zip(("interpolation", "padding", "antialias"), options, strict=True))
    x, cotangent = tokens(g, channels, dtype)
    actual = there_and_back(g.to("cuda"), x, cotangent, backend=backend, **names)
    again = there_and_back(g.to("cuda"), x, cotangent, backend=backend, **names)
    few = slice(0, BATCH, 16)  # the oracle stores its matrices
    expected = there_and_back(g[few].to("cuda"), x[few].float(), cotangent[few].float(), backend="reference", **names)
    for ours, repeated, exact in zip(actual, again, expected, strict=True):
        assert torch.equal(ours, repeated)
        error = (ours[few].float() - exact).abs().max() / exact.abs().max()
        assert error <= BUDGET[dtype]


@pytest.mark.parametrize(
    ("interpolation", "padding", "antialias"), list(product(INTERPOLATIONS, PADDINGS, (False, True)))
)
def test_every_option(backend, interpolation, padding, antialias):
    options = {"interpolation": interpolation, "padding": padding, "antialias": antialias}
    g = LatticeMap.resize((14, 14), (9, 11), batch=8) @ LatticeMap.rotate((14, 14), torch.linspace(3, 300, 8))
    x, cotangent = tokens(g, 64, f32, batch=8)
    actual = there_and_back(g.to("cuda"), x, cotangent, backend=backend, **options)
    expected = there_and_back(g.to("cuda"), x.double(), cotangent.double(), backend="reference", **options)
    for ours, exact in zip(actual, expected, strict=True):
        assert (ours - exact).abs().max() <= BUDGET[f32] * exact.abs().max()


@pytest.mark.parametrize(("dtype", "channels"), list(product(BUDGET, (512, 7))))
def test_d4_copies(backend, dtype, channels):
    g = LatticeMap.d4((14, 14), torch.arange(BATCH) % 8).to("cuda")
    x, cotangent = tokens(g, channels, dtype)
    x.flatten()[:4] = torch.tensor([-0.0, torch.inf, -torch.inf, torch.nan], dtype=dtype)
    integer = torch.int32 if dtype == f32 else torch.int16
    actual, expected = (there_and_back(g, x, cotangent, backend=name) for name in (backend, "reference"))
    for ours, exact in zip(actual, expected, strict=True):
        assert torch.equal(ours.view(integer), exact.view(integer))


def test_offsets_past_the_range_of_32_bits(backend):
    x = torch.zeros(24, 14 * 14, 2**19, dtype=f16, device="cuda")  # 2.5e9 elements
    x[-1, -1, -1] = 3
    out = group_action(x, LatticeMap.rot90((14, 14), 2).to("cuda"), backend=backend)
    assert out[-1, 0, -1] == 3
    assert out[-1].count_nonzero() == 1


def test_the_current_stream_is_used(backend):
    g = MAPS["rotation"].to("cuda")
    x, _ = tokens(g, 512, f32)
    expected = group_action(x, g, backend=backend)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        out = group_action(x.clone(), g, backend=backend)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(out, expected)
