"""Image sets that test robustness: generated, or read as ImageNet-C, -P, -V2, -R, -Sketch and CIFAR-10-C, -P are."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2.functional import resize

from ser_fast.data import MAX_PIXELS
from ser_fast.data.loader import make_loader
from ser_fast.data.sources import ImageFolder, Squares
from ser_fast.evaluation.classification import Classification, grade, rank
from ser_fast.evaluation.corruptions import CORRUPTIONS, PERTURBATIONS, SEVERITIES, corrupt, perturb
from ser_fast.evaluation.protocol import tell_skipped

CLEAN = "clean"

Classifier = Callable[[Tensor], Tensor]
"""uint8 images (B, 3, S, S) to scores (B, K)."""
Batches = Iterable[tuple[Tensor, Tensor]]
"""uint8 images (B, 3, S, S) and labels (B,)."""
ImageSet = tuple[str, int, Batches]
"""A kind of corruption, its severity (1 to 5; 0 for clean images), and the images."""
SequenceSet = tuple[str, Iterable[Tensor]]
"""A kind of perturbation, and its sequences of frames (F, 3, S, S) uint8."""


def clean_images(images: Tensor, labels: Tensor, *, batch_size: int = 256) -> ImageSet:
    """The set ("clean", 0) of images as they are.

    Args:
        images: (N, 3, S, S) uint8.
        labels: (N,) int64.
        batch_size: images at a time.
    """
    return CLEAN, 0, zip(images.split(batch_size), labels.split(batch_size), strict=True)


def generate_corruptions(images: Tensor, labels: Tensor, *, seed: int = 0, batch_size: int = 256) -> Iterator[ImageSet]:
    """A set for each kind at each severity.

    Args:
        images: (N, 3, S, S) uint8.
        labels: (N,) int64.
        seed: of the first image; each next one has the next.
        batch_size: images at a time.
    """

    def batches(kind: str, severity: int) -> Batches:
        for rows in torch.arange(len(images)).split(batch_size):
            yield torch.stack([corrupt(images[i], kind, severity, seed=seed + i) for i in rows.tolist()]), labels[rows]

    for kind in CORRUPTIONS:
        for severity in SEVERITIES:
            yield kind, severity, batches(kind, severity)


def generate_perturbations(images: Tensor, *, seed: int = 0) -> Iterator[SequenceSet]:
    """Each kind, with a sequence for each image.

    Args:
        images: (N, 3, S, S) uint8.
        seed: of the first image; each next one has the next.
    """

    def sequences(kind: str) -> Iterator[Tensor]:
        for i, image in enumerate(images):
            yield perturb(image, kind, seed=seed + i)

    for kind in PERTURBATIONS:
        yield kind, sequences(kind)


def read_corruptions(
    folder: Path,
    classes: Sequence[str],
    *,
    image_size: int,
    batch_size: int = 256,
    workers: int = 0,
    max_pixels: int = MAX_PIXELS,
) -> Iterator[ImageSet]:
    """Read corrupted images in a published layout.

    ImageNet-C: kind/severity/class/image, classes by name as in `ClassFolder`. CIFAR-10-C: kind.npy, (5 N, S, S, 3)
    uint8, its fifths the severities, and labels.npy, numbered as `classes`.

    Args:
        folder: in one of these layouts.
        classes: the names of the training classes.
        image_size: side that the images are resized to, in pixels.
        batch_size: images at a time.
        workers: processes that load images.
        max_pixels: of one picture; one of more is unreadable.

    Raises:
        ValueError: neither of these, arrays of other shapes, or classes that are unknown.
    """
    if (folder / "labels.npy").is_file():
        labels = torch.from_numpy(np.load(folder / "labels.npy").astype(np.int64))
        for path in sorted(set(folder.glob("*.npy")) - {folder / "labels.npy"}):
            array = np.load(path, mmap_mode="r")
            if array.ndim != 4 or len(array) != len(labels) or len(array) % 5:
                raise ValueError(
                    f"corrupted: got {array.shape} in {path}, takes (5 N, S, S, 3), 5 N the {len(labels)} labels"
                )
            fifth = len(array) // 5
            for severity in SEVERITIES:
                part = slice((severity - 1) * fifth, severity * fifth)
                yield path.stem, severity, _array_batches(array[part], labels[part], image_size, batch_size)
        return
    paths = [path for path in sorted(folder.glob("*/[1-5]")) if path.is_dir()]
    if not paths:
        raise ValueError(f"corrupted: got {folder}, takes a folder of kind/severity/class, or kind.npy and labels.npy")
    for path in paths:
        images = ClassFolder(path, classes, image_size=image_size, max_pixels=max_pixels)
        yield path.parent.name, int(path.name), _then_tell(images.batches(batch_size, workers), images.images)


def read_perturbations(folder: Path, *, image_size: int) -> Iterator[SequenceSet]:
    """Read perturbation sequences in a published layout.

    ImageNet-P: kind/class/name.mp4, a video a sequence, decoded by PyAV (the package `av`, which is not among the
    dependencies). CIFAR-10-P: kind.npy, (N, F, S, S, 3) uint8.

    Args:
        folder: in one of these layouts.
        image_size: side that the frames are resized to, in pixels.

    Raises:
        ValueError: neither of these, an array of another shape, or videos where PyAV is not installed.
    """
    videos = find_videos(folder)
    arrays = sorted(folder.glob("*.npy"))
    if not videos and not arrays:
        raise ValueError(f"perturbed: got {folder}, takes a folder of kind/class/name.mp4 or kind.npy")
    for kind, paths in videos.items():
        yield kind, map(partial(_read_video, size=image_size), paths)
    for path in arrays:
        array = np.load(path, mmap_mode="r")
        if array.ndim != 5 or array.shape[-1] != 3:
            raise ValueError(f"perturbed: got {array.shape} in {path}, takes (N, F, S, S, 3)")
        yield path.stem, map(partial(_resized, size=image_size), array)


def find_videos(folder: Path) -> dict[str, list[Path]]:
    """The videos kind/class/name.mp4 of a folder, by kind."""
    videos: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*/*/*.mp4")):
        videos.setdefault(path.parent.parent.name, []).append(path)
    return videos


def _read_video(path: Path, *, size: int) -> Tensor:
    """The frames of a video, (F, 3, size, size) uint8."""
    try:
        import av
    except ImportError as error:
        raise ValueError(
            f"perturbed: got the video {path}, takes PyAV to read it, which is not installed: "
            "pip install 'ser-fast[eval]'"
        ) from error
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]  # each (S, S, 3)
    return _resized(frames, size)


class ClassFolder:
    """Images of some of the training classes: one folder a class, named as in training (ImageNet-R, -Sketch) or by the
    class's number there (ImageNet-V2).

    Args:
        folder: of one folder a class.
        classes: the names of the training classes.
        image_size: side that the images are resized to, in pixels.
        crop_pct: share of a picture's shorter side that the images show.
        max_pixels: of one picture; one of more is unreadable.

    Attributes:
        name: the folder's.
        indices: (k,) the training classes that it has.

    Raises:
        ValueError: a folder that is no training class, or no readable image.
    """

    def __init__(
        self,
        folder: Path,
        classes: Sequence[str],
        *,
        image_size: int,
        crop_pct: float = 1.0,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        if not folder.is_dir():
            raise ValueError(f"shifted: got {folder}, and there is no such folder")
        self.name = folder.resolve().name
        self.images = Squares(ImageFolder(folder, train=True, max_pixels=max_pixels), image_size, crop_pct=crop_pct)
        names = self.images.classes
        numbers = {name: index for index, name in enumerate(classes)}
        if not set(names) <= set(numbers) and all(name.isdecimal() and int(name) < len(classes) for name in names):
            numbers = {name: int(name) for name in names}
        if not names:
            raise ValueError(f"shifted: got {folder}, takes a folder with one folder a class")
        if unknown := sorted(set(names) - set(numbers)):
            raise ValueError(f"shifted: got {folder} with {', '.join(unknown)}, takes folders of training classes")
        self.indices = torch.tensor([numbers[name] for name in names])

    def batches(self, batch_size: int, workers: int) -> Batches:
        """Images (B, 3, S, S) uint8, and labels (B,) as in training."""
        loader = make_loader(self.images, batch_size=batch_size, train=False, workers=workers)
        return ((batch.images, self.indices[batch.labels]) for batch in loader)

    def grade(self, classify: Classifier, *, batch_size: int = 256, workers: int = 0) -> Classification:
        """How a classifier does among the folder's classes alone, as ImageNet-R's protocol has it."""
        ranked, labels, classes = [], [], 0
        for images, batch_labels in self.batches(batch_size, workers):
            scores = classify(images).cpu()
            classes = scores.shape[1]
            within = torch.full_like(scores, -torch.inf)
            within[:, self.indices] = scores[:, self.indices]
            ranked.append(rank(within))
            labels.append(batch_labels)
        return grade(torch.cat(ranked), torch.cat(labels), classes)


def _then_tell(batches: Batches, images: Squares) -> Batches:
    """The batches; at their end, what could not be read is logged."""
    yield from batches
    tell_skipped(images)


def _array_batches(array: Any, labels: Tensor, image_size: int, batch_size: int) -> Batches:
    for start in range(0, len(array), batch_size):
        part = slice(start, start + batch_size)
        yield _resized(array[part], image_size), labels[part]


def _resized(array: Any, size: int) -> Tensor:
    """(B, S, S, 3) -> (B, 3, size, size)"""
    return resize(torch.from_numpy(np.array(array)).permute(0, 3, 1, 2), [size, size], antialias=True)
