"""N ranks = 1 rank for every objective: real processes joined by gloo, with different numbers of rows."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases.objectives import small_config, small_objective
from cases.ranks import results_of_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ser_fast.distributed import all_reduce_sum, mean_over_rows, rank, world_size
from ser_fast.heads import SyncBatchNorm1d
from ser_fast.objectives import OBJECTIVES

pytestmark = pytest.mark.slow

f32, f64 = torch.float32, torch.float64
TOLERANCE = {f32: 1e-5, f64: 1e-12}
ROWS = [5, 3, 4]  # of ranks 0, 1, 2
DIM = 6
CASES = [(name, count, dtype) for name in OBJECTIVES for count in (2, 4) for dtype in (f32, f64)]
STEPS = 2

PROGRAMS: dict[str, Callable[[], Any]] = {}


def program(function: Callable[[], Any]) -> Callable[[], Any]:
    PROGRAMS[function.__name__] = function
    return function


@pytest.fixture(scope="module", params=[2, 3])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """For each program, what it returned on each rank."""
    return results_of_ranks(PROGRAMS, request.param, tmp_path_factory.mktemp("ranks"))


def rows_of(rank: int, *shape: int, key: int, dtype: torch.dtype = f64) -> Tensor:
    """Random rows (..., ROWS[rank], DIM) that any process can draw for any rank."""
    generator = torch.Generator().manual_seed(100 * key + rank)
    return torch.randn(*shape, ROWS[rank], DIM, dtype=f64, generator=generator).to(dtype)


def worst(actual: Tensor, expected: Tensor) -> float:
    """The largest error, relative to the largest expected value."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()


# ---------------------------------------------------------------- sums, means and batch normalization


@program
def reductions() -> dict[str, Any]:
    rows = rows_of(rank(), key=1).requires_grad_()
    total = all_reduce_sum(rows.square().sum(0))
    (total * torch.arange(DIM) * (rank() + 1)).sum().backward()
    mean = mean_over_rows(rows.detach())
    return {
        "total": total.detach(),
        "gradient": rows.grad,
        "mean": mean,
        "of_vector": mean_over_rows(rows.detach()[:, 0]),
    }


def test_sums_and_means(results: dict[str, list[Any]]) -> None:
    world = len(results["reductions"])
    rows = [rows_of(r, key=1) for r in range(world)]
    together = torch.cat(rows)
    for r, actual in enumerate(results["reductions"]):
        torch.testing.assert_close(actual["total"], together.square().sum(0))
        # The sum over the ranks' losses, which have the weights 1, 2, ...
        torch.testing.assert_close(actual["gradient"], 2 * rows[r] * torch.arange(DIM) * sum(range(1, world + 1)))
    for name, expected in (("mean", together.mean()), ("of_vector", together[:, 0].mean())):
        torch.testing.assert_close(sum(a[name] for a in results["reductions"]) / world, expected)


def normalize(rows: Tensor, upstream: Tensor, affine: bool) -> dict[str, Tensor]:
    norm = SyncBatchNorm1d(DIM, affine=affine).double()
    rows.requires_grad_()
    for _ in range(2):
        out = norm(10 + rows)
    (out * upstream).sum().backward()
    parameters = {name: p.grad for name, p in norm.named_parameters()}
    evaluated = norm.eval()(rows.detach())
    return {"out": out.detach(), "rows": rows.grad, "evaluated": evaluated, **parameters, **norm.state_dict()}


@program
def batch_norm() -> list[dict[str, Tensor]]:
    return [normalize(rows_of(rank(), key=2), rows_of(rank(), key=3), affine) for affine in (True, False)]


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm(affine: bool, results: dict[str, list[Any]]) -> None:
    ranks = [result[0 if affine else 1] for result in results["batch_norm"]]
    rows, upstream = (torch.cat([rows_of(r, key=key) for r in range(len(ranks))]) for key in (2, 3))
    expected = normalize(rows, upstream, affine)
    for name, value in expected.items():
        if len(value.shape) == 2:
            assert worst(torch.cat([actual[name] for actual in ranks]), value) < 1e-12
        elif name in ("weight", "bias") and not name.startswith("running"):
            continue  # the parameters, after their gradients of the same name
        else:
            for actual in ranks:
                torch.testing.assert_close(actual[name], value, rtol=1e-12, atol=0)


# ---------------------------------------------------------------- objectives


class Model(nn.Module):
    """An objective on embeddings that a linear layer makes, with a teacher that is not the student."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.encoder = nn.Linear(DIM, DIM, bias=False)
        self.objective = small_objective(name, DIM)
        self.teacher = copy.deepcopy(self.objective.head).requires_grad_(False)
        for p in self.teacher.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
        self.to(dtype)

    def forward(self, views: Tensor, progress: float) -> Tensor:
        student = [self.objective.head(self.encoder(view)) for view in views]
        teacher = [self.teacher(view) for view in views[:2]] if self.objective.momentum is not None else []
        return self.objective(student, teacher, progress)["loss"]


def steps(model: nn.Module, module: Model, views: list[Tensor]) -> list[dict[str, Any]]:
    """Loss, gradients and buffers of each step; the parameters stay."""
    out = []
    for step, view in enumerate(views):
        module.zero_grad()
        loss = model(view, step / STEPS)
        loss.backward()
        module.objective.after_step(step / STEPS)
        gradients = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
        out.append(
            {"loss": loss.detach(), "gradients": gradients, "buffers": copy.deepcopy(dict(module.named_buffers()))}
        )
    return out


@program
def objectives() -> list[list[dict[str, Any]]]:
    out = []
    for name, count, dtype in CASES:
        module = Model(name, dtype)
        views = [rows_of(rank(), count, key=5 + step, dtype=dtype) for step in range(STEPS)]
        # Every parameter is used: DistributedDataParallel would wait for one that is not.
        out.append(steps(DistributedDataParallel(module), module, views))
    return out


@pytest.mark.parametrize("index", range(len(CASES)), ids=["-".join(map(str, case)) for case in CASES])
def test_objective(index: int, results: dict[str, list[Any]]) -> None:
    name, count, dtype = CASES[index]
    ranks = [result[index] for result in results["objectives"]]
    module = Model(name, dtype)
    views = [
        torch.cat([rows_of(r, count, key=5 + step, dtype=dtype) for r in range(len(ranks))], dim=1)
        for step in range(STEPS)
    ]
    for step, expected in enumerate(steps(module, module, views)):
        actual = [result[step] for result in ranks]
        loss = sum(a["loss"] for a in actual) / len(ranks)
        torch.testing.assert_close(loss, expected["loss"], rtol=TOLERANCE[dtype], atol=0)
        for a in actual:
            assert a["gradients"].keys() == expected["gradients"].keys()
            for of, gradient in expected["gradients"].items():
                if (name, of) == ("byol", "objective.head.3.bias"):  # the predictor's batch normalization takes it away
                    assert a["gradients"][of].abs().max() < 1e-6
                else:
                    assert worst(a["gradients"][of], gradient) <= TOLERANCE[dtype], of
            for of, buffer in expected["buffers"].items():
                torch.testing.assert_close(a["buffers"][of], buffer, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    if name == "dino":
        assert expected["buffers"]["objective.center"].abs().min() > 0


# ---------------------------------------------------------------- pretraining


@program
def pretraining() -> dict[str, Any]:
    """Two steps of two accumulated parts with SER; for each objective the gradients and buffers."""
    out = {}
    for name in OBJECTIVES:
        config = small_config(name, Path())
        torch.manual_seed(rank())  # DistributedDataParallel must start all ranks from rank 0's parameters
        module = config.build()
        make_views = config.views.build(8, seed=0)
        model = DistributedDataParallel(module)
        for step in range(2):
            module.zero_grad()
            for part in range(2):
                generator = torch.Generator().manual_seed(10 * rank() + part)
                images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8, generator=generator)
                views = make_views(images, torch.arange(4) + 8 * rank() + 4 * part, epoch=step)
                if part == 0:
                    with model.no_sync():
                        model(views, 0.5)["loss"].backward()
                else:
                    model(views, 0.5)["loss"].backward()
            module.objective.after_step(0.5)
        gradients = {of: p.grad for of, p in module.named_parameters() if p.requires_grad}
        out[name] = {**gradients, **dict(module.named_buffers())}
    return out


@pytest.mark.parametrize("name", OBJECTIVES)
def test_pretraining_keeps_the_ranks_alike(name: str, results: dict[str, list[Any]]) -> None:
    first, *others = (result[name] for result in results["pretraining"])
    assert all(value is not None and value.isfinite().all() for value in first.values())
    for other in others:
        assert all(torch.equal(other[of], value) for of, value in first.items())


def test_in_this_process_there_is_one_rank() -> None:
    assert world_size() == 1
    rows = rows_of(0, key=1)
    assert all_reduce_sum(rows) is rows
    assert torch.equal(mean_over_rows(rows), rows.mean())
