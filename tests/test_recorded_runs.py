"""Twelve steps of MoCo-v3 + SER and every evaluation of the result, against what was recorded: a change of structure
changes no bit.

The record (golden/recorded) holds for one kind of arithmetic: processor, BLAS and torch. Where a small network of plain
torch gives other bits than it did there, the runs are compared by their losses. `python tests/test_recorded_runs.py`
records anew; a commit that does so says why.
"""

import csv
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ser_fast import cli

pytestmark = pytest.mark.slow

RECORD = Path(__file__).parent / "golden" / "recorded"
RUNS = RECORD / "runs.json"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"}
OPTIONS = {
    "d4_scale": (),
    "reflections": ("--views.sampler", "reflections"),
    "affine": ("--views.sampler", "affine"),
    "crop": ("--views.sampler", "crop"),
    "accumulate": ("--optim.accumulate", "2", "--optim.accumulate-mode", "plain"),
    "processes": (),
}
EVALUATIONS = {
    "equivariance": ("--images", "6", "--pairs", "2"),
    "knn": ("--k", "1", "5"),
    "linear": ("--epochs", "3", "--heads", "linear", "mlp", "--hidden", "16", "--rates", "0.01", "0.1"),
    "linear_blocks": ("--epochs", "2", "--blocks", "2", "--rates", "0.1"),
    "corruptions": ("--images", "4", "--sequences", "2", "--classifier", "knn"),
    "detection": ("--steps", "3", "--image-size", "64"),
    "sensitivity": ("--images", "2", "--image-size", "32"),
}
TABLES = {
    "equivariance": ("equivariance.csv", "embedding.csv", "prediction.csv"),
    "knn": ("knn.csv", "knn_confusion.csv"),
    "linear": ("linear.csv", "linear_rates.csv", "linear_confusion.csv"),
    "linear_blocks": ("linear.csv",),
    "corruptions": ("corruptions.csv", "perturbations.csv"),
    "detection": ("detection.csv",),
    "sensitivity": ("sensitivity.csv",),
}


def fingerprint() -> str:
    """What the arithmetic here makes of a small network of plain torch, forward and backward."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x, kernel, weight = draw(8, 3, 32, 32), draw(48, 3, 8, 8), draw(48, 192)
    kernel.requires_grad_()
    tokens = nn.functional.layer_norm(nn.functional.conv2d(x, kernel, stride=8).flatten(2).mT, (48,))
    tokens = nn.functional.gelu(tokens @ weight) @ weight.T
    tokens = nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)
    larger = nn.functional.interpolate(x, (48, 40), mode="bicubic", antialias=True)
    loss = tokens.softmax(-1).log().mean() + larger.square().mean()
    loss.backward()
    assert kernel.grad is not None
    bits = b"".join(tensor.detach().numpy().tobytes() for tensor in (tokens, larger, kernel.grad))
    return hashlib.sha256(bits + torch.__version__.encode()).hexdigest()


def command(*arguments: Any) -> None:
    """ser-fast with these arguments, in this process."""
    with mock.patch.object(sys, "argv", ["ser-fast", *map(str, arguments)]):
        cli.main()


def command_of_two(*arguments: Any) -> None:
    """ser-fast with these arguments, in two processes under torchrun."""
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "ser_fast.cli")
    done = subprocess.run(
        [sys.executable, "-m", *launcher, *map(str, arguments)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def train(name: str, out: Path) -> dict[str, Any]:
    """Train for twelve steps; the bits of the encoder and the losses of every step."""
    (command_of_two if name == "processes" else command)(
        "train", "--out", out, "--data", "photos", "--device", "cpu", "--workers", 0,
        "--model.name", "vit_tiny_patch16_224", "--model.split", 1, "--model.image-size", 32, "--model.patch-size", 8,
        "--model.embed-dim", 48, "--model.depth", 3, "--model.num-heads", 3, "--views.share", 0.5,
        "--ser.hidden-dim", 32, "--ser.out-dim", 16, "--moco.dim", 16, "--moco.mlp-dim", 32, "--optim.batch-size", 8,
        "--optim.steps", 12, "--optim.lr", 0.02, *OPTIONS[name],
    )  # fmt: skip
    weights = load_file(out / "encoder.safetensors")
    digest = hashlib.sha256()
    for key in sorted(weights):
        digest.update(key.encode() + weights[key].numpy().tobytes())
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {"encoder": digest.hexdigest(), "loss": [line["loss"] for line in log]}


def evaluate(name: str, run: Path, out: Path) -> dict[str, str]:
    """The tables that a command writes of a run, by file name."""
    out.mkdir()
    data = () if name == "detection" else ("--data", "photos")  # it generates its own
    command(name.split("_")[0], run, *data, "--device", "cpu", "--out", out, *EVALUATIONS[name])
    return {table: shortened((out / table).read_text().replace(str(run), "RUN")) for table in TABLES[name]}


def shortened(table: str) -> str:
    """The table without measured times; a long one as its heading, its last line and a hash of all lines."""
    lines = [line for line in table.splitlines(keepends=True) if not line.startswith("cost,")]
    if len(lines) < 500:
        return "".join(lines)
    return lines[0] + lines[-1] + f"{len(lines)} lines, {hashlib.sha256(''.join(lines).encode()).hexdigest()}\n"


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return json.loads(RUNS.read_text())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("recorded") / "run"
    train("d4_scale", out)
    return out


@pytest.mark.parametrize("name", OPTIONS)
def test_training_gives_the_recorded_weights(name: str, record: dict[str, Any], tmp_path: Path) -> None:
    result, expected = train(name, tmp_path / "run"), record["runs"][name]
    if fingerprint() == record["fingerprint"]:
        assert result == expected
    else:
        assert result["loss"] == pytest.approx(expected["loss"], rel=0.05)


@pytest.mark.parametrize("name", EVALUATIONS)
def test_evaluations_give_the_recorded_tables(name: str, record: dict[str, Any], run: Path, tmp_path: Path) -> None:
    for table, text in evaluate(name, run, tmp_path / "out").items():
        expected = (RECORD / name / table).read_text()
        if fingerprint() == record["fingerprint"]:
            assert text == expected, table
        else:
            ours, theirs = (list(csv.reader(lines.splitlines())) for lines in (text, expected))
            assert ours[0] == theirs[0], table
            assert "confusion" in table or len(ours) == len(theirs), table


def write_record(scratch: Path) -> None:
    RUNS.write_text(
        json.dumps(
            {"fingerprint": fingerprint(), "runs": {name: train(name, scratch / name) for name in OPTIONS}}, indent=1
        )
        + "\n"
    )
    for name in EVALUATIONS:
        for table, text in evaluate(name, scratch / "d4_scale", scratch / f"{name}_tables").items():
            (RECORD / name).mkdir(exist_ok=True)
            (RECORD / name / table).write_text(text)


if __name__ == "__main__":
    import tempfile

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write_record(Path(folder))
