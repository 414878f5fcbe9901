"""The figures of a study."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from ser_fast.interpolation import INTERPOLATIONS
from ser_fast.sensitivity.analysis import (
    BASE,
    FACTORS,
    RESAMPLING_FACTORS,
    change_of,
    mean,
    resampled,
    source_of,
    trusted,
    varied,
)
from ser_fast.sensitivity.factors import DEFAULT
from ser_fast.sensitivity.table import Row
from ser_fast.sensitivity.words import level_name


def draw(rows: Sequence[Row]) -> dict[str, tuple[str, Figure]]:
    """The figures of a study.

    Args:
        rows: of the study.

    Returns:
        Name: the caption and the figure.
    """
    figures = {
        "changes": (
            f"Change of the relative error as one option leaves the default ({DEFAULT.resampling}) on the same images, "
            "mean over the elements that resample (95 % over images); linear up to 10 %, logarithmic beyond.",
            _draw_changes(rows),
        ),
        "factors": (
            "Relative error as one factor leaves the default, mean over the elements that resample (95 % over images).",
            _draw_factors(rows),
        ),
        "elements": (
            "Relative error of each element and interpolation, other factors as the default.",
            _draw_elements(rows),
        ),
        "response": (
            "What is left, at its true place, of a wave along x (solid: no antialias, dashed: antialias).",
            _draw_response(rows),
        ),
        "algebra": (
            "What each interpolation owes to being a representation: mean over sources and elements that resample.",
            _draw_algebra(rows),
        ),
        "cost": (
            "Relative error (mean over sources and elements) against time, over that of a copy.",
            _draw_cost(rows),
        ),
    }
    if any(row.model for row in rows):
        figures["layers"] = ("Relative error and aligned cosine per layer, default resampling.", _draw_layers(rows))
    return figures


def _draw_changes(rows: Sequence[Row]) -> Figure:
    differences = resampled(rows, "difference")
    sources = list(dict.fromkeys(map(source_of, differences)))
    levels: list[tuple[str, Any]] = [
        (factor, level)
        for factor in RESAMPLING_FACTORS
        for level in varied(differences, factor)
        if level != BASE[factor]
    ]
    figure = Figure(figsize=(9, 1.2 + 0.4 * len(levels)), layout="constrained")
    axes = figure.subplots()
    for i, name in enumerate(sources):
        change = [
            [100 * share for share in change_of(rows, name, replace(DEFAULT.resampling, **{factor: level}))]
            for factor, level in levels
        ]
        axes.errorbar(
            [value for value, _, _ in change],
            [y + (i - (len(sources) - 1) / 2) * 0.6 / len(sources) for y in range(len(levels))],
            xerr=[[value - low for value, low, _ in change], [high - value for value, _, high in change]],
            fmt="o",
            markersize=4,
            capsize=2,
            label=name,
        )
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xscale("symlog", linthresh=10)
    low, high = axes.get_xlim()
    ticks = [tick for tick in (-30, -10, -5, 0, 5, 10, 30, 100, 300) if low <= tick <= high]
    axes.set_xticks(ticks, [f"{tick:+d} %" if tick else "default" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_yticks(range(len(levels)), [f"{factor}: {level_name(factor, level)}" for factor, level in levels])
    axes.invert_yaxis()
    axes.set_xlabel("change of the relative error")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=len(sources), frameon=False)
    return figure


def _draw_factors(rows: Sequence[Row]) -> Figure:
    figure = Figure(figsize=(13, 6.4), layout="constrained")
    panels = figure.subplots(2, 4, sharey=True).flat
    errors = resampled(rows, "relative_error")
    sources = list(dict.fromkeys(map(source_of, errors)))
    for axes, factor in zip(panels, FACTORS, strict=False):
        by_level = varied(errors, factor)
        present = [
            name for name in sources if any(source_of(row) == name for group in by_level.values() for row in group)
        ]
        for i, name in enumerate(present):
            means = [mean(row for row in group if source_of(row) == name) for group in by_level.values()]
            shift = (i - (len(present) - 1) / 2) * 0.6 / len(present)
            value = [v for v, _, _ in means]
            spread = [[v - low for v, low, _ in means], [high - v for v, _, high in means]]
            axes.errorbar(
                [x + shift for x in range(len(means))],
                value,
                yerr=spread,
                fmt="o",
                markersize=4,
                capsize=2,
                label=name,
                color=f"C{sources.index(name)}",
            )
        labels = [level_name(factor, level).replace("bicubic_antialias", "bicubic,\nantialias") for level in by_level]
        axes.set_xticks(range(len(by_level)), labels, rotation=35, ha="right")
        axes.set(title=factor, xlim=(-0.6, len(by_level) - 0.4))
        axes.grid(axis="y", alpha=0.3)
    figure.axes[0].set_ylim(0)  # of all panels, now that all points are drawn
    for row_of_axes in (0, 4):
        figure.axes[row_of_axes].set_ylabel("relative error")
    figure.axes[-1].axis("off")
    figure.axes[-1].legend(*figure.axes[0].get_legend_handles_labels(), loc="center", frameon=False)
    return figure


def _draw_elements(rows: Sequence[Row]) -> Figure:
    errors = [row for row in rows if row.measure == "relative_error"]
    elements = list(dict.fromkeys(row.element for row in errors))
    sources = list(dict.fromkeys(map(source_of, errors)))
    figure = Figure(figsize=(max(9, 0.45 * len(elements)), 2.6 * len(sources)), layout="constrained")
    for axes, name in zip(figure.subplots(len(sources), sharex=True, squeeze=False).flat, sources, strict=True):
        for level, level_rows in varied([row for row in errors if source_of(row) == name], "interpolation").items():
            values = [mean(row for row in level_rows if row.element == element)[0] for element in elements]
            axes.plot(range(len(elements)), values, marker="o", markersize=3, label=str(level))
        axes.set(title=name, ylabel="relative error")
        axes.set_xticks(range(len(elements)), elements, rotation=60, ha="right")
        axes.grid(axis="y", alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    return figure


def _draw_response(rows: Sequence[Row]) -> Figure:
    waves = [row for row in rows if row.measure == "response" and row.convention == DEFAULT.resampling.convention]
    by_group = {row.group: row.element for row in reversed(waves) if row.group != "D4"}  # the first of each
    elements = list(reversed(by_group.values()))
    figure = Figure(figsize=(3.4 * len(elements) + 1.4, 3.4), layout="constrained")
    for axes, element in zip(figure.subplots(1, len(elements), sharey=True, squeeze=False).flat, elements, strict=True):
        for resampling in dict.fromkeys(row.resampling for row in waves):
            curve = [row for row in waves if row.element == element and row.resampling == resampling]
            axes.plot(
                [row.frequency for row in curve],
                [row.value for row in curve],
                color=f"C{INTERPOLATIONS.index(resampling.interpolation)}",
                linestyle="--" if resampling.antialias else "-",
                label=resampling.interpolation + (", antialias" if resampling.antialias else ""),
            )
        axes.set(title=element, xlabel="cycles a token")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("gain")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    return figure


def _draw_algebra(rows: Sequence[Row]) -> Figure:
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    names = ("composition", "round_trip", "noise_gain")
    for axes, measure in zip(figure.subplots(1, len(names)), names, strict=True):
        by_level = varied(resampled(rows, measure), "interpolation")
        means = {level: mean(level_rows)[0] for level, level_rows in by_level.items()}
        axes.bar(range(len(means)), list(means.values()))
        axes.set_xticks(range(len(means)), [str(level) for level in means], rotation=35, ha="right")
        axes.set(title=measure.replace("_", " "))
    return figure


def _draw_cost(rows: Sequence[Row]) -> Figure:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    errors = [row for row in trusted(resampled(rows, "relative_error")) if row.is_default]
    times = [row for row in rows if row.measure == "time"]
    for resampling in dict.fromkeys(row.resampling for row in times):
        error = mean(row for row in errors if row.resampling == resampling)[0]
        taken = mean(row for row in times if row.resampling == resampling)[0]
        if resampling.padding == DEFAULT.resampling.padding:
            color = f"C{INTERPOLATIONS.index(resampling.interpolation)}"
            label = resampling.interpolation + (", antialias" if resampling.antialias else "")
            axes.scatter(taken, error, color=color, marker="s" if resampling.antialias else "o", label=label)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False)
    axes.set(xlabel="time / copy", ylabel="relative error", xlim=(0, None))
    axes.grid(alpha=0.3)
    return figure


def _draw_layers(rows: Sequence[Row]) -> Figure:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    base = [row for row in rows if row.model and row.is_default and row.resampling == DEFAULT.resampling]
    panels = {"relative_error": ("relative error", None), "aligned_cosine": ("aligned cosine", 1)}
    for axes, (measure, (label, top)) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for model in dict.fromkeys(row.model for row in base):
            model_rows = [row for row in resampled(base, measure) if row.model == model]
            layers = sorted({row.layer for row in model_rows})
            values = [mean(row for row in model_rows if row.layer == layer) for layer in layers]
            (line,) = axes.plot(layers, [v for v, _, _ in values], marker="o", label=model)
            bounds = [low for _, low, _ in values], [high for _, _, high in values]
            axes.fill_between(layers, *bounds, alpha=0.2, color=line.get_color())
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set(xlabel="layer", ylabel=label, ylim=(0, top))
        axes.legend()
    return figure
