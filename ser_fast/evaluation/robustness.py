"""Robustness: how often a classifier errs on corrupted and shifted images, and how often it changes its mind."""

import csv
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torchvision.transforms.v2.functional import resize, to_dtype

from ser_fast.data.loader import make_loader
from ser_fast.data.sources import ImageFolder
from ser_fast.evaluation.classification import Classification, grade, rank, share_of
from ser_fast.evaluation.corruptions import CORRUPTIONS, PERTURBATIONS, SEVERITIES, corrupt, perturb
from ser_fast.evaluation.features import evaluating
from ser_fast.views.pixels import normalize
from ser_fast.vit import SplitViT

_CLEAN = "clean"

Classifier = Callable[[Tensor], Tensor]
"""uint8 images (B, 3, S, S) to scores (B, K)."""
Head = Callable[[Tensor], Tensor]
"""Features (B, C) to scores (B, K)."""
Batches = Iterable[tuple[Tensor, Tensor]]
"""uint8 images (B, 3, S, S) and labels (B,)."""


def image_classifier(model: SplitViT, head: Head, device: torch.device | str) -> Classifier:
    """Classify images by a head on the model's embedding; both on `device`."""

    def classify(images: Tensor) -> Tensor:
        with evaluating(model):
            pixels = to_dtype(images.to(device), torch.float32, scale=True)  # (B, 3, S, S)
            return head(model(normalize(pixels)).float())

    return classify


# ---------------------------------------------------------------- measures


@dataclass(frozen=True)
class ErrorRate:
    """How often a classifier errs on one kind at one severity ("clean", 0: unchanged images), with a 95 % interval."""

    kind: str
    severity: int
    error: float
    low: float
    high: float
    images: int


@dataclass(frozen=True)
class FlipRate:
    """How often a classifier changes its mind within the sequences of one kind (`flip_probability`)."""

    kind: str
    flip_probability: float
    sequences: int


def error_rates(
    classifiers: Mapping[str, Classifier], sets: Iterable[tuple[str, int, Batches]], *, progress: bool = False
) -> dict[str, list[ErrorRate]]:
    """The errors of each classifier, by name, on each set: kind, severity and batches, as of `generate_corruptions`.

    Raises:
        ValueError: a set without images.
    """
    rates: dict[str, list[ErrorRate]] = {name: [] for name in classifiers}
    bar = track(sets, "corruptions", len(CORRUPTIONS) * len(SEVERITIES), transient=True, disable=not progress)
    for kind, severity, batches in bar:
        wrong: dict[str, list[Tensor]] = {name: [] for name in classifiers}
        for images, labels in batches:
            for name, classify in classifiers.items():
                wrong[name].append(classify(images).argmax(1).cpu() != labels)
        for name, parts in wrong.items():
            share = share_of(torch.cat(parts) if parts else torch.zeros(0))
            rates[name].append(ErrorRate(kind, severity, share.value, share.low, share.high, sum(map(len, parts))))
    return rates


def mean_corruption_error(rates: Sequence[ErrorRate], baseline: Sequence[ErrorRate] | None = None) -> float:
    """The mean over kinds of the error summed over severities, divided by the baseline's; clean images take no part.

    Without a baseline the error is averaged over severities: a share of images. With one, 1 is as good as the baseline.

    Raises:
        ValueError: no corrupted set, a kind or severity that the baseline lacks, or a baseline that never errs on a
            kind.

    Source: Hendrycks & Dietterich, 2019, section 3.2; their baseline is AlexNet.
    """
    kinds = _by_kind(rates)
    if not kinds:
        raise ValueError("rates: got no corrupted set")
    if baseline is None:
        return fmean(fmean(errors.values()) for errors in kinds.values())
    others = _by_kind(baseline)
    for kind, errors in kinds.items():
        if missing := sorted(set(errors) - set(others.get(kind, {}))):
            raise ValueError(f"baseline: lacks {kind} at severity {', '.join(map(str, missing))}")
        if not sum(others[kind][severity] for severity in errors):
            raise ValueError(f"baseline: never errs on {kind}, so that nothing can be relative to it")
    return fmean(
        sum(errors.values()) / sum(others[kind][severity] for severity in errors) for kind, errors in kinds.items()
    )


def flip_probability(predictions: Tensor, *, noise: bool) -> float:
    """How often the predicted class changes within sequences of images.

    Args:
        predictions: (N, F) classes, F at least 2.
        noise: compare with a sequence's first frame, as frames of noise have no order; else with the frame before.

    Source: Hendrycks & Dietterich, 2019, section 3.3.
    """
    if predictions.ndim != 2 or not len(predictions) or predictions.shape[1] < 2:
        raise ValueError(f"predictions: got {tuple(predictions.shape)}, takes (N, F), N > 0, F > 1")
    before = predictions[:, :1] if noise else predictions[:, :-1]
    return (predictions[:, 1:] != before).double().mean().item()


def flip_rates(
    classifiers: Mapping[str, Classifier], sets: Iterable[tuple[str, Iterable[Tensor]]], *, progress: bool = False
) -> dict[str, list[FlipRate]]:
    """The flip probability of each classifier, by name, on each set (kind, sequences of images (F, 3, S, S) uint8)."""
    rates: dict[str, list[FlipRate]] = {name: [] for name in classifiers}
    bar = track(sets, "perturbations", len(PERTURBATIONS), transient=True, disable=not progress)
    for kind, sequences in bar:
        predictions: dict[str, list[Tensor]] = {name: [] for name in classifiers}
        for frames in sequences:
            for name, classify in classifiers.items():
                predictions[name].append(classify(frames).argmax(1).cpu())
        for name, rows in predictions.items():
            flips = flip_probability(torch.stack(rows), noise="noise" in kind)
            rates[name].append(FlipRate(kind, flips, len(rows)))
    return rates


def _by_kind(rates: Sequence[ErrorRate]) -> dict[str, dict[int, float]]:
    kinds: dict[str, dict[int, float]] = {}
    for rate in rates:
        if rate.kind != _CLEAN:
            kinds.setdefault(rate.kind, {})[rate.severity] = rate.error
    return kinds


# ---------------------------------------------------------------- sets of images


def clean_images(images: Tensor, labels: Tensor, *, batch_size: int = 256) -> tuple[str, int, Batches]:
    """The set ("clean", 0) of images (N, 3, S, S) uint8 as they are."""
    return _CLEAN, 0, zip(images.split(batch_size), labels.split(batch_size), strict=True)


def generate_corruptions(
    images: Tensor, labels: Tensor, *, seed: int = 0, batch_size: int = 256
) -> Iterator[tuple[str, int, Batches]]:
    """A set for each kind at each severity, of images (N, 3, S, S) uint8 and labels (N,)."""

    def batches(kind: str, severity: int) -> Batches:
        for rows in torch.arange(len(images)).split(batch_size):
            yield torch.stack([corrupt(images[i], kind, severity, seed=seed + i) for i in rows.tolist()]), labels[rows]

    for kind in CORRUPTIONS:
        for severity in SEVERITIES:
            yield kind, severity, batches(kind, severity)


def generate_perturbations(images: Tensor, *, seed: int = 0) -> Iterator[tuple[str, Iterable[Tensor]]]:
    """Each kind with a sequence for each of the images (N, 3, S, S) uint8."""

    def sequences(kind: str) -> Iterator[Tensor]:
        for i, image in enumerate(images):
            yield perturb(image, kind, seed=seed + i)

    for kind in PERTURBATIONS:
        yield kind, sequences(kind)


def read_corruptions(
    folder: Path, classes: Sequence[str], *, image_size: int, batch_size: int = 256, workers: int = 0
) -> Iterator[tuple[str, int, Batches]]:
    """Read corrupted images in a published layout.

    ImageNet-C: kind/severity/class/image, classes by name as in `ClassFolder`. CIFAR-10-C: kind.npy, (5 N, S, S, 3)
    uint8, its fifths the severities, and labels.npy, numbered as `classes`.

    Raises:
        ValueError: neither of these, arrays of other shapes, or classes that are unknown.
    """
    if (folder / "labels.npy").is_file():
        labels = torch.from_numpy(np.load(folder / "labels.npy").astype(np.int64))
        for path in sorted(set(folder.glob("*.npy")) - {folder / "labels.npy"}):
            array = np.load(path, mmap_mode="r")
            if array.ndim != 4 or len(array) != len(labels) or len(array) % 5:
                raise ValueError(f"{path} is {array.shape}, takes (5 N, S, S, 3), 5 N the {len(labels)} labels")
            fifth = len(array) // 5
            for severity in SEVERITIES:
                part = slice((severity - 1) * fifth, severity * fifth)
                yield path.stem, severity, _batches_of(array[part], labels[part], image_size, batch_size)
        return
    paths = [path for path in sorted(folder.glob("*/[1-5]")) if path.is_dir()]
    if not paths:
        raise ValueError(f"{folder} holds neither kind/severity/class folders nor kind.npy and labels.npy")
    for path in paths:
        part_of = ClassFolder(path, classes, image_size=image_size)
        yield path.parent.name, int(path.name), part_of.batches(batch_size, workers)


def read_perturbations(folder: Path, *, image_size: int) -> Iterator[tuple[str, Iterable[Tensor]]]:
    """Read perturbation sequences in a published layout.

    ImageNet-P: kind/class/name.mp4, a video a sequence, decoded by PyAV (the package `av`, which is not among the
    dependencies). CIFAR-10-P: kind.npy, (N, F, S, S, 3) uint8.

    Raises:
        ValueError: neither of these, an array of another shape, or videos where PyAV is not installed.
    """
    videos = find_videos(folder)
    arrays = sorted(folder.glob("*.npy"))
    if not videos and not arrays:
        raise ValueError(f"{folder} holds neither kind/class/name.mp4 nor kind.npy")
    for kind, paths in videos.items():
        yield kind, map(partial(_read_video, size=image_size), paths)
    for path in arrays:
        array = np.load(path, mmap_mode="r")
        if array.ndim != 5 or array.shape[-1] != 3:
            raise ValueError(f"{path} is {array.shape}, takes (N, F, S, S, 3)")
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
        raise ValueError(f"{path} is a video: that takes PyAV, which is not installed (pip install av)") from error
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]  # each (S, S, 3)
    return _resized(frames, size)


class ClassFolder:
    """Images of some of the training classes: one folder a class, named as in training (ImageNet-R, -Sketch) or by the
    class's number there (ImageNet-V2).

    Attributes:
        name: the folder's.
        indices: (k,) the training classes that it has.

    Raises:
        ValueError: a folder that is no training class, or no readable image.
    """

    def __init__(self, folder: Path, classes: Sequence[str], *, image_size: int) -> None:
        if not folder.is_dir():
            raise ValueError(f"there is no folder {folder}")
        self.name = folder.resolve().name
        self.images = ImageFolder(folder, train=True, image_size=image_size)
        names = self.images.classes
        known = {name: index for index, name in enumerate(classes)}
        if not set(names) <= set(known) and all(name.isdecimal() and int(name) < len(classes) for name in names):
            known = {name: int(name) for name in names}
        if not names:
            raise ValueError(f"{folder} has no folders of classes")
        if unknown := sorted(set(names) - set(known)):
            raise ValueError(f"{folder} has folders that are no training class: {', '.join(unknown)}")
        self.indices = torch.tensor([known[name] for name in names])

    def batches(self, batch_size: int, workers: int) -> Batches:
        """Images, and labels as in training."""
        loader = make_loader(self.images, batch_size=batch_size, train=False, workers=workers)
        return ((batch.images, self.indices[batch.labels]) for batch in loader)

    def grade(self, classify: Classifier, *, batch_size: int = 256, workers: int = 0) -> Classification:
        """How a classifier does that is only asked for the folder's classes, as ImageNet-R's protocol has it."""
        ranked, labels, classes = [], [], 0
        for images, of in self.batches(batch_size, workers):
            scores = classify(images).cpu()
            classes = scores.shape[1]
            asked = torch.full_like(scores, -torch.inf)
            asked[:, self.indices] = scores[:, self.indices]
            ranked.append(rank(asked))
            labels.append(of)
        return grade(torch.cat(ranked), torch.cat(labels), classes)


def _batches_of(array: Any, labels: Tensor, image_size: int, batch_size: int) -> Batches:
    for start in range(0, len(array), batch_size):
        part = slice(start, start + batch_size)
        yield _resized(array[part], image_size), labels[part]


def _resized(array: Any, size: int) -> Tensor:
    """(B, S, S, 3) -> (B, 3, size, size)"""
    return resize(torch.from_numpy(np.array(array)).permute(0, 3, 1, 2), [size, size], antialias=True)


# ---------------------------------------------------------------- what is shown


def read_errors(path: Path, *, model: str = "checkpoint") -> list[ErrorRate]:
    """The error rates of one model in a file that `write_table` wrote.

    Raises:
        ValueError: the file is missing or holds none of them.
    """
    if not path.is_file():
        raise ValueError(f"baseline: there is no file {path}")
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("model") == model]
    if not rows or "severity" not in rows[0]:
        raise ValueError(f"baseline: {path} holds no error rates of {model!r}")
    return [
        ErrorRate(
            row["kind"],
            int(row["severity"]),
            float(row["error"]),
            float(row["low"]),
            float(row["high"]),
            int(row["images"]),
        )
        for row in rows
    ]


def print_errors(
    rates: Mapping[str, Sequence[ErrorRate]],
    baseline: Sequence[ErrorRate] | None = None,
    console: Console | None = None,
) -> None:
    """Print the errors of each model, by name: a row a kind, and the mean corruption error."""
    table = Table(title="Error, mean over severities")
    table.add_column("kind")
    columns: dict[str, dict[str, str]] = {}
    for name, of_model in rates.items():
        table.add_column(name, justify="right")
        cells = {rate.kind: f"{rate.error:.3f}" for rate in of_model if rate.kind == _CLEAN}
        cells |= {kind: f"{fmean(errors.values()):.3f}" for kind, errors in _by_kind(of_model).items()}
        cells["mean corruption error"] = f"{mean_corruption_error(of_model):.3f}"
        if baseline is not None:
            cells["... relative to the baseline"] = f"{mean_corruption_error(of_model, baseline):.3f}"
        columns[name] = cells
    for kind in next(iter(columns.values())):
        table.add_row(kind, *(cells[kind] for cells in columns.values()))
    (console or Console()).print(table)


def print_flips(rates: Mapping[str, Sequence[FlipRate]], console: Console | None = None) -> None:
    """Print the flip probabilities of each model, by name: a row a kind, and their mean."""
    table = Table(title="Flip probability, between frames of a sequence (of noise: against the first)")
    table.add_column("kind")
    for name in rates:
        table.add_column(name, justify="right")
    for of_kind in zip(*rates.values(), strict=True):
        table.add_row(of_kind[0].kind, *(f"{rate.flip_probability:.4f}" for rate in of_kind))
    means = (fmean(rate.flip_probability for rate in of_model) for of_model in rates.values())
    table.add_row("mean flip probability", *(f"{mean:.4f}" for mean in means))
    (console or Console()).print(table)


def plot_errors(rates: Mapping[str, Sequence[ErrorRate]], path: Path) -> None:
    """Draw error against severity, a panel a kind and a line a model, clean images at severity 0."""
    kinds = list(_by_kind(next(iter(rates.values()))))
    columns = min(len(kinds), 5)
    down = -(-len(kinds) // columns)
    figure = Figure(figsize=(2.2 * columns + 1, 2 * down + 0.6), layout="constrained")
    panels = figure.subplots(down, columns, squeeze=False, sharex=True, sharey=True)
    for axes, kind in zip(panels.flat, kinds, strict=False):
        for name, of_model in rates.items():
            line = [rate for rate in of_model if rate.kind in (kind, _CLEAN)]
            severities = [rate.severity for rate in line]
            axes.plot(severities, [rate.error for rate in line], marker=".", label=name)
            axes.fill_between(severities, [rate.low for rate in line], [rate.high for rate in line], alpha=0.2)
        axes.set_title(kind, fontsize=9)
        axes.set(ylim=(0, 1))
    for axes in panels.flat[len(kinds) :]:
        axes.remove()
    figure.supxlabel("severity (0: clean)")
    figure.supylabel("error, 95 % interval")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(path, dpi=150)
