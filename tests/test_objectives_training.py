"""Every objective with SER trains on photographs, and a run that was continued gives the bits of one that was not."""

from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from cases.objectives import small_config
from torch import Tensor

from ser_fast.objectives import OBJECTIVES
from ser_fast.training.run_folder import RunFolder, load_checkpoint
from ser_fast.training.trainer import Trainer, train

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
# DINO's loss is that of a moving target, and rises while the center comes to where the teacher's outputs are.
FASTER = {"dino": {"optim__lr": 0.1, "dino__freeze_last_layer": 0.0, "dino__center_momentum": 0.5}}
FIRST = {"dino": 6}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_30_steps_lower_the_losses(name: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"optim__batch_size": 24, "optim__steps": 30, "optim__lr": 0.02} | FASTER.get(name, {})
    trainer = Trainer(small_config(name, tmp_path, **options), CPU)
    batch = next(trainer.batches())[1]
    records = [trainer.step(step, 0, batch.images, batch.indices) for step in range(30)]
    for part in ("loss", "invariance", "ser"):
        values = [record[part] for record in records[FIRST.get(name, 0) :]]
        assert fmean(values[-5:]) < 0.95 * fmean(values[:5]), part


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_continued_run_gives_the_same_bits(name: str, tmp_path: Path) -> None:
    config = small_config(name, tmp_path / "whole", optim__steps=4, optim__accumulate=2, save_every=2)
    states = [final_state(train(config))]
    first = RunFolder(config.out).list_checkpoints()[0]
    assert first.name == "step_00000002.pt"
    states.append(final_state(train(replace(config, out=tmp_path / "continued", resume=str(first)))))
    one, other = (flat(state) for state in states)
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.equal(value, other[key]) if isinstance(value, Tensor) else value == other[key], key
    if name == "dino":
        assert one["model.objective.center"].any()


def final_state(out: Path) -> dict[str, Any]:
    state = load_checkpoint(RunFolder(out).list_checkpoints()[-1], CPU)
    return {part: state[part] for part in ("step", "model", "optimizer")}


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """The entries of nested dicts and lists, by dotted name."""
    entries = enumerate(value) if isinstance(value, list) else value.items() if isinstance(value, dict) else None
    if entries is None:
        return {prefix.removesuffix("."): value}
    return {name: leaf for key, part in entries for name, leaf in flat(part, f"{prefix}{key}.").items()}
