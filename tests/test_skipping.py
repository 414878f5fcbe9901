"""Steps that are not finite, and float16 whose loss is scaled: what is skipped, what is told, what goes on."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from cases.objectives import small_config
from cases.runs import CPU, patterns, read_log
from torch import Tensor
from torch.amp import GradScaler

from ser_fast.training.config import TrainConfig, with_options
from ser_fast.training.optim import build_optimizer
from ser_fast.training.pretraining import Pretraining
from ser_fast.training.run_folder import RunFolder, load_checkpoint
from ser_fast.training.trainer import MOST_OVERFLOWS, NonFiniteLossError, Trainer, train
from ser_fast.views.recipe import Views


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return patterns(tmp_path_factory.mktemp("images"), 24)


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What to do to the losses of the next steps, one entry a step: "loss", "gradient", or nothing."""
    forward, todo = Pretraining.forward, []

    def poisoned(self: Pretraining, views: Views, progress: float) -> dict[str, Tensor]:
        losses = forward(self, views, progress)
        what = todo.pop(0) if todo else ""
        if what:  # the root of 0 is finite, its derivative isn't
            zero = 0 * self.encoder.cls_token.sum()
            losses["loss"] = losses["loss"] + (zero / 0 if what == "loss" else zero.sqrt())
        return losses

    monkeypatch.setattr(Pretraining, "forward", poisoned)
    return todo


def state(run: Trainer) -> list[Tensor]:
    """Copies of all that a step changes."""
    moments = [value for _, of in sorted(run.optimizer.state_dict()["state"].items()) for value in of.values()]
    return [value.clone() for value in (*run.model.state_dict().values(), *moments)]


def assert_same(one: list[Tensor], other: list[Tensor]) -> None:
    assert len(one) == len(other)
    assert all(map(torch.equal, one, other))


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("objective", ["dino", "byol", "barlow_twins"])
def test_a_skipped_step_is_as_if_it_had_not_been(
    objective: str, fused: bool, poison: list[str], data: str, tmp_path: Path
) -> None:
    """Also of the teacher, of running statistics and of DINO's center."""

    def trained(steps: list[tuple[int, str]]) -> Trainer:
        run = Trainer(small_config(objective, tmp_path / "run", data=data, optim__steps=4), CPU)
        run.optimizer = build_optimizer(run.config.optim, run.model, fused=fused)
        _, batch = next(run.batches())
        for step, what in steps:
            poison[:] = [what]
            run.step(step, 0, batch.images, batch.indices)
        return run

    run = trained([(0, "loss"), (1, ""), (2, "gradient"), (3, "")])
    assert_same(state(run), state(trained([(1, ""), (3, "")])))


def test_a_skipped_step_is_told_by_its_record(poison: list[str], data: str, tmp_path: Path) -> None:
    run = Trainer(small_config("byol", tmp_path / "run", data=data), CPU)
    _, batch = next(run.batches())
    poison[:] = ["gradient"]
    bad, good = (run.step(step, 0, batch.images, batch.indices) for step in (0, 1))
    for _ in range(2):  # at every look
        with pytest.raises(NonFiniteLossError, match=r"at step 1 \(epoch 0\), on images .*last checkpoint is none"):
            bad["loss"]
    assert math.isfinite(good["loss"])
    assert dict(good) == good.read()


@pytest.mark.parametrize("objective", ["dino", "byol"])
def test_the_teacher_moves_alike_in_one_call_and_in_three(objective: str) -> None:
    model = small_config(objective, Path("unused")).build()
    assert model.teacher is not None
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    other = copy.deepcopy(model)
    rate = (1 - model.objective.momentum) * (1 + math.cos(math.pi * 0.3)) / 2
    pairs = [(model.teacher.encoder, model.encoder), (model.teacher.head, model.objective.head)]
    expected = [
        target.detach().lerp(source.detach(), rate)
        for slow, fast in pairs
        for target, source in zip(slow.parameters(), fast.parameters(), strict=True)
    ]
    before = [parameter.clone() for parameter in model.teacher.parameters()]
    model.move_teacher(0.3, torch.ones(()))
    assert_same(list(model.teacher.parameters()), before)
    model.move_teacher(0.3)
    other.move_teacher(0.3, torch.zeros(()))
    assert_same(list(model.teacher.parameters()), expected)
    assert_same(list(other.teacher.parameters()), expected)


# ---------------------------------------------------------------- float16


@pytest.fixture
def half(data: str, tmp_path: Path) -> TrainConfig:
    """Of six steps in float16, with a checkpoint every three."""
    return small_config(
        "byol", tmp_path / "run", data=data, amp="fp16", optim__steps=6, save_every=3, model__drop_path_rate=0.1
    )


def scaled(monkeypatch: pytest.MonkeyPatch, scale: float, growth_interval: int = 2000) -> None:
    monkeypatch.setattr(
        torch.amp,
        "GradScaler",
        lambda device, enabled: GradScaler(device, scale, growth_interval=growth_interval, enabled=enabled),
    )


def test_float16_trains_as_float32_does_but_for_roundings(
    half: TrainConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    scaled(monkeypatch, 2.0**8)
    train(half)
    train(with_options(half, {"amp": "off", "out": tmp_path / "exact"}))
    for line, exact in zip(read_log(half.out), read_log(tmp_path / "exact"), strict=True):
        assert line["loss"] == pytest.approx(exact["loss"], rel=0.02)
        assert line["loss"] != exact["loss"]
        assert line["grad_norm"] == pytest.approx(exact["grad_norm"], rel=0.2)  # of the gradient, not of the scaled one
        assert set(line) - set(exact) == {"loss_scale", "overflows"}


def test_an_overflow_is_skipped_counted_and_halves_the_scale(
    half: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaled(monkeypatch, 2.0**40)
    run = Trainer(half, CPU)
    _, batch = next(run.batches())
    before, records = state(run), []
    records = [run.step(step, 0, batch.images, batch.indices).read() for step in range(4)]
    assert [record["loss_scale"] for record in records] == [2.0**40, 2.0**39, 2.0**38, 2.0**37]
    assert [record["overflows"] for record in records] == [1, 2, 3, 4]
    assert_same(state(run), before)


def test_many_overflows_in_a_row_end_the_run(
    half: TrainConfig, poison: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert MOST_OVERFLOWS == 20
    monkeypatch.setattr("ser_fast.training.trainer.MOST_OVERFLOWS", 4)
    scaled(monkeypatch, 2.0**8)
    poison[:] = ["", "gradient", "gradient", "gradient", "", *["loss"] * 5]
    with pytest.raises(NonFiniteLossError, match=r"at step 9 .*and the 3 before it were no better.*step_00000006.pt"):
        train(with_options(half, {"optim.steps": 20}))
    log = read_log(half.out)
    assert [line["step"] for line in log] == [1, 2, 3, 4, 5, 6, 7, 8]
    # A loss that is infinite has no gradient that isn't: it halves the scale, too.
    assert [line["loss_scale"] for line in log] == [2.0**power for power in (8, 8, 7, 6, 5, 5, 4, 3)]
    assert [line["overflows"] for line in log] == [0, 1, 2, 3, 3, 4, 5, 6]


def test_a_run_in_float16_goes_on_exactly(half: TrainConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    scaled(monkeypatch, 2.0**18, growth_interval=2)
    train(half)
    first = RunFolder(half.out).list_checkpoints()[0]
    kept = load_checkpoint(first, CPU)
    assert kept["overflows"][0] > 0
    again = with_options(half, {"out": tmp_path / "again", "resume": str(first)})
    scaled(monkeypatch, 2.0**5)
    train(again)
    ends: list[dict[str, Any]] = [
        load_checkpoint(RunFolder(config.out).list_checkpoints()[-1], CPU) for config in (half, again)
    ]
    for part in ("scaler", "overflows"):
        assert ends[0][part] == ends[1][part]
    assert_same(list(ends[0]["model"].values()), list(ends[1]["model"].values()))
    with pytest.raises(ValueError, match="another amp"):
        Trainer(with_options(again, {"amp": "bf16", "resume": "auto"}), CPU)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"amp": "fp8"}, "amp: got 'fp8', takes one of 'auto', 'bf16', 'fp16', 'off'"),
        ({"compile": "yes"}, "compile: got 'yes', takes True or False"),
    ],
    ids=str,
)
def test_options_of_a_step_are_checked(half: TrainConfig, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Trainer(with_options(half, options), CPU)
