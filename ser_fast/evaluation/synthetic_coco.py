"""A small set in COCO's format with boxes and masks: materials in shapes, on photographs. Nothing is downloaded.

What an object is made of is its category, and neither its color nor its shape says so: every region has colors of its
own, drawn at random. An encoder that sees colors, as random weights do, is worth little here.
"""

import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools import mask as run_lengths
from torch import Tensor
from torchvision.io import write_png

from ser_fast.data.sources import ImageDataset, open_dataset
from ser_fast.io import write_atomically

IMAGE_SIZE = 128  # pixels; the largest that every photograph has held-out tiles of
IMAGES = {"train": 400, "val": 100}

# Is a point (x, y) in the shape? They fit in the unit circle about the origin, and are turned by any angle.
SHAPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "disc": lambda x, y: x.hypot(y) <= 0.8,
    "square": lambda x, y: x.abs().maximum(y.abs()) <= 0.7,
    "triangle": lambda x, y: (y <= 0.5) & (math.sqrt(3) * x.abs() - y <= 1),
    "cross": lambda x, y: (x.abs().minimum(y.abs()) <= 0.3) & (x.abs().maximum(y.abs()) <= 0.95),
}
# The categories: photographs of scikit-image's wheel that show one material. The others are backgrounds.
MATERIALS = ("brick", "grass", "gravel", "coins", "text", "ihc")
_RADII = (0.28, 0.45)  # of the image's side
_OBJECTS = (2, 4)  # in an image
_TRIES = 20  # to place an object where it hides none
_BASE = (40, 215)  # a region's mean color, in each channel
_CONTRAST = (20, 60)  # of a region, in gray levels: the deviation of the channel that varies most


def write_shapes(folder: Path, *, seed: int = 0) -> None:
    """Write the set: train/ and val/ (PNG files), annotations/instances_train.json and instances_val.json (last).

    400 images to train on and 100 to validate, 128 x 128 pixels, each with two to four objects of the six MATERIALS in
    any of the four SHAPES. No pixel of a photograph, as background or as material, is in both parts.

    Args:
        folder: is made where it isn't there.
        seed: of the photographs, the shapes, their places and colors.
    """
    for part, count in IMAGES.items():
        tiles = open_dataset("photos", train=part == "train", image_size=IMAGE_SIZE)
        labels = np.array([tiles.source.read(index).label for index in range(len(tiles))])
        materials = [np.flatnonzero(labels == tiles.classes.index(name)) for name in MATERIALS]
        backgrounds = np.flatnonzero(~np.isin(np.arange(len(tiles)), np.concatenate(materials)))
        rng = np.random.default_rng((seed, part == "train"))
        (folder / part).mkdir(parents=True, exist_ok=True)
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for number in range(count):
            background = tiles[int(rng.choice(backgrounds))][0]
            image, objects = paste_shapes(background, tiles, materials, rng)
            name = f"{number:04}.png"
            write_png(image, str(folder / part / name))
            images.append({"id": number, "file_name": name, "height": IMAGE_SIZE, "width": IMAGE_SIZE})
            for pasted in objects:
                annotations.append({"id": len(annotations) + 1, "image_id": number, "iscrowd": 0, **pasted})
        categories = [{"id": number, "name": name} for number, name in enumerate(MATERIALS, start=1)]
        text = json.dumps({"images": images, "annotations": annotations, "categories": categories})
        write_atomically(folder / "annotations" / f"instances_{part}.json", partial(Path.write_text, data=text))


def paste_shapes(
    background: Tensor, tiles: ImageDataset, materials: Sequence[NDArray[np.int64]], rng: np.random.Generator
) -> tuple[Tensor, list[dict[str, Any]]]:
    """Two to four pieces of materials in random shapes, places, sizes, angles and colors, none over another.

    Args:
        background: (3, S, S) uint8.
        tiles: images (3, S, S) to cut the pieces from.
        materials: of each category, the numbers of its tiles.
        rng: decides everything.

    Returns:
        (3, S, S) uint8 and, for each object, COCO's category_id (from 1, in the order of materials), bbox (left, top,
        width, height) and area, in pixels and exact, and its mask as segmentation, in run lengths.
    """
    image, size = recolor(background, rng), background.shape[-1]
    free = torch.ones(size, size, dtype=torch.bool)
    objects: list[dict[str, Any]] = []
    for _ in range(rng.integers(_OBJECTS[0], _OBJECTS[1] + 1)):
        category = int(rng.integers(len(materials)))
        tile = tiles[int(rng.choice(materials[category]))][0]
        piece = recolor(tile.rot90(int(rng.integers(4)), (1, 2)), rng)
        for _ in range(_TRIES):
            mask = draw_shape(list(SHAPES)[int(rng.integers(len(SHAPES)))], size, rng)
            if bool((mask & ~free).any()):
                continue
            image[:, mask], free[mask] = piece[:, mask], False
            rows, columns = (mask.any(axis).nonzero().flatten().tolist() for axis in (1, 0))
            box = [columns[0], rows[0], columns[-1] + 1 - columns[0], rows[-1] + 1 - rows[0]]
            encoded = run_lengths.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
            segmentation = {"size": [size, size], "counts": encoded["counts"].decode()}
            objects.append(
                {"category_id": category + 1, "bbox": box, "area": int(mask.sum()), "segmentation": segmentation}
            )
            break
    return image, objects


def draw_shape(name: str, size: int, rng: np.random.Generator) -> Tensor:
    """(S, S) bool: one of SHAPES, of random size, place and angle."""
    radius = size * rng.uniform(*_RADII)
    # Its corners may reach out of the image: large shapes would otherwise all be in the middle.
    x, y = rng.uniform(0.7 * radius, size - 0.7 * radius, size=2)
    angle = rng.uniform(0, 2 * math.pi)
    centers = torch.arange(size) + 0.5
    dx, dy = (centers - x)[None, :] / radius, (centers - y)[:, None] / radius  # (1, S), (S, 1)
    cos, sin = math.cos(angle), math.sin(angle)
    return SHAPES[name](cos * dx + sin * dy, cos * dy - sin * dx)


def recolor(image: Tensor, rng: np.random.Generator) -> Tensor:
    """The gray levels of an image (3, S, S) uint8, along a line through a random color in a random direction."""
    gray = image.double().mean(0)
    gray = (gray - gray.mean()) / (gray.std() + 8)  # what is almost flat stays so
    base = rng.uniform(*_BASE, size=(3, 1, 1))
    direction = rng.normal(size=(3, 1, 1))
    direction *= rng.uniform(*_CONTRAST) / np.abs(direction).max()
    return (torch.from_numpy(base) + torch.from_numpy(direction) * gray).clamp(0, 255).byte()
