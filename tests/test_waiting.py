"""A training step never waits for the device: it is run on tensors that have none, and reads no value of them.

Tensors of the device "meta" have shapes and no values. Whatever would make the host wait for a GPU fails there or is
seen by `Watch`: a look at a value, a size that depends on values, a copy that is waited for.
"""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases.objectives import small_config
from cases.runs import patterns
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ser_fast.data.loader import Batch
from ser_fast.objectives import OBJECTIVES
from ser_fast.training.config import TrainConfig
from ser_fast.training.records import StepRecord
from ser_fast.training.trainer import Trainer
from ser_fast.views.pixels import normalize
from ser_fast.views.samplers import SAMPLERS

META = torch.device("meta")
BUILT_FROM_NUMBERS = (torch.tensor, torch.as_tensor, Tensor.new_tensor)


class Watch(TorchDispatchMode):
    """Copies from the device, and what else the host would wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.copied_out: list[tuple[int, ...]] = []
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        copies = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        if copies and args[0].is_meta and kwargs.get("device") == torch.device("cpu"):
            self.copied_out.append(tuple(args[0].shape))
            return torch.zeros(args[0].shape, dtype=args[0].dtype)
        there = [tensor.is_meta for tensor in tensors if tensor.ndim > 0 or copies]
        if any(there) and not all(there) and not copies:
            self.waits.append(f"{func}: tensors of both devices")
        result = func(*args, **kwargs)
        if copies and result.is_meta and not tensors[-1].is_meta:
            non_blocking = kwargs.get("non_blocking", len(args) > 2 and args[2])
            if not non_blocking:
                self.waits.append(f"{func}: {tuple(result.shape)}")
        return result


class WatchNumbers(TorchFunctionMode):
    """Tensors on the device that are made of the host's numbers: these are copied, and waited for."""

    def __init__(self, waits: list[str]) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in BUILT_FROM_NUMBERS and result.is_meta:
            self.waits.append(f"{func.__name__}({args[-1]})")
        return result


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return patterns(tmp_path_factory.mktemp("images"), 8)


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch and kornia do for CUDA alone, done for "meta"."""
    autocast = torch.autocast

    class Autocast(autocast):
        def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
            super().__init__("cpu", *args, **kwargs)

    monkeypatch.setattr(torch, "autocast", Autocast)
    monkeypatch.setattr(
        importlib.import_module("kornia.filters.gaussian"),  # of the package it is a function
        "_to_device_nonblocking",
        lambda tensor, device, dtype=None: tensor.to(device, dtype, non_blocking=True),
        raising=False,
    )


def watched_step(config: TrainConfig) -> tuple[Watch, StepRecord, Trainer]:
    """A step of a run on the device without values."""
    trainer = Trainer(config, META)
    trainer.optimizer.defaults["fused"] = True  # as on a GPU; its kernels get the flag, and are not run

    def take_no_step() -> None:
        assert trainer.optimizer.found_inf.is_meta

    trainer.optimizer.step = take_no_step
    batch: Batch = next(trainer.batches())[1]
    normalize(torch.empty(1, 3, 1, 1, device=META))  # sends its constants once
    watch = Watch()
    with watch, WatchNumbers(watch.waits):
        record = trainer.step(0, 0, batch.images, batch.indices, batch.aspects)
    return watch, record, trainer


def assert_never_waits(config: TrainConfig) -> None:
    watch, record, trainer = watched_step(config)
    assert watch.waits == []
    # One copy leaves the device, the record's: the losses, their parts, the norm, and whether it was skipped.
    assert watch.copied_out == [(len(record),)]
    assert record["loss"] == 0
    assert {"loss", "invariance", "lr", "grad_norm", *trainer.model.weights} <= set(record)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_step_of_no_objective_waits(objective: str, data: str, tmp_path: Path) -> None:
    assert_never_waits(small_config(objective, tmp_path / "run", data=data, model__drop_path_rate=0.1))


@pytest.mark.slow
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_step_of_no_sampler_waits(sampler: str, data: str, tmp_path: Path) -> None:
    assert_never_waits(small_config("moco_v3", tmp_path / "run", data=data, views__sampler=sampler))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"augself__layers": (2,), "augself__turn": 1.0, "augself__flip": 1.0, "augself__blur": 1.0},
        {"equimod__layers": (2,), "essl__layers": (2,), "stl__layers": (2,)},
        {"views__locals": 2, "ser__locals": True, "ser__max_tokens": 9},
        {"ser__momentum_keys": True, "ser__preset": "released", "optim__clip": "parameter"},
        {"optim__accumulate": 2},
        {"optim__accumulate": 2, "optim__accumulate_mode": "plain", "model__grad_checkpointing": True},
    ],
    ids=lambda options: " ".join(options),
)
def test_a_step_with_no_option_waits(options: dict[str, Any], data: str, tmp_path: Path) -> None:
    assert_never_waits(small_config("moco_v3", tmp_path / "run", data=data, **options))


@pytest.mark.parametrize(
    "wait",
    [
        lambda loss: loss * float(loss),
        lambda loss: loss[loss > 0].sum(),
        lambda loss: loss * torch.tensor([1.0], device=loss.device).sum(),
        lambda loss: loss * torch.ones(3).to(loss.device).sum(),
        lambda loss: loss * loss.expand(3)[torch.arange(3)].sum(),
    ],
    ids=["a value", "a size", "a number", "a copy", "an index"],
)
def test_what_waits_is_found(
    wait: Callable[[Tensor], Tensor], data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config("moco_v3", tmp_path / "run", data=data, views__share=0.0, model__depth=1)
    kind = type(config.build().objective)
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, *args: {"loss": wait(forward(self, *args)["loss"])})
    with pytest.raises((RuntimeError, AssertionError), match=r"meta|== \[\]"):
        assert_never_waits(config)
