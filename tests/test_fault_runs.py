"""Runs that are killed or stopped, anywhere, go on to the bits of a run that was not."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cases.fork_server import ForkServer
from cases.runs import CPU, patterns, read_log, tiny_config
from safetensors.torch import load_file

from ser_fast.training.config import TrainConfig, to_json, with_options
from ser_fast.training.run_folder import RunFolder, load_checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    server = ForkServer()
    yield server
    server.close()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """Of a run of 5 steps, two epochs, with a checkpoint every 2 of which one is kept."""
    folder = tmp_path_factory.mktemp("runs")
    data = patterns(folder / "images", 12)
    options = {"optim.steps": 5, "optim.batch_size": 4, "save_every": 2, "keep_checkpoints": 1, "resume": "auto"}
    return with_options(tiny_config(folder / "straight", data), options)


def assert_same_end(out: Path, straight: Path) -> None:
    """Weights, state of the optimizer, encoder and losses are those of the other run, and nothing else is left."""
    for path, other in zip(RunFolder(out).list_checkpoints(), RunFolder(straight).list_checkpoints(), strict=True):
        ours, theirs = load_checkpoint(path, CPU), load_checkpoint(other, CPU)
        for part in ("step", "model", "optimizer"):
            torch.testing.assert_close(ours[part], theirs[part], rtol=0, atol=0, equal_nan=True)
    ours, theirs = load_file(RunFolder(out).encoder), load_file(RunFolder(straight).encoder)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    measured = ("images_per_s", "peak_memory_mib")
    rows = [[{k: v for k, v in row.items() if k not in measured} for row in read_log(run)] for run in (out, straight)]
    assert rows[0] == rows[1]
    assert not list(out.rglob("*.partial"))


@pytest.fixture(scope="module")
def straight(server: ForkServer, config: TrainConfig) -> Path:
    ((status, said),) = server.run(to_json(config))
    assert status == 0, said
    return config.out


def test_killed_at_random_moments(server: ForkServer, config: TrainConfig, straight: Path, tmp_path: Path) -> None:
    ((_, said),) = server.run(to_json(replace(config, out=tmp_path / "counted")), {"kill": 0})
    calls = int(said.split()[-1])
    for number, moment in enumerate(np.random.default_rng(0).integers(1, calls, 20)):
        run = to_json(replace(config, out=tmp_path / f"run_{number}"))
        assert server.run(run, {"kill": int(moment)})[0].status == -9
        ((status, said),) = server.run(run)
        assert status == 0, said
        assert_same_end(Path(run["out"]), straight)


def test_killed_at_every_point_of_a_save(
    server: ForkServer, config: TrainConfig, straight: Path, tmp_path: Path
) -> None:
    counted = replace(config, out=tmp_path / "counted")
    ((_, said),) = server.run(to_json(counted), {"kill_in_save": 0, "step": 4})
    points = int(said.split()[-1])
    assert points > 10
    for point in range(1, points + 1):
        run = to_json(replace(config, out=tmp_path / f"run_{point}"))
        assert server.run(run, {"kill_in_save": point, "step": 4})[0].status == -9
        ((status, said),) = server.run(run)
        assert status == 0, said
        assert_same_end(Path(run["out"]), straight)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_of_which_one_is_killed(server: ForkServer, config: TrainConfig, tmp_path: Path, ranks: int) -> None:
    config = with_options(config, {"optim.batch_size": 6, "out": tmp_path / "straight", "optim.steps": 4})
    assert [status for status, _ in server.run(to_json(config), ranks=ranks)] == [0] * ranks
    ended = server.run(to_json(replace(config, out=tmp_path / "counted")), {"kill": 0, "rank": 1}, ranks=ranks)
    calls = int(ended[1].said.split()[-1])
    for killed, moment in enumerate(np.random.default_rng(ranks).integers(calls // 3, calls, 3)):
        run = to_json(replace(config, out=tmp_path / f"run_{killed}"))
        ended = server.run(run, {"kill": int(moment), "rank": killed % ranks}, ranks=ranks)
        assert ended[killed % ranks].status == -9
        ended = server.run(run, ranks=ranks)
        assert [status for status, _ in ended] == [0] * ranks, ended
        assert_same_end(Path(run["out"]), config.out)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_rank_is_named(server: ForkServer, config: TrainConfig, tmp_path: Path, rank: int) -> None:
    run = to_json(with_options(config, {"out": tmp_path / "run", "optim.batch_size": 6, "rank_timeout": 12.0}))
    ended = server.run(run, {"stop": 3, "rank": rank}, ranks=3)
    assert ended[rank].status == -9
    missing = "rank 0, or the machine that the ranks met on, does not answer" if rank == 0 else "rank 1 does not answer"
    for other in {0, 1, 2} - {rank}:
        assert ended[other].status == 1
        line = ended[other].said.splitlines()[-1]
        assert f"ranks: {missing}" in line
    assert [path.name for path in RunFolder(tmp_path / "run").list_checkpoints()] == ["step_00000002.pt"]


def test_a_full_disk_is_named_with_the_file(server: ForkServer, config: TrainConfig, tmp_path: Path) -> None:
    """A file of the size of a checkpoint can't be written, and log and checkpoint before it stay as they were."""
    config = replace(config, out=tmp_path / "run")
    assert server.run(to_json(with_options(config, {"optim.steps": 2})))[0].status == 0
    (first,) = RunFolder(config.out).list_checkpoints()
    ((status, said),) = server.run(to_json(config), {"largest_file": first.stat().st_size - 1000})
    assert status == 1
    assert re.fullmatch(
        rf"OSError: {config.out}/checkpoints/step_00000004\.pt can't be written: .* \(\d+ MiB are free there\)",
        said.splitlines()[-1],
    )
    assert RunFolder(config.out).list_checkpoints() == [first]
    assert not list(config.out.rglob("*.partial"))
    assert server.run(to_json(config))[0].status == 0
    assert [line["step"] for line in read_log(config.out)] == [1, 2, 3, 4, 5]
