"""`ser-fast plan`: its memory is what torch's allocator says of a real step, its work what is counted by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch
from cases.command_line import refusal, run_cli
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode

from ser_fast import group_action, nt_xent
from ser_fast.distributed import add_up, all_gather_rows, gather_counts, imagined_ranks, rank, world_size
from ser_fast.lattice import LatticeMap
from ser_fast.ops.nt_xent import info_nce
from ser_fast.training.config import TrainConfig, with_options
from ser_fast.training.options import parse
from ser_fast.training.plan import PlanConfig, expected_negatives, plan
from ser_fast.training.planned_step import Work, step_cost
from ser_fast.training.trainer import Trainer
from ser_fast.views.recipe import Views
from ser_fast.views.samplers import SAMPLERS, Crop, D4Scale, draws

TINY = [
    *("--model.name=vit_tiny_patch16_224", "--model.split=1", "--model.image-size=64", "--model.patch-size=8"),
    *("--model.embed-dim=96", "--model.depth=3", "--model.num-heads=3", "--views.share=0.5", "--canvas=80"),
    *("--ser.hidden-dim=128", "--ser.out-dim=128", "--optim.batch-size=24", "--optim.steps=3", "--workers=0"),
    "--device=cpu",
]
SMALL_HEAD = ["--moco.dim=64", "--moco.mlp-dim=256"]
CONFIGS = {
    "moco_v3": SMALL_HEAD,
    "bfloat16": [*SMALL_HEAD, "--amp=bf16", "--optim.batch-size=64"],
    "checkpointing": [
        *("--objective=barlow_twins", "--barlow.dim=512", "--barlow.mlp-dim=512", "--model.grad-checkpointing"),
        *("--equimod.layers=last", "--equimod.hidden-dim=256", "--augself.layers=last"),
    ],
    "dino": ["--objective=dino", "--dino.dim=4096", "--dino.mlp-dim=256", "--views.locals=2", "--essl.layers=last"],
    "exact": [
        *("--objective=simclr", "--simclr.mlp-dim=256", "--optim.accumulate=3"),
        *("--stl.layers=last", "--stl.transformation-dim=16"),
    ],
    "plain": [
        *("--objective=byol", "--byol.mlp-dim=256", "--byol.dim=64", "--ser.preset=released", "--ser.momentum-keys"),
        *("--views.sampler=crop", "--optim.accumulate=2", "--optim.accumulate-mode=plain"),
    ],
}
Sizes = tuple[tuple[int, int], tuple[int, int]]


def measured_peak(config: TrainConfig, canvas: int) -> tuple[int, Sizes]:
    """The most bytes that torch's allocator had given out during a second step, and the lattices of its views."""
    torch.manual_seed(0)
    batch = config.optim.batch_size
    lattices: list[Sizes] = []
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        images = torch.randint(256, (batch, 3, canvas, canvas), dtype=torch.uint8)
        trainer = Trainer(config, torch.device("cpu"))
        make_views: Any = trainer.make_views

        def watched(*arguments: Any) -> Views:
            views = make_views(*arguments)
            (h0, w0), (h1, w1) = (view.images[0].shape[2:] for view in views.views[:2])
            lattices.append(((h0 // 8, w0 // 8), (h1 // 8, w1 // 8)))
            return views

        trainer.make_views = watched  # type: ignore[assignment]
        trainer.step(0, 0, images, torch.arange(batch))
        lattices.clear()
        with record_function("second step"):
            trainer.step(1, 0, images, torch.arange(batch))
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    (step,) = (event for event in events if event.name() == "second step")
    changes = sorted(
        (event.start_ns(), i, event.nbytes()) for i, event in enumerate(events) if event.name() == "[memory]"
    )
    live = peak = 0
    for when, _, change in changes:
        live += change
        if step.start_ns() <= when <= step.end_ns():
            peak = max(peak, live)
    return peak, max(lattices, key=lambda sizes: sum(h * w for h, w in sizes))


@pytest.mark.parametrize(
    "name", [name if name == "moco_v3" else pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS]
)
def test_memory_is_what_the_allocator_says_within_15_percent(name: str, tmp_path: Path) -> None:
    config = parse([*TINY, *CONFIGS[name], f"--out={tmp_path}/run"])
    measured, lattices = measured_peak(config, canvas=80)
    amp = torch.bfloat16 if config.amp == "bf16" else None
    planned = step_cost(config, canvas=80, lattices=lattices, amp=amp).peak
    assert 0.85 * measured < planned < 1.15 * measured


def test_storages_are_followed_to_their_end() -> None:
    with Work() as work:
        x = torch.ones(1000)
        views = x[:10], x.view(10, 100)
        assert work.live == 4000
        del x
        assert work.live == 4000
        del views
        assert work.live == 0
        torch.ones(10)
    assert work.peak == 4000


def encoder_flops(tokens: int, dim: int, depth: int, patch: int) -> int:
    """Forward, by hand: the products of the blocks (4 C^2 of attention, 8 C^2 of the MLP) and the patch embedding."""
    linear, attention = 2 * 12 * dim**2 * tokens, 2 * 2 * tokens**2 * dim
    return depth * (linear + attention) + 2 * 3 * patch**2 * dim * tokens


def test_work_is_that_of_the_products() -> None:
    options = ["--objective=barlow_twins", "--barlow.dim=32", "--barlow.mlp-dim=32", "--views.share=0"]
    config = parse([*TINY, *options, "--model.split=3"])  # [CLS] enters after the blocks: 64 tokens everywhere
    cost = step_cost(config, canvas=80, lattices=((8, 8), (8, 8)))
    head = 24 * 2 * (96 * 32 + 32 * 32 + 32 * 32)
    once = 2 * (24 * encoder_flops(64, 96, 3, 8) + head)
    attention = 3 * 2 * 24 * 2 * 2 * 64**2 * 96
    first = 2 * 24 * 2 * 3 * 64 * 96 * 64  # images have no gradient
    correlation = 3 * 2 * 32 * 32 * 24  # of two views, and back to each
    # Backward has two products for each of forward's, and the scores of attention once more.
    assert cost.flops == 3 * once - first + attention // 2 + correlation
    assert cost.half_flops == 0


def test_operators_have_formulas() -> None:
    z0, z1 = torch.randn(2, 20, 8, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        nt_xent(z0, z1, temperature=0.3).backward()
    assert counter.get_total_flops() == 4 * 40 * 40 * 8
    with FlopCounterMode(display=False) as counter:
        nt_xent(z0, z1, temperature=0.3, memory_budget=1 << 20).backward()
    assert counter.get_total_flops() == 3 * 40 * 40 * 8
    with FlopCounterMode(display=False) as counter:
        info_nce(z0, torch.cat([z1, z0.detach()]), temperature=0.3).backward()
    assert counter.get_total_flops() == 4 * 2 * 20 * 40 * 8
    with FlopCounterMode(display=False) as counter:
        info_nce(z0, torch.cat([z1, z0]).detach(), temperature=0.3).backward()
    assert counter.get_total_flops() == 2 * 2 * 20 * 40 * 8
    x = torch.randn(2, 4, 5, 8, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        group_action(x, LatticeMap.resize((4, 5), (3, 6), batch=2)).sum().backward()
    assert counter.get_total_flops() == 2 * 2 * (2 * 3 * 6 * 8) * 16


@pytest.mark.parametrize("sampler", ["d4_scale", "affine", "crop"])
def test_negatives_are_the_mean_over_the_draws(sampler: str) -> None:
    config = with_options(parse(TINY), {"views.sampler": sampler, "optim.batch_size": 20})
    make: Any = Crop(turns=True) if sampler == "crop" else SAMPLERS[sampler]()
    u = [draws(1, 0, torch.arange(1500), view) for view in (0, 1)]
    if isinstance(make, D4Scale):  # a batch shares its lattice: a map for each draw
        sizes = [make((64, 64), 8, row[None], 1).size_out for row in u[1]]
        tokens = sum((height // 8) * (width // 8) for height, width in sizes) / len(sizes)
    else:
        g0, g1 = (make((64, 64), 8, rows, view) for view, rows in enumerate(u))
        tokens = float(LatticeMap.relative(g0, g1).on((8, 8), (8, 8)).valid().double().sum(1).mean())
    negatives = expected_negatives(config)
    assert negatives is not None
    assert negatives == pytest.approx(2 * 9 * tokens, rel=0.03)  # both views of nine other images


def test_negatives_follow_the_options() -> None:
    config = with_options(parse(TINY), {"views.sampler": "crop", "optim.batch_size": 40})
    both = expected_negatives(config)
    assert both is not None
    alone = both / (2 * 19)  # tokens of one image that have a partner
    assert expected_negatives(with_options(config, {"ser.negatives": "other"})) == pytest.approx(19 * alone)
    assert expected_negatives(with_options(config, {"ser.momentum_keys": True})) == pytest.approx(19 * alone)
    assert expected_negatives(config, ranks=4) == pytest.approx(both)
    assert expected_negatives(with_options(config, {"ser.gather": False}), ranks=4) == pytest.approx(2 * 4 * alone)
    parts = {"optim.accumulate": 2, "optim.accumulate_mode": "plain"}
    assert expected_negatives(with_options(config, parts)) == pytest.approx(2 * 9 * alone)
    # 640 of 1280 pairs: of 639 others, 1216 in 1279 are of another image.
    sampled = expected_negatives(with_options(config, {"ser.max_tokens": 640}))
    assert sampled == pytest.approx(2 * alone / 64 * 639 * 1216 / 1279)
    assert expected_negatives(with_options(config, {"views.share": 0})) is None


def test_imagined_ranks_have_what_this_one_has_and_exchange_nothing() -> None:
    rows = torch.ones(2, 3, requires_grad=True)
    with imagined_ranks(3):
        assert (rank(), world_size(), gather_counts(2, rows.device)) == (0, 3, [2, 2, 2])
        gathered = all_gather_rows(rows, [2, 2, 2])
        assert gathered.shape == (6, 3)
        gathered.sum().backward()
        add_up(rows)
    assert rows.grad is not None
    assert rows.grad.shape == rows.shape
    assert world_size() == 1


def test_a_plan_over_batches_and_ranks() -> None:
    config = parse([*TINY, *SMALL_HEAD, "--optim.accumulate-mode=plain", "--views.sampler=crop"])
    peaks: dict[str, Any] = {"tflops": 2.0, "single_tflops": 1e-3, "bandwidth": 1e6}
    options = PlanConfig(batch=(24, 48), pictures=480, memory=1.0, **peaks)
    one, two = plan(with_options(config, {"amp": "off"}), options)
    assert (one.batch, two.batch) == (24, 48)
    # More than twice: the similarities of float32 tokens are multiplied in panels, here the whole matrix.
    assert one.cost.activations < two.cost.activations < 2.5 * one.cost.activations
    assert one.cost.half_flops == 0
    assert one.seconds == pytest.approx(one.cost.single_flops / 1e9)
    assert one.images_per_second == pytest.approx(24 / one.seconds)
    assert one.hours == pytest.approx(3 * one.seconds / 3600)
    assert one.fits
    config = with_options(config, {"model.pretrained": "timm"})  # whose weights nothing asks for
    (slow,) = plan(config, PlanConfig(batch=(24,), pictures=480, memory=0.01, tflops=1e6, bandwidth=1.0, ranks=2))
    assert slow.cost.half_flops > 0
    assert slow.seconds == pytest.approx(slow.cost.traffic / 1e9)
    assert not slow.fits
    assert slow.cost.activations < 0.6 * one.cost.activations
    # A rank's tokens find those of both ranks.
    assert slow.negatives == pytest.approx(one.negatives)


def test_the_command_prints_the_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    run_cli("plan", *TINY, *SMALL_HEAD, "--views.sampler=crop", "--plan.pictures=100", "--plan.memory=0.01")
    printed = capsys.readouterr().out
    header, row = (words for words in map(str.split, printed.splitlines()) if words[:1] in (["batch"], ["24"]))
    assert header == [
        "batch",
        "share",
        "parts",
        "peak",
        "activations",
        "TFLOP",
        "negatives",
        "images/s",
        "hours",
        "fits",
    ]
    assert row[:3] == ["24", "0.5", "1"]
    assert row[-1] == "no"
    assert len(row) == len(header)
    assert "…" not in printed
    assert "moco_v3 + ser, on 1 x h100-sxm" in printed


def test_no_step_an_epoch_is_named() -> None:
    config = with_options(parse(TINY), {"optim.steps": None})
    with pytest.raises(ValueError, match=r"^optim.batch_size: got 24 with 23 pictures, which is no step an epoch$"):
        plan(config, PlanConfig(pictures=23))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--plan.device=a100", "plan.device: got 'a100', takes one of 'h100-sxm', 'h200', 'a100-80', '4090', 'cpu'"),
        ("--plan.bandwidth=0", "plan.bandwidth: got 0, takes a finite number above 0"),
        ("--plan.ranks=0", "plan.ranks: got 0, takes a positive number"),
        ("--plan.pictures=0", "plan.pictures: got 0, takes a positive number"),
        ("--plan.batch=25", "optim.batch_size: 25 is no multiple of 1 ranks x optim.accumulate 2"),
        ("--plan.share=2", "views.share: got 2, takes a number in [0, 1]"),
    ],
)
def test_what_does_not_fit_is_named_in_one_line(option: str, message: str) -> None:
    assert refusal("plan", *TINY, "--optim.accumulate=2", option) == message
