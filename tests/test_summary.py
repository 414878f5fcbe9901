"""What a training prints of itself."""

import io
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from ser_fast import progress
from ser_fast.training import summary
from ser_fast.training.config import ModelConfig, OptimConfig, TrainConfig
from ser_fast.training.options import parse
from ser_fast.training.recipes import demo_recipes
from ser_fast.training.summary import SMALL, Pace, summarize

TINY = ModelConfig(
    name="vit_tiny_patch16_224", image_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, split=1
)


def printed(*, terminal: bool, seconds: float, monkeypatch: pytest.MonkeyPatch, steps: int = 100) -> list[str]:
    """The lines of 10 steps that take so long each."""
    clock = iter(range(1000))
    monkeypatch.setattr(summary.time, "perf_counter", lambda: next(clock) * seconds)
    console = Console(file=io.StringIO(), force_terminal=terminal, width=40)
    pace = Pace(console, steps=steps, start=0, batch_size=32, device=torch.device("cpu"))
    for step in range(1, 11):
        pace.after(step, f"loss {step}")
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def test_the_pace_is_told_once_some_steps_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    (line,) = printed(terminal=True, seconds=2, monkeypatch=monkeypatch)
    assert line.startswith("16 pictures a second: 0:03:12 to go, until 2")
    assert line.endswith("GiB at its peak")


def test_progress_is_printed_where_nobody_watches_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = printed(terminal=False, seconds=10, monkeypatch=monkeypatch)
    told = [line for line in lines if line.startswith("step ")]
    assert [line.split("  ")[:2] for line in told] == [["step 4 of 100", "loss 4"], ["step 8 of 100", "loss 8"]]
    last = printed(terminal=False, seconds=0.1, monkeypatch=monkeypatch, steps=10)[-1]
    assert last == "step 10 of 10  loss 10  320 pictures a second, 0:00:00 to go"


def test_the_summary_says_what_is_trained_on_what_and_at_which_rate() -> None:
    config = TrainConfig(model=TINY, optim=OptimConfig(batch_size=32, lr=3e-4))
    model = config.build()
    lines = summarize(config, model, pictures=64, canvas=55, steps=4, device="cpu").splitlines()
    assert lines[0].startswith("model: vit_tiny_patch16_224 at 32 pixels")
    assert lines[0].endswith("; moco_v3 + ser")
    assert lines[1] == "data: 64 pictures of photos, canvas 55 pixels"
    assert lines[2] == "steps: 4 of 32 pictures, 3 of them for equivariance (2 epochs)"
    assert lines[3] == "learning rate: 3.75e-05 at its peak, optim.lr 0.0003 x batch size 32 / 256"
    assert len(lines) == 5


def test_days_on_a_cpu_are_told_before_they_pass() -> None:
    config = TrainConfig(model=TINY)
    model = config.build()
    long = replace(config, optim=OptimConfig(steps=10**8))
    note = summarize(long, model, pictures=64, canvas=55, steps=10**8, device="cpu").splitlines()[-1]
    assert note.startswith("note: on this CPU that takes in the order of ")
    assert note.endswith(f"; in minutes: {SMALL}, or: ser-fast demo")
    assert "note:" not in summarize(long, model, pictures=64, canvas=55, steps=10**8, device="cuda")
    short = summarize(long, model, pictures=64, canvas=55, steps=10**5, device="cpu").splitlines()[-1]
    assert "hours; in minutes: " in short


def test_the_small_training_is_one_of_the_demos() -> None:
    """Whose times are known; every option of the line is one that the command takes."""
    program, command, *options = shlex.split(SMALL)
    assert (program, command) == ("ser-fast", "train")
    config = parse(options)
    demos = demo_recipes(Path("runs"), data="photos", steps=60, seed=0)["ser"]
    assert replace(config, out=demos.out, resume=demos.resume) == demos
    model = config.build()
    assert "note:" not in summarize(config, model, pictures=3752, canvas=64, steps=60, device="cpu")


def test_long_work_tells_on_stderr_how_far_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr(progress.time, "monotonic", lambda: 10 * next(clock))
    assert list(progress.track(range(5), "counting", show=True)) == [0, 1, 2, 3, 4]
    assert list(progress.track(iter("ab"), "reading", show=True)) == ["a", "b"]
    assert list(progress.track(range(5), "silent", show=False)) == [0, 1, 2, 3, 4]
    told = capsys.readouterr()
    assert told.err.splitlines() == ["counting: 1 of 5", "counting: 3 of 5", "reading: 1"]
    assert told.out == ""
