"""The study as an evaluation: from models to rows, words, figures and a page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console

from ser_fast.evaluation.protocol import DEFAULT_DATA, check_positive, device_of
from ser_fast.sensitivity.page import REPORT, write_report
from ser_fast.sensitivity.retraining import Score, read_scores
from ser_fast.sensitivity.study import Protocol, run_study
from ser_fast.sensitivity.table import TABLE, Row, StudyTable, read_rows
from ser_fast.sensitivity.words import summarize
from ser_fast.vit import SplitViT


@dataclass(frozen=True)
class SensitivityResult:
    """A study's rows, and the scores of models that were trained with each setting.

    Attributes:
        rows: every measurement.
        protocol: what they have in common, as in protocol.json.
        scores: of `ser_fast.sensitivity.retraining`; empty where nothing was trained.
    """

    rows: Sequence[Row]
    protocol: Mapping[str, object]
    scores: Sequence[Score] = ()

    @classmethod
    def read(cls, folder: Path) -> "SensitivityResult":
        """What a folder holds of a study.

        Raises:
            ValueError: a table that can't be read.
        """
        return cls(read_rows(folder / TABLE), StudyTable.read_protocol(folder) or {}, read_scores(folder))

    def summary(self) -> list[str]:
        """Ten lines of words.

        Raises:
            ValueError: the rows hold no equivariance of any source but random features.
        """
        return summarize(self.rows)

    def write(self, folder: Path) -> list[Path]:
        """Write sensitivity.csv with its protocol.json, the figures, report.html and summary.txt; returns their paths.

        A later study in this folder goes on from the rows.
        """
        table = StudyTable.write(folder, self.rows, self.protocol)
        return [table, *write_report(self.rows, self.scores, folder)]

    def print(self, console: Console | None = None) -> None:
        """Print the summary, numbered."""
        for number, line in enumerate(self.summary(), start=1):
            (console or Console()).print(f"{number}. {line}", highlight=False, markup=False)


def evaluate(
    models: SplitViT | Mapping[str, SplitViT],
    data: str = DEFAULT_DATA,
    *,
    preset: Literal["quick", "full"] = "quick",
    images: int = 16,
    image_size: int = 128,
    seed: int = 0,
    folder: Path | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> SensitivityResult:
    """Move synthetic fields, photographs and features by many maps, with every option of the resampling.

    Args:
        models: one, called "checkpoint", or several by name; a random initialization of each architecture is measured
            with them, or that of the demo's where there are none.
        data: whose held-out images are used, as `open_dataset` takes it.
        preset: "quick" varies one factor at a time, "full" measures the whole grid, for hours.
        images: how many of them, spread evenly, and how many synthetic fields.
        image_size: their side in pixels; enlarged where a model needs more.
        seed: of the fields, the random initializations and the bootstrap.
        folder: takes every row as it is measured; what it holds already is kept. None keeps the rows in memory.
        device: where tokens are moved and models run; default the first model's, or the CPU.
        progress: show a bar on the terminal.

    Raises:
        ValueError: data that can't be opened, options out of range, or a folder with rows of another protocol; before
            anything is measured.

    Example:
        >>> result = evaluate({"mine": load_split_vit("encoder.safetensors")}, "folder:images", images=64)
        >>> result.print()
        >>> result.write(Path("results"))
    """
    check_positive(images=images, image_size=image_size)
    if preset not in ("quick", "full"):
        raise ValueError(f"preset: got {preset!r}, takes 'quick' or 'full'")
    named = {"checkpoint": models} if isinstance(models, SplitViT) else dict(models)
    if device is None:
        device = device_of(next(iter(named.values()))) if named else "cpu"
    protocol = Protocol(data, images, image_size, seed)
    table = run_study(named, protocol, folder, full=preset == "full", device=torch.device(device), progress=progress)
    return SensitivityResult(table.rows, table.protocol, read_scores(folder) if folder else [])


__all__ = ["REPORT", "TABLE", "SensitivityResult", "evaluate"]
