"""How equivariant a model's token maps are: f(g x) against rho(g) f(x), for each layer and each g.

g moves the pixels of an image x, rho(g) moves the tokens f(x) of a layer along it (`group_action`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ser_fast.data import MAX_PIXELS
from ser_fast.data.sources import open_dataset
from ser_fast.evaluation import BUDGET
from ser_fast.evaluation.controls import PatchMeans
from ser_fast.evaluation.elements import parse_elements
from ser_fast.evaluation.features import spread_images
from ser_fast.evaluation.figures import save
from ser_fast.evaluation.knn import SampledImages
from ser_fast.evaluation.protocol import (
    DEFAULT_DATA,
    Models,
    check_image_size,
    check_images,
    check_positive,
    device_of,
    image_size_of,
    name_models,
    tell_skipped,
    with_controls,
)
from ser_fast.evaluation.tables import shown, write_csv, write_table
from ser_fast.evaluation.token_errors import (
    EmbeddingRecord,
    LayerRecord,
    check_elements,
    embedding_errors,
    equivariance_errors,
)
from ser_fast.evaluation.transformations import (
    Prediction,
    check_prediction,
    predict_transformations,
    print_predictions,
)
from ser_fast.io import printable
from ser_fast.lattice import LatticeMap, Size

_METRICS = {
    "relative_error": "Relative error (0: equivariant, 1: no better than the mean token)",
    "inverse_error": "Relative error of f(x) against rho(g)^-1 f(gx)",
    "aligned_cosine": "Aligned cosine (1: equivariant)",
    "retrieval": "Token retrieval, hit@1 (1: equivariant)",
    "hit5": "Token retrieval, hit@5 (1: equivariant)",
    "mrr": "Token retrieval, mean reciprocal rank (1: equivariant)",
}
_CHANCES = {"retrieval": "chance", "hit5": "chance_hit5", "mrr": "chance_mrr"}
_GROUPS = {"D4": "rotations and flips (D4)", "resampled": "scales (resampled)"}
_LAYERS_WIDE = 12  # side by side in a table of 80 columns


def plot(
    records: Mapping[str, Sequence[LayerRecord]],
    path: Path,
    *,
    split: int | None = None,
    metric: Literal["relative_error", "retrieval"] = "relative_error",
) -> Path:
    """Draw a measure against layer: one line a model, one panel the mean over D4, one that over the scales.

    Args:
        records: those of each model, by name.
        path: the figure, in the format of its suffix (.png, .pdf, .svg).
        split: the last layer before the prefix tokens, to mark it.
        metric: what is drawn.
    """
    guesses = [record.chance for model_records in records.values() for record in model_records]
    reference = {"relative_error": (1.0, "mean token"), "retrieval": (fmean(guesses), "a guess")}
    label = {"relative_error": "relative error", "retrieval": "token retrieval, hit@1"}[metric]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, len(_GROUPS), sharey=metric == "relative_error")
    for axes, (group, title) in zip(panels, _GROUPS.items(), strict=True):
        for name, model_records in records.items():
            errors = _means(model_records, group, metric)
            if name.startswith(BUDGET):
                for error in errors.values():
                    axes.axhline(error, color="black", linewidth=1, linestyle="-.", label=name)
            else:
                axes.plot(list(errors), list(errors.values()), marker="o", label=name)
        level, name = reference[metric]
        axes.axhline(level, color="grey", linewidth=1, linestyle=":", label=name)
        if split is not None:
            axes.axvline(split, color="grey", linewidth=1, linestyle="--", label="split")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set(title=title, xlabel="layer")
    panels[0].set_ylabel(label)
    for axes in panels:  # once all is drawn, since it ends the scaling
        axes.set_ylim(bottom=0)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper")
    return save(figure, path)


def print_table(records: Mapping[str, Sequence[LayerRecord]], console: Console | None = None) -> None:
    """Print a table for each measure: a section a model, by name, a row an element and a column a layer."""
    console = console or Console()
    layers = sorted({record.layer for model_records in records.values() for record in model_records})
    for metric, title in _METRICS.items():
        console.print(title, highlight=False)
        for start in range(0, len(layers), _LAYERS_WIDE):
            table = Table("", box=SIMPLE_HEAD, padding=0)
            columns = layers[start : start + _LAYERS_WIDE]
            for layer in columns:
                table.add_column(str(layer), justify="right")
            for name, model_records in records.items():
                rows = {f"mean {group}": _means(model_records, group, metric) for group in _GROUPS}
                for record in model_records:
                    rows.setdefault(record.element, {})[record.layer] = getattr(record, metric)
                table.add_section()
                table.add_row(shown(name), style="bold")
                for element, values in rows.items():
                    if values:
                        table.add_row(
                            element, *(f"{values[layer]:.2f}" if layer in values else "" for layer in columns)
                        )
                if metric in _CHANCES:
                    guess = fmean(getattr(record, _CHANCES[metric]) for record in model_records)
                    table.add_row("a guess, mean", *(f"{guess:.2f}" for _ in columns))
            console.print(table)


def _means(records: Sequence[LayerRecord], group: str, metric: str) -> dict[int, float]:
    """Layer: the mean of a measure over the elements of a group."""
    values: dict[int, list[float]] = {}
    for record in records:
        if record.group == group:
            values.setdefault(record.layer, []).append(getattr(record, metric))
    return {layer: fmean(values[layer]) for layer in sorted(values)}


# ---------------------------------------------------------------- the protocol


@dataclass(frozen=True)
class EquivarianceResult:
    """How equivariant encoders and their random controls are, and how well g is predicted from their tokens.

    Attributes:
        records: of each layer and element, by model; those of BUDGET, for each size of images and patches, are what the
            resampling alone costs.
        embeddings: of each embedding and element, by model.
        predictions: of each layer, target and regressor, by model; empty where they were not asked for.
        splits: blocks before the prefix tokens enter, by model.
        accuracy: kNN top-1 by model, where several were given and the images have labels.
    """

    records: dict[str, list[LayerRecord]]
    embeddings: dict[str, list[EmbeddingRecord]]
    predictions: dict[str, list[Prediction]]
    splits: dict[str, int]
    accuracy: dict[str, float] = field(default_factory=dict)

    def write(self, folder: Path) -> list[Path]:
        """Write equivariance.csv, embedding.csv and equivariance.png, where g was predicted prediction.csv, and where
        accuracies were measured error_accuracy.csv and error_accuracy.png; returns their paths.
        """
        splits = set(self.splits.values())
        written = [
            write_table(self.records, folder / "equivariance.csv"),
            write_table(self.embeddings, folder / "embedding.csv"),
            *([write_table(self.predictions, folder / "prediction.csv")] if self.predictions else []),
            plot(self.records, folder / "equivariance.png", split=splits.pop() if len(splits) == 1 else None),
        ]
        if self.accuracy:
            softness = self.softness()
            rows = [{"model": name, "knn": accuracy, **errors} for name, (accuracy, errors) in softness.items()]
            written += [
                write_csv(list(rows[0]), rows, folder / "error_accuracy.csv"),
                _plot_softness(softness, folder / "error_accuracy.png"),
            ]
        return written

    def softness(self) -> dict[str, tuple[float, dict[str, float]]]:
        """kNN top-1, and the mean relative error at the split of each group, by model."""
        found = {}
        for name, accuracy in self.accuracy.items():
            layer = max(1, self.splits[name])
            errors = {group: _means(self.records[name], group, "relative_error") for group in _GROUPS}
            found[name] = accuracy, {group: values[layer] for group, values in errors.items() if values}
        return found

    def print(self, console: Console | None = None) -> None:
        """Print a table for each measure, of the embeddings, and for each target of the prediction."""
        console = console or Console()
        print_table(self.records, console)
        self._print_embeddings(console)
        if self.predictions:
            print_predictions(self.predictions, console)
        for name, (accuracy, errors) in self.softness().items():
            said = ", ".join(f"{group} {error:.3f}" for group, error in errors.items())
            console.print(f"{printable(name)}: kNN top-1 {accuracy:.3f}, error at the split: {said}", markup=False)

    def _print_embeddings(self, console: Console) -> None:
        console.print("Embeddings: e(g x) against e(x), means (error 0, cosine and retrieval 1: invariant)")
        table = Table("", "", box=SIMPLE_HEAD, padding=0)
        for heading in ("group", "error", "cosine", "retrieval", "a guess"):
            table.add_column(heading, justify="left" if heading == "group" else "right")
        for name, records in self.embeddings.items():
            table.add_section()
            for kind in dict.fromkeys(record.embedding for record in records):
                for group in _GROUPS:
                    chosen = [record for record in records if (record.embedding, record.group) == (kind, group)]
                    if chosen:
                        measures = ("relative_error", "aligned_cosine", "retrieval", "chance")
                        values = (fmean(getattr(record, measure) for record in chosen) for measure in measures)
                        table.add_row(shown(name), kind, group, *(f"{value:.2f}" for value in values))
        console.print(table)


def _plot_softness(softness: Mapping[str, tuple[float, dict[str, float]]], path: Path) -> Path:
    """Draw error at the split against accuracy: a point a model, a panel a group."""
    groups = [group for group in _GROUPS if any(group in errors for _, errors in softness.values())]
    figure = Figure(figsize=(4.5 * max(1, len(groups)), 3.8), layout="constrained")
    for axes, group in zip(figure.subplots(1, max(1, len(groups)), squeeze=False).flat, groups, strict=False):
        for name, (accuracy, errors) in softness.items():
            if group in errors:
                axes.plot(accuracy, errors[group], "o")
                axes.annotate(name, (accuracy, errors[group]), xytext=(5, 5), textcoords="offset points", fontsize=8)
        axes.set(title=_GROUPS[group], xlabel="kNN top-1", ylabel="relative error at the split")
        axes.grid(alpha=0.3)
    return save(figure, path)


def evaluate(
    models: Models,
    data: str = DEFAULT_DATA,
    *,
    images: int = 256,
    image_size: int | None = None,
    elements: Sequence[str] = ("d4", "scales"),
    crop_pct: float = 1.0,
    max_pixels: int = MAX_PIXELS,
    predict: bool = True,
    pairs: int = 4,
    progress: bool = False,
) -> EquivarianceResult:
    """Measure the equivariance of every layer and the invariance of the embedding, and predict g from the tokens.

    Args:
        models: on their device: one, called "checkpoint", or several by name. Random initializations stand beside them.
        data: whose held-out images are used, as `open_dataset` takes it.
        images: how many of them, spread evenly.
        image_size: their side in pixels; default each model's own.
        elements: what images are moved by; names as `parse_elements` takes them.
        crop_pct: share of a picture's shorter side that the center crop shows; ImageNet's protocol has 0.875.
        max_pixels: of one picture; one of more is left out, as one that can't be read.
        predict: also predict g from the tokens of x and g x, which trains regressors for each layer: most of the time.
        pairs: scales and angles of each image for it; the last quarter of the images tests it.
        progress: show bars on the terminal.

    Raises:
        ValueError: data that can't be opened, an image size that a model can't take, too few images, or options out
            of range; before anything is measured.

    Example:
        >>> result = evaluate(load_split_vit("encoder.safetensors"), "folder:images", elements=["d4", "angle:15"])
        >>> [r.relative_error for r in result.records["checkpoint"] if r.element == "rot90"]  # by layer
        [0.21, 0.25, 0.40]
        >>> result.write(Path("results"))
    """
    check_positive(images=images, pairs=pairs)
    given = name_models(models)
    opening: dict[str, Any] = {"crop_pct": crop_pct, "max_pixels": max_pixels}
    test_sets = {
        size: open_dataset(data, train=False, image_size=size, **opening)
        for size in dict.fromkeys(check_image_size(vit, image_size) for vit in given.values())
    }
    held_out = {size: spread_images(test_set, images) for size, test_set in test_sets.items()}
    tell_skipped(*test_sets.values())
    maps: dict[Size, Mapping[str, LatticeMap]] = {}
    for vit in given.values():
        chosen = held_out[image_size_of(vit, image_size)]
        lattice = check_images(vit, chosen)
        maps[lattice] = check_elements(parse_elements(elements, lattice), lattice)
        if predict:
            check_prediction(len(chosen), pairs=pairs)
    records: dict[str, list[LayerRecord]] = {}
    embeddings: dict[str, list[EmbeddingRecord]] = {}
    predictions: dict[str, list[Prediction]] = {}
    patches: dict[tuple[int, Size], None] = {}
    named = with_controls(models)
    for name, vit in named.items():
        size = image_size_of(vit, image_size)
        patches[size, vit.patch_size] = None
        own = held_out[size].to(device_of(vit))
        moved = maps[check_images(vit, own)]
        records[name] = equivariance_errors(vit, own, elements=moved, progress=progress)
        embeddings[name] = embedding_errors(vit, own, elements=moved, progress=progress)
        if predict:
            predictions[name] = predict_transformations(vit, own, pairs=pairs, progress=progress)
    for size, patch_size in patches:
        means, own = PatchMeans(patch_size), held_out[size]
        lattice = check_images(means, own)
        label = BUDGET if len(patches) == 1 else f"{BUDGET} ({lattice[0]} x {lattice[1]})"
        records[label] = equivariance_errors(means, own, elements=maps[lattice])
    accuracy: dict[str, float] = {}
    if len(given) > 1:
        samples = {size: SampledImages.open(data, size, **opening) for size in held_out}
        for name, vit in named.items():
            sample = samples[image_size_of(vit, image_size)]
            if sample.labelled:
                accuracy[name] = sample.top1(sample.embed(vit, "train"), sample.embed(vit, "test"))
    return EquivarianceResult(records, embeddings, predictions, {n: vit.split for n, vit in named.items()}, accuracy)
