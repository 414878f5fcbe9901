"""The command line: what each command prints, writes and refuses."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ser_fast import cli
from ser_fast.ops.backends import BACKENDS, reason_not
from ser_fast.training.checkpoint import ENCODER, list_checkpoints
from ser_fast.training.trainer import NonFiniteLossError

TINY = [
    *("--model.name=vit_tiny_patch16_224", "--model.split=1", "--model.image-size=32", "--model.patch-size=8"),
    *("--model.embed-dim=48", "--model.depth=3", "--model.num-heads=3", "--views.share=0.5"),
    *("--ser.hidden-dim=32", "--ser.out-dim=16", "--moco.dim=16", "--moco.mlp-dim=32"),
    *("--optim.batch-size=8", "--optim.steps=2", "--workers=0", "--device=cpu"),
]
PNG = b"\x89PNG\r\n\x1a\n"


def write_images(folder: Path, count: int) -> None:
    """Blurred patterns, red or blue, one in five of them in the wrong folder."""
    rng = np.random.default_rng(count)
    for number in range(count):
        coarse = rng.integers(256, size=(6, 6, 3), dtype=np.uint8)
        coarse[..., 2 * (number % 2)] //= 2
        path = folder / ("blue", "red")[(number + (number % 5 == 0)) % 2] / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(coarse).resize((32, 32), Image.Resampling.BICUBIC).save(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("images")
    write_images(folder / "train", 64)
    write_images(folder / "val", 12)
    return f"folder:{folder}"


def run_cli(*argv: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ser-fast", *map(str, argv)])
        cli.main()


def refusal(*argv: object) -> str:
    """What a command of the user's making ends with: one line, with exit status 1."""
    with pytest.raises(SystemExit) as stopped:
        run_cli(*argv)
    message = stopped.value.code
    assert isinstance(message, str)  # sys.exit prints it and exits with 1
    assert message.startswith("ser-fast: ")
    assert "\n" not in message
    return message.removeprefix("ser-fast: ")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, data: str) -> Path:
    """The folder of a run of 2 steps."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    run_cli("train", "--out", out, "--data", data, *TINY)
    return out


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def numbers_in(line: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d+\.\d+", line)]


# ---------------------------------------------------------------- train


def test_train_writes_a_run(run: Path, data: str) -> None:
    assert [path.name for path in list_checkpoints(run)] == ["step_00000002.pt"]
    config = json.loads((run / "config.json").read_text())
    assert (config["data"], config["model"]["embed_dim"], config["views"]["share"]) == (data, 48, 0.5)
    assert len((run / "log.jsonl").read_text().splitlines()) == 2


def test_train_reads_every_kind_of_option(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(cli, "run_training", given.append)
    options = ["--views.crop-area", "0.3", "0.9", "--views.sampler=crop", "--ser.preset", "released"]
    run_cli("train", *options, "--ser.momentum-keys", "--ser.max-tokens=None", "--optim.steps=7", "--resume=auto")
    (config,) = given
    assert (config.views.crop_area, config.views.sampler) == ((0.3, 0.9), "crop")
    assert (config.ser.preset, config.ser.momentum_keys, config.ser.max_tokens) == ("released", True, None)
    assert (config.optim.steps, config.resume, config.optim.epochs) == (7, "auto", 100)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--views.share=1.5"], "share: got 1.5, takes a number in"),
        (["--ser.temperature=-1"], "temperature: got -1.0"),
        (["--model.split=9"], "split: .* got 9"),
        (["--data=photographs"], "data must be 'photos'"),
        (["--resume=nowhere.pt"], "resume: nowhere.pt is no file"),
        (["--save-every=0"], "save_every: got 0"),
    ],
    ids=str,
)
def test_train_names_what_it_refuses(tmp_path: Path, data: str, options: list[str], message: str) -> None:
    assert re.match(message, refusal("train", "--out", tmp_path / "run", "--data", data, *TINY, *options))


def test_train_says_which_loss_is_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(config: Any) -> None:
        raise NonFiniteLossError("loss is nan at step 3")

    monkeypatch.setattr(cli, "run_training", fails)
    assert refusal("train") == "loss is nan at step 3"


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["train", "--views.sampler=cubist"], "cubist"),
        (["train", "--optim.lr=fast"], "optim.lr"),
        (["train", "--no-such-option=1"], "no-such-option"),
        (["knn"], "Required"),
        (["repaint"], "repaint"),
        ([], "train"),
    ],
    ids=str,
)
def test_options_that_are_none_show_usage(argv: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run_cli(*argv)
    assert stopped.value.code == 2
    assert named in capsys.readouterr().err


# ---------------------------------------------------------------- evaluations of a run


def test_equivariance_compares_with_a_random_initialisation(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_cli("equivariance", run, "--images", 50)
    table = rows(run / "equivariance.csv")
    assert {row["model"] for row in table} == {"checkpoint", "random"}
    assert {row["layer"] for row in table} == {"1", "2", "3"}
    assert {row["images"] for row in table} == {"12"}  # all that are held out
    elements = {row["element"] for row in table}
    assert elements >= {"identity", "rot90", "rot180", "rot270", "hflip", "transpose", "vflip", "antitranspose"}
    assert len(table) == 2 * 3 * len(elements)
    for row in table:
        error = float(row["relative_error"])
        assert error == 0 if row["element"] == "identity" else 0.01 < error < 3
    errors = [[row["relative_error"] for row in table if row["model"] == name] for name in ("checkpoint", "random")]
    assert errors[0] != errors[1]
    assert (run / "equivariance.png").read_bytes().startswith(PNG)
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("Relative error", "Aligned cosine", "checkpoint", "random", "rot90"))
    # The table shows the numbers of the CSV.
    line = next(line for line in shown.splitlines() if line.strip().startswith("rot90"))
    of_rot90 = [row for row in table if (row["model"], row["element"]) == ("checkpoint", "rot90")]
    assert numbers_in(line) == pytest.approx([float(row["relative_error"]) for row in of_rot90], abs=0.006)


def test_equivariance_takes_other_data_sizes_and_folders(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"
    run_cli("equivariance", run / ENCODER, "--data=photos", "--images=3", "--image-size=48", "--out", out)
    table = rows(out / "equivariance.csv")
    assert {row["images"] for row in table} == {"3"}
    # 6 x 6 tokens: each of the four scales has a lattice of its own.
    assert len({row["element"] for row in table}) == 12
    assert sorted(path.name for path in out.iterdir()) == ["equivariance.csv", "equivariance.png"]


def test_knn_compares_with_a_random_initialisation(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_cli("knn", run, "--k", 1, 5)
    table = rows(run / "knn.csv")
    assert [(row["model"], row["k"]) for row in table] == [
        *(("checkpoint", k) for k in "15"),
        *(("random", k) for k in "15"),
    ]
    accuracy = [float(row["top1"]) for row in table]
    assert all(value * 12 == pytest.approx(round(value * 12)) for value in accuracy)  # of 12 held-out images
    assert 0.6 <= max(accuracy) < 1
    assert (run / "knn.png").read_bytes().startswith(PNG)
    shown = capsys.readouterr().out
    assert "k = 1" in shown
    for name, values in (("checkpoint", accuracy[:2]), ("random", accuracy[2:])):
        line = next(line for line in shown.splitlines() if f" {name} " in line)
        assert numbers_in(line) == pytest.approx(values, abs=6e-4)


@pytest.mark.parametrize("command", ["equivariance", "knn"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data=nowhere"], "data must be 'photos'"),
        (["--data=folder:nowhere"], "data='folder:nowhere': there is no folder"),
        (["--image-size=30"], "images: .* multiples of the patch size"),
        (["--image-size=0"], "image_size must be at least 1"),
    ],
    ids=str,
)
def test_evaluations_name_what_they_refuse(run: Path, command: str, options: list[str], message: str) -> None:
    assert re.match(message, refusal(command, run, *options))


@pytest.mark.parametrize("options", [["--k", "1000"], ["--temperature=0", "--k", "1"], ["--batch-size=0"]], ids=str)
def test_knn_names_what_it_refuses(run: Path, options: list[str]) -> None:
    assert options[0].strip("-").split("=")[0].replace("-", "_") in refusal("knn", run, *options)


def test_a_checkpoint_that_is_none_is_refused(run: Path, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere", run / "log.jsonl", list_checkpoints(run)[0]):
        assert refusal("knn", path) == (
            f"checkpoint: {path} is neither a run's folder with encoder.safetensors nor a .safetensors file"
        )


# ---------------------------------------------------------------- doctor, demo, a process


def test_doctor_says_what_runs_and_why_others_do_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")  # a line for each backend
    run_cli("doctor")
    shown = capsys.readouterr().out
    assert torch.__version__ in shown
    for backend in BACKENDS:
        line = next(line for line in shown.splitlines() if f"│ {backend} " in line)
        assert [cell.strip() for cell in line.split("│")[2:4]] == [
            reason_not(backend, device) or "runs" for device in ("cpu", "cuda")
        ]


def test_the_demo_compares_three_runs_and_reuses_them(
    tmp_path: Path, data: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["demo", "--out", tmp_path, "--data", data, "--steps=2", "--images=8", "--image-size=32", "--device=cpu"]
    monkeypatch.setenv("COLUMNS", "200")  # a terminal wide enough for the table
    run_cli(*argv)
    shown = capsys.readouterr().out
    models = ["random", "lambda = 0", "lambda = 1", "lambda = 1, crops"]
    table = rows(tmp_path / "demo.csv")
    assert list(dict.fromkeys(row["model"] for row in table)) == models
    assert {row["layer"] for row in table} == set("123456")
    assert {row["images"] for row in table} == {"8"}
    assert (tmp_path / "demo.png").read_bytes().startswith(PNG)

    configs = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.glob("*/config.json")}
    assert len(configs) == 3
    assert sorted((c["ser"]["weight"], c["views"]["sampler"]) for c in configs.values()) == [
        (0.0, "d4_scale"),
        (1.0, "crop"),
        (1.0, "d4_scale"),
    ]
    assert len({c["seed"] for c in configs.values()}) == 1

    final_losses = {}
    for name, folder in zip(models[1:], ("lambda_0", "lambda_1", "lambda_1_crops"), strict=True):
        step = json.loads((tmp_path / folder / "log.jsonl").read_text().splitlines()[-1])
        final_losses[name] = [step["invariance"], step["ser"]]
    assert all(word in shown for word in ("inv. loss", "SER loss", "layers 1 to 6", "kNN"))
    for model in models:
        line = next(line for line in shown.splitlines() if line.startswith(f" {model} "))
        printed = numbers_in(line.removeprefix(f" {model} "))
        assert 0 <= printed[-1] <= 1  # kNN
        moved = [row for row in table if row["model"] == model and row["group"] != "identity"]
        errors = [fmean(float(row["relative_error"]) for row in moved if row["layer"] == layer) for layer in "123456"]
        assert printed[-7:-1] == pytest.approx(errors, abs=0.006)
        if model != "random":
            assert printed[:-7] == pytest.approx(final_losses[model], abs=6e-3)
    logs = {path: path.read_text() for path in tmp_path.glob("*/log.jsonl")}
    monkeypatch.setattr("ser_fast.training.trainer._Run._step", None)  # no step may be taken again
    run_cli(*argv)
    assert rows(tmp_path / "demo.csv") == table
    assert {path: path.read_text() for path in logs} == logs


def test_the_console_script_ends_with_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ser_fast.cli", "knn", str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        f"ser-fast: checkpoint: {tmp_path} is neither a run's folder with encoder.safetensors nor a .safetensors file"
    ]
