"""Figures that several evaluations draw."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.text import Text
from torch import Tensor

from ser_fast.evaluation.classification import Classification, Rows
from ser_fast.io import printable

_IN_A_MATRIX = 20  # classes; more names than this don't fit beside it
_CONFUSED = 15  # pairs of classes that are named
_LETTERS = 24  # of a class's name


def save(figure: Figure, path: Path, *, dpi: int = 150) -> Path:
    """Write a figure in the format of the path's suffix (.png, .pdf, .svg), its folder made if need be.

    Its texts are shown as they are: a class or a folder named "$x^$" is no formula.
    """
    for text in figure.findobj(Text):
        text.set_parse_math(False)
        text.set_text("\n".join(map(printable, text.get_text().split("\n"))))
    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({"text.parse_math": False}), warnings.catch_warnings():  # of texts made as it is drawn
        warnings.filterwarnings("ignore", "Glyph .* missing")  # of scripts that the font lacks: they become boxes
        figure.savefig(path, dpi=dpi)
    return path


def plot_confusion(rows: Rows, classes: Sequence[str], path: Path) -> Path:
    """Draw which classes are taken for which.

    Up to 20 classes, a panel for each classifier: of the images of each class (row), the share predicted as each
    (column). Of more, whose names nobody could read there: the accuracy of each class, sorted, a line for each
    classifier; and the pairs that each model confuses most, by its classifier with the highest top-1.

    Args:
        rows: what identifies each classifier, and how it did.
        classes: the names of the K classes.
        path: of the figure.
    """
    return save((_matrices if len(classes) <= _IN_A_MATRIX else _many_classes)(rows, classes), path)


def _many_classes(rows: Rows, classes: Sequence[str]) -> Figure:
    best: dict[str, tuple[str, Classification]] = {}
    for labels, result in rows:
        model = str(labels["model"])
        if model not in best or result.top1.value > best[model][1].top1.value:
            best[model] = _title(labels), result
    figure = Figure(figsize=(5 * len(best) + 5, 4.6), layout="constrained")
    lines, *panels = figure.subplots(1, len(best) + 1)
    colors = dict(zip(best, mpl.colormaps["tab10"].colors * len(best), strict=False))  # type: ignore[attr-defined]
    for labels, result in rows:
        right, total = _of_classes(result)
        accuracy = (right[total > 0] / total[total > 0]).sort(descending=True).values
        shown = best[str(labels["model"])][1] is result
        style: dict[str, Any] = {"linewidth": 2, "label": _title(labels)} if shown else {"linewidth": 0.5}
        lines.plot(range(1, len(accuracy) + 1), accuracy.numpy(), color=colors[str(labels["model"])], **style)
    lines.set(xlabel="class, from the best", ylabel="share of its images that are right", ylim=(0, 1))
    lines.legend(fontsize=7)
    for axes, (title, result) in zip(panels, best.values(), strict=True):
        wrong = [pair for pair in result.pairs() if pair[0] != pair[1]]
        wrong = sorted(wrong, key=lambda pair: -pair[2])[:_CONFUSED]
        names = [f"{_short(classes, truth)} as {_short(classes, predicted)}" for truth, predicted, _ in wrong]
        axes.barh(range(len(wrong)), [images for *_, images in wrong])
        axes.set_yticks(range(len(wrong)), names, fontsize=7)
        axes.invert_yaxis()
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_title(f"most confused, {title}", fontsize=8)
        axes.set_xlabel("images")
    return figure


def _of_classes(result: Classification) -> tuple[Tensor, Tensor]:
    """Of each class (K,) the images that are predicted right, and all that are predicted."""
    truth, predicted = result.confusion.indices()
    counts = result.confusion.values()
    right, total = counts.new_zeros(2, result.confusion.shape[0])
    return right.index_add(0, truth, counts * (truth == predicted)), total.index_add(0, truth, counts)


def _short(classes: Sequence[str], index: int) -> str:
    name = printable(classes[index])
    return name if len(name) <= _LETTERS else f"{name[: _LETTERS - 1]}…"


def _title(labels: Mapping[str, str | int | float]) -> str:
    return ", ".join(f"{name} {value}" for name, value in labels.items() if not isinstance(value, float))


def _matrices(rows: Rows, classes: Sequence[str]) -> Figure:
    columns = min(len(rows), 5)
    down = -(-len(rows) // columns)
    figure = Figure(figsize=(3.4 * columns + 1, 3.4 * down + 0.6), layout="constrained")
    panels = figure.subplots(down, columns, squeeze=False, sharex=True, sharey=True)
    for axes, (labels, result) in zip(panels.flat, rows, strict=False):
        counts = result.confusion.to_dense()
        shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
        image = axes.imshow(shares.numpy(), vmin=0, vmax=1, cmap="viridis")
        axes.set_title(_title(labels), fontsize=8)
    for axes in panels.flat[len(rows) :]:
        axes.remove()
    shown = [_short(classes, index) for index in range(len(classes))]
    panels[0, 0].set_yticks(range(len(classes)), shown)
    panels[0, 0].set_xticks(range(len(classes)), shown)
    for axes in panels.flat:
        axes.tick_params("x", rotation=90)
        axes.tick_params(labelsize=7)
    figure.supxlabel("predicted")
    figure.supylabel("class")
    figure.colorbar(image, ax=list(panels.flat[: len(rows)]), label="share of the class")
    return figure
