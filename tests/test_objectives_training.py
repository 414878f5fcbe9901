"""Every objective with SER trains on photographs, and a run that was continued gives the bits of one that was not."""

from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from objective_cases import small_config
from torch import Tensor

from ser_fast.objectives import OBJECTIVES
from ser_fast.training.run_folder import RunFolder, load_checkpoint
from ser_fast.training.trainer import Trainer, train

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
# Of 24-fold batches of photographs: what each objective needs to get somewhere in 30 steps.
LEARNS: dict[str, dict[str, Any]] = {
    "moco_v3": {"optim__lr": 0.02},
    "dino": {"optim__lr": 0.02, "dino__freeze_last_layer": 0.0},
    "barlow_twins": {"optim__lr": 0.02},
    "simclr": {"optim__lr": 0.02},
    "byol": {"optim__lr": 0.02},
    "vicreg": {"optim__lr": 0.02},
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_30_steps_lower_the_losses(name: str, tmp_path: Path) -> None:
    config = small_config(name, tmp_path, optim__batch_size=24, optim__steps=30, optim__warmup=0.1, **LEARNS[name])
    trainer = Trainer(config, CPU)
    batch = next(trainer.batches())[1]
    records = [trainer.step(step, 0, batch.images, batch.indices) for step in range(30)]
    for part in ("loss", "invariance", "ser"):
        first, last = (fmean(record[part] for record in some) for some in (records[:5], records[-5:]))
        print(name, part, first, last)
        assert last < 0.97 * first, part


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
