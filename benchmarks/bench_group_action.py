"""group_action against a copy of the same bytes, and what PyTorch and kornia have for the same map."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ser_fast import LatticeMap, group_action

try:
    from kornia.geometry.transform import warp_affine
except ImportError:
    warp_affine = None

Rival = Callable[[Tensor], Tensor]
BATCH, CHANNELS, SIZE_IN, SIZE_OUT = 64, 512, (14, 14), (12, 16)
WAYS = ("fwd", "bwd", "fwd+bwd")
CASES = (
    ("d4", "bicubic"),
    ("resize", "bilinear"),
    ("resize", "bicubic"),
    ("d4 and resize", "bicubic"),
    ("affine", "bilinear"),
    ("affine", "bicubic"),
)


def _codes(batch: int) -> Tensor:
    return torch.arange(batch) * 8 // batch  # samples of one element of D4 lie together


def _map(name: str, size_in: tuple[int, int], size_out: tuple[int, int], batch: int) -> LatticeMap:
    if name == "d4":
        return LatticeMap.d4(size_in, _codes(batch))
    if name == "resize":
        return LatticeMap.resize(size_in, size_out, batch=batch)
    turn = (
        LatticeMap.d4(size_in, _codes(batch))
        if name == "d4 and resize"
        else LatticeMap.rotate(size_in, torch.linspace(-40, 40, batch))
    )
    return LatticeMap.resize(size_in, size_out, batch=batch) @ turn


def _planes(f: Rival) -> Rival:
    """(B, H, W, C) -> (B, h, w, C) by a function of (B, C, H, W): with both transposes."""
    return lambda x: f(x.permute(0, 3, 1, 2).contiguous()).permute(0, 2, 3, 1).contiguous()


def _grid_sample(g: LatticeMap, interpolation: str) -> Rival:
    def sample(planes: Tensor) -> Tensor:
        grid = F.affine_grid(g.theta(), [*planes.shape[:2], *g.size_out], align_corners=False)
        # In float32, as under autocast: half precision has no room for the coordinates.
        out = F.grid_sample(planes.float(), grid, mode=interpolation, padding_mode="border", align_corners=False)
        return out.to(planes.dtype)

    return _planes(sample)


def _kornia(g: LatticeMap, interpolation: str) -> Rival:
    """kornia takes input to output, in pixel indices and (x, y)."""
    forward = g.inverse()
    linear = forward.linear.flip(-1, -2)  # (B, 2, 2)
    centre_in, centre_out = ((linear.new_tensor(size[::-1]) - 1) / 2 for size in (g.size_in, g.size_out))
    offset = centre_out + forward.offset.flip(-1) - linear @ centre_in  # (B, 2)
    matrix = torch.cat([linear, offset[:, :, None]], -1).float()  # (B, 2, 3)

    def warp(planes: Tensor) -> Tensor:
        out = warp_affine(
            planes.float(), matrix, g.size_out, mode=interpolation, padding_mode="border", align_corners=True
        )
        return out.to(planes.dtype)

    return _planes(warp)


def _public_path(x: Tensor, size_out: tuple[int, int]) -> Tensor:
    """SER as it was published: rot90 and flip, bicubic F.interpolate, rot90 on planes, per element of D4."""
    planes = x.permute(0, 3, 1, 2).contiguous()
    parts = []
    for code, part in zip(_codes(len(x)).unique().tolist(), planes.chunk(8), strict=True):
        turned = torch.rot90(part.flip(-1) if code >= 4 else part, code + 2, (2, 3))
        resized = F.interpolate(turned, size=size_out, mode="bicubic", align_corners=False)
        parts.append(torch.rot90(resized, 2, (2, 3)))  # half a turn goes past a resize
    return torch.cat(parts).permute(0, 2, 3, 1).contiguous()


def _index_select(g: LatticeMap, batch: int) -> Rival:
    count = g.size_in[0] * g.size_in[1]
    numbers = torch.arange(batch * count, dtype=torch.float64, device=g.device).reshape(batch, count, 1)
    row = group_action(numbers, g, backend="reference").long().flatten()  # (B*N,)
    return lambda x: x.reshape(batch * count, -1).index_select(0, row).reshape(x.shape)


def _rivals(name: str, interpolation: str, g: LatticeMap, batch: int) -> dict[str, Rival]:
    rivals: dict[str, Rival] = {"grid_sample": _grid_sample(g, interpolation)}
    if warp_affine is not None:
        rivals["kornia"] = _kornia(g, interpolation)
    if name == "d4":
        rivals["index_select"] = _index_select(g, batch)
    if name == "d4 and resize":
        rivals["public SER path"] = partial(_public_path, size_out=g.size_out)
    if name == "resize":
        resize = partial(F.interpolate, size=g.size_out, mode=interpolation, align_corners=False)
        rivals["interpolate NCHW"] = _planes(resize)
        rivals["interpolate NHWC"] = lambda x: resize(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return rivals


def _compare(
    compare: Callable[..., None],
    backends: list[str],
    device: torch.device,
    name: str,
    interpolation: str,
    way: str,
    dtype: torch.dtype,
    *,
    batch: int = BATCH,
    size_in: tuple[int, int] = SIZE_IN,
    size_out: tuple[int, int] = SIZE_OUT,
    channels: int = CHANNELS,
    **sizes: int,
) -> None:
    g = _map(name, size_in, size_out, batch).to(device)
    x = torch.randn(batch, *size_in, channels, dtype=dtype, device=device)
    act = partial(group_action, g=g, interpolation=interpolation)
    rivals: dict[str, Rival] = {backend: partial(act, backend=backend) for backend in backends}
    peers = _rivals(name, interpolation, g, batch)
    tolerance = dict.fromkeys(peers, 3e-2 if dtype == torch.bfloat16 else 1e-3)
    if name == "d4":  # a permutation: bit for bit; grid_sample and kornia interpolate
        tolerance |= dict.fromkeys((*rivals, "index_select"), 0.0)
    compare(
        "group_action",
        rivals | peers,
        x,
        oracle=partial(act, backend="reference"),
        way=way,
        moved=x.element_size()
        * batch
        * channels
        * (size_in[0] * size_in[1] + g.size_out[0] * g.size_out[1])
        * (2 if way == "fwd+bwd" else 1),
        tolerance=tolerance,
        map=name,
        interpolation=interpolation,
        B=batch,
        lattice=f"{size_in[0]}x{size_in[1]}->{g.size_out[0]}x{g.size_out[1]}",
        C=channels,
        **sizes,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("way", [*(pytest.param(way, marks=pytest.mark.large) for way in WAYS[:2]), WAYS[2]])
@pytest.mark.parametrize(("name", "interpolation"), CASES)
def bench_maps(compare, backends, device, name, interpolation, way, dtype) -> None:
    _compare(compare, backends, device, name, interpolation, way, dtype)


@pytest.mark.parametrize("side", [7, 14, 28, pytest.param(56, marks=pytest.mark.large)])
def bench_lattice(compare, backends, device, side: int) -> None:
    size_out = (side * 6 // 7, side * 8 // 7)
    _compare(
        compare,
        backends,
        device,
        "d4 and resize",
        "bicubic",
        "fwd+bwd",
        torch.float32,
        batch=8,
        size_in=(side, side),
        size_out=size_out,
        channels=384,
        scaling="lattice",
    )


@pytest.mark.parametrize("threads", [n for n in (1, 2, 4, 8, 16) if n <= torch.get_num_threads()])
def bench_threads(compare, backends, device, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        _compare(compare, backends, device, "d4 and resize", "bicubic", "fwd+bwd", torch.float32, scaling="threads")
    finally:
        torch.set_num_threads(before)
