"""Which pictures evaluations see: the same crop and bounds in all of them, and what is said of those left out."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases.command_line import refusal, run_cli
from PIL import Image

from ser_fast.data.sources import ImageFolder, Squares
from ser_fast.evaluation import equivariance, knn, linear_probe, robustness
from ser_fast.evaluation.protocol import open_encoder, open_labelled
from ser_fast.vit import SplitViT, save_split_vit

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
EVALUATIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    "knn": (knn, {"k": (1,)}),
    "linear": (linear_probe, {"rates": (0.1,), "epochs": 1}),
    "corruptions": (robustness, {"images": 2, "sequences": 1, "classifier": "knn", "k": 1}),
    "equivariance": (equivariance, {"images": 8, "pairs": 1}),
}
OPTIONS = {
    "knn": ["--k", "1"],
    "linear": ["--rates", "0.1", "--epochs", "1"],
    "corruptions": ["--images", "2", "--sequences", "1", "--classifier", "knn", "--k", "1"],
    "equivariance": ["--images", "8", "--pairs", "1"],
}


def encoder() -> SplitViT:
    torch.manual_seed(0)
    return SplitViT("vit_tiny_patch16_224", 1, **TINY)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two classes; of the held-out pictures one is damaged and one has 64 x 64 pixels, the others 40 x 40."""
    folder = tmp_path / "pictures"
    for part in ("train", "val"):
        for label, name in enumerate(("ant", "\u732b")):
            (folder / part / name).mkdir(parents=True)
            for number in range(8):
                pixels = np.random.default_rng((label, number)).integers(256, size=(40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{number}.png")
    (folder / "val" / "ant" / "3.png").write_bytes(b"no picture")
    Image.new("RGB", (64, 64)).save(folder / "val" / "ant" / "7.png")
    return folder


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """One kind of each generated set is enough here."""
    for name, kept in (("CORRUPTIONS", "contrast"), ("PERTURBATIONS", "brightness")):
        kinds = getattr(robustness, name)
        for module in ("robustness", "image_sets"):
            monkeypatch.setattr(f"ser_fast.evaluation.{module}.{name}", {kept: kinds[kept]})


@pytest.mark.parametrize("name", EVALUATIONS)
def test_every_evaluation_takes_the_crop_and_the_bound(
    name: str, pictures: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And says which pictures it left out: those that are damaged, and those of more pixels."""
    opened: list[Squares] = []
    make = Squares.__init__

    def noted(self: Squares, *args: Any, **options: Any) -> None:
        make(self, *args, **options)
        opened.append(self)

    monkeypatch.setattr(Squares, "__init__", noted)
    module, options = EVALUATIONS[name]
    data = f"folder:{pictures}"
    options = {**options, "images": 16} if "images" in options else options  # all of them
    module.evaluate(encoder(), data, crop_pct=0.75, max_pixels=2000, **options)
    assert opened
    assert {dataset.crop_pct for dataset in opened} == {0.75}
    (line,) = [line for line in caplog.messages if line.startswith("data: ")]
    assert line.startswith("data: 2 images could not be read, left out: ")
    assert f"{pictures}/val/ant/3.png (UnidentifiedImageError" in line
    assert f"{pictures}/val/ant/7.png (ValueError: 64 x 64 pixels, more than max_pixels = 2000)" in line
    assert "\n" not in line


def test_pictures_of_another_shape_keep_their_own_crop(pictures: Path, tmp_path: Path) -> None:
    """Shifted pictures are cropped as the held-out ones; corrupted ones were cropped when they were made."""
    for severity in range(1, 6):
        (tmp_path / "c" / "fog").mkdir(parents=True, exist_ok=True)
        (tmp_path / "c" / "fog" / str(severity)).symlink_to(pictures / "train")
    seen: list[tuple[str, float]] = []
    make = Squares.__init__

    def noted(self: Squares, source: ImageFolder, size: int, **options: Any) -> None:
        make(self, source, size, **options)
        seen.append((source.folder.name, self.crop_pct))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Squares, "__init__", noted)
        options = {"sequences": 1, "classifier": "knn", "k": 1, "images": 4, "crop_pct": 0.75}
        shifted = pictures / "val"
        robustness.evaluate(encoder(), f"folder:{pictures}", corrupted=tmp_path / "c", shifted=[shifted], **options)
    assert seen == [("train", 0.75), ("val", 0.75), ("val", 0.75), *((str(s), 1.0) for s in range(1, 6))]


@pytest.mark.parametrize("name", EVALUATIONS)
def test_bad_crops_and_bounds_are_named_before_the_work(name: str, pictures: Path) -> None:
    module, options = EVALUATIONS[name]
    for option, message in (
        ({"crop_pct": 0.0}, "crop_pct: got 0.0"),
        ({"max_pixels": 0}, "max_pixels: got 0, takes 1"),
    ):
        with pytest.raises(ValueError, match=message):
            module.evaluate(encoder(), f"folder:{pictures}", **options, **option)


@pytest.mark.slow
@pytest.mark.parametrize("name", EVALUATIONS)
def test_commands_have_the_options_and_results_are_shown_before_they_are_written(
    name: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_split_vit(tmp_path / "encoder.safetensors", encoder())
    command = [name, tmp_path, "--data", f"folder:{pictures}", "--out", tmp_path / "out", "--device", "cpu"]
    run_cli(*command, "--crop-pct", "0.875", "--max-pixels", "2000", *OPTIONS[name])
    assert "written: " in capsys.readouterr().out

    def full(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ser_fast.io.write_atomically", full)
    with pytest.raises(SystemExit, match="No space left on device"):
        run_cli(*command, *OPTIONS[name])
    assert "checkpoint" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["knn", "linear"])
def test_links_to_nothing_and_hidden_folders_are_no_pictures(
    name: str, pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (pictures / "train" / "ant" / "lost.png").symlink_to(pictures / "nowhere")
    (pictures / "val" / "ant" / ".thumbnails").mkdir()
    Image.new("RGB", (8, 8)).save(pictures / "val" / "ant" / ".thumbnails" / "0.png")
    module, options = EVALUATIONS[name]
    if name == "linear":
        options = {**options, "cache": tmp_path / "cache"}
    for _ in range(2):
        caplog.clear()
        result = module.evaluate(encoder(), f"folder:{pictures}", **options)
        assert {graded.images for _, graded in result.rows} == {15}
        (line,) = [line for line in caplog.messages if line.startswith("data: ")]
        assert line.startswith("data: 2 images could not be read")
        assert "lost.png (FileNotFoundError" in line


# ---------------------------------------------------------------- labels, known before the work


def test_pictures_without_a_class_are_refused_before_the_work(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "unlabelled.py").write_text(
        "class Set(list):\n    classes, targets = ['a', 'b'], [0, 1, -1, 0]\n"
        "def make(train):\n    return Set([(None, 0)] * 4)\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        with pytest.raises(ValueError, match=r"data: got 'python:.*', 1 of whose 4 training images have no class"):
            open_labelled("python:unlabelled:make", 32)
    train, held_out = open_labelled(f"folder:{pictures}", 32)
    assert train.labels == held_out.labels == [0] * 8 + [1] * 8


def test_a_flat_folder_of_held_out_pictures_names_the_way_out(pictures: Path) -> None:
    flat = pictures / "flat"
    (flat / "val").mkdir(parents=True)
    (flat / "train").symlink_to(pictures / "train")
    for number in range(12):
        Image.new("RGB", (8, 8)).save(flat / "val" / f"{number}.png")
    message = (
        rf"data: got 12 images in {flat}/val and none in folders of the classes ant, \u732b of {flat}/train, "
        rf"takes each image in the folder of its class; folder:{flat}/val takes these without classes"
    )
    for module in (knn, equivariance):
        with pytest.raises(ValueError, match=message):
            module.evaluate(encoder(), f"folder:{flat}")
    assert len(ImageFolder(flat / "val", train=False)) == 12


def test_pictures_beside_train_are_said(pictures: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(3):
        Image.new("RGB", (8, 8)).save(pictures / f"{number}.png")
    ImageFolder(pictures, train=True)
    assert caplog.messages == [f"data: 3 images in {pictures} lie beside its folder train and are left out"]


# ---------------------------------------------------------------- files beside the weights


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "[1]",
        "null",
        "{",
        '{"architectures": ["ViT"]}',
        '{"objective": 7}',
        '{"model": [1]}',
        '{"data": 3}',
        "\xff",
    ],
)
def test_a_config_of_another_program_is_named(text: str, tmp_path: Path) -> None:
    """Beside the weights lies anything; it is read where no images are given, and named where it is none of ours."""
    save_split_vit(tmp_path / "encoder.safetensors", encoder())
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    assert open_encoder(tmp_path, "photos", device="cpu").data == "photos"
    if text == "{}":  # all options have their defaults
        assert open_encoder(tmp_path, device="cpu").data == "photos"
        return
    said = refusal("knn", tmp_path, "--device", "cpu")
    assert said.startswith(f"config: {tmp_path / 'config.json'} can't be read as that of a run: ")
    assert said.endswith("; give the images as data, and the file is not read")


def test_a_folder_in_hugging_faces_layout_is_evaluated(tmp_path: Path, pictures: Path) -> None:
    encoder().save_pretrained(tmp_path / "hub")
    assert "library_name" in json.loads((tmp_path / "hub" / "config.json").read_text())
    opened = open_encoder(tmp_path / "hub" / "model.safetensors", f"folder:{pictures}", device="cpu")
    assert len(knn.evaluate(opened.model, opened.data, k=(1,)).rows) == 2
