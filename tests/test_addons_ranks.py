"""Add-ons on several processes joined by gloo, against one process on the whole batch; and whole trainings."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases.ranks import results_of_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ser_fast.addons import ADDONS
from ser_fast.addons.augself import OUTPUTS, AugSelfHead
from ser_fast.addons.equimod import EquiModHead
from ser_fast.addons.essl import predictor, turn_loss
from ser_fast.addons.stl import STLHead
from ser_fast.distributed import rank, world_size
from ser_fast.objectives import OBJECTIVES
from ser_fast.training.config import TrainConfig, default_config, with_options
from ser_fast.training.trainer import Trainer

pytestmark = pytest.mark.slow

f32, f64 = torch.float32, torch.float64
ROWS, WIDTH = 4, 6  # a rank's samples, and channels
CASES = ["equimod-official", "equimod-released", "augself", "essl", "stl-official", "stl-released"]

# ---------------------------------------------------------------- N ranks = 1 rank


class Term(nn.Module):
    """A head as a function of features (V, B, C) and of numbers (V, B, 8) that stand for what was drawn."""

    def __init__(self, case: str) -> None:
        super().__init__()
        self.name, _, form = case.partition("-")
        options: Any = {"form": form}
        if self.name == "equimod":
            self.head: nn.Module = EquiModHead(WIDTH, 8, hidden_dim=10, out_dim=6, code_dim=5, **options)
        elif self.name == "augself":
            self.head = AugSelfHead(WIDTH, dict.fromkeys(OUTPUTS, 0.5), hidden_dim=10)
        elif self.name == "essl":
            self.head = predictor(WIDTH, last_dim=5)
        else:
            self.head = STLHead(
                WIDTH, transformation_dim=4, hidden_dim=5, equivariance_dims=(7, 6), out_dim=4, **options
            )

    def forward(self, features: Tensor, drawn: Tensor) -> Tensor:
        if self.name == "equimod":
            return self.head(features[0], [features[1], features[2]], [drawn[0], drawn[1]])
        if self.name == "augself":
            targets = [
                {name: order[:, :width] for name, width in OUTPUTS.items()}
                | {"flip": (order[:, :1] > 0).double(), "turn": (4 * order[:, 1]).long() % 4}
                for order in drawn[:2]
            ]
            return self.head([features[0], features[1]], targets)["loss"]
        if self.name == "essl":
            return turn_loss(self.head(features.flatten(0, 1)))
        return self.head(features[0], features[1])["loss"]


def term(case: str, dtype: torch.dtype) -> Term:
    torch.manual_seed(3)
    return Term(case).to(dtype)


def batch(world: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Features and draws of all ranks, (4, world * ROWS, ...)."""
    generator = torch.Generator().manual_seed(4)
    features = torch.randn(4, world * ROWS, WIDTH, dtype=f64, generator=generator)
    return features.to(dtype), torch.rand(4, world * ROWS, 8, dtype=f64, generator=generator).to(dtype)


def heads() -> dict[str, Any]:
    """For each case, this rank's loss and gradients."""
    results = {}
    for case, dtype in itertools.product(CASES, (f64, f32)):
        features, drawn = (x[:, rank() * ROWS : (rank() + 1) * ROWS] for x in batch(world_size(), dtype))
        features = features.clone().requires_grad_()
        module = term(case, dtype)
        parallel = DistributedDataParallel(module)
        loss = parallel(features, drawn)
        loss.backward()
        running = {name: value for name, value in module.named_buffers() if "running" in name}
        gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
        results[f"{case}-{dtype}"] = {
            "loss": loss.detach(), "features": features.grad, "gradients": gradients, "running": running
        }  # fmt: skip
    return results


TINY = {
    "model.name": "vit_tiny_patch16_224", "model.split": 1, "model.image_size": 32, "model.patch_size": 8,
    "model.embed_dim": 48, "model.depth": 3, "model.num_heads": 3, "views.share": 0.5, "views.locals": 1,
    "ser.layers": "off", "optim.batch_size": 16, "optim.warmup": 0.0, "device": "cpu", "workers": 0,
    "ser.hidden_dim": 32, "ser.out_dim": 16, "equimod.hidden_dim": 32, "equimod.out_dim": 16, "equimod.code_dim": 16,
    "augself.hidden_dim": 32, "augself.turn": 0.5, "essl.last_dim": 16, "stl.transformation_dim": 8,
    "stl.hidden_dim": 16, "stl.equivariance_dims": (32, 16), "stl.out_dim": 16, "equimod.layers": "off",
}  # fmt: skip


def tiny(objective: str, **options: Any) -> TrainConfig:
    return with_options(default_config(objective), TINY | options)


def trainings() -> dict[str, Any]:
    """Two steps with every add-on at a time, and with all of them: the parameters after each."""
    results = {}
    for names in [*([name] for name in ADDONS), list(ADDONS)]:
        layers = {f"{name}.layers": (1, 3) if len(names) > 1 else (2,) for name in names}
        torch.manual_seed(5)
        model = tiny("moco_v3", **layers, **{"ser.locals": True, "views.sampler": "crop"}).build()
        parallel = DistributedDataParallel(model)  # it would wait for a parameter that is not used
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
        config = tiny("moco_v3", **{"views.sampler": "crop"})
        make = config.views.build(8, 0, model.needs)
        for step in range(2):
            generator = torch.Generator().manual_seed(10 * step + rank())
            images = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8, generator=generator)
            optimizer.zero_grad()
            parallel(make(images, torch.arange(8) + 8 * rank(), step), 0.0)["loss"].backward()
            optimizer.step()
        results["+".join(names)] = nn.utils.parameters_to_vector(model.parameters()).detach()
    return results


PROGRAMS: dict[str, Callable[[], dict[str, Any]]] = {"heads": heads, "trainings": trainings}


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank returned."""
    results = results_of_ranks(PROGRAMS, request.param, tmp_path_factory.mktemp("ranks"))
    return [{name: of_ranks[rank] for name, of_ranks in results.items()} for rank in range(request.param)]


@pytest.mark.parametrize("dtype", [f64, f32], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_ranks_give_what_one_gives_on_the_whole_batch(
    case: str, dtype: torch.dtype, ranks: list[dict[str, Any]]
) -> None:
    features, drawn = batch(len(ranks), dtype)
    features.requires_grad_()
    module = term(case, dtype)
    loss = module(features, drawn)
    loss.backward()
    tolerance = {f64: 1e-12, f32: 2e-5}[dtype]
    results = [result["heads"][f"{case}-{dtype}"] for result in ranks]

    def close(actual: Tensor, expected: Tensor) -> None:
        rounding = {f64: 1e-14, f32: 1e-6}[dtype]  # of what is 0 but for rounding
        assert (actual - expected).abs().max() <= max(tolerance * float(expected.abs().max()), rounding)

    close(torch.stack([result["loss"] for result in results]).mean(), loss.detach())
    # DistributedDataParallel averages the gradients of parameters, and not those of the features.
    assert features.grad is not None
    close(torch.cat([result["features"] for result in results], 1) / len(ranks), features.grad)
    expected = {name: parameter.grad for name, parameter in module.named_parameters()}
    running = {name: value for name, value in module.named_buffers() if "running" in name}
    for result in results:
        for name, gradient in expected.items():
            close(result["gradients"][name], gradient)
        for name, value in running.items():
            close(result["running"][name], value)


@pytest.mark.parametrize("names", [*ADDONS, "+".join(ADDONS)])
def test_ranks_stay_alike_in_a_training(names: str, ranks: list[dict[str, Any]]) -> None:
    first, *others = (result["trainings"][names] for result in ranks)
    assert torch.isfinite(first).all()
    for other in others:
        assert torch.equal(other, first)


# ---------------------------------------------------------------- trainings on photos


SMALL = {  # widths of the objectives' heads, by the option's name
    "dim": 16, "mlp_dim": 32, "hidden_dim": 32, "bottleneck_dim": 16, "prototypes": 64, "out_dim": 64,
}  # fmt: skip


@pytest.mark.parametrize("layer", ["2", "last"])
@pytest.mark.parametrize("addon", ["none", *ADDONS])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_pair_trains(objective: str, addon: str, layer: str, tmp_path: Path) -> None:
    """On one batch of photos over and over the loss falls, and the add-on's with it."""
    if addon == "none" and layer == "last":
        layer = "2"  # the same without an add-on: another seed
    steps = 12 if objective == "dino" else 30  # DINO's loss rises again while its center settles
    section = OBJECTIVES[objective].section
    kind = type(default_config(objective).objective)
    widths = {f"{section}.{name}": width for name, width in SMALL.items() if name in kind.__dataclass_fields__}
    options: dict[str, Any] = {"out": tmp_path / "run", "optim.steps": steps, "optim.lr": 0.02, "views.locals": 0}
    if addon != "none":
        options |= {f"{addon}.layers": (2,) if layer == "2" else layer}
    trainer = Trainer(tiny(objective, **widths, **options), torch.device("cpu"))
    _, loaded = next(trainer.batches())
    records = [trainer.step(step, 0, loaded.images, loaded.indices) for step in range(steps)]

    def fell(name: str) -> bool:
        losses = [record[name] for record in records]
        return sum(losses[-3:]) < sum(losses[:3])

    assert fell("loss")
    assert addon == "none" or fell(addon)


def test_a_resumed_training_goes_on_to_the_bit(tmp_path: Path) -> None:
    """With every add-on, of which four have batch norms."""
    layers = {f"{name}.layers": (1, 3) for name in ADDONS}
    config = tiny("moco_v3", **layers, **{"out": tmp_path / "run", "optim.steps": 4, "ser.locals": True})
    straight = Trainer(config, torch.device("cpu"))
    _, loaded = next(straight.batches())
    records = []
    for step in range(4):
        if step == 2:
            straight.save(2)
        records.append(straight.step(step, 0, loaded.images, loaded.indices))
    resumed = Trainer(with_options(config, {"resume": "auto"}), torch.device("cpu"))
    assert resumed.start == 2
    again = [resumed.step(step, 0, loaded.images, loaded.indices) for step in (2, 3)]
    assert again == records[2:]
