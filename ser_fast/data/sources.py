"""What can be opened as images: fixed square uint8 tensors with a label.

Augmentation is not done here: ser_fast.views applies it to whole batches on the device.
"""

import hashlib
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.datasets import CIFAR10
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset
from torchvision.transforms.v2 import functional as transforms

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


class UnreadableImageError(Exception):
    """An image file that cannot be decoded.

    Attributes:
        path: of the file.
        reason: what the decoder said.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason


class ImageDataset(Protocol):
    """What open_dataset returns: item i is (image uint8 (3, S, S), label, i).

    Attributes:
        image_size: S, in pixels.
        classes: their names, in the order of the labels; none where images have no label (-1).
        skipped: (path, reason) of the files that the loaders of make_loader could not read, each once.

    Raises:
        UnreadableImageError: an item whose file cannot be decoded.
    """

    image_size: int
    classes: list[str]
    skipped: list[tuple[str, str]]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]: ...

    def digest(self) -> str:
        """A hash of what the data set lists, and in which order: another one, other data."""


def open_dataset(source: str, *, train: bool, image_size: int) -> ImageDataset:
    """Open the training images or the held-out images of a source.

    Args:
        source: "photos" (tiles of photographs that scikit-image carries, see `PhotoTiles`), "folder:PATH" (see
            `ImageFolder`) or "cifar10:PATH" (PATH holds torchvision's cifar-10-batches-py, or an image folder with
            train/ and test/).
        train: the training images, else the held-out ones.
        image_size: the side of the square images, in pixels.

    Returns:
        A dataset whose item i is (image uint8 (3, S, S), label, i).

    Raises:
        ValueError: the source is none of these, is missing, holds no readable image or no held-out part, or its
            photographs are too small for image_size.

    Example:
        >>> dataset = open_dataset("photos", train=True, image_size=64)
        >>> image, label, index = dataset[0]  # uint8 (3, 64, 64), 0, 0
        >>> dataset.classes[label]
        'astronaut'
    """
    if image_size < 1:
        raise ValueError(f"image_size: got {image_size}, takes a positive number")
    kind, _, location = source.partition(":")
    if source == "photos":
        return PhotoTiles(train=train, image_size=image_size)
    if kind not in ("folder", "cifar10") or not location:
        raise ValueError(f"data: got {source!r}, takes 'photos', 'folder:PATH' or 'cifar10:PATH'")
    path = Path(location).expanduser().resolve()
    if not path.is_dir():
        raise ValueError(f"data: got {source!r}, and there is no folder {path}")
    if kind == "folder":
        return ImageFolder(path, train=train, image_size=image_size)
    if (path / CIFAR10.base_folder).is_dir():
        return Cifar10(path, train=train, image_size=image_size)
    if not (path / "train").is_dir() or not (path / "test").is_dir():
        raise ValueError(f"data: got {source!r}, takes a folder with {CIFAR10.base_folder}/, or train/ and test/")
    return ImageFolder(path, train=train, image_size=image_size)


class Tile(NamedTuple):
    """The pixels [top, top + size) x [left, left + size) of photograph number `label`."""

    label: int
    top: int
    left: int
    size: int


class PhotoTiles:
    """Square tiles of the PHOTOGRAPHS in scikit-image's wheel; the label is the photograph. Nothing is downloaded.

    A photograph is cut into cells of about 3/2 image_size, of which every fifth, a knight's move apart, is held out.
    Held-out tiles lie inside one such cell and training tiles touch none: no pixel is in both. Tiles of one part
    overlap, a third of their side apart. At image_size=64 there are 3752 training and 361 held-out tiles of 16 classes.
    Photographs longer than 800 pixels (hubble_deep_field, retina) are halved so that they do not outnumber the others.

    Args:
        train: the training tiles, else the held-out ones.
        image_size: their side, up to 128 pixels.

    Raises:
        ValueError: a photograph is too small to give both training and held-out tiles.
    """

    def __init__(self, *, train: bool, image_size: int) -> None:
        self.image_size = image_size
        self.classes = [Path(name).stem for name in PHOTOGRAPHS]
        self.skipped: list[tuple[str, str]] = []
        self.photographs: list[Tensor] = []  # uint8 (3, H, W) each
        self.tiles: list[Tile] = []
        for label, name in enumerate(PHOTOGRAPHS):
            with files("skimage").joinpath("data", name).open("rb") as file:
                photograph = _decode_rgb(Image.open(file))
            if max(photograph.size) > 800:
                photograph = photograph.reduce(2)
            corners = _tile_corners(photograph.height, photograph.width, train=train, size=image_size)
            if not corners:
                raise ValueError(
                    f"image_size: got {image_size}, takes 128 at most for 'photos': {name} has {photograph.size} pixels"
                )
            self.photographs.append(transforms.pil_to_tensor(photograph))
            self.tiles += [Tile(label, top, left, image_size) for top, left in corners]

    def __len__(self) -> int:
        return len(self.tiles)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        label, top, left, size = self.tiles[index]
        return self.photographs[label][:, top : top + size, left : left + size].clone(), label, index

    def digest(self) -> str:
        return _hash(self.classes, self.tiles)


def _tile_corners(height: int, width: int, *, train: bool, size: int) -> list[tuple[int, int]]:
    """The (top, left) of the tiles of one photograph; none where it has fewer than two cells in a row."""
    cell, stride = size * 3 // 2, max(1, size // 3)
    rows, columns = max(1, height // cell), width // cell
    if height < size or columns < 2:
        return []
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


class ImageFolder:
    """Image files below a folder, each resized (shorter side, antialiased) and center-cropped to image_size.

    Grey, palette, CMYK, 16-bit and transparent files become 8-bit RGB, turned upright by their EXIF orientation.

    Args:
        path: holds one folder a class, or image files alone (label -1, no classes), or either of these below train/
            and val/ (else test/). Held-out images need val/ or test/; their labels follow the class folders of train/.
        train: the training images, else the held-out ones.
        image_size: the side of the images, in pixels.

    Raises:
        ValueError: the folder has no held-out part, classes unknown to train/ or no readable image.

    Source: torchvision.datasets.ImageFolder, for the layout and the file name extensions.
    """

    def __init__(self, path: Path, *, train: bool, image_size: int) -> None:
        self.image_size = image_size
        self.skipped: list[tuple[str, str]] = []
        wanted = ("train",) if train else ("val", "test")
        parts = [path / name for name in wanted if (path / name).is_dir()]
        if not parts and (not train or any((path / name).is_dir() for name in ("val", "test"))):
            raise ValueError(f"data: got {path}, takes a folder that holds one named {' or '.join(wanted)}")
        folder = parts[0] if parts else path
        names = path / "train" if (path / "train").is_dir() else folder
        self.classes = _class_folders(names)
        if unknown := sorted(set(_class_folders(folder)) - set(self.classes)):
            raise ValueError(f"data: got {', '.join(unknown)} in {folder}, takes the classes of {names}")
        parent, labels = folder, {name: label for label, name in enumerate(self.classes)}
        if not self.classes:
            parent, labels = folder.parent, {folder.name: -1}
        self.folder = folder
        self.files = make_dataset(parent, labels, extensions=IMG_EXTENSIONS, allow_empty=True)  # (path, label) each
        if not any(self._is_readable(index) for index in range(len(self.files))):
            accepted = ", ".join(IMG_EXTENSIONS)
            raise ValueError(
                f"data: got {folder} without a readable image among {len(self.files)} files, takes {accepted}"
            )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        path, label = self.files[index]
        try:
            with Image.open(path) as file:
                image = _decode_rgb(file)
        except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error and more
            raise UnreadableImageError(path, f"{type(error).__name__}: {error}") from error
        return _square(transforms.pil_to_tensor(image), self.image_size), label, index

    def digest(self) -> str:
        sizes = ((str(Path(path).relative_to(self.folder)), Path(path).stat().st_size) for path, _ in self.files)
        return _hash(self.classes, sizes)

    def _is_readable(self, index: int) -> bool:
        try:
            self[index]
        except UnreadableImageError:
            return False
        return True


def _class_folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


class Cifar10:
    """CIFAR-10 as torchvision stores it; the test set is held out.

    Args:
        path: the folder that holds cifar-10-batches-py.
        train: the training images, else the test set.
        image_size: the side of the images in pixels; resized where it is not 32.

    Raises:
        ValueError: its files are incomplete or damaged.

    Source: torchvision.datasets.CIFAR10.
    """

    def __init__(self, path: Path, *, train: bool, image_size: int) -> None:
        try:
            self.cifar = CIFAR10(path, train=train, download=False)
        except RuntimeError as error:
            raise ValueError(f"data: got {path / CIFAR10.base_folder}, incomplete or damaged") from error
        self.image_size = image_size
        self.classes: list[str] = self.cifar.classes
        self.skipped: list[tuple[str, str]] = []

    def __len__(self) -> int:
        return len(self.cifar)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        image = torch.from_numpy(self.cifar.data[index]).permute(2, 0, 1).contiguous()  # uint8 (3, 32, 32)
        return _square(image, self.image_size), self.cifar.targets[index], index

    def digest(self) -> str:
        return _hash(self.classes, [self.cifar.targets, hashlib.sha256(self.cifar.data.tobytes()).hexdigest()])


def _hash(classes: list[str], entries: Iterable[Any]) -> str:
    digest = hashlib.sha256(repr(classes).encode())
    for entry in entries:
        digest.update(repr(entry).encode())
    return digest.hexdigest()


def _decode_rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip at 255; PIL's 16-bit RGB is 8-bit already
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    if image.mode == "P":
        image = image.convert("RGBA")  # PIL warns where a palette with transparency becomes RGB directly
    return image.convert("RGB")


def _square(image: Tensor, size: int) -> Tensor:
    """(3, H, W) -> (3, size, size)"""
    if image.shape[1:] == (size, size):
        return image
    return transforms.center_crop(transforms.resize(image, [size], antialias=True), [size, size])
