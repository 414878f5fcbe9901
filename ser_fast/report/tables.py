"""The tables of a comparison of runs: options that differ, losses at the end, and every CSV file, runs side by side."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from ser_fast.report.runs import Run
from ser_fast.training.config import FREE

ROWS = 1000  # of a run's CSV file that are shown

# What is logged beside losses.
_OTHERS = ("step", "epoch", "lr", "grad_norm", "images_per_s", "peak_memory_mib", "loss_scale", "overflows")

# Columns that say what a row is of: rows of several runs that agree in them stand together.
_KEYS = {
    *(
        "model",
        "cell",
        "head",
        "k",
        "layer",
        "element",
        "group",
        "embedding",
        "target",
        "regressor",
        "kind",
        "severity",
    ),
    *("method", "name", "folder", "rate", "truth", "predicted", "measure", "interpolation", "padding", "image"),
}

_TITLES = {
    "knn": "Accuracy of k nearest neighbors",
    "knn_confusion": "Classes that k nearest neighbors confuse",
    "linear": "Accuracy of probes",
    "linear_rates": "Learning rates of the probes",
    "linear_confusion": "Classes that probes confuse",
    "equivariance": "Equivariance of tokens, by layer and element",
    "embedding": "Invariance of the embedding, by element",
    "prediction": "Prediction of g from tokens, by layer",
    "error_accuracy": "Error at the split against accuracy",
    "corruptions": "Errors on corrupted images",
    "perturbations": "Changes of mind within perturbed sequences",
    "shifts": "Accuracy on shifted images",
    "detection": "Detection by a frozen encoder",
    "segmentation": "Segmentation by frozen tokens",
    "segmentation_classes": "Segmentation by frozen tokens, by class",
    "sensitivity": "Sensitivity to the resampling",
    "demo": "The demo's runs",
    "sweep": "The sweep's runs",
    "show": "Tokens that are found again",
}


class Cell(NamedTuple):
    """A cell of a table.

    Attributes:
        value: what it is sorted by.
        text: what is shown; default the value, shortened.
        run: whose color marks it.
    """

    value: str
    text: str = ""
    run: Run | None = None


@dataclass(frozen=True)
class Table:
    """Headings, and rows of as many cells."""

    title: str
    columns: list[Cell]
    rows: list[list[Cell]]
    note: str = ""


def title_of(file: str) -> str:
    """What a table or a figure shows, by the name of its file."""
    stem = Path(file).stem
    return _TITLES.get(stem) or stem.replace("_", " ").capitalize()


def is_loss(metric: str) -> bool:
    """Whether a metric of the log is a loss."""
    return metric not in _OTHERS and not metric.startswith("eval/")


def last_means(run: Run) -> dict[str, float]:
    """The mean of each metric over the last tenth of the log."""
    last = run.log[-max(1, len(run.log) // 10) :]
    values = {name: [record[name] for record in last if name in record] for name in metrics([run])}
    return {name: fmean(numbers) for name, numbers in values.items() if numbers}


def metrics(runs: Sequence[Run]) -> list[str]:
    """What the runs logged: losses, then scores, then the rest."""
    names = [name for name in _union(record for run in runs for record in run.log) if name not in ("step", "epoch")]
    return sorted(names, key=lambda name: 0 if is_loss(name) else 1 if name.startswith("eval/") else 2)


def end_of_log(runs: Sequence[Run]) -> Table:
    """The means of all that was logged, at the end of each run."""
    names = metrics(runs)
    rows = []
    for run in runs:
        means = last_means(run)
        if run.log:
            steps = Cell(str(run.log[-1]["step"]))
            rows.append([_name(run), steps, *(Cell(str(means.get(name, ""))) for name in names)])
    title = "What was logged, at the end"
    return Table(
        title, [Cell(name) for name in ("run", "steps", *names)], rows, "Means of the last tenth of the steps."
    )


def options(runs: Sequence[Run]) -> Table:
    """A row for each option that differs between runs and may change a number, a column a run; of one run all."""
    left_out = {*FREE, "environment.command"}
    names = [name for name in _union(run.options for run in runs) if name not in left_out]
    if len(runs) > 1:
        names = [name for name in names if len({run.options.get(name) for run in runs}) > 1]
    return Table(
        "Options that differ" if len(runs) > 1 else "Options",
        [Cell("option"), *map(_name, runs)],
        [[Cell(name), *(Cell(run.options.get(name, "")) for run in runs)] for name in names],
    )


def csv_tables(runs: Sequence[Run]) -> Iterable[tuple[str, Table]]:
    """The name of each CSV file and its rows, those of several runs that are of the same thing one below the other."""
    for file in sorted({name for run in runs for name in run.csv}):
        columns = _union(row for run in runs for row in run.csv.get(file, []))
        keys = [name for name in columns if name in _KEYS]
        places: dict[tuple[str, ...], int] = {}
        rows = [(run, row) for run in runs for row in run.csv.get(file, [])[:ROWS]]
        for _, row in rows:
            places.setdefault(tuple(row.get(name, "") for name in keys), len(places))
        if keys:  # the identity last: its errors are 0
            rows.sort(
                key=lambda pair: (pair[1].get("group") == "identity", places[tuple(pair[1].get(n, "") for n in keys)])
            )
        cut = [f"{run.name} {len(run.csv[file])}" for run in runs if len(run.csv.get(file, [])) > ROWS]
        note = f"The first {ROWS} rows of a run; there are: {', '.join(cut)}." if cut else ""
        cells = [[_name(run), *(Cell(row.get(name, "")) for name in columns)] for run, row in rows]
        yield file, Table(title_of(file), [Cell("run"), *map(Cell, columns)], cells, note)


def _name(run: Run) -> Cell:
    return Cell(run.name, run=run)


def _union(records: Iterable[dict[str, Any]]) -> list[str]:
    """The keys of all records, in the order of their first appearance."""
    return list(dict.fromkeys(key for record in records for key in record))
