"""The figures of token maps."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray
from torch import Tensor

from ser_fast.evaluation.figures import save

if TYPE_CHECKING:
    from ser_fast.evaluation.pictures import Layer, Panel

_COLORS = ("#e6194b", "#3cb44b", "#ffe119", "#4363d8", "#f58231", "#911eb4", "#42d4f4", "#f032e6")  # of tokens
_OUTLINE = [withStroke(linewidth=3, foreground="black")]  # seen on dark and on light images
_GAP = 0.06  # between the two views, as a share of the first one's width


def draw_tokens(panels: Mapping[str, "Panel"], element: str, path: Path) -> Path:
    """Draw the tokens of one image as colors: a row a layer, three columns a model; returns the path.

    Args:
        panels: by model.
        element: the map's name.
        path: of the figure.
    """
    layers = sorted({layer for panel in panels.values() for layer in panel.layers})
    figure = Figure(figsize=(1.45 * 3 * len(panels) + 0.7, 1.6 * (1 + len(layers)) + 0.9), layout="constrained")
    groups = figure.subfigures(1, len(panels), wspace=0.04, squeeze=False)[0]
    for number, (group, (name, panel)) in enumerate(zip(groups, panels.items(), strict=True)):
        group.suptitle(name, fontsize=13, fontweight="bold")
        grid = group.subplots(1 + len(layers), 3, squeeze=False)
        for axes in grid.flat:
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        for axes, image, title in zip(grid[0], (panel.image, panel.moved), ("x", f"g x\n({element})"), strict=False):
            axes.imshow(image.permute(1, 2, 0).numpy())
            axes.set_title(title, fontsize=10)
        grid[0, 2].set_axis_off()
        for row, layer in zip(grid[1:], layers, strict=True):
            # In every group, so that all are as wide, and seen in the first.
            label = f"layer {layer}" + (" (split)" if layer == panel.split else "")
            row[0].set_ylabel(label, fontsize=10, alpha=0 if number else 1)
            if layer not in panel.layers:
                for axes in row:
                    axes.set_axis_off()
                continue
            drawn = panel.layers[layer]
            shown = (None, panel.valid, panel.valid)
            for axes, colors, valid in zip(row, drawn.colors, shown, strict=True):
                axes.imshow(_masked(colors, valid), interpolation="nearest")
            row[2].set_xlabel("" if math.isnan(drawn.error) else f"error {drawn.error:.2f}", fontsize=9)
        for axes, title in zip(grid[1], ("f(x)", "f(g x)", "\u03c1(g) f(x)"), strict=True):
            axes.set_title(title, fontsize=10)
    return save(figure, path, dpi=130)


def draw_matches(panels: Mapping[str, "Panel"], element: str, path: Path) -> Path:
    """Draw where a few tokens of x are found in g x: a row a layer, a column a model; returns the path.

    Args:
        panels: by model.
        element: the map's name.
        path: of the figure.
    """
    layers = sorted({layer for panel in panels.values() for layer in panel.layers})
    figure = Figure(figsize=(4.2 * len(panels) + 0.4, 2.3 * len(layers) + 0.8), layout="constrained")
    grid = figure.subplots(len(layers), len(panels), squeeze=False)
    for column, (name, panel) in enumerate(panels.items()):
        for axes, layer in zip(grid[:, column], layers, strict=True):
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            if layer in panel.layers:
                _draw_pair(axes, panel, panel.layers[layer])
            if not column:
                axes.set_ylabel(f"layer {layer}" + (" (split)" if layer == panel.split else ""), fontsize=10)
        grid[0, column].set_title(name, fontsize=13, fontweight="bold")
    figure.supxlabel(
        f"Left x, right g x ({element}). Squares: tokens of x. Circles: where they are in g x.\n"
        "Lines: to where they are found, dotted and crossed if elsewhere.",
        fontsize=9,
    )
    return save(figure, path, dpi=100)  # photographs, which PNG doesn't make small


def _draw_pair(axes: Axes, panel: "Panel", layer: "Layer") -> None:
    """Two views side by side in pixels of x, and the matches between them."""
    (height, width), (h, w) = panel.image.shape[1:], panel.moved.shape[1:]
    start = width * (1 + _GAP)
    axes.imshow(panel.image.permute(1, 2, 0).numpy(), extent=(0, width, height, 0))
    axes.imshow(panel.moved.permute(1, 2, 0).numpy(), extent=(start, start + w, h, 0))
    axes.set(xlim=(0, start + w), ylim=(max(height, h), 0), aspect="equal")
    patch_y, patch_x = height / layer.colors.plain.shape[0], width / layer.colors.plain.shape[1]
    for number, match in enumerate(layer.matches):
        (y, x), (true_y, true_x), (found_y, found_x) = match.place, match.true, match.found
        style: dict[str, Any] = {"color": _COLORS[number % len(_COLORS)], "path_effects": _OUTLINE}
        corner = (x - 0.5) * patch_x, (y - 0.5) * patch_y
        axes.add_patch(Rectangle(corner, patch_x, patch_y, fill=False, linewidth=1.8, **style))
        line = [x * patch_x, start + found_x * patch_x], [y * patch_y, found_y * patch_y]
        axes.plot(*line, linewidth=1.4, linestyle="-" if match.hit else (0, (1, 1.5)), **style)
        if not match.hit:
            axes.plot(line[0][1], line[1][1], "X", markersize=6, **style)
        place = start + true_x * patch_x, true_y * patch_y
        axes.plot(*place, "o", markersize=9, fillstyle="none", markeredgewidth=1.8, **style)
    axes.set_xlabel(f"{layer.hit:.0%} of all tokens found (a guess: {layer.chance:.1%})", fontsize=9)


def _masked(colors: Tensor, valid: Tensor | None) -> NDArray[np.float32]:
    """Colors (H, W, 3), white where they aren't valid."""
    return (colors if valid is None else torch.where(valid[..., None], colors, 1.0)).numpy()
