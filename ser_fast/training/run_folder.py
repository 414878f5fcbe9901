"""A run's folder: the name of every file in it, how it is written and how it is read."""

import json
import os
import re
import socket
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch

from ser_fast.io import flush_to_disk, remove_partial_files, write_atomically
from ser_fast.training.config import TrainConfig, from_json, to_json
from ser_fast.vit import SplitViT, save_split_vit

if TYPE_CHECKING:
    from ser_fast.training.boards import Board

try:
    import fcntl
except ImportError:  # Windows: two runs in one folder are not noticed there
    fcntl = None  # type: ignore[assignment]

CHECKPOINT_FORMAT = 2


class DamagedCheckpointError(ValueError):
    """A checkpoint that can't be read, or whose checksums do not fit."""


class RunFolder:
    """The files of a run.

    Attributes:
        path: the folder.
        config: its options, JSON.
        environment: the versions and the machine that it ran on, JSON.
        log: a line of JSON a step.
        tensorboard: a folder of TensorBoard's.
        wandb: a folder of Weights & Biases', where the run has an id there.
        encoder: the weights of the product, for `ser_fast.vit.load_split_vit`.
        checkpoints: a folder of step_N.pt.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.json"
        self.environment = path / "environment.json"
        self.log = path / "log.jsonl"
        self.tensorboard = path / "tensorboard"
        self.wandb = path / "wandb"
        self.encoder = path / "encoder.safetensors"
        self.checkpoints = path / "checkpoints"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes from training into this folder; the lock ends with the process, however it ends.

        Raises:
            ValueError: one trains into it already, or it can't be written to.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            opened = (self.path / ".lock").open("a+")
        except OSError as error:
            raise ValueError(f"out: {self.path} can't be written to: {error.strerror}") from error
        with opened as file:
            if fcntl is not None:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError as error:
                    file.seek(0)
                    raise ValueError(f"out: {self.path} is being trained into by {file.read() or 'another'}") from error
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            for folder in (self.path, self.checkpoints):
                remove_partial_files(folder)
            yield

    @property
    def holds_a_run(self) -> bool:
        """Whether a step was done here."""
        return bool(self.list_checkpoints()) or (self.log.exists() and self.log.stat().st_size > 0)

    def write_description(self, config: TrainConfig, environment: dict[str, Any]) -> None:
        """Write config.json and environment.json."""
        for path, content in ((self.config, to_json(config)), (self.environment, environment)):
            write_atomically(path, partial(Path.write_text, data=json.dumps(content, indent=2) + "\n"))

    def read_config(self) -> TrainConfig:
        """The run's options.

        Raises:
            ValueError: config.json is none of a run.
        """
        try:
            return from_json(json.loads(self.config.read_text()))
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"config: {self.config} can't be read as that of a run: {error}") from error

    def open_log(self, start: int, boards: "Sequence[Board]" = (), *, begins: int | None = 0) -> "RunLog":
        """The log, to go on after step `start`: what was logged after it, or cut short by a crash, is dropped.

        Checkpoints of later steps, of a branch that is abandoned, are set aside in a folder of their own.

        Args:
            start: steps done.
            boards: where the numbers are drawn besides.
            begins: steps that were done elsewhere, before this folder's first; None where that isn't known.

        Returns:
            It, with what lines of it are missing: after a crash of the machine, those that were not on the disk yet.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if later := [path for path in self.list_checkpoints() if _number(path) > start]:
            aside = next(
                folder
                for number in range(1, 10**6)
                if not (folder := self.checkpoints / f"set_aside_{number}").exists()
            )
            aside.mkdir()
            for path in later:
                path.rename(aside / path.name)
        kept: list[str] = []
        if self.log.exists():
            lines = self.log.read_text(errors="replace").splitlines(True)
            kept = [line for line in lines if _step_of(line) <= start]
            write_atomically(self.log, partial(Path.write_text, data="".join(kept)))
        gap = _gap({int(_step_of(line)) for line in kept}, begins, start)
        note = f"log: steps {gap} are missing from {self.log}; the run itself is whole" if gap else ""
        return RunLog(self.log, self.log.open("a", buffering=1), boards, note)

    def read_log(self) -> list[dict[str, Any]]:
        """What each step logged, as far as it is whole."""
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return [json.loads(line) for line in lines if _step_of(line) < float("inf")]

    def save_encoder(self, encoder: SplitViT, step: int) -> None:
        """Write the encoder's weights."""
        write_atomically(self.encoder, lambda path: save_split_vit(path, encoder, {"step": str(step)}))

    def save_checkpoint(self, state: dict[str, Any], *, keep: int) -> Path:
        """Write checkpoints/step_N.pt for state["step"] = N, and delete all but the newest `keep`."""
        path = self.checkpoints / f"step_{state['step']:08d}.pt"
        state = {"format": CHECKPOINT_FORMAT, **state}
        write_atomically(path, lambda partial: torch.save(state, partial))
        for old in self.list_checkpoints()[:-keep]:
            old.unlink()
        return path

    def list_checkpoints(self) -> list[Path]:
        """The run's checkpoints, oldest first; copies under other names that lie beside them are the user's own."""
        named = [path for path in self.checkpoints.glob("step_*.pt") if re.fullmatch("step_[0-9]+", path.stem)]
        return sorted(named, key=_number)


class RunLog:
    """The run's log: a line of JSON a step, and boards that draw it.

    Attributes:
        note: what the user should know of the lines before; empty if they are whole.
    """

    def __init__(self, path: Path, lines: IO[str], boards: "Sequence[Board]" = (), note: str = "") -> None:
        self.path, self.lines, self.boards, self.note = path, lines, boards, note

    def write(self, step: int, epoch: int, record: dict[str, float]) -> None:
        """Add what a step has to tell.

        Raises:
            OSError: it can't be written, as on a full disk.
        """
        try:
            self.lines.write(json.dumps({"step": step, "epoch": epoch, **record}) + "\n")
        except OSError as error:  # which does not know its file's name
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        for board in self.boards:
            board.write(step, record)

    def flush(self) -> None:
        """Return when what was written is on the disk itself, so that no checkpoint goes beyond it."""
        self.lines.flush()
        flush_to_disk(self.path)
        flush_to_disk(self.path.parent)

    def close(self, status: int = 0) -> None:
        """Flush and close all of it.

        Args:
            status: what the process will end with.
        """
        with ExitStack() as stack:  # each of them, whichever fails
            for board in self.boards:
                stack.callback(board.close, status)
            self.lines.close()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        status = 0 if error is None else (error.code or 0) if isinstance(error, SystemExit) else 1
        self.close(status if isinstance(status, int) else 1)


def load_checkpoint(path: Path, device: torch.device) -> dict[str, Any]:
    """What `RunFolder.save_checkpoint` wrote.

    Raises:
        DamagedCheckpointError: the file can't be read, or its checksums do not fit.
        ValueError: it is no checkpoint of this trainer, or one of another version.
    """
    try:
        if not path.is_file():  # a pipe would be waited for
            raise OSError("not a regular file")
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()  # torch.load does not look at the checksums
        state = torch.load(path, map_location=device, weights_only=True) if broken is None else None
    except Exception as error:  # zipfile and torch.load raise many types for a file that isn't their own
        raise DamagedCheckpointError(f"resume: {path} can't be read as a checkpoint: {error}") from error
    if broken is not None:
        raise DamagedCheckpointError(f"resume: {path} is damaged: the checksum of {broken} does not fit")
    parts = {"step": int, "config": dict, "model": dict, "optimizer": dict}
    if not isinstance(state, dict) or not all(isinstance(state.get(name), kind) for name, kind in parts.items()):
        raise ValueError(f"resume: {path} is no checkpoint of this trainer")
    if state.get("format", 1) != CHECKPOINT_FORMAT:
        raise ValueError(
            f"resume: {path} has format {state.get('format', 1)}, this version reads {CHECKPOINT_FORMAT}; its "
            "encoder.safetensors can still be evaluated"
        )
    return state


def find_encoder(path: Path) -> Path:
    """The encoder's weights for a run's folder or a safetensors file.

    Raises:
        ValueError: there are none.
    """
    found = RunFolder(path).encoder if path.is_dir() else path
    if not found.is_file() or found.suffix != ".safetensors":
        raise ValueError(
            f"checkpoint: {path} is neither a run's folder with {RunFolder(path).encoder.name} nor a .safetensors file"
        )
    return found


def _number(checkpoint: Path) -> int:
    """The step that a checkpoint's name tells."""
    return int(checkpoint.stem.removeprefix("step_"))


def _step_of(line: str) -> float:
    """Infinite for a line that is none of a log, cut short or damaged."""
    try:
        step = int(json.loads(line)["step"])
        return step if step > 0 else float("inf")
    except (ValueError, KeyError, TypeError, OverflowError):
        return float("inf")


def _gap(steps: set[int], begins: int | None, last: int) -> str:
    """The first and the last step that are missing after `begins` (None: after the first of `steps`) up to `last`."""
    first = min(steps, default=last + 1) if begins is None else begins + 1
    missing = sorted(set(range(first, last + 1)) - steps)
    return f"{missing[0]} to {missing[-1]}" if missing else ""
