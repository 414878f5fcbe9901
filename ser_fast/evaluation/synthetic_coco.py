"""A small detection set in COCO's format: colored, textured shapes pasted on photographs. Nothing is downloaded."""

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
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
# Each shape has a color of its own, so that a small head learns to tell them apart in minutes.
_COLORS = ((200, 60, 60), (60, 170, 60), (60, 60, 200), (200, 180, 60))
_SPREAD = 50  # of an object's color about its shape's
_RADII = (0.12, 0.28)  # of the image's side
_OBJECTS = (1, 4)  # in an image
_TINT = 0.75  # what an object's color covers of its texture
_TRIES = 20  # to place an object where it hides none


def write_shapes(folder: Path, *, seed: int = 0) -> None:
    """Write the set: train/ and val/ (PNG files), annotations/instances_train.json and instances_val.json (last).

    400 images to train on and 100 to validate, 128 x 128 pixels, each with one to four objects of the four SHAPES. No
    pixel of a photograph, as background or as texture, is in both parts.

    Args:
        folder: is made where it isn't there.
        seed: of the photographs, the shapes and their places.
    """
    for part, count in IMAGES.items():
        tiles = open_dataset("photos", train=part == "train", image_size=IMAGE_SIZE)
        rng = np.random.default_rng((seed, part == "train"))
        (folder / part).mkdir(parents=True, exist_ok=True)
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for number, tile in enumerate(rng.permutation(len(tiles))[:count].tolist()):
            image, objects = paste_shapes(tiles[tile][0], tiles, rng)
            name = f"{number:04}.png"
            write_png(image, str(folder / part / name))
            images.append({"id": number, "file_name": name, "height": IMAGE_SIZE, "width": IMAGE_SIZE})
            for pasted in objects:
                annotations.append({"id": len(annotations) + 1, "image_id": number, "iscrowd": 0, **pasted})
        categories = [{"id": number, "name": name} for number, name in enumerate(SHAPES, start=1)]
        text = json.dumps({"images": images, "annotations": annotations, "categories": categories})
        write_atomically(folder / "annotations" / f"instances_{part}.json", partial(Path.write_text, data=text))


def paste_shapes(
    background: Tensor, textures: ImageDataset, rng: np.random.Generator
) -> tuple[Tensor, list[dict[str, Any]]]:
    """One to four tinted pieces of other images, in random shapes, places, sizes and angles, none over another.

    Args:
        background: (3, S, S) uint8.
        textures: images (3, S, S) to cut the pieces from.
        rng: decides everything.

    Returns:
        (3, S, S) uint8 and, for each object, COCO's category_id (from 1, in the order of SHAPES), bbox (left, top,
        width, height) and area, in pixels and exact, and its mask as segmentation, in run lengths.
    """
    image, size = background.clone(), background.shape[-1]
    free = torch.ones(size, size, dtype=torch.bool)
    centers = torch.arange(size) + 0.5
    objects: list[dict[str, Any]] = []
    for _ in range(rng.integers(_OBJECTS[0], _OBJECTS[1] + 1)):
        category, texture = int(rng.integers(len(SHAPES))), textures[int(rng.integers(len(textures)))][0]
        color = torch.from_numpy(rng.integers(-_SPREAD, _SPREAD, size=(3, 1), endpoint=True))
        color += torch.tensor(_COLORS[category])[:, None]
        piece = (_TINT * color + (1 - _TINT) * texture.flatten(1)).byte().unflatten(1, (size, size))  # (3, S, S)
        for _ in range(_TRIES):
            radius = size * rng.uniform(*_RADII)
            x, y = rng.uniform(radius, size - radius, size=2)
            angle = rng.uniform(0, 2 * math.pi)
            dx, dy = (centers - x)[None, :] / radius, (centers - y)[:, None] / radius  # (1, S), (S, 1)
            cos, sin = math.cos(angle), math.sin(angle)
            mask = list(SHAPES.values())[category](cos * dx + sin * dy, cos * dy - sin * dx)  # (S, S)
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
