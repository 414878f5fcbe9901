"""Where a run begins: whether its ranks agree, and the checkpoint that it continues from."""

import os
from collections.abc import Callable
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

import torch
from torch import nn

from ser_fast.training.config import TrainConfig, differences, from_json, to_json
from ser_fast.training.processes import of_all_ranks, on_rank_0
from ser_fast.training.run_folder import DamagedCheckpointError, RunFolder, load_checkpoint

# What a run that failed may go on with, where it is told to: no shape and no order depends on it.
_CHANGEABLE = ("optim.lr", "optim.lr_end", "optim.clip_grad", "optim.clip")


class Identity(NamedTuple):
    """What decides a run's numbers.

    Attributes:
        config: from `to_json`.
        data: the digest of the training images' listing.
        world_size: the number of ranks.
    """

    config: dict[str, Any]
    data: str
    world_size: int


class Beginning(NamedTuple):
    """Where a run begins.

    Attributes:
        state: of the checkpoint it continues from, on the CPU; None at step 0.
        path: of that checkpoint.
        notes: what the user should know about the choice.
        seen: the checkpoints in the run's folder when it was made.
        log_begins: the steps that were done before the first in the folder's log; None for a checkpoint that doesn't
            tell.
    """

    state: dict[str, Any] | None
    path: Path | None
    notes: list[str]
    seen: list[Path]
    log_begins: int | None = 0

    @property
    def step(self) -> int:
        """The number of steps done."""
        return 0 if self.state is None else self.state["step"]


def require_agreement(identity: Identity) -> None:
    """Raise ValueError, on every rank, unless all ranks have the same options and the same images."""
    ranks = of_all_ranks(identity)
    for number, other in enumerate(ranks):
        changed = [name for name in differences(ranks[0].config, other.config) if name != "data"]
        changed += ["data's files"] if other.data != ranks[0].data else []
        if changed:
            raise ValueError(f"ranks: rank {number} was started with another {', '.join(changed)} than rank 0")


def restore(beginning: Beginning, model: nn.Module, load_rest: Callable[[dict[str, Any]], Any]) -> None:
    """Give a model, and its optimizer, the state of the checkpoint, if there is one.

    Args:
        beginning: with the state.
        model: of the run.
        load_rest: takes the checkpoint for the optimizer and what belongs to it.

    Raises:
        ValueError: it does not fit.
    """
    if beginning.state is None:
        return
    try:
        model.load_state_dict(beginning.state["model"])
        load_rest(beginning.state)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = shorten(str(error), 400)
        raise ValueError(f"resume: {beginning.path} does not hold the state of this model: {reason}") from error


def find_beginning(config: TrainConfig, identity: Identity) -> Beginning:
    """The checkpoint that config.resume names, found and read by rank 0 for all of them.

    Raises:
        ValueError: a folder that already holds a run, a checkpoint that can't be read, or one of another run.
    """
    return on_rank_0(lambda: _find_beginning(config, identity))


def _find_beginning(config: TrainConfig, identity: Identity) -> Beginning:
    folder = RunFolder(config.out)
    if os.path.lexists(config.out) and not config.out.is_dir():
        raise ValueError(f"out: {config.out} is {'a link to nothing' if config.out.is_symlink() else 'no folder'}")
    seen = folder.list_checkpoints()
    if config.resume == "auto":
        notes = []
        for path in reversed(seen):
            try:
                state = load_checkpoint(path, torch.device("cpu"))
            except DamagedCheckpointError as error:
                notes.append(str(error))
                continue
            _require_same_run(config, identity, path, state)
            notes = [f"{note}; going on from the one before" for note in notes]
            return Beginning(state, path, notes, seen, state.get("log_begins"))
        if notes:
            raise ValueError(f"resume: every checkpoint of {config.out} is damaged: {'; '.join(notes)}")
        return Beginning(None, None, [], seen)
    path = Path(config.resume)
    own = config.resume != "none" and path.resolve().parent == folder.checkpoints.resolve()
    if folder.holds_a_run and not own:
        raise ValueError(f"out: {config.out} already holds a run; continue it with --resume auto, or name another")
    if config.resume == "none":
        return Beginning(None, None, [], seen)
    if not path.is_file():
        hint = f"; a run's folder is continued by --out {path} --resume auto" if path.is_dir() else ""
        raise ValueError(f"resume: {path} is no file; takes 'none', 'auto' or a checkpoint{hint}")
    state = load_checkpoint(path, torch.device("cpu"))
    _require_same_run(config, identity, path, state)
    return Beginning(state, path, [], seen, state.get("log_begins") if own else state["step"])


def _require_same_run(config: TrainConfig, identity: Identity, path: Path, state: dict[str, Any]) -> None:
    try:
        theirs = to_json(from_json(state["config"]))  # options that there were not yet have their defaults
    except ValueError as error:
        raise ValueError(f"resume: {path}: {error}") from error
    changed = [name for name in differences(identity.config, theirs) if name != "data"]  # its files are compared
    if _is_longer(config, theirs):
        changed = [name for name in changed if name not in ("optim.steps", "optim.epochs")]
    own = [name for name in changed if name not in _CHANGEABLE]
    around = [name for name in changed if name in _CHANGEABLE]
    around += ["data's files"] if state.get("data", identity.data) != identity.data else []
    before = state.get("world_size", identity.world_size)
    around += [f"number of ranks ({before})"] if before != identity.world_size else []
    if own or (around and not config.resume_changed):
        hint = "" if own else "; --resume-changed goes on all the same"
        raise ValueError(f"resume: {path} was trained with another {', '.join(own + around)}{hint}")


def _is_longer(config: TrainConfig, theirs: dict[str, Any]) -> bool:
    """Whether a run was asked for more steps than it had been."""
    before = theirs["optim"]
    if config.optim.steps is None or before["steps"] is None:
        return config.optim.steps is None and before["steps"] is None and config.optim.epochs > before["epochs"]
    return config.optim.steps > before["steps"]
