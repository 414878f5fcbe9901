"""The 1-D resampling kernels, and the rows of weights they give on one axis of a lattice.

A position y on an axis of n tokens (token i has its center at i + 1/2) takes the value  sum_i W[y, i] x_i. The
kernel k, the padding and antialiasing only decide W:

    W[y, i] = sum over taps t that padding folds onto i of  k((t + 1/2 - y) / s) / sum_t k((t + 1/2 - y) / s)

where s = 1, or with antialias s = max(1, step): the kernel is stretched to the distance `step` between neighboring
output tokens, as PIL and torch's antialias do, but to MOST_STRETCH times the lattice at most. Sources: F.grid_sample,
F.interpolate; Keys 1981 (bicubic), Mitchell and Netravali 1988, PIL (lanczos3), adaptive_avg_pool (area).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ser_fast.device import send
from ser_fast.lattice import FARTHEST, TOLERANCE


def _nearest(t: Tensor) -> Tensor:
    # A tie goes to the higher index, as in F.interpolate(mode="nearest-exact").
    return ((t > -0.5 + TOLERANCE) & (t <= 0.5 + TOLERANCE)).to(t.dtype)


def _bilinear(t: Tensor) -> Tensor:
    return (1 - t.abs()).clamp(min=0)


def _cubic(t: Tensor, b: float, c: float) -> Tensor:
    """The (B, C) family of Mitchell and Netravali; (0, -a) is Keys' kernel with parameter a."""
    t = t.abs()
    inner = ((12 - 9 * b - 6 * c) * t**3 + (-18 + 12 * b + 6 * c) * t**2 + 6 - 2 * b) / 6
    outer = ((-b - 6 * c) * t**3 + (6 * b + 30 * c) * t**2 + (-12 * b - 48 * c) * t + 8 * b + 24 * c) / 6
    return torch.where(t < 1, inner, torch.where(t < 2, outer, torch.zeros_like(t)))


def _bicubic(t: Tensor) -> Tensor:
    return _cubic(t, 0, 0.75)


def _catmull_rom(t: Tensor) -> Tensor:
    return _cubic(t, 0, 0.5)


def _mitchell(t: Tensor) -> Tensor:
    return _cubic(t, 1 / 3, 1 / 3)


def _lanczos3(t: Tensor) -> Tensor:
    return torch.where(t.abs() < 3, torch.sinc(t) * torch.sinc(t / 3), torch.zeros_like(t))


# name: (kernel, radius). "area" depends on the step and is written out in axis_weights.
_KERNELS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "nearest": (_nearest, 0.5),
    "bilinear": (_bilinear, 1),
    "bicubic": (_bicubic, 2),
    "catmull_rom": (_catmull_rom, 2),
    "mitchell": (_mitchell, 2),
    "lanczos3": (_lanczos3, 3),
}
INTERPOLATIONS = (*_KERNELS, "area")
PADDINGS = ("zeros", "border", "reflection")

# A step longer than this many times the lattice counts as this long: taps are bounded by the lattice.
MOST_STRETCH = 16


def axis_weights(
    position: Tensor, step: Tensor, exact: Tensor, size: int, *, interpolation: str, padding: str, antialias: bool
) -> Tensor:
    """The rows of W for positions on one axis.

    Args:
        position: (B, T) in lattice coordinates: token i covers [i, i+1]. Farther out than FARTHEST is that far.
        step: (B,) distance between neighboring output tokens, in input tokens; on the device of `position`, or on the
            CPU, so that the number of taps is known without waiting for a GPU.
        exact: (B,) bool, on either device: the map carries centers onto centers (D4 and whole shifts). Every kernel
            copies there, also mitchell, which would blur.
        size: n, the number of tokens on the axis.
        interpolation: one of INTERPOLATIONS. "bicubic" with antialias uses a = -0.5, as torch does. "area" is the
            mean of the tokens touched, as adaptive_avg_pool; it follows `step` by itself.
        padding: one of PADDINGS: "zeros" drops the taps outside, "border" repeats the edge token, "reflection"
            mirrors about the edge. With antialias or area, "border" cuts the kernel at the edge and renormalizes it,
            as torch and PIL do; positions past the edge take the edge's value.
        antialias: stretch the kernel by max(1, step).

    Returns:
        (B, T, size), in the dtype of `position`.
    """
    weights = position.new_zeros(*position.shape, size)
    if weights.numel() == 0:
        return weights
    longest = float(MOST_STRETCH * size)
    step = torch.where(step < longest, step, longest)[:, None, None]  # (B, 1, 1); a NaN, too, is the longest
    position = position.clamp(-FARTHEST, FARTHEST)
    area = interpolation == "area"
    if antialias and interpolation == "bicubic":
        interpolation = "catmull_rom"
    stretch = step.clamp(min=1) if antialias else torch.ones_like(step)
    reach = (step + 1) / 2 - TOLERANCE if area else _KERNELS[interpolation][1] * stretch  # farthest center with weight
    cut = padding == "border" and (area or antialias)
    if cut:
        # On the far edge "nearest" would want the token past it, and be left with none.
        position = position.clamp(0, size - 2 * TOLERANCE if interpolation == "nearest" else size)

    # Taps in unfolded coordinates: every center within `reach` of the position, (B, T, K).
    taps = torch.arange(int(2 * reach.max()) + 2, device=position.device)
    reach, stretch = (send(value, position.device, position.dtype) for value in (reach, stretch))
    exact = send(exact, position.device)
    tap = torch.floor(position[..., None] - reach).long() + taps
    distance = tap.to(position.dtype) + 0.5 - position[..., None]  # int64 + 0.5 would be float32
    k = (distance.abs() < reach).to(position.dtype) if area else _KERNELS[interpolation][0](distance / stretch)
    on_centre = exact[:, None, None] & (distance == 0).any(-1, keepdim=True)
    k = torch.where(on_centre, (distance == 0).to(k.dtype), k)

    inside = (tap >= 0) & (tap < size)
    if cut:
        k = torch.where(inside, k, 0)
    k = k / k.sum(-1, keepdim=True)
    if padding == "reflection":
        tap = tap.remainder(2 * size)
        tap = torch.minimum(tap, 2 * size - 1 - tap)
    elif padding == "zeros":
        k = torch.where(inside, k, 0)
    return weights.scatter_add_(-1, tap.clamp(0, size - 1), k)
