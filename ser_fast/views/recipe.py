"""The views of a batch, as the recipe partitions it."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torchvision.transforms import v2

from ser_fast.lattice import LatticeMap
from ser_fast.views.color import Color
from ser_fast.views.pixels import normalize, transform_images
from ser_fast.views.samplers import Crop, Sampler, draws


@dataclass(frozen=True)
class View:
    """One view of a batch, cut into parts with one image size each.

    Attributes:
        images: by part, (B_part, 3, h, w), normalized.
        g: the maps from the images to this view, in pixels, of the samples that add-ons see.
        color: (B, P) what was drawn for their colors; None where samples share draws.
        role: "global" and "local" views are crops for the objective; "plain" (the image itself) and "turn" (one of
            its quarter turns) are made for add-ons alone.
    """

    images: list[Tensor]
    g: LatticeMap
    color: Tensor | None = None
    role: Literal["global", "local", "plain", "turn"] = "global"


@dataclass(frozen=True)
class Views:
    """The views of one batch, all cut into the same parts.

    The samples that add-ons see are the first `equivariant` ones of part 0, in every view.
    """

    views: list[View]
    equivariant: int


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
        views = []
        for view in (0, 1):
            u = draws(self.seed, epoch, samples, view)
            parts, maps = [], []
            for sampler, part in cuts:
                g = sampler(size, self.patch_size, u[part], view)
                moved = transform_images(pixels[part], g).clamp(0, 1)
                moved = self.color(moved, samples[part], seed=self.seed, epoch=epoch, view=view)
                maps.append(g)
                parts.append(normalize(moved))
            views.append(View(parts, maps[0][:chosen]))
        return Views(views, chosen)
