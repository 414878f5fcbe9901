"""Corruptions and perturbation sequences of images.

The kinds are those of Hendrycks & Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations", 2019. Their numbers are from the tables of its CIFAR-10-C and CIFAR-10-P, whose lengths are pixels of
32 x 32 images: on images of side S they are multiplied by S / 32. What differs from the published sets: fractal noise
takes the place of their photographs of frost and of their diamond-square fog; glass draws a neighbor for all pixels at
once instead of swapping one pixel after another; beyond the image lies its mirror image, never black. For numbers to
compare with published ones, read the published sets (`ser_fast.evaluation.robustness`).
"""

import math
from collections.abc import Callable, Iterator
from io import BytesIO
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage, signal
from skimage import color, transform, util
from torch import Tensor

SEVERITIES = (1, 2, 3, 4, 5)
_SIDE = 32  # of the images that the tables are for

Pixels = NDArray[np.float64]  # (S, S, 3) in [0, 1]

# ---------------------------------------------------------------- corruptions


def _gaussian_noise(x: Pixels, rng: np.random.Generator, deviation: float) -> Pixels:
    return x + rng.normal(0, deviation, x.shape)


def _shot_noise(x: Pixels, rng: np.random.Generator, photons: float) -> Pixels:
    return rng.poisson(x * photons) / photons


def _impulse_noise(x: Pixels, rng: np.random.Generator, amount: float) -> Pixels:
    return util.random_noise(x, mode="s&p", amount=amount, rng=rng)


def _defocus_blur(x: Pixels, rng: np.random.Generator, radius: float, softness: float) -> Pixels:
    radius *= _scale(x)
    reach = math.ceil(radius + 3 * softness)
    offset = np.arange(-reach, reach + 1)
    disc = (offset[:, None] ** 2 + offset**2 <= radius**2).astype(float)
    return _filter(x, ndimage.gaussian_filter(disc, softness, truncate=3))


def _glass_blur(x: Pixels, rng: np.random.Generator, sigma: float, reach: int, times: int) -> Pixels:
    sigma, reach = sigma * _scale(x), max(1, round(reach * _scale(x)))
    x = ndimage.gaussian_filter(x, (sigma, sigma, 0))
    rows, columns = np.indices(x.shape[:2])
    for _ in range(times):
        down, right = rng.integers(-reach, reach, (2, *x.shape[:2]), endpoint=True)
        x = x[np.clip(rows + down, 0, len(x) - 1), np.clip(columns + right, 0, x.shape[1] - 1)]
    return ndimage.gaussian_filter(x, (sigma, sigma, 0))


def _motion_blur(x: Pixels, rng: np.random.Generator, radius: float, sigma: float) -> Pixels:
    return _smear(x, radius, sigma, rng.uniform(-45, 45))


def _zoom_blur(x: Pixels, rng: np.random.Generator, largest: float) -> Pixels:
    zooms = np.arange(1, largest, 0.01).tolist()
    return np.mean([x, *(_zoom(x, zoom) for zoom in zooms)], 0)


def _snow(
    x: Pixels,
    rng: np.random.Generator,
    mean: float,
    deviation: float,
    zoom: float,
    threshold: float,
    radius: float,
    sigma: float,
    kept: float,
) -> Pixels:
    flakes = _flakes(x, rng, mean, deviation, zoom, threshold)
    return _snowed(x, flakes, radius, sigma, rng.uniform(-135, -45), kept)


def _frost(x: Pixels, rng: np.random.Generator, kept: float, frost: float) -> Pixels:
    # Ridges of fractal noise, like the edges of ice crystals, in a bluish white.
    ridges = 1 - np.abs(2 * _fractal(rng, len(x), 1.6) - 1)
    return kept * x + frost * ridges[..., None] ** 2 * (0.85, 0.95, 1.0)


def _fog(x: Pixels, rng: np.random.Generator, amount: float, decay: float) -> Pixels:
    fogged = x + amount * _fractal(rng, len(x), decay)[..., None]
    return fogged * x.max() / (x.max() + amount)


def _brightness(x: Pixels, rng: np.random.Generator, amount: float) -> Pixels:
    hsv = color.rgb2hsv(x)
    hsv[..., 2] = np.clip(hsv[..., 2] + amount, 0, 1)
    return color.hsv2rgb(hsv)


def _contrast(x: Pixels, rng: np.random.Generator, factor: float) -> Pixels:
    mean = x.mean((0, 1), keepdims=True)
    return (x - mean) * factor + mean


def _elastic(x: Pixels, rng: np.random.Generator, amplitude: float, sigma: float, jitter: float) -> Pixels:
    # All in pixels of 32 x 32 images, as fractions of 32; then the field is stretched onto the image.
    size, amplitude, sigma, jitter = len(x), amplitude * _SIDE, sigma * _SIDE, jitter * _SIDE
    corners = np.array([[1, 1], [1, -1], [-1, -1]]) * (_SIDE // 3)
    moved = corners + rng.uniform(-jitter, jitter, corners.shape)
    matrix = np.linalg.solve(np.column_stack([corners, np.ones(3)]), moved)  # (3, 2): rows of (y, x, 1) to (y, x)
    noise = rng.uniform(-1, 1, (2, _SIDE, _SIDE))
    field = amplitude * ndimage.gaussian_filter(noise, (0, sigma, sigma), truncate=3)  # (2, 32, 32)
    field = np.stack([_stretch(axis, size) for axis in field])
    centered = (np.indices((size, size)) + 0.5) / size * _SIDE - _SIDE / 2  # (2, S, S)
    target = np.einsum("kji,kl->lji", np.concatenate([centered, np.ones((1, size, size))]), matrix) + field
    source = (target + _SIDE / 2) * size / _SIDE - 0.5
    channels = [ndimage.map_coordinates(x[..., c], source, order=1, mode="reflect") for c in range(3)]
    return np.stack(channels, -1)


def _pixelate(x: Pixels, rng: np.random.Generator, factor: float) -> Pixels:
    size, small = len(x), max(1, int(len(x) * factor))
    box = Image.Resampling.BOX
    return np.asarray(_to_pil(x).resize((small, small), box).resize((size, size), box)) / 255


def _jpeg(x: Pixels, rng: np.random.Generator, quality: int) -> Pixels:
    file = BytesIO()
    _to_pil(x).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file)) / 255


# kind: what it does, and its parameters at severities 1 to 5.
CORRUPTIONS: dict[str, tuple[Callable[..., Pixels], list[tuple[Any, ...]]]] = {
    "gaussian_noise": (_gaussian_noise, [(0.04,), (0.06,), (0.08,), (0.09,), (0.1,)]),
    "shot_noise": (_shot_noise, [(500,), (250,), (100,), (75,), (50,)]),
    "impulse_noise": (_impulse_noise, [(0.01,), (0.02,), (0.03,), (0.05,), (0.07,)]),
    "defocus_blur": (_defocus_blur, [(0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)]),
    "glass_blur": (_glass_blur, [(0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)]),
    "motion_blur": (_motion_blur, [(6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)]),
    "zoom_blur": (_zoom_blur, [(1.06,), (1.11,), (1.16,), (1.21,), (1.26,)]),
    "snow": (
        _snow,
        [
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ],
    ),
    "frost": (_frost, [(1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)]),
    "fog": (_fog, [(0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)]),
    "brightness": (_brightness, [(0.05,), (0.1,), (0.15,), (0.2,), (0.3,)]),
    "contrast": (_contrast, [(0.75,), (0.5,), (0.4,), (0.3,), (0.15,)]),
    "elastic_transform": (
        _elastic,
        [(0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)],
    ),
    "pixelate": (_pixelate, [(0.95,), (0.9,), (0.85,), (0.75,), (0.65,)]),
    "jpeg_compression": (_jpeg, [(80,), (65,), (58,), (50,), (40,)]),
}


def corrupt(image: Tensor, kind: str, severity: int, *, seed: int) -> Tensor:
    """One corrupted image, the same for the same seed.

    Args:
        image: (3, S, S) uint8.
        kind: one of CORRUPTIONS.
        severity: 1 to 5.
        seed: of the draws. Kinds and severities draw alike: severities differ in degree, not in chance.

    Returns:
        (3, S, S) uint8.

    Raises:
        ValueError: another kind or severity, or an image of another shape.
        TypeError: an image of another type.
    """
    if kind not in CORRUPTIONS:
        raise ValueError(f"kind: got {kind!r}, takes one of {', '.join(CORRUPTIONS)}")
    if severity not in SEVERITIES:
        raise ValueError(f"severity: got {severity}, takes 1 to 5")
    change, parameters = CORRUPTIONS[kind]
    return _to_tensor(change(_to_pixels(image), np.random.default_rng(seed), *parameters[severity - 1]))


# ---------------------------------------------------------------- perturbation sequences

_Frames = Callable[[Pixels, np.random.Generator], Iterator[Pixels]]


def _noisy(noise: Callable[..., Pixels], strength: float) -> _Frames:
    def frames(x: Pixels, rng: np.random.Generator) -> Iterator[Pixels]:
        yield x
        yield from (noise(x, rng, strength) for _ in range(30))

    return frames


def _motion_frames(x: Pixels, rng: np.random.Generator) -> Iterator[Pixels]:
    yield from (_smear(x, 6, 1.8, 9 * (i - 20)) for i in range(21))


def _zoom_frames(x: Pixels, rng: np.random.Generator) -> Iterator[Pixels]:
    total = np.zeros_like(x)
    for i in range(31):
        total += _zoom(x, 1 + 0.004 * i)
        yield total / (i + 1)


def _snow_frames(x: Pixels, rng: np.random.Generator) -> Iterator[Pixels]:
    flakes = _flakes(x, rng, 0.05, 0.3, 2, 0.5)
    yield from (_snowed(x, flakes, 10, 2, 4 * i - 150, 0.85) for i in range(31))


def _brightness_frames(x: Pixels, rng: np.random.Generator) -> Iterator[Pixels]:
    yield from (_brightness(x, rng, 0.015 * (i - 15)) for i in range(31))


def _translate_frames(x: Pixels, rng: np.random.Generator) -> Iterator[Pixels]:
    for i in range(16):
        yield _warp(x, transform.AffineTransform(translation=((i - 7) * _scale(x), 0)).params)


def _rotate_frames(x: Pixels, rng: np.random.Generator) -> Iterator[Pixels]:
    yield from (_warp(x, transform.AffineTransform(rotation=math.radians(i - 15)).params) for i in range(31))


def _tilt_frames(x: Pixels, rng: np.random.Generator) -> Iterator[Pixels]:
    # The image plane turned about both axes, seen from as far away as the image's diagonal.
    far = math.hypot(*x.shape[:2])
    for i in range(31):
        sine, cosine = math.sin(math.radians(0.75 * (i - 15))), math.cos(math.radians(0.75 * (i - 15)))
        about_x = np.array([[1, 0, 0], [0, cosine, -sine], [0, sine, cosine]])
        about_y = np.array([[cosine, 0, -sine], [0, 1, 0], [sine, 0, cosine]])
        turned = (about_x @ about_y)[:, :2]  # of (x, y, 0)
        yield _warp(x, np.column_stack([turned * [[far], [far], [1]], [0, 0, far]]))


def _scale_frames(x: Pixels, rng: np.random.Generator) -> Iterator[Pixels]:
    yield from (_zoom(x, (2 * i + 70) / 100) for i in range(31))


PERTURBATIONS: dict[str, _Frames] = {
    "gaussian_noise": _noisy(_gaussian_noise, 0.02),
    "shot_noise": _noisy(_shot_noise, 700),
    "motion_blur": _motion_frames,
    "zoom_blur": _zoom_frames,
    "snow": _snow_frames,
    "brightness": _brightness_frames,
    "translate": _translate_frames,
    "rotate": _rotate_frames,
    "tilt": _tilt_frames,
    "scale": _scale_frames,
}


def perturb(image: Tensor, kind: str, *, seed: int) -> Tensor:
    """A sequence of slightly changed images, (F, 3, S, S) uint8, the same for the same seed.

    31 frames; 21 of motion_blur and 16 of translate.

    Raises:
        ValueError: a kind that is none of PERTURBATIONS, or an image that isn't (3, S, S).
        TypeError: an image that isn't uint8.
    """
    if kind not in PERTURBATIONS:
        raise ValueError(f"kind: got {kind!r}, takes one of {', '.join(PERTURBATIONS)}")
    frames = PERTURBATIONS[kind](_to_pixels(image), np.random.default_rng(seed))
    return torch.stack([_to_tensor(frame) for frame in frames])


# ---------------------------------------------------------------- what they are made of


def _to_pixels(image: Tensor) -> Pixels:
    if not isinstance(image, Tensor) or image.dtype != torch.uint8:
        raise TypeError(f"image: got {getattr(image, 'dtype', type(image))}, takes a uint8 tensor (3, S, S)")
    if image.ndim != 3 or image.shape[0] != 3 or image.shape[1] != image.shape[2]:
        raise ValueError(f"image: got {tuple(image.shape)}, takes (3, S, S)")
    return image.permute(1, 2, 0).numpy() / 255


def _to_tensor(x: Pixels) -> Tensor:
    return torch.from_numpy((x.clip(0, 1) * 255).round().astype(np.uint8)).permute(2, 0, 1).contiguous()


def _to_pil(x: Pixels) -> Image.Image:
    return Image.fromarray((x.clip(0, 1) * 255).round().astype(np.uint8))


def _scale(x: Pixels) -> float:
    return len(x) / _SIDE


def _filter(x: Pixels, kernel: NDArray[np.float64]) -> Pixels:
    """Convolve each channel with a square kernel of odd side, scaled to sum 1."""
    reach = len(kernel) // 2
    padded = np.pad(x, ((reach, reach), (reach, reach), (0, 0)), mode="symmetric")
    return signal.fftconvolve(padded, kernel[..., None] / kernel.sum(), mode="valid", axes=(0, 1))


def _smear(x: Pixels, radius: float, sigma: float, degrees: float) -> Pixels:
    """The half Gaussian of ImageMagick's motion blur, from each pixel along a direction."""
    reach, sigma = round(radius * _scale(x)), sigma * _scale(x)
    steps = np.arange(2 * reach + 1)
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    steps = steps[weights > 1e-3]
    line = np.deg2rad(degrees)
    down, right = (np.rint(steps * part).astype(int) for part in (np.sin(line), np.cos(line)))
    size = steps[-1]
    kernel = np.zeros((2 * size + 1, 2 * size + 1))
    np.add.at(kernel, (size + down, size + right), weights[: len(steps)])
    return _filter(x, kernel)


def _warp(x: Pixels, matrix: NDArray[np.float64]) -> Pixels:
    """Move the image by a 3 x 3 matrix that acts on (x, y, 1), in pixels about the center."""
    center = (len(x) - 1) / 2
    to_center = transform.AffineTransform(translation=(-center, -center)).params
    inverse = np.linalg.inv(matrix @ to_center)
    inverse = inverse @ to_center
    return transform.warp(x, inverse, order=1, mode="symmetric")


def _zoom(x: Pixels, factor: float) -> Pixels:
    return _warp(x, np.diag([factor, factor, 1.0]))


def _stretch(field: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """(h, w) -> (size, size), linearly."""
    return transform.resize(field, (size, size), order=1, mode="edge", anti_aliasing=False)


def _fractal(rng: np.random.Generator, size: int, decay: float) -> NDArray[np.float64]:
    """Noise of octaves, each with cells of half the size and an amplitude 1 / decay of the one before; in [0, 1]."""
    total = np.zeros((size, size))
    for octave in range(1, 1 + math.ceil(math.log2(size))):
        total += _stretch(rng.uniform(-1, 1, (1 + 2**octave,) * 2), size) / decay**octave
    total -= total.min()
    return total / total.max()


def _flakes(
    x: Pixels, rng: np.random.Generator, mean: float, deviation: float, zoom: float, threshold: float
) -> NDArray[np.float64]:
    """(S, S): noise of flakes of `zoom` pixels of a 32 x 32 image, those below the threshold left out."""
    flakes = _stretch(rng.normal(mean, deviation, (math.ceil(_SIDE / zoom),) * 2), len(x))
    return np.where(flakes < threshold, 0, flakes).clip(0, 1)


def _snowed(x: Pixels, flakes: NDArray[np.float64], radius: float, sigma: float, degrees: float, kept: float) -> Pixels:
    falling = _smear(flakes[..., None], radius, sigma, degrees)
    whitened = np.maximum(x, color.rgb2gray(x)[..., None] * 1.5 + 0.5)
    return kept * x + (1 - kept) * whitened + falling + np.rot90(falling, 2)
