"""Pictures of token maps: what is compared with what, where tokens are found, and the files."""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases.command_line import PNG, refusal, rows, run_cli
from PIL import Image
from torch import Tensor, nn

from ser_fast.evaluation import pictures
from ser_fast.lattice import LatticeMap
from ser_fast.vit import Encoded, SplitViT, save_split_vit

SIZE = 32


def make_encoder(seed: int = 1) -> SplitViT:
    torch.manual_seed(seed)
    options = {"img_size": SIZE, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    return SplitViT("vit_tiny_patch16_224", 1, **options)


class Pixels(nn.Module):
    """An encoder of one layer whose tokens are the pixels of their patch in any order: equivariant where g permutes."""

    patch_size, image_size, depth, split = (4, 4), (SIZE, SIZE), 1, 0

    def __init__(self, *, rolled: bool = False) -> None:
        super().__init__()
        self.rolled = rolled

    def encode(self, images: Tensor, layers: Any = (), until: int | None = None) -> Encoded:
        patches = images.unflatten(2, (-1, 4)).unflatten(4, (-1, 4))  # (B, 3, H, 4, W, 4)
        tokens = patches.permute(0, 2, 4, 1, 3, 5).flatten(4).sort(-1).values.flatten(3)  # (B, H, W, 48)
        return Encoded(None, {1: tokens.roll(1, 2) if self.rolled else tokens}, {})


def draw(model: Any, element: str, tokens: int = 4) -> pictures.Panel:
    images = torch.randint(256, (2, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(0)).byte()
    g = pictures.parse_elements([element], (8, 8))
    return pictures._panels(model, images, g, [1], tokens)[0, element]


@pytest.mark.parametrize("element", ["rot90", "hflip", "antitranspose"])
def test_an_equivariant_encoder_has_no_error_and_finds_all(element: str) -> None:
    layer = draw(Pixels(), element).layers[1]
    assert layer.error < 1e-5
    assert layer.hit == 1
    assert layer.chance == 1 / 64
    assert len(layer.matches) == 4
    torch.testing.assert_close(layer.colors.after, layer.colors.moved, rtol=0, atol=1e-5)
    size = LatticeMap.d4((8, 8), pictures.parse_elements([element], (8, 8))[element].d4_code.item())
    for match in layer.matches:
        assert match.hit
        assert match.true == match.found
        marked = torch.zeros(1, 8, 8, 1)
        marked[0, int(match.place[0]), int(match.place[1])] = 1
        moved = pictures.group_action(marked, size)
        assert isinstance(moved, Tensor)
        assert moved[0, int(match.found[0]), int(match.found[1]), 0] == 1


def test_an_encoder_that_shifts_its_tokens_is_off_by_that() -> None:
    """Before g a token is one to the right of where it was, after a half turn one to the right of that."""
    layer = draw(Pixels(rolled=True), "rot180").layers[1]
    assert layer.error > 0.5
    assert layer.hit == 0
    for match in layer.matches:
        assert match.found[0] == match.true[0]
        assert (match.found[1] - match.true[1]) % 8 == 2


def test_colors_are_one_scale_for_all_three_maps() -> None:
    maps = [torch.randn(2, 4, 4, 6, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    axes = pictures._principal_axes(maps)
    again = pictures._principal_axes([maps[2], maps[0], maps[1]])
    torch.testing.assert_close(axes.axes, again.axes, rtol=0, atol=1e-4)
    torch.testing.assert_close(axes.axes.T @ axes.axes, torch.eye(3), rtol=0, atol=1e-5)
    tokens = torch.cat([m.flatten(0, 2) for m in maps])
    projected = (tokens - tokens.mean(0)) @ axes.axes
    deviations = projected.std(0)
    assert deviations[0] > deviations[1] > deviations[2]
    assert deviations[2] ** 2 >= tokens.T.cov().diagonal().min()
    for m in maps:
        assert 0 <= axes.colors(m).min() <= axes.colors(m).max() <= 1


def test_tokens_that_g_does_not_show_are_left_out() -> None:
    panel = draw(Pixels(), "crop:0,0,0.5,0.5", tokens=16)
    assert bool(panel.valid.all())
    matches = panel.layers[1].matches
    assert matches
    assert all(max(match.place) < 4 for match in matches)
    turned = draw(Pixels(), "angle:45")
    assert not bool(turned.valid.all())
    assert not math.isnan(turned.layers[1].error)


def write_images(folder: Path) -> Path:
    folder.mkdir()
    for number in range(3):
        pixels = np.random.default_rng(number).integers(256, size=(SIZE, SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((40, 36)).save(folder / f"{number}.png")
    return folder


def test_the_command_draws_checkpoints_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in "ab":
        save_split_vit(tmp_path / f"{name}.safetensors", make_encoder(ord(name)))
    images, out = write_images(tmp_path / "images"), tmp_path / "out"
    options = ["--data", f"folder:{images}", "--images", 2, "--image-size", SIZE, "--device", "cpu", "--out", out]
    maps = ["--elements", "rot90", "scale:0.5"]
    run_cli("show", tmp_path / "a.safetensors", tmp_path / "b.safetensors", *options, *maps)
    assert "error, tokens found" in " ".join(capsys.readouterr().out.split())
    table = rows(out / "show.csv")
    assert [(r["image"], r["element"], r["model"], r["layer"]) for r in table] == [
        (image, element, model, layer)
        for image in "01"
        for element in ("rot90", "scale:0.5")
        for model in ("a", "b", "random")
        for layer in "12"
    ]
    files = sorted(path.name for path in (out / "show").iterdir())
    stems = [f"{image}_{element}" for image in "01" for element in ("rot90", "scale_0.5")]
    assert files == [f"{stem}_{kind}.png" for stem in stems for kind in ("matches", "tokens")]
    assert all((out / "show" / name).read_bytes().startswith(PNG) for name in files)
    page = (out / "show.html").read_text()
    assert len(re.findall(r'<img alt="[^"]+" src="data:image/png;base64,', page)) == len(files)
    assert "http" not in re.sub(r"<meta[^>]*>", "", page)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layers", 3], "layers: got 3, checkpoint takes 1 to 2"),
        (["--elements", "spin"], "elements: got 'spin'"),
        (["--elements", "shift:9,9"], "elements: 'shift:9,9' leaves no valid token"),
        (["--images", 0], "images: got 0"),
        (["--tokens", 0], "tokens: got 0"),
        (["--image-size", 20], "images: got"),
    ],
    ids=str,
)
def test_options_out_of_range_are_one_line(tmp_path: Path, options: list[Any], message: str) -> None:
    save_split_vit(tmp_path / "encoder.safetensors", make_encoder())
    data = f"folder:{write_images(tmp_path / 'images')}"
    size = [] if "--image-size" in options else ["--image-size", SIZE]
    said = refusal("show", tmp_path / "encoder.safetensors", "--data", data, "--device", "cpu", *size, *options)
    assert said.startswith(message)
