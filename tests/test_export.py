"""Encoders in other programs give the same embeddings, for any number of images."""

import json
import sys
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import timm
import torch
from safetensors import safe_open
from torch import Tensor

from ser_fast import cli
from ser_fast import export as exporting
from ser_fast.export import FILES, OPSET, export
from ser_fast.vit import SplitViT, save_split_vit

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
PLAIN = "vit_tiny_patch16_224"
NAMES = [PLAIN, "deit3_small_patch16_224", "vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"]


def encoder(folder: Path, name: str = PLAIN, split: int = 1) -> SplitViT:
    """An encoder in a run's folder, whose every parameter matters."""
    model = SplitViT(name, split, **TINY).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    save_split_vit(folder / "encoder.safetensors", model)
    return model


def batches() -> list[Tensor]:
    return [torch.randn(count, 3, 32, 32) for count in (1, 5)]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_timm(name: str, tmp_path: Path) -> None:
    model = encoder(tmp_path, name, split=0)
    path = export(tmp_path, "timm")
    assert path == tmp_path / "encoder_timm.safetensors"
    loaded = timm.create_model(name, num_classes=0, checkpoint_path=str(path), **TINY).eval()
    for images in batches():
        torch.testing.assert_close(loaded(images), model(images), rtol=0, atol=1e-6)
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["preprocessing"]) == model.preprocessing()


def test_timm_is_another_function_with_a_split(tmp_path: Path) -> None:
    encoder(tmp_path, split=1)
    with pytest.raises(
        ValueError, match=r"format: got 'timm', whose \[CLS\] enters before block 0, and here .* 1 blocks"
    ):
        export(tmp_path, "timm")
    assert [path.name for path in tmp_path.iterdir()] == ["encoder.safetensors"]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_onnx(name: str, tmp_path: Path) -> None:
    model = encoder(tmp_path, name)
    path = export(tmp_path / "encoder.safetensors", "onnx", tmp_path / "new" / "vit.onnx")
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["vit.onnx"]
    session = onnxruntime.InferenceSession(path)
    for images in batches():
        (embedding,) = session.run(["embedding"], {"images": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(embedding), model(images), rtol=0, atol=1e-4)
    written = onnx.load(path)
    onnx.checker.check_model(written, full_check=True)
    assert {entry.domain: entry.version for entry in written.opset_import}[""] == OPSET
    assert session.get_inputs()[0].shape == ["batch", 3, 32, 32]
    assert session.get_outputs()[0].shape == ["batch", 48]
    assert json.loads(session.get_modelmeta().custom_metadata_map["preprocessing"]) == model.preprocessing()


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_torch_program(name: str, tmp_path: Path) -> None:
    model = encoder(tmp_path, name)
    extra = {"preprocessing": ""}
    loaded = torch.export.load(export(tmp_path, "torch"), extra_files=extra).module()
    for images in batches():
        torch.testing.assert_close(loaded(images), model(images), rtol=0, atol=1e-6)
    assert json.loads(extra["preprocessing"]) == model.preprocessing()


def test_a_file_that_is_off_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder(tmp_path, split=0)
    (tmp_path / FILES["timm"]).write_text("of before")
    right = exporting._timm

    def wrong(model: SplitViT, file: Path) -> Any:
        forward = right(model, file)
        return lambda images: forward(images) * (1 + 2e-4)

    monkeypatch.setattr(exporting, "_timm", wrong)
    with pytest.raises(ValueError, match=r"export: 1 random images get an embedding off by 2.0e-04, beyond 0.0001"):
        export(tmp_path, "timm")
    assert (tmp_path / FILES["timm"]).read_text() == "of before"
    assert len(list(tmp_path.iterdir())) == 2


def test_what_cannot_be_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"path: .* holds no encoder.safetensors"):
        export(tmp_path, "torch")
    encoder(tmp_path)
    with pytest.raises(ValueError, match="format: got 'jit', takes one of 'timm', 'onnx', 'torch'"):
        export(tmp_path, "jit")  # type: ignore[arg-type]
    monkeypatch.setattr(exporting, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="format: 'onnx' needs onnxscript and onnxruntime: pip install"):
        export(tmp_path, "onnx")


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    encoder(tmp_path, split=0)
    monkeypatch.setattr(sys, "argv", ["ser-fast", "export", str(tmp_path), "--format", "timm"])
    cli.main()
    assert "encoder_timm.safetensors" in "".join(capsys.readouterr().out.split())
    assert (tmp_path / "encoder_timm.safetensors").stat().st_size > 1000
