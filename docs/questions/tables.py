"""Make the table and the figures of docs/questions.md of the sweep beside this file."""

from dataclasses import replace
from pathlib import Path

from ser_fast.evaluation.figures import save
from ser_fast.sweep.analysis import Interval, cell_means, judged
from ser_fast.sweep.evaluation import SweepResult
from ser_fast.sweep.page import draw_cells, draw_error_against_accuracy

HERE = Path(__file__).parent
TITLES = {
    "knn": "kNN",
    "d4_error@2": "D4 error, block 2",
    "d4_error@4": "D4 error, block 4",
    "scale_error@2": "scale error, block 2",
    "scale_error@4": "scale error, block 4",
    "retrieval@2": "retrieval, block 2",
    "rankme": "RankMe",
}


def main() -> None:
    result = SweepResult.read(HERE)
    tables, controls = result.tables, {name: result.table(name, controls=True) for name in TITLES}
    means = {name: cell_means(table) for name, table in tables.items()}
    found, comparisons = judged(tables, result.protocol.baseline)
    print(f"| | {' | '.join(TITLES.values())} |\n|---|{'--:|' * len(TITLES)}")
    for cell in result.options:
        numbers = (_number(means[name][cell], found[name].get(cell), name) for name in TITLES)
        print(f"| {cell} | {' | '.join(numbers)} |")
    for cell in controls["knn"]:
        values = (controls[name][cell].values() for name in TITLES)
        print(
            f"| {cell} | {' | '.join(_digits(sum(v) / len(v), name) for v, name in zip(values, TITLES, strict=True))} |"
        )
    halves = (f"{title} {_digits(_half(means[name]), name)}" for name, title in TITLES.items())
    print(f"\nHalf a 95 % interval: {', '.join(halves)}. {comparisons} comparisons.\n")
    for line in result.words():
        print(line)
    weights = {cell for cell, options in result.options.items() if set(options) == {"ser.weight"}}
    of_lambda = replace(result, rows=[row for row in result.rows if row.cell in weights])
    save(draw_error_against_accuracy(of_lambda), HERE / "lambda.png", dpi=110)
    save(draw_cells(result), HERE / "cells.png", dpi=110)


def _half(means: dict[str, Interval]) -> float:
    mean = next(iter(means.values()))
    return mean.high - mean.value


def _digits(value: float, name: str) -> str:
    return f"{value:.2f}" if name == "rankme" else f"{value:.3f}".removeprefix("0")


def _number(mean: Interval, difference: Interval | None, name: str) -> str:
    """Bold where it differs from the baseline by more than chance."""
    text = _digits(mean.value, name)
    return f"**{text}**" if difference is not None and difference.excludes_zero else text


if __name__ == "__main__":
    main()
