"""Scores while an encoder trains: in its log, of the weights of that step, within the share of time that is asked."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from cases.runs import CPU, patterns, read_log, tiny_config

from ser_fast.evaluation.knn import SampledImages
from ser_fast.evaluation.scores import score_encoder
from ser_fast.training import monitor
from ser_fast.training.config import EvaluateConfig, TrainConfig
from ser_fast.training.monitor import PREFIX, Monitor
from ser_fast.training.trainer import train
from ser_fast.vit import load_split_vit

OPTIONS = EvaluateConfig(every=2, share=1, train=8, test=6, equivariance=3)


def config(tmp_path: Path, **changes: object) -> TrainConfig:
    for part in ("train", "val"):
        for name in "ab":
            patterns(tmp_path / "data" / part / name, 6)
    base = tiny_config(tmp_path / "run", f"folder:{tmp_path / 'data'}")
    return replace(base, optim=replace(base.optim, steps=3), evaluate=OPTIONS, **changes)


def scores(records: list[dict[str, float]]) -> list[tuple[int, set[str]]]:
    return [(int(r["step"]), found) for r in records if (found := {name for name in r if name.startswith(PREFIX)})]


def test_scores_are_in_the_log_and_change_no_number(tmp_path: Path) -> None:
    with_scores = config(tmp_path)
    train(with_scores)
    log = read_log(with_scores.out)
    names = {"knn", "rankme", "d4_error@1", "scale_error@1", "retrieval@1", "seconds"}
    assert scores(log) == [(step, {PREFIX + name for name in names}) for step in (2, 3)]  # and after the last step
    images = SampledImages.open(with_scores.data, 32, train=8, test=6, equivariance=3)
    last = score_encoder(load_split_vit(with_scores.out / "encoder.safetensors"), images)
    for record in last:
        if record.layer in (0, 1):
            name = PREFIX + record.measure + (f"@{record.layer}" if record.layer else "")
            assert log[-1][name] == pytest.approx(record.value, rel=1e-5)

    without = replace(with_scores, out=tmp_path / "without", evaluate=EvaluateConfig())
    train(without)
    assert [r["loss"] for r in read_log(without.out)] == [r["loss"] for r in log]
    assert scores(read_log(without.out)) == []
    # And a run goes on with other scores than it began with.
    longer = replace(with_scores, resume="auto", evaluate=replace(OPTIONS, every=1, test=4))
    train(replace(longer, optim=replace(longer.optim, steps=4)))
    assert scores(read_log(with_scores.out))[-1][0] == 4


def test_an_evaluation_that_would_take_too_much_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def score(*_: object) -> list[object]:
        nonlocal now
        now += 10  # seconds that an evaluation takes
        return []

    monkeypatch.setattr(monitor, "score_encoder", score)
    settings = config(tmp_path)
    settings = replace(settings, evaluate=replace(OPTIONS, every=1, share=0.1))
    watch = Monitor(settings, settings.build().to(CPU), clock=lambda: now)
    looked = []
    for step in range(1, 301):
        now += 1  # a step takes one
        if watch.after(step, steps=300):
            looked.append(step)
    # 10 s of each 100: the first at once, for nothing is known of its length, then a tenth of the time.
    assert looked[0] == 1
    assert looked[-1] == 300
    assert len(looked) <= 5
    assert watch.spent <= 0.1 * now + 20


def test_options_are_written_and_read(tmp_path: Path) -> None:
    settings = config(tmp_path)
    train(settings)
    assert json.loads((settings.out / "config.json").read_text())["evaluate"]["every"] == 2
