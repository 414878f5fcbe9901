"""Views of images: samplers of the map g, the same g applied to pixels, and colour.

Every draw depends on (seed, epoch, sample, view) alone: not on the batch, the number of ranks or what was drawn before.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

from ser_fast.interpolation import axis_weights
from ser_fast.lattice import LatticeMap, Size

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# ---------------------------------------------------------------- draws

_DRAWS = 8  # uniform numbers a sampler may use for one view of one sample
_GEOMETRY, _COLOUR = 0, 1


def _generator(seed: int, epoch: int, sample: int, view: int, purpose: int) -> np.random.Generator:
    # Philox is counter-based: each (epoch, sample, view, purpose) is a stream of its own. The lowest word counts.
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, 2 * view + purpose, epoch, sample]))


def draws(seed: int, epoch: int, samples: Tensor, view: int) -> Tensor:
    """(B, 8) float64 uniform numbers in [0, 1) for the geometry of one view (0 or 1) of samples (B,)."""
    rows = [_generator(seed, epoch, sample, view, _GEOMETRY).random(_DRAWS) for sample in samples.tolist()]
    return torch.from_numpy(np.stack(rows)) if rows else torch.zeros(0, _DRAWS, dtype=torch.float64)


def _between(u: Tensor, low: float, high: float) -> Tensor:
    return low + (high - low) * u


def _log_between(u: Tensor, low: float, high: float) -> Tensor:
    return _between(u, math.log(low), math.log(high)).exp()


# ---------------------------------------------------------------- samplers


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

    def __call__(self, size: Size, patch_size: int, u: Tensor, view: int) -> LatticeMap:
        tokens = size[0] // patch_size, size[1] // patch_size
        area, aspect = _between(u[0, 1], *self.area), _log_between(u[0, 2], *self.aspect)
        scale = (area / aspect).sqrt(), (area * aspect).sqrt()
        h, w = (max(1, round(n * float(s))) for n, s in zip(tokens, scale, strict=True))
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
    """Any rotation, shear, scale and shift, within the image's own frame.

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
        return LatticeMap.affine(size, scale @ shear @ rotation, shift)


@dataclass(frozen=True)
class Crop:
    """A random resized crop, mirrored half of the time, as a partial map.

    Two crops see different parts of the image. Their relative map knows which tokens have a partner, so equivariance
    needs no views without crops.

    Attributes:
        area: range of the box's area, relative to the image's.
        aspect: range of its width over height; log-uniform.
        turns: all eight elements of D4 with equal chance, instead of the mirror image alone.
    """

    area: tuple[float, float] = (0.2, 1.0)
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    turns: bool = False

    def __call__(self, size: Size, patch_size: int, u: Tensor, view: int) -> LatticeMap:
        full = u.new_tensor(size)
        area, aspect = _between(u[:, 0], *self.area), _log_between(u[:, 1], *self.aspect)
        extent = torch.stack([(area / aspect).sqrt(), (area * aspect).sqrt()], -1).clamp(max=1) * full  # (B, 2)
        corner = u[:, 2:4] * (full - extent)
        code = (8 * u[:, 4]).long() if self.turns else 4 * (u[:, 4] < 0.5).long()
        cropped = LatticeMap.crop(size, torch.cat([corner, extent], -1), size)
        return LatticeMap.d4((1, 1), code).on(size, size) @ cropped


Sampler = Callable[[Size, int, Tensor, int], LatticeMap]
"""(image size, patch size, draws (B, 8), view) to the map from the image's pixels to the view's."""

SAMPLERS: dict[str, Callable[..., Sampler]] = {
    "d4_scale": D4Scale,
    "reflections": Reflections,
    "affine": Affine,
    "crop": Crop,
}

# ---------------------------------------------------------------- pixels


def transform_images(
    images: Tensor,
    g: LatticeMap,
    *,
    interpolation: str = "bicubic",
    padding: str = "border",
    antialias: bool = False,
) -> Tensor:
    """Apply g to images, at pixel resolution: what `group_action` does to tokens.

    Maps along the axes (D4, scales, crops) are two small products with the rows of weights of
    `ser_fast.interpolation`, and D4 is exact; the others go through F.grid_sample.

    Args:
        images: (B, C, H, W) floating point.
        g: B maps (or one for all) with size_in (H, W), on any device.
        interpolation, padding: as in `group_action`; grid_sample has "nearest", "bilinear" and "bicubic".
        antialias: as in `group_action`; grid_sample has none.

    Returns:
        (B, C, h, w) on g.size_out.

    Raises:
        ValueError: images that don't fit g, or an interpolation or antialias that grid_sample lacks.
    """
    if images.ndim != 4 or tuple(images.shape[2:]) != g.size_in or len(g) not in (1, len(images)):
        raise ValueError(
            f"images: got shape {tuple(images.shape)}, takes (B, C, H, W) with {len(g)} maps of {g.size_in}"
        )
    g = LatticeMap(
        g.linear.expand(len(images), 2, 2), g.offset.expand(len(images), 2), g.size_in, g.size_out, g.axis_aligned
    )
    if not g.axis_aligned:
        if antialias:
            raise ValueError("antialias: got True; rotated images have none")
        if interpolation not in ("nearest", "bilinear", "bicubic"):
            raise ValueError(f"interpolation: got {interpolation!r}; rotated images take nearest, bilinear or bicubic")
        grid = F.affine_grid(
            g.theta(images.dtype).to(images.device), [*images.shape[:2], *g.size_out], align_corners=False
        )
        return F.grid_sample(images, grid, mode=interpolation, padding_mode=padding, align_corners=False)
    out = images.new_empty(*images.shape[:2], *g.size_out)
    transposed = g.linear[:, 0, 0] == 0
    for transpose in (False, True):
        samples = torch.nonzero(transposed == transpose)[:, 0]
        # The input's y follows the output's y, or after a quarter turn its x; the input's x the other one.
        along_y, along_x = (
            _along_axis(g[samples], axis, 1 - axis if transpose else axis, interpolation, padding, antialias).to(images)
            for axis in (0, 1)
        )
        samples = samples.to(images.device)
        moved = along_y[:, None] @ images[samples] @ along_x[:, None].mT
        out[samples] = moved.mT if transpose else moved
    return out


def _along_axis(g: LatticeMap, axis: int, axis_out: int, interpolation: str, padding: str, antialias: bool) -> Tensor:
    """(B, n_out, n_in): the rows of weights of an input axis for positions along an output axis."""
    size, size_out = g.size_in[axis], g.size_out[axis_out]
    centres = torch.arange(size_out, dtype=torch.float64, device=g.device) + (0.5 - size_out / 2)
    slope = g.linear[:, axis, axis_out]
    position = slope[:, None] * centres + g.offset[:, axis, None] + size / 2
    exact = (g.linear.abs().sum(-1) == 1).all(-1)  # centres onto centres only if along both axes
    return axis_weights(
        position, slope.abs(), exact, size, interpolation=interpolation, padding=padding, antialias=antialias
    )


def normalize(images: Tensor) -> Tensor:
    """Subtract ImageNet's mean and divide by its deviation, per channel; images (B, 3, H, W) in [0, 1]."""
    return v2.functional.normalize(images, list(IMAGENET_MEAN), list(IMAGENET_STD))


# ---------------------------------------------------------------- colour


@dataclass(frozen=True)
class Colour:
    """MoCo-v3's colour augmentation (its two views differ in blur and solarisation), on batches on their device.

    Attributes:
        strength: multiplies the jitter; 0 leaves the colours as they are.
        group: neighbours in a batch that share one draw (the group's first sample's). 1 draws for every sample, at the
            price of as many small kernels.
    """

    strength: float = 1.0
    group: int = 8

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 5:  # there the hue has gone full circle
            raise ValueError(f"colour strength: got {self.strength}, takes a number in [0, 5]")
        if self.group < 1:
            raise ValueError(f"colour group: got {self.group}, takes a positive number")

    def __call__(self, images: Tensor, samples: Tensor, *, seed: int, epoch: int, view: int) -> Tensor:
        """Change the colours of images (B, 3, H, W) in [0, 1]; samples (B,) are their indices in the data set."""
        if self.strength == 0:
            return images
        transform = self._transform(view, images.shape[-1])
        parts = []
        for part, first in zip(images.split(self.group), samples[:: self.group].tolist(), strict=True):
            # torchvision draws from torch's global generator; torch.manual_seed would reseed the GPUs' too.
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(int(_generator(seed, epoch, first, view, _COLOUR).integers(2**62)))
                parts.append(transform(part))
        return torch.cat(parts) if parts else images

    def _transform(self, view: int, size: int) -> v2.Compose:
        jitter = v2.ColorJitter(
            brightness=0.4 * self.strength,
            contrast=0.4 * self.strength,
            saturation=0.2 * self.strength,
            hue=0.1 * self.strength,
        )
        kernel = max(3, size // 10 | 1)  # SimCLR: a tenth of the image, odd
        blur = v2.GaussianBlur(kernel, sigma=(0.1, 2.0))
        return v2.Compose(
            [
                v2.RandomApply([jitter], p=0.8),
                v2.RandomGrayscale(p=0.2),
                v2.RandomApply([blur], p=(1.0, 0.1)[view]),
                v2.RandomSolarize(threshold=0.5, p=(0.0, 0.2)[view]),
            ]
        )


# ---------------------------------------------------------------- two views of a batch


@dataclass(frozen=True)
class Views:
    """Two views of one batch.

    The batch is cut into parts, each with one image size: `images[v][part]` is (B_part, 3, h, w). The samples that
    equivariance is asked of are the first `len(g0)` of part 0; g0 and g1 are their maps, in pixels.
    """

    images: tuple[list[Tensor], list[Tensor]]
    g0: LatticeMap
    g1: LatticeMap


@dataclass(frozen=True)
class MakeViews:
    """Two views of a batch, as the recipe partitions it.

    A share of the batch gets the sampler's maps, without crops, and the equivariance term; the rest gets random
    resized crops. Crops as the sampler need no partition: all samples are cropped, and the share takes the term.

    Attributes:
        sampler: draws g for the equivariance share.
        crop: draws the crops of the rest.
        share: of the batch, in [0, 1], rounded to whole samples.
        patch_size: pixels a token.
        colour: the colour augmentation.
        seed: of all draws.
    """

    sampler: Sampler
    crop: Crop
    share: float
    patch_size: int
    colour: Colour
    seed: int

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"share: got {self.share}, takes a number in [0, 1]")

    def __call__(self, images: Tensor, samples: Tensor, epoch: int) -> Views:
        """Views of images (B, 3, H, W) uint8, on their device, with samples (B,) their indices in the data set."""
        pixels = v2.functional.to_dtype(images, torch.float32, scale=True)
        chosen = round(self.share * len(images))
        cuts: list[tuple[Sampler, slice]]
        if isinstance(self.sampler, Crop):
            cuts = [(self.sampler, slice(None))]
        else:
            cuts = [(self.sampler, slice(chosen)), (self.crop, slice(chosen, None))]
        cuts = [(sampler, part) for sampler, part in cuts if len(samples[part])]
        size = images.shape[2], images.shape[3]
        made: tuple[list[Tensor], list[Tensor]] = ([], [])
        maps = []
        for view in (0, 1):
            u = draws(self.seed, epoch, samples, view)
            for sampler, part in cuts:
                g = sampler(size, self.patch_size, u[part], view)
                moved = transform_images(pixels[part], g).clamp(0, 1)
                moved = self.colour(moved, samples[part], seed=self.seed, epoch=epoch, view=view)
                if not made[view]:
                    maps.append(g[:chosen])
                made[view].append(normalize(moved))
        return Views(made, *maps)
