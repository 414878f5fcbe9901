"""N ranks = 1 rank: what processes joined by gloo compute, against one process on the whole batch.

A program runs on every rank and returns tensors; the tests compare what came back. All programs of a world share one
launch, since starting processes costs more than all they compute.
"""

import itertools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from cases.ranks import results_of_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ser_fast import LatticeMap, SERLoss, distributed, group_action, info_nce, nt_xent
from ser_fast.distributed import all_gather_rows, all_gather_views, gather_counts, rank, world_size
from ser_fast.objectives.moco_v3 import MoCoV3, MoCoV3Config
from ser_fast.training import processes
from ser_fast.training.config import ModelConfig, TrainConfig, ViewsConfig, with_options
from ser_fast.training.pretraining import Pretraining
from ser_fast.views.recipe import View, Views

GOLDEN = Path(__file__).parent / "golden"

f32, f64, bf16 = torch.float32, torch.float64, torch.bfloat16

# ---------------------------------------------------------------- launching

PROGRAMS: dict[str, Callable[[], Any]] = {}


def program(function: Callable[[], Any]) -> Callable[[], Any]:
    PROGRAMS[function.__name__] = function
    return function


@pytest.fixture(scope="module", params=[pytest.param(ranks, marks=pytest.mark.slow) for ranks in (2, 3)])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """For each program, what it returned on each rank."""
    return results_of_ranks(PROGRAMS, request.param, tmp_path_factory.mktemp("ranks"))


def seeded(*key: int) -> torch.Generator:
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))


def randn(*shape: int, key: tuple[int, ...], dtype: torch.dtype = f64) -> Tensor:
    """Random numbers that any process can draw for any rank."""
    return torch.randn(*shape, dtype=f64, generator=seeded(*key)).to(dtype)


def worst(actual: Tensor, expected: Tensor) -> float:
    """The largest error, relative to the largest expected value."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()


TOLERANCE = {f32: 1e-6, f64: 1e-12}


def assert_equal_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert list(actual) == list(expected)
    for name, value in expected.items():
        assert value.any(), name
        assert worst(actual[name], value) <= tolerance, name


# ---------------------------------------------------------------- gathering rows

COUNTS = [3, 0, 2]  # of ranks 0, 1, 2
GATHERED = [f64, f32, bf16, torch.int64, torch.uint8, torch.bool]


def rows_of(rank: int, dtype: torch.dtype, count: int | None = None) -> Tensor:
    return (10 * randn(COUNTS[rank] if count is None else count, 4, key=(1, rank))).to(dtype)


def weights_of(rank: int, world: int) -> Tensor:
    return randn(sum(COUNTS[:world]), 4, key=(2, rank))


def scattering(at_once: bool) -> AbstractContextManager[Any]:
    """With the reduce-scatter that is a GPU's, or with the way round it that gloo's CPU has."""
    return patch.object(distributed, "_reduces_while_it_scatters", lambda _: at_once)


@program
def gather() -> dict[str, Any]:
    counts = gather_counts(COUNTS[rank()], torch.device("cpu"))
    out: dict[str, Any] = {"rank": rank(), "world_size": world_size(), "counts": counts}
    for dtype in GATHERED:
        rows = rows_of(rank(), dtype)
        out[str(dtype)] = all_gather_rows(rows, counts)
        out[f"vector {dtype}"] = all_gather_rows(rows[:, 0], counts)
    for dtype, at_once in itertools.product((f32, f64), (False, True)):
        rows, weights = rows_of(rank(), dtype).requires_grad_(), weights_of(rank(), world_size()).to(dtype)
        gathered = all_gather_rows(rows, counts)
        with scattering(at_once):
            gathered.backward(kept := weights.clone())  # a gradient that others may hold, too
        total = weights.clone()
        dist.all_reduce(total)  # of all rows, of which a rank keeps its own
        out[f"gradient {dtype} {at_once}"] = rows.grad, total.split(counts)[rank()], torch.equal(kept, weights)
    out["gradient"] = rows.grad
    views = [rows_of(rank(), f64), rows_of(rank(), f64).flip(1).requires_grad_()]
    out["views"] = gathered = all_gather_views(views, counts)
    gathered[1].backward(weights_of(rank(), world_size()))
    out["views gradient"] = views[1].grad
    rows = rows_of(rank(), f64).requires_grad_()
    (slope,) = torch.autograd.grad(all_gather_rows(rows, counts).pow(3).sum(), rows, create_graph=True)
    (out["second"],) = torch.autograd.grad(slope.sum(), rows)
    # Counts are read on the host, and a group that has a backend for the CPU asks no device for them.
    out["counts of a device"] = gather_counts(COUNTS[rank()], torch.device("meta"))
    out["nothing"] = all_gather_rows(rows[:0].float(), gather_counts(0, rows.device))
    return out


def test_gather_rows(results: dict[str, list[Any]]) -> None:
    world = len(results["gather"])
    for r, actual in enumerate(results["gather"]):
        assert (actual["rank"], actual["world_size"], actual["counts"]) == (r, world, COUNTS[:world])
        assert actual["nothing"].shape == (0, 4)
        for dtype in GATHERED:
            expected = torch.cat([rows_of(other, dtype) for other in range(world)])
            assert actual[str(dtype)].dtype == dtype
            assert torch.equal(actual[str(dtype)], expected)
            assert torch.equal(actual[f"vector {dtype}"], expected[:, 0])


def test_gradient_of_gathered_rows_is_the_sum_over_the_ranks(results: dict[str, list[Any]]) -> None:
    world = len(results["gather"])
    expected = sum(weights_of(r, world) for r in range(world)).split(COUNTS[:world])
    for actual, own in zip(results["gather"], expected, strict=True):
        torch.testing.assert_close(actual["gradient"], own)
        for (dtype, tolerance), at_once in itertools.product(((f32, 1e-6), (f64, 1e-14)), (False, True)):
            gradient, reduced, untouched = actual[f"gradient {dtype} {at_once}"]
            torch.testing.assert_close(gradient, reduced, rtol=tolerance, atol=tolerance)
            assert untouched


def test_views_are_gathered_together(results: dict[str, list[Any]]) -> None:
    world = len(results["gather"])
    rows = torch.cat([rows_of(r, f64) for r in range(world)])
    summed = sum(weights_of(r, world) for r in range(world)).split(COUNTS[:world])
    for actual, own in zip(results["gather"], summed, strict=True):
        assert torch.equal(actual["views"], torch.stack([rows, rows.flip(1)]))
        assert actual["views"].is_contiguous()
        torch.testing.assert_close(actual["views gradient"], own)


def test_gathered_rows_can_be_differentiated_twice(results: dict[str, list[Any]]) -> None:
    world = len(results["gather"])
    for r, actual in enumerate(results["gather"]):
        torch.testing.assert_close(actual["second"], world * 6 * rows_of(r, f64))  # of all ranks' losses x^3


@pytest.mark.parametrize("backend", ["cpu:gloo,cuda:nccl", "gloo", "nccl"])
def test_counts_are_those_of_the_cpu_where_it_has_a_backend(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    devices = []
    config = str(dist.distributed_c10d.BackendConfig(dist.Backend(backend)))
    monkeypatch.setattr(dist, "get_backend_config", lambda: config)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_gather_into_tensor", lambda out, own: devices.extend([out.device, own.device]))
    if backend == "nccl":
        with pytest.raises(NotImplementedError, match="meta"):  # what was gathered is read back from the device
            gather_counts(1, torch.device("meta"))
    else:
        gather_counts(1, torch.device("meta"))
    assert [device.type for device in devices] == ["meta" if backend == "nccl" else "cpu"] * 2


def test_a_training_on_gpus_has_a_backend_for_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(processes, "choose_device", torch.device)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **_: started.append(backend))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    for name in ("cuda", "cpu"):
        with processes.process_group(name) as device:
            assert device.type == name
    assert started == ["cpu:gloo,cuda:nccl", "gloo"]


def test_counts_do_not_wait_for_the_device(results: dict[str, list[Any]]) -> None:
    for actual in results["gather"]:
        assert actual["counts of a device"] == COUNTS[: len(results["gather"])]


def test_without_a_process_group() -> None:
    rows = torch.randn(3, 2, requires_grad=True)
    assert (rank(), world_size(), gather_counts(3, rows.device)) == (0, 1, [3])
    assert all_gather_rows(rows, [3]) is rows


def symmetric_loss(rows: Tensor) -> Tensor:
    return info_nce(rows, rows.roll(1, 0), temperature=0.5)


@program
def local_slice_only() -> dict[str, Tensor]:
    """One loss on all ranks, of rows that a shared weight makes: its gradient, averaged as DDP does, in two ways."""
    out = {}
    counts = gather_counts(COUNTS[0], torch.device("cpu"))
    for name in ("sum over ranks", "local slice"):
        weight = randn(4, 4, key=(3,)).requires_grad_()
        rows = rows_of(rank(), f64, count=COUNTS[0]) @ weight
        gathered = all_gather_rows(rows, counts)
        if name == "local slice":
            parts = list(gathered.detach().split(counts))
            parts[rank()] = rows
            gathered = torch.cat(parts)
        symmetric_loss(gathered).backward()
        dist.all_reduce(weight.grad)
        out[name] = weight.grad / world_size()
    return out


def test_local_slice_would_lose_a_factor(results: dict[str, list[Any]]) -> None:
    world = len(results["local_slice_only"])
    weight = randn(4, 4, key=(3,)).requires_grad_()
    rows = torch.cat([rows_of(r, f64, count=COUNTS[0]) for r in range(world)])
    symmetric_loss(rows @ weight).backward()
    for actual in results["local_slice_only"]:
        torch.testing.assert_close(actual["sum over ranks"], weight.grad)
        torch.testing.assert_close(world * actual["local slice"], weight.grad)


# ---------------------------------------------------------------- SERLoss

DIM = 6
BATCHES = [2, 3, 0]  # of ranks 0, 1, 2: one has nothing at all
SIZES = [((4, 3), (3, 5)), ((2, 4), (4, 4)), ((3, 3), (2, 3))]  # of the views' lattices


def full_maps(rank: int) -> tuple[LatticeMap, LatticeMap]:
    codes = torch.randint(8, (2, BATCHES[rank]), generator=seeded(4, rank))
    return tuple(LatticeMap.d4((1, 1), codes[v]).on((8, 8), SIZES[rank][v]) for v in (0, 1))


def crop_maps(rank: int) -> tuple[LatticeMap, LatticeMap]:
    corners = 3 * torch.rand(2, BATCHES[rank], 2, dtype=f64, generator=seeded(5, rank))
    boxes = torch.cat([corners, torch.full_like(corners, 5)], -1)
    return tuple(LatticeMap.crop((8, 8), boxes[v], SIZES[rank][v]) for v in (0, 1))


MAPS = {"d4_scale": full_maps, "crop": crop_maps}
PRESETS = {"paper": (True, False), "released": (False, True)}  # symmetric, both directions
SER_CASES = [
    (preset, maps, with_keys, dtype)
    for preset in PRESETS
    for maps in MAPS
    for with_keys in (False, True)
    for dtype in (f32, f64)
]


def ser_case(
    case: tuple[str, str, bool, torch.dtype], rank: int
) -> tuple[list[Tensor], list[LatticeMap], list[Tensor]]:
    """A rank's tokens, maps and keys."""
    _, maps, with_keys, dtype = case
    shapes = [(BATCHES[rank], *SIZES[rank][view], DIM) for view in (0, 1)]
    tokens = [randn(*shape, key=(6, rank, view), dtype=dtype).requires_grad_() for view, shape in enumerate(shapes)]
    keys = [randn(*shape, key=(7, rank, view), dtype=dtype) for view, shape in enumerate(shapes)] if with_keys else []
    return tokens, list(MAPS[maps](rank)), keys


def make_ser(case: tuple[str, str, bool, torch.dtype]) -> SERLoss:
    torch.manual_seed(8)
    ser = SERLoss(DIM, preset=case[0], temperature=0.2, hidden_dim=8, out_dim=5, gather=True)
    return ser.to(case[3])


@program
def ser_loss() -> list[dict[str, Any]]:
    out = []
    for case in SER_CASES:
        tokens, maps, keys = ser_case(case, rank())
        ser = make_ser(case)
        model = DistributedDataParallel(ser)  # to be kept until the backward pass
        loss = model(*tokens, *maps, *keys)
        loss.backward()
        gradients = {name: parameter.grad for name, parameter in ser.named_parameters()}
        out.append({"loss": loss.detach(), "gradients": gradients, "tokens": [view.grad for view in tokens]})
    return out


def ser_in_one_process(case: tuple[str, str, bool, torch.dtype], world: int) -> tuple[Tensor, SERLoss, list[Any]]:
    """Every rank's rows are moved on their own lattices, then contrasted in one call."""
    symmetric, both_directions = PRESETS[case[0]]
    ser = make_ser(case)
    ranks = [ser_case(case, r) for r in range(world)]
    losses = []
    for source_view in (0, 1) if both_directions else (0,):
        moved, target, valid, image = [], [], [], []
        for r, (tokens, maps, keys) in enumerate(ranks):
            sources = [view.detach() for view in keys] or tokens
            g = LatticeMap.relative(maps[source_view], maps[1 - source_view])
            projected = ser.projector(ser.norm(sources[source_view])).flatten(1, 2)
            rows, partner = group_action(projected.detach() if keys else projected, g, return_valid=True)
            moved.append(rows.flatten(0, 1))
            target.append(ser.projector(ser.norm(tokens[1 - source_view])).flatten(0, 2))
            valid.append(partner.flatten())
            first = sum(BATCHES[:r])
            image.append(torch.arange(first, first + len(rows)).repeat_interleave(rows.shape[1]))
        views = torch.cat(moved), torch.cat(target)
        options = {"temperature": 0.2, "image": torch.cat(image), "valid": torch.cat(valid)}
        if symmetric and not case[2]:
            losses.append(nt_xent(*views, **options))
        else:
            losses.append(info_nce(*views[::-1], **options))
    return sum(losses) / len(losses), ser, [tokens for tokens, _, _ in ranks]


@pytest.mark.parametrize("index", range(len(SER_CASES)), ids=["-".join(map(str, case)) for case in SER_CASES])
def test_ser_loss(index: int, results: dict[str, list[Any]]) -> None:
    case, actual = SER_CASES[index], [result[index] for result in results["ser_loss"]]
    world, tolerance = len(actual), TOLERANCE[SER_CASES[index][3]]
    loss, ser, tokens = ser_in_one_process(case, world)
    loss.backward()
    torch.testing.assert_close(sum(a["loss"] for a in actual) / world, loss.detach(), rtol=tolerance, atol=0)
    expected = {name: parameter.grad for name, parameter in ser.named_parameters()}
    for r, a in enumerate(actual):
        assert_equal_gradients(a["gradients"], expected, tolerance)
        # DDP averages the parameters' gradients; those of tokens are of the sum of the losses.
        for view, gradient in zip(tokens[r], a["tokens"], strict=True):
            if view.grad is None or not view.numel():
                assert gradient is None or not gradient.any()
            else:
                assert worst(gradient / world, view.grad) <= tolerance


def test_crops_leave_tokens_without_partner() -> None:
    for r in (0, 1):
        valid = LatticeMap.relative(*crop_maps(r)).valid()
        assert valid.any()
        assert not valid.all()


class Exchanges:
    """Counts the collectives, and the bytes that this rank receives from others in those of more than `small` bytes."""

    NAMES = (
        "all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single", "all_reduce", "all_gather",
        "all_gather_object",
    )  # fmt: skip

    def __init__(self, small: int = 100) -> None:
        self.calls: list[tuple[str, torch.dtype]] = []
        self.received, self.small = 0, small

    def __enter__(self) -> "Exchanges":
        self.originals = {name: getattr(dist, name) for name in self.NAMES}
        for name, function in self.originals.items():
            setattr(dist, name, partial(self._count, name, function))
        return self

    def __exit__(self, *_: object) -> None:
        for name, function in self.originals.items():
            setattr(dist, name, function)

    def _count(self, name: str, function: Callable[..., Any], out: Tensor, *rest: Any) -> Any:
        self.calls.append((name, out.dtype))
        others = world_size() - 1
        received = others * out.nbytes if name == "reduce_scatter_tensor" else others * out.nbytes // world_size()
        self.received += received if out.nbytes > self.small else 0
        return function(out, *rest)


@program
def exchanges() -> dict[str, Any]:
    """What the third call exchanges, forward and backward: the first two also look at the parameters."""
    out = {}
    for preset, amp, at_once in itertools.product(PRESETS, (False, True), (False, True)):
        ser = SERLoss(DIM, preset=preset, hidden_dim=8, out_dim=64, gather=True)
        tokens, maps, _ = ser_case(("", "d4_scale", False, f32), rank())
        for _ in range(3):
            with Exchanges() as forward, torch.autocast("cpu", dtype=bf16, enabled=amp):
                loss = ser(*tokens, *maps)
            with Exchanges() as backward, scattering(at_once):
                loss.backward()
        out[f"{preset} {amp} {at_once}"] = forward.calls, forward.received, backward.calls, backward.received
    return out


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize(("preset", "views"), [("paper", [2]), ("released", [1, 1])])
def test_exchanges_of_a_step(
    preset: str, views: list[int], amp: bool, at_once: bool, results: dict[str, list[Any]]
) -> None:
    """A direction: numbers of rows, images with validity, keys of so many views. Back: their gradients. Nothing else.

    Keys and gradients travel in the precision that kernels round their operands to.
    """
    world, dtype = len(results["exchanges"]), bf16 if amp else f32
    scatter = "reduce_scatter_tensor" if at_once else "all_to_all_single"
    gather = "all_gather_into_tensor"
    for r, result in enumerate(results["exchanges"]):
        forward, received, backward, received_back = result[f"{preset} {amp} {at_once}"]
        assert forward == len(views) * [(gather, torch.int64), (gather, torch.int64), (gather, dtype)]
        assert backward == len(views) * [(scatter, dtype)]
        rows = [[BATCHES[other] * math.prod(SIZES[other][view]) for other in range(world)] for view in (1, 0)]
        a_row = [count * 64 * dtype.itemsize for count in views]
        directions = list(zip(rows, a_row, strict=False))
        assert received == sum((world - 1) * max(counts) * (row + 8) for counts, row in directions)
        expected = sum((world - 1) * (max(counts) if at_once else counts[r]) * row for counts, row in directions)
        assert received_back == expected


@program
def unlike_parameters() -> dict[str, list[str]]:
    """What a SERLoss outside DistributedDataParallel raises in each of its calls."""
    out: dict[str, list[str]] = {}
    for name in ("alike", "rounding", "drifting", "from the start"):
        torch.manual_seed(rank() if name == "from the start" else 0)
        ser = SERLoss(DIM, hidden_dim=8, out_dim=5, gather=True)
        if name == "rounding":
            with torch.no_grad():
                ser.projector[0].weight.mul_(1 + 1e-6 * rank())
        optimizer = torch.optim.SGD(ser.parameters(), lr=0.1 if name == "drifting" else 0.0)
        tokens, maps, _ = ser_case(("", "d4_scale", False, f32), rank())
        out[name] = []
        for _ in range(4):
            try:
                ser(*tokens, *maps).backward()
                out[name].append("")
            except RuntimeError as error:
                out[name].append(str(error))
            if rank() == 0:
                optimizer.step()
    return out


def test_ranks_with_unlike_parameters_are_told(results: dict[str, list[Any]]) -> None:
    """Every rank is, in calls 1, 2, 4 and so on: also where they were alike at first."""
    message = "SERLoss: its parameters differ between the ranks in call {}; hold it in the module that "
    for actual in results["unlike_parameters"]:
        raised = {name: [error.split("Dist")[0] for error in errors] for name, errors in actual.items()}
        told = [message.format(call) for call in (1, 2, 4)]
        assert raised["alike"] == raised["rounding"] == ["", "", "", ""]
        assert raised["drifting"] == ["", told[1], "", told[2]]
        assert raised["from the start"] == [told[0], told[1], "", told[2]]


# ---------------------------------------------------------------- golden case of two ranks


def golden_case(dtype: torch.dtype, rank: int) -> tuple[Any, list[Tensor], LatticeMap, LatticeMap]:
    """The feature maps q0, q1, k0, k1 of a rank, and the maps that made its views."""
    file = np.load(GOLDEN / "e2e_2rank.npz")
    of = {name: torch.tensor(file[f"rank{rank}_{name}"]) for name in ("w0h0", "w1h1", "k0k1")}
    features = [
        torch.tensor(file[f"rank{rank}_feat_{name}"]).to(dtype).requires_grad_() for name in ("q0", "q1", "k0", "k1")
    ]
    image, size0, size1 = (5, 7), tuple(of["w0h0"].tolist()), tuple(of["w1h1"].tolist())
    k0, k1 = of["k0k1"].tolist()
    g0 = LatticeMap.rot90(size0, k0) @ LatticeMap.resize(image, size0)
    g1 = LatticeMap.rot90(size1, k1) @ LatticeMap.resize(image, size1) @ LatticeMap.vflip(image)
    return file, features, g0, g1


@program
def golden() -> dict[torch.dtype, Any]:
    out = {}
    for dtype in (f32, f64):
        if world_size() == 2:
            _, (q0, q1, k0, k1), g0, g1 = golden_case(dtype, rank())
            ser = SERLoss(512, preset="released", both_directions=False, gather=True)
            ser.norm, ser.projector = nn.Identity(), nn.Identity()
            # Without keys, as both sides get gradient.
            loss = (ser(k0, q1, g0, g1) + ser(k1, q0, g1, g0)) / 2
            loss.backward()
            ser.both_directions = True
            with torch.no_grad():
                with_keys = ser(q0, q1, g0, g1, k0, k1)
            out[dtype] = loss.detach(), with_keys, [features.grad for features in (q0, q1, k0, k1)]
    return out


@pytest.mark.parametrize("dtype", [f32, f64], ids=str)
@pytest.mark.parametrize("results", [pytest.param(2, marks=pytest.mark.slow)], indirect=True)
def test_golden(dtype: torch.dtype, results: dict[str, list[Any]]) -> None:
    losses, with_keys, gradients = zip(*(result[dtype] for result in results["golden"]), strict=True)
    expected = np.load(GOLDEN / "e2e_2rank.npz")
    loss = pytest.approx(expected["loss"].item(), rel=0, abs=TOLERANCE[dtype])
    assert sum(losses).item() / 2 == loss
    assert sum(with_keys).item() / 2 == loss
    for r in (0, 1):
        for name, gradient in zip(("q0", "q1", "k0", "k1"), gradients[r], strict=True):
            # The stored gradients are rounded to float32.
            assert worst(gradient / 2, torch.tensor(expected[f"rank{r}_grad_{name}"]).to(dtype)) <= 1e-6


# ---------------------------------------------------------------- MoCo-v3

TINY = {"image_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
PARTS = [(2, 32, 32), (1, 24, 40)]  # images of a rank, and their sides


def make_moco(dtype: torch.dtype) -> Pretraining:
    """Without batch normalization, for which the parts of a batch come in another order on one rank."""
    torch.manual_seed(9)
    model = Pretraining(ModelConfig(split=2, **TINY).build(), MoCoV3(48, dim=8, mlp_dim=16))
    with torch.no_grad():  # a teacher that is not the student
        for parameter in model.teacher.encoder.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    for mlp in (model.objective.head, model.objective.predictor, model.teacher.head):
        for i, layer in enumerate(mlp):
            if isinstance(layer, nn.BatchNorm1d):
                mlp[i] = nn.Identity()
    return model.to(dtype)


def moco_images(rank: int, dtype: torch.dtype) -> list[list[Tensor]]:
    """Of both views, in parts."""
    return [
        [randn(b, 3, h, w, key=(10, rank, view, part), dtype=dtype) for part, (b, h, w) in enumerate(PARTS)]
        for view in (0, 1)
    ]


def views_of(images: list[list[Tensor]]) -> Views:
    return Views([View(parts, LatticeMap.identity((32, 32), batch=0)) for parts in images], equivariant=0)


def trained_gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in module.named_parameters() if parameter.requires_grad}


@program
def moco() -> dict[torch.dtype, Any]:
    out = {}
    for dtype in (f32, f64):
        module = make_moco(dtype)
        model = DistributedDataParallel(module)
        loss = model(views_of(moco_images(rank(), dtype)), 0.0)["loss"]
        loss.backward()
        out[dtype] = loss.detach(), trained_gradients(module)
    return out


@pytest.mark.parametrize("dtype", [f32, f64], ids=str)
def test_moco(dtype: torch.dtype, results: dict[str, list[Any]]) -> None:
    module = make_moco(dtype)
    ranks = [moco_images(r, dtype) for r in range(len(results["moco"]))]
    images = [[torch.cat([own[view][part] for own in ranks]) for part in range(len(PARTS))] for view in (0, 1)]
    loss = module(views_of(images), 0.0)["loss"]
    loss.backward()
    losses, gradients = zip(*(result[dtype] for result in results["moco"]), strict=True)
    torch.testing.assert_close(sum(losses) / len(losses), loss.detach(), rtol=TOLERANCE[dtype], atol=0)
    # In float32 a matrix product rounds a row differently in another batch, block after block.
    tolerance = {f32: 1e-5, f64: 1e-12}[dtype]
    for actual in gradients:
        assert_equal_gradients(actual, trained_gradients(module), tolerance)


# ---------------------------------------------------------------- pretraining

PRETRAINING = [  # sampler, share, lambda, momentum keys
    ("d4_scale", 0.5, 1.0, False),
    ("d4_scale", 0.5, 1.0, True),
    ("crop", 0.5, 1.0, False),
    ("d4_scale", 0.5, 0.0, False),
    ("d4_scale", 0.0, 1.0, False),
]


@program
def pretraining() -> list[dict[str, Any]]:
    out = []
    for sampler, share, weight, momentum_keys in PRETRAINING:
        torch.manual_seed(11 + rank())  # DDP must start all ranks from rank 0's parameters
        config = TrainConfig(
            model=ModelConfig(split=2, **TINY),
            views=ViewsConfig(sampler=sampler, share=share),
            objective=MoCoV3Config(dim=8, mlp_dim=16),
        )
        options = {"ser.hidden_dim": 16, "ser.out_dim": 8, "ser.weight": weight, "ser.momentum_keys": momentum_keys}
        config = with_options(config, options)
        module = config.build()
        make_views = config.views.build(module.encoder.patch_size[0], seed=0)
        model = DistributedDataParallel(module)
        optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-3)
        vectors, lattices = [nn.utils.parameters_to_vector(module.parameters()).detach()], []
        for step in range(2):
            images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8, generator=seeded(12, rank(), step))
            views = make_views(images, torch.arange(4) + 4 * rank(), epoch=step)
            module.move_teacher(step / 2)
            optimizer.zero_grad()
            losses = model(views, step / 2)
            losses["loss"].backward()
            optimizer.step()
            vectors.append(nn.utils.parameters_to_vector(module.parameters()).detach())
            lattices.append([view.g.size_out for view in views.views])
        out.append({"vectors": vectors, "loss": losses["loss"].detach(), "lattices": lattices})
    return out


@pytest.mark.parametrize("index", range(len(PRETRAINING)), ids=["-".join(map(str, case)) for case in PRETRAINING])
def test_pretraining_keeps_the_ranks_alike(index: int, results: dict[str, list[Any]]) -> None:
    first, *others = (result[index] for result in results["pretraining"])
    for other in others:
        assert all(map(torch.equal, other["vectors"], first["vectors"]))
        assert other["loss"] != first["loss"]  # on images of its own
    assert torch.stack(first["vectors"]).isfinite().all()
    assert (torch.stack(first["vectors"]).diff(dim=0).abs().amax(1) > 1e-4).all()
    if PRETRAINING[index][:2] == ("d4_scale", 0.5):
        assert len({str(result[index]["lattices"]) for result in results["pretraining"]}) > 1
