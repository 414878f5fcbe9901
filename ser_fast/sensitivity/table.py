"""The table of a study: one tidy CSV that is appended to, and that a later call goes on from."""

import csv
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from ser_fast.csv_files import format_csv, unquote
from ser_fast.evaluation.protocol import make_folder
from ser_fast.io import write_text
from ser_fast.lattice import Size
from ser_fast.sensitivity.factors import DEFAULT, ELEMENTS, Resampling
from ser_fast.sensitivity.measures import Estimate
from ser_fast.sensitivity.sources import Source

TABLE, PROTOCOL = "sensitivity.csv", "protocol.json"


@dataclass(frozen=True)
class Row:
    """One measurement, a row of the CSV; a factor that does not apply is "" there.

    Attributes:
        kind: which measurement it is part of: "equivariance", "algebra", "operator", "response" or "cost".
        signal, model: the source ("" for measures of the operator alone).
        layer: blocks up to it; 1 for fields and photographs, 0 for measures of the operator alone.
        lattice: "HxW" tokens of f(x).
        element, group: the name of g, and its kind.
        interpolation, antialias, padding, convention: the resampling of the tokens.
        pixels, positions: the kernels of the image and of the position embedding.
        measure: see `ser_fast.sensitivity.measures`.
        frequency: cycles a token, for the response.
        value, low, high: and its 95 % interval over images (for the time, the fastest and the slowest repeat).
        images: how many; 0 where no image is used.
    """

    kind: str
    signal: str
    model: str
    layer: int
    lattice: str
    element: str
    group: str
    interpolation: str
    antialias: bool
    padding: str
    convention: str
    pixels: str
    positions: str
    measure: str
    frequency: float | None
    value: float
    low: float
    high: float
    images: int

    @property
    def resampling(self) -> Resampling:
        return Resampling(self.interpolation, self.antialias, self.padding, self.convention)

    @property
    def is_default(self) -> bool:
        """Whether lattice, pixels and positions, where they apply, are the default's."""
        return (
            self.lattice in ("", f"{DEFAULT.lattice[0]}x{DEFAULT.lattice[1]}")
            and self.pixels in ("", DEFAULT.pixels)
            and self.positions in ("", DEFAULT.positions)
        )


COLUMNS = [column.name for column in fields(Row)]


class Unit(NamedTuple):
    """What is measured in one go: a kind of measurement of one element, for several resamplings of the tokens."""

    kind: str
    source: Source | None
    lattice: Size | None
    element: str
    pixels: str
    positions: str

    def labels(self) -> dict[str, str]:
        """The columns that all its rows share."""
        return {
            "kind": self.kind,
            "signal": self.source.signal if self.source else "",
            "model": self.source.model if self.source else "",
            "lattice": "{}x{}".format(*self.lattice) if self.lattice else "",
            "element": self.element,
            "group": ELEMENTS[self.element].group,
            "pixels": self.pixels,
            "positions": self.positions,
        }


# ---------------------------------------------------------------- the table


class StudyTable:
    """The rows of a study, in its CSV file between calls.

    A call that was cut short leaves a line or a group of rows (those of one resampling, in one unit) incomplete. Only
    the last one can be: it is dropped when the file is opened, and measured again.

    Args:
        folder: the study's, made if need be; None keeps the rows in memory.
        protocol: what all rows have in common, such as the images and the seed; kept in protocol.json.

    Attributes:
        rows: all of them, in the order of the file.
        protocol: as given.

    Raises:
        ValueError: the folder holds rows of another protocol, or a CSV that is no study's, or can't be written to.
    """

    def __init__(self, folder: Path | None, protocol: Mapping[str, Any]) -> None:
        self.protocol = protocol
        self.rows: list[Row] = []
        self._path: Path | None = None
        if folder is not None:
            make_folder(folder)
            if (folder / TABLE).exists():
                kept = self.read_protocol(folder)
                if kept != protocol:
                    raise ValueError(f"out: got {folder} with a study of {kept}, takes one of {protocol}")
                self.rows = read_rows(folder / TABLE)
                last = _group_key(self.rows[-1]) if self.rows else None
                self.rows = [row for row in self.rows if _group_key(row) != last]
            self._path = self.write(folder, self.rows, protocol)
        self._done = {_group_key(row) for row in self.rows}

    @staticmethod
    def write(folder: Path, rows: Iterable[Row], protocol: Mapping[str, Any]) -> Path:
        """Write a folder's protocol.json and sensitivity.csv, whole or not at all; returns the path of the table."""
        protocol_text, table_text = json.dumps(protocol, indent=2) + "\n", format_csv(COLUMNS, map(asdict, rows))
        write_text(folder / PROTOCOL, protocol_text)
        write_text(folder / TABLE, table_text)
        return folder / TABLE

    @staticmethod
    def read_protocol(folder: Path) -> dict[str, Any] | None:
        """What a folder's protocol.json holds; None where there is none."""
        return json.loads((folder / PROTOCOL).read_text(encoding="utf-8")) if (folder / PROTOCOL).exists() else None

    def missing(self, unit: Unit, resamplings: Iterable[Resampling]) -> list[Resampling]:
        """Those of the resamplings that the unit has no rows of yet."""
        return [r for r in resamplings if (*unit.labels().items(), r) not in self._done]

    def add(self, unit: Unit, estimates: Sequence[Estimate]) -> None:
        """Append the rows of a unit, those of each resampling together."""
        labels: dict[str, Any] = unit.labels()
        order = dict.fromkeys(estimate.resampling for estimate in estimates)
        rows = [_row(labels, estimate) for r in order for estimate in estimates if estimate.resampling == r]
        if self._path is not None:
            with self._path.open("a", newline="", encoding="utf-8", errors="backslashreplace") as file:
                file.write(_lines(rows))
                file.flush()
                os.fsync(file.fileno())
        self.rows += rows
        self._done |= {_group_key(row) for row in rows}


def _row(labels: dict[str, Any], estimate: Estimate) -> Row:
    columns = estimate._asdict()
    return Row(**labels, **asdict(columns.pop("resampling")), **columns)


def _group_key(row: Row) -> tuple[object, ...]:
    labels = ("kind", "signal", "model", "lattice", "element", "group", "pixels", "positions")
    return (*((name, getattr(row, name)) for name in labels), row.resampling)


def _lines(rows: Iterable[Row]) -> str:
    return format_csv(COLUMNS, map(asdict, rows), header=False)


def read_rows(path: Path) -> list[Row]:
    """The rows of a study's CSV; a last line that was cut short is left out.

    Args:
        path: of the file.

    Raises:
        ValueError: the file has other columns, or a line that can't be read.
    """
    with path.open(newline="", encoding="utf-8") as file:
        lines = file.read().splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    reader = csv.DictReader(lines)
    if lines and reader.fieldnames != COLUMNS:
        raise ValueError(f"table: got {path} with columns {reader.fieldnames}, takes {COLUMNS}")
    return [_parse(path, reader.line_num, unquote(entry)) for entry in reader]


def _parse(path: Path, line: int, entry: dict[str, Any]) -> Row:
    try:
        return Row(
            **{
                **entry,
                "layer": int(entry["layer"]),
                "antialias": {"True": True, "False": False}[entry["antialias"]],
                "frequency": float(entry["frequency"]) if entry["frequency"] else None,
                "value": float(entry["value"]),
                "low": float(entry["low"]),
                "high": float(entry["high"]),
                "images": int(entry["images"]),
            }
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"table: got {path}, whose line {line} can't be read: {error}") from error
