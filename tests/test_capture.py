"""Tokens of other people's models, and maps of other people's transforms."""

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as F

from ser_fast.capture import TokenCapture
from ser_fast.lattice import LatticeMap
from ser_fast.views.pixels import transform_images


def tiny(name: str, **options: Any) -> Any:
    return timm.create_model(name, embed_dim=48, depth=3, num_heads=3, num_classes=0, **options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {"img_size": (32, 64), "patch_size": 8}),
        ("vit_small_patch14_reg4_dinov2", {"img_size": 56}),
        ("vit_small_patch16_dinov3", {"img_size": 64}),
    ],
)
def test_tokens_are_those_of_the_block(name: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    vit = tiny(name, **options).eval()
    size = options["img_size"] if isinstance(options["img_size"], tuple) else (options["img_size"],) * 2
    images = torch.randn(2, 3, *size)
    with TokenCapture(vit, block=2) as capture:
        embedding = vit(images)
        tokens = capture.tokens
    expected = vit.forward_intermediates(images, indices=[1], output_fmt="NCHW", intermediates_only=True)[0]
    torch.testing.assert_close(tokens, expected.permute(0, 2, 3, 1))
    tokens.sum().backward()
    assert vit.blocks[1].mlp.fc1.weight.grad is not None
    assert vit.blocks[2].mlp.fc1.weight.grad is None
    torch.testing.assert_close(vit(images), embedding)  # and the hooks are off
    assert capture.tokens is tokens or torch.equal(capture.tokens, tokens)


class HuggingFace(nn.Module):
    """As transformers builds a ViT: blocks that give tuples, below model.encoder.layer, and pixel_values by name."""

    def __init__(self, registers: int) -> None:
        super().__init__()
        self.config = type("Config", (), {"num_register_tokens": registers} if registers else {})()
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList([Block() for _ in range(3)])
        self.registers = registers

    def forward(self, *, pixel_values: Tensor) -> Tensor:
        tokens = nn.functional.avg_pool2d(pixel_values, 8).flatten(2).mT
        prefix = tokens.new_full((len(tokens), 1 + self.registers, 3), -7)
        tokens = torch.cat([prefix, tokens], 1)
        for block in self.encoder.layer:  # type: ignore[union-attr]
            (tokens,) = block(tokens)
        return tokens


class Block(nn.Module):
    def forward(self, tokens: Tensor) -> tuple[Tensor]:
        return (tokens + 1,)


@pytest.mark.parametrize("registers", [0, 4])
def test_models_as_hugging_face_builds_them(registers: int) -> None:
    model, images = HuggingFace(registers), torch.rand(2, 3, 16, 40)
    capture = TokenCapture(model, block=2)
    model(pixel_values=images)
    torch.testing.assert_close(capture.tokens, nn.functional.avg_pool2d(images, 8).permute(0, 2, 3, 1) + 2)


def test_what_cannot_be_captured_is_named() -> None:
    vit = tiny("vit_tiny_patch16_224", img_size=32, patch_size=8)
    with pytest.raises(ValueError, match="block: got 4, takes 1 to 3"):
        TokenCapture(vit, block=4)
    with pytest.raises(ValueError, match="block: the blocks of Linear can't be found"):
        TokenCapture(nn.Linear(1, 1), block=1, prefix=0)
    with pytest.raises(ValueError, match="prefix: Linear does not say"):
        TokenCapture(nn.Linear(1, 1), block=1)
    capture = TokenCapture(vit, block=1, prefix=0)
    with pytest.raises(ValueError, match="tokens: the model was not called"):
        _ = capture.tokens
    vit(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="prefix: got 0, which leaves 17 tokens of images of 32 x 32"):
        _ = capture.tokens


# ---------------------------------------------------------------- maps of views


def smooth(height: int, width: int) -> Tensor:
    """A picture that resampling hardly changes."""
    y, x = torch.meshgrid(torch.linspace(0, 3, height), torch.linspace(0, 4, width), indexing="ij")
    return torch.stack([(y + 2 * x).sin(), (2 * y - x).cos(), (y * x).sin()]) / 2 + 0.5


def test_maps_are_those_of_torchvisions_transforms() -> None:
    sizes = [(60, 80), (48, 100), (90, 64)]
    boxes = torch.tensor([[4, 10, 50, 60], [0, 0, 48, 100], [30, 2, 40, 60]])
    hflip, vflip = torch.tensor([True, False, True]), torch.tensor([False, True, True])
    angle = torch.tensor([20.0, 0.0, -35.0])
    g = LatticeMap.from_views(torch.tensor(sizes), (48, 32), box=boxes, hflip=hflip, vflip=vflip, angle=angle)
    assert (g.size_in, g.size_out, len(g)) == ((1, 1), (48, 32), 3)
    for i, (height, width) in enumerate(sizes):
        picture = smooth(height, width)
        view = F.resized_crop(picture, *boxes[i].tolist(), size=[48, 32], antialias=True)
        view = F.horizontal_flip(view) if hflip[i] else view
        view = F.vertical_flip(view) if vflip[i] else view
        view = F.rotate(view, float(angle[i]), interpolation=F.InterpolationMode.BILINEAR)
        one = g[i : i + 1].on((height, width), (48, 32))
        ours = transform_images(picture[None], one)[0]
        # torchvision fills the corners of its frame with black, and blends its edges with it.
        shown = F.rotate(torch.ones(1, 48, 32), float(angle[i]), interpolation=F.InterpolationMode.BILINEAR)[0]
        seen = one.valid()[0].unflatten(0, (48, 32))
        assert torch.equal(seen[(shown - 0.5).abs() > 0.49], shown[(shown - 0.5).abs() > 0.49] > 0.5)
        assert (ours - view)[:, seen & (shown > 0.999)].abs().mean() < 0.01
        turned = LatticeMap.from_views((height, width), (48, 32), box=boxes[i : i + 1], angle=-angle[i : i + 1] - 25)
        assert (transform_images(picture[None], turned.on((height, width), (48, 32)))[0] - view).abs().mean() > 0.03


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"box": torch.zeros(2, 3)}, r"box: got shape \(2, 3\), takes \(2, 4\)"),
        ({"box": torch.tensor([[350.0, 0, 10, 10]])}, "box: got one that shows nothing"),
        ({"hflip": torch.tensor([1, 0])}, "hflip: got torch.int64"),
        ({"hflip": torch.tensor([True]), "angle": torch.zeros(2)}, r"angle: got shape \(2,\), takes \(1,\)"),
        ({"image_size": (300, 0)}, "image_size: got shape"),
    ],
)
def test_views_that_cannot_be_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LatticeMap.from_views(**{"image_size": (300, 300), "view_size": (32, 32), **options})
