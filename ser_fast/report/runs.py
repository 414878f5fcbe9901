"""What the folders of runs hold that a comparison can show."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.colors import to_hex

from ser_fast.csv_files import read_csv
from ser_fast.training.run_folder import RunFolder


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
