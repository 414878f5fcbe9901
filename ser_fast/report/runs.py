"""The comparison of runs: training runs and what was measured on them, side by side in one HTML file."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from ser_fast.csv_files import read_csv
from ser_fast.report.engine import data_uri, render, to_png, write_page
from ser_fast.training.run_folder import RunFolder

_ROWS = 1000  # of a run's CSV file that are shown

# A click on a heading sorts its table: numbers by value, before text, before nothing.
_SCRIPT = """
for (const heading of document.querySelectorAll("th")) heading.onclick = () => {
  const down = heading.ariaSort === "ascending", column = heading.cellIndex;
  const body = heading.closest("table").tBodies[0];
  const key = row => row.cells[column].dataset.value;
  const rank = text => text === "" ? 2 : isNaN(text) ? 1 : 0;
  const compare = (a, b) => rank(a) - rank(b) ||
    (down ? -1 : 1) * (rank(a) ? a.localeCompare(b) : a - b);
  for (const other of heading.parentNode.cells) other.ariaSort = null;
  heading.ariaSort = down ? "descending" : "ascending";
  body.append(...[...body.rows].sort((a, b) => compare(key(a), key(b))));
};
"""


@dataclass(frozen=True)
class Run:
    """What a run's folder holds that a comparison can show.

    Attributes:
        name: the folder's, or its path where two runs have the same.
        color: of the run in every figure.
        options: dotted name: value, from config.json and environment.json.
        log: one record a step, each with "step".
        csv: file name: its rows.
        images: file name: PNG.
    """

    name: str
    color: str
    options: dict[str, str]
    log: list[dict[str, float]]
    csv: dict[str, list[dict[str, str]]]
    images: dict[str, bytes]


@dataclass(frozen=True)
class Table:
    """Columns after that of the run, and rows of texts."""

    title: str
    columns: list[str]
    rows: list[tuple[Run, list[str]]]
    note: str = ""


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read the folders of training runs, or any folders with tidy CSV files.

    Args:
        folders: in the order that they are shown in.

    Raises:
        ValueError: no folder, one that comes twice, or one with neither a log nor a CSV file.
    """
    if not folders:
        raise ValueError("runs: got none, takes one folder or more")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ValueError(f"runs: got {', '.join(map(str, folders))}, takes each folder once")
    names = [folder.resolve().name for folder in folders]
    palette = mpl.colormaps["tab10"] if len(folders) <= 10 else mpl.colormaps["turbo"].resampled(len(folders))
    runs = []
    for number, (folder, name) in enumerate(zip(folders, names, strict=True)):
        tables = {path.name: _read_table(path) for path in sorted(folder.glob("*.csv"))}
        run_folder = RunFolder(folder)
        log = _read_log(run_folder.log)
        if not tables and not log:
            raise ValueError(f"runs: got {folder}, takes a folder that holds {run_folder.log.name} or a CSV file")
        runs.append(
            Run(
                name=name if names.count(name) == 1 else str(folder),
                color=to_hex(palette(number)),
                options=_read_options(run_folder.config) | _read_options(run_folder.environment, "environment."),
                log=log,
                csv=tables,
                images={path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))},
            )
        )
    return runs


def write_report(runs: Sequence[Run], path: Path) -> Path:
    """Write the comparison as one HTML file, without scripts, styles or images from elsewhere; returns its path.

    Args:
        runs: of `read_runs`.
        path: of the file.

    Example:
        >>> write_report(read_runs([Path("runs/lambda_0"), Path("runs/lambda_1")]), Path("runs/report.html"))
    """
    metrics = _union(record for run in runs for record in run.log)
    metrics = [name for name in metrics if name not in ("step", "epoch")]
    page = render(
        "runs.html",
        title="Comparison of " + (f"{len(runs)} runs" if len(runs) > 1 else f"the run {runs[0].name}"),
        script=_SCRIPT,
        runs=runs,
        tables=[table for table in (_summary(runs, metrics), _options(runs), *_csv_tables(runs)) if table.rows],
        curves={name: data_uri(to_png(_curves(runs, name))) for name in metrics},
        images={
            name: [(run, data_uri(run.images[name])) for run in runs if name in run.images]
            for name in sorted({name for run in runs for name in run.images})
        },
    )
    return write_page(path, page)


# ---------------------------------------------------------------- a run's folder


def _read_table(path: Path) -> list[dict[str, str]]:
    try:
        return read_csv(path)
    except ValueError as error:
        raise ValueError(f"runs: {error}") from error


def _read_log(path: Path) -> list[dict[str, float]]:
    """The records of a log with a step and what they have of numbers; lines that are no records are left out."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            numbers = {name: value for name, value in record.items() if _is_number(value)}
            if math.isfinite(numbers.get("step", math.nan)):
                records.append(numbers)
    return records


def _is_number(value: Any) -> bool:
    # Integers of any length are JSON, and beyond floating point no figure shows them.
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**63)


def _read_options(path: Path, prefix: str = "") -> dict[str, str]:
    def flatten(fields: dict[str, Any], prefix: str) -> dict[str, str]:
        flat: dict[str, str] = {}
        for name, value in fields.items():
            flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: str(value)}
        return flat

    if not path.is_file():
        return {}
    try:
        return flatten(json.loads(path.read_text(encoding="utf-8")), prefix)
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"runs: {path} is no JSON of options: {error}") from error


# ---------------------------------------------------------------- tables


def _summary(runs: Sequence[Run], metrics: list[str]) -> Table:
    rows = []
    for run in runs:
        last = run.log[-max(1, len(run.log) // 10) :]
        values = [[record[name] for record in last if name in record] for name in metrics]
        if last:
            rows.append((run, [str(last[-1]["step"]), *(str(fmean(numbers)) if numbers else "" for numbers in values)]))
    return Table("Runs", ["run", "steps", *metrics], rows, note="Means of the last tenth of the steps.")


def _options(runs: Sequence[Run]) -> Table:
    names = [name for name in _union(run.options for run in runs) if name not in ("out", "environment.command")]
    if len(runs) > 1:
        names = [name for name in names if len({run.options.get(name) for run in runs}) > 1]
    title = "Options that differ" if len(runs) > 1 else "Options"
    return Table(
        title, ["run", *names], [(run, [run.options.get(name, "") for name in names]) for run in runs if names]
    )


def _csv_tables(runs: Sequence[Run]) -> Iterable[Table]:
    for file in sorted({name for run in runs for name in run.csv}):
        columns = _union(row for run in runs for row in run.csv.get(file, []))
        rows = [(run, [row.get(name, "") for name in columns]) for run in runs for row in run.csv.get(file, [])[:_ROWS]]
        cut = [f"{run.name} {len(run.csv[file])}" for run in runs if len(run.csv.get(file, [])) > _ROWS]
        note = f"The first {_ROWS} rows of a run; there are: {', '.join(cut)}." if cut else ""
        yield Table(file, ["run", *columns], rows, note)


def _union(records: Iterable[dict[str, Any]]) -> list[str]:
    """The keys of all records, in the order of their first appearance."""
    return list(dict.fromkeys(key for record in records for key in record))


# ---------------------------------------------------------------- figures


def _curves(runs: Sequence[Run], metric: str) -> Figure:
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for run in runs:
        points = np.array([(record["step"], record[metric]) for record in run.log if metric in record])  # (N, 2)
        if len(points):
            window = max(1, len(points) // 20)
            mean = np.stack([np.convolve(column, np.full(window, 1 / window), "valid") for column in points.T])
            axes.plot(*points.T, color=run.color, linewidth=0.5, alpha=0.5)
            axes.plot(*mean, color=run.color, linewidth=2)
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    return figure
