"""Choosing launch configurations by measurement, with a clock of the test's own."""

import json

import pytest

pytest.importorskip("triton")

import triton

from ser_fast.kernels import configs, tune
from ser_fast.kernels.configs import Config, tuned, tuned_file, tuning_key


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SER_FAST_CACHE", str(tmp_path))
    tuned.cache_clear()
    yield
    tuned.cache_clear()


@pytest.fixture
def compiled(monkeypatch):
    """The tables, not the interpreter's own configurations."""
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)


def test_the_fastest_that_runs_is_kept():
    candidates = [Config({"BLOCK_M": size}, 4, 2) for size in (16, 32, 64, 128)]
    times = {16: 3.0, 32: 1.0, 128: 2.0}

    def measure(step):
        size = tuned()["kind"].tiles["BLOCK_M"]
        if size not in times:
            raise triton.runtime.errors.OutOfResources(1, 0, "shared memory")
        return times[size]

    assert tune.choose_fastest("kind", candidates, lambda: None, measure) == [3.0, 1.0, float("inf"), 2.0]
    assert tuned()["kind"] == candidates[1]


def test_launches_take_what_was_tuned_and_nothing_else(compiled):
    key, chosen = tuning_key("stationary_gradient", 90, 256), Config({"BLOCK_M": 64, "BLOCK_N": 16}, 4, 5)
    table = configs.stationary_config(90, 512)
    tuned_file().write_text(json.dumps({key: {"tiles": dict(chosen.tiles), "num_warps": 4, "num_stages": 5}}))
    tuned.cache_clear()
    assert configs.stationary_config(90, 256) == chosen
    assert configs.stationary_config(90, 512) == table
    assert configs.similarity_config(90) != chosen


def test_tuning_is_bounded_and_kept_for_the_next_process():
    steps = []

    def measure(step):
        steps.append(step)
        return 5.0 - (len(steps) in (3, 10))  # the third similarity tile, and a row block

    tried = tune.tune(8, 64, measure)
    assert len(steps) == len(tune.SIMILARITIES) + len(tune.STATIONARY) + 2
    kept = dict(tuned())
    assert kept[tuning_key("similarities", 90)] == tune.SIMILARITIES[1]
    assert kept[tuning_key("stationary_gradient", 90, 64)] == tune.STATIONARY[1]
    assert [len(taken) for taken in tried.values()] == [len(tune.SIMILARITIES) + 1, len(tune.STATIONARY) + 1]
    tuned.cache_clear()
    assert tuned() == kept
