"""What can be opened: sources of pictures of any size, and their pictures as squares of one size with a label.

Augmentation is not done here: ser_fast.views cuts and colors whole batches on the device.
"""

import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torchvision.datasets import CIFAR10
from torchvision.datasets.folder import IMG_EXTENSIONS

from ser_fast.data import MAX_PIXELS
from ser_fast.data.hugging_face import HuggingFace
from ser_fast.data.listing import hash_entries, list_files, stamp
from ser_fast.data.photo_tiles import PhotoTiles
from ser_fast.data.pictures import (
    Picture,
    UnreadableImageError,
    read_image,
    to_canvas,
    to_square,
)
from ser_fast.data.python_function import PythonFunction
from ser_fast.data.shards import TarShards

_logger = logging.getLogger(__name__)

CIFAR10_SIDE = 32
# Of the views' side: 512 for 224, which keeps every pixel of a picture of 500 x 375.
_CANVAS = 16 / 7
_CHECKED = 16  # a folder of more images is not looked into before the first batch


class Source(Protocol):
    """An indexable set of pictures, each of its own size.

    Attributes:
        classes: their names, in the order of the labels; none where pictures have no label (-1).
        longest: the longest side of any of its pictures, in pixels; None where that isn't known unless all are decoded.
        labels: of all pictures, -1 for none; None where they aren't known unless all are read.
    """

    classes: list[str]
    longest: int | None

    @property
    def labels(self) -> Sequence[int] | None: ...

    def __len__(self) -> int: ...

    def read(self, index: int) -> Picture:
        """Picture number `index`.

        Raises:
            UnreadableImageError: it cannot be decoded.
        """

    def digest(self) -> str:
        """A hash of what the source lists, and in which order: another one, other data."""

    def fingerprint(self) -> str:
        """A hash of the pictures and labels themselves, or of what changes with them, as the times of files do.

        Unlike the digest, it is another one where the same data lie elsewhere.
        """


class ImageDataset(Protocol):
    """What make_loader reads: item i is (image uint8 (3, S, S), label, i), or these and the picture's aspect.

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

    def __getitem__(self, index: int) -> tuple[Any, ...]: ...

    def digest(self) -> str:
        """A hash of what the data set lists, and in which order: another one, other data."""


class Squares:
    """A source's pictures made square, in the one place where that is done.

    Item i is (image uint8 (3, S, S), label, i), and on a canvas also the picture's aspect, width over height.

    Args:
        source: gives the pictures.
        image_size: S, in pixels.
        canvas: True stretches the whole picture; False resizes it and crops the center.
        crop_pct: without a canvas, the crop's share of the picture's shorter side.

    Attributes:
        classes: the source's.
        skipped: (path, reason) of the files that the loaders could not read, each once.
    """

    def __init__(self, source: Source, image_size: int, *, canvas: bool = False, crop_pct: float = 1.0) -> None:
        self.source, self.image_size, self.canvas, self.crop_pct = source, image_size, canvas, crop_pct
        self.classes = source.classes
        self.skipped: list[tuple[str, str]] = []

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        picture = self.source.read(index)
        if self.canvas:
            return to_canvas(picture.pixels, self.image_size), picture.label, index, picture.aspect
        return to_square(picture.pixels, self.image_size, crop_pct=self.crop_pct), picture.label, index

    @property
    def labels(self) -> Sequence[int] | None:
        """The source's."""
        return self.source.labels

    def digest(self) -> str:
        """The source's."""
        return self.source.digest()

    def fingerprint(self) -> str:
        """A hash of the pictures and of what is made of them."""
        made = [self.image_size, self.canvas, self.crop_pct, getattr(self.source, "max_pixels", None)]
        return hash_entries([type(self.source).__name__, self.source.fingerprint()], made)

    def locate(self, index: int) -> str:
        """Where picture number `index` is read from, where the source can say it."""
        locate = getattr(self.source, "locate", None)
        return locate(index) if locate else f"picture {index}"


def open_dataset(
    source: str, *, train: bool, image_size: int, crop_pct: float = 1.0, max_pixels: int = MAX_PIXELS
) -> Squares:
    """Open the training images or the held-out images of a source, as squares cut from their center.

    Args:
        source: as `open_source` takes it.
        train: the training images, else the held-out ones.
        image_size: the side of the square images, in pixels.
        crop_pct: the crop's share of the picture's shorter side: 1 is all of it, 0.875 what ImageNet's protocol has.
        max_pixels: of one picture; one of more is unreadable.

    Returns:
        A dataset whose item i is (image uint8 (3, S, S), label, i).

    Raises:
        ValueError: as `open_source`, or a crop_pct outside (0, 1].

    Example:
        >>> dataset = open_dataset("photos", train=True, image_size=64)
        >>> image, label, index = dataset[0]  # uint8 (3, 64, 64), 0, 0
        >>> dataset.classes[label]
        'astronaut'
    """
    if not 0 < crop_pct <= 1:
        raise ValueError(f"crop_pct: got {crop_pct}, takes a number in (0, 1]")
    pictures = open_source(source, train=train, image_size=image_size, max_pixels=max_pixels)
    return Squares(pictures, image_size, crop_pct=crop_pct)


def open_canvases(
    source: str, *, train: bool, image_size: int, canvas: int | None = None, max_pixels: int = MAX_PIXELS
) -> Squares:
    """Open a source's pictures, each stretched on a square canvas, for views that are cut from it.

    Args:
        source: as `open_source` takes it.
        train: the training images, else the held-out ones.
        image_size: the side of the views, in pixels.
        canvas: the side of the canvas; default 16/7 of the views' (512 for 224), or the longest side of the source's
            pictures where that is known to be less.
        max_pixels: of one picture; one of more is unreadable.

    Returns:
        A dataset whose item i is (canvas uint8 (3, K, K), label, i, aspect).

    Raises:
        ValueError: as `open_source`, or a canvas that isn't positive.
    """
    if canvas is not None and canvas < 1:
        raise ValueError(f"canvas: got {canvas}, takes a positive number of pixels")
    pictures = open_source(source, train=train, image_size=image_size, max_pixels=max_pixels)
    if canvas is None:
        canvas = default_canvas(image_size)
        canvas = canvas if pictures.longest is None else min(canvas, pictures.longest)
    return Squares(pictures, canvas, canvas=True)


def default_canvas(image_size: int) -> int:
    """The side of the canvas of large pictures for views of a side, in pixels."""
    return round(image_size * _CANVAS)


def open_source(source: str, *, train: bool, image_size: int, max_pixels: int = MAX_PIXELS) -> Source:
    """Open the training pictures or the held-out pictures of a source, each of its own size.

    Args:
        source: "photos" (tiles of photographs that scikit-image carries, see `PhotoTiles`), "folder:PATH" (see
            `ImageFolder`), "cifar10:PATH" (PATH holds torchvision's cifar-10-batches-py, or an image folder with
            train/ and test/), "tar:PATTERN" (`TarShards`), "hf:PATH_OR_NAME" (`HuggingFace`) or
            "python:MODULE:FUNCTION" (`PythonFunction`).
        train: the training pictures, else the held-out ones.
        image_size: what the side of the images or views made of them will be, in pixels.
        max_pixels: of one picture; one of more is unreadable.

    Raises:
        ValueError: the source is none of these, is missing, or holds no readable image or no held-out part.
    """
    if image_size < 1:
        raise ValueError(f"image_size: got {image_size}, takes a positive number")
    if not 1 <= max_pixels <= MAX_PIXELS:
        raise ValueError(f"max_pixels: got {max_pixels}, takes 1 to {MAX_PIXELS}")
    kind, _, location = source.partition(":")
    if source == "photos":
        return PhotoTiles(train=train, image_size=image_size)
    if kind not in SOURCES or not location:
        raise ValueError(
            f"data: got {source!r}, takes 'photos', 'folder:PATH', 'cifar10:PATH', 'tar:PATTERN', 'hf:PATH_OR_NAME' or "
            "'python:MODULE:FUNCTION'"
        )
    return SOURCES[kind](source, location, train=train, max_pixels=max_pixels)


def _open_folder(source: str, location: str, *, train: bool, max_pixels: int) -> Source:
    return ImageFolder(_existing_folder(source, location), train=train, max_pixels=max_pixels)


def _open_cifar10(source: str, location: str, *, train: bool, max_pixels: int) -> Source:
    path = _existing_folder(source, location)
    if (path / CIFAR10.base_folder).is_dir():
        return Cifar10(path, train=train)
    if not (path / "train").is_dir() or not (path / "test").is_dir():
        raise ValueError(f"data: got {source!r}, takes a folder with {CIFAR10.base_folder}/, or train/ and test/")
    return ImageFolder(path, train=train, max_pixels=max_pixels, longest=CIFAR10_SIDE)


def _existing_folder(source: str, location: str) -> Path:
    path = Path(location).expanduser().resolve()
    if not path.is_dir():
        raise ValueError(f"data: got {source!r}, and there is no folder {path}")
    return path


SOURCES: dict[str, Callable[..., Source]] = {
    "folder": _open_folder,
    "cifar10": _open_cifar10,
    "tar": TarShards,
    "hf": HuggingFace,
    "python": PythonFunction,
}
"""What opens "KIND:LOCATION": called with both, the location, train and max_pixels."""


class ImageFolder:
    """Image files below a folder.

    Args:
        path: holds one folder a class, or image files alone (label -1, no classes), or either of these below train/
            and val/ (else test/). Held-out images need val/ or test/, and their labels follow the class folders of
            train/; image files alone are held out as well, all of them. Links are followed, as `list_files` does.
        train: the training images, else the held-out ones.
        max_pixels: of one picture; one of more is unreadable.
        longest: the longest side of any of them, where that is known.

    Attributes:
        files: (path, label) of each.

    Raises:
        ValueError: the folder has no held-out part, classes unknown to train/, images beside its class folders or no
            readable image. Only the first _CHECKED images are decoded to find that out, of a folder that has no more.

    Source: torchvision.datasets.ImageFolder, for the layout and the file name extensions.
    """

    def __init__(self, path: Path, *, train: bool, max_pixels: int = MAX_PIXELS, longest: int | None = None) -> None:
        self.max_pixels, self.longest = max_pixels, longest
        wanted = ("train",) if train else ("val", "test")
        parts = [path / name for name in wanted if (path / name).is_dir()]
        elsewhere = any((path / name).is_dir() for name in ("train", "val", "test"))
        if not parts and (elsewhere or (not train and _class_folders(path))):
            other = "" if train else ", or the images of another source: folder:OTHER"
            raise ValueError(f"data: got {path}, takes a folder that holds one named {' or '.join(wanted)}{other}")
        folder = parts[0] if parts else path
        names = path / "train" if (path / "train").is_dir() else folder
        self.classes = _class_folders(names)
        if unknown := sorted(set(_class_folders(folder)) - set(self.classes)):
            raise ValueError(f"data: got {', '.join(unknown)} in {folder}, takes the classes of {names}")
        self.folder = folder
        labelled = [(folder / name, label) for label, name in enumerate(self.classes) if (folder / name).is_dir()]
        if self.classes and (loose := _count_images(folder)):
            where = f"{loose} image{'s' * (loose > 1)} in {folder}"
            if not labelled:
                raise ValueError(
                    f"data: got {where} and none in folders of the classes {', '.join(self.classes[:3])} of {names}, "
                    f"takes each image in the folder of its class; folder:{folder} takes these without classes"
                )
            raise ValueError(
                f"data: got {where} beside the folder{'s' * (len(labelled) > 1)} "
                f"{', '.join(part.name for part, _ in labelled[:3])}, takes images in class folders, or images alone"
            )
        if folder != path and (loose := _count_images(path)):
            _logger.warning("data: %d images in %s lie beside its folder %s and are left out", loose, path, folder.name)
        known = [folder, *(part for part, _ in labelled)]
        self.files = [
            (file, label)
            for part, label in labelled or [(folder, -1)]
            for file in list_files(part, IMG_EXTENSIONS, known=known)
        ]
        if len(self.files) <= _CHECKED and not any(self._is_readable(index) for index in range(len(self.files))):
            accepted = ", ".join(IMG_EXTENSIONS)
            raise ValueError(
                f"data: got {folder} without a readable image among {len(self.files)} files, takes {accepted}"
            )

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> Picture:
        path, label = self.files[index]
        return Picture(read_image(path, max_pixels=self.max_pixels), label, index)

    def locate(self, index: int) -> str:
        """Its path."""
        return self.files[index][0]

    def digest(self) -> str:
        return hash_entries(
            self.classes, ((str(Path(path).relative_to(self.folder)), _size(path)) for path, _ in self.files)
        )

    @property
    def labels(self) -> list[int]:
        return [label for _, label in self.files]

    def fingerprint(self) -> str:
        return hash_entries([self.digest()], (stamp(path) for path, _ in self.files))

    def _is_readable(self, index: int) -> bool:
        try:
            self.read(index)
        except UnreadableImageError:
            return False
        return True


def _size(path: str) -> int:
    """In bytes; -1 of a link to nothing."""
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


def _count_images(folder: Path) -> int:
    """The image files in a folder, not below it."""
    with os.scandir(folder) as entries:
        return sum(
            entry.name.lower().endswith(IMG_EXTENSIONS) and not entry.name.startswith(".") and os.path.isfile(entry)
            for entry in entries
        )


def _class_folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


class Cifar10:
    """CIFAR-10 as torchvision stores it; the test set is held out.

    Args:
        path: the folder that holds cifar-10-batches-py.
        train: the training images, else the test set.

    Raises:
        ValueError: its files are incomplete or damaged.

    Source: torchvision.datasets.CIFAR10.
    """

    def __init__(self, path: Path, *, train: bool) -> None:
        try:
            self.cifar = CIFAR10(path, train=train, download=False)
        except RuntimeError as error:
            raise ValueError(f"data: got {path / CIFAR10.base_folder}, incomplete or damaged") from error
        self.classes: list[str] = self.cifar.classes
        self.longest: int | None = CIFAR10_SIDE

    def __len__(self) -> int:
        return len(self.cifar)

    def read(self, index: int) -> Picture:
        pixels = torch.from_numpy(self.cifar.data[index]).permute(2, 0, 1).contiguous()  # uint8 (3, 32, 32)
        return Picture(pixels, self.cifar.targets[index], index)

    @property
    def labels(self) -> list[int]:
        return self.cifar.targets

    def digest(self) -> str:
        return hash_entries(self.classes, [self.cifar.targets, hashlib.sha256(self.cifar.data.tobytes()).hexdigest()])

    def fingerprint(self) -> str:
        return self.digest()
