"""Where a run is drawn besides its log: Weights & Biases, in its offline mode and in place of it."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from cases.command_line import refusal
from cases.runs import ENVIRONMENT, patterns, read_log, tiny_config

from ser_fast.training.config import TrainConfig, to_json, with_options
from ser_fast.training.run_folder import RunFolder
from ser_fast.training.trainer import NonFiniteLossError, train


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return patterns(tmp_path_factory.mktemp("images"), 16)


@pytest.fixture
def config(data: str, tmp_path: Path) -> TrainConfig:
    return replace(tiny_config(tmp_path / "runs" / "one", data), log=("wandb",))


class FakeRun:
    """Records what is asked of a run of Weights & Biases."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.metrics: list[tuple[str, str | None]] = []
        self.history: list[dict[str, float]] = []
        self.statuses: list[int] = []

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.metrics.append((name, step_metric))

    def log(self, values: dict[str, float]) -> None:
        assert not self.statuses
        self.history.append(values)

    def finish(self, exit_code: int) -> None:
        self.statuses.append(exit_code)


class FakeWandb(ModuleType):
    Error = type("Error", (Exception,), {})

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = ModuleSpec("wandb", None)
        self.runs: list[FakeRun] = []
        self.fails = ""

    def Settings(self, **options: Any) -> dict[str, Any]:
        return options

    def init(self, **options: Any) -> FakeRun:
        if self.fails:
            raise self.Error(self.fails)
        self.runs.append(FakeRun(options))
        return self.runs[-1]


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return fake


def logged(out: Path, steps: slice = slice(None)) -> list[dict[str, float]]:
    """The log as a board has it."""
    return [{name: value for name, value in line.items() if name != "epoch"} for line in read_log(out)[steps]]


def test_a_resumed_run_goes_on_in_the_same_run(wandb: FakeWandb, config: TrainConfig) -> None:
    train(config)
    train(with_options(config, {"optim.steps": 3, "resume": "auto"}))
    first, second = wandb.runs
    assert first.history == logged(config.out, slice(0, 2))
    assert second.history == logged(config.out, slice(2, 3))
    assert first.options["id"] == second.options["id"]
    assert first.options["resume"] == second.options["resume"] == "allow"
    assert first.metrics == [("step", None), ("*", "step")]
    assert (first.statuses, second.statuses) == ([0], [0])
    assert (first.options["project"], first.options["name"]) == ("ser-fast", "runs/one")
    assert first.options["dir"] == str(config.out)
    assert first.options["config"] == to_json(config)
    assert not (config.out / "tensorboard").exists()  # which was not asked for


def test_other_runs_are_other_runs(wandb: FakeWandb, config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    train(config)
    train(replace(config, out=config.out.parent / "other", log=("tensorboard", "wandb")))
    assert len({run.options["id"] for run in wandb.runs}) == 2
    assert {run.options["project"] for run in wandb.runs} == {"mine"}
    assert list((config.out.parent / "other" / "tensorboard").iterdir())


def test_a_run_that_fails_is_marked_as_failed(wandb: FakeWandb, config: TrainConfig) -> None:
    with pytest.raises(NonFiniteLossError):
        train(with_options(config, {"optim.lr": 1e30, "optim.warmup": 0.0, "optim.clip_grad": 0.0}))
    assert wandb.runs[0].statuses == [1]


def test_every_board_is_closed_whichever_fails(tmp_path: Path) -> None:
    closed = []

    class Board:
        def __init__(self, name: str) -> None:
            self.name = name

        def write(self, step: int, values: object) -> None: ...

        def close(self, status: int) -> None:
            closed.append((self.name, status))
            raise OSError(self.name)

    with pytest.raises(OSError, match="first"), RunFolder(tmp_path).open_log(0, [Board("first"), Board("second")]):
        raise SystemExit
    assert closed == [("second", 0), ("first", 0)]


def test_a_run_that_is_stopped_says_by_what(
    wandb: FakeWandb, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ser_fast.training.trainer.gather_counts", lambda count, device: [2])  # as after Ctrl-C
    with pytest.raises(SystemExit):
        train(config)
    assert wandb.runs[0].statuses == [130]
    assert len(wandb.runs[0].history) == 1


def test_a_run_without_a_login_says_how(wandb: FakeWandb, config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[int] = []
    monkeypatch.setattr("ser_fast.training.boards.TensorBoard.close", lambda board, status: closed.append(status))
    wandb.fails = "No API key configured.\nUse `wandb login`."
    said = "No API key configured. Use `wandb login`."
    with pytest.raises(ValueError, match="Weights") as refused:
        train(replace(config, log=("tensorboard", "wandb")))
    assert str(refused.value) == f"log: Weights & Biases can't begin: {said}; WANDB_MODE=offline needs no login"
    assert closed == [1]
    wandb.fails = ""
    train(config)  # nothing was begun


def test_a_package_that_is_missing_is_named_before_any_work(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    line = "wandb is not installed, which this command takes: pip install 'ser-fast[wandb]'"
    assert refusal("train", "--out", config.out, "--data", "folder:nowhere", "--log", "wandb") == line
    assert not config.out.parent.exists()


def test_a_board_that_is_none_is_named(config: TrainConfig) -> None:
    wrong: Any = ("tensorbord",)
    with pytest.raises(ValueError, match=r"^log: got 'tensorbord', takes 'tensorboard' and 'wandb'$"):
        train(replace(config, log=wrong))
    assert not config.out.exists()


# ---------------------------------------------------------------- the real one


def records(path: Path) -> Iterator[Any]:
    """What a .wandb file holds: records of protobuf in the chunks of LevelDB's logs, after a head of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, block = path.read_bytes(), 2**15
    assert data[:4] == b":W&B"
    position, parts = 7, b""
    while position + 7 <= len(data):
        left = block - position % block
        if left < 7:  # the end of a block, too small for a chunk's head
            position += left
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""


@pytest.mark.slow
def test_an_offline_run_is_written_and_goes_on(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    train(config)
    train(with_options(config, {"optim.steps": 3, "resume": "auto"}))
    import wandb

    wandb.teardown()  # waits for the process that writes the files: `finish` returns before they are whole
    history, ids, statuses = [], set(), []
    for path in sorted(config.out.glob("wandb/offline-run-*/*.wandb")):
        for record in records(path):
            kind = record.WhichOneof("record_type")
            if kind == "history":
                values = {
                    (item.key or ".".join(item.nested_key)): json.loads(item.value_json) for item in record.history.item
                }
                history.append({name: value for name, value in values.items() if not name.startswith("_")})
            elif kind == "run":
                ids.add(record.run.run_id)
            elif kind == "exit":
                statuses.append(record.exit.exit_code)
    assert history == logged(config.out)
    assert [line["step"] for line in history] == [1, 2, 3]
    assert ids == {(config.out / "wandb" / "id").read_text()}
    assert statuses == [0, 0]


FAKE = """
import importlib.machinery, pathlib, os
Error = type("Error", (Exception,), {})
def Settings(**options): pass
class Run:
    def define_metric(self, *_, **__): pass
    def log(self, values):
        with open(os.environ["FAKE_WANDB"], "a") as file:
            print(os.environ["RANK"], values["step"], file=file)
    def finish(self, exit_code): pass
def init(**options): return Run()
"""


@pytest.mark.slow
def test_one_rank_logs(config: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "wandb.py").write_text(FAKE)
    program = tmp_path / "program.py"
    program.write_text(
        "import json, sys\n"
        "from ser_fast.training.config import from_json\n"
        "from ser_fast.training.trainer import train\n"
        "train(from_json(json.loads(sys.argv[1])))\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)]
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    environment = ENVIRONMENT | {"PYTHONPATH": path, "FAKE_WANDB": str(tmp_path / "calls")}
    subprocess.run([*launch, json.dumps(to_json(config))], env=environment, capture_output=True, check=True)
    assert (tmp_path / "calls").read_text().splitlines() == ["0 1", "0 2"]
