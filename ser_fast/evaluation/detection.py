"""Detection transfer: what a frozen encoder's tokens are worth to a Faster R-CNN trained on top of them.

The detector and its losses are torchvision's, mAP is pycocotools'. Here stands what joins them to a SplitViT.
"""

import csv
import hashlib
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn, track
from rich.table import Table
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import CocoDetection
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import Conv2dNormActivation, box_convert
from torchvision.transforms import v2
from torchvision.tv_tensors import BoundingBoxes, Image

from ser_fast.data.loader import EpochSampler
from ser_fast.evaluation.features import evaluating
from ser_fast.io import write_atomically
from ser_fast.views.pixels import IMAGENET_MEAN, IMAGENET_STD
from ser_fast.vit import SplitViT

# Small beside torchvision's defaults (256, 1024, 2000 and 1000, 2000 and 1000, 512): what is measured is the encoder.
_CHANNELS = 64  # of the pyramid
_HIDDEN = 256  # of the head that classifies boxes
_PROPOSALS = 256  # of an image, after as many times two on each level
_BOXES = 64  # that the head learns from, an image
_ANCHOR = 4  # side of a level's anchors, in its strides
_FROZEN = "backbone.encoder."  # the parameters that belong to the encoder

Example = tuple[Tensor, dict[str, Tensor]]


@dataclass(frozen=True)
class Record:
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


class CocoFolder(Dataset[Example]):
    """The images and boxes of a folder in COCO's layout.

    Item i is an image float32 (3, H, W) in [0, 1], and "boxes" (n, 4) float32 as (left, top, right, bottom) in pixels
    with "labels" (n,), from 1 in the order of the categories' ids. Crowds and boxes under a pixel are left out.

    Args:
        folder: holds annotations/instances_NAME.json and the images in NAME/, where NAME begins with train or val
            (train2017, ...).
        train: which of the two.

    Raises:
        ValueError: there is no or more than one such file, it isn't in COCO's format, or the images' folder is missing.
    """

    _prepare = v2.Compose(
        [
            v2.ToDtype({Image: torch.float32, "others": None}, scale=True),
            v2.ConvertBoundingBoxFormat("XYXY"),
            v2.ClampBoundingBoxes(),
            v2.SanitizeBoundingBoxes(min_size=1),
        ]
    )

    def __init__(self, folder: Path, *, train: bool) -> None:
        part = "train" if train else "val"
        found = sorted((folder / "annotations").glob(f"instances_{part}*.json"))
        if len(found) != 1:
            raise ValueError(f"data: {folder} holds {len(found)} files annotations/instances_{part}*.json, takes one")
        images = folder / found[0].stem.removeprefix("instances_")
        if not images.is_dir():
            raise ValueError(f"data: {found[0]} is there, and no folder {images}")
        try:
            with redirect_stdout(io.StringIO()):
                self.examples = CocoDetection(images, str(found[0]))
            self.coco: COCO = self.examples.coco
            self.categories: list[int] = sorted(self.coco.cats)
            complete = all({"bbox", "area", "iscrowd"} <= annotation.keys() for annotation in self.coco.anns.values())
        except (KeyError, TypeError, AttributeError, AssertionError) as error:
            raise ValueError(f"data: {found[0]} isn't in COCO's format: {error!r}") from error
        if not complete or not len(self.examples) or not self.categories:
            raise ValueError(
                f"data: {found[0]} has {len(self.examples)} images, {len(self.categories)} categories and "
                f"{len(self.coco.anns)} annotations; takes some, and bbox, area and iscrowd in each annotation"
            )

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        picture, annotations = self.examples[index]
        image = v2.functional.to_image(picture)  # (3, H, W) uint8
        objects = [annotation for annotation in annotations if not annotation["iscrowd"]]
        boxes = torch.tensor([found["bbox"] for found in objects], dtype=torch.float32).reshape(-1, 4)
        target = {
            "boxes": BoundingBoxes(boxes, format="XYWH", canvas_size=image.shape[1:]),
            "labels": torch.tensor(
                [self.categories.index(found["category_id"]) + 1 for found in objects], dtype=torch.int64
            ),
        }
        return self._prepare(image, target)


class FeaturePyramid(nn.Module):
    """Four maps of one width from the last tokens of a frozen SplitViT: 2, 1, 1/2 and 1/4 times their resolution.

    The encoder runs in eval mode and without gradients; only the convolutions are trained.

    Source: Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection", 2022, the simple feature
    pyramid, with group norm and strided convolutions.
    """

    def __init__(self, encoder: SplitViT, channels: int) -> None:
        super().__init__()
        self.encoder, self.out_channels = encoder, channels
        block = partial(Conv2dNormActivation, norm_layer=partial(nn.GroupNorm, 8))
        dim = encoder.embed_dim
        self.levels = nn.ModuleList(
            [
                nn.Sequential(nn.ConvTranspose2d(dim, channels, 2, stride=2), block(channels, channels)),
                nn.Sequential(block(dim, channels, 1), block(channels, channels)),
                nn.Sequential(block(dim, channels, stride=2), block(channels, channels)),
                nn.Sequential(block(dim, channels, stride=2), block(channels, channels, stride=2)),
            ]
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """{"0": (B, C, 2 H, 2 W), ... "3": (B, C, H / 4, W / 4)} of images with H x W tokens."""
        with evaluating(self.encoder):
            tokens = self.encoder.early(images)  # (B, H, W, dim)
            last = self.encoder.late(tokens)[:, self.encoder.num_prefix_tokens :].unflatten(1, tokens.shape[1:3])
        features = last.permute(0, 3, 1, 2)  # (B, dim, H, W)
        return {str(number): level(features) for number, level in enumerate(self.levels)}


def build_detector(encoder: SplitViT, *, categories: int, image_size: int) -> FasterRCNN:
    """Faster R-CNN on a frozen encoder: images [(3, H, W)] in [0, 1] of any size to boxes, as torchvision's own.

    Args:
        encoder: is taken over, not copied, and not changed.
        categories: their number; label 0 is the background.
        image_size: to which the shorter side of an image is resized, in pixels; the longer one to at most twice that.

    Raises:
        ValueError: patches that aren't square with a power of two as their side: torchvision's RoIAlign takes the
            strides of a pyramid for such powers.

    Example:
        >>> detector = build_detector(load_split_vit("encoder.safetensors"), categories=80, image_size=448)
        >>> losses = detector(images, [{"boxes": boxes, "labels": labels}])  # in training
    """
    height, width = encoder.patch_size
    if height != width or height < 2 or height & (height - 1):
        raise ValueError(
            f"checkpoint: patches of {height} x {width} pixels; detection takes squares, side 2, 4, 8, ..."
        )
    strides = (height // 2, height, 2 * height, 4 * height)
    return FasterRCNN(
        FeaturePyramid(encoder, _CHANNELS),
        min_size=image_size,
        max_size=2 * image_size,
        image_mean=list(IMAGENET_MEAN),
        image_std=list(IMAGENET_STD),
        size_divisible=strides[-1],
        rpn_anchor_generator=AnchorGenerator(
            tuple((_ANCHOR * stride,) for stride in strides), ((0.5, 1.0, 2.0),) * len(strides)
        ),
        box_head=TwoMLPHead(_CHANNELS * 7 * 7, _HIDDEN),
        box_predictor=FastRCNNPredictor(_HIDDEN, categories + 1),
        rpn_pre_nms_top_n_train=2 * _PROPOSALS,
        rpn_pre_nms_top_n_test=2 * _PROPOSALS,
        rpn_post_nms_top_n_train=_PROPOSALS,
        rpn_post_nms_top_n_test=_PROPOSALS,
        box_batch_size_per_image=_BOXES,
    )


def train_head(
    detector: FasterRCNN,
    dataset: CocoFolder,
    path: Path,
    *,
    steps: int,
    batch_size: int = 8,
    lr: float = 4e-3,
    seed: int = 0,
    save_every: int = 50,
    workers: int = 0,
    progress: bool = False,
) -> None:
    """Train what `build_detector` put on the encoder, with AdamW, one learning-rate cycle and horizontal flips.

    The head is saved to `path` as it grows. If `path` is there, training goes on from it, to the bit on the CPU.

    Args:
        detector: on its device.
        path: of the head's weights, the optimiser's state and the settings; the encoder's weights aren't in it.
        steps: in all.
        batch_size: images a step; at most all of them.
        lr: the largest learning rate.
        seed: of the order of the images, the flips and the boxes that are sampled.
        save_every: steps between two writes.
        workers: processes that load images.
        progress: show a bar on the terminal.

    Raises:
        ValueError: no positive steps, batch_size or save_every, or `path` holds a head of another setting.
    """
    for name, count in (("steps", steps), ("batch_size", batch_size), ("save_every", save_every)):
        if count < 1:
            raise ValueError(f"{name}: got {count}, takes a positive number")
    trained = {name: p for name, p in detector.named_parameters() if not name.startswith(_FROZEN)}
    device = next(iter(trained.values())).device
    optimizer = torch.optim.AdamW(trained.values(), lr=lr)
    schedule = OneCycleLR(optimizer, max_lr=lr, total_steps=steps, pct_start=0.1)
    settings = {
        "images": str(dataset.examples.root),
        "categories": len(dataset.categories),
        "image_size": detector.transform.min_size[0],
        "steps": steps,
        "batch_size": batch_size,
        "lr": lr,
        "seed": seed,
        "encoder": _fingerprint(detector.backbone.encoder),
    }
    start = 0
    if path.is_file():
        state = torch.load(path, map_location=device, weights_only=True)
        changed = [name for name, value in settings.items() if state["settings"].get(name) != value]
        if changed:
            raise ValueError(
                f"out: {path} was trained with another {', '.join(changed)}; delete it or name another out"
            )
        frozen = {name: tensor for name, tensor in detector.state_dict().items() if name.startswith(_FROZEN)}
        detector.load_state_dict({**frozen, **state["head"]})
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        start = state["step"]

    batches = _batches(dataset, start, batch_size=batch_size, seed=seed, workers=workers)
    flip = v2.RandomHorizontalFlip()
    detector.train()
    with _bar(disable=not progress) as bar:
        task = bar.add_task(path.stem, total=steps, completed=start)
        for step in range(start, steps):
            batch = next(batches)
            torch.manual_seed(int(np.random.SeedSequence([seed, step]).generate_state(1)[0]))
            images, targets = zip(*(flip(example) for example in batch), strict=True)
            losses = detector(
                [image.to(device) for image in images],
                [{name: value.to(device) for name, value in target.items()} for target in targets],
            )
            loss = sum(losses.values())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(trained.values(), 1.0)
            optimizer.step()
            schedule.step()
            bar.update(task, advance=1, description=f"{path.stem}  loss {loss.item():.2f}")
            if (step + 1) % save_every == 0 or step + 1 == steps:
                head = {name: value for name, value in detector.state_dict().items() if not name.startswith(_FROZEN)}
                state = {
                    "step": step + 1,
                    "settings": settings,
                    "head": head,
                    "optimizer": optimizer.state_dict(),
                    "schedule": schedule.state_dict(),
                }
                write_atomically(path, partial(torch.save, state))


def predict(
    detector: FasterRCNN, dataset: CocoFolder, *, batch_size: int = 8, workers: int = 0, progress: bool = False
) -> list[dict[str, Any]]:
    """The boxes that a detector finds, in COCO's format for results: image_id, category_id, bbox, score."""
    device = next(detector.parameters()).device
    results: list[dict[str, Any]] = []
    ids = iter(dataset.examples.ids)
    loader = DataLoader(dataset, batch_size, collate_fn=list, num_workers=workers)
    with evaluating(detector):
        for batch in track(loader, "detecting", transient=True, disable=not progress):
            for found in detector([image.to(device) for image, _ in batch]):
                image_id = next(ids)
                boxes = box_convert(found["boxes"], "xyxy", "xywh").tolist()  # (n, 4)
                for box, label, score in zip(boxes, found["labels"].tolist(), found["scores"].tolist(), strict=True):
                    category = dataset.categories[label - 1]
                    results.append({"image_id": image_id, "category_id": category, "bbox": box, "score": score})
    return results


def score(coco: COCO, results: Sequence[Mapping[str, Any]]) -> list[Record]:
    """COCO's measures of results (as `predict` gives them): the means over all categories first, then each one's.

    Source: pycocotools.cocoeval.COCOeval with iouType "bbox".
    """
    with redirect_stdout(io.StringIO()):
        found = coco.loadRes(list(results)) if results else COCO()
        evaluation = COCOeval(coco, found, "bbox")
        evaluation.params.imgIds = sorted(coco.imgs)  # without results, COCOeval would take those of none
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"]  # (IoU, recall, category, area, boxes an image)
    recall = evaluation.eval["recall"]  # (IoU, category, area, boxes an image)
    thresholds = evaluation.params.iouThrs.round(2).tolist()
    names = {"all": slice(None)}
    names |= {coco.cats[number]["name"]: slice(i, i + 1) for i, number in enumerate(evaluation.params.catIds)}
    return [
        Record(
            category=name,
            ap=_mean(precision[:, :, chosen, 0, -1]),
            ap50=_mean(precision[thresholds.index(0.5), :, chosen, 0, -1]),
            ap75=_mean(precision[thresholds.index(0.75), :, chosen, 0, -1]),
            ap_small=_mean(precision[:, :, chosen, 1, -1]),
            ap_medium=_mean(precision[:, :, chosen, 2, -1]),
            ap_large=_mean(precision[:, :, chosen, 3, -1]),
            ar=_mean(recall[:, chosen, 0, -1]),
            images=len(coco.imgs),
        )
        for name, chosen in names.items()
    ]


def write_table(records: Mapping[str, Sequence[Record]], path: str | Path) -> None:
    """Write the records of each model, by name, to a CSV file: a column "model", then the fields of Record."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, ["model", *(field.name for field in fields(Record))])
        writer.writeheader()
        writer.writerows({"model": name, **asdict(record)} for name, of_model in records.items() for record in of_model)


def print_table(records: Mapping[str, Sequence[Record]], console: Console | None = None) -> None:
    """Print COCO's measures over all categories: a row a model, by name."""
    measures = [field.name for field in fields(Record) if field.name not in ("category", "images")]
    table = Table("", box=SIMPLE_HEAD, padding=0)
    for measure in measures:
        table.add_column(measure, justify="right")
    for name, (mean, *_) in records.items():
        table.add_row(name, *(f"{getattr(mean, measure):.3f}" for measure in measures))
    (console or Console()).print(table)


def plot(
    dataset: CocoFolder, results: Mapping[str, Sequence[Mapping[str, Any]]], path: str | Path, *, images: int = 6
) -> None:
    """Draw the first images with their true boxes, then with as many of the likeliest of each model, by name."""
    ids = dataset.examples.ids[:images]
    figure = Figure(figsize=(2 * len(ids), 2.2 * (1 + len(results))), layout="constrained")
    panels = figure.subplots(1 + len(results), len(ids), squeeze=False)
    for index, (number, column) in enumerate(zip(ids, panels.T, strict=True)):
        truth: Sequence[Mapping[str, Any]] = dataset.coco.imgToAnns[number]
        found = [[box for box in of_model if box["image_id"] == number] for of_model in results.values()]
        likeliest = [sorted(boxes, key=lambda box: -box["score"])[: len(truth)] for boxes in found]
        for axes, name, boxes in zip(column, ("truth", *results), (truth, *likeliest), strict=True):
            axes.imshow(dataset[index][0].permute(1, 2, 0).numpy())
            axes.set(xticks=[], yticks=[], ylabel="" if index else name)
            for box in boxes:
                left, top, width, height = box["bbox"]
                colour = f"C{dataset.categories.index(box['category_id']) % 10}"
                axes.add_patch(Rectangle((left, top), width, height, fill=False, linewidth=2, edgecolor=colour))
    figure.savefig(path, dpi=100)


def _batches(dataset: CocoFolder, start: int, *, batch_size: int, seed: int, workers: int) -> Iterator[list[Example]]:
    """Batches of a shuffled dataset without end, from number `start` on."""
    size = min(batch_size, len(dataset))
    sampler = EpochSampler(len(dataset), batch_size=size, seed=seed, rank=0, world_size=1, train=True)
    loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=list, num_workers=workers)
    epoch, batch = divmod(start, sampler.batches)
    while True:
        sampler.set_epoch(epoch)
        sampler.set_start(batch)
        yield from loader
        epoch, batch = epoch + 1, 0


def _bar(*, disable: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, disable=disable)


def _fingerprint(encoder: SplitViT) -> str:
    """A hash of the encoder's weights."""
    digest = hashlib.sha256(json.dumps([encoder.recipe and encoder.recipe[0], encoder.split]).encode())
    for name, tensor in encoder.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _mean(values: NDArray[np.float64]) -> float:
    """The mean of pycocotools' values, of which -1 means none."""
    known = values[values > -1]
    return float(known.mean()) if known.size else math.nan
