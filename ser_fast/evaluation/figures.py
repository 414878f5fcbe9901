"""Figures that several evaluations draw."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.text import Text

from ser_fast.evaluation.classification import Rows
from ser_fast.io import printable

_NAMED_CLASSES = 20  # more names than this don't fit beside a confusion matrix


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
    """Draw a panel for each classifier: of the images of each class (row), the share predicted as each (column).

    Args:
        rows: what identifies each classifier, and how it did.
        classes: the names of the K classes.
        path: of the figure.
    """
    columns = min(len(rows), 5)
    down = -(-len(rows) // columns)
    figure = Figure(figsize=(3.4 * columns + 1, 3.4 * down + 0.6), layout="constrained")
    panels = figure.subplots(down, columns, squeeze=False, sharex=True, sharey=True)
    for axes, (labels, result) in zip(panels.flat, rows, strict=False):
        shares = result.confusion / result.confusion.sum(1, keepdim=True).clamp(min=1)
        image = axes.imshow(shares.numpy(), vmin=0, vmax=1, cmap="viridis")
        names = (f"{name} {value}" for name, value in labels.items() if not isinstance(value, float))
        axes.set_title(", ".join(names), fontsize=8)
    for axes in panels.flat[len(rows) :]:
        axes.remove()
    if len(classes) <= _NAMED_CLASSES:
        shown = list(map(printable, classes))
        panels[0, 0].set_yticks(range(len(classes)), shown)
        panels[0, 0].set_xticks(range(len(classes)), shown)
        for axes in panels.flat:
            axes.tick_params("x", rotation=90)
            axes.tick_params(labelsize=7)
    figure.supxlabel("predicted")
    figure.supylabel("class")
    figure.colorbar(image, ax=list(panels.flat[: len(rows)]), label="share of the class")
    return save(figure, path)
