"""The map g applied to pixels, and the normalization of images."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from ser_fast.device import send
from ser_fast.interpolation import axis_weights
from ser_fast.lattice import LatticeMap

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


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
        theta = send(g.theta(images.dtype), images.device)
        grid = F.affine_grid(theta, [*images.shape[:2], *g.size_out], align_corners=False)
        return F.grid_sample(images, grid, mode=interpolation, padding_mode=padding, align_corners=False)
    out = images.new_empty(*images.shape[:2], *g.size_out)
    transposed = g.linear[:, 0, 0] == 0
    for transpose in (False, True):
        samples = torch.nonzero(transposed == transpose)[:, 0]
        if len(samples) == 0:
            continue
        # The input's y follows the output's y, or after a quarter turn its x; the input's x the other one.
        along_y, along_x = (
            _along_axis(
                g[samples],
                axis,
                1 - axis if transpose else axis,
                device=images.device,
                interpolation=interpolation,
                padding=padding,
                antialias=antialias,
            ).to(images)
            for axis in (0, 1)
        )
        samples = send(samples, images.device)
        moved = along_y[:, None] @ images[samples] @ along_x[:, None].mT
        out[samples] = moved.mT if transpose else moved
    return out


def _along_axis(
    g: LatticeMap,
    axis: int,
    axis_out: int,
    *,
    device: torch.device,
    interpolation: str,
    padding: str,
    antialias: bool,
) -> Tensor:
    """(B, n_out, n_in) on a device: the rows of weights of an input axis for positions along an output axis."""
    size, size_out = g.size_in[axis], g.size_out[axis_out]
    centers = torch.arange(size_out, dtype=torch.float64, device=g.device) + (0.5 - size_out / 2)
    slope = g.linear[:, axis, axis_out]
    position = slope[:, None] * centers + g.offset[:, axis, None] + size / 2
    exact = (g.linear.abs().sum(-1) == 1).all(-1)  # centers onto centers only if along both axes
    position = send(position, device)  # a few numbers a row go there, not the rows
    return axis_weights(
        position, slope.abs(), exact, size, interpolation=interpolation, padding=padding, antialias=antialias
    )


def normalize(images: Tensor) -> Tensor:
    """Subtract ImageNet's mean and divide by its deviation, per channel; images (B, 3, H, W) in [0, 1]."""
    mean, std = _mean_and_std(images.device, images.dtype)
    return (images - mean).div_(std)


@functools.cache
def _mean_and_std(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(3, 1, 1) each: sent once, since a batch would wait for numbers that are sent with it."""
    with torch.inference_mode(False):
        mean, std = (torch.tensor(of, dtype=dtype, device=device) for of in (IMAGENET_MEAN, IMAGENET_STD))
    return mean[:, None, None], std[:, None, None]
