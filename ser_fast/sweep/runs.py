"""The trainings of a sweep: in this process, or several at once in processes of their own."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ser_fast.sweep.cells import Cell
from ser_fast.training.config import TrainConfig
from ser_fast.training.options import parse
from ser_fast.training.processes import stop_signals
from ser_fast.training.trainer import NonFiniteLossError, train


@dataclass(frozen=True)
class SweepRun:
    """One training of a sweep.

    Attributes:
        cell: what it changes.
        seed: of it.
        arguments: of `ser-fast train`.
        config: what these say.
    """

    cell: Cell
    seed: int
    arguments: list[str]
    config: TrainConfig


def plan_runs(out: Path, arguments: Sequence[str], cells: Sequence[Cell], *, seeds: int) -> list[SweepRun]:
    """The trainings of a sweep, seed after seed: a sweep that is stopped has whole blocks.

    Args:
        out: the sweep's folder; a run's is out/runs/CELL/SEED.
        arguments: of `ser-fast train`, which all cells share.
        cells: what each changes.
        seeds: how many runs of a cell; the first has the arguments' seed.

    Raises:
        ValueError: options that don't fit, or a cell that changes what the sweep decides.
        SystemExit: an option that there isn't; it is printed.
    """
    if seeds < 1:
        raise ValueError(f"seeds: got {seeds}, takes 1 or more")
    for cell in cells:
        if taken := {"out", "seed", "resume"} & {option for option, _ in cell.options}:
            raise ValueError(f"cell: {cell.name} changes {taken.pop()}, which the sweep decides")
    first = parse(arguments, prog="ser-fast sweep").seed
    runs = []
    for seed in range(first, first + seeds):
        for cell in cells:
            own = ["--out", str(out / "runs" / cell.folder / str(seed)), "--seed", str(seed), "--resume", "auto"]
            line = [*arguments, *cell.arguments, *own]
            runs.append(SweepRun(cell, seed, line, parse(line, prog="ser-fast sweep")))
    return runs


def train_runs(
    runs: Sequence[SweepRun],
    *,
    processes: int = 1,
    ranks: int = 1,
    finished: Callable[[SweepRun, str | None], None],
) -> None:
    """Train, or go on with, each run. One that fails doesn't end the others.

    Args:
        runs: of `plan_runs`.
        processes: how many at a time; 1 trains in this process.
        ranks: of each, under torchrun; 1 needs none.
        finished: called with each run when it has ended, and with why it failed, or None.

    Raises:
        ValueError: numbers that aren't positive.
        KeyboardInterrupt: it was stopped; the runs have checkpoints, and the same call goes on.
    """
    if processes < 1 or ranks < 1:
        raise ValueError(f"processes, ranks: got {processes} and {ranks}, takes positive numbers")
    if processes == ranks == 1:
        for run in runs:
            finished(run, _train_here(run))
        return
    environment = os.environ | {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // (processes * ranks))))
    }
    waiting = list(runs)
    running: dict[subprocess.Popen[bytes], SweepRun] = {}
    with stop_signals() as stop:
        try:
            while (waiting or running) and not stop:
                ended = {process: running.pop(process) for process in list(running) if process.poll() is not None}
                while waiting and len(running) < processes:  # before the ended ones are scored, which takes a while
                    run = waiting.pop(0)
                    running[_start(run, ranks, environment)] = run
                for process, run in ended.items():
                    finished(run, None if process.returncode == 0 else _last_line(_output(run)))
                time.sleep(0.1)
        finally:
            for process in running:
                process.terminate()  # it writes a checkpoint and ends
            for process in running:
                process.wait()
    if stop:
        raise KeyboardInterrupt


def _train_here(run: SweepRun) -> str | None:
    try:
        train(run.config)
    except NonFiniteLossError as error:
        return str(error)
    except SystemExit as stopped:  # by a signal, after a checkpoint
        raise KeyboardInterrupt from stopped
    return None


def _start(run: SweepRun, ranks: int, environment: dict[str, str]) -> "subprocess.Popen[bytes]":
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    output = _output(run)
    output.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, *launcher, "-m", "ser_fast.cli", "train", *run.arguments]
    with output.open("ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, stdin=subprocess.DEVNULL, env=environment)


def _output(run: SweepRun) -> Path:
    """What a run in a process of its own printed."""
    return run.config.out.parent / f"{run.config.out.name}.txt"


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").split("\n")
    said = [line for line in lines if line.startswith("ser-fast: ")] or [line for line in lines if line.strip()]
    return said[-1].removeprefix("ser-fast: ") if said else f"it printed nothing; see {path}"
