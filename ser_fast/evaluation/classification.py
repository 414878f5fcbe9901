"""Classifiers graded: top-1 and top-5 with confidence intervals, and the confusion matrix."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from scipy.stats import binomtest
from torch import Tensor

_BEST = 5
_NAMED_CLASSES = 20  # more names than this don't fit beside a confusion matrix


@dataclass(frozen=True)
class Share:
    """A share of images, `low` to `high` its 95 % Wilson interval, which takes images to be independent draws."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


@dataclass(frozen=True)
class Classification:
    """How a classifier did on labelled images.

    Attributes:
        top1: the share of images whose class is predicted first.
        top5: the share of images whose class is among the first five.
        confusion: (K, K) int64, entry (i, j) the number of images of class i predicted as class j. Images without any
            prediction are in no entry.
        images: how many.
    """

    top1: Share
    top5: Share
    confusion: Tensor
    images: int

    def columns(self) -> dict[str, float]:
        """A row of a table: top1, top1_low, top1_high, top5, top5_low, top5_high, images."""
        shares = {"top1": self.top1, "top5": self.top5}
        return {
            **{
                column: number
                for name, of in shares.items()
                for column, number in ((name, of.value), (f"{name}_low", of.low), (f"{name}_high", of.high))
            },
            "images": self.images,
        }


Rows = list[tuple[dict[str, str | int | float], Classification]]
"""What identifies each classifier, by column, and how it did."""


def share_of(hits: Tensor) -> Share:
    """The share of True in (M,) bool, with its interval.

    Raises:
        ValueError: no entries.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", 1927, by scipy.
    """
    if not len(hits):
        raise ValueError("hits: got none, takes one for each image")
    test = binomtest(int(hits.sum()), len(hits))
    interval = test.proportion_ci(0.95, method="wilson")
    return Share(float(test.statistic), float(interval.low), float(interval.high))


def rank(scores: Tensor) -> Tensor:
    """(M, min(5, K)) int64: the classes of the highest scores (M, K), best first; -1 where the score is -inf."""
    best, classes = scores.topk(min(_BEST, scores.shape[1]))
    return classes.masked_fill(best == -torch.inf, -1)


def grade(ranked: Tensor, labels: Tensor, classes: int) -> Classification:
    """Grade predictions.

    Args:
        ranked: (M, n) int64, the predicted classes of each image, best first; -1 for none.
        labels: (M,) int64 of at least 0.
        classes: K, more than any prediction. A label may be beyond it: predicted by none, it is wrong.

    Example:
        >>> grade(rank(head(features)), labels, classes=10).top1.value
        0.71
    """
    hits = ranked[:, :_BEST] == labels[:, None]  # (M, n)
    size = max(classes, int(labels.max()) + 1)
    first = ranked[:, 0]
    told = first >= 0
    counts = torch.bincount(labels[told] * size + first[told], minlength=size * size)
    return Classification(share_of(hits[:, 0]), share_of(hits.any(1)), counts.view(size, size), len(labels))


def write_rows(rows: Rows, path: Path) -> None:
    """Write a CSV file: what identifies each classifier, then `Classification.columns`."""
    lines = [{**of, **result.columns()} for of, result in rows]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)


def print_rows(rows: Rows, title: str, console: Console | None = None) -> None:
    """Print top-1 and top-5 with their intervals, a line a classifier."""
    table = Table(title=title)
    for heading in rows[0][0]:
        table.add_column(heading)
    for heading in ("top-1 (95 % interval)", "top-5 (95 % interval)"):
        table.add_column(heading, justify="right")
    for of, result in rows:
        cells = (f"{value:g}" if isinstance(value, float) else str(value) for value in of.values())
        table.add_row(*cells, str(result.top1), str(result.top5))
    (console or Console()).print(table)


def write_confusion(rows: Rows, classes: Sequence[str], path: Path) -> None:
    """Write the confusion matrices as a CSV file of their entries above 0: identification, truth, predicted, images."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow((*rows[0][0], "truth", "predicted", "images"))
        for of, result in rows:
            for truth, predicted in result.confusion.nonzero().tolist():
                count = int(result.confusion[truth, predicted])
                writer.writerow((*of.values(), classes[truth], classes[predicted], count))


def plot_confusion(rows: Rows, classes: Sequence[str], path: Path) -> None:
    """Draw a panel for each classifier: of the images of each class (row), the share predicted as each (column)."""
    columns = min(len(rows), 5)
    down = -(-len(rows) // columns)
    figure = Figure(figsize=(3.4 * columns + 1, 3.4 * down + 0.6), layout="constrained")
    panels = figure.subplots(down, columns, squeeze=False, sharex=True, sharey=True)
    for axes, (of, result) in zip(panels.flat, rows, strict=False):
        shares = result.confusion / result.confusion.sum(1, keepdim=True).clamp(min=1)
        image = axes.imshow(shares.numpy(), vmin=0, vmax=1, cmap="viridis")
        names = (f"{name} {value}" for name, value in of.items() if not isinstance(value, float))
        axes.set_title(", ".join(names), fontsize=8)
    for axes in panels.flat[len(rows) :]:
        axes.remove()
    if len(classes) <= _NAMED_CLASSES:
        panels[0, 0].set_yticks(range(len(classes)), classes)
        panels[0, 0].set_xticks(range(len(classes)), classes)
        for axes in panels.flat:
            axes.tick_params("x", rotation=90)
            axes.tick_params(labelsize=7)
    figure.supxlabel("predicted")
    figure.supylabel("class")
    figure.colorbar(image, ax=panels, label="share of the class")
    figure.savefig(path, dpi=150)
