"""The tables of the evaluations, as CSV files and on the terminal."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ser_fast.csv_files import write_csv
from ser_fast.evaluation.classification import Rows
from ser_fast.io import printable


def shown(name: str) -> str:
    """A name that users or files gave, as a cell or a title: none of it is markup, or steers the terminal."""
    return escape(printable(name))


def write_table(records: Mapping[str, Sequence[Any]], path: Path) -> Path:
    """Write the records of each model, by name, to a CSV file: a column "model", then the fields of their dataclass.

    Example:
        >>> write_table({"checkpoint": equivariance_errors(model, images)}, Path("equivariance.csv"))
    """
    (kind,) = {type(record) for model_records in records.values() for record in model_records}
    rows = ({"model": name, **asdict(record)} for name, model_records in records.items() for record in model_records)
    return write_csv(["model", *(field.name for field in fields(kind))], rows, path)


# ---------------------------------------------------------------- classification


def write_rows(rows: Rows, path: Path) -> Path:
    """Write a CSV file: what identifies each classifier, then `Classification.columns`."""
    lines = [{**labels, **result.columns()} for labels, result in rows]
    return write_csv(lines[0], lines, path)


def write_confusion(rows: Rows, classes: Sequence[str], path: Path) -> Path:
    """Write the confusion matrices as a CSV file of their entries above 0: identification, truth, predicted, images."""
    columns = (*rows[0][0], "truth", "predicted", "images")
    lines = (
        {
            **labels,
            "truth": classes[truth],
            "predicted": classes[predicted],
            "images": images,
        }
        for labels, result in rows
        for truth, predicted, images in result.pairs()
    )
    return write_csv(columns, lines, path)


def print_rows(rows: Rows, title: str, console: Console | None = None) -> None:
    """Print top-1 and top-5 with their intervals, a line a classifier."""
    table = Table(title=shown(title))
    for heading in rows[0][0]:
        table.add_column(heading)
    for heading in ("top-1 (95 % interval)", "top-5 (95 % interval)"):
        table.add_column(heading, justify="right")
    for labels, result in rows:
        cells = (f"{value:g}" if isinstance(value, float) else str(value) for value in labels.values())
        table.add_row(*map(shown, cells), str(result.top1), str(result.top5))
    (console or Console()).print(table)
