"""Samplers of the map g from an image to its views.

Every draw depends on (seed, epoch, sample, view) alone: not on the batch, the number of ranks or what was drawn before.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ser_fast.lattice import LatticeMap, Size

_TRIES = 10  # boxes that a crop draws until one lies within the image
_DRAWS = 5 + 2 * (_TRIES - 1)  # uniform numbers a sampler may use for one view of one sample
GEOMETRY, COLOR = 0, 1


def generator(seed: int, epoch: int, sample: int, view: int, purpose: int) -> np.random.Generator:
    """The stream of random numbers of one view of one sample, for its GEOMETRY or its COLOR."""
    # Philox is counter-based: each (epoch, sample, view, purpose) is a stream of its own. The lowest word counts.
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, 2 * view + purpose, epoch, sample]))


def draws(seed: int, epoch: int, samples: Tensor, view: int) -> Tensor:
    """(B, 23) float64 uniform numbers in [0, 1) for the geometry of one view (a number) of samples (B,)."""
    rows = [generator(seed, epoch, sample, view, GEOMETRY).random(_DRAWS) for sample in samples.tolist()]
    return torch.from_numpy(np.stack(rows)) if rows else torch.zeros(0, _DRAWS, dtype=torch.float64)


def _between(u: Tensor, low: float, high: float) -> Tensor:
    return low + (high - low) * u


def _log_between(u: Tensor, low: float, high: float) -> Tensor:
    return _between(u, math.log(low), math.log(high)).exp()


@dataclass(frozen=True)
class D4Scale:
    """The paper's: all eight elements of D4 with equal chance, then a scale to a lattice of whole tokens.

    The element is each sample's own; the lattice, which a batch shares, is drawn with its first sample.

    Attributes:
        area: range of the lattice's area, relative to the image's.
        aspect: range of its width over height, relative to the image's; log-uniform.
    """

    area: tuple[float, float] = (0.7, 1.3)
    aspect: tuple[float, float] = (3 / 4, 4 / 3)

    def code(self, u: Tensor, view: int) -> Tensor:
        """(B,) the element of D4 for uniform numbers (B,)."""
        return (8 * u).long()

    def lattices(self, tokens: Size, u: Tensor) -> Tensor:
        """(B, 2) height and width of the lattices, in tokens, for uniform numbers u (B, 2) of area and aspect."""
        area, aspect = _between(u[:, 0], *self.area), _log_between(u[:, 1], *self.aspect)
        scale = torch.stack([(area / aspect).sqrt(), (area * aspect).sqrt()], -1)
        return (scale * scale.new_tensor(tokens)).round().long().clamp(min=1)

    def __call__(self, size: Size, patch_size: int, u: Tensor, view: int) -> LatticeMap:
        tokens = size[0] // patch_size, size[1] // patch_size
        h, w = self.lattices(tokens, u[:1, 1:3])[0].tolist()
        # On a unit square first: a quarter turn of a batch of H x W images is then a stretch as well, and all fit.
        return LatticeMap.d4((1, 1), self.code(u[:, 0], view)).on(size, (h * patch_size, w * patch_size))


@dataclass(frozen=True)
class Reflections(D4Scale):
    """What the released code samples: view 0 is rotated, view 1 mirrored and rotated.

    The relative transform is then always one of the four reflections of D4, never a rotation.
    """

    def code(self, u: Tensor, view: int) -> Tensor:
        return (4 * u).long() + 4 * view


@dataclass(frozen=True)
class Affine:
    """Any rotation, shear, scale and shift, within the image's own frame, beyond which its border goes on.

    Attributes:
        degrees: rotation within +-degrees.
        shear: along x, within +-shear degrees.
        area, aspect: ranges of the scale, as in D4Scale.
        shift: within +-shift of the image's sides.
    """

    degrees: float = 180.0
    shear: float = 15.0
    area: tuple[float, float] = (0.7, 1.3)
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    shift: float = 0.1

    def __call__(self, size: Size, patch_size: int, u: Tensor, view: int) -> LatticeMap:
        rotation = LatticeMap.rotate(size, _between(u[:, 0], -self.degrees, self.degrees)).linear
        area, aspect = _between(u[:, 1], *self.area), _log_between(u[:, 2], *self.aspect)
        tangent = torch.deg2rad(_between(u[:, 3], -self.shear, self.shear)).tan()
        one, zero = torch.ones_like(tangent), torch.zeros_like(tangent)
        shear = torch.stack([one, zero, tangent, one], -1).unflatten(-1, (2, 2))
        # A map goes from output to input: an object drawn larger is sampled with smaller steps.
        scale = torch.diag_embed(torch.stack([(aspect / area).sqrt(), (1 / (area * aspect)).sqrt()], -1))
        shift = _between(u[:, 4:6], -self.shift, self.shift) * u.new_tensor(size)
        # Views are padded with the border: the image goes on beyond its edges, in both views alike.
        return replace(LatticeMap.affine(size, scale @ shear @ rotation, shift), frames=None)


@dataclass(frozen=True)
class Crop:
    """A random resized crop, mirrored half of the time, as a partial map: torchvision's RandomResizedCrop.

    Area, aspect and place are drawn as there: up to ten boxes until one lies within the picture, else the largest
    centered one whose aspect is in range. On a canvas a box of true aspect r is one of r / A, with A the picture's.

    Two crops see different parts of the image. Their relative map knows which tokens have a partner, so equivariance
    needs no views without crops.

    Attributes:
        area: range of the box's area, relative to the image's.
        aspect: range of its true width over height; log-uniform.
        turns: all eight elements of D4 with equal chance, instead of the mirror image alone.
    """

    area: tuple[float, float] = (0.2, 1.0)
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    turns: bool = False

    def boxes(self, u: Tensor, aspects: Tensor | None = None) -> Tensor:
        """(B, 4) boxes on the unit square (top, left, height, width), for draws u (B, 23).

        Args:
            u: uniform numbers.
            aspects: (B,) the pictures' true width over height; default 1.
        """
        true = u.new_ones(len(u)) if aspects is None else aspects.to(u)
        tries = torch.cat([u[:, :2], u[:, 5:]], 1).unflatten(1, (_TRIES, 2))
        area, aspect = _between(tries[..., 0], *self.area), _log_between(tries[..., 1], *self.aspect) / true[:, None]
        extents = torch.stack([(area / aspect).sqrt(), (area * aspect).sqrt()], -1)  # (B, tries, 2)
        within = (extents <= 1).all(-1)
        first = extents[torch.arange(len(u)), within.int().argmax(1)]
        low, high = self.aspect
        largest = torch.stack([true / low, high / true], -1).clamp(max=1)
        drawn = within.any(1, keepdim=True)
        extent = torch.where(drawn, first, largest)
        corner = torch.where(drawn, u[:, 2:4], 0.5) * (1 - extent)
        return torch.cat([corner, extent], -1)

    def __call__(self, size: Size, patch_size: int, u: Tensor, view: int, aspects: Tensor | None = None) -> LatticeMap:
        code = (8 * u[:, 4]).long() if self.turns else 4 * (u[:, 4] < 0.5).long()
        cropped = LatticeMap.crop(size, self.boxes(u, aspects) * u.new_tensor([*size, *size]), size)
        return LatticeMap.d4((1, 1), code).on(size, size) @ cropped


Sampler = Callable[[Size, int, Tensor, int], LatticeMap]
"""(image size, patch size, draws (B, 23), view) to the map from the image's pixels to the view's.

Images are square canvases on which pictures are stretched. `Crop` takes their true aspects besides: all that other
samplers do is relative to the image.
"""

SAMPLERS: dict[str, Callable[..., Sampler]] = {
    "d4_scale": D4Scale,
    "reflections": Reflections,
    "affine": Affine,
    "crop": Crop,
}
