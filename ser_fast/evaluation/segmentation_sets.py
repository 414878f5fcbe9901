"""Images with a class for every pixel: folders as Pascal VOC has them, and masks of objects as COCO has them."""

from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ser_fast.data import MAX_PIXELS
from ser_fast.data.pictures import UnreadableImageError, read_image
from ser_fast.evaluation.coco import CocoFolder

IGNORED = 255
"""The class of pixels that count nowhere."""
VOC_CLASSES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)


class Segmented(NamedTuple):
    """A picture and its mask.

    Attributes:
        image: (3, H, W) uint8.
        mask: (H, W) uint8, the class of each pixel, or IGNORED.
    """

    image: Tensor
    mask: Tensor


class SegmentationSet(Protocol):
    """Pictures of any size with masks.

    Attributes:
        classes: the names of the K classes, in the order of the masks' numbers.
    """

    classes: list[str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Segmented:
        """Picture number `index` and its mask.

        Raises:
            ValueError: a file that can't be read, a mask of another size, or one with a class that isn't there.
        """


class VocFolder:
    """A folder as Pascal VOC has it.

    JPEGImages/NAME.jpg and SegmentationClass/NAME.png (a palette or gray levels, whose numbers are the classes, 255
    ignored) for each NAME that ImageSets/Segmentation/train.txt or val.txt lists. The classes are VOC's 21, or the
    lines of a file classes.txt.

    Args:
        folder: of these.
        train: which of the two lists.
        max_pixels: of one picture; one of more can't be read.

    Raises:
        ValueError: there is no such list, it is empty, or a file that it names is missing.
    """

    def __init__(self, folder: Path, *, train: bool, max_pixels: int = MAX_PIXELS) -> None:
        self.max_pixels = max_pixels
        listing = folder / "ImageSets" / "Segmentation" / f"{'train' if train else 'val'}.txt"
        if not listing.is_file():
            raise ValueError(f"data: got {folder}, which has no {listing.relative_to(folder)}")
        names = listing.read_text().split()
        if not names:
            raise ValueError(f"data: got {listing}, which lists no images")
        named = folder / "classes.txt"
        self.classes = named.read_text().split("\n") if named.is_file() else list(VOC_CLASSES)
        self.classes = [name.strip() for name in self.classes if name.strip()]
        if not 1 < len(self.classes) <= IGNORED:
            raise ValueError(f"data: got {len(self.classes)} classes in {named}, takes 2 to {IGNORED}")
        self.files = [
            (folder / "JPEGImages" / f"{name}.jpg", folder / "SegmentationClass" / f"{name}.png") for name in names
        ]
        missing = [file for pair in self.files for file in pair if not file.is_file()]
        if missing:
            raise ValueError(f"data: got {len(missing)} missing files that {listing} lists, the first {missing[0]}")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Segmented:
        image_file, mask_file = self.files[index]
        try:
            image = read_image(image_file, max_pixels=self.max_pixels, upright=False)  # as the mask is
        except UnreadableImageError as error:
            raise ValueError(f"data: got {error.path}, which can't be read: {error.reason}") from error
        try:
            with Image.open(mask_file, formats=["PNG"]) as opened:
                mode, shape = opened.mode, (opened.height, opened.width)
                if shape != image.shape[1:]:  # before it is decoded
                    raise ValueError(f"data: got {mask_file} of {shape} pixels, takes {tuple(image.shape[1:])}")
                mask = torch.from_numpy(np.array(opened))
        except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"data: got {mask_file}, which can't be read: {error}") from error
        if mode not in ("P", "L"):
            raise ValueError(f"data: got {mask_file} of mode {mode}, takes a palette or 8-bit gray levels")
        known = mask[mask != IGNORED]
        if known.numel() and int(known.max()) >= len(self.classes):
            raise ValueError(f"data: got class {int(known.max())} in {mask_file}, takes 0 to {len(self.classes) - 1}")
        return Segmented(image, mask)


class CocoMasks:
    """A folder in COCO's layout (`CocoFolder`) whose annotations have polygons or run lengths.

    Class 0 is the background, the categories follow in the order of their ids. Crowds, and pixels of two objects of
    different categories, are ignored.

    Args:
        folder: as `CocoFolder` takes it.
        train: which part.
        labels_of: the part whose categories the classes are; default this one's.
        max_pixels: of one picture; one of more can't be read.

    Raises:
        ValueError: what `CocoFolder` refuses, or an annotation without a mask.
    """

    def __init__(
        self, folder: Path, *, train: bool, labels_of: "CocoMasks | None" = None, max_pixels: int = MAX_PIXELS
    ) -> None:
        others: CocoFolder | None = None if labels_of is None else labels_of.boxes
        self.boxes: CocoFolder = CocoFolder(folder, train=train, labels_of=others, max_pixels=max_pixels)
        coco = self.boxes.coco
        if not all(annotation.get("segmentation") for annotation in coco.anns.values()):
            raise ValueError(f"data: got {folder}, takes a segmentation in each annotation")
        names = (others or self.boxes).names
        self.classes = ["background", *(names[number] for number in self.boxes.categories)]
        if len(self.classes) > IGNORED:
            raise ValueError(f"data: got {len(self.classes) - 1} categories, takes at most {IGNORED - 1}")

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, index: int) -> Segmented:
        image, annotations = self.boxes.read(index)
        mask = torch.zeros(image.shape[1:], dtype=torch.uint8)
        crowded = torch.zeros_like(mask, dtype=torch.bool)
        for annotation in annotations:
            inside = torch.from_numpy(self.boxes.coco.annToMask(annotation)).bool()
            if inside.shape != mask.shape:
                raise ValueError(
                    f"data: got a mask of {tuple(inside.shape)} pixels in image {self.boxes.examples.ids[index]}, "
                    f"takes {tuple(mask.shape)}"
                )
            if annotation["iscrowd"]:
                crowded |= inside
                continue
            category = self.boxes.categories.index(annotation["category_id"]) + 1
            # Twice the same category stays it; another one there makes the pixel ambiguous.
            mask[inside] = torch.where((mask[inside] == 0) | (mask[inside] == category), category, IGNORED).byte()
        mask[crowded & (mask == 0)] = IGNORED
        return Segmented(image, mask)


def open_segmentation(data: Path, *, max_pixels: int = MAX_PIXELS) -> tuple[SegmentationSet, SegmentationSet]:
    """The training part and the held-out part of a folder as Pascal VOC or as COCO has it, of the same classes.

    Raises:
        ValueError: it is neither, or what the class of its kind refuses.
    """
    if (data / "ImageSets" / "Segmentation").is_dir():
        train, held_out = (VocFolder(data, train=part, max_pixels=max_pixels) for part in (True, False))
        return train, held_out
    if (data / "annotations").is_dir():
        masks = CocoMasks(data, train=True, max_pixels=max_pixels)
        return masks, CocoMasks(data, train=False, labels_of=masks, max_pixels=max_pixels)
    raise ValueError(
        f"data: got {data}, takes a folder with ImageSets/Segmentation (as Pascal VOC) or annotations (as COCO)"
    )
