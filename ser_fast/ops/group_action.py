"""`group_action`: carry a map of tokens along a map of the plane."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ser_fast.interpolation import INTERPOLATIONS, PADDINGS
from ser_fast.lattice import LatticeMap
from ser_fast.ops.backends import choose, implementations

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_FORWARD = implementations("group_action")
_TRANSPOSE = implementations("group_action_transpose")


@torch.library.custom_op("ser_fast::group_action", mutates_args=())
def _group_action(
    x: Tensor,
    linear: Tensor,
    offset: Tensor,
    size_in: Sequence[int],
    size_out: Sequence[int],
    interpolation: str,
    padding: str,
    antialias: bool,
    backend: str,
) -> Tensor:
    # Autocast would round the products of the oracle to half precision.
    with torch.autocast(x.device.type, enabled=False):
        return _FORWARD[backend](x, linear, offset, size_in, size_out, interpolation, padding, antialias)


@torch.library.custom_op("ser_fast::group_action_transpose", mutates_args=())
def _group_action_transpose(
    x: Tensor,
    linear: Tensor,
    offset: Tensor,
    size_in: Sequence[int],
    size_out: Sequence[int],
    interpolation: str,
    padding: str,
    antialias: bool,
    backend: str,
) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return _TRANSPOSE[backend](x, linear, offset, size_in, size_out, interpolation, padding, antialias)


@_group_action.register_fake
def _(x: Tensor, linear: Tensor, offset: Tensor, size_in: Any, size_out: Any, *options: Any) -> Tensor:
    return x.new_empty(x.shape[0], size_out[0] * size_out[1], x.shape[2])


@_group_action_transpose.register_fake
def _(x: Tensor, linear: Tensor, offset: Tensor, size_in: Any, size_out: Any, *options: Any) -> Tensor:
    return x.new_empty(x.shape[0], size_in[0] * size_in[1], x.shape[2])


def _save_map(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, linear, offset, *ctx.options = inputs
    ctx.save_for_backward(linear, offset)


# The action is linear in x: the gradient of W x is W^T, and that of W^T x is W.
def _transpose_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (_group_action_transpose(grad, *ctx.saved_tensors, *ctx.options), *(None,) * 8)


def _forward_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (_group_action(grad, *ctx.saved_tensors, *ctx.options), *(None,) * 8)


_group_action.register_autograd(_transpose_gradient, setup_context=_save_map)
_group_action_transpose.register_autograd(_forward_gradient, setup_context=_save_map)


def group_action(
    x: Tensor,
    g: LatticeMap,
    *,
    interpolation: str = "bicubic",
    padding: str = "border",
    antialias: bool = False,
    return_valid: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Resample a map of tokens as g moves the plane: rho(g) x, a sparse row operator W_g per sample.

    Args:
        x: (B, H*W, C) or (B, H, W, C) tokens; float32, bfloat16, float16 or float64 (reference and cpu backends only).
        g: B maps (or one for all samples) with size_in (H, W), on x's device.
        interpolation: "nearest", "bilinear", "bicubic" (Keys, a = -0.75), "catmull_rom" (a = -0.5), "mitchell",
            "lanczos3" or "area" (the mean of the tokens touched).
        padding: what lies outside the lattice: "zeros", "border" (the nearest token) or "reflection".
        antialias: stretch the kernel where g shrinks the lattice.
        return_valid: also return which output tokens have their preimage in the lattice.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        Tokens in the layout and dtype of x on the lattice g.size_out: (B, h*w, C) or (B, h, w, C); with return_valid
        also (B, h*w) bool. The elements of D4, and every token with a single tap, are copied bit for bit. Elsewhere a
        token that isn't finite may spread over its sample.

    Raises:
        TypeError: x is no tensor of those dtypes, or g no LatticeMap.
        ValueError: a shape, device, batch or option that doesn't fit.
        RuntimeError: the backend asked for can't run here.

    Source: SER, arXiv 2603.06693; agrees with F.grid_sample and F.interpolate (align_corners=False).

    Example:
        >>> x = torch.randn(8, 14, 14, 384)
        >>> group_action(x, LatticeMap.resize((14, 14), (12, 16), batch=8)).shape
        torch.Size([8, 12, 16, 384])
    """
    _check(x, g, interpolation, padding)
    batch, channels = x.shape[0], x.shape[-1]
    out = _group_action(
        x.reshape(batch, g.size_in[0] * g.size_in[1], channels),
        g.linear.expand(batch, 2, 2),
        g.offset.expand(batch, 2),
        g.size_in,
        g.size_out,
        interpolation,
        padding,
        antialias,
        choose("group_action", backend, x),
    )
    if x.ndim == 4:
        out = out.reshape(batch, *g.size_out, channels)
    return (out, g.valid().expand(batch, -1)) if return_valid else out


def _check(x: Tensor, g: LatticeMap, interpolation: str, padding: str) -> None:
    if not isinstance(x, Tensor) or x.dtype not in _DTYPES:
        raise TypeError(f"x: got {getattr(x, 'dtype', type(x))}, takes a tensor of {_DTYPES}")
    if not isinstance(g, LatticeMap):
        raise TypeError(f"g: got {type(g)}, takes a LatticeMap")
    lattice = (g.size_in[0] * g.size_in[1],) if x.ndim == 3 else g.size_in
    if x.ndim not in (3, 4) or tuple(x.shape[1:-1]) != tuple(lattice):
        raise ValueError(f"x: got shape {tuple(x.shape)}, takes (B, H*W, C) or (B, H, W, C) with g.size_in {g.size_in}")
    if len(g) not in (1, x.shape[0]):
        raise ValueError(f"g: got {len(g)} maps for x with {x.shape[0]} samples, takes one for each or one for all")
    if g.device != x.device:
        raise ValueError(f"g: got a map on {g.device} for x on {x.device}; move it with g.to(x.device)")
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"interpolation: got {interpolation!r}, takes one of {INTERPOLATIONS}")
    if padding not in PADDINGS:
        raise ValueError(f"padding: got {padding!r}, takes one of {PADDINGS}")
