"""The rows of a study: one tidy CSV that is appended to, and that a later call goes on from."""

import csv
import io
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from ser_fast.io import write_atomically
from ser_fast.lattice import Size
from ser_fast.sensitivity.factors import DEFAULT, ELEMENTS, Resampling
from ser_fast.sensitivity.measures import Estimate
from ser_fast.sensitivity.sources import Source

TABLE = "sensitivity.csv"
_PROTOCOL = "protocol.json"


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


_COLUMNS = [column.name for column in fields(Row)]


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


class Results:
    """The rows of a study's CSV, kept between calls.

    A call that was cut short leaves a line or a group of rows (those of one resampling, in one unit) incomplete. Only
    the last one can be: it is dropped when the file is opened, and measured again.

    Args:
        out: the study's folder; made if need be.
        protocol: what all rows have in common, such as the images and the seed; kept in protocol.json.

    Raises:
        ValueError: the folder holds rows of another protocol, or a CSV that is no study's.
    """

    def __init__(self, out: Path, protocol: dict[str, Any]) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.path = out / TABLE
        self.rows: list[Row] = []
        if self.path.exists():
            kept = json.loads((out / _PROTOCOL).read_text()) if (out / _PROTOCOL).exists() else None
            if kept != protocol:
                raise ValueError(f"out: {out} holds a study of {kept}, this one is of {protocol}; name another folder")
            self.rows = read_rows(self.path)
            last = _group_key(self.rows[-1]) if self.rows else None
            self.rows = [row for row in self.rows if _group_key(row) != last]
        write_atomically(out / _PROTOCOL, lambda path: path.write_text(json.dumps(protocol, indent=2) + "\n"))
        write_atomically(self.path, lambda path: path.write_text(",".join(_COLUMNS) + "\r\n" + _lines(self.rows)))
        self._done = {_group_key(row) for row in self.rows}

    def missing(self, unit: Unit, resamplings: Iterable[Resampling]) -> list[Resampling]:
        """Those of the resamplings that the unit has no rows of yet."""
        return [r for r in resamplings if (*unit.labels().items(), r) not in self._done]

    def add(self, unit: Unit, estimates: Sequence[Estimate]) -> None:
        """Append the rows of a unit, those of each resampling together."""
        labels: dict[str, Any] = unit.labels()
        order = dict.fromkeys(estimate.resampling for estimate in estimates)
        rows = [_row(labels, estimate) for r in order for estimate in estimates if estimate.resampling == r]
        with self.path.open("a", newline="") as file:
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
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS)
    writer.writerows(asdict(row) for row in rows)
    return text.getvalue()


def read_rows(path: Path) -> list[Row]:
    """The rows of a study's CSV; a last line that was cut short is left out.

    Raises:
        ValueError: the file has other columns, or a line that can't be read.
    """
    with path.open(newline="") as file:
        lines = file.read().splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    reader = csv.DictReader(lines)
    if lines and reader.fieldnames != _COLUMNS:
        raise ValueError(f"{path}: got columns {reader.fieldnames}, takes {_COLUMNS}")
    return [_parse(path, reader.line_num, entry) for entry in reader]


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
        raise ValueError(f"{path}: line {line} can't be read: {error}") from error
