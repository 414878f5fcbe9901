"""Detection transfer: what a frozen encoder's tokens are worth to a Faster R-CNN trained on top of them."""

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ser_fast.data import MAX_PIXELS
from ser_fast.evaluation.coco import CategoryRecord, CocoFolder, score
from ser_fast.evaluation.detector import build_detector, predict, train_head
from ser_fast.evaluation.figures import save
from ser_fast.evaluation.protocol import Models, check_positive, device_of, with_controls
from ser_fast.evaluation.synthetic_coco import write_shapes
from ser_fast.evaluation.tables import shown, write_table
from ser_fast.io import write_text


def print_table(records: Mapping[str, Sequence[CategoryRecord]], console: Console | None = None) -> None:
    """Print COCO's measures over all categories: a row a model, by name."""
    measures = [field.name for field in fields(CategoryRecord) if field.name not in ("category", "images")]
    table = Table("", box=SIMPLE_HEAD, padding=0)
    for measure in measures:
        table.add_column(measure, justify="right")
    for name, (mean, *_) in records.items():
        table.add_row(shown(name), *(f"{getattr(mean, measure):.3f}" for measure in measures))
    (console or Console()).print(table)


class Shown(NamedTuple):
    """An image of the figure.

    Attributes:
        id: its number in the data set.
        image: (3, H, W) float32 in [0, 1].
        boxes: the true ones, in COCO's format for annotations.
    """

    id: int
    image: Tensor
    boxes: list[dict[str, Any]]


def first_images(dataset: CocoFolder, count: int = 6) -> list[Shown]:
    """The first images of a data set, for the figure."""
    ids = dataset.examples.ids[:count]
    return [Shown(number, dataset[index][0], dataset.coco.imgToAnns[number]) for index, number in enumerate(ids)]


def plot(
    shown: Sequence[Shown],
    categories: Sequence[int],
    results: Mapping[str, Sequence[Mapping[str, Any]]],
    path: Path,
) -> Path:
    """Draw images with their true boxes, then with as many of the likeliest of each model, by name.

    Args:
        shown: the images.
        categories: the ids of all categories, which give the boxes' colors.
        results: of each model, as `predict` gives them.
        path: of the figure.
    """
    figure = Figure(figsize=(2 * len(shown), 2.2 * (1 + len(results))), layout="constrained")
    panels = figure.subplots(1 + len(results), len(shown), squeeze=False)
    for index, (example, column) in enumerate(zip(shown, panels.T, strict=True)):
        truth: Sequence[Mapping[str, Any]] = example.boxes
        predicted = [[box for box in boxes if box["image_id"] == example.id] for boxes in results.values()]
        likeliest = [sorted(boxes, key=lambda box: -box["score"])[: len(truth)] for boxes in predicted]
        for axes, name, boxes in zip(column, ("truth", *results), (truth, *likeliest), strict=True):
            axes.imshow(example.image.permute(1, 2, 0).numpy())
            axes.set(xticks=[], yticks=[], ylabel="" if index else name)
            for box in boxes:
                left, top, width, height = box["bbox"]
                color = f"C{categories.index(box['category_id']) % 10}"
                axes.add_patch(Rectangle((left, top), width, height, fill=False, linewidth=2, edgecolor=color))
    return save(figure, path, dpi=100)


# ---------------------------------------------------------------- the protocol


@dataclass(frozen=True)
class DetectionResult:
    """What a detector finds on a checkpoint and on its random control.

    Attributes:
        records: COCO's measures over all categories, then of each, by model.
        results: the boxes, in COCO's format for results, by model.
        shown: the images of the figure.
        categories: the ids of all categories.
    """

    records: dict[str, list[CategoryRecord]]
    results: dict[str, list[dict[str, Any]]]
    shown: list[Shown]
    categories: list[int]

    def write(self, folder: Path) -> list[Path]:
        """Write detection.csv, detection.png and, to detection/, the boxes of each model; returns their paths."""
        written = [
            write_table(self.records, folder / "detection.csv"),
            plot(self.shown, self.categories, self.results, folder / "detection.png"),
        ]
        for name, boxes in self.results.items():
            path = folder / "detection" / f"{name.replace('/', '_')}.json"
            write_text(path, json.dumps(boxes))
            written.append(path)
        return written

    def print(self, console: Console | None = None) -> None:
        """Print COCO's measures over all categories, a row a model."""
        print_table(self.records, console)


def evaluate(
    models: Models,
    data: Path | str | None = None,
    *,
    steps: int = 400,
    batch_size: int = 4,
    lr: float = 4e-3,
    image_size: int | None = None,
    max_pixels: int = MAX_PIXELS,
    heads: Path | None = None,
    save_every: int = 50,
    workers: int = 0,
    seed: int = 0,
    progress: bool = False,
) -> DetectionResult:
    """Train a Faster R-CNN on the frozen encoder and score it, beside one on a random initialization.

    Args:
        models: on their device: one, called "checkpoint", or several by name; they aren't changed. Random
            initializations stand beside them.
        data: a folder in COCO's layout (`CocoFolder`); default materials in shapes (`write_shapes`).
        steps: to train each of the two heads.
        batch_size: images a step.
        lr: the largest learning rate.
        image_size: of an image's shorter side in the detector, in pixels; default twice each model's own.
        max_pixels: of one image; more is an error, since a detector is scored on all of them.
        heads: folder of the heads as they train, and of the generated set; what was interrupted goes on from there.
            None keeps neither.
        save_every: steps between two writes of a head.
        workers: processes that load images.
        seed: of the heads' weights, the order of the images and the generated set.
        progress: show bars on the terminal.

    Raises:
        ValueError: data in another layout, patches that the detector can't take, options out of range, or heads of
            another setting; before a step is taken.

    Example:
        >>> result = evaluate(load_split_vit("encoder.safetensors"), "coco", steps=2000, heads=Path("heads"))
        >>> result.records["checkpoint"][0].ap
        0.31
        >>> result.write(Path("results"))
    """
    check_positive(steps=steps, batch_size=batch_size, lr=lr, image_size=image_size, save_every=save_every)
    with TemporaryDirectory() if heads is None else nullcontext(heads) as kept:
        folder = Path(kept)
        if data is None:
            data = folder / f"materials_{seed}"
            if not (data / "annotations" / "instances_val.json").is_file():  # what is written last
                write_shapes(data, seed=seed)
        train_set = CocoFolder(Path(data), train=True, max_pixels=max_pixels)
        test_set = CocoFolder(Path(data), train=False, labels_of=train_set, max_pixels=max_pixels)
        records, results = {}, {}
        for name, encoder in with_controls(models).items():
            torch.manual_seed(seed)  # the same initial head on both
            detector = build_detector(
                encoder, categories=len(train_set.categories), image_size=image_size or 2 * encoder.image_size[0]
            ).to(device_of(encoder))
            train_head(
                detector,
                train_set,
                folder / f"{name.replace('/', '_')}.pt",
                steps=steps,
                batch_size=batch_size,
                lr=lr,
                seed=seed,
                save_every=save_every,
                workers=workers,
                progress=progress,
            )
            results[name] = predict(detector, test_set, batch_size=batch_size, workers=workers, progress=progress)
            records[name] = score(test_set.coco, results[name])
        return DetectionResult(records, results, first_images(test_set), test_set.categories)
