"""Architectures that no test of training uses go through every evaluation command, side by side."""

from pathlib import Path

import pytest
import torch
from cases.command_line import rows, run_cli
from cases.runs import patterns

from ser_fast.evaluation import synthetic_coco
from ser_fast.vit import SplitViT, save_split_vit

ARCHITECTURES = {
    "dinov2": ("vit_small_patch14_reg4_dinov2", {"img_size": 56}),  # registers, LayerScale, patches of 14
    "dinov3": ("vit_small_patch16_dinov3", {"img_size": 64}),  # rotary positions, no absolute ones
    "deit3": ("deit3_small_patch16_224", {"img_size": 64}),
}
SMALL = {"embed_dim": 48, "depth": 2, "num_heads": 2}
COMMANDS = {
    "equivariance": (["--images", "4", "--pairs", "1", "--elements", "rot90", "angle:20"], "equivariance.csv"),
    "knn": (["--k", "1", "--batch-size", "4"], "knn.csv"),
    "linear": (["--epochs", "1", "--rates", "0.1", "--batch-size", "4", "--held-out", "0.25"], "linear.csv"),
    "corruptions": (["--images", "2", "--sequences", "1", "--classifier", "knn", "--k", "1"], "corruptions.csv"),
    "detection": (["--steps", "1", "--batch-size", "1", "--image-size", "64"], "detection.csv"),
    "segmentation": (["--epochs", "1", "--rates", "0.1", "--held-out", "0.25"], "segmentation.csv"),
    "show": (["--images", "1", "--elements", "rot90", "--tokens", "1"], "show.csv"),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("encoders")
    paths = []
    for name, (timm_name, options) in ARCHITECTURES.items():
        torch.manual_seed(0)
        paths.append(folder / f"{name}.safetensors")
        save_split_vit(paths[-1], SplitViT(timm_name, 0, **SMALL, **options))
    return paths


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("images")
    for part in ("train", "val"):
        for name in "ab":
            patterns(folder / part / name, 4)
    return f"folder:{folder}"


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_takes_any_architecture(
    command: str, files: list[Path], data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synthetic_coco, "IMAGES", {"train": 4, "val": 2})
    arguments, table = COMMANDS[command]
    source = [] if command in ("detection", "segmentation") else ["--data", data]
    size = ["--image-size", "112"] if command == "corruptions" else []  # one for all, of patches of 14 and 16
    run_cli(command, *files, *source, *arguments, *size, "--out", tmp_path, "--device", "cpu")
    found = {row["model"] for row in rows(tmp_path / table)}
    assert found >= {*ARCHITECTURES, "random", "random (dinov3)", "random (deit3)"}
