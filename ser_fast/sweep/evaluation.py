"""A sweep: trainings, their scores in one tidy table, and a page."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table as PrintedTable

from ser_fast.csv_files import read_csv, write_csv
from ser_fast.device import choose_device
from ser_fast.evaluation import CONTROL
from ser_fast.evaluation.knn import SampledImages
from ser_fast.evaluation.protocol import check_positive, make_folder, open_encoder
from ser_fast.evaluation.scores import MEASURES, OF_A_LAYER, ScoreRecord, score_encoder
from ser_fast.io import write_atomically
from ser_fast.sweep.analysis import Interval, Table, cell_means, judged, shared_seeds
from ser_fast.sweep.cells import Cell
from ser_fast.sweep.page import REPORT, write_report
from ser_fast.sweep.runs import SweepRun, plan_runs, train_runs
from ser_fast.training.config import TrainConfig, objective_name

TABLE, PROTOCOL = "sweep.csv", "sweep.json"


@dataclass(frozen=True)
class SweepProtocol:
    """What all scores of a sweep share.

    Attributes:
        arguments: of `ser-fast train`, which all cells share.
        data: whose images are scored on.
        train, test, equivariance: as `SampledImages.open`.
        baseline: the cell that others are compared with.
        layer: whose errors are compared, and those of the last layer besides.
    """

    arguments: list[str]
    data: str
    train: int
    test: int
    equivariance: int
    baseline: str
    layer: int


class SweepRow(NamedTuple):
    """One number of one run.

    Attributes:
        cell, seed: the run; "random ..." is an encoder as it was before training.
        options: what the cell changes.
        record: the number.
    """

    cell: str
    seed: int
    options: dict[str, str]
    record: ScoreRecord


@dataclass(frozen=True)
class SweepResult:
    """The scores of a sweep.

    Attributes:
        rows: all of them.
        protocol: what they share.
        failed: why a run gave no score, by "CELL, seed N".
    """

    rows: list[SweepRow]
    protocol: SweepProtocol
    failed: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> "SweepResult":
        """What a folder holds of a sweep.

        Raises:
            ValueError: it can't be read as that.
        """
        try:
            protocol = SweepProtocol(**json.loads((folder / PROTOCOL).read_text(encoding="utf-8")))
            rows = [_read_row(row) for row in read_csv(folder / TABLE)]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"out: {folder} can't be read as a sweep's folder: {error!r}") from error
        return cls(rows, protocol)

    @property
    def compared(self) -> dict[str, str]:
        """The measures that are compared, and what they are called: "knn", "d4_error@3" and so on."""
        names: dict[str, str] = {}
        last = max((row.record.layer for row in self.rows), default=0)
        for measure, title in MEASURES.items():
            if measure not in OF_A_LAYER:
                names[measure] = title
                continue
            names[f"{measure}@{self.protocol.layer}"] = f"{title}, layer {self.protocol.layer}"
            if measure != "retrieval" and last != self.protocol.layer:
                names[f"{measure}@{last}"] = f"{title}, last layer"
        measured = {row.record.name for row in self.rows}
        return {name: title for name, title in names.items() if name in measured}

    def table(self, measure: str, *, controls: bool = False) -> Table:
        """cell: seed: value.

        Args:
            measure: a name in `compared`.
            controls: those of the random controls instead.
        """
        table: dict[str, dict[int, float]] = {}
        for row in self.rows:
            if row.cell.startswith(CONTROL) == controls and row.record.name == measure:
                table.setdefault(row.cell, {})[row.seed] = row.record.value
        return table

    @property
    def tables(self) -> dict[str, Table]:
        """The trained cells' values of every measure that is compared."""
        return {measure: self.table(measure) for measure in self.compared}

    @property
    def options(self) -> dict[str, dict[str, str]]:
        """What each trained cell changes."""
        return {row.cell: row.options for row in self.rows if not row.cell.startswith(CONTROL)}

    def write(self, folder: Path) -> list[Path]:
        """Write sweep.csv with its sweep.json, the figures and report.html; returns their paths."""
        return [*self.write_table(folder), *write_report(self, folder)]

    def write_table(self, folder: Path) -> list[Path]:
        """Write sweep.csv with its sweep.json alone: a sweep goes on from these; returns their paths."""
        text = json.dumps(asdict(self.protocol), indent=2) + "\n"
        write_atomically(folder / PROTOCOL, partial(Path.write_text, data=text, encoding="utf-8"))
        names = list(dict.fromkeys(name for row in self.rows for name in row.options))
        lines = (
            {"cell": row.cell, **{name: row.options.get(name, "") for name in names}, "seed": row.seed}
            | row.record._asdict()
            for row in self.rows
        )
        table = write_csv(["cell", *names, "seed", *ScoreRecord._fields], lines, folder / TABLE)
        return [table, folder / PROTOCOL]

    def words(self) -> list[str]:
        """What differs from the baseline by more than chance, a line a measure, and what failed."""
        if not self.rows:
            return [f"failed: {run}: {reason}" for run, reason in self.failed.items()]
        found, comparisons = judged(self.tables, self.protocol.baseline)
        lines = []
        for measure, title in self.compared.items():
            apart = [f"{cell} {described(value)}" for cell, value in found[measure].items() if value.excludes_zero]
            says = f"more than chance: {'; '.join(apart)}" if apart else "no cell differs by more than chance"
            lines.append(f"{title}: {says}.")
        seeds = shared_seeds(next(iter(self.tables.values())))
        lines.append(
            f"Differences from {self.protocol.baseline} over {len(seeds)} seeds, with 95 % intervals that hold for all "
            f"{comparisons} comparisons together (Bonferroni; one variance for all cells, seeds as blocks)."
        )
        return [*lines, *(f"failed: {run}: {reason}" for run, reason in self.failed.items())]

    def print(self, console: Console | None = None) -> None:
        """Print the mean of each cell, a row a cell, and what differs from the baseline."""
        console = console or Console()
        table = PrintedTable(
            box=SIMPLE_HEAD, padding=0, title="Means over seeds, ± half a 95 % interval, the seeds' part taken off"
        )
        table.add_column("cell", no_wrap=True)  # where it is narrow, the numbers wrap and the names stay
        means = {measure: cell_means(table) for measure, table in self.tables.items()}
        controls = {measure: self.table(measure, controls=True) for measure in self.compared}
        for measure in self.compared:
            table.add_column(measure.replace("_", " "), justify="right", overflow="fold")
        for cell in self.options:
            table.add_row(escape(cell), *(_short(means[measure][cell]) for measure in self.compared))
        for cell in dict.fromkeys(cell for values in controls.values() for cell in values):
            values = (controls[measure].get(cell, {}).values() for measure in self.compared)
            table.add_row(escape(cell), *(f"{sum(of_cell) / len(of_cell):.3f}" for of_cell in values))
        console.print(table)
        for line in self.words():
            console.print(line, highlight=False, markup=False, soft_wrap=True)


def described(value: Interval) -> str:
    """A difference in words."""
    return f"{value.value:+.4f} [{value.low:+.4f}, {value.high:+.4f}]"


def run_sweep(
    out: Path,
    arguments: Sequence[str],
    cells: Sequence[Cell],
    *,
    seeds: int = 3,
    baseline: str | None = None,
    layer: int | None = None,
    train: int = 5000,
    test: int = 2000,
    equivariance: int = 256,
    processes: int = 1,
    ranks: int = 1,
    console: Console | None = None,
) -> SweepResult:
    """Train every cell with every seed, and score the encoders; what the folder holds already is kept.

    Args:
        out: takes each run's folder, and the table after each run.
        arguments: of `ser-fast train`, which all cells share.
        cells: of `make_cells`.
        seeds: runs of a cell.
        baseline: a cell's name; default the first.
        layer: whose errors are compared, besides the last one's; default the blocks before [CLS] of the baseline.
        train, test, equivariance: images, as `SampledImages.open`.
        processes: runs at a time.
        ranks: of each run, under torchrun.
        console: tells of each run; default none does.

    Raises:
        ValueError: options that don't fit, or a folder of another sweep; before anything is trained.
        KeyboardInterrupt: it was stopped; the same call goes on.
    """
    console = console or Console(quiet=True)
    check_positive(train=train, test=test, equivariance=equivariance, layer=layer)
    runs = plan_runs(out, arguments, cells, seeds=seeds)
    names = [cell.name for cell in cells]
    if taken := [name for name in names if name.startswith(CONTROL)]:
        raise ValueError(f"cell: got {taken[0]!r}; names that begin with {CONTROL!r} are those of the random controls")
    if (chosen := baseline or names[0]) not in names:
        raise ValueError(f"baseline: got {chosen!r}, takes one of {', '.join(names)}")
    base = runs[names.index(chosen)].config
    layer = layer or max(1, base.model.blocks_before_cls)
    depth = base.model.build().depth  # a model that can't be built is told before one is trained
    if layer > depth:
        raise ValueError(f"layer: got {layer}, takes 1 to {depth}, the depth of {chosen}")
    protocol = SweepProtocol(list(arguments), base.data, train, test, equivariance, chosen, layer)
    result = SweepResult([], protocol)
    if (out / TABLE).exists():
        kept = SweepResult.read(out)
        scored = {name: getattr(kept.protocol, name) for name in ("arguments", "data", "train", "test", "equivariance")}
        changed = [name for name, value in scored.items() if value != getattr(protocol, name)]
        if changed:
            raise ValueError(f"out: {out} holds a sweep with another {', '.join(changed)}; name another folder")
        result.rows.extend(kept.rows)
    make_folder(out)
    done = {(row.cell, row.seed) for row in result.rows}
    sets: dict[tuple[str, int], SampledImages] = {}

    def images_of(config: TrainConfig) -> SampledImages:
        key = config.data, config.model.image_size
        if key not in sets:
            sets[key] = SampledImages.open(*key, train=train, test=test, equivariance=equivariance)
        return sets[key]

    def score(run: SweepRun, failure: str | None) -> None:
        name = f"{run.cell.name}, seed {run.seed}"
        if failure is not None:
            result.failed[name] = failure
            console.print(f"{name} failed: {failure}", markup=False)
            return
        model = open_encoder(run.config.out, run.config.data, device=run.config.device).model
        records = score_encoder(model, images_of(run.config))
        result.rows.extend(SweepRow(run.cell.name, run.seed, dict(run.cell.options), record) for record in records)
        result.write_table(out)
        told = {record.name: record.value for record in records}
        said = "  ".join(f"{measure} {told[measure]:.3f}" for measure in result.compared)
        console.print(f"{name}: {said}", markup=False, highlight=False, soft_wrap=True)

    waiting = [run for run in runs if (run.cell.name, run.seed) not in done]
    console.print(f"{len(runs)} runs, {len(waiting)} to train", markup=False)
    train_runs(waiting, processes=processes, ranks=ranks, finished=score)
    for run, name in _controls(runs, cells):
        if (name, run.seed) not in done:
            torch.manual_seed(run.config.seed)
            control = run.config.build().product.to(choose_device(run.config.device))
            records = score_encoder(control, images_of(run.config))
            result.rows.extend(SweepRow(name, run.seed, {}, record) for record in records)
    # As the cells are named, not as runs ended; those of an earlier call after them.
    place = {name: number for number, name in enumerate(names)}
    result.rows.sort(key=lambda row: (row.cell.startswith(CONTROL), place.get(row.cell, len(place)), row.seed))
    result.write(out)
    return result


def _controls(runs: Sequence[SweepRun], cells: Sequence[Cell]) -> list[tuple[SweepRun, str]]:
    """A run of each model and seed, and what its encoder before training is called."""
    first: dict[tuple[Any, Any, int], SweepRun] = {}
    for run in runs:
        first.setdefault((run.config.model, objective_name(run.config), run.seed), run)
    several = len({(model, objective) for model, objective, _ in first}) > 1
    return [(run, f"{CONTROL} ({run.cell.name})" if several else CONTROL) for run in first.values()]


def _short(value: Interval) -> str:
    half = "" if math.isnan(value.low) else f" ±{value.high - value.value:.3f}"
    return f"{value.value:.3f}{half}"


def _read_row(row: Mapping[str, str]) -> SweepRow:
    given = dict(row)
    cell, seed = given.pop("cell"), int(given.pop("seed"))
    record = ScoreRecord(given.pop("measure"), int(given.pop("layer")), float(given.pop("value")))
    return SweepRow(cell, seed, {name: value for name, value in given.items() if value}, record)


__all__ = ["REPORT", "TABLE", "SweepProtocol", "SweepResult", "SweepRow", "run_sweep"]
