"""The page of a sweep: what differs, and figures of every measure."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ser_fast.evaluation.figures import save
from ser_fast.report.engine import data_uri, render, write_page
from ser_fast.sweep.analysis import Interval, cell_means, judged, numeric_option, shared_seeds

if TYPE_CHECKING:
    from ser_fast.sweep.evaluation import SweepResult

REPORT = "report.html"


def write_report(result: "SweepResult", out: Path) -> list[Path]:
    """Write the figures as PNG files, and report.html, which holds all of it; returns their paths.

    Args:
        result: of the sweep.
        out: its folder.
    """
    figures = {"cells": ("Means over seeds with 95 % intervals, the seeds' part taken off.", draw_cells(result))}
    if "knn" in result.compared:
        caption = "Error and token retrieval against accuracy; means over seeds with 95 % intervals."
        figures["error_accuracy"] = caption, draw_error_against_accuracy(result)
    drawn = {name: save(figure, out / f"{name}.png", dpi=120) for name, (_, figure) in figures.items()}
    tables, compared = result.tables, result.compared
    found, _ = judged(tables, result.protocol.baseline)
    means = {measure: cell_means(table) for measure, table in tables.items()}
    rows = [
        [cell, str(len(tables[next(iter(compared))].get(cell, {}))), *(_text(means[m].get(cell)) for m in compared)]
        for cell in result.options
    ]
    apart = [
        [cell, *(_text(found[measure].get(cell), signed=True) for measure in compared)]
        for cell in result.options
        if cell != result.protocol.baseline
    ]
    varied = sorted({name for cell in result.options.values() for name in cell})
    page = render(
        "sweep.html",
        title=f"Sweep of {', '.join(varied) or 'one cell'}",
        words=result.words(),
        figures=[(figures[name][0], data_uri(path.read_bytes())) for name, path in drawn.items()],
        titles=list(compared.values()),
        means=rows,
        differences=apart,
        baseline=result.protocol.baseline,
        arguments=" ".join(result.protocol.arguments),
    )
    return [*drawn.values(), write_page(out / REPORT, page)]


def draw_cells(result: "SweepResult") -> Figure:
    """A panel a measure: against the option that varies where it is one number, else a cell beside the other."""
    compared = result.compared
    option = numeric_option(list(result.options.values()))
    columns = min(4, max(1, len(compared)))
    down = max(1, -(-len(compared) // columns))
    figure = Figure(figsize=(3.6 * columns, 3.2 * down + (0 if option else 0.8)), layout="constrained")
    panels = figure.subplots(down, columns, squeeze=False)
    for axes, (measure, title) in zip(panels.flat, compared.items(), strict=False):
        table, controls = result.table(measure), result.table(measure, controls=True)
        seeds = shared_seeds(table)
        means = cell_means(table)
        if option:
            places = {cell: float(result.options[cell][option]) for cell in table}
            axes.set_xscale("symlog", linthresh=min((abs(x) for x in places.values() if x), default=1))
            axes.set_xticks(list(places.values()), [result.options[cell][option] for cell in places], rotation=45)
            axes.set_xlabel(option)
        else:
            places = {cell: float(number) for number, cell in enumerate(table)}
            axes.set_xticks(list(places.values()), list(places), rotation=90, fontsize=7)
        for cell, place in places.items():
            axes.scatter([place] * len(seeds), [table[cell][s] for s in seeds], s=8, color="grey", alpha=0.6)
            _bar(axes, place, means[cell], color="C1" if cell == result.protocol.baseline else "C0")
        for values in controls.values():
            axes.axhline(sum(values.values()) / len(values), color="grey", linewidth=0.8, linestyle=":")
        axes.set_title(title, fontsize=9)
        axes.grid(axis="y", alpha=0.3)
    for axes in panels.flat[len(compared) :]:
        axes.remove()
    return figure


def draw_error_against_accuracy(result: "SweepResult") -> Figure:
    """A panel for each measure of the layer that is compared: a point a cell, joined where one number varies."""
    ending = f"@{result.protocol.layer}"
    errors = {measure: title for measure, title in result.compared.items() if measure.endswith(ending)}
    figure = Figure(figsize=(5 * max(1, len(errors)), 4), layout="constrained")
    accuracy = cell_means(result.table("knn"))
    option = numeric_option(list(result.options.values()))
    panels = figure.subplots(1, max(1, len(errors)), squeeze=False)
    for axes, (measure, title) in zip(panels.flat, errors.items(), strict=False):
        error = cell_means(result.table(measure))
        shown = [cell for cell in accuracy if cell in error]
        if option:
            ordered = sorted(shown, key=lambda cell: float(result.options[cell][option]))
            axes.plot(
                [accuracy[cell].value for cell in ordered],
                [error[cell].value for cell in ordered],
                color="grey",
                linewidth=0.8,
            )
        for cell in shown:
            x, y = accuracy[cell], error[cell]
            axes.errorbar(x.value, y.value, xerr=_half(x), yerr=_half(y), marker="o", capsize=2, color="C0")
            name = result.options[cell][option] if option else cell
            axes.annotate(name, (x.value, y.value), xytext=(5, 5), textcoords="offset points", fontsize=7)
        axes.set(xlabel="kNN top-1", ylabel=title)
        axes.grid(alpha=0.3)
    return figure


def _bar(axes: Axes, place: float, mean: Interval, *, color: str) -> None:
    axes.errorbar(place, mean.value, yerr=_half(mean), marker="o", capsize=3, color=color)


def _half(value: Interval) -> float | None:
    return None if math.isnan(value.low) else value.high - value.value


def _text(value: Interval | None, *, signed: bool = False) -> str:
    if value is None or math.isnan(value.value):
        return ""
    sign = "+" if signed else ""
    bounds = "" if math.isnan(value.low) else f" [{value.low:{sign}.3f}, {value.high:{sign}.3f}]"
    return f"{value.value:{sign}.3f}{bounds}{' *' if signed and value.excludes_zero else ''}"
