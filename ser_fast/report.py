"""The results page: training runs and what was measured on them, side by side in one HTML file that needs no other."""

import base64
import csv
import hashlib
import io
import json
import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib as mpl
import numpy as np
from jinja2 import Environment
from markupsafe import Markup
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from ser_fast.io import write_atomically
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

    Raises:
        ValueError: no folder, one that comes twice, or one with neither a log nor a CSV file.
    """
    if not folders:
        raise ValueError("runs: got none, takes one folder or more")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ValueError(f"runs: a folder comes twice in {', '.join(map(str, folders))}")
    names = [folder.resolve().name for folder in folders]
    palette = mpl.colormaps["tab10"] if len(folders) <= 10 else mpl.colormaps["turbo"].resampled(len(folders))
    runs = []
    for number, (folder, name) in enumerate(zip(folders, names, strict=True)):
        tables = {path.name: _read_csv(path) for path in sorted(folder.glob("*.csv"))}
        log = _read_log(RunFolder(folder).log)
        if not tables and not log:
            raise ValueError(f"runs: {folder} holds neither {RunFolder(folder).log.name} nor a CSV file")
        runs.append(
            Run(
                name=name if names.count(name) == 1 else str(folder),
                color=to_hex(palette(number)),
                options=_read_options(folder / "config.json")
                | _read_options(folder / "environment.json", "environment."),
                log=log,
                csv=tables,
                images={path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))},
            )
        )
    return runs


def write_report(runs: Sequence[Run], path: Path) -> None:
    """Write the comparison as one HTML file, without scripts, styles or images from elsewhere.

    Example:
        >>> write_report(read_runs([Path("runs/lambda_0"), Path("runs/lambda_1")]), Path("runs/report.html"))
    """
    metrics = _union(record for run in runs for record in run.log)
    metrics = [name for name in metrics if name not in ("step", "epoch")]
    environment = Environment(autoescape=True)
    environment.filters |= {"is_number": _is_number, "shorten": _shorten}
    page = environment.from_string(files("ser_fast").joinpath("report.html").read_text()).render(
        title="Comparison of " + (f"{len(runs)} runs" if len(runs) > 1 else f"the run {runs[0].name}"),
        runs=runs,
        tables=[table for table in (_summary(runs, metrics), _options(runs), *_csv_tables(runs)) if table.rows],
        curves={name: _data_uri(_curves(runs, name)) for name in metrics},
        pictures={
            name: [(run, _data_uri(run.images[name])) for run in runs if name in run.images]
            for name in sorted({name for run in runs for name in run.images})
        },
        script=Markup(_SCRIPT),
        script_hash=base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode(),
    )
    write_atomically(path, partial(Path.write_text, data=page, encoding="utf-8"))


# ---------------------------------------------------------------- a run's folder


def _read_log(path: Path) -> list[dict[str, float]]:
    records = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        with suppress(ValueError):  # the last line of a run that goes on, or was cut
            records.append(json.loads(line))
    return records


def _read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return [{key: value or "" for key, value in row.items() if key is not None} for row in csv.DictReader(file)]


def _read_options(path: Path, prefix: str = "") -> dict[str, str]:
    def flatten(fields: dict[str, Any], prefix: str) -> dict[str, str]:
        flat: dict[str, str] = {}
        for name, value in fields.items():
            flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: str(value)}
        return flat

    return flatten(json.loads(path.read_text()), prefix) if path.is_file() else {}


# ---------------------------------------------------------------- tables


def _summary(runs: Sequence[Run], metrics: list[str]) -> Table:
    rows = []
    for run in runs:
        last = run.log[-max(1, len(run.log) // 10) :]
        values = [[record[name] for record in last if name in record] for name in metrics]
        if last:
            rows.append((run, [str(last[-1]["step"]), *(str(fmean(of)) if of else "" for of in values)]))
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


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _shorten(text: str) -> str:
    """Four significant digits of a number that isn't whole; any other text as it is."""
    if not _is_number(text) or not math.isfinite(float(text)) or text.lstrip("+-").isdigit():
        return text
    return f"{float(text):.4g}"


# ---------------------------------------------------------------- figures


def _curves(runs: Sequence[Run], metric: str) -> bytes:
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
    png = io.BytesIO()
    figure.savefig(png, dpi=120)
    return png.getvalue()


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
