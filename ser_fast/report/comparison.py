"""The comparison of runs: training runs and what was measured on them, side by side in one HTML file."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from ser_fast.report.engine import aspect, data_uri, render, to_png, write_page
from ser_fast.report.headline import headline
from ser_fast.report.runs import Run
from ser_fast.report.tables import csv_tables, end_of_log, metrics, options, title_of

_WIDE = 2.0  # a figure's width over its height from which it takes the page's whole width

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


def write_report(runs: Sequence[Run], path: Path) -> Path:
    """Write the comparison as one HTML file, without scripts, styles or images from elsewhere; returns its path.

    Args:
        runs: of `read_runs`.
        path: of the file.

    Example:
        >>> write_report(read_runs([Path("runs/lambda_0"), Path("runs/lambda_1")]), Path("runs/report.html"))
    """
    shown, folded = [headline(runs)], [*csv_tables(runs), ("", end_of_log(runs))]
    if len(runs) > 1:
        shown.append(options(runs))
    else:  # all that there are
        folded.append(("", options(runs)))
    pictures = sorted({name for run in runs for name in run.images})
    page = render(
        "runs.html",
        title="Comparison of " + (f"{len(runs)} runs" if len(runs) > 1 else f"the run {runs[0].name}"),
        script=_SCRIPT,
        runs=runs,
        shown=[table for table in shown if table.rows],
        curves={name: data_uri(to_png(_curves(runs, name))) for name in metrics(runs)},
        images=[
            (
                title_of(name),
                name,
                [(run, data_uri(png), aspect(png) > _WIDE) for run in runs if (png := run.images.get(name))],
            )
            for name in pictures
        ],
        folded=[(file, table) for file, table in folded if table.rows],
    )
    return write_page(path, page)


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
