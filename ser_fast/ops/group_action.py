"""`group_action`: carry a map of tokens along a map of the plane."""

from typing import Any, Literal, overload

from torch import Tensor

from ser_fast.device import require_dense
from ser_fast.interpolation import INTERPOLATIONS, PADDINGS
from ser_fast.lattice import LatticeMap, require_countable
from ser_fast.ops.backends import choose, implementation
from ser_fast.ops.contract import FLOATS, GroupAction, check_group_action
from ser_fast.ops.operator import Operator, save_arguments, saved_arguments


def _group_action(x: Tensor, action: GroupAction, backend: str) -> Tensor:
    check_group_action(x, action, transpose=False)
    return implementation(backend).group_action(x, action)


def _group_action_transpose(x: Tensor, action: GroupAction, backend: str) -> Tensor:
    check_group_action(x, action, transpose=True)
    return implementation(backend).group_action_transpose(x, action)


def _like_output(x: Tensor, action: GroupAction, backend: str) -> Tensor:
    check_group_action(x, action, transpose=False)
    return x.new_empty(x.shape[0], action.size_out[0] * action.size_out[1], x.shape[2])


def _like_input(x: Tensor, action: GroupAction, backend: str) -> Tensor:
    check_group_action(x, action, transpose=True)
    return x.new_empty(x.shape[0], action.size_in[0] * action.size_in[1], x.shape[2])


_act = Operator(_group_action, _like_output)
_act_transposed = Operator(_group_action_transpose, _like_input)


def _save_action(ctx: Any, output: Tensor, x: Tensor, action: GroupAction, backend: str) -> None:
    ctx.backend = backend
    save_arguments(ctx, action)


# The action is linear in x: the gradient of W x is W^T, and that of W^T x is W.
def _gradient(ctx: Any, d_out: Tensor) -> tuple[Tensor]:
    (action,) = saved_arguments(ctx)
    return (_act_transposed(d_out, action, ctx.backend),)


def _gradient_of_transpose(ctx: Any, d_out: Tensor) -> tuple[Tensor]:
    (action,) = saved_arguments(ctx)
    return (_act(d_out, action, ctx.backend),)


_act.differentiable(_save_action, _gradient, linear=True)
_act_transposed.differentiable(_save_action, _gradient_of_transpose, linear=True)


@overload
def group_action(
    x: Tensor,
    g: LatticeMap,
    *,
    interpolation: str = ...,
    padding: str = ...,
    antialias: bool = ...,
    return_valid: Literal[False] = ...,
    backend: str = ...,
) -> Tensor: ...


@overload
def group_action(
    x: Tensor,
    g: LatticeMap,
    *,
    interpolation: str = ...,
    padding: str = ...,
    antialias: bool = ...,
    return_valid: Literal[True],
    backend: str = ...,
) -> tuple[Tensor, Tensor]: ...


@overload
def group_action(
    x: Tensor,
    g: LatticeMap,
    *,
    interpolation: str = ...,
    padding: str = ...,
    antialias: bool = ...,
    return_valid: bool,
    backend: str = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...


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
        return_valid: also return `g.valid()`: which output tokens have their preimage in the lattice and show no
            filling.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        Tokens in the layout and dtype of x on the lattice g.size_out: (B, h*w, C) or (B, h, w, C); with return_valid
        also (B, h*w) bool. The elements of D4, and every token with a single tap, are copied bit for bit. Elsewhere a
        token that isn't finite may spread over its sample. Linear in x, and differentiable any number of times in
        reverse and forward mode (torch.func.jvp).

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
    action = GroupAction(
        g.linear.expand(batch, 2, 2),
        g.offset.expand(batch, 2),
        g.size_in,
        g.size_out,
        interpolation,
        padding,
        antialias,
    )
    tokens = x.reshape(batch, g.size_in[0] * g.size_in[1], channels)
    out = _act(tokens, action, choose("group_action", backend, x))
    if x.ndim == 4:
        out = out.reshape(batch, *g.size_out, channels)
    return (out, g.valid().expand(batch, -1)) if return_valid else out


def _check(x: Tensor, g: LatticeMap, interpolation: str, padding: str) -> None:
    if not isinstance(x, Tensor) or x.dtype not in FLOATS:
        raise TypeError(f"x: got {getattr(x, 'dtype', type(x))}, takes a tensor of {FLOATS}")
    require_dense("x", x)
    if not isinstance(g, LatticeMap):
        raise TypeError(f"g: got {type(g)}, takes a LatticeMap")
    require_countable("g.size_out", g.size_out)
    lattice = (g.size_in[0] * g.size_in[1],) if x.ndim == 3 else g.size_in
    if x.ndim not in (3, 4) or tuple(x.shape[1:-1]) != tuple(lattice):
        raise ValueError(f"x: got shape {tuple(x.shape)}, takes (B, H*W, C) or (B, H, W, C) with g.size_in {g.size_in}")
    if len(g) not in (1, x.shape[0]):
        raise ValueError(f"g: got {len(g)} maps for x with {x.shape[0]} samples, takes one for each or one for all")
    if g.device != x.device:
        raise ValueError(f"g: got a map on {g.device} for x on {x.device}; move it with g.to(x.device)")
    if g.linear.requires_grad or g.offset.requires_grad:
        raise ValueError("g: got a map that requires a gradient, takes one without: the action has none in its map")
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"interpolation: got {interpolation!r}, takes one of {INTERPOLATIONS}")
    if padding not in PADDINGS:
        raise ValueError(f"padding: got {padding!r}, takes one of {PADDINGS}")
