"""The factors of the study: how tokens are resampled, on which lattice, by which g, and what the pixel side does."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import product
from typing import NamedTuple

from torch import Tensor

from ser_fast.evaluation.elements import D4_NAMES
from ser_fast.interpolation import INTERPOLATIONS, PADDINGS
from ser_fast.lattice import LatticeMap, Size
from ser_fast.ops.group_action import group_action

CONVENTIONS = ("half_pixel", "corners")
LATTICES: tuple[Size, ...] = ((14, 14), (7, 7), (16, 16), (28, 28), (12, 16))
PIXEL_KERNELS = ("bicubic", "bilinear", "bicubic_antialias")
POSITION_KERNELS = ("bicubic_antialias", "bicubic", "bilinear")  # the first is timm's


def corners(g: LatticeMap) -> LatticeMap:
    """The map that g becomes where the centers of corner tokens are taken for the corners of the image.

    This is align_corners=True: normalized coordinates run over [0, H - 1] instead of [0, H]. Elements of D4 stay as
    they are; everything else is off by up to half a token. Composition and inverse carry over.

    Raises:
        ValueError: a lattice with a side below 2, where corners coincide.
    """
    (height, width), (h, w) = g.size_in, g.size_out
    if min(height, width, h, w) < 2:
        raise ValueError(f"g: got a map of {g.size_in} to {g.size_out}; aligned corners take sides of at least 2")
    # Products of whole numbers first, as in LatticeMap.on: what is 1 comes out as exactly 1.
    ratio = [[(n - 1) * m / (n * (m - 1)) for m in (h, w)] for n in (height, width)]
    linear = g.linear * g.linear.new_tensor(ratio)
    offset = g.offset * g.offset.new_tensor([(height - 1) / height, (width - 1) / width])
    return replace(g, linear=linear, offset=offset, frames=None)  # those of g are of its own convention


def common_valid(*maps: LatticeMap) -> Tensor:
    """(h*w,) the tokens that every map and every convention takes from inside the lattice: one mask for all settings.

    The maps (one sample each) end on the same lattice.
    """
    valid = [convention for g in maps for convention in (g.valid()[0], corners(g).valid()[0])]
    mask = valid[0]
    for other in valid[1:]:
        mask = mask & other
    return mask


# ---------------------------------------------------------------- settings


@dataclass(frozen=True, order=True)
class Resampling:
    """What decides rho(g): the options of `group_action`, and the convention that g is taken to the lattice by."""

    interpolation: str = "bicubic"
    antialias: bool = False
    padding: str = "border"
    convention: str = "half_pixel"

    def __call__(self, x: Tensor, g: LatticeMap) -> Tensor:
        """rho(g) x: tokens (B, H, W, C) to (B, h, w, C)."""
        out = group_action(
            x,
            corners(g) if self.convention == "corners" else g,
            interpolation=self.interpolation,
            padding=self.padding,
            antialias=self.antialias,
        )
        assert isinstance(out, Tensor)
        return out

    def __str__(self) -> str:
        antialias = "antialiased" if self.antialias else "no antialias"
        return f"{self.interpolation}, {antialias}, padding {self.padding}, {self.convention.replace('_', '-')}"


@dataclass(frozen=True)
class Setting:
    """One point of the grid; the default is where the factors are varied around, one at a time.

    Attributes:
        resampling: of the tokens.
        lattice: (H, W) tokens of f(x).
        pixels: how the image is resampled, one of PIXEL_KERNELS.
        positions: how position embeddings are resized to the lattice, one of POSITION_KERNELS.
    """

    resampling: Resampling = field(default_factory=Resampling)
    lattice: Size = LATTICES[0]
    pixels: str = PIXEL_KERNELS[0]
    positions: str = POSITION_KERNELS[0]


DEFAULT = Setting()


def one_at_a_time() -> list[Setting]:
    """The default setting, and those that differ from it in a single factor."""
    resampling = DEFAULT.resampling
    settings = [
        *(replace(DEFAULT, resampling=replace(resampling, interpolation=name)) for name in INTERPOLATIONS),
        *(replace(DEFAULT, resampling=replace(resampling, antialias=on)) for on in (False, True)),
        *(replace(DEFAULT, resampling=replace(resampling, padding=name)) for name in PADDINGS),
        *(replace(DEFAULT, resampling=replace(resampling, convention=name)) for name in CONVENTIONS),
        *(replace(DEFAULT, lattice=lattice) for lattice in LATTICES),
        *(replace(DEFAULT, pixels=name) for name in PIXEL_KERNELS),
        *(replace(DEFAULT, positions=name) for name in POSITION_KERNELS),
    ]
    return list(dict.fromkeys(settings))


def whole_grid() -> list[Setting]:
    """Every combination of every factor."""
    return [
        Setting(Resampling(interpolation, antialias, padding, convention), lattice, pixels, positions)
        for lattice, pixels, positions, interpolation, antialias, padding, convention in product(
            LATTICES, PIXEL_KERNELS, POSITION_KERNELS, INTERPOLATIONS, (False, True), PADDINGS, CONVENTIONS
        )
    ]


# ---------------------------------------------------------------- elements


class Element(NamedTuple):
    """A kind of g, and how to build it on a lattice of tokens."""

    group: str  # "D4", "scale", "aspect", "angle", "shift" or "crop"
    build: Callable[[Size], LatticeMap]


def _scale(y: float, x: float) -> Callable[[Size], LatticeMap]:
    return lambda size: LatticeMap.resize(size, (max(2, round(y * size[0])), max(2, round(x * size[1]))))


def _aspect(ratio: float) -> Callable[[Size], LatticeMap]:
    return _scale(1 / math.sqrt(ratio), math.sqrt(ratio))


def _d4(code: int) -> Callable[[Size], LatticeMap]:
    return lambda size: LatticeMap.d4(size, code)


def _angle(degrees: float) -> Callable[[Size], LatticeMap]:
    return lambda size: LatticeMap.rotate(size, degrees)


def _shift(y: float, x: float) -> Callable[[Size], LatticeMap]:
    # As a crop, which is known to lie along the axes.
    return lambda size: LatticeMap.crop(size, (y, x, *size), size)


def _crop(share: float, top: float, left: float) -> Callable[[Size], LatticeMap]:
    """A box of this share of the sides, `top` and `left` of what is left free, enlarged to the lattice."""

    def build(size: Size) -> LatticeMap:
        height, width = (share * n for n in size)
        return LatticeMap.crop(size, (top * (size[0] - height), left * (size[1] - width), height, width), size)

    return build


ELEMENTS: dict[str, Element] = {
    **{name: Element("D4", _d4(code)) for code, name in enumerate(D4_NAMES) if code},  # 0 is the identity
    **{f"scale {s}": Element("scale", _scale(s, s)) for s in (0.5, 0.6, 0.75, 0.85, 1.2, 1.5, 2.0)},
    **{f"aspect {a:.2f}": Element("aspect", _aspect(a)) for a in (1 / 2, 3 / 4, 4 / 3, 2)},
    **{f"angle {a}": Element("angle", _angle(a)) for a in (5, 10, 15, 30, 45)},
    **{f"shift {s}": Element("shift", _shift(0, s)) for s in (0.1, 0.25, 0.5)},
    "shift 0.5, 0.5": Element("shift", _shift(0.5, 0.5)),
    **{f"crop {s}": Element("crop", _crop(s, 0.25, 0.6)) for s in (0.5, 0.7, 0.9)},
}

FEW_ELEMENTS = (
    *("rot90", "hflip", "scale 0.5", "scale 0.75", "scale 1.5", "aspect 1.33"),
    *("angle 15", "angle 45", "shift 0.5", "crop 0.7"),
)
