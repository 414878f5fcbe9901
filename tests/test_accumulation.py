"""A batch walked over in parts gives what the whole batch gives."""

from pathlib import Path
from typing import Any

import pytest
import torch
from cases.objectives import small_config
from cases.ranks import results_of_ranks
from cases.runs import CPU, patterns, tiny_config
from timm.layers import Attention
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ser_fast.distributed import rank
from ser_fast.objectives import OBJECTIVES
from ser_fast.training.accumulation import backward_in_parts, split_views
from ser_fast.training.config import TrainConfig, with_options
from ser_fast.training.pretraining import Pretraining
from ser_fast.training.trainer import Trainer
from ser_fast.views.recipe import Views


def config_of(objective: str, options: dict[str, Any]) -> TrainConfig:
    return with_options(small_config(objective, Path("unused")), options)


def batch_of(config: TrainConfig, model: Pretraining, count: int) -> Views:
    images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    return config.views.build(model.encoder.patch_size[0], 0, model.needs)(images, torch.arange(count), epoch=0)


def to_dtype(views: Views, dtype: torch.dtype) -> Views:
    for view in views.views:
        view.images[:] = [images.to(dtype) for images in view.images]
    return views


def gradients(model: Pretraining) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def walked(
    config: TrainConfig, dtype: torch.dtype, parts: int, count: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The losses and the gradients of a batch in so many parts; in none, those of a plain backward pass."""
    torch.manual_seed(0)
    model = config.build().to(dtype).train()
    with torch.no_grad():  # no two views alike, no head at its symmetric start
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    views = to_dtype(batch_of(config, model, count), dtype)
    torch.manual_seed(5)
    if parts == 0:
        losses = model(views, 0.3)
        losses["loss"].backward()
    else:
        losses = backward_in_parts(model, views, parts, 0.3)
    return {name: value.detach() for name, value in losses.items()}, gradients(model)


def assert_parts_are_the_whole(config: TrainConfig, parts: tuple[int, ...], count: int = 12) -> None:
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        losses, whole = walked(config, dtype, 0, count)
        for number in parts:
            again, shares = walked(config, dtype, number, count)
            assert again.keys() == losses.keys()
            for name, value in losses.items():
                torch.testing.assert_close(again[name], value, rtol=tolerance, atol=tolerance)
            assert shares.keys() == whole.keys()
            scale = torch.stack([gradient.norm() for gradient in whole.values()]).norm()
            for name, gradient in whole.items():
                # timm resizes positions in float32.
                limit = max(tolerance, 1e-8) if name == "encoder.pos_embed" else tolerance
                assert float((shares[name] - gradient).norm()) <= limit * float(scale), name


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_parts_give_the_gradient_of_the_whole(objective: str) -> None:
    config = config_of(objective, {"equimod.layers": (2,), "ser.max_tokens": 40, "model.drop_path_rate": 0.0})
    assert_parts_are_the_whole(config, (2, 4))


@pytest.mark.parametrize(
    "options",
    [
        {"views.sampler": "crop", "views.share": 0.3},
        {"views.share": 0.0},
        {"views.locals": 2, "views.local_size": 16},
        {"augself.layers": (2, 3), "essl.layers": (3,)},
        {"ser.momentum_keys": True},
        {"ser.layers": "all", "ser.weight": 0.0},
        {"model.grad_checkpointing": True},
    ],
    ids=str,
)
def test_every_kind_of_batch_can_be_walked_over_in_parts(options: dict[str, Any]) -> None:
    assert_parts_are_the_whole(config_of("moco_v3", options), (3,))


def test_the_second_walk_drops_the_paths_of_the_first() -> None:
    assert_parts_are_the_whole(config_of("moco_v3", {"model.drop_path_rate": 0.5}), (1,))


def test_more_parts_than_samples_of_the_share() -> None:
    assert_parts_are_the_whole(config_of("moco_v3", {"views.share": 0.25}), (6,), count=12)


def test_a_share_of_the_samples_keeps_their_order() -> None:
    config = config_of("moco_v3", {})
    views = batch_of(config, config.build(), 10)
    shares = split_views(views, 3)
    for number, view in enumerate(views.views):
        for part, images in enumerate(view.images):
            assert torch.equal(torch.cat([share.views[number].images[part] for share in shares]), images)


@pytest.mark.parametrize("objective", ["moco_v3", "barlow_twins"])
def test_parts_under_autocast_round_as_the_whole_does(objective: str) -> None:
    config = config_of(objective, {"equimod.layers": (2,), "model.drop_path_rate": 0.0})

    def flat(amp: torch.dtype | None, parts: int) -> tuple[dict[str, Tensor], Tensor]:
        torch.manual_seed(0)
        model, dtypes = config.build().train(), []
        for module in model.modules():
            if isinstance(module, Attention):
                module.qkv.register_forward_hook(lambda _, inputs, out: dtypes.append(out.dtype))
        views = batch_of(config, model, 12)
        torch.manual_seed(5)
        if parts == 0:
            with torch.autocast("cpu", amp, enabled=amp is not None):
                losses = model(views, 0.3)
            losses["loss"].backward()
        else:
            losses = backward_in_parts(model, views, parts, 0.3, amp=amp)
        assert {*dtypes} == {amp or torch.float32}  # in both walks
        return losses, torch.cat([gradient.flatten() for gradient in gradients(model).values()])

    _, exact = flat(None, 0)
    losses, whole = flat(torch.bfloat16, 0)
    again, shares = flat(torch.bfloat16, 3)
    assert all(torch.equal(again[name], value) for name, value in losses.items())
    assert (shares - whole).norm() < 0.25 * (whole - exact).norm() < 0.1 * exact.norm()


def in_parts_and_whole() -> dict[str, Any]:
    """On this rank, the gradients of DistributedDataParallel and those in parts."""
    results = {}
    for objective in ("moco_v3", "barlow_twins"):
        options = {"equimod.layers": (2,), "ser.gather": True, "model.drop_path_rate": 0.0}
        config = config_of(objective, options)
        torch.manual_seed(0)
        model = config.build().double().train()
        parallel = DistributedDataParallel(model)
        views = to_dtype(batch_of(config, model, 8 + rank()), torch.float64)
        seed = 5 + rank()
        torch.manual_seed(seed)
        parallel(views, 0.3)["loss"].backward()
        whole = {name: gradient.clone() for name, gradient in gradients(model).items()}
        model.zero_grad()
        torch.manual_seed(seed)
        backward_in_parts(model, views, 3, 0.3)
        results[objective] = {"whole": whole, "parts": gradients(model)}
    return results


@pytest.mark.slow
def test_parts_on_two_ranks_give_the_gradient_of_the_whole(tmp_path: Path) -> None:
    ranks = results_of_ranks({"all": in_parts_and_whole}, 2, tmp_path)["all"]
    for objective, of_rank_0 in ranks[0].items():
        scale = torch.stack([gradient.norm() for gradient in of_rank_0["whole"].values()]).norm()
        for name, gradient in of_rank_0["whole"].items():
            limit = 1e-8 if name == "encoder.pos_embed" else 1e-12
            for result in ranks:
                assert (result[objective]["parts"][name] - gradient).norm() <= limit * scale, name


def test_the_trainer_walks_over_parts(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", patterns(tmp_path / "images", 24))
    records = []
    for options in ({}, {"optim.accumulate": 4}, {"optim.accumulate": 2, "optim.accumulate_mode": "plain"}):
        trainer = Trainer(with_options(config, options), CPU)
        epoch, batch = next(trainer.batches())
        records.append(trainer.step(0, epoch, batch.images, batch.indices))
    assert records[1] == pytest.approx(records[0], rel=1e-4)
    assert records[2]["invariance"] != pytest.approx(records[0]["invariance"], rel=1e-2)
