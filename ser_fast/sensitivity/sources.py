"""What is moved: synthetic fields whose continuous truth is known, pooled photographs, and features of a model.

Each source gives f(g x) for a map g of the token lattice: `maps(g)` with the identity is f(x).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import timm
import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as transforms

from ser_fast.evaluation.features import evaluating
from ser_fast.evaluation.protocol import open_encoder
from ser_fast.lattice import LatticeMap, Size, positions
from ser_fast.sensitivity.factors import DEFAULT
from ser_fast.views.pixels import normalize, transform_images
from ser_fast.vit import SplitViT

CONTROL = "random weights"  # how the names of random initializations begin
_BATCH = 16  # images in a forward pass
_WAVES, _CHANNELS = 64, 8  # of a synthetic field
_LOWEST, _HIGHEST = 1 / 32, 1 / 2  # frequencies of its waves, in cycles a token


class Source(Protocol):
    """A signal to move.

    Attributes:
        signal: "fields", "photos" or "features".
        model: whose features; "" for the others.
        factors: the factors beside resampling and lattice that change what `maps` gives.
    """

    @property
    def signal(self) -> str: ...

    @property
    def model(self) -> str: ...

    @property
    def factors(self) -> tuple[str, ...]: ...

    def maps(self, g: LatticeMap, *, pixels: str = ..., positions: str = ...) -> list[Tensor]:
        """f(g x): for each layer the tokens (N, h, w, C) on g.size_out, of images x on the lattice g.size_in."""


class Fields:
    """Random 1/f fields of plane waves; a token is the mean over its cell, of the field or of the moved field.

    Directions and phases are uniform and the frequency of each of the equally strong waves is log-uniform up to half a
    cycle a token, so that the energy of a 2-D frequency f goes as 1/|f|^2. The mean of a wave e^{2 pi i f.u} over the
    cell A[-1/2, 1/2]^2 about p is sinc((A^T f)_y) sinc((A^T f)_x) e^{2 pi i f.p}: the truth needs no resampling.

    Args:
        count: N, the number of fields.
        seed: of the draws.
        device: of the tokens.
    """

    signal, model = "fields", ""
    factors: tuple[str, ...] = ()

    def __init__(self, count: int, *, seed: int, device: torch.device | str = "cpu") -> None:
        generator = torch.Generator().manual_seed(seed)
        u = torch.rand(2 + _CHANNELS, count, _WAVES, dtype=torch.float64, generator=generator).to(device)
        radius = _LOWEST * (_HIGHEST / _LOWEST) ** u[0]
        angle = 2 * math.pi * u[1]
        self.frequency = torch.stack([radius * angle.sin(), radius * angle.cos()], -1)  # (N, K, 2), (y, x)
        self.phase = 2 * math.pi * u[2:].permute(1, 2, 0)  # (N, K, C)

    def maps(self, g: LatticeMap, *, pixels: str = DEFAULT.pixels, positions: str = DEFAULT.positions) -> list[Tensor]:
        """(N, h, w, C) for the one layer there is."""
        g = g.to(self.frequency.device)
        centers = torch.cat(_centers(g))  # (2, h*w)
        attenuation = torch.sinc(self.frequency @ g.linear[0]).prod(-1, keepdim=True)  # (N, K, 1)
        angle = 2 * math.pi * self.frequency @ centers  # (N, K, h*w)
        waves = angle.cos().mT @ (attenuation * self.phase.cos()) - angle.sin().mT @ (attenuation * self.phase.sin())
        return [(waves / math.sqrt(_WAVES / 2)).float().unflatten(1, g.size_out)]


def _centers(g: LatticeMap) -> tuple[Tensor, Tensor]:
    return positions(g.linear, g.offset, g.size_in, g.size_out)


def _fit(images: Tensor, size: Size) -> Tensor:
    """The middle of images (N, 3, S, S), enlarged first where it has to be: (N, 3, *size)."""
    if max(size) > images.shape[-1]:
        images = transforms.resize(images, [max(size)], interpolation=transforms.InterpolationMode.BICUBIC)
    return transforms.center_crop(images.clamp(0, 1), list(size))


def _move(images: Tensor, g: LatticeMap, patch: Size, pixels: str) -> Tensor:
    """g x in pixels: images (N, 3, S, S) cut to the lattice g.size_in and carried along g."""
    (height, width), (h, w) = g.size_in, g.size_out
    g_pixels = g.on((height * patch[0], width * patch[1]), (h * patch[0], w * patch[1]))
    interpolation, _, antialias = pixels.partition("_")
    # A rotation takes steps of one pixel: there is nothing to antialias.
    moved = transform_images(
        _fit(images, g_pixels.size_in),
        g_pixels,
        interpolation=interpolation,
        antialias=bool(antialias) and g.axis_aligned,
    )
    return moved.clamp(0, 1)


class Photographs:
    """Average-pooled photographs; tokens are the mean colors of patches as large as the images allow.

    Args:
        images: (N, 3, S, S) in [0, 1].
    """

    signal, model = "photos", ""
    factors: tuple[str, ...] = ("pixels",)

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def maps(self, g: LatticeMap, *, pixels: str = DEFAULT.pixels, positions: str = DEFAULT.positions) -> list[Tensor]:
        """(N, h, w, 3) for the one layer there is."""
        patch = max(1, self.images.shape[-1] // max(g.size_in))
        return [F.avg_pool2d(_move(self.images, g, (patch, patch), pixels), patch).permute(0, 2, 3, 1).contiguous()]


class Features:
    """The tokens of every block of a vision transformer.

    Args:
        name: of the model, for the tables.
        encoder: a SplitViT, or anything with its patch_size and layer_maps.
        images: (N, 3, S, S) in [0, 1], on the encoder's device.
    """

    signal = "features"

    def __init__(self, name: str, encoder: SplitViT, images: Tensor) -> None:
        self.model, self.encoder, self.images = name, encoder, images
        embedded = getattr(encoder, "pos_embed", None) is not None
        self.factors: tuple[str, ...] = ("pixels", "positions") if embedded else ("pixels",)

    def maps(self, g: LatticeMap, *, pixels: str = DEFAULT.pixels, positions: str = DEFAULT.positions) -> list[Tensor]:
        """(N, h, w, C) for each block."""
        moved = normalize(_move(self.images, g, self.encoder.patch_size, pixels))  # (N, 3, Hp, Wp)
        with evaluating(self.encoder), resized_positions(self.encoder, g.size_out, positions):
            batches = [self.encoder.layer_maps(part) for part in moved.split(_BATCH)]
        return [torch.cat(layer) for layer in zip(*batches, strict=True)]


@contextmanager
def resized_positions(encoder: Any, grid: Size, kernel: str) -> Iterator[None]:
    """Inside the block, absolute position embeddings are those of `grid`, resized by `kernel`.

    Args:
        encoder: a SplitViT; a model without absolute positions stays as it is.
        grid: (h, w) tokens.
        kernel: one of POSITION_KERNELS.
    """
    own = getattr(encoder, "pos_embed", None)  # (1, P + H*W, C)
    if own is None:
        yield
        return
    patch_embed: Any = encoder.patch_embed
    own_grid = patch_embed.grid_size
    interpolation, _, antialias = kernel.partition("_")
    resized = resample_abs_pos_embed(
        own,
        new_size=list(grid),
        old_size=list(own_grid),
        num_prefix_tokens=own.shape[1] - own_grid[0] * own_grid[1],
        interpolation=interpolation,
        antialias=bool(antialias),
    )
    encoder.pos_embed, patch_embed.grid_size = nn.Parameter(resized, requires_grad=False), grid
    try:
        yield
    finally:
        encoder.pos_embed, patch_embed.grid_size = own, own_grid


def open_model(name: str) -> SplitViT:
    """The model that is named, on the CPU.

    Args:
        name: a run's folder, an encoder.safetensors file, or the name of a timm model, whose pretrained weights are
            taken.

    Raises:
        ValueError: a name that is none of these, or weights that can't be had.
    """
    if Path(name).exists() or name.startswith("timm:"):
        return open_encoder(name, device="cpu").model
    if not timm.is_model(name):
        raise ValueError(f"checkpoint: got {name}, takes a run's folder, a .safetensors file or a timm model")
    return SplitViT(name, split=0, pretrained=True)
