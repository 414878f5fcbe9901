"""What a study's rows say: the recommended setting, ten lines of words, figures, and one self-contained HTML page."""

import base64
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, fields, replace
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from ser_fast.interpolation import INTERPOLATIONS
from ser_fast.io import write_atomically
from ser_fast.sensitivity import measures
from ser_fast.sensitivity.factors import DEFAULT, Resampling
from ser_fast.sensitivity.rows import TABLE, Row
from ser_fast.sensitivity.sources import CONTROL
from ser_fast.sensitivity.training import Score, draw_scores, judge

REPORT, SUMMARY = "report.html", "summary.txt"

Interval = tuple[float, float, float]  # value, low, high

_RESAMPLING_FACTORS = tuple(factor.name for factor in fields(Resampling))
_FACTORS = (*_RESAMPLING_FACTORS, "lattice", "pixels", "positions")
_WORTH = 0.01  # of the default's error: a setting that gains less is not worth leaving the default for
_BASE = {
    **asdict(DEFAULT.resampling),
    "lattice": "{}x{}".format(*DEFAULT.lattice),
    "pixels": DEFAULT.pixels,
    "positions": DEFAULT.positions,
}

# ---------------------------------------------------------------- reading rows


def source_of(row: Row) -> str:
    """The name of the row's source in figures and words."""
    return f"features: {row.model}" if row.model else row.signal


def mean(rows: Iterable[Row]) -> Interval:
    """The mean over the rows of each source, and over the sources; nan is left out.

    The bounds are the means of the bounds: at least as wide as an interval of the mean itself.
    """
    of_source: dict[str, list[Row]] = {}
    for row in rows:
        if not math.isnan(row.value):
            of_source.setdefault(source_of(row), []).append(row)
    if not of_source:
        return math.nan, math.nan, math.nan
    value, low, high = (
        fmean(fmean(getattr(row, name) for row in found) for found in of_source.values())
        for name in ("value", "low", "high")
    )
    return value, low, high


def resampled(rows: Iterable[Row], measure: str) -> list[Row]:
    """The rows of a measure, without those of D4, which only copies."""
    return [row for row in rows if row.measure == measure and row.group != "D4"]


def varied(rows: Iterable[Row], factor: str) -> dict[object, list[Row]]:
    """The rows where all other factors that apply are the default's, by the factor's level."""
    others = [name for name in _FACTORS if name != factor]
    levels: dict[object, list[Row]] = {}
    for row in rows:
        if getattr(row, factor) != "" and all(getattr(row, name) in ("", _BASE[name]) for name in others):
            levels.setdefault(getattr(row, factor), []).append(row)
    return levels


def trusted(rows: Sequence[Row]) -> list[Row]:
    """The rows that a recommendation may rest on: without the random initialisations, which are controls."""
    return [row for row in rows if not row.model.startswith(CONTROL)]


def changes(rows: Sequence[Row], factor: str) -> dict[object, Interval]:
    """How much each level of a factor changes the default's error, as a share of it, over all trusted sources."""
    differences = varied(resampled(trusted(rows), "difference"), factor)
    return {level: _share(rows, mean(found)) for level, found in differences.items()}


def _share(rows: Sequence[Row], difference: Interval) -> Interval:
    """A difference as a share of the default's error, over the trusted sources."""
    errors = resampled(trusted(rows), "relative_error")
    of_default = mean(row for row in errors if row.is_default and row.resampling == DEFAULT.resampling)[0]
    value, low, high = (number / of_default for number in difference)
    return value, low, high


def _change_of(rows: Sequence[Row], source: str, resampling: Resampling) -> Interval:
    """The change from the default's error, as a share of it, on one source."""
    of_source = [row for row in rows if source_of(row) == source and row.is_default]
    base = mean(r for r in resampled(of_source, "relative_error") if r.resampling == DEFAULT.resampling)[0]
    value, low, high = mean(r for r in resampled(of_source, "difference") if r.resampling == resampling)
    return value / base, low / base, high / base


def _is_better(change: Interval) -> bool:
    """Surely (all of its interval), and by something that counts."""
    return change[0] <= -_WORTH and change[2] < 0


def combine(rows: Sequence[Row]) -> Resampling:
    """The levels that are better than the default's, each factor for itself; not necessarily measured together."""
    chosen = DEFAULT.resampling
    for factor in _RESAMPLING_FACTORS:
        better = {level: change for level, change in changes(rows, factor).items() if _is_better(change)}
        if better:
            level: Any = min(better, key=lambda level: better[level][0])
            chosen = replace(chosen, **{factor: level})
    return chosen


def recommend(rows: Sequence[Row]) -> tuple[Resampling, Interval]:
    """The measured resampling with the lowest error, if it is better than the default; and its change.

    It must be better on average over the trusted sources, and not surely worse on any source, controls included.
    """
    measured: dict[Resampling, list[Row]] = {}
    for row in resampled(trusted(rows), "difference"):
        if row.is_default:
            measured.setdefault(row.resampling, []).append(row)
    names = dict.fromkeys(map(source_of, resampled(rows, "difference")))
    change = {resampling: _share(rows, mean(found)) for resampling, found in measured.items()}
    better = {
        resampling: of
        for resampling, of in change.items()
        if _is_better(of) and all(_change_of(rows, name, resampling)[1] <= 0 for name in names)
    }
    if not better:
        return DEFAULT.resampling, (0.0, 0.0, 0.0)
    best = min(better, key=lambda resampling: better[resampling][0])
    return best, better[best]


# ---------------------------------------------------------------- words


def summarise(rows: Sequence[Row]) -> list[str]:
    """Ten lines of words, each from the rows.

    Raises:
        ValueError: the rows hold no equivariance of any source but random features.
    """
    errors = resampled(rows, "relative_error")
    ours = trusted(errors)
    if not ours:
        raise ValueError("rows: hold no relative_error of fields, photographs or a checkpoint")
    best, change = recommend(rows)
    return [
        _what(rows),
        _recommended(rows, ours, best, change),
        _price(rows, best),
        f"Interpolation: {_levels(rows, 'interpolation')}. Lowest error by source: {_lowest(errors)}.",
        f"Antialias: {_levels(rows, 'antialias')}; where g shrinks the lattice "
        f"{_levels([row for row in rows if _shrinks(row)], 'antialias')}.",
        f"Padding: {_levels(rows, 'padding')}. DC gain {_gains(rows, 'padding', 'dc_gain')}.",
        f"Convention: {_levels(rows, 'convention')}.",
        f"Image side: error {_errors(ours, 'pixels')}. Position embeddings, all models: "
        f"{_errors([row for row in errors if row.model], 'positions')}.",
        f"Lattice: error {_errors(ours, 'lattice')}. {_exactness(rows, best)}",
        _control(rows),
    ]


def _what(rows: Sequence[Row]) -> str:
    sources = list(dict.fromkeys(source_of(row) for row in rows if row.signal))
    return (
        f"{len(rows)} measurements, {max(row.images for row in rows if row.kind == 'equivariance')} images a source, "
        f"{len({row.element for row in rows})} elements, sources: {', '.join(sources)}; errors below are means over "
        f"the elements that resample{'' if len(trusted(rows)) == len(rows) else ', random initialisations left out'}."
    )


def _recommended(rows: Sequence[Row], ours: Sequence[Row], best: Resampling, change: Interval) -> str:
    error = {r: mean(row for row in ours if row.is_default and row.resampling == r) for r in (DEFAULT.resampling, best)}
    if best == DEFAULT.resampling:
        told = f"Recommended: the default ({best}), error {_bounds(error[best])}"
        return f"{told}; nothing is surely better by {_WORTH:.0%} and nowhere surely worse."
    names = dict.fromkeys(map(source_of, resampled(rows, "difference")))
    by_source = (f"{name} {_percent(_change_of(rows, name, best))}" for name in names)
    return (
        f"Recommended: {best}; error {_bounds(error[best])} against {_bounds(error[DEFAULT.resampling])} for the "
        f"default ({DEFAULT.resampling}), a change of {_percent(change)}; by source: {', '.join(by_source)}."
    )


def _price(rows: Sequence[Row], best: Resampling) -> str:
    times: dict[Resampling, list[Row]] = {}
    for row in rows:
        if row.measure == "time":
            times.setdefault(row.resampling, []).append(row)
    factor = {resampling: mean(found)[0] for resampling, found in times.items()}
    cheapest = min(factor, key=lambda resampling: factor[resampling])
    of_best = factor[replace(best, convention=DEFAULT.resampling.convention)]
    return (
        f"Cost: the recommended setting takes {of_best:.1f} times a copy of the same tokens, the default "
        f"{factor[DEFAULT.resampling]:.1f}, the cheapest ({cheapest.interpolation}) {factor[cheapest]:.1f}."
    )


def _levels(rows: Sequence[Row], factor: str) -> str:
    """The change that each level of a factor makes, beside the default's level."""
    parts = [
        f"{_level(factor, level)} {_percent(change)}"
        for level, change in changes(rows, factor).items()
        if level != _BASE[factor]
    ]
    return f"from {_level(factor, _BASE[factor])}, " + (", ".join(parts) or "nothing else was measured")


def _lowest(errors: Sequence[Row]) -> str:
    parts = []
    for name in dict.fromkeys(map(source_of, errors)):
        of_level = {
            level: mean(found)[0]
            for level, found in varied([r for r in errors if source_of(r) == name], "interpolation").items()
        }
        lowest = min(of_level, key=lambda level: of_level[level])
        parts.append(f"{name} {lowest} ({of_level[lowest]:.3f})")
    return ", ".join(parts)


def _errors(errors: Sequence[Row], factor: str) -> str:
    found = {level: mean(rows) for level, rows in varied(errors, factor).items()}
    return ", ".join(f"{level} {_bounds(error)}" for level, error in found.items()) or "not measured"


def _gains(rows: Sequence[Row], factor: str, measure: str) -> str:
    found = varied(resampled(rows, measure), factor)
    return ", ".join(f"{level} {mean(of_level)[0]:.3f}" for level, of_level in found.items())


def _shrinks(row: Row) -> bool:
    return row.group == "scale" and float(row.element.split()[1]) < 1


def _exactness(rows: Sequence[Row], best: Resampling) -> str:
    defects = [row.value for row in rows if row.measure in ("composition", "round_trip") and row.group == "D4"]
    adjoint = max(row.value for row in rows if row.measure == "adjoint_defect")
    trips = [
        f"{mean(r for r in resampled(rows, 'round_trip') if r.is_default and r.resampling == resampling)[0]:.3f}"
        for resampling in (DEFAULT.resampling, best)
    ]
    on_d4 = f"off by at most {max(defects):.0e}" if max(defects) else "exact"
    return (
        f"On D4 composition and round trip are {on_d4}, the adjoint is off anywhere by at most "
        f"{adjoint:.0e}; a round trip that resamples loses {trips[0]} (default) or {trips[1]} (recommended)."
    )


def _control(rows: Sequence[Row]) -> str:
    parts = []
    base = [row for row in rows if row.model and row.is_default and row.resampling == DEFAULT.resampling]
    for model in dict.fromkeys(row.model for row in base):
        error, cosine, hits, chance = (
            mean(row for row in resampled(base, measure) if row.model == model)[0]
            for measure in ("relative_error", "aligned_cosine", "retrieval", "chance")
        )
        parts.append(f"{model} error {error:.3f}, cosine {cosine:.3f}, retrieval {hits:.3f} (chance {chance:.4f})")
    return f"Models at the default setting, mean over layers: {'; '.join(parts) or 'none'}."


def _level(factor: str, level: object) -> str:
    return {True: "on", False: "off"}[bool(level)] if factor == "antialias" else str(level)


def _bounds(interval: Interval) -> str:
    return "{:.3f} [{:.3f}, {:.3f}]".format(*interval)


def _percent(interval: Interval) -> str:
    return "{:+.1f} % [{:+.1f}, {:+.1f}]".format(*(100 * number for number in interval))


# ---------------------------------------------------------------- figures


def draw(rows: Sequence[Row]) -> dict[str, tuple[str, Figure]]:
    """Name: the caption and the figure."""
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
        for factor in _RESAMPLING_FACTORS
        for level in varied(differences, factor)
        if level != _BASE[factor]
    ]
    figure = Figure(figsize=(9, 1.2 + 0.4 * len(levels)), layout="constrained")
    axes = figure.subplots()
    for i, name in enumerate(sources):
        change = [
            [100 * share for share in _change_of(rows, name, replace(DEFAULT.resampling, **{factor: level}))]
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
    axes.set_yticks(range(len(levels)), [f"{factor}: {_level(factor, level)}" for factor, level in levels])
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
    for axes, factor in zip(panels, _FACTORS, strict=False):
        of_level = varied(errors, factor)
        present = [
            name for name in sources if any(source_of(row) == name for group in of_level.values() for row in group)
        ]
        for i, name in enumerate(present):
            found = [mean(row for row in group if source_of(row) == name) for group in of_level.values()]
            shift = (i - (len(present) - 1) / 2) * 0.6 / len(present)
            value = [v for v, _, _ in found]
            spread = [[v - low for v, low, _ in found], [high - v for v, _, high in found]]
            axes.errorbar(
                [x + shift for x in range(len(found))],
                value,
                yerr=spread,
                fmt="o",
                markersize=4,
                capsize=2,
                label=name,
                color=f"C{sources.index(name)}",
            )
        labels = [_level(factor, level).replace("bicubic_antialias", "bicubic,\nantialias") for level in of_level]
        axes.set_xticks(range(len(of_level)), labels, rotation=35, ha="right")
        axes.set(title=factor, xlim=(-0.6, len(of_level) - 0.4))
        axes.grid(axis="y", alpha=0.3)
    figure.axes[0].set_ylim(0)  # of all panels, now that all points are drawn
    for row_of_axes in (0, 4):
        figure.axes[row_of_axes].set_ylabel("relative error")
    figure.axes[-1].axis("off")
    figure.axes[-1].legend(*figure.axes[0].get_legend_handles_labels(), loc="center", frameon=False)
    return figure


def _draw_elements(rows: Sequence[Row]) -> Figure:
    errors = [row for row in rows if row.measure == "relative_error"]
    elements, sources = (list(dict.fromkeys(map(of, errors))) for of in (lambda row: row.element, source_of))
    figure = Figure(figsize=(max(9, 0.45 * len(elements)), 2.6 * len(sources)), layout="constrained")
    for axes, name in zip(figure.subplots(len(sources), sharex=True, squeeze=False).flat, sources, strict=True):
        for level, found in varied([row for row in errors if source_of(row) == name], "interpolation").items():
            values = [mean(row for row in found if row.element == element)[0] for element in elements]
            axes.plot(range(len(elements)), values, marker="o", markersize=3, label=str(level))
        axes.set(title=name, ylabel="relative error")
        axes.set_xticks(range(len(elements)), elements, rotation=60, ha="right")
        axes.grid(axis="y", alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    return figure


def _draw_response(rows: Sequence[Row]) -> Figure:
    waves = [row for row in rows if row.measure == "response" and row.convention == DEFAULT.resampling.convention]
    of_group = {row.group: row.element for row in reversed(waves) if row.group != "D4"}  # the first of each
    elements = list(reversed(of_group.values()))
    figure = Figure(figsize=(3.4 * len(elements) + 1.4, 3.4), layout="constrained")
    for axes, element in zip(figure.subplots(1, len(elements), sharey=True, squeeze=False).flat, elements, strict=True):
        for resampling in dict.fromkeys(row.resampling for row in waves):
            found = [row for row in waves if row.element == element and row.resampling == resampling]
            axes.plot(
                [row.frequency for row in found],
                [row.value for row in found],
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
        found = {
            level: mean(of_level)[0] for level, of_level in varied(resampled(rows, measure), "interpolation").items()
        }
        axes.bar(range(len(found)), list(found.values()))
        axes.set_xticks(range(len(found)), [str(level) for level in found], rotation=35, ha="right")
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
            found = [row for row in resampled(base, measure) if row.model == model]
            layers = sorted({row.layer for row in found})
            values = [mean(row for row in found if row.layer == layer) for layer in layers]
            (line,) = axes.plot(layers, [v for v, _, _ in values], marker="o", label=model)
            bounds = [low for _, low, _ in values], [high for _, _, high in values]
            axes.fill_between(layers, *bounds, alpha=0.2, color=line.get_color())
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set(xlabel="layer", ylabel=label, ylim=(0, top))
        axes.legend()
    return figure


# ---------------------------------------------------------------- the page

_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Sensitivity to interpolation, padding and alignment</title>
<style>
body {{ font: 16px/1.5 sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
img {{ max-width: 100% }} figure {{ margin: 2rem 0 }} figcaption {{ color: #555 }}
table {{ border-collapse: collapse }} th, td {{ padding: .2rem .7rem; text-align: right; border-bottom: 1px solid }}
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) {{ text-align: left }}
pre {{ white-space: pre-wrap; background: #f6f6f6; padding: 1rem }}
</style></head><body>
<h1>Sensitivity to interpolation, padding and alignment</h1>
<ol>{summary}</ol>
{training}
{figures}
<h2>Relative error, one factor at a time</h2>
<p>Mean over the elements that resample and over layers [95 % over images]; other factors as the default.</p>
{table}
<h2>Measures</h2><pre>{measures}</pre>
<p>All rows: {csv}</p>
</body></html>
"""


def write_report(rows: Sequence[Row], scores: Sequence[Score], out: Path) -> list[str]:
    """Write summary.txt, the figures as PNG files, and report.html, which holds all of it; returns the summary.

    Args:
        rows: of the study.
        scores: of the study of trained models; may be empty.
        out: the folder.
    """
    summary = summarise(rows)
    figures = draw(rows)
    section = ""
    if scores:
        section = f"<h2>After training</h2><ul>{_items(judge(scores))}</ul>"
        caption = (
            "Trained with each setting of SERLoss and measured alike, less the default's run with the same seed: every "
            "seed, and their mean. Band: twice the spread of the default's runs over seeds."
        )
        figures = {"training": (caption, draw_scores(scores)), **figures}
    shown = []
    for name, (caption, figure) in figures.items():
        path = out / f"{name}.png"
        figure.savefig(path, dpi=120)
        shown.append(_figure(path, caption))
    page = _PAGE.format(
        summary=_items(summary),
        training=section,
        figures="\n".join(shown),
        table=_table(rows),
        measures=escape(measures.__doc__ or ""),
        csv=TABLE,
    )
    for name, text in ((REPORT, page), (SUMMARY, "\n".join(summary) + "\n")):
        write_atomically(out / name, _writer(text))
    return summary


def _writer(text: str) -> Callable[[Path], int]:
    return lambda path: path.write_text(text, encoding="utf-8")


def _items(lines: Iterable[str]) -> str:
    return "".join(f"<li>{escape(line)}</li>" for line in lines)


def _figure(path: Path, caption: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    text = escape(caption)
    return f'<figure><img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'


def _table(rows: Sequence[Row]) -> str:
    errors = resampled(rows, "relative_error")
    sources = list(dict.fromkeys(map(source_of, errors)))
    lines = ["<tr>" + "".join(f"<th>{escape(heading)}</th>" for heading in ("factor", "level", *sources)) + "</tr>"]
    for factor in _FACTORS:
        for level, found in varied(errors, factor).items():
            values = [mean(row for row in found if source_of(row) == name) for name in sources]
            cells = [factor, _level(factor, level), *("" if math.isnan(v[0]) else _bounds(v) for v in values)]
            lines.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    return f"<table>{''.join(lines)}</table>"
