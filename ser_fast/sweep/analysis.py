"""What the differences between cells are worth, given how many of them are looked at."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

from scipy.stats import t as student_t

LEVEL = 0.05  # of the whole family of comparisons

Table = Mapping[str, Mapping[int, float]]
"""cell: seed: value, of one measure."""


class Interval(NamedTuple):
    """A value between bounds; these are nan where one seed or one cell leaves no spread to judge by."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the value differs from 0 by more than chance."""
        return self.low > 0 or self.high < 0


def shared_seeds(table: Table) -> list[int]:
    """The seeds that every cell has a finite value of."""
    seeds = [{seed for seed, value in values.items() if math.isfinite(value)} for values in table.values()]
    return sorted(set.intersection(*seeds)) if seeds else []


def residual_deviation(table: Table) -> tuple[float, int]:
    """The standard deviation that cell and seed leave unexplained, and its degrees of freedom.

    A seed gives all cells the same initial weights and images: it is a block, and what it adds to all of them is not
    noise. Value = cell + seed + residual, with one variance of the residual for all cells.

    Returns:
        nan and 0 where there are fewer than two cells or two seeds.
    """
    seeds = shared_seeds(table)
    freedom = (len(table) - 1) * (len(seeds) - 1)
    if freedom < 1:
        return math.nan, 0
    of_cell = {cell: fmean(values[seed] for seed in seeds) for cell, values in table.items()}
    of_seed = {seed: fmean(values[seed] for values in table.values()) for seed in seeds}
    mean = fmean(of_cell.values())
    squares = sum(
        (values[seed] - of_cell[cell] - of_seed[seed] + mean) ** 2 for cell, values in table.items() for seed in seeds
    )
    return math.sqrt(squares / freedom), freedom


def cell_means(table: Table) -> dict[str, Interval]:
    """The mean of each cell over the seeds that all have, with its 95 % interval, the seeds' part taken off."""
    seeds, (deviation, freedom) = shared_seeds(table), residual_deviation(table)
    half = _quantile(LEVEL, freedom) * deviation / math.sqrt(len(seeds)) if freedom else math.nan
    means = {cell: fmean(values[seed] for seed in seeds) if seeds else math.nan for cell, values in table.items()}
    return {cell: Interval(mean, mean - half, mean + half) for cell, mean in means.items()}


def differences(table: Table, baseline: str, *, comparisons: int) -> dict[str, Interval]:
    """What each other cell differs by from the baseline at the same seed, with simultaneous 95 % intervals.

    Args:
        table: of one measure.
        baseline: a cell.
        comparisons: how many differences are looked at in all: the level is divided by it (Bonferroni), so that in one
            sweep of twenty, not in one comparison of twenty, chance alone excludes 0.
    """
    if baseline not in table:  # its runs are not finished yet
        return {}
    seeds, (deviation, freedom) = shared_seeds(table), residual_deviation(table)
    error = deviation * math.sqrt(2 / len(seeds)) if freedom else math.nan
    half = _quantile(LEVEL / max(1, comparisons), freedom) * error if freedom else math.nan
    found = {}
    for cell, values in table.items():
        if cell != baseline:
            mean = fmean(values[seed] - table[baseline][seed] for seed in seeds) if seeds else math.nan
            found[cell] = Interval(mean, mean - half, mean + half)
    return found


def _quantile(level: float, freedom: int) -> float:
    return float(student_t.isf(level / 2, freedom))


def judged(tables: Mapping[str, Table], baseline: str) -> tuple[dict[str, dict[str, Interval]], int]:
    """The differences of every measure from the baseline, by measure and cell, and how many comparisons they are."""
    comparisons = sum(len(table) - 1 for table in tables.values())
    return {
        measure: differences(table, baseline, comparisons=comparisons) for measure, table in tables.items()
    }, comparisons


def numeric_option(options: Sequence[Mapping[str, str]]) -> str | None:
    """The one option that varies over cells, where it is one and its values are numbers; else None."""
    names = {name for cell in options for name in cell}
    if len(names) != 1:
        return None
    (name,) = names
    try:
        [float(cell[name]) for cell in options]
    except (KeyError, ValueError):
        return None
    return name
