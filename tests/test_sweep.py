"""Sweeps: which cells there are, what is trained and kept, and which differences are called more than chance."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases.command_line import refusal, rows, run_cli
from cases.runs import patterns
from scipy import stats

from ser_fast.evaluation import CONTROL
from ser_fast.evaluation.knn import SampledImages
from ser_fast.evaluation.scores import rankme, score_encoder
from ser_fast.sweep import runs
from ser_fast.sweep.analysis import cell_means, differences, judged, residual_deviation, shared_seeds
from ser_fast.sweep.cells import Cell, make_cells
from ser_fast.sweep.evaluation import SweepResult, run_sweep
from ser_fast.training.options import parse
from ser_fast.vit import SplitViT

TINY = [
    *("--model.name", "vit_tiny_patch16_224", "--model.split", "1", "--model.image-size", "32"),
    *("--model.patch-size", "8", "--model.depth", "2", "--model.embed-dim", "48", "--model.num-heads", "3"),
    *("--moco.dim", "16", "--moco.mlp-dim", "32", "--ser.hidden-dim", "32", "--ser.out-dim", "16"),
    *("--views.share", "0.5", "--optim.batch-size", "8", "--optim.steps", "2", "--device", "cpu", "--workers", "0"),
]
COUNTS = {"train": 12, "test": 8, "equivariance": 4}


def classes(folder: Path) -> str:
    """Two classes of six patterns, the same held out."""
    for part in ("train", "val"):
        for name in "ab":
            patterns(folder / part / name, 6)
    return f"folder:{folder}"


# ---------------------------------------------------------------- cells


def test_cells_are_all_combinations_and_those_named() -> None:
    cells = make_cells([["--ser.weight", "0", "1"], ["ser.layers", "1", "1,2"]], [["base"], ["far", "ser.layers=last"]])
    assert [cell.name for cell in cells] == [
        "ser.weight=0, ser.layers=1",
        "ser.weight=0, ser.layers=1,2",
        "ser.weight=1, ser.layers=1",
        "ser.weight=1, ser.layers=1,2",
        "base",
        "far",
    ]
    assert cells[3].arguments == ["--ser.weight", "1", "--ser.layers", "1", "2"]
    assert cells[4].arguments == []
    assert cells[5].arguments == ["--ser.layers", "last"]


def test_a_flag_is_true_or_false() -> None:
    (on, off) = make_cells([["views.share-color", "true", "False"]], [])
    assert on.arguments == ["--views.share-color"]
    assert off.arguments == ["--views.no-share-color"]
    assert make_cells([], [["a", "compile=false"]])[0].arguments == ["--no-compile"]
    options = [f"ser.both-directions={value}" for value in ("true", "False", "None")]
    cells = make_cells([], [[option, option, "compile=true"] for option in options])
    found = [parse([*TINY, *cell.arguments]).addons["ser"].both_directions for cell in cells]
    assert found == [True, False, None]


@pytest.mark.parametrize(
    ("varied", "named", "message"),
    [
        ([], [], "vary: got nothing"),
        ([["seed"]], [], "vary: got seed without a value"),
        ([], [["a", "ser.weight"]], "cell: got 'ser.weight' in a"),
        ([], [["a", "x=1"], ["a", "x=2"]], "cell: got the name a twice"),
        ([], [["a/b", "x=1"], ["a b", "x=2"]], "cell: got the folder a_b twice"),
    ],
)
def test_cells_that_do_not_fit_are_refused(varied: list[list[str]], named: list[list[str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_cells(varied, named)


# ---------------------------------------------------------------- what differences are worth


def blocks(cells: int, seeds: int, *, effect: float = 0.0, seed: int = 0) -> dict[str, dict[int, float]]:
    """Values with a large part of each seed, noise of deviation .1, and an effect of the last cell."""
    rng = np.random.default_rng(seed)
    of_seed = rng.normal(0, 10, seeds)
    noise = rng.normal(0, 0.1, (cells, seeds))
    noise[-1] += effect
    return {f"c{i}": dict(enumerate((of_seed + noise[i]).tolist())) for i in range(cells)}


def test_two_cells_are_the_paired_t_test() -> None:
    table = blocks(2, 5, effect=0.2)
    one, other = (list(table[cell].values()) for cell in ("c1", "c0"))
    expected = stats.ttest_rel(one, other).confidence_interval(0.95)
    found = differences(table, "c0", comparisons=1)["c1"]
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-12)


def test_the_residual_is_that_of_a_two_way_analysis() -> None:
    table = blocks(4, 3)
    values = np.array([list(of_cell.values()) for of_cell in table.values()])
    cell, seed = np.indices(values.shape)
    design = np.concatenate([np.eye(4)[cell.ravel()], np.eye(3)[seed.ravel()][:, 1:]], 1)
    _, squares, _, _ = np.linalg.lstsq(design, values.ravel(), rcond=None)
    deviation, freedom = residual_deviation(table)
    assert freedom == 12 - design.shape[1]
    assert deviation == pytest.approx(math.sqrt(squares[0] / freedom), rel=1e-9)


def test_intervals_hold_for_all_comparisons_together() -> None:
    wrong = 0
    for seed in range(400):
        tables = {name: blocks(6, 3, seed=10 * seed + i) for i, name in enumerate("xy")}
        found, comparisons = judged(tables, "c0")
        assert comparisons == 10
        wrong += any(value.excludes_zero for of_cell in found.values() for value in of_cell.values())
    assert wrong <= 400 * 0.05 + 2 * math.sqrt(400 * 0.05 * 0.95)
    assert wrong > 0  # nor are they endless


def test_an_effect_is_found_and_named() -> None:
    found = differences(blocks(6, 3, effect=1.0), "c0", comparisons=10)
    assert [cell for cell, value in found.items() if value.excludes_zero] == ["c5"]


def test_one_seed_gives_values_without_intervals() -> None:
    table = {"a": {0: 1.0}, "b": {0: 3.0}}
    found = differences(table, "a", comparisons=1)["b"]
    assert found.value == 2
    assert math.isnan(found.low)
    assert not found.excludes_zero
    assert math.isnan(cell_means(table)["a"].high)


def test_seeds_that_a_cell_lacks_are_left_out() -> None:
    table = {"a": {0: 1.0, 1: 2.0, 2: 9.0}, "b": {0: 2.0, 1: 3.0}, "c": {0: 0.0, 1: 1.0, 2: math.nan}}
    assert shared_seeds(table) == [0, 1]
    assert differences(table, "a", comparisons=2)["b"].value == 1


# ---------------------------------------------------------------- scores


def test_rankme_of_known_spectra() -> None:
    generator = torch.Generator().manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(40, 8, generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64))
    values = torch.tensor([4.0, 2, 1, 1, 0, 0, 0, 0], dtype=torch.float64)
    # The shares are 1/2, 1/4, 1/8 and 1/8: an entropy of 7/4 bits.
    assert rankme(left @ values.diag() @ right) == pytest.approx(2**1.75, rel=1e-9)
    assert rankme(left @ right) == pytest.approx(8, rel=1e-9)
    assert rankme(torch.ones(5, 3)) == pytest.approx(1, rel=1e-6)
    assert math.isnan(rankme(torch.zeros(5, 3)))


def test_scores_of_an_encoder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = SplitViT("vit_tiny_patch16_224", 1, img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3).train()
    images = SampledImages.open(classes(tmp_path), 32, **COUNTS)
    scores = {(record.measure, record.layer): record.value for record in score_encoder(model, images)}
    assert model.training
    assert scores["knn", 0] == 0.5  # 20 neighbors are all twelve, of which half are of each class, and ties fall alike
    assert {key for key in scores if key[1]} == {
        (measure, layer) for measure in ("d4_error", "scale_error", "retrieval") for layer in (1, 2)
    }
    assert 1 <= scores["rankme", 0] <= 8


# ---------------------------------------------------------------- sweeps


def test_a_sweep_goes_on_and_grows(tmp_path: Path) -> None:
    data = classes(tmp_path / "data")
    shared = [*TINY, "--data", data]
    out = tmp_path / "sweep"
    cells = make_cells([["ser.weight", "0", "2"]], [])
    first = run_sweep(out, shared, cells, seeds=1, **COUNTS)
    assert {(row.cell, row.seed) for row in first.rows} == {
        ("ser.weight=0", 0),
        ("ser.weight=2", 0),
        (CONTROL, 0),
    }
    assert SweepResult.read(out).rows == first.rows
    encoder = out / "runs" / "ser.weight=0" / "0" / "encoder.safetensors"
    before = encoder.stat().st_mtime_ns

    cells = make_cells([], [["last", "ser.layers=last"]]) + cells
    second = run_sweep(out, shared, cells, seeds=2, **COUNTS)
    assert len({(row.cell, row.seed) for row in second.rows}) == 3 * 2 + 2
    assert encoder.stat().st_mtime_ns == before  # what was there was not trained again
    assert [row for row in second.rows if row in first.rows] == first.rows
    assert list(second.options) == [cell.name for cell in cells]  # as they are named, whichever ended first
    lines = rows(out / "sweep.csv")
    assert {line["ser.weight"] for line in lines} == {"", "0", "2"}
    assert {line["ser.layers"] for line in lines} == {"", "last"}
    assert second.compared.keys() >= {"knn", "d4_error@1", "d4_error@2", "rankme"}
    # Trained two steps at lambda 0 and 2, runs of one seed differ, by little next to other seeds.
    table = second.table("d4_error@1")
    assert table["ser.weight=0"][0] != table["ser.weight=2"][0]
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "Differences from last" in page
    assert page.count("data:image/png;base64,") == 2

    with pytest.raises(ValueError, match="another equivariance; name another folder"):
        run_sweep(out, shared, cells, seeds=2, **COUNTS | {"equivariance": 3})


def test_a_run_that_fails_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    shared = [*TINY, "--data", classes(tmp_path / "data")]
    cells = make_cells([], [["wild", "optim.lr=1e30", "optim.clip-grad=0", "optim.warmup=0"], ["tame"]])
    result = run_sweep(tmp_path / "sweep", shared, cells, seeds=1, baseline="tame", **COUNTS)
    assert list(result.failed) == ["wild, seed 0"]
    assert "is nan" in result.failed["wild, seed 0"] or "is inf" in result.failed["wild, seed 0"]
    assert {row.cell for row in result.rows} == {"tame", CONTROL}
    assert any(line.startswith("failed: wild, seed 0") for line in result.words())


@pytest.mark.slow
def test_runs_in_processes_of_their_own_give_the_same(tmp_path: Path) -> None:
    shared = [*TINY, "--data", classes(tmp_path / "data")]
    cells = [Cell("base", ()), Cell("off", (("ser.weight", "0"),))]
    here = run_sweep(tmp_path / "here", shared, cells, seeds=1, **COUNTS)
    apart = run_sweep(tmp_path / "apart", shared, cells, seeds=1, processes=2, **COUNTS)

    def values(result: SweepResult) -> dict[tuple[str, str, int], float]:
        return {(row.cell, row.record.measure, row.record.layer): row.record.value for row in result.rows}

    assert values(apart) == pytest.approx(values(here), rel=1e-4)


def test_the_next_runs_start_before_those_that_ended_are_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, int]] = []
    sleeper = [sys.executable, "-c", "pass"]

    def start(run: Any, *_: object) -> "subprocess.Popen[bytes]":
        told.append(("start", run.seed))
        process = subprocess.Popen(sleeper)
        process.wait()
        return process

    monkeypatch.setattr(runs, "_start", start)
    planned = runs.plan_runs(tmp_path, TINY, [Cell("a", ())], seeds=4)
    runs.train_runs(planned, processes=2, finished=lambda run, _: told.append(("score", run.seed)))
    first = [("start", 0), ("start", 1), ("start", 2), ("start", 3), ("score", 0), ("score", 1)]
    assert told == [*first, ("score", 2), ("score", 3)]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    data = classes(tmp_path / "data")
    out = tmp_path / "sweep"
    counts = ["--train-images", "12", "--test-images", "8", "--images", "4"]
    run_cli("sweep", "--vary", "ser.weight", "0", "1", "--seeds", "1", "--out", out, *counts, *TINY, "--data", data)
    printed = capsys.readouterr().out
    assert "no cell differs by more than chance" in printed
    assert "\n ser.weight=1 " in printed  # a narrow terminal takes the numbers apart, not the names away
    assert "…" not in printed
    assert len({(line["cell"], line["seed"]) for line in rows(out / "sweep.csv")}) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "vary: got nothing"),
        (("--vary", "seed", "1", "2"), "cell: seed=1 changes seed, which the sweep decides"),
        (("--cell", "a", "--seeds", "0"), "seeds: got 0"),
        (
            ("--cell", "random crops", "--cell", "a", "ser.weight=0"),
            "cell: got 'random crops'; names that begin with 'random'",
        ),
        (("--cell", "a", "--baseline", "b"), "baseline: got 'b', takes one of a"),
        (("--cell", "a", "--layer", "3"), "layer: got 3, takes 1 to 2"),
        (("--cell", "a", "--images", "0"), "equivariance: got 0"),
    ],
)
def test_a_sweep_that_does_not_fit_is_refused_before_anything_is_made(
    tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    out = tmp_path / "sweep"
    assert message in refusal("sweep", *arguments, "--out", out, *TINY)
    assert not out.exists()
