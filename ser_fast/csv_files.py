"""CSV files that no spreadsheet takes for formulas: the one writer of all tables, and what reads them again."""

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ser_fast.io import write_text

# What a spreadsheet computes instead of showing it, and the quotes that the writer puts before it.
_FORMULA = re.compile(r"'*[=+\-@\t\r]")


def format_csv(columns: Sequence[str], rows: Iterable[Mapping[str, Any]], *, header: bool = True) -> str:
    """The lines of a CSV file.

    A text that begins with =, +, -, @, a tab or a carriage return and is no number gets a quote before it: spreadsheets
    would run it as a formula, and names of classes and files come from anywhere. `read_csv` takes the quote off again.

    Args:
        columns: their names.
        rows: each by column.
        header: whether the names of the columns are the first line.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, columns)
    if header:
        writer.writerow({column: _as_text(column) for column in columns})
    writer.writerows({column: _as_text(value) for column, value in row.items()} for row in rows)
    return text.getvalue()


def write_csv(columns: Iterable[str], rows: Iterable[Mapping[str, Any]], path: Path) -> Path:
    """Write a CSV file in UTF-8, whole or not at all: the names of the columns, then a line a row; returns its path."""
    write_text(path, format_csv(list(columns), rows))
    return path


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file by column, of ours or another's: "" where a line ends early, what is beyond left out.

    Raises:
        ValueError: it can't be read as CSV; the message names the file.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
            rows = [unquote(row) for row in csv.DictReader(file)]
    except (OSError, csv.Error) as error:
        raise ValueError(f"{path} can't be read as CSV: {error}") from error
    return [{name: value or "" for name, value in row.items() if name is not None} for row in rows]


def unquote(row: Mapping[Any, Any]) -> dict[Any, Any]:
    """A row of csv.DictReader, without the quotes that `format_csv` put before texts."""
    return {_from_text(name): _from_text(value) for name, value in row.items()}


def _as_text(value: Any) -> Any:
    if isinstance(value, str) and _FORMULA.match(value) and not _is_number(value):
        return "'" + value
    return value


def _from_text(cell: Any) -> Any:
    return cell[1:] if isinstance(cell, str) and cell.startswith("'") and _FORMULA.match(cell) else cell


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return text.strip() == text  # float takes the tab of "\t1", too
