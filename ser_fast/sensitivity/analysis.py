"""What a study's rows say: means over sources, what changes with each factor, and the recommended setting."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields, replace
from statistics import fmean
from typing import Any

from ser_fast.sensitivity.factors import DEFAULT, Resampling
from ser_fast.sensitivity.sources import CONTROL
from ser_fast.sensitivity.table import Row

Interval = tuple[float, float, float]  # value, low, high

RESAMPLING_FACTORS = tuple(factor.name for factor in fields(Resampling))
FACTORS = (*RESAMPLING_FACTORS, "lattice", "pixels", "positions")
WORTH = 0.01  # of the default's error: a setting that gains less is not worth leaving the default for
BASE = {
    **asdict(DEFAULT.resampling),
    "lattice": "{}x{}".format(*DEFAULT.lattice),
    "pixels": DEFAULT.pixels,
    "positions": DEFAULT.positions,
}


def source_of(row: Row) -> str:
    """The name of the row's source in figures and words."""
    return f"features: {row.model}" if row.model else row.signal


def mean(rows: Iterable[Row]) -> Interval:
    """The mean over the rows of each source, and over the sources; nan is left out.

    The bounds are the means of the bounds: at least as wide as an interval of the mean itself.
    """
    by_source: dict[str, list[Row]] = {}
    for row in rows:
        if not math.isnan(row.value):
            by_source.setdefault(source_of(row), []).append(row)
    if not by_source:
        return math.nan, math.nan, math.nan
    value, low, high = (
        fmean(fmean(getattr(row, name) for row in source_rows) for source_rows in by_source.values())
        for name in ("value", "low", "high")
    )
    return value, low, high


def resampled(rows: Iterable[Row], measure: str) -> list[Row]:
    """The rows of a measure, without those of D4, which only copies."""
    return [row for row in rows if row.measure == measure and row.group != "D4"]


def varied(rows: Iterable[Row], factor: str) -> dict[object, list[Row]]:
    """The rows where all other factors that apply are the default's, by the factor's level."""
    others = [name for name in FACTORS if name != factor]
    levels: dict[object, list[Row]] = {}
    for row in rows:
        if getattr(row, factor) != "" and all(getattr(row, name) in ("", BASE[name]) for name in others):
            levels.setdefault(getattr(row, factor), []).append(row)
    return levels


def trusted(rows: Sequence[Row]) -> list[Row]:
    """The rows that a recommendation may rest on: without the random initializations, which are controls."""
    return [row for row in rows if not row.model.startswith(CONTROL)]


def changes(rows: Sequence[Row], factor: str) -> dict[object, Interval]:
    """How much each level of a factor changes the default's error, as a share of it, over all trusted sources."""
    differences = varied(resampled(trusted(rows), "difference"), factor)
    return {level: _share(rows, mean(level_rows)) for level, level_rows in differences.items()}


def _share(rows: Sequence[Row], difference: Interval) -> Interval:
    """A difference as a share of the default's error, over the trusted sources."""
    errors = resampled(trusted(rows), "relative_error")
    default_error = mean(row for row in errors if row.is_default and row.resampling == DEFAULT.resampling)[0]
    value, low, high = (number / default_error for number in difference)
    return value, low, high


def change_of(rows: Sequence[Row], source: str, resampling: Resampling) -> Interval:
    """The change from the default's error, as a share of it, on one source."""
    source_rows = [row for row in rows if source_of(row) == source and row.is_default]
    base = mean(r for r in resampled(source_rows, "relative_error") if r.resampling == DEFAULT.resampling)[0]
    value, low, high = mean(r for r in resampled(source_rows, "difference") if r.resampling == resampling)
    return value / base, low / base, high / base


def _is_better(change: Interval) -> bool:
    """Surely (all of its interval), and by something that counts."""
    return change[0] <= -WORTH and change[2] < 0


def combine(rows: Sequence[Row]) -> Resampling:
    """The levels that are better than the default's, each factor for itself; not necessarily measured together."""
    combined = DEFAULT.resampling
    for factor in RESAMPLING_FACTORS:
        better = {level: change for level, change in changes(rows, factor).items() if _is_better(change)}
        if better:
            level: Any = min(better, key=lambda level: better[level][0])
            combined = replace(combined, **{factor: level})
    return combined


def recommend(rows: Sequence[Row]) -> tuple[Resampling, Interval]:
    """The measured resampling with the lowest error, if it is better than the default; and its change.

    It must be better on average over the trusted sources, and not surely worse on any source, controls included.
    """
    measured: dict[Resampling, list[Row]] = {}
    for row in resampled(trusted(rows), "difference"):
        if row.is_default:
            measured.setdefault(row.resampling, []).append(row)
    names = dict.fromkeys(map(source_of, resampled(rows, "difference")))
    changed = {resampling: _share(rows, mean(differences)) for resampling, differences in measured.items()}
    better = {
        resampling: change
        for resampling, change in changed.items()
        if _is_better(change) and all(change_of(rows, name, resampling)[1] <= 0 for name in names)
    }
    if not better:
        return DEFAULT.resampling, (0.0, 0.0, 0.0)
    best = min(better, key=lambda resampling: better[resampling][0])
    return best, better[best]
