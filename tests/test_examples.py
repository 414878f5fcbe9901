"""The programs in examples/, each a few steps long as a user would start it."""

import math
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cases.runs import ENVIRONMENT, patterns

from ser_fast import SERLoss

EXAMPLES = Path(__file__).parents[1] / "examples"
TRAIN = {
    "own_loop": ["3"],
    "lightning_module": ["--steps", "3"],
    "lightly_moco": ["--steps", "3"],
    "hugging_face": ["--steps", "3"],
    "resnet_features": ["--steps", "3"],
    "two_processes": ["--steps", "3"],
}


def losses_in(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"^step \d+: loss (\S+?),?(?: |$)", text, re.MULTILINE)]


def run_example(name: str, *arguments: str) -> None:
    """Run it in this process, whose imports it shares."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{name}.py", *arguments])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[SERLoss]:
    """The modules that were called."""
    modules: list[SERLoss] = []
    forward = SERLoss.forward

    def recorded(self: SERLoss, *arguments: Any, **options: Any) -> Any:
        modules.append(self)
        return forward(self, *arguments, **options)

    monkeypatch.setattr(SERLoss, "forward", recorded)
    return modules


def test_every_example_is_run_and_described() -> None:
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == {*TRAIN, "operations"}
    page = (EXAMPLES.parent / "docs" / "in_your_loop.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\(\.\./examples/(\w+)\.py\)", page)) == names


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "more"), [*((name, []) for name in TRAIN), ("hugging_face", ["--model", "vit"])], ids=str
)
def test_an_example_trains_the_projector(
    name: str, more: list[str], used: list[SERLoss], capsys: pytest.CaptureFixture[str]
) -> None:
    run_example(name, *TRAIN[name], *more)
    losses = losses_in(capsys.readouterr().out)
    assert len(losses) == (2 if name == "own_loop" else 3)  # which prints every tenth, and the last
    assert all(map(math.isfinite, losses))
    (ser,) = set(used)
    assert len(used) == 3
    for parameter in ser.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
        assert parameter.grad.norm() > 0


def test_the_bare_loop_is_short() -> None:
    assert len((EXAMPLES / "own_loop.py").read_text().splitlines()) <= 60


@pytest.mark.slow
def test_an_example_takes_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_example("two_processes", "--data", patterns(tmp_path / "photographs", 20), "--steps", "1")
    assert len(losses_in(capsys.readouterr().out)) == 1


@pytest.mark.slow
def test_two_processes_train_as_one_does(capsys: pytest.CaptureFixture[str]) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [sys.executable, *torchrun, str(EXAMPLES / "two_processes.py"), *TRAIN["two_processes"]]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    run_example("two_processes", *TRAIN["two_processes"])
    ours = losses_in(capsys.readouterr().out)
    assert losses_in(done.stdout) == pytest.approx(ours, abs=1e-4)
    assert len(set(ours)) == 3  # a step changes the loss by more than that


@pytest.mark.slow
def test_the_operations_alone_are_exact_and_compile(capsys: pytest.CaptureFixture[str]) -> None:
    run_example("operations", "--backend", "aot_eager")
    turns, crops, plain, compiled = capsys.readouterr().out.splitlines()
    assert turns == "quarter turns: differ from torch.rot90 by 0"
    assert 50 < float(re.search(r"(\d+)% of the tokens", crops)[1]) < 100
    assert re.search(r"loss (\S+),", plain)[1] == re.search(r"loss (\S+),", compiled)[1]
    assert float(compiled.rpartition(" ")[2]) < 1e-5
