"""A study in ten lines of words."""

from collections.abc import Sequence
from dataclasses import replace

from ser_fast.sensitivity.analysis import (
    BASE,
    WORTH,
    Interval,
    change_of,
    changes,
    mean,
    recommend,
    resampled,
    source_of,
    trusted,
    varied,
)
from ser_fast.sensitivity.factors import DEFAULT, Resampling
from ser_fast.sensitivity.table import Row


def summarize(rows: Sequence[Row]) -> list[str]:
    """Ten lines of words, each from the rows.

    Args:
        rows: of a study.

    Raises:
        ValueError: the rows hold no equivariance of any source but random features.
    """
    errors = resampled(rows, "relative_error")
    ours = trusted(errors)
    if not ours:
        raise ValueError("rows: got no relative_error, takes that of fields, photographs or a checkpoint")
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
        f"the elements that resample{'' if len(trusted(rows)) == len(rows) else ', random initializations left out'}."
    )


def _recommended(rows: Sequence[Row], ours: Sequence[Row], best: Resampling, change: Interval) -> str:
    error = {r: mean(row for row in ours if row.is_default and row.resampling == r) for r in (DEFAULT.resampling, best)}
    if best == DEFAULT.resampling:
        default = f"Recommended: the default ({best}), error {bounds(error[best])}"
        return f"{default}; nothing is surely better by {WORTH:.0%} and nowhere surely worse."
    names = dict.fromkeys(map(source_of, resampled(rows, "difference")))
    by_source = (f"{name} {_percent(change_of(rows, name, best))}" for name in names)
    return (
        f"Recommended: {best}; error {bounds(error[best])} against {bounds(error[DEFAULT.resampling])} for the "
        f"default ({DEFAULT.resampling}), a change of {_percent(change)}; by source: {', '.join(by_source)}."
    )


def _price(rows: Sequence[Row], best: Resampling) -> str:
    times: dict[Resampling, list[Row]] = {}
    for row in rows:
        if row.measure == "time":
            times.setdefault(row.resampling, []).append(row)
    factor = {resampling: mean(time_rows)[0] for resampling, time_rows in times.items()}
    cheapest = min(factor, key=lambda resampling: factor[resampling])
    best_time = factor[replace(best, convention=DEFAULT.resampling.convention)]
    return (
        f"Cost: the recommended setting takes {best_time:.1f} times a copy of the same tokens, the default "
        f"{factor[DEFAULT.resampling]:.1f}, the cheapest ({cheapest.interpolation}) {factor[cheapest]:.1f}."
    )


def _levels(rows: Sequence[Row], factor: str) -> str:
    """The change that each level of a factor makes, beside the default's level."""
    parts = [
        f"{level_name(factor, level)} {_percent(change)}"
        for level, change in changes(rows, factor).items()
        if level != BASE[factor]
    ]
    return f"from {level_name(factor, BASE[factor])}, " + (", ".join(parts) or "nothing else was measured")


def _lowest(errors: Sequence[Row]) -> str:
    parts = []
    for name in dict.fromkeys(map(source_of, errors)):
        error = {
            level: mean(level_rows)[0]
            for level, level_rows in varied([r for r in errors if source_of(r) == name], "interpolation").items()
        }
        lowest = min(error, key=lambda level: error[level])
        parts.append(f"{name} {lowest} ({error[lowest]:.3f})")
    return ", ".join(parts)


def _errors(errors: Sequence[Row], factor: str) -> str:
    by_level = {level: mean(rows) for level, rows in varied(errors, factor).items()}
    return ", ".join(f"{level} {bounds(error)}" for level, error in by_level.items()) or "not measured"


def _gains(rows: Sequence[Row], factor: str, measure: str) -> str:
    by_level = varied(resampled(rows, measure), factor)
    return ", ".join(f"{level} {mean(level_rows)[0]:.3f}" for level, level_rows in by_level.items())


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


def level_name(factor: str, level: object) -> str:
    """What words and figures call a level of a factor."""
    return {True: "on", False: "off"}[bool(level)] if factor == "antialias" else str(level)


def bounds(interval: Interval) -> str:
    """A value with its interval."""
    return "{:.3f} [{:.3f}, {:.3f}]".format(*interval)


def _percent(interval: Interval) -> str:
    return "{:+.1f} % [{:+.1f}, {:+.1f}]".format(*(100 * number for number in interval))
