"""Robustness: how often a classifier errs on corrupted and shifted images, and how often it changes its mind."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torchvision.transforms.v2.functional import to_dtype

from ser_fast.csv_files import read_csv
from ser_fast.data import MAX_PIXELS
from ser_fast.evaluation.classification import Rows, share_of
from ser_fast.evaluation.corruptions import CORRUPTIONS, PERTURBATIONS, SEVERITIES
from ser_fast.evaluation.features import embed_cached, evaluating, spread_items
from ser_fast.evaluation.figures import save
from ser_fast.evaluation.image_sets import (
    CLEAN,
    ClassFolder,
    Classifier,
    ImageSet,
    SequenceSet,
    clean_images,
    generate_corruptions,
    generate_perturbations,
    read_corruptions,
    read_perturbations,
)
from ser_fast.evaluation.knn import check_vote, knn_scores
from ser_fast.evaluation.linear_probe import train_probe
from ser_fast.evaluation.protocol import (
    DEFAULT_DATA,
    Models,
    check_image_size,
    check_positive,
    device_of,
    name_models,
    open_labelled,
    tell_skipped,
    with_controls,
)
from ser_fast.evaluation.tables import print_rows, shown, write_rows, write_table
from ser_fast.progress import track
from ser_fast.views.pixels import normalize
from ser_fast.vit import SplitViT

Head = Callable[[Tensor], Tensor]
"""Features (B, C) to scores (B, K)."""


def image_classifier(model: SplitViT, head: Head, device: torch.device | str) -> Classifier:
    """Classify images by a head on the model's embedding.

    Args:
        model: on `device`.
        head: features (B, C) float32 to scores (B, K), on `device`.
        device: where both run.

    Returns:
        Images (B, 3, S, S) uint8, on any device, to scores (B, K) on `device`.
    """

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
    classifiers: Mapping[str, Classifier], sets: Iterable[ImageSet], *, progress: bool = False
) -> dict[str, list[ErrorRate]]:
    """The errors of each classifier, by name, on each set.

    Args:
        classifiers: images to scores, by name.
        sets: kind, severity and batches, as of `generate_corruptions`.
        progress: show a bar on the terminal.

    Raises:
        ValueError: a set without images.
    """
    rates: dict[str, list[ErrorRate]] = {name: [] for name in classifiers}
    total = len(CORRUPTIONS) * len(SEVERITIES)
    for kind, severity, batches in track(sets, "corruptions", show=progress, total=total):
        wrong: dict[str, list[Tensor]] = {name: [] for name in classifiers}
        for images, labels in batches:
            for name, classify in classifiers.items():
                wrong[name].append(classify(images).argmax(1).cpu() != labels)
        for name, parts in wrong.items():
            share = share_of(torch.cat(parts) if parts else torch.zeros(0))
            rates[name].append(ErrorRate(kind, severity, share.value, share.low, share.high, sum(map(len, parts))))
    return rates


def mean_corruption_error(rates: Sequence[ErrorRate], baseline: Sequence[ErrorRate] | None = None) -> float:
    """The mean over kinds of the error summed over severities, divided by the baseline's, clean images left out.

    Without a baseline the error is averaged over severities: a share of images. With one, 1 is as good as the baseline.

    Args:
        rates: of one classifier.
        baseline: of the one that it is compared with.

    Raises:
        ValueError: no corrupted set, or a baseline that `check_baseline` refuses.

    Source: Hendrycks & Dietterich, 2019, section 3.2; their baseline is AlexNet.
    """
    kinds = _by_kind(rates)
    if not kinds:
        raise ValueError("rates: got no corrupted set, takes one or more")
    if baseline is None:
        return fmean(fmean(errors.values()) for errors in kinds.values())
    check_baseline(baseline, [(kind, severity) for kind, errors in kinds.items() for severity in errors])
    others = _by_kind(baseline)
    return fmean(
        sum(errors.values()) / sum(others[kind][severity] for severity in errors) for kind, errors in kinds.items()
    )


def check_baseline(baseline: Sequence[ErrorRate], sets: Iterable[tuple[str, int]]) -> None:
    """Raise ValueError where the errors on the sets (kind, severity) can't be relative to the baseline's.

    It lacks a kind or severity, or never errs on a kind.
    """
    others = _by_kind(baseline)
    severities: dict[str, list[int]] = {}
    for kind, severity in sets:
        if kind != CLEAN:
            severities.setdefault(kind, []).append(severity)
    for kind, wanted in severities.items():
        if missing := sorted(set(wanted) - set(others.get(kind, {}))):
            raise ValueError(f"baseline: lacks {kind} at severity {', '.join(map(str, missing))}")
        if not sum(others[kind][severity] for severity in wanted):
            raise ValueError(f"baseline: never errs on {kind}, so that nothing can be relative to it")


def flip_probability(predictions: Tensor, *, noise: bool) -> float:
    """How often the predicted class changes within sequences of images.

    Args:
        predictions: (N, F) classes, F at least 2.
        noise: compare with a sequence's first frame, as frames of noise have no order; else with the frame before.

    Raises:
        ValueError: predictions of another shape.

    Source: Hendrycks & Dietterich, 2019, section 3.3.
    """
    if predictions.ndim != 2 or not len(predictions) or predictions.shape[1] < 2:
        raise ValueError(f"predictions: got {tuple(predictions.shape)}, takes (N, F), N > 0, F > 1")
    before = predictions[:, :1] if noise else predictions[:, :-1]
    return (predictions[:, 1:] != before).double().mean().item()


def flip_rates(
    classifiers: Mapping[str, Classifier], sets: Iterable[SequenceSet], *, progress: bool = False
) -> dict[str, list[FlipRate]]:
    """The flip probability of each classifier, by name, on each set.

    Args:
        classifiers: images to scores, by name.
        sets: kind and sequences of images (F, 3, S, S) uint8.
        progress: show a bar on the terminal.
    """
    rates: dict[str, list[FlipRate]] = {name: [] for name in classifiers}
    for kind, sequences in track(sets, "perturbations", show=progress, total=len(PERTURBATIONS)):
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
        if rate.kind != CLEAN:
            kinds.setdefault(rate.kind, {})[rate.severity] = rate.error
    return kinds


# ---------------------------------------------------------------- what is shown


def read_errors(path: Path, *, model: str = "checkpoint") -> list[ErrorRate]:
    """The error rates of one model in a file that `CorruptionsResult.write` wrote.

    Args:
        path: of corruptions.csv.
        model: its name there.

    Raises:
        ValueError: the file is missing or holds none of them.
    """
    if not path.is_file():
        raise ValueError(f"baseline: got {path}, and there is no such file")
    try:
        rates = [
            ErrorRate(
                row["kind"],
                int(row["severity"]),
                float(row["error"]),
                float(row["low"]),
                float(row["high"]),
                int(row["images"]),
            )
            for row in read_csv(path)
            if row.get("model") == model
        ]
    except (KeyError, ValueError) as error:
        raise ValueError(f"baseline: got {path}, takes a file with error rates: {error}") from error
    if not rates:
        raise ValueError(f"baseline: got {path}, takes a file with error rates of {model!r}")
    return rates


def print_errors(
    rates: Mapping[str, Sequence[ErrorRate]],
    baseline: Sequence[ErrorRate] | None = None,
    console: Console | None = None,
) -> None:
    """Print the errors of each model, by name: a row a kind, and the mean corruption error."""
    table = Table(title="Error, mean over severities")
    table.add_column("kind")
    columns: dict[str, dict[str, str]] = {}
    for name, model_rates in rates.items():
        table.add_column(shown(name), justify="right")
        cells = {rate.kind: f"{rate.error:.3f}" for rate in model_rates if rate.kind == CLEAN}
        cells |= {kind: f"{fmean(errors.values()):.3f}" for kind, errors in _by_kind(model_rates).items()}
        cells["mean corruption error"] = f"{mean_corruption_error(model_rates):.3f}"
        if baseline is not None:
            cells["... relative to the baseline"] = f"{mean_corruption_error(model_rates, baseline):.3f}"
        columns[name] = cells
    for kind in next(iter(columns.values())):
        table.add_row(kind, *(cells[kind] for cells in columns.values()))
    (console or Console()).print(table)


def print_flips(rates: Mapping[str, Sequence[FlipRate]], console: Console | None = None) -> None:
    """Print the flip probabilities of each model, by name: a row a kind, and their mean."""
    table = Table(title="Flip probability, between frames of a sequence (of noise: against the first)")
    table.add_column("kind")
    for name in rates:
        table.add_column(shown(name), justify="right")
    for kind_rates in zip(*rates.values(), strict=True):
        table.add_row(kind_rates[0].kind, *(f"{rate.flip_probability:.4f}" for rate in kind_rates))
    means = (fmean(rate.flip_probability for rate in model_rates) for model_rates in rates.values())
    table.add_row("mean flip probability", *(f"{mean:.4f}" for mean in means))
    (console or Console()).print(table)


def plot_errors(rates: Mapping[str, Sequence[ErrorRate]], path: Path) -> Path:
    """Draw error against severity, a panel a kind and a line a model, clean images at severity 0."""
    kinds = list(_by_kind(next(iter(rates.values()))))
    columns = min(len(kinds), 5)
    down = -(-len(kinds) // columns)
    figure = Figure(figsize=(2.2 * columns + 1, 2 * down + 0.6), layout="constrained")
    panels = figure.subplots(down, columns, squeeze=False, sharex=True, sharey=True)
    for axes, kind in zip(panels.flat, kinds, strict=False):
        for name, model_rates in rates.items():
            line = [rate for rate in model_rates if rate.kind in (kind, CLEAN)]
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
    return save(figure, path)


# ---------------------------------------------------------------- the protocol


@dataclass(frozen=True)
class CorruptionsResult:
    """How robust a classifier is on a checkpoint's features and on those of its random control.

    Attributes:
        errors: on clean and corrupted images, by model.
        flips: within sequences of perturbed images, by model.
        shifts: {"model", "folder", "classes": how many the folder has}, and how it did on the folder's images.
        baseline: the errors that the mean corruption error is relative to, beside the absolute one.
    """

    errors: dict[str, list[ErrorRate]]
    flips: dict[str, list[FlipRate]]
    shifts: Rows
    baseline: list[ErrorRate] | None = None

    def write(self, folder: Path) -> list[Path]:
        """Write corruptions.csv, perturbations.csv, corruptions.png and, of shifted images, shifts.csv."""
        written = [
            write_table(self.errors, folder / "corruptions.csv"),
            write_table(self.flips, folder / "perturbations.csv"),
            plot_errors(self.errors, folder / "corruptions.png"),
        ]
        return written + ([write_rows(self.shifts, folder / "shifts.csv")] if self.shifts else [])

    def print(self, console: Console | None = None) -> None:
        """Print the errors and flip probabilities of each kind, and top-1 and top-5 on shifted images."""
        print_errors(self.errors, self.baseline, console)
        print_flips(self.flips, console)
        if self.shifts:
            print_rows(self.shifts, "Shifted images, among the classes of their folder", console)


def evaluate(
    models: Models,
    data: str = DEFAULT_DATA,
    *,
    images: int = 128,
    sequences: int = 32,
    corrupted: Path | None = None,
    perturbed: Path | None = None,
    shifted: Sequence[Path] = (),
    baseline: Path | None = None,
    classifier: Literal["knn", "linear"] = "linear",
    k: int | None = None,
    temperature: float = 0.07,
    seed: int = 0,
    image_size: int | None = None,
    crop_pct: float = 1.0,
    max_pixels: int = MAX_PIXELS,
    cache: Path | None = None,
    batch_size: int = 256,
    workers: int = 0,
    progress: bool = False,
) -> CorruptionsResult:
    """Test a classifier on frozen features on corrupted, perturbed and shifted images, beside a random initialization.

    Args:
        models: on their device: one, called "checkpoint", or several by name, which see the same images. Random
            initializations stand beside them.
        data: whose training images train the classifier and whose held-out images are corrupted, as `open_dataset`
            takes it.
        images: how many held-out images are corrupted, spread evenly: 15 kinds at 5 severities.
        sequences: how many are perturbed, step by step: 10 kinds.
        corrupted: folder of corrupted images instead, in the layout of ImageNet-C or CIFAR-10-C.
        perturbed: folder of sequences instead, in the layout of ImageNet-P or CIFAR-10-P.
        shifted: folders of other images of the classes, as ImageNet-V2, ImageNet-R and ImageNet-Sketch.
        baseline: corruptions.csv of another run; its checkpoint's errors make the mean corruption error relative.
        classifier: "linear" or "knn".
        k: number of neighbors of "knn"; default 20, or all where there are fewer training images.
        temperature: of the neighbors' votes.
        seed: of the corruptions and the probe.
        image_size: side of the images in pixels; default the models', where all have the same.
        crop_pct: share of a picture's shorter side that the center crop shows; ImageNet's protocol has 0.875. Folders
            of corrupted or perturbed images are taken as they are: they were cropped when they were made.
        max_pixels: of one picture; one of more is left out, as one that can't be read.
        cache: folder of the training features; None keeps them in memory.
        batch_size: images at a time.
        workers: processes that load images.
        progress: show bars on the terminal.

    Raises:
        ValueError: data that can't be opened or has no classes, folders in another layout, a baseline without these
            kinds, an image size that a model can't take, or options out of range; before anything is embedded.

    Example:
        >>> result = evaluate(load_split_vit("encoder.safetensors"), "folder:images", classifier="knn")
        >>> mean_corruption_error(result.errors["checkpoint"])
        0.43
        >>> result.write(Path("results"))
    """
    if classifier not in ("knn", "linear"):
        raise ValueError(f"classifier: got {classifier!r}, takes 'knn' or 'linear'")
    check_positive(images=images, sequences=sequences, batch_size=batch_size)
    size, *others = dict.fromkeys(check_image_size(vit, image_size) for vit in name_models(models).values())
    if others:
        raise ValueError(f"image_size: got models of {', '.join(map(str, (size, *others)))} pixels; give one for all")
    train_set, test_set = open_labelled(data, size, crop_pct=crop_pct, max_pixels=max_pixels)
    k = min(20, len(train_set)) if k is None else k
    if classifier == "knn":
        check_vote(k, temperature, len(train_set))
    folders = [
        ClassFolder(folder, train_set.classes, image_size=size, crop_pct=crop_pct, max_pixels=max_pixels)
        for folder in shifted
    ]
    test_images, labels = spread_items(test_set, images)
    if corrupted is None:
        sets = generate_corruptions(test_images, labels, seed=seed, batch_size=batch_size)
    else:
        reading: dict[str, Any] = {"batch_size": batch_size, "workers": workers, "max_pixels": max_pixels}
        sets = read_corruptions(corrupted, train_set.classes, image_size=size, **reading)
    image_sets = [clean_images(test_images, labels, batch_size=batch_size), *sets]
    if perturbed is None:
        sequence_sets = list(generate_perturbations(spread_items(test_set, sequences)[0], seed=seed))
    else:
        sequence_sets = list(read_perturbations(perturbed, image_size=size))
    baseline_rates = None if baseline is None else read_errors(baseline)
    if baseline_rates is not None:
        check_baseline(baseline_rates, [(kind, severity) for kind, severity, _ in image_sets])

    classifiers: dict[str, Classifier] = {}
    for name, encoder in with_controls(models).items():
        device = device_of(encoder)
        features, train_labels = embed_cached(
            encoder, train_set, device, cache=cache, batch_size=batch_size, workers=workers, progress=progress
        )
        if classifier == "linear":
            classes = len(train_set.classes)
            probe = train_probe(features, train_labels, classes=classes, seed=seed, device=device, progress=progress)
            head: Head = probe.head
        else:
            head = _voter(features.to(device), train_labels.to(device), k=k, temperature=temperature)
        classifiers[name] = image_classifier(encoder, head, device)

    shifts: Rows = [
        (
            {"model": name, "folder": folder.name, "classes": len(folder.indices)},
            folder.grade(classify, batch_size=batch_size, workers=workers),
        )
        for folder in folders
        for name, classify in classifiers.items()
    ]
    result = CorruptionsResult(
        errors=error_rates(classifiers, image_sets, progress=progress),
        flips=flip_rates(classifiers, sequence_sets, progress=progress),
        shifts=shifts,
        baseline=baseline_rates,
    )
    tell_skipped(train_set, test_set, *(folder.images for folder in folders))
    return result


def _voter(train_features: Tensor, train_labels: Tensor, *, k: int, temperature: float) -> Head:
    """Features (B, C) to the votes (B, K) of their k nearest neighbors."""
    return lambda features: knn_scores(train_features, train_labels, features, k=k, temperature=temperature)[k]
