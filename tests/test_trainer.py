"""The MoCo-v3 objective, the training loop, and runs that are interrupted and continued."""

import copy
import json
import math
import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from cases.runs import CPU, ENVIRONMENT, patterns, read_log, tiny_config
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from ser_fast.addons import ADDONS
from ser_fast.addons.base import AddOn, AddOnConfig, LayerView
from ser_fast.addons.ser import SERConfig
from ser_fast.lattice import LatticeMap
from ser_fast.objectives import OBJECTIVES
from ser_fast.objectives.base import Objective, ObjectiveConfig
from ser_fast.objectives.moco_v3 import MoCoV3, MoCoV3Config
from ser_fast.objectives.vicreg import VICRegConfig
from ser_fast.training.config import (
    ModelConfig,
    OptimConfig,
    TrainConfig,
    ViewsConfig,
    differences,
    from_json,
    to_json,
    with_options,
)
from ser_fast.training.options import parse
from ser_fast.training.pretraining import Pretraining
from ser_fast.training.records import StepRecord
from ser_fast.training.run_folder import RunFolder, load_checkpoint
from ser_fast.training.trainer import NonFiniteLossError, Trainer, train
from ser_fast.views.recipe import View, Views
from ser_fast.views.samplers import SAMPLERS, Crop
from ser_fast.vit import SplitViT


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """24 images, 3 batches of 8."""
    return patterns(tmp_path_factory.mktemp("images"), 24)


@pytest.fixture
def tiny(tmp_path: Path, data: str) -> TrainConfig:
    return tiny_config(tmp_path / "run", data)


def losses(out: Path) -> list[dict[str, float]]:
    """The log without what a clock and the operating system say."""
    measured = ("images_per_s", "peak_memory_mib")
    return [{name: value for name, value in line.items() if name not in measured} for line in read_log(out)]


def final_state(out: Path) -> dict[str, Any]:
    return load_checkpoint(RunFolder(out).list_checkpoints()[-1], CPU)


def assert_same_bits(one: Any, other: Any) -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same_bits(one[key], other[key])
    elif isinstance(one, list):
        for a, b in zip(one, other, strict=True):
            assert_same_bits(a, b)
    elif isinstance(one, Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


def trained_state(run: Trainer) -> dict[str, Any]:
    """Copies of what a step changes; without a teacher that moves before the step."""
    model = {name: value.clone() for name, value in run.model.state_dict().items()}
    if run.model.objective.moves_teacher == "before":
        slow = {f"teacher.{name}" for name, _ in run.model.teacher.named_parameters()}
        model = {name: value for name, value in model.items() if name not in slow}
    return {"model": model, "optimizer": copy.deepcopy(run.optimizer.state_dict()["state"])}


def first_step(config: TrainConfig, times: int = 1) -> tuple[Trainer, StepRecord]:
    """A run after one step on its first batch of 8, that `times` times over, and what the step logs."""
    run = Trainer(config, CPU)
    epoch, batch = next(run.batches())
    images, indices = batch.images[:8], batch.indices[:8]
    return run, run.step(0, epoch, images.repeat(times, 1, 1, 1), indices.repeat(times))


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def norm(module: nn.Module) -> float:
    return float(torch.stack([grad.norm() for grad in gradients(module).values()]).norm())


# ---------------------------------------------------------------- the objective


@pytest.fixture
def moco() -> Pretraining:
    encoder = SplitViT("vit_tiny_patch16_224", 1, img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3)
    model = Pretraining(encoder, MoCoV3(48, dim=16, mlp_dim=32, temperature=0.3, momentum=0.9))
    with torch.no_grad():
        for p in model.teacher.encoder.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return model


def views_of(*images: list[Tensor]) -> Views:
    """One view for each list of parts, of which no sample is the add-ons'."""
    return Views([View(parts, LatticeMap.identity((32, 32), batch=0)) for parts in images], equivariant=0)


def test_loss_is_cross_entropy_with_the_other_views_momentum_embedding(moco: Pretraining) -> None:
    views = [[torch.randn(4, 3, 32, 24), torch.randn(3, 3, 32, 32)] for _ in range(2)]

    def embed(encoder: SplitViT, parts: list[Tensor]) -> Tensor:
        return torch.cat([encoder(images) for images in parts])

    logits = []
    for own, other in ((0, 1), (1, 0)):
        query = moco.objective.predictor(moco.objective.head(embed(moco.encoder, views[own])))
        key = moco.teacher.head(embed(moco.teacher.encoder, views[other]))
        logits.append((query / query.norm(dim=1, keepdim=True)) @ (key / key.norm(dim=1, keepdim=True)).T / 0.3)
    expected = sum(2 * 0.3 * F.cross_entropy(logit, torch.arange(7)) for logit in logits)
    out = moco(views_of(*views), 0.0)
    torch.testing.assert_close(out["loss"], expected)
    torch.testing.assert_close(out["invariance"], expected)


def test_projector_and_predictor_are_moco_v3s(moco: Pretraining) -> None:
    def layers(mlp: nn.Sequential) -> list[str]:
        return [
            f"{layer.in_features}-{layer.out_features}"
            if isinstance(layer, nn.Linear)
            else type(layer).__name__ + "*" * bool(getattr(layer, "affine", False))
            for layer in mlp
        ]

    hidden = ["SyncBatchNorm1d*", "ReLU"]
    assert layers(moco.objective.head) == ["48-32", *hidden, "32-32", *hidden, "32-16", "SyncBatchNorm1d"]
    assert layers(moco.objective.predictor) == ["16-32", *hidden, "32-16", "SyncBatchNorm1d"]
    assert not any("bias" in name for name, _ in moco.objective.head.named_parameters() if name.startswith("0"))


@pytest.mark.parametrize("progress", [0.0, 0.3, 1.0])
def test_momentum_rises_to_1_along_a_cosine(moco: Pretraining, progress: float) -> None:
    momentum = 1 - (1 - 0.9) * (math.cos(math.pi * progress) + 1) / 2
    pairs = [(moco.teacher.encoder, moco.encoder), (moco.teacher.head, moco.objective.head)]
    nn.init.normal_(moco.objective.head[0].weight)
    expected = [
        [momentum * slow + (1 - momentum) * fast for slow, fast in zip(a.parameters(), b.parameters(), strict=True)]
        for a, b in pairs
    ]
    moco.move_teacher(progress)
    for (slow, _), values in zip(pairs, expected, strict=True):
        torch.testing.assert_close(list(slow.parameters()), values)


def test_gradients_reach_all_but_the_frozen(moco: Pretraining) -> None:
    moco(views_of([torch.randn(4, 3, 32, 32)], [torch.randn(4, 3, 32, 32)]), 0.0)["loss"].backward()
    without = {name for name, p in moco.named_parameters() if p.grad is None}
    assert without == {name for name, p in moco.named_parameters() if not p.requires_grad}
    slow = {name for name, _ in moco.named_parameters() if name.startswith("teacher.")}
    frozen = {"encoder.pos_embed", "encoder.patch_embed.proj.weight", "encoder.patch_embed.proj.bias"}
    assert without == slow | frozen
    assert float(moco.encoder.cls_token.grad.abs().max()) > 0


def test_positions_are_fixed_sin_cos(moco: Pretraining) -> None:
    positions = moco.encoder.pos_embed[0]  # (1 + 16, 48)
    assert not positions[0].any()  # [CLS]
    # 24 pairs of a sine and a cosine; test_vit has their values.
    torch.testing.assert_close(positions[1:].square().sum(1), torch.full((16,), 24.0))
    assert len(positions[1:].unique(dim=0)) == 16


def test_cls_enters_after_the_split(moco: Pretraining) -> None:
    lengths: list[int] = []
    for block in moco.encoder.blocks:
        block.register_forward_hook(lambda _, inputs, __: lengths.append(inputs[0].shape[1]))
    moco(views_of([torch.randn(2, 3, 32, 32)], [torch.randn(2, 3, 32, 32)]), 0.0)
    assert lengths == [16, 17, 17] * 2


def test_no_path_is_dropped_in_the_teacher() -> None:
    encoder = SplitViT("vit_tiny_patch16_224", 1, embed_dim=48, depth=3, num_heads=3, drop_path_rate=0.2)
    model = Pretraining(encoder, MoCoV3(48, dim=16, mlp_dim=32))
    assert model.encoder.blocks[-1].drop_path1.drop_prob == pytest.approx(0.2)
    assert model.teacher.encoder.blocks[-1].drop_path1.drop_prob == 0


# ---------------------------------------------------------------- one step


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_gives_both_losses(tiny: TrainConfig, sampler: str) -> None:
    run, record = first_step(with_options(tiny, {"views.sampler": sampler}))
    assert record["loss"] == pytest.approx(record["invariance"] + record["ser"], rel=1e-6)
    assert record["invariance"] > 0.1
    assert record["ser"] > 0.1
    assert norm(run.model.addons["ser"]) > 0


def test_a_model_with_rotary_positions_trains(tiny: TrainConfig) -> None:
    run, record = first_step(with_options(tiny, {"model.name": "vit_small_patch16_dinov3", "model.num_heads": 2}))
    assert math.isfinite(record["loss"])
    assert len(gradients(run.model.encoder.blocks[0])) == len(list(run.model.encoder.blocks[0].parameters()))


def test_lambda_weights_the_ser_loss(tiny: TrainConfig) -> None:
    _, record = first_step(with_options(tiny, {"ser.weight": 0.3}))
    assert record["loss"] == pytest.approx(record["invariance"] + 0.3 * record["ser"], rel=1e-6)


def test_options_of_the_config_reach_their_modules(tiny: TrainConfig) -> None:
    options = {
        "ser.preset": "released",
        "ser.max_tokens": 9,
        "ser.interpolation": "lanczos3",
        "ser.padding": "zeros",
        "moco.temperature": 0.5,
        "moco.momentum": 0.8,
        "views.crop_area": (0.4, 0.5),
        "views.color_strength": 0.5,
        "views.color_solarize": (0.3, 0.4),
        "optim.weight_decay": 0.2,
        "views.sampler": "crop",
        "model.drop_path_rate": 0.2,
        "seed": 7,
    }
    run = Trainer(with_options(tiny, options), CPU)
    ser, moco, make = run.model.addons["ser"].losses["1"], run.model.objective, run.make_views
    assert (ser.temperature, ser.both_directions, ser.max_tokens) == (0.5, True, 9)
    assert (ser.interpolation, ser.padding, ser.gather) == ("lanczos3", "zeros", True)
    assert (moco.temperature, moco.momentum) == (0.5, 0.8)
    assert make.sampler == Crop((0.4, 0.5), turns=True)
    assert make.crop == Crop((0.4, 0.5))
    assert run.model.encoder.blocks[-1].drop_path1.drop_prob == pytest.approx(0.2)
    assert (make.crop.area, make.colors[0].strength, make.colors[1].solarize) == ((0.4, 0.5), 0.5, 0.4)
    assert (make.seed, make.share, make.patch_size) == (7, 0.5, 8)
    assert run.optimizer.param_groups[0]["weight_decay"] == 0.2


def test_a_share_of_0_builds_no_ser_module(tiny: TrainConfig) -> None:
    run, record = first_step(with_options(tiny, {"views.share": 0.0}))
    assert not run.model.addons
    assert "ser" not in record
    assert record["loss"] == record["invariance"]
    assert not any(name.startswith("addons.") for name in run.model.state_dict())


def test_lambda_0_leaves_the_model_as_it_would_be_without_ser(tiny: TrainConfig) -> None:
    def trained(name: str, options: dict[str, Any]) -> dict[str, Tensor]:
        out = train(with_options(replace(tiny, out=tiny.out / name), {"optim.steps": 3} | options))
        return final_state(out)["model"]

    def of(state: dict[str, Tensor], part: str) -> dict[str, Tensor]:
        return {name: value for name, value in state.items() if name.startswith(part)}

    zero = trained("0", {"ser.weight": 0.0})
    wider = trained("wider", {"ser.weight": 0.0, "ser.hidden_dim": 64, "ser.out_dim": 24})
    one = trained("1", {"ser.weight": 1.0})
    for part in ("encoder.", "objective.", "teacher."):
        assert_same_bits(of(zero, part), of(wider, part))
    assert len(of(zero, "addons.")) == 4
    for name, value in of(one, "encoder.blocks.0.").items():
        assert not torch.equal(value, zero[name]), name
    # Its projector learns all the same.
    assert read_log(tiny.out / "0")[0]["ser"] == read_log(tiny.out / "1")[0]["ser"]
    untrained = Trainer(with_options(tiny, {"ser.weight": 0.0}), CPU).model.state_dict()
    assert not torch.equal(
        zero["addons.ser.losses.1.projector.0.weight"], untrained["addons.ser.losses.1.projector.0.weight"]
    )


def test_steps_lower_both_losses(tiny: TrainConfig) -> None:
    run = Trainer(with_options(tiny, {"optim.steps": 20, "optim.lr": 0.1, "optim.warmup": 0.0}), CPU)
    _, batch = next(run.batches())
    records = [run.step(step, 0, batch.images, batch.indices) for step in range(20)]
    for part in ("invariance", "ser"):
        assert records[-1][part] < 0.85 * records[0][part]


def test_momentum_keys_are_the_targets(tiny: TrainConfig) -> None:
    """Before the first step both encoders are the same: so is the loss, but not the gradient."""
    own, record = first_step(with_options(tiny, {"ser.negatives": "other", "optim.clip_grad": 0.0}))
    run, record_with_keys = first_step(with_options(tiny, {"ser.momentum_keys": True, "optim.clip_grad": 0.0}))
    assert record_with_keys["ser"] == pytest.approx(record["ser"], rel=1e-5)
    assert record_with_keys["invariance"] == record["invariance"]
    assert not gradients(run.model.teacher)
    for name, grad in gradients(run.model.addons["ser"]).items():
        assert not torch.allclose(grad, gradients(own.model.addons["ser"])[name], rtol=1e-2), name


def test_checkpointed_blocks_give_the_same_gradient(tiny: TrainConfig) -> None:
    plain, record = first_step(tiny)
    checkpointed, same_record = first_step(with_options(tiny, {"model.grad_checkpointing": True}))
    assert checkpointed.model.encoder._timm.grad_checkpointing
    assert same_record == pytest.approx(record, rel=1e-6)
    torch.testing.assert_close(gradients(checkpointed.model), gradients(plain.model))


def test_bf16_rounds_the_activations_and_no_parameter(tiny: TrainConfig) -> None:
    _, exact = first_step(with_options(tiny, {"amp": "off"}))
    run, rounded = first_step(with_options(tiny, {"amp": "bf16"}))
    for part in ("invariance", "ser"):
        assert rounded[part] == pytest.approx(exact[part], rel=0.05)
        assert rounded[part] != exact[part]
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}
    assert not Trainer(tiny, CPU).amp  # "auto" is for GPUs


@pytest.mark.parametrize("clip", [0.01, 0.0])
def test_gradients_are_clipped_for_model_and_projector_each(tiny: TrainConfig, clip: float) -> None:
    run, record = first_step(with_options(tiny, {"optim.clip_grad": clip}))
    assert record["grad_norm"] > 0.1
    assert norm(nn.ModuleList([run.model.encoder, run.model.objective])) == pytest.approx(
        clip or record["grad_norm"], rel=1e-4
    )
    if clip:
        assert norm(run.model.addons["ser"]) == pytest.approx(clip, rel=1e-4)


def test_accumulated_parts_are_averaged(tiny: TrainConfig) -> None:
    whole, record = first_step(with_options(tiny, {"optim.clip_grad": 0.0}))
    options = {"optim.batch_size": 16, "optim.accumulate": 2, "optim.accumulate_mode": "plain"}
    twice = with_options(tiny, {"optim.clip_grad": 0.0, **options})
    run, record_twice = first_step(twice, times=2)
    for name in ("loss", "invariance", "ser", "grad_norm"):
        assert record_twice[name] == pytest.approx(record[name], rel=1e-6)
    torch.testing.assert_close(gradients(run.model), gradients(whole.model), rtol=1e-6, atol=1e-8)
    assert run.part == 8


@pytest.mark.parametrize("poisoned", ["loss", "gradient"])
def test_what_is_not_finite_stops_the_run(tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch, poisoned: str) -> None:
    forward, step = Pretraining.forward, Trainer.step
    seen: dict[str, Any] = {"steps": 0}

    def poison(self: Pretraining, views: Views, progress: float) -> dict[str, Tensor]:
        record = forward(self, views, progress)
        if seen["steps"] == 3:
            zero = 0 * self.encoder.cls_token.sum()
            # The root of 0 is finite, its derivative isn't.
            record["loss"] = record["loss"] + (zero / 0 if poisoned == "loss" else zero.sqrt())
        return record

    def watched(self: Trainer, number: int, epoch: int, images: Tensor, indices: Tensor, aspects: Tensor) -> StepRecord:
        seen["steps"] += 1
        before = trained_state(self)
        record = step(self, number, epoch, images, indices, aspects)
        if seen["steps"] == 3:
            seen.update(before=before, after=trained_state(self), indices=indices.tolist())
        return record

    monkeypatch.setattr(Pretraining, "forward", poison)
    monkeypatch.setattr(Trainer, "step", watched)
    with pytest.raises(NonFiniteLossError) as error:
        train(with_options(tiny, {"optim.steps": 6, "save_every": 2}))
    message = str(error.value)
    assert "step 3 (epoch 0)" in message
    assert f"indices {seen['indices']}" in message
    assert str(tiny.out / "checkpoints/step_00000002.pt") in message
    assert "nan" in message
    assert seen["steps"] == 4  # it is reported while the next step runs
    assert_same_bits(seen["after"], seen["before"])
    assert [line["step"] for line in read_log(tiny.out)] == [1, 2]
    assert [path.name for path in RunFolder(tiny.out).list_checkpoints()] == ["step_00000002.pt"]


@pytest.mark.parametrize(
    ("clip_grad", "way_out"),
    [
        (3.0, "lower optim.lr or optim.clip_grad and give --resume auto"),
        (0.0, "lower optim.lr, or set optim.clip_grad (0 never clips), and give --resume auto"),
    ],
)
def test_the_way_out_of_a_failed_step_is_one(
    tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch, clip_grad: float, way_out: str
) -> None:
    forward = Pretraining.forward

    def poison(self: Pretraining, views: Views, progress: float) -> dict[str, Tensor]:
        record = forward(self, views, progress)
        return record | {"loss": record["loss"] / 0}

    config = with_options(tiny, {"optim.steps": 2, "optim.clip_grad": clip_grad})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pretraining, "forward", poison)
        with pytest.raises(NonFiniteLossError) as error:
            train(config)
    assert str(error.value).endswith(f"the last checkpoint is none; to go on, {way_out}")
    train(with_options(config, {"optim.lr": config.optim.lr / 2, "resume": "auto"}))


def test_a_log_that_lost_its_first_steps_is_named(tiny: TrainConfig) -> None:
    options = with_options(tiny, {"optim.steps": 3, "save_every": 1, "keep_checkpoints": 9})
    train(options)
    first = RunFolder(tiny.out)
    elsewhere = with_options(
        options, {"out": tiny.out.with_name("elsewhere"), "resume": str(first.list_checkpoints()[0]), "save_every": 1}
    )
    train(elsewhere)  # whose log begins with step 2, as it should

    def note(config: TrainConfig) -> str:
        run = Trainer(replace(config, resume="auto"), torch.device("cpu"))
        with ExitStack() as stack:
            run._occupy(stack)
            assert run.log is not None
            return run.log.note

    assert [line["step"] for line in read_log(elsewhere.out)] == [2, 3]
    assert note(elsewhere) == note(options) == ""
    whole = first.log.read_text()
    first.log.write_text("".join(whole.splitlines(True)[2:]))
    assert note(options) == f"log: steps 1 to 2 are missing from {first.log}; the run itself is whole"
    first.log.unlink()
    assert note(options) == f"log: steps 1 to 3 are missing from {first.log}; the run itself is whole"
    RunFolder(elsewhere.out).log.write_text("")
    assert " 2 to 3 are missing" in note(elsewhere)


# ---------------------------------------------------------------- a whole run


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, data: str) -> TrainConfig:
    """The config of a run of 20 steps that nothing interrupted."""
    config = tiny_config(tmp_path_factory.mktemp("straight") / "run", data)
    config = with_options(
        config, {"optim.steps": 20, "save_every": 10, "model.drop_path_rate": 0.1, "ser.max_tokens": 50}
    )
    assert train(config) == config.out
    return config


def test_the_log_has_a_line_for_each_step(straight: TrainConfig) -> None:
    log = read_log(straight.out)
    assert [line["step"] for line in log] == list(range(1, 21))
    assert [line["epoch"] for line in log] == [step // 3 for step in range(20)]
    keys = ("loss", "invariance", "ser", "lr", "grad_norm", "images_per_s", "peak_memory_mib")
    assert all(line.keys() == {"step", "epoch", *keys} for line in log)
    assert all(math.isfinite(value) and value > 0 for line in log for value in (line[key] for key in keys))
    assert 50 < log[-1]["peak_memory_mib"] < 50_000


def test_the_learning_rate_rises_linearly_and_falls_along_a_cosine(straight: TrainConfig) -> None:
    peak, warmup, steps = 0.02 * 8 / 256, 5, 20
    expected = [
        peak * step / warmup
        if step <= warmup
        else peak * (1 + math.cos(math.pi * (step - warmup) / (steps + 1 - warmup))) / 2
        for step in range(1, steps + 1)
    ]
    rates = [line["lr"] for line in read_log(straight.out)]
    assert rates == pytest.approx(expected)
    assert max(rates) == pytest.approx(peak)
    assert rates[-1] < 0.02 * peak


def test_tensorboard_has_what_the_log_has(straight: TrainConfig) -> None:
    events = EventAccumulator(str(straight.out / "tensorboard")).Reload()
    log = read_log(straight.out)
    assert set(events.Tags()["scalars"]) == set(log[0]) - {"step", "epoch"}
    for name in events.Tags()["scalars"]:
        scalars = events.Scalars(name)
        assert [scalar.step for scalar in scalars] == list(range(1, 21))
        assert [scalar.value for scalar in scalars] == pytest.approx([line[name] for line in log], rel=1e-5)


def test_the_folder_says_how_the_run_was_made(straight: TrainConfig) -> None:
    assert from_json(json.loads((straight.out / "config.json").read_text())) == straight
    environment = json.loads((straight.out / "environment.json").read_text())
    assert torch.__version__.startswith(environment["packages"]["torch"])
    assert {"torch", "torchvision", "timm", "numpy"} <= environment["packages"].keys()
    assert environment["git"] is None or len(environment["git"]) >= 7
    assert (environment["world_size"], environment["threads"]) == (1, 1)
    assert environment["command"] == sys.argv


def test_the_encoder_is_written_and_frozen_parts_stayed(straight: TrainConfig) -> None:
    encoder = load_file(RunFolder(straight.out).encoder)
    model = final_state(straight.out)["model"]
    initial = Trainer(replace(straight, out=straight.out / "new"), CPU).model.state_dict()
    for name, value in encoder.items():
        name = f"encoder.{name}"
        assert torch.equal(value, model[name])
        frozen = "pos_embed" in name or "patch_embed" in name
        assert torch.equal(value, initial[name]) == frozen, name
    slow = "teacher.encoder.blocks.0.attn.qkv.weight"
    assert not torch.equal(model[slow], initial[slow])


def test_a_finished_run_is_not_repeated(
    straight: TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = losses(straight.out)
    monkeypatch.setattr(Trainer, "step", None)
    assert train(replace(straight, resume="auto")) == straight.out
    assert losses(straight.out) == before
    assert "nothing to train: the checkpoint is at step" in capsys.readouterr().out


def test_epochs_count_where_steps_are_not_given(tiny: TrainConfig) -> None:
    out = train(with_options(tiny, {"optim.steps": None, "optim.epochs": 2, "views.share": 0.0}))
    assert [line["epoch"] for line in read_log(out)] == [0, 0, 0, 1, 1, 1]


def test_runs_differ_by_their_seed_alone(tiny: TrainConfig) -> None:
    same = [first_step(replace(tiny, out=tiny.out / name))[1] for name in "ab"]
    assert same[0] == same[1]
    assert first_step(replace(tiny, seed=1))[1] != same[0]


def test_unreadable_files_are_named(tiny: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for number, path in enumerate(sorted(Path(tiny.data.removeprefix("folder:")).iterdir())):
        (broken / path.name).write_bytes(b"" if number in (3, 4) else path.read_bytes())
    out = train(with_options(tiny, {"data": f"folder:{broken}", "optim.steps": 3, "views.share": 0.0}))
    shown = "".join(capsys.readouterr().out.split())  # the console wraps lines
    assert shown.count("skippedunreadablefile") == 2
    assert all(f"{number:02}.png" in shown for number in (3, 4))
    assert "(2inall)" in shown
    assert len(read_log(out)) == 3


def test_a_run_that_failed_in_its_first_step_is_started_again(
    tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any) -> None:
        raise RuntimeError("the first step")

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", failing)
        with pytest.raises(RuntimeError, match="the first step"):
            train(tiny)
    train(tiny)
    assert len(read_log(tiny.out)) == 2


# ---------------------------------------------------------------- interrupted and continued


KILLED = """
import json, os, signal, sys
from ser_fast.training.config import from_json
from ser_fast.training.trainer import Trainer, train

step = Trainer.step

def killed(self, number, *batch):
    if number == 13:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, number, *batch)

Trainer.step = killed
train(from_json(json.loads(sys.argv[1])))
"""


def assert_same_run(out: Path, straight: TrainConfig) -> None:
    one, other = final_state(out), final_state(straight.out)
    for part in ("step", "model", "optimizer"):
        assert_same_bits(one[part], other[part])
    assert losses(out) == losses(straight.out)
    assert_same_bits(load_file(RunFolder(out).encoder), load_file(RunFolder(straight.out).encoder))


@pytest.mark.slow
def test_a_killed_run_continues_bit_for_bit(straight: TrainConfig, tmp_path: Path) -> None:
    config = replace(straight, out=tmp_path / "run")
    child = subprocess.run(
        [sys.executable, "-c", KILLED, json.dumps(to_json(config))], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert [path.name for path in RunFolder(config.out).list_checkpoints()] == ["step_00000010.pt"]
    assert [line["step"] for line in read_log(config.out)] == list(range(1, 13))  # the last one was not looked at yet
    with (config.out / "log.jsonl").open("a") as log:
        log.write('{"step": 14, "epo')  # as if it had died while it wrote
    train(replace(config, resume="auto"))
    assert_same_run(config.out, straight)
    events = EventAccumulator(str(config.out / "tensorboard")).Reload().Scalars("loss")
    assert [event.step for event in events] == list(range(1, 21))


def test_a_stopped_run_continues_bit_for_bit(
    straight: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer.step
    signals = {4: signal.SIGTERM, 12: signal.SIGINT}

    def interrupted(self: Trainer, number: int, *batch: Any) -> StepRecord:
        if number in signals:
            os.kill(os.getpid(), signals[number])
        return step(self, number, *batch)

    monkeypatch.setattr(Trainer, "step", interrupted)
    config = replace(straight, out=tmp_path / "run", resume="auto")
    handlers = [signal.getsignal(number) for number in signals.values()]
    for last, number in signals.items():
        with pytest.raises(SystemExit) as stopped:
            train(config)
        assert stopped.value.code == 128 + number
        assert final_state(config.out)["step"] == last + 1
        assert [line["step"] for line in read_log(config.out)] == list(range(1, last + 2))
    train(config)
    assert_same_run(config.out, straight)
    assert [signal.getsignal(number) for number in signals.values()] == handlers


def test_a_run_continues_from_a_checkpoint_by_path(straight: TrainConfig, tmp_path: Path) -> None:
    first = RunFolder(straight.out).list_checkpoints()[0]
    out = train(replace(straight, out=tmp_path / "run", resume=str(first)))
    assert [line["step"] for line in read_log(out)] == list(range(11, 21))
    assert_same_bits(final_state(out)["model"], final_state(straight.out)["model"])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"optim.lr": 1e-3}, "another optim.lr; --resume-changed goes on all the same$"),
        ({"ser.weight": 0.5, "seed": 3}, "another seed, ser.weight$"),
        ({"views.crop_area": (0.3, 1.0)}, "another views.crop_area$"),
    ],
    ids=str,
)
def test_a_run_does_not_continue_with_other_options(straight: TrainConfig, options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        train(with_options(replace(straight, resume="auto"), options))


def test_a_run_is_not_overwritten(straight: TrainConfig) -> None:
    with pytest.raises(ValueError, match=f"out: {straight.out} already holds a run"):
        train(straight)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is no file"),
        (b"", "can't be read as a checkpoint"),
        (b"\x80\x02 nonsense", "can't be read as a checkpoint"),
        ([1, 2], "is no checkpoint of this trainer"),
        ({"step": 1, "model": {}}, "is no checkpoint of this trainer"),
        ({"step": 1, "model": Path("code"), "config": {}, "optimizer": {}}, "can't be read as a checkpoint"),
    ],
    ids=str,
)
def test_a_checkpoint_that_is_none_is_refused(tiny: TrainConfig, tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "other.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(ValueError, match=f"resume: {path} {message}"):
        train(replace(tiny, resume=str(path)))
    assert not tiny.out.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optim.batch_size": 7, "optim.accumulate": 2}, "optim.batch_size: 7 is no multiple of 1 ranks x optim.acc"),
        ({"optim.batch_size": 25}, "batch_size: got 25, takes the 24 images of the dataset at most"),
        ({"optim.accumulate": 0}, "optim.accumulate: got 0"),
        ({"optim.steps": 0}, "optim.steps, optim.epochs: give at least one step"),
        ({"optim.warmup": 1.5}, "optim.warmup: got 1.5"),
        ({"views.share": 0.01}, "views.share: 0.01 of 8 images is 0; SER contrasts two or more"),
        ({"views.share": 0.125}, "views.share: 0.125 of 8 images is 1; SER contrasts two or more"),
        ({"device": "gpu"}, "device: got 'gpu', takes 'auto', 'cpu' or 'cuda'"),
        ({"views.share": 1.5}, "share: got 1.5"),
        ({"views.color_gray": 2.0}, "views.color_gray: got 2"),
        ({"save_every": 0}, "save_every: got 0"),
        ({"keep_checkpoints": 0}, "keep_checkpoints: got 0"),
        ({"data": "photographs"}, "data: got 'photographs', takes 'photos'"),
        ({"model.name": "resnet18"}, "model: 'resnet18' is not supported"),
        ({"model.split": 4}, "split: .* can be split at 0 to 3 blocks, got 4"),
        ({"ser.temperature": 0.0}, "ser.temperature: got 0"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_named(tiny: TrainConfig, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(with_options(tiny, options))
    assert not tiny.out.exists()


# ---------------------------------------------------------------- checkpoints and configs


def state(step: int) -> dict[str, Any]:
    return {"step": step, "config": {}, "model": {"weight": torch.full((3,), step)}, "optimizer": {}}


@pytest.mark.parametrize("step", [1, 2], ids=["the same file", "a new one"])
def test_a_write_that_fails_leaves_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    path = RunFolder(tmp_path).save_checkpoint(state(1), keep=1)

    def full_disk(state: Any, path: Path) -> None:
        path.write_bytes(b"half of it")
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", full_disk)
        with pytest.raises(OSError, match="no space"):
            RunFolder(tmp_path).save_checkpoint(state(step), keep=1)
    assert RunFolder(tmp_path).list_checkpoints() == [path]
    assert torch.equal(load_checkpoint(path, CPU)["model"]["weight"], torch.full((3,), 1))
    # The next attempt replaces what the failed one left.
    assert [RunFolder(tmp_path).save_checkpoint(state(step), keep=1)] == list((tmp_path / "checkpoints").iterdir())


def test_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in (9, 10, 99, 100):
        RunFolder(tmp_path).save_checkpoint(state(step), keep=3)
    assert [load_checkpoint(path, CPU)["step"] for path in RunFolder(tmp_path).list_checkpoints()] == [10, 99, 100]


def test_a_failed_save_ends_the_run_at_the_checkpoint_before(
    tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = with_options(tiny, {"optim.steps": 3, "save_every": 1, "keep_checkpoints": 1, "views.share": 0.0})
    save, saved = torch.save, []

    def fails_at_2(state: Any, path: Path) -> None:
        saved.append(state["step"])
        if state["step"] == 2:
            raise OSError("no space left on device")
        save(state, path)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", fails_at_2)
        with pytest.raises(OSError, match="no space"):
            train(config)
    assert saved == [1, 2]
    train(replace(config, resume="auto"))
    assert [line["step"] for line in read_log(tiny.out)] == [1, 2, 3]


OTHER = TrainConfig(
    out=Path("somewhere/else"),
    model=ModelConfig("deit3_small_patch16_224", split=2, image_size=64, patch_size=4, drop_path_rate=0.1),
    views=ViewsConfig(sampler="crop", share=0.3, crop_area=(0.1, 0.9)),
    addons={"ser": SERConfig(layers=(1, 2), preset="released", temperature=0.2, both_directions=False, max_tokens=10)},
    optim=OptimConfig(steps=5, clip_grad=1.0),
    amp="bf16",
)


@pytest.mark.parametrize("config", [TrainConfig(), OTHER], ids=["defaults", "others"])
def test_a_config_survives_json(config: TrainConfig) -> None:
    assert from_json(json.loads(json.dumps(to_json(config)))) == config


def test_all_that_changes_numbers_is_a_difference() -> None:
    base, other = to_json(TrainConfig()), to_json(OTHER)
    assert differences(base, base) == []
    named = set(differences(to_json(OTHER), base))
    assert named >= {"model.name", "model.patch_size", "views.sampler", "views.crop_area", "ser.both_directions", "amp"}
    assert "out" not in named
    del other["ser"]["max_tokens"]  # a checkpoint from before there was such an option
    del other["moco"]
    assert set(differences(to_json(OTHER), other)) >= {"ser.max_tokens", "moco.temperature", "moco.dim"}


# ---------------------------------------------------------------- two processes


RANKS = """
import os, signal, sys, time
import torch
from ser_fast.cli import main
from ser_fast.training.run_folder import RunFolder
from ser_fast.views.recipe import MakeViews

rank, folder, told_to_stop = os.environ["RANK"], sys.argv.pop(1), sys.argv.pop(1)
torch.set_num_threads(1)
make, look, made = MakeViews.__call__, RunFolder.list_checkpoints, []

def recorded(self, images, samples, epoch, aspects):
    views = make(self, images, samples, epoch, aspects)
    view = views.views[0]
    made.append({"samples": samples, "g": view.g.linear, "size": view.g.size_out, "image": view.images[0][0]})
    torch.save(made, f"{folder}/{rank}.pt")
    if told_to_stop == rank and len(made) == 2:
        os.kill(os.getpid(), signal.SIGTERM)
    return views

def late(out):  # when rank 0 has made the run's folder
    time.sleep(float(rank))
    return look(out)

MakeViews.__call__ = recorded
RunFolder.list_checkpoints = late
main()
"""


def torchrun(folder: Path, config: TrainConfig, told_to_stop: str) -> subprocess.CompletedProcess[str]:
    script = folder / "ranks.py"
    script.write_text(RANKS)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    options = [
        f"--{part}.{name.replace('_', '-')}={value}"
        for part, section in to_json(config).items()
        if isinstance(section, dict)
        for name, value in section.items()
        if value is not None and not isinstance(value, bool | list)
    ]
    options += [f"--out={config.out}", f"--data={config.data}", "--device=cpu", "--workers=0"]
    return subprocess.run(
        [*launch, str(folder), told_to_stop, "train", *options], env=ENVIRONMENT, capture_output=True, text=True
    )


@pytest.mark.slow
@pytest.mark.parametrize(("told_to_stop", "steps"), [("none", 2), ("1", 5)])
def test_two_processes_train_one_model(tiny: TrainConfig, tmp_path: Path, told_to_stop: str, steps: int) -> None:
    config = with_options(tiny, {"optim.steps": steps})
    done = torchrun(tmp_path, config, told_to_stop)
    assert (done.returncode == 0) == (told_to_stop == "none"), done.stderr
    # Whichever rank is told to stop, both leave after the same step, and there is a checkpoint of it.
    assert [line["step"] for line in read_log(config.out)] == [1, 2]
    assert final_state(config.out)["step"] == 2
    assert json.loads((config.out / "environment.json").read_text())["world_size"] == 2
    assert not any(name.startswith("module.") for name in final_state(config.out)["model"])

    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    assert [len(made) for made in ranks] == [2, 2]
    for zero, one in zip(*ranks, strict=True):
        assert len(zero["samples"]) == len(one["samples"]) == 4
        assert not set(zero["samples"].tolist()) & set(one["samples"].tolist())
        assert zero["size"] != one["size"] or not torch.equal(zero["g"], one["g"])
    alone = Trainer(replace(config, out=tmp_path / "alone"), CPU)
    together = [batch for _, (_, batch) in zip(range(2), alone.batches(), strict=False)]
    for number, batch in enumerate(together):
        assert torch.equal(torch.cat([made[number]["samples"] for made in ranks]), batch.indices)


# ---------------------------------------------------------------- a method is one class


class MeanSquares(Objective):
    """Pulls the two views' embeddings together."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.head = nn.Linear(dim, 4)

    def forward(self, student: list[Tensor], teacher: list[Tensor], progress: float) -> dict[str, Tensor]:
        assert not teacher
        return {"loss": F.mse_loss(*student), "progress": torch.tensor(progress)}


@dataclass(frozen=True)
class MeanSquaresConfig(ObjectiveConfig):
    section: ClassVar[str] = "squares"
    recipe: ClassVar[dict[str, Any]] = {"optim.lr": 0.01, "ser.weight": 0.5}
    scale: float = 1.0

    def build(self, dim: int) -> Objective:
        return MeanSquares(dim)


class Turned(AddOn):
    """Classifies whether a view is mirrored."""

    reads = "mean"

    def __init__(self, dim: int, layers: tuple[int, ...]) -> None:
        super().__init__()
        self.layers = layers
        self.classifiers = nn.ModuleDict({str(layer): nn.Linear(dim, 2) for layer in layers})

    def forward(self, views: list[LayerView]) -> dict[str, Tensor]:
        losses = [
            F.cross_entropy(self.classifiers[str(layer)](feature), (torch.linalg.det(view.g.linear) < 0).long())
            for view in views
            for layer, feature in view.features.items()
        ]
        return {"loss": torch.stack(losses).mean(), "views": torch.tensor(float(len(views)))}


@dataclass(frozen=True)
class TurnedConfig(AddOnConfig):
    def build(self, dim: int, layers: tuple[int, ...], objective: str) -> AddOn:
        return Turned(dim, layers)


@pytest.fixture
def one_more_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OBJECTIVES, "mean_squares", MeanSquaresConfig)
    monkeypatch.setitem(ADDONS, "turned", TurnedConfig)


def arguments_of(config: TrainConfig) -> list[str]:
    model = ["--model.split", "1", "--model.image-size", "32", "--model.patch-size", "8", "--model.embed-dim", "48"]
    model += ["--model.depth", "3", "--model.num-heads", "3", "--model.name", config.model.name]
    views = ["--views.share", "0.5", "--ser.hidden-dim", "32", "--ser.out-dim", "16"]
    rest = ["--optim.batch-size", "8", "--optim.steps", "3", "--device", "cpu", "--workers", "0"]
    return ["--out", str(config.out), "--data", config.data, *model, *views, *rest]


@pytest.mark.usefixtures("one_more_of_each")
def test_a_new_method_is_one_class_and_one_line(tiny: TrainConfig) -> None:
    new = ["--objective", "mean_squares", "--squares.scale", "2", "--turned.layers", "2", "3"]
    config = parse([*arguments_of(tiny), *new, "--turned.weight", "0.1"])
    assert (config.optim.lr, config.addons["ser"].weight) == (0.01, 0.5)  # its recipe
    assert config.objective == MeanSquaresConfig(scale=2.0)
    train(config)
    log = read_log(tiny.out)
    assert [line["progress"] for line in log] == pytest.approx([0, 1 / 3, 2 / 3])
    assert log[0]["turned_views"] == 2
    for line in log:
        assert line["loss"] == pytest.approx(line["invariance"] + 0.5 * line["ser"] + 0.1 * line["turned"], rel=1e-5)
    assert RunFolder(tiny.out).read_config() == config
    content = json.loads((tiny.out / "config.json").read_text())
    assert (content["objective"], content["squares"], content["turned"]["layers"]) == (
        "mean_squares",
        {"scale": 2.0},
        [2, 3],
    )


@pytest.mark.usefixtures("one_more_of_each")
def test_help_shows_the_chosen_objectives_options(capsys: pytest.CaptureFixture[str]) -> None:
    def help_of(*arguments: str) -> str:
        with pytest.raises(SystemExit):
            parse([*arguments, "--help"])
        return capsys.readouterr().out

    assert "--moco.dim" in help_of()
    assert "--squares.scale" not in help_of()
    shown = help_of("--objective", "mean_squares")
    assert "--squares.scale" in shown
    assert "--moco.dim" not in shown


@pytest.mark.parametrize("layers", [(1, 3), "all", "last"])
def test_ser_acts_on_any_layers(tiny: TrainConfig, layers: Any) -> None:
    run, record = first_step(with_options(tiny, {"ser.layers": layers}))
    named = {(1, 3): [1, 3], "all": [1, 2, 3], "last": [3]}[layers]
    assert list(run.model.addons["ser"].layers) == named
    assert record["ser"] > 0.1
    for loss in run.model.addons["ser"].losses.values():
        assert norm(loss) > 0


def test_an_addons_gradient_ends_at_its_layer(tiny: TrainConfig) -> None:
    run = Trainer(with_options(tiny, {"ser.layers": (2,), "ser.weight": 1.0}), CPU)
    _, batch = next(run.batches())
    losses = run.model(run.make_views(batch.images, batch.indices, 0), 0.0)
    losses["ser"].backward()
    reached = [bool(gradients(block)) for block in run.model.encoder.blocks]
    assert reached == [True, True, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ser.layers": (4,)}, "ser.layers: got 4, takes 0 to 3"),
        ({"objective": None}, "options: got 'objective'"),
        ({"ser.wight": 1}, "options: got 'ser.wight'"),
        ({"moca.dim": 1}, "options: got 'moca.dim'"),
    ],
    ids=str,
)
def test_options_that_are_none_are_named(tiny: TrainConfig, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Trainer(with_options(tiny, options), CPU)


def test_a_config_of_version_0_1_is_read() -> None:
    content = to_json(TrainConfig())
    del content["objective"], content["ser"]["layers"]
    content["views"] = {"share": 0.5, "colour_strength": 0.5, "colour_group": 8, "crop_area": [0.2, 1.0]}
    config = from_json(content)
    assert config.views == ViewsConfig(share=0.5, color_strength=0.5)
    assert config.objective == MoCoV3Config()
    assert config.addons == {"ser": SERConfig()}


def test_a_config_of_another_program_is_refused(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for text in ('{"hidden_size": 384}', '{"objective": "unheard_of"}', '["a"]', "{", '{"model": {"width": 3}}'):
        folder.config.write_text(text)
        with pytest.raises(ValueError, match=r"config: .*config.json can't be read as that of a run"):
            folder.read_config()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ser.weight": -1.0}, r"ser\.weight: got -1, takes a number from 0"),
        ({"ser.weight": math.nan}, r"ser\.weight: got nan, takes a finite number"),
        ({"moco.momentum": 2.0}, r"moco\.momentum: got 2, takes a number in \[0, 1\]"),
        ({"moco.temperature": 0.0}, r"moco\.temperature: got 0, takes a number above 0"),
        ({"moco.dim": 0}, r"moco\.dim: got 0, takes a positive number"),
        ({"ser.hidden_dim": 0}, r"ser\.hidden_dim: got 0, takes a positive number"),
        ({"optim.clip_grad": -1.0}, r"optim\.clip_grad: got -1, takes a number from 0"),
        ({"optim.lr": math.inf}, r"optim\.lr: got inf, takes a finite number"),
        ({"optim.batch_size": 0}, r"optim\.batch_size: got 0, takes a positive number"),
        ({"max_skipped": 2.0}, r"max_skipped: got 2, takes a number in \[0, 1\]"),
        ({"views.crop_area": (0.9, 0.1)}, r"views\.crop_area: got 0\.9 0\.1, takes a range within"),
        ({"views.locals": 1, "views.local_area": (0.0, 0.0)}, r"views\.local_area: got 0, takes a number in \(0, 1\]"),
        ({"views.share": 0.0, "equimod.layers": (2,)}, r"views\.share: got 0, which leaves equimod without images"),
        ({"ser.max_tokens": 1}, r"ser\.max_tokens: got 1, takes 2 or more"),
        ({"model.image_size": 30}, r"model\.image_size: got 30, takes a multiple of the patch size 8"),
        ({"model.drop_path_rate": 2.0}, r"model\.drop_path_rate: got 2, takes a number in \[0, 0\.99\]"),
        (
            {"model.name": "vit_small_patch16_dinov3", "model.num_heads": 8},
            r"model\.num_heads: got 8, takes heads of a multiple of 4 channels of the 48",
        ),
        ({"model.num_heads": 5}, r"model: vit_tiny_patch16_224 can't be built with .*num_heads"),
        ({"device": "xpu"}, r"device: got 'xpu', takes 'auto', 'cpu' or 'cuda'"),
    ],
    ids=str,
)
def test_options_are_checked_before_anything_is_made(tiny: TrainConfig, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(with_options(tiny, options))
    assert not tiny.out.exists()


def test_a_share_for_nobody_is_no_error(tiny: TrainConfig) -> None:
    train(with_options(tiny, {"ser.layers": "off", "views.share": 0.1, "optim.steps": 1}))
    assert "ser" not in read_log(tiny.out)[0]


def test_options_come_from_a_file_and_are_overridden(tmp_path: Path) -> None:
    written = parse(
        [
            "--objective",
            "dino",
            "--dino.dim",
            "99",
            "--ser.layers",
            "off",
            "--equimod.layers",
            "3",
            "--optim.lr",
            "7e-4",
        ]
    )
    path = tmp_path / "config.json"
    path.write_text(json.dumps(to_json(written)))
    assert parse(["--config", str(path)]) == written
    changed = parse(["--config", str(path), "--optim.lr", "1e-3", "--ser.layers", "2"])
    assert (changed.optim.lr, changed.objective, changed.addons["ser"].layers) == (1e-3, written.objective, (2,))
    (tmp_path / "few.yaml").write_text("objective: vicreg\noptim: {batch_size: 64}\nviews:\n  share: 0.5\n")
    few = parse(["--config", str(tmp_path / "few.yaml")])
    assert (type(few.objective), few.optim.batch_size, few.views.share) == (VICRegConfig, 64, 0.5)


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        (None, [], "config: .*few.yaml can't be read as options of a training: .*No such file"),
        ("[1, 2]", [], "it holds no options by name"),
        ("a: [", [], "while parsing"),
        ("optim: {rate: 3}", [], "OptimConfig has no rate"),
        ("objective: dino", ["--objective", "byol"], "objective: got byol, and .*few.yaml is of dino"),
    ],
)
def test_a_file_of_options_that_does_not_fit_is_named(
    text: str | None, arguments: list[str], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "few.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message):
        parse(["--config", str(path), *arguments])
