"""Weights from elsewhere: every family and form of a file gives timm's own function, and nothing loads in part."""

import pickle
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from ser_fast.objectives.moco_v3 import MoCoV3
from ser_fast.pretrained import NORMALIZATIONS
from ser_fast.training.config import ModelConfig
from ser_fast.training.options import parse
from ser_fast.training.pretraining import Pretraining
from ser_fast.training.run_folder import RunFolder, load_checkpoint
from ser_fast.training.trainer import train
from ser_fast.vit import SplitViT, load_split_vit, save_split_vit

TINY = {"patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
PLAIN, DEIT3 = "vit_tiny_patch16_224", "deit3_small_patch16_224"
DINOV2, DINOV3 = "vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"
FAMILIES = [PLAIN, DEIT3, DINOV2, DINOV3]
OTHERS = ["deit_tiny_distilled_patch16_224", "eva02_tiny_patch14_224", "vit_base_patch16_clip_224"]
IMAGENET = NORMALIZATIONS["imagenet"]


def public(name: str, **options: Any) -> nn.Module:
    """What a published file holds: a classifier of ten at 32 pixels, whose every parameter matters."""
    model = timm.create_model(name, **{"img_size": 32, "num_classes": 10, "dynamic_img_size": True, **TINY, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def embedding(model: nn.Module, images: Tensor) -> Tensor:
    return model.forward_head(model.forward_features(images), pre_logits=True)


def load(name: str, path: str | Path, **options: Any) -> SplitViT:
    return SplitViT(name, **{"split": 0, "pretrained": path, "img_size": 48, **TINY, **options}).eval()


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize("name", FAMILIES + OTHERS)
@torch.no_grad()
def test_split_0_is_the_published_model(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    reference = public(name)
    save_file(reference.state_dict(), tmp_path / "public.safetensors")
    # Positions are resized once, at loading; timm resizes them at every call, to the same values.
    for side in (32, 48):
        model = load(name, tmp_path / "public.safetensors", img_size=side)
        assert model.pretrained
        images = torch.randn(2, 3, side, side)
        torch.testing.assert_close(model(images), embedding(reference, images), rtol=0, atol=2e-5)
    assert "head.bias, head.weight" in caplog.text
    assert "left out: no part of the encoder" in caplog.text


FORMS: dict[str, Any] = {
    "bare": lambda state: state,
    "model": lambda state: {"model": state, "epoch": 3, "args": Namespace(lr=0.1)},
    "state_dict of a wrapped module": lambda state: {"state_dict": prefixed(state, "module.")},
    "teacher": lambda state: {
        "student": prefixed({key: value + 1 for key, value in state.items()}, "module.backbone."),
        "teacher": {**prefixed(state, "backbone."), "dino_head.mlp.0.weight": torch.ones(2)},
    },
    "averaged": lambda state: {"model": {key: value + 1 for key, value in state.items()}, "model_ema": state},
    "part of a method": lambda state: {
        "state_dict": {**prefixed(state, "module.base_encoder."), "module.predictor.0.weight": torch.ones(2)}
    },
    "encoder": lambda state: {"model": {**prefixed(state, "encoder."), "decoder.weight": torch.ones(2)}},
}


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_forms_of_a_file(form: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    reference = public(DINOV2)
    torch.save(FORMS[form](reference.state_dict()), tmp_path / "public.pth")
    images = torch.randn(2, 3, 32, 32)
    model = load(DINOV2, tmp_path / "public.pth", img_size=32)
    torch.testing.assert_close(model(images), embedding(reference, images), rtol=0, atol=1e-6)
    for part in ("dino_head.mlp.0.weight", "module.predictor.0.weight", "decoder.weight"):
        if part in str(FORMS[form]({})):
            assert part.removeprefix("module.") in caplog.text


def dinov2(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of DINOv2's own repository, where [CLS] has a position."""
    state = dict(state)
    position = torch.randn(1, 1, 48)
    state["register_tokens"] = state.pop("reg_token")
    state["pos_embed"] = torch.cat([position, state["pos_embed"]], 1)
    state["cls_token"] = state["cls_token"] - position
    return {**state, "mask_token": torch.randn(1, 48)}


def dinov3(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of DINOv3's, whose queries and values have biases that are zero, and keys some that are masked."""
    state = {key.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma"): v for key, v in state.items()}
    state["storage_tokens"] = state.pop("reg_token")
    for i in range(3):
        state[f"blocks.{i}.attn.qkv.bias"] = torch.cat([torch.zeros(48), torch.randn(48), torch.zeros(48)])
        state[f"blocks.{i}.attn.qkv.bias_mask"] = torch.ones(144)
    return {**state, "mask_token": torch.randn(1, 48), "rope_embed.periods": torch.randn(4)}


def deit3(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): v for key, v in state.items()}


@pytest.mark.parametrize(("name", "rename"), [(DINOV2, dinov2), (DINOV3, dinov3), (DEIT3, deit3)])
@torch.no_grad()
def test_names_of_the_authors(name: str, rename: Any, tmp_path: Path) -> None:
    reference = public(name, num_classes=0)
    renamed = rename(reference.state_dict())
    assert renamed.keys() != reference.state_dict().keys()
    torch.save({"model": renamed}, tmp_path / "public.pth")
    images = torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(load(name, tmp_path / "public.pth")(images), reference(images), rtol=0, atol=2e-5)


def test_biases_that_the_model_does_not_have(tmp_path: Path) -> None:
    state = dinov3(public(DINOV3, num_classes=0).state_dict())
    state["blocks.1.attn.qkv.bias"][0] = 0.5
    torch.save(state, tmp_path / "public.pth")
    with pytest.raises(ValueError, match=r"has blocks.1.attn.qkv.bias, and the model has none; its name with _qkvb"):
        load(DINOV3, tmp_path / "public.pth")


def without(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if key not in ("norm.weight", "cls_token")}


MISFITS: list[tuple[str, Any, str]] = [
    (PLAIN, without, r"does not fit vit_tiny_patch16_224: missing cls_token, norm.weight$"),
    (PLAIN, lambda state: {**state, "neck.weight": torch.ones(1)}, "unexpected neck.weight$"),
    (PLAIN, lambda state: {**state, "norm.bias": torch.ones(9)}, r"of another shape norm.bias \(9,\) for \(48,\)$"),
    (PLAIN, lambda _: public(PLAIN, depth=4).state_dict(), r"unexpected blocks.3.norm1.weight, .* and 8 more$"),
    (PLAIN, lambda _: public(PLAIN, depth=2).state_dict(), r"missing blocks.2.norm1.weight, .* and 8 more$"),
    (PLAIN, lambda _: public(PLAIN, embed_dim=24).state_dict(), r"of another shape cls_token \(1, 1, 24\)"),
    (PLAIN, lambda _: public(PLAIN, patch_size=4).state_dict(), r"patch_embed.proj.weight is \(48, 3, 4, 4\), takes"),
    (PLAIN, lambda _: public(DINOV3).state_dict(), r"missing pos_embed, .*; unexpected reg_token"),
    (DINOV2, lambda _: public(PLAIN).state_dict(), "does not fit vit_small_patch14_reg4_dinov2: "),
    (PLAIN, lambda state: {**state, "pos_embed": state["pos_embed"][:, :-2]}, "does not fit vit_tiny_patch16_224: "),
    (PLAIN, lambda state: {**state, "epoch": 3}, "holds no state dict: epoch is no tensor"),
    (PLAIN, lambda state: list(state), "holds a list, takes a state dict"),
]


@pytest.mark.parametrize(("name", "change", "message"), MISFITS)
def test_what_does_not_fit_is_named(name: str, change: Any, message: str, tmp_path: Path) -> None:
    torch.save(change(public(PLAIN).state_dict()), tmp_path / "public.pth")
    with pytest.raises(ValueError, match=message) as error:
        load(name, tmp_path / "public.pth", split=1)
    assert "\n" not in str(error.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"path: .*absent.pth is no file"):
        load(PLAIN, tmp_path / "absent.pth")
    (tmp_path / "text.pth").write_text("text")
    with pytest.raises(ValueError, match=r"pretrained: .*text.pth can't be read as weights alone"):
        load(PLAIN, tmp_path / "text.pth")
    with pytest.raises(ValueError, match="normalization: got 'none', takes one of auto, imagenet, half, clip"):
        load(PLAIN, tmp_path / "text.pth", normalization="none")


class Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("evil"),))


def test_a_pickle_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": public(PLAIN).state_dict(), "args": Evil()}, "evil.pth")
    with pytest.raises(ValueError, match="weights_only=True"):
        load(PLAIN, "evil.pth")
    Path("bare.pth").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="weights_only=True"):
        load(PLAIN, "bare.pth")
    assert not Path("evil").exists()


@torch.no_grad()
def test_a_run_goes_on_elsewhere(tmp_path: Path) -> None:
    first = SplitViT(PLAIN, 2, img_size=48, **TINY).eval()
    save_split_vit(tmp_path / "encoder.safetensors", first)
    second = load(PLAIN, tmp_path, split=2)  # the run's folder
    images = torch.randn(2, 3, 48, 48)
    assert torch.equal(second(images), first(images))
    with pytest.raises(ValueError, match=r"entering after 2 blocks, and here they enter after 0.*split 2"):
        load(PLAIN, tmp_path)


@pytest.mark.parametrize(("name", "normalization"), [(PLAIN, "half"), (OTHERS[2], "clip"), (DINOV3, "half")])
@torch.no_grad()
def test_another_normalization_is_folded_into_the_patches(name: str, normalization: str, tmp_path: Path) -> None:
    reference = public(name)
    save_file(reference.state_dict(), tmp_path / "public.safetensors")
    model = load(name, tmp_path / "public.safetensors", normalization=normalization)
    pixels = torch.rand(2, 3, 48, 48)
    mean, std = (torch.tensor(values)[:, None, None] for values in NORMALIZATIONS[normalization])
    ours = (pixels - torch.tensor(IMAGENET[0])[:, None, None]) / torch.tensor(IMAGENET[1])[:, None, None]
    wanted = embedding(reference, (pixels - mean) / std)
    torch.testing.assert_close(model(ours), wanted, rtol=0, atol=1e-4)
    assert not torch.allclose(load(name, tmp_path / "public.safetensors")(ours), wanted, atol=1e-2)


def test_a_mean_that_nothing_can_take_up(tmp_path: Path) -> None:
    options = {"pos_embed": "none", "class_token": False, "global_pool": "avg"}
    clip = OTHERS[2]
    save_file(public(clip, **options).state_dict(), tmp_path / "public.safetensors")
    with pytest.raises(ValueError, match=r"normalization: .* neither a patch bias nor positions"):
        load(clip, tmp_path / "public.safetensors", normalization="clip", **options)


@torch.no_grad()
def test_public_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    create_model, asked = timm.create_model, []
    reference = public(PLAIN)

    def hub(name: str, pretrained: bool = False, **options: Any) -> nn.Module:
        if not pretrained:
            return create_model(name, **options)
        asked.append(name)
        return reference

    monkeypatch.setattr(timm, "create_model", hub)
    model = load(PLAIN, "timm:vit_tiny_patch16_224.some_tag")
    assert load(PLAIN, True).recipe == model.recipe
    assert asked == ["vit_tiny_patch16_224.some_tag", PLAIN]
    # This name's public weights take pixels of mean and deviation .5, as timm says.
    half = torch.rand(2, 3, 48, 48) * 2 - 1
    ours = ((half + 1) / 2 - torch.tensor(IMAGENET[0])[:, None, None]) / torch.tensor(IMAGENET[1])[:, None, None]
    torch.testing.assert_close(model(ours), embedding(reference, half), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match=r"pretrained: timm does not fit vit_tiny_patch16_224: missing blocks.3"):
        load(PLAIN, "timm", depth=4)


def test_public_weights_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    create_model = timm.create_model

    def offline(name: str, pretrained: bool = False, **options: Any) -> nn.Module:
        if pretrained:
            raise FileNotFoundError("no network\nhere")
        return create_model(name, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    message = r"^pretrained: the weights of vit_tiny_patch16_224 can't be had: no network here; a local .* FILE$"
    with pytest.raises(ValueError, match=message):
        load(PLAIN, "timm")


def test_objectives_leave_pretrained_weights_alone(tmp_path: Path) -> None:
    reference = public(PLAIN)
    save_file(reference.state_dict(), tmp_path / "public.safetensors")
    config = ModelConfig(PLAIN, image_size=32, pretrained=str(tmp_path / "public.safetensors"), **TINY)
    pretraining = Pretraining(encoder := config.build(), MoCoV3(48, dim=8, mlp_dim=8))
    assert encoder.split == 0
    assert all(parameter.requires_grad for parameter in encoder.parameters())
    assert pretraining.teacher is not None
    for model in (encoder, pretraining.teacher.encoder):
        state = model.state_dict()
        assert all(torch.equal(value, reference.state_dict()[key]) for key, value in state.items())
    frozen = replace(config, freeze=("patch_embed", "pos_embed", "norm")).build()
    names = {name for name, parameter in frozen.named_parameters() if not parameter.requires_grad}
    assert names == {"patch_embed.proj.weight", "patch_embed.proj.bias", "pos_embed", "norm.weight", "norm.bias"}
    with pytest.raises(
        ValueError, match=r"model.freeze: got 'pos_embed', which vit_small_patch16_dinov3 does not have"
    ):
        ModelConfig(DINOV3, image_size=32, freeze=("pos_embed",), **TINY).build()


def test_where_cls_enters_by_default() -> None:
    assert ModelConfig().blocks_before_cls == 3
    assert ModelConfig(pretrained="timm").blocks_before_cls == 0
    assert ModelConfig(pretrained="timm", split=2).blocks_before_cls == 2
    assert parse(["--model.pretrained", "timm"]).model.blocks_before_cls == 0


@pytest.mark.parametrize("name", FAMILIES)
def test_post_training(name: str, tmp_path: Path) -> None:
    """The options that the README gives, on a folder of images, from a file that timm's users have."""
    images, rng = tmp_path / "images", np.random.default_rng(0)
    images.mkdir()
    for number in range(16):
        coarse = Image.fromarray(rng.integers(256, size=(6, 6, 3), dtype=np.uint8))
        coarse.resize((40, 32), Image.Resampling.BICUBIC).save(images / f"{number:02}.png")
    reference = public(name)
    save_file(reference.state_dict(), tmp_path / "public.safetensors")

    def run(out: str, *options: str) -> Path:
        shape = [f"--model.{key.replace('_', '-')}={value}" for key, value in TINY.items()]
        fixed = ["--optim.batch-size=8", "--views.share=0.5", "--moco.dim=16", "--moco.mlp-dim=32", "--workers=0"]
        small = ["--ser.hidden-dim=32", "--ser.out-dim=16", "--optim.warmup=0", "--device=cpu", "--model.image-size=32"]
        recipe = ["--model.pretrained", str(tmp_path / "public.safetensors"), "--optim.lr=1e-3"]
        arguments = ["--data", f"folder:{images}", "--out", str(tmp_path / out), "--model.name", name]
        return train(parse([*arguments, *shape, *fixed, *small, *recipe, *options]))

    folder = RunFolder(run("run", "--ser.layers", "1", "3", "--optim.steps=2"))
    log = folder.read_log()
    assert len(log) == 2
    assert all(np.isfinite(line["loss"]) and line["ser"] > 0 for line in log)
    trained = load_split_vit(folder.path)
    assert trained.split == 0
    wanted = {key: value for key, value in reference.state_dict().items() if not key.startswith("head")}
    state = trained.state_dict()
    assert state.keys() == wanted.keys()
    distance = max(float((state[key] - wanted[key]).abs().max()) for key in wanted)
    assert 0 < distance < 1e-3  # from where they were, two steps of AdamW
    teacher = load_checkpoint(folder.list_checkpoints()[-1], torch.device("cpu"))["model"]
    assert max(float((teacher[f"teacher.encoder.{key}"] - wanted[key]).abs().max()) for key in wanted) < 1e-4
    with pytest.raises(ValueError, match=r"""ser.layers: got "split", which is 0 here, the patch embedding"""):
        run("other")
