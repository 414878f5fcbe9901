"""Tiles of the photographs in scikit-image's wheel: pictures that need no download."""

import hashlib
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from ser_fast.data.listing import hash_entries
from ser_fast.data.pictures import Picture, to_rgb

# Left out of the files in scikit-image's wheel: motorcycle_right (its pixels are those of motorcycle_left: held-out
# tiles would leak), cell and clock_motion (featureless almost everywhere), microaneurysms and lfw_subset (too small),
# and what no camera took (chessboards, color, horse, logo, phantom and the tests of file formats).
PHOTOGRAPHS = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "chelsea.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "moon.png",
    "motorcycle_left.png",
    "page.png",
    "retina.jpg",
    "rocket.jpg",
    "text.png",
)


class Tile(NamedTuple):
    """The pixels [top, top + size) x [left, left + size) of photograph number `label`."""

    label: int
    top: int
    left: int
    size: int


class PhotoTiles:
    """Square tiles of the PHOTOGRAPHS in scikit-image's wheel; the label is the photograph. Nothing is downloaded.

    A photograph is cut into cells of about 3/2 the tiles' side, of which every fifth, a knight's move apart, is held
    out. Held-out tiles lie inside one such cell and training tiles touch none: no pixel is in both. Tiles of one part
    overlap, a third of their side apart. At image_size=64 there are 3752 training and 361 held-out tiles of 16 classes.

    Their side is image_size up to 128 pixels; there, photographs longer than 800 pixels (hubble_deep_field, retina) are
    halved so that they do not outnumber the others. Beyond 128, the tiles of a photograph are as large as it allows: a
    third of its width, its height and image_size at most.

    Args:
        train: the training tiles, else the held-out ones.
        image_size: their largest side, in pixels.
    """

    def __init__(self, *, train: bool, image_size: int) -> None:
        self.classes = [Path(name).stem for name in PHOTOGRAPHS]
        self.photographs: list[Tensor] = []  # uint8 (3, H, W) each
        self.tiles: list[Tile] = []
        for label, name in enumerate(PHOTOGRAPHS):
            with files("skimage").joinpath("data", name).open("rb") as file, Image.open(file) as image:
                halved = image_size <= 128 and max(image.size) > 800
                photograph = to_rgb(image.convert("RGB").reduce(2) if halved else image)
            _, height, width = photograph.shape
            side = min(image_size, height, width // 3)
            self.photographs.append(photograph)
            self.tiles += [
                Tile(label, top, left, side) for top, left in _tile_corners(height, width, train=train, size=side)
            ]
        self.longest: int | None = max(tile.size for tile in self.tiles)

    def __len__(self) -> int:
        return len(self.tiles)

    def read(self, index: int) -> Picture:
        label, top, left, size = self.tiles[index]
        return Picture(self.photographs[label][:, top : top + size, left : left + size].clone(), label, index)

    @property
    def labels(self) -> list[int]:
        return [tile.label for tile in self.tiles]

    def digest(self) -> str:
        return hash_entries(self.classes, self.tiles)

    def fingerprint(self) -> str:
        return hash_entries(
            [self.digest()], (hashlib.sha256(p.numpy().tobytes()).hexdigest() for p in self.photographs)
        )


def _tile_corners(height: int, width: int, *, train: bool, size: int) -> list[tuple[int, int]]:
    """The (top, left) of the tiles of one photograph, at least two cells wide."""
    cell, stride = size * 3 // 2, max(1, size // 3)
    rows, columns = max(1, height // cell), width // cell
    held = [  # (top, left, bottom, right) of the cells held out
        (i * height // rows, j * width // columns, (i + 1) * height // rows, (j + 1) * width // columns)
        for i in range(rows)
        for j in range(columns)
        if (2 * i + j) % 5 == 1  # one in five of each row and column; (0, 1) makes it at least one a photograph
    ]
    if not train:
        return [
            (y, x)
            for top, left, bottom, right in held
            for y in range(top, bottom - size + 1, stride)
            for x in range(left, right - size + 1, stride)
        ]
    return [
        (y, x)
        for y in range(0, height - size + 1, stride)
        for x in range(0, width - size + 1, stride)
        if not any(y < bottom and y + size > top and x < right and x + size > left for top, left, bottom, right in held)
    ]
