"""The views of a batch, as the recipe partitions it."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torchvision.transforms import v2

from ser_fast.lattice import LatticeMap, Size
from ser_fast.views.color import Color
from ser_fast.views.pixels import normalize, transform_images
from ser_fast.views.samplers import Crop, Sampler, draws

_TURNS = 1 << 16  # the view number of the turned crop's draws: no other view's, however many there are


@dataclass(frozen=True)
class View:
    """One view of a batch, cut into parts with one image size each.

    Attributes:
        images: by part, (B_part, 3, h, w), normalized; in the order of the batch.
        g: the maps from the images to this view, in pixels, of the samples that add-ons see.
        color: (B, P) what was drawn for the colors of those samples, as `ser_fast.views.color.LAYOUT` says; None of
            a view whose colors are the image's.
        role: "global" and "local" views are crops for the objective; "plain" (the image itself) and "turn" (a
            quarter turn of a small crop) are made for add-ons alone, of the samples that they see.
    """

    images: list[Tensor]
    g: LatticeMap
    color: Tensor | None = None
    role: Literal["global", "local", "plain", "turn"] = "global"


@dataclass(frozen=True)
class Views:
    """The views of one batch: global ones first, then local ones, then what add-ons need.

    The samples that add-ons see are the first `equivariant` ones of part 0, in every view.
    """

    views: list[View]
    equivariant: int


@dataclass(frozen=True)
class SmallCrop:
    """A small view of its own size: a local view, or the crop that is turned.

    Attributes:
        crop: draws it.
        color: its color augmentation.
        size: its side in pixels; None: 3/7 of the image's (96 of 224), in whole patches.
    """

    crop: Crop
    color: Color
    size: int | None = None

    def draw(self, size: Size, patch_size: int, u: Tensor, view: int) -> LatticeMap:
        """The maps from images of `size` to it, for draws u (B, 8)."""
        side = self.size or max(1, round(size[0] * 3 / 7 / patch_size)) * patch_size
        return self.crop(size, patch_size, u, view).on(size, (side, side))


@dataclass(frozen=True)
class MakeViews:
    """The views of a batch, as the recipe partitions it.

    A share of the batch gets the sampler's maps, without crops, and the add-ons; the rest gets random resized crops.
    Crops as the sampler need no partition: all samples are cropped, and the add-ons see the share.

    Attributes:
        sampler: draws g for the equivariance share.
        crop: draws the crops of the rest.
        share: of the batch, in [0, 1], rounded to whole samples.
        patch_size: pixels a token.
        colors: the color augmentations of the two global views.
        seed: of all draws.
        locals: the local views, drawn of all samples.
        turns: the crop that add-ons see in its four quarter turns, each with colors of its own.
        needs: of add-ons: "plain", "turns", "pairs"; see `ser_fast.addons.base.AddOn`.
    """

    sampler: Sampler
    crop: Crop
    share: float
    patch_size: int
    colors: tuple[Color, Color]
    seed: int
    locals: tuple[SmallCrop, ...] = ()
    turns: SmallCrop | None = None
    needs: frozenset[str] = field(default_factory=frozenset)

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"share: got {self.share}, takes a number in [0, 1]")
        for name, small in [*(("local_size", local) for local in self.locals), ("turn_size", self.turns)]:
            if small and small.size is not None and (small.size < 1 or small.size % self.patch_size):
                raise ValueError(f"{name}: got {small.size}, takes a multiple of the patch size {self.patch_size}")
        if "turns" in self.needs and self.turns is None:
            raise ValueError("turns: got None, and an add-on needs them")

    def __call__(self, images: Tensor, samples: Tensor, epoch: int) -> Views:
        """Views of images (B, 3, H, W) uint8, on their device, with samples (B,) their indices in the data set."""
        pixels = v2.functional.to_dtype(images, torch.float32, scale=True)
        size, chosen = (images.shape[2], images.shape[3]), round(self.share * len(images))
        drawn_as = _in_pairs(samples, chosen) if "pairs" in self.needs else samples
        views = [self._global(pixels, drawn_as, chosen, epoch, view) for view in (0, 1)]
        views += [
            self._local(local, pixels, samples, chosen, epoch, view) for view, local in enumerate(self.locals, start=2)
        ]
        if chosen and "plain" in self.needs:
            views.append(View([normalize(pixels[:chosen])], LatticeMap.identity(size, batch=chosen), role="plain"))
        if chosen and "turns" in self.needs:
            views += self._turned(pixels[:chosen], samples[:chosen], epoch)
        return Views(views, chosen)

    def _global(self, pixels: Tensor, samples: Tensor, chosen: int, epoch: int, view: int) -> View:
        cuts: list[tuple[Sampler, slice]]
        if isinstance(self.sampler, Crop):
            cuts = [(self.sampler, slice(None))]
        else:
            cuts = [(self.sampler, slice(chosen)), (self.crop, slice(chosen, None))]
        u = draws(self.seed, epoch, samples, view)
        parts, maps, colors = [], [], []
        for sampler, part in cuts:
            if len(samples[part]):
                g = sampler((pixels.shape[2], pixels.shape[3]), self.patch_size, u[part], view)
                moved, color = self._paint(pixels[part], g, self.colors[view], samples[part], epoch, view)
                parts.append(moved)
                maps.append(g)
                colors.append(color)
        return View(parts, maps[0][:chosen], colors[0][:chosen])

    def _local(self, local: SmallCrop, pixels: Tensor, samples: Tensor, chosen: int, epoch: int, view: int) -> View:
        u = draws(self.seed, epoch, samples, view)
        g = local.draw((pixels.shape[2], pixels.shape[3]), self.patch_size, u, view)
        moved, color = self._paint(pixels, g, local.color, samples, epoch, view)
        return View([moved], g[:chosen], color[:chosen], "local")

    def _turned(self, pixels: Tensor, samples: Tensor, epoch: int) -> list[View]:
        assert self.turns is not None
        u = draws(self.seed, epoch, samples, _TURNS)
        g = self.turns.draw((pixels.shape[2], pixels.shape[3]), self.patch_size, u, _TURNS)
        crop = transform_images(pixels, g).clamp(0, 1)
        views = []
        for k in range(4):
            turned = torch.rot90(crop, k, (2, 3))
            painted, color = self.turns.color(turned, samples, seed=self.seed, epoch=epoch, view=_TURNS + k)
            views.append(View([normalize(painted)], LatticeMap.rot90(g.size_out, k).compose(g), color, "turn"))
        return views

    def _paint(
        self, pixels: Tensor, g: LatticeMap, color: Color, samples: Tensor, epoch: int, view: int
    ) -> tuple[Tensor, Tensor]:
        """Images moved by g, with other colors, normalized; and the draws of the colors."""
        moved = transform_images(pixels, g).clamp(0, 1)
        changed, drawn = color(moved, samples, seed=self.seed, epoch=epoch, view=view)
        return normalize(changed), drawn


def _in_pairs(samples: Tensor, chosen: int) -> Tensor:
    """The samples whose draws each gets: in the share, those of the first of each two neighbors."""
    first = torch.arange(len(samples))
    paired = first < chosen // 2 * 2
    return samples[torch.where(paired, first & ~1, first).to(samples.device)]
