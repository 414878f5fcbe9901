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

# View numbers of draws that are no view's, however many there are: of the turned crop, and of the frame.
_TURNS, _FRAME = 1 << 16, 1 << 17
_NO_COLOR = Color(0, jittered=0, gray=0, blur=0, solarize=0)


@dataclass(frozen=True)
class View:
    """One view of a batch, cut into parts with one image size each.

    Attributes:
        images: by part, (B_part, 3, h, w), normalized; in the order of the batch.
        g: the maps from the frame to this view, in pixels, of the samples that add-ons see. The frame is what all views
            of a sample have in common: the image, or the crop of it that `MakeViews.frame` drew.
        color: (B, P) what was drawn for the colors of those samples, as `ser_fast.views.color.LAYOUT` says; None of
            a view whose colors are the image's.
        role: "global" and "local" views are crops for the objective; "plain" (the frame itself) and "turn" (a
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

    def side(self, size: Size, patch_size: int) -> int:
        """Its side, or that which views of `size` give it."""
        return self.size or max(1, round(size[0] * 3 / 7 / patch_size)) * patch_size

    def draw(self, size: Size, patch_size: int, u: Tensor, view: int, aspects: Tensor | None = None) -> LatticeMap:
        """The maps from images of `size` to it, for draws u (B, 23) and pictures of true aspects (B,)."""
        side = self.side(size, patch_size)
        return self.crop(size, patch_size, u, view, aspects).on(size, (side, side))


@dataclass(frozen=True)
class MakeViews:
    """The views of a batch, as the recipe partitions it.

    A share of the batch gets the sampler's maps of a frame that both views have in common, and the add-ons; the rest
    gets random resized crops. Crops as the sampler need no partition: all samples are cropped, and the add-ons see the
    share. A view is one antialiased resampling of the canvas; only a rotated one is made of the frame at its own size.

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
        frame: draws the frames of the share; None: the whole image is the frame, as it is for crops.
        size: the side of the global views in pixels, D4's scales apart; None: the images'.
        share_color: whether the global views of the share change their colors, too.
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
    frame: Crop | None = None
    size: int | None = None
    share_color: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"share: got {self.share}, takes a number in [0, 1]")
        if not self.share_color and isinstance(self.sampler, Crop):
            raise ValueError("share_color: got False with crops, which do not part the share from the batch")
        for name, small in [*(("local_size", local) for local in self.locals), ("turn_size", self.turns)]:
            if small and small.size is not None and (small.size < 1 or small.size % self.patch_size):
                raise ValueError(f"{name}: got {small.size}, takes a multiple of the patch size {self.patch_size}")
        if "turns" in self.needs and self.turns is None:
            raise ValueError("turns: got None, and an add-on needs them")

    def __call__(self, images: Tensor, samples: Tensor, epoch: int, aspects: Tensor | None = None) -> Views:
        """Cut the views of a batch.

        Args:
            images: (B, 3, K, K) uint8, on the device of the views.
            samples: (B,) their indices in the data set.
            epoch: of the draws.
            aspects: (B,) the true width over height of the pictures stretched on them; default 1.
        """
        pixels = v2.functional.to_dtype(images, torch.float32, scale=True)
        aspects = torch.ones(len(images), dtype=torch.float64) if aspects is None else aspects.cpu().double()
        chosen = round(self.share * len(images))
        drawn_as = _in_pairs(len(images), chosen) if "pairs" in self.needs else torch.arange(len(images))
        canvas = images.shape[2], images.shape[3]
        size = canvas if self.size is None else (self.size, self.size)
        cut = _Cut(self, pixels, samples, aspects, epoch, size)
        if chosen and self.frame and not isinstance(self.sampler, Crop):
            first = drawn_as[:chosen]
            u = draws(self.seed, epoch, samples[first.to(samples.device)], _FRAME)
            cut.frame = LatticeMap.crop((1, 1), self.frame.boxes(u, aspects[first]), (1, 1)).on(canvas, size)
        views = [cut.global_view(view, chosen, drawn_as) for view in (0, 1)]
        views += [cut.local_view(local, view, chosen) for view, local in enumerate(self.locals, start=2)]
        if chosen and "plain" in self.needs:
            g = LatticeMap.identity(size, batch=chosen)
            views.append(View([normalize(cut.moved(g, slice(chosen), framed=True))], g, role="plain"))
        if chosen and "turns" in self.needs:
            views += cut.turned_views(chosen)
        return Views(views, chosen)


@dataclass
class _Cut:
    """The canvases of one batch, and what is cut from them.

    Attributes:
        pixels: (B, 3, K, K) in [0, 1].
        samples, aspects, epoch, size: as MakeViews has them.
        frame: the maps from the canvas to the frames of the share; None: the whole canvas.
    """

    make: MakeViews
    pixels: Tensor
    samples: Tensor
    aspects: Tensor
    epoch: int
    size: Size
    frame: LatticeMap | None = None

    def global_view(self, view: int, chosen: int, drawn_as: Tensor) -> View:
        make = self.make
        u = draws(make.seed, self.epoch, self.samples[drawn_as.to(self.samples.device)], view)
        cuts: list[tuple[Sampler, slice]]
        if isinstance(make.sampler, Crop):
            cuts = [(make.sampler, slice(0, None))]
        else:
            cuts = [(make.sampler, slice(0, chosen)), (make.crop, slice(chosen, None))]
        parts, maps, colors = [], [], []
        for sampler, part in cuts:
            if len(u[part]):
                aspects = (self.aspects[drawn_as][part],) if isinstance(sampler, Crop) else ()
                g = sampler(self.size, make.patch_size, u[part], view, *aspects)
                moved = self.moved(g, part, framed=not aspects)
                samples = self.samples[drawn_as.to(self.samples.device)][part]
                shared = part.start == 0 and not make.share_color
                colors_of = _NO_COLOR if shared else make.colors[view]
                painted, color = colors_of(moved, samples, seed=make.seed, epoch=self.epoch, view=view)
                parts.append(normalize(painted))
                maps.append(g)
                colors.append(color)
        return View(parts, maps[0][:chosen], colors[0][:chosen])

    def local_view(self, local: SmallCrop, view: int, chosen: int) -> View:
        make = self.make
        u = draws(make.seed, self.epoch, self.samples, view)
        g = local.draw(self.size, make.patch_size, u, view, self.aspects)
        moved = self.moved(g, slice(None))
        painted, color = local.color(moved, self.samples, seed=make.seed, epoch=self.epoch, view=view)
        return View([normalize(painted)], self.of_frame(g[:chosen]), color[:chosen], "local")

    def turned_views(self, chosen: int) -> list[View]:
        make, samples = self.make, self.samples[:chosen]
        assert make.turns is not None
        u = draws(make.seed, self.epoch, samples, _TURNS)
        g = make.turns.draw(self.size, make.patch_size, u, _TURNS, self.aspects[:chosen])
        crop, g = self.moved(g, slice(chosen)), self.of_frame(g)
        views = []
        for k in range(4):
            turned = torch.rot90(crop, k, (2, 3))
            painted, color = make.turns.color(turned, samples, seed=make.seed, epoch=self.epoch, view=_TURNS + k)
            views.append(View([normalize(painted)], LatticeMap.rot90(g.size_out, k).compose(g), color, "turn"))
        return views

    def moved(self, g: LatticeMap, part: slice, *, framed: bool = False) -> Tensor:
        """What g, a map of the whole canvas or of the frames, shows of some samples; in [0, 1]."""
        pixels = self.pixels[part]
        base = self.frame if framed and self.frame is not None else self.whole()
        if g.axis_aligned:
            return transform_images(pixels, g @ base, antialias=True).clamp(0, 1)
        if base.size_in != base.size_out or base is self.frame:
            pixels = transform_images(pixels, base, antialias=True).clamp(0, 1)
        return transform_images(pixels, g).clamp(0, 1)

    def whole(self) -> LatticeMap:
        """From the canvas to an image of the views' size."""
        return LatticeMap.resize((self.pixels.shape[2], self.pixels.shape[3]), self.size)

    def of_frame(self, g: LatticeMap) -> LatticeMap:
        """A map of the canvas as one of the frame."""
        return g if self.frame is None else g @ self.whole() @ self.frame.inverse()


def _in_pairs(count: int, chosen: int) -> Tensor:
    """(B,) whose draws each sample gets: in the share, those of the first of each two neighbors."""
    first = torch.arange(count)
    return torch.where(first < chosen // 2 * 2, first & ~1, first)
