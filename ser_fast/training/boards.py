"""Where the numbers of a run are drawn besides its log: TensorBoard, and Weights & Biases."""

import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from ser_fast.io import write_text
from ser_fast.training.config import TrainConfig, to_json
from ser_fast.training.run_folder import RunFolder


class Board(Protocol):
    """Draws numbers against steps."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add the numbers of a step, by name."""

    def close(self, status: int) -> None:
        """Write what is left; `status` is what the process will end with."""


class TensorBoard:
    """TensorBoard's scalars; those of steps after `start` are dropped."""

    def __init__(self, config: TrainConfig, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(RunFolder(config.out).tensorboard), purge_step=start + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self, status: int) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases. Its id is kept in the folder `wandb` of ours, so that what is resumed goes on in it.

    The project is `ser-fast` or what WANDB_PROJECT says; W&B's other variables are as ever (WANDB_MODE=offline,
    WANDB_ENTITY). What is done again after a crash is logged again, at the same steps.

    Raises:
        ValueError: it can't begin, as without a login.
    """

    def __init__(self, config: TrainConfig, start: int) -> None:
        import wandb

        folder = RunFolder(config.out)
        folder.wandb.mkdir(parents=True, exist_ok=True)
        try:
            self.run: Any = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "ser-fast"),
                name="/".join(config.out.parts[-2:]),
                id=_kept_id(folder.wandb / "id"),
                resume="allow",
                dir=str(folder.path),  # it makes the folder wandb there
                config=to_json(config),
                settings=wandb.Settings(console="off"),  # a progress bar is no text
            )
        except wandb.Error as error:
            reason = " ".join(str(error).split())
            advice = "WANDB_MODE=offline needs no login"
            raise ValueError(f"log: Weights & Biases can't begin: {reason}; {advice}") from error
        # W&B's own count of steps only grows, and refuses those that are done again.
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log({"step": step, **values})

    def close(self, status: int) -> None:
        self.run.finish(exit_code=status)


BOARDS: dict[str, Callable[[TrainConfig, int], Board]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


def require_boards(names: Sequence[str]) -> None:
    """Raise, before any work, where a board can't be had.

    Raises:
        ValueError: a name that is none.
        ModuleNotFoundError: its package is not installed.
    """
    for name in names:
        if name not in BOARDS:
            raise ValueError(f"log: got {name!r}, takes {' and '.join(map(repr, BOARDS))}")
        spec = find_spec(name)
        # W&B leaves a folder of its name where it ran, which is no package.
        if spec is None or (spec.origin is None and spec.submodule_search_locations is not None):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def open_boards(config: TrainConfig, start: int) -> list[Board]:
    """The boards that a config asks for, to go on after step `start`.

    Raises:
        ValueError: one of them can't begin.
    """
    boards: list[Board] = []
    try:
        for name in dict.fromkeys(config.log):
            boards.append(BOARDS[name](config, start))  # noqa: PERF401
    except BaseException:  # those before the one that fails
        for board in boards:
            board.close(1)
        raise
    return boards


def _kept_id(path: Path) -> str:
    if not path.exists():
        write_text(path, secrets.token_hex(4))
    return path.read_text(encoding="utf-8").strip()
