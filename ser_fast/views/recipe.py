"""The views of a batch, as the recipe partitions it."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms import v2

from ser_fast.lattice import LatticeMap
from ser_fast.views.color import Color
from ser_fast.views.pixels import normalize, transform_images
from ser_fast.views.samplers import Crop, Sampler, draws


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
        color: the color augmentation.
        seed: of all draws.
    """

    sampler: Sampler
    crop: Crop
    share: float
    patch_size: int
    color: Color
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
                moved = self.color(moved, samples[part], seed=self.seed, epoch=epoch, view=view)
                if not made[view]:
                    maps.append(g[:chosen])
                made[view].append(normalize(moved))
        return Views(made, *maps)
