"""The command line: what each command prints, writes and refuses."""

import inspect
import json
import os
import re
import select
import shlex
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from itertools import product
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from cases.command_line import PNG, assert_same_files, refusal, rows, run_cli
from PIL import Image

from ser_fast import cli
from ser_fast.evaluation import equivariance, knn, linear_probe, robustness
from ser_fast.evaluation.protocol import open_encoder
from ser_fast.ops import backends, reference
from ser_fast.ops.backends import BACKENDS, reason_not, registered
from ser_fast.training.run_folder import RunFolder
from ser_fast.training.trainer import NonFiniteLossError

TINY = [
    *("--model.name=vit_tiny_patch16_224", "--model.split=1", "--model.image-size=32", "--model.patch-size=8"),
    *("--model.embed-dim=48", "--model.depth=3", "--model.num-heads=3", "--views.share=0.5"),
    *("--ser.hidden-dim=32", "--ser.out-dim=16", "--moco.dim=16", "--moco.mlp-dim=32"),
    *("--optim.batch-size=8", "--optim.steps=2", "--workers=0", "--device=cpu"),
]
Rows = list[list[str]]


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


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, data: str) -> Path:
    """The folder of a run of 2 steps."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    run_cli("train", "--out", out, "--data", data, *TINY)
    return out


def numbers_in(line: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d+\.\d+", line)]


# ---------------------------------------------------------------- train


def test_train_writes_a_run(run: Path, data: str) -> None:
    assert [path.name for path in RunFolder(run).list_checkpoints()] == ["step_00000002.pt"]
    config = json.loads((run / "config.json").read_text())
    assert (config["data"], config["model"]["embed_dim"], config["views"]["share"]) == (data, 48, 0.5)
    assert len((run / "log.jsonl").read_text().splitlines()) == 2


def test_train_reads_every_kind_of_option(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr("ser_fast.training.trainer.train", given.append)
    options = ["--views.crop-area", "0.3", "0.9", "--views.sampler=crop", "--ser.preset", "released"]
    run_cli("train", *options, "--ser.momentum-keys", "--ser.max-tokens=None", "--optim.steps=7", "--resume=auto")
    (config,) = given
    assert (config.views.crop_area, config.views.sampler) == ((0.3, 0.9), "crop")
    ser = config.addons["ser"]
    assert (ser.preset, ser.momentum_keys, ser.max_tokens) == ("released", True, None)
    assert (config.optim.steps, config.resume, config.optim.epochs) == (7, "auto", 100)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--views.share=1.5"], "views.share: got 1.5, takes a number in"),
        (["--ser.temperature=-1"], "ser.temperature: got -1, takes"),
        (["--model.split=9"], "split: .* got 9"),
        (["--data=photographs"], "data: got 'photographs', takes 'photos'"),
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

    monkeypatch.setattr("ser_fast.training.trainer.train", fails)
    assert refusal("train") == "loss is nan at step 3"


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["train", "--views.sampler=cubist"], "cubist"),
        (["train", "--optim.lr=fast"], "optim.lr"),
        (["train", "--no-such-option=1"], "no-such-option"),
        (["export"], "Required"),
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


@pytest.mark.slow
def test_equivariance_compares_with_a_random_initialisation(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_cli("equivariance", run, "--images", 50)
    table = rows(run / "equivariance.csv")
    assert {row["model"] for row in table} == {"checkpoint", "random", "patch means"}
    assert {row["layer"] for row in table} == {"1", "2", "3"}
    assert {row["images"] for row in table} == {"12"}  # all that are held out
    elements = {row["element"] for row in table}
    assert elements >= {"identity", "rot90", "rot180", "rot270", "hflip", "transpose", "vflip", "antitranspose"}
    assert len(table) == (2 * 3 + 1) * len(elements)  # patch means are one layer
    for row in table:
        error = float(row["relative_error"])
        if row["element"] == "identity":
            assert error == 0
        elif row["model"] == "patch means" and row["group"] == "D4":
            assert error < 1e-4  # it moves whole patches
        else:
            assert 0.01 < error < 3
    errors = [[row["relative_error"] for row in table if row["model"] == name] for name in ("checkpoint", "random")]
    assert errors[0] != errors[1]
    assert (run / "equivariance.png").read_bytes().startswith(PNG)
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("Relative error", "Aligned cosine", "checkpoint", "random", "rot90"))
    assert all(0 < float(row["hit5"]) <= 1 and float(row["retrieval"]) <= float(row["mrr"]) + 1e-9 for row in table)
    predicted = rows(run / "prediction.csv")
    assert {(row["model"], row["target"], row["regressor"], row["layer"]) for row in predicted} == set(
        product(("checkpoint", "random"), ("D4", "scale", "angle"), ("linear", "MLP"), "123")
    )
    assert {(row["train_pairs"], row["test_pairs"]) for row in predicted if row["target"] == "D4"} == {("72", "24")}
    line = next(line for line in shown.splitlines() if line.strip().startswith("random MLP"))
    of_d4 = [row for row in predicted if (row["model"], row["target"], row["regressor"]) == ("random", "D4", "MLP")]
    assert numbers_in(line) == pytest.approx([float(row["score"]) for row in of_d4], abs=0.006)
    # The table shows the numbers of the CSV.
    line = next(line for line in shown.splitlines() if line.strip().startswith("rot90"))
    of_rot90 = [row for row in table if (row["model"], row["element"]) == ("checkpoint", "rot90")]
    assert numbers_in(line) == pytest.approx([float(row["relative_error"]) for row in of_rot90], abs=0.006)


@pytest.mark.slow
def test_equivariance_takes_other_data_sizes_and_folders(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"
    run_cli("equivariance", RunFolder(run).encoder, "--data=photos", "--images=3", "--image-size=48", "--out", out)
    table = rows(out / "equivariance.csv")
    assert {row["images"] for row in table} == {"3"}
    # 6 x 6 tokens: each of the four scales has a lattice of its own.
    assert len({row["element"] for row in table}) == 12
    assert sorted(path.name for path in out.iterdir()) == [
        *("embedding.csv", "equivariance.csv", "equivariance.png", "prediction.csv")
    ]


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
    lines = [line for line in shown.splitlines() if re.search(r"│ (checkpoint|random) ", line)]
    names = ("top1", "top1_low", "top1_high", "top5", "top5_low", "top5_high")
    for line, row in zip(lines, table, strict=True):
        assert numbers_in(line) == pytest.approx([float(row[name]) for name in names], abs=6e-4)
        assert 0 < float(row["top1_low"]) < float(row["top1"]) < float(row["top1_high"]) < 1
    confusion = rows(run / "knn_confusion.csv")
    for row in table:
        of_row = [line for line in confusion if (line["model"], line["k"]) == (row["model"], row["k"])]
        assert sum(int(line["images"]) for line in of_row) == 12
        right = sum(int(line["images"]) for line in of_row if line["truth"] == line["predicted"])
        assert right / 12 == pytest.approx(float(row["top1"]))
    assert {line["truth"] for line in confusion} == {"blue", "red"}
    assert (run / "knn_confusion.png").read_bytes().startswith(PNG)


def test_linear_probes_compare_with_a_random_initialisation(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--epochs=20", "--rates", 0.0001, 0.1, "--hidden=16", "--batch-size=16", "--held-out=0.25")
    run_cli("linear", run, "--heads", "linear", "mlp", *options)
    table = rows(run / "linear.csv")
    assert [(row["model"], row["head"]) for row in table] == list(product(("checkpoint", "random"), ("linear", "mlp")))
    assert {row["images"] for row in table} == {"12"}
    sweep = rows(run / "linear_rates.csv")
    assert len(sweep) == 2 * 2 * 2
    for row in table:
        tried = [line for line in sweep if (line["model"], line["head"]) == (row["model"], row["head"])]
        best = max(tried, key=lambda line: float(line["held_out_top1"]))
        assert (row["rate"], row["held_out_top1"]) == (best["rate"], best["held_out_top1"])
        assert [line["chosen"] for line in tried] == [str(line is best) for line in tried]
    assert max(float(row["top1"]) for row in table) >= 0.6
    assert (run / "linear_confusion.png").read_bytes().startswith(PNG)
    assert "linear_confusion.csv" in capsys.readouterr().out.replace("\n", "")
    features = {path.name: path.stat().st_mtime_ns for path in (run / "features").iterdir()}
    assert len(features) == 2 * 2 * 2  # models, parts of the data, features and labels
    run_cli("linear", run, *options)
    assert {path.name: path.stat().st_mtime_ns for path in (run / "features").iterdir()} == features


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rates=-1"], r"rates: got \(-1.0,\)"),
        (["--blocks=3"], "blocks: got 3, takes 1 to 2"),
        (["--held-out=0"], "held_out: got 0.0"),
    ],
    ids=str,
)
def test_linear_names_what_it_refuses(run: Path, tmp_path: Path, options: list[str], message: str) -> None:
    assert re.match(message, refusal("linear", run, "--out", tmp_path, *options))


@pytest.mark.slow
@pytest.mark.parametrize("classifier", ["knn", "linear"])
def test_corruptions_compare_with_a_random_initialisation(
    run: Path, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], classifier: str
) -> None:
    shifted = Path(data.removeprefix("folder:")) / "val"
    options = ("--images=3", "--sequences=2", "--shifted", shifted, "--k=5", "--classifier", classifier)
    run_cli("corruptions", run, "--out", tmp_path, *options)
    table = rows(tmp_path / "corruptions.csv")
    assert len(table) == 2 * (1 + 15 * 5)
    assert {row["images"] for row in table} == {"3"}
    assert all(float(row["low"]) <= float(row["error"]) <= float(row["high"]) for row in table)
    flips = rows(tmp_path / "perturbations.csv")
    assert len(flips) == 2 * 10
    assert all(0 <= float(row["flip_probability"]) <= 1 for row in flips)
    shifts = rows(tmp_path / "shifts.csv")
    assert [(row["model"], row["folder"], row["classes"], row["images"]) for row in shifts] == [
        (name, "val", "2", "12") for name in ("checkpoint", "random")
    ]
    assert (tmp_path / "corruptions.png").read_bytes().startswith(PNG)
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("elastic_transform", "mean corruption error", "mean flip probability"))


def test_corruptions_read_published_layouts_and_a_baseline(
    run: Path, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corrupted, perturbed, out = tmp_path / "c", tmp_path / "p", tmp_path / "out"
    write_images(corrupted / "fog" / "1", 10)
    perturbed.mkdir()
    np.save(perturbed / "tilt.npy", np.zeros((1, 3, 32, 32, 3), dtype=np.uint8))
    read = ("--corrupted", corrupted, "--perturbed", perturbed, "--out", out)
    run_cli("corruptions", run, *read)
    assert [(row["kind"], row["images"]) for row in rows(out / "corruptions.csv")] == [
        ("clean", "12"),
        ("fog", "10"),
    ] * 2
    assert [(row["kind"], float(row["flip_probability"])) for row in rows(out / "perturbations.csv")] == [
        ("tilt", 0)
    ] * 2
    capsys.readouterr()
    run_cli("corruptions", run, *read, "--baseline", out / "corruptions.csv")
    line = next(line for line in capsys.readouterr().out.splitlines() if "relative to the baseline" in line)
    assert numbers_in(line)[0] == 1  # the same checkpoint is its own baseline


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--corrupted=nowhere"], "corrupted: got nowhere, takes"),
        (["--perturbed=nowhere", "--corrupted", "c"], "corrupted: got c, takes"),
        (["--shifted", "nowhere"], "shifted: got nowhere, and there is no such folder"),
        (["--baseline=nowhere.csv"], "baseline: got nowhere.csv, and there is no such file"),
        (["--images=0"], "images: got 0"),
    ],
    ids=str,
)
def test_corruptions_name_what_they_refuse(run: Path, tmp_path: Path, options: list[str], message: str) -> None:
    assert re.match(message, refusal("corruptions", run, "--out", tmp_path, *options))


@pytest.mark.parametrize("command", ["equivariance", "knn", "linear", "corruptions"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data=nowhere"], "data: got 'nowhere', takes 'photos'"),
        (["--data=folder:nowhere"], "data: got 'folder:nowhere', and there is no folder"),
        (["--image-size=30"], "images: .* multiples of the patch size"),
        (["--image-size=0"], "image_size: got 0, takes a positive number"),
    ],
    ids=str,
)
def test_evaluations_name_what_they_refuse(run: Path, command: str, options: list[str], message: str) -> None:
    assert re.match(message, refusal(command, run, *options))


NOTEBOOK: dict[str, tuple[Any, dict[str, Any], tuple[object, ...]]] = {
    "equivariance": (equivariance, {"images": 8, "pairs": 1}, ("--images=8", "--pairs=1")),
    "knn": (knn, {"k": (1, 5)}, ("--k", 1, 5)),
    "linear": (linear_probe, {"rates": (0.1,), "epochs": 2}, ("--rates", 0.1, "--epochs=2")),
    "corruptions": (
        robustness,
        {"images": 1, "sequences": 1, "classifier": "knn", "k": 5},
        ("--images=1", "--sequences=1", "--classifier=knn", "--k=5"),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("command", NOTEBOOK)
def test_python_gives_what_the_command_writes(
    run: Path, data: str, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    module, options, arguments = NOTEBOOK[command]
    run_cli(command, run, "--device=cpu", "--out", tmp_path / "command", *arguments)
    shown = capsys.readouterr().out
    model, run_data, folder = open_encoder(run, device="cpu")
    assert (run_data, folder, model.training) == (data, run, True)
    result = module.evaluate(model, data, **options)
    assert_same_files(result.write(tmp_path / "python"), tmp_path / "command")
    assert not capsys.readouterr().out  # no bar, and nothing printed unasked
    result.print()
    assert capsys.readouterr().out in shown  # after the lines that bars leave
    assert model.training


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (knn, {"k": (65,)}, r"k: got \(65,\), takes 1 to 64, the number of training images"),
        (knn, {"temperature": 0.0}, "temperature: got 0.0, takes a positive number"),
        (knn, {"image_size": 30}, "images: .* multiples of the patch size"),
        (linear_probe, {"heads": ("cubic",)}, "heads: got"),
        (linear_probe, {"blocks": 3}, "blocks: got 3, takes 1 to 2"),
        (linear_probe, {"rates": ()}, "rates: got"),
        (robustness, {"classifier": "knn", "k": 65}, "k: got 65"),
        (robustness, {"sequences": 0}, "sequences: got 0"),
        (robustness, {"corrupted": Path("nowhere")}, "corrupted: got nowhere"),
        (robustness, {"baseline": Path("nowhere.csv")}, "baseline: got nowhere.csv"),
        (equivariance, {"pairs": 0}, "pairs: got 0"),
        (equivariance, {"images": 1}, "test_share: got 0.25, which holds out 0 of 1"),
    ],
    ids=str,
)
def test_arguments_are_checked_before_the_work(
    run: Path, data: str, module: Any, options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for work in ("ser_fast.evaluation.protocol.random_control", "ser_fast.evaluation.features.embed_cached"):
        monkeypatch.setattr(work, lambda *a, **k: pytest.fail("worked before it checked"))
    with pytest.raises(ValueError, match=message):
        module.evaluate(open_encoder(run, device="cpu").model, data, **options)


@pytest.mark.parametrize("module", [knn, linear_probe, robustness])
def test_images_without_classes_are_refused(run: Path, tmp_path: Path, module: Any) -> None:
    for part in ("train", "val"):
        (tmp_path / part).mkdir()
        Image.new("RGB", (32, 32)).save(tmp_path / part / "0.png")
    with pytest.raises(ValueError, match=r"data: got 'folder:.*', whose images have no classes"):
        module.evaluate(open_encoder(run, device="cpu").model, f"folder:{tmp_path}")


def test_a_folder_that_cannot_be_made_is_refused(run: Path) -> None:
    assert refusal("knn", run, "--out", run / "config.json").startswith(f"out: got {run / 'config.json'}, takes")


@pytest.mark.parametrize("options", [["--k", "1000"], ["--temperature=0", "--k", "1"], ["--batch-size=0"]], ids=str)
def test_knn_names_what_it_refuses(run: Path, options: list[str]) -> None:
    assert options[0].strip("-").split("=")[0].replace("-", "_") in refusal("knn", run, *options)


@pytest.mark.parametrize(("images", "ks"), [(3, (1,)), (20, (1, 5, 10, 20)), (50, (1, 5, 10, 20, 50))])
def test_the_default_ks_are_those_that_fit(images: int, ks: tuple[int, ...], caplog: pytest.LogCaptureFixture) -> None:
    assert knn.choose_ks(None, 0.07, images) == ks
    left_out = ", ".join(map(str, knn.DEFAULT_KS[len(ks) :]))
    told = [f"k: left out {left_out}, since there are {images} training images"] if left_out else []
    assert caplog.messages == told
    with pytest.raises(
        ValueError, match=rf"^k: got \({images + 1},\), takes 1 to {images}, the number of training images"
    ):
        knn.choose_ks((images + 1,), 0.07, images)


def test_small_folders_take_the_defaults(tmp_path: Path, run: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_images(tmp_path / "small/train", 6)
    write_images(tmp_path / "small/val", 4)
    data = ("--data", f"folder:{tmp_path}/small", "--device=cpu")
    run_cli("knn", run, "--out", tmp_path / "out", *data)
    assert {row["k"] for row in rows(tmp_path / "out" / "knn.csv")} == {"1", "5"}
    assert "k: left out 10, 20, 50, since there are 6 training images" in caplog.messages
    asked: list[int] = []

    def vote(*sets: Any, k: int, temperature: float) -> Any:
        asked.append(k)
        raise ValueError("enough")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(robustness, "_voter", vote)
        refusal("corruptions", run, "--out", tmp_path / "out", "--classifier=knn", "--images=2", "--sequences=1", *data)
    assert asked == [6]


def test_the_prediction_of_g_can_be_left_out(tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equivariance, "predict_transformations", None)
    # Two images would be too few to fit, to choose and to test on.
    options = ("--no-predict", "--images=2", "--elements", "rot90", "--device=cpu", "--out", tmp_path)
    run_cli("equivariance", run, *options)
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"equivariance.csv", "embedding.csv", "equivariance.png"}


def test_a_checkpoint_that_is_none_is_refused(run: Path, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere", run / "log.jsonl", RunFolder(run).list_checkpoints()[0]):
        assert refusal("knn", path) == (
            f"checkpoint: {path} is neither a run's folder with encoder.safetensors nor a .safetensors file"
        )


# ---------------------------------------------------------------- doctor, demo, a process


def doctors_tables(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> tuple[str, Rows, Rows]:
    """All that `doctor` prints; and the rows of its tables: what runs, and what auto takes."""
    monkeypatch.setenv("COLUMNS", "400")  # a line for each row
    run_cli("doctor")
    shown = capsys.readouterr().out
    runs, takes = (
        [[cell.strip() for cell in line.split("│")[1:-1]] for line in table.splitlines() if line.startswith("│")]
        for table in shown.split('what backend="auto" takes')
    )
    return shown, runs, takes


def test_doctor_says_what_runs_and_why_others_do_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown, runs, takes = doctors_tables(capsys, monkeypatch)
    assert torch.__version__ in shown
    assert runs == [
        [backend, *(reason_not(backend, device) or "runs" for device in ("cpu", "cuda"))] for backend in BACKENDS
    ]
    assert takes[0] == ["cpu", *(backends.fastest(op, torch.device("cpu")) for op in backends.PREFERRED)]


def test_doctor_says_what_auto_would_take_on_a_gpu(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(backends, "PREFERRED", {"this": {0: "triton", 8: "cuda"}, "that": {0: "cuda", 9: "triton"}})
    shown, _, takes = doctors_tables(capsys, monkeypatch)
    assert re.search("tensors on .* this .* that ", shown)
    assert takes[1:] == [
        ["a GPU of compute capability below 8.0", "triton", "cuda"],
        ["a GPU of compute capability below 9.0", "cuda", "cuda"],
        ["a GPU of compute capability from 9.0 on", "cuda", "triton"],
    ]


def test_doctor_says_what_auto_takes_on_each_gpu(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda device: SimpleNamespace(name="A GPU", major=8 + device.index, minor=6, total_memory=24 * 2**30),
    )
    with registered("triton", reference, "cuda"), registered("cuda", reference, "cuda"):
        shown, _, takes = doctors_tables(capsys, monkeypatch)
    assert re.search(r"^cuda:1 +A GPU, capability 9\.6, 24 GiB$", shown, re.MULTILINE)
    assert takes == [
        ["cpu", "cpu", "cpu", "cpu"],
        ["cuda:0", "cuda", "cuda", "cuda"],
        ["cuda:1", "cuda", "triton", "triton"],
    ]


@pytest.mark.slow
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
        turned = [row for row in moved if row["group"] == "D4"]
        found = [fmean(float(row["retrieval"]) for row in turned if row["layer"] == layer) for layer in "123456"]
        error = fmean(float(row["relative_error"]) for row in moved if row["layer"] == "2")
        assert printed[-8:-1] == pytest.approx([*found, error], abs=0.006)
        if model != "random":
            assert printed[:-8] == pytest.approx(final_losses[model], abs=6e-3)
    logs = {path: path.read_text() for path in tmp_path.glob("*/log.jsonl")}
    monkeypatch.setattr("ser_fast.training.trainer.Trainer.step", None)  # no step may be taken again
    run_cli(*argv)
    assert rows(tmp_path / "demo.csv") == table
    assert {path: path.read_text() for path in logs} == logs


@pytest.mark.parametrize("command", cli.COMMANDS, ids=lambda command: command.__name__)
def test_every_option_has_a_help_text(command: Callable[..., None]) -> None:
    described = re.findall(r"^    (\w+): .", inspect.getdoc(command) or "", re.MULTILINE)
    assert described == list(inspect.signature(command).parameters)


LIGHT = """
import sys
from ser_fast import cli
sys.argv = ["ser-fast", *sys.argv[1:], "--help"]
try:
    cli.main()
except SystemExit:
    heavy = {"matplotlib", "pycocotools", "scipy", "skimage", "tensorboard", "timm", "torchvision"}
    print(*heavy & sys.modules.keys(), file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("command", "option"),
    [("", "equivariance"), ("train", "--ser.layers"), ("plan", "--plan.device"), ("linear", "--rates")],
)
def test_help_loads_no_more_than_it_shows(command: str, option: str) -> None:
    done = subprocess.run([sys.executable, "-c", LIGHT, *command.split()], capture_output=True, text=True, check=True)
    assert option in done.stdout
    assert done.stderr.strip() == ""


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(select, "poll"), reason="Windows has no such pipes")
@pytest.mark.parametrize("argv", [["train", "--help"], ["doctor"]], ids=str)
def test_a_closed_pipe_ends_a_command_quietly(argv: list[str]) -> None:
    """As in `ser-fast train --help | head`; doctor prints by rich."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "-m", "ser_fast.cli", *argv], stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_command_without_an_output_ends_as_it_should() -> None:
    command = f"{shlex.quote(sys.executable)} -m ser_fast.cli --version >&-"
    done = subprocess.run(command, shell=True, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_pipe_that_breaks_elsewhere_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("ser_fast.doctor.backend_tables", fails)
    assert refusal("doctor") == "[Errno 32] Broken pipe"


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    run_cli("--version")
    assert capsys.readouterr().out == f"ser-fast {version('ser-fast')}\n"
