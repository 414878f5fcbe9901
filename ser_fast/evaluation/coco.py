"""Detection data and scores as COCO has them: its folders, and its measures by pycocotools."""

import io
import math
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import CocoDetection
from torchvision.transforms import v2
from torchvision.tv_tensors import BoundingBoxes, Image

from ser_fast.data import MAX_PIXELS
from ser_fast.data.pictures import UnreadableImageError, read_image

Example = tuple[Tensor, dict[str, Tensor]]


class CocoFolder(Dataset[Example]):
    """The images and boxes of a folder in COCO's layout.

    Item i is an image float32 (3, H, W) in [0, 1], and "boxes" (n, 4) float32 as (left, top, right, bottom) in pixels
    with "labels" (n,), from 1 in the order of the categories' ids. Crowds and boxes under a pixel are left out.

    Args:
        folder: holds annotations/instances_NAME.json and the images in NAME/, where NAME begins with train or val
            (train2017, ...).
        train: which of the two.
        labels_of: the part whose categories the labels count, for one that a detector of another is tested on; default
            the file's own.
        max_pixels: of one image; one of more can't be read.

    Attributes:
        categories: the ids, in the order of the labels. No other list maps ids to labels or back.
        names: of the categories, by id.

    Raises:
        ValueError: there is no or more than one such file, it isn't in COCO's format, the images' folder is missing, or
            it has annotations of categories that `labels_of` hasn't or names otherwise. From an item: its image can't
            be read.
    """

    _prepare = v2.Compose(
        [
            v2.ToDtype({Image: torch.float32, "others": None}, scale=True),
            v2.ConvertBoundingBoxFormat("XYXY"),
            v2.ClampBoundingBoxes(),
            v2.SanitizeBoundingBoxes(min_size=1),
        ]
    )

    def __init__(
        self,
        folder: Path,
        *,
        train: bool,
        labels_of: "CocoFolder | None" = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.max_pixels = max_pixels
        part = "train" if train else "val"
        files = sorted((folder / "annotations").glob(f"instances_{part}*.json"))
        if len(files) != 1:
            raise ValueError(f"data: got {len(files)} files annotations/instances_{part}*.json in {folder}, takes one")
        (file,) = files
        images = folder / file.stem.removeprefix("instances_")
        if not images.is_dir():
            raise ValueError(f"data: got {file}, and no folder {images}")
        try:
            with redirect_stdout(io.StringIO()):
                self.examples = CocoDetection(images, str(file))
            self.coco: COCO = self.examples.coco
            self.names = {number: str(category.get("name", number)) for number, category in self.coco.cats.items()}
            self.categories: list[int] = sorted(self.names)
            annotated = {annotation["category_id"] for annotation in self.coco.anns.values()}
            complete = all({"bbox", "area", "iscrowd"} <= annotation.keys() for annotation in self.coco.anns.values())
        except (KeyError, TypeError, AttributeError, AssertionError) as error:
            raise ValueError(f"data: got {file}, takes COCO's format: {error!r}") from error
        if not complete or not len(self.examples) or not self.categories:
            raise ValueError(
                f"data: got {len(self.examples)} images, {len(self.categories)} categories and {len(self.coco.anns)} "
                f"annotations in {file}, takes some, and bbox, area and iscrowd in each annotation"
            )
        known = self.names if labels_of is None else labels_of.names
        absent = object()  # of a category that is in neither list
        if other := sorted(number for number in annotated if known.get(number, absent) != self.names.get(number)):
            own, theirs = (
                ", ".join(f"{number} ({names.get(number, 'none')})" for number in other[:5])
                for names in (self.names, known)
            )
            raise ValueError(f"data: got annotations of the categories {own} in {file}, takes {theirs}")
        if labels_of is not None:
            self.categories = labels_of.categories

    def __len__(self) -> int:
        return len(self.examples)

    def read(self, index: int) -> tuple[Tensor, list[dict[str, Any]]]:
        """Image number `index` (3, H, W) uint8, and its annotations as the file has them.

        Raises:
            ValueError: the image can't be read.
        """
        number = self.examples.ids[index]
        path = Path(self.examples.root) / self.coco.imgs[number]["file_name"]
        try:
            image = read_image(path, max_pixels=self.max_pixels, upright=False)  # (3, H, W) uint8
        except UnreadableImageError as error:
            raise ValueError(f"data: {path} can't be read, and all images are taken: {error.reason}") from error
        return image, self.coco.imgToAnns[number]

    def __getitem__(self, index: int) -> Example:
        image, annotations = self.read(index)
        objects = [annotation for annotation in annotations if not annotation["iscrowd"]]
        boxes = torch.tensor([annotation["bbox"] for annotation in objects], dtype=torch.float32).reshape(-1, 4)
        target = {
            "boxes": BoundingBoxes(boxes, format="XYWH", canvas_size=image.shape[1:]),
            "labels": torch.tensor(
                [self.categories.index(annotation["category_id"]) + 1 for annotation in objects], dtype=torch.int64
            ),
        }
        return self._prepare(Image(image), target)


@dataclass(frozen=True)
class CategoryRecord:
    """COCO's measures of one model on one category, or their means over "all" of them.

    ap is averaged over IoU thresholds .50, .55, ... .95, ap50 and ap75 are at one threshold, ap_small, ap_medium and
    ap_large on objects below 32^2, up to 96^2 and above that many pixels; ar is the recall of at most 100 boxes an
    image. nan where there is no such object.
    """

    category: str
    ap: float
    ap50: float
    ap75: float
    ap_small: float
    ap_medium: float
    ap_large: float
    ar: float
    images: int


def score(coco: COCO, results: Sequence[Mapping[str, Any]]) -> list[CategoryRecord]:
    """COCO's measures of results: the means over all categories first, then each one's.

    Args:
        coco: the truth.
        results: as `predict` gives them.

    Source: pycocotools.cocoeval.COCOeval with iouType "bbox".
    """
    with redirect_stdout(io.StringIO()):
        detections = coco.loadRes(list(results)) if results else COCO()
        evaluation = COCOeval(coco, detections, "bbox")
        evaluation.params.imgIds = sorted(coco.imgs)  # without results, COCOeval would take those of none
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"]  # (IoU, recall, category, area, boxes an image)
    recall = evaluation.eval["recall"]  # (IoU, category, area, boxes an image)
    thresholds = evaluation.params.iouThrs.round(2).tolist()
    names = {"all": slice(None)}
    names |= {coco.cats[number]["name"]: slice(i, i + 1) for i, number in enumerate(evaluation.params.catIds)}
    return [
        CategoryRecord(
            category=name,
            ap=_mean(precision[:, :, columns, 0, -1]),
            ap50=_mean(precision[thresholds.index(0.5), :, columns, 0, -1]),
            ap75=_mean(precision[thresholds.index(0.75), :, columns, 0, -1]),
            ap_small=_mean(precision[:, :, columns, 1, -1]),
            ap_medium=_mean(precision[:, :, columns, 2, -1]),
            ap_large=_mean(precision[:, :, columns, 3, -1]),
            ar=_mean(recall[:, columns, 0, -1]),
            images=len(coco.imgs),
        )
        for name, columns in names.items()
    ]


def _mean(values: NDArray[np.float64]) -> float:
    """The mean of pycocotools' values, of which -1 means none."""
    measured = values[values > -1]
    return float(measured.mean()) if measured.size else math.nan
