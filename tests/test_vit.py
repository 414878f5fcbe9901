import copy
import json
import os
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ser_fast.pretrained import read_safetensors, seal
from ser_fast.vit import METADATA_KEY, SplitViT, load_split_vit, save_split_vit

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
NATIVE, OTHER, NON_SQUARE = (32, 32), (48, 48), (24, 40)

# One name for each way a family embeds positions, inserts prefix tokens, normalises or pools.
PREFIX_FAMILIES = [
    "vit_tiny_patch16_224",
    "deit3_small_patch16_224",  # [CLS] without a position
    "vit_small_patch14_reg4_dinov2",  # registers, LayerScale
    "vit_base_patch16_clip_224",  # norm_pre
    "eva02_tiny_patch14_224",  # absolute and rotary positions, SwiGLU, average pool
    "vit_small_patch16_dinov3",  # rotary positions alone, registers
    "vit_small_patch16_rope_mixed_224",  # rotary positions of each block its own
]
FAMILIES = [
    *PREFIX_FAMILIES,
    "deit_tiny_distilled_patch16_224",  # two tokens pooled
    "vit_base_patch16_gap_224",  # no prefix tokens, fc_norm
    "vit_small_patch16_18x2_224",  # parallel blocks
    "vit_base_patch16_siglip_224",  # no prefix tokens, attention pool
]
ROTARY, PLAIN = "vit_small_patch16_dinov3", "vit_tiny_patch16_224"


def timm_model(name: str, **kwargs: object) -> nn.Module:
    """A tiny timm model, in eval mode, whose every parameter matters (LayerScale starts at 1e-5, biases at 0)."""
    model = timm.create_model(name, num_classes=0, dynamic_img_size=True, **{**TINY, **kwargs}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def split_vit(reference: nn.Module, name: str, split: int) -> SplitViT:
    model = SplitViT(name, split, **TINY).eval()
    model.load_state_dict(reference.state_dict(), strict=True)
    return model


def images_of(size: tuple[int, int]) -> Tensor:
    return torch.randn(2, 3, *size)


@pytest.mark.parametrize("size", [NATIVE, OTHER, NON_SQUARE])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_split_0_is_timm(name: str, size: tuple[int, int]) -> None:
    reference = timm_model(name)
    model = split_vit(reference, name, split=0)
    images = images_of(size)
    tokens = model.early(images)
    assert tokens.shape == (2, size[0] // 8, size[1] // 8, 48)
    torch.testing.assert_close(model.late(tokens), reference.forward_features(images), rtol=0, atol=1e-6)
    torch.testing.assert_close(model(images), reference(images), rtol=0, atol=1e-6)


def late_oracle(reference: nn.Module, tokens: Tensor, split: int) -> Tensor:
    """timm's blocks from `split` on, by hand, on patch tokens (B, H, W, C) behind the prefix tokens."""
    prefix = torch.cat([t for t in (reference.cls_token, getattr(reference, "reg_token", None)) if t is not None], 1)
    if reference.pos_embed is not None and not reference.no_embed_class:
        prefix = prefix + reference.pos_embed[:, : prefix.shape[1]]
    prefix = reference.norm_pre(prefix).expand(len(tokens), -1, -1)
    sequence = torch.cat([prefix, tokens.flatten(1, 2)], dim=1)
    rope = reference.rope.get_embed(shape=tokens.shape[1:3]) if hasattr(reference, "rope") else None
    for i in range(split, len(reference.blocks)):
        block = reference.blocks[i]
        rotary = {} if rope is None else {"rope": rope[i] if reference.rope_mixed else rope}
        sequence = block(sequence, **rotary)
    return reference.norm(sequence)


@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize("size", [NATIVE, NON_SQUARE])
@pytest.mark.parametrize("name", PREFIX_FAMILIES)
@torch.no_grad()
def test_split_against_timm_without_prefix_tokens(name: str, size: tuple[int, int], split: int) -> None:
    reference = timm_model(name)
    # The same weights in a timm model that has no prefix tokens at all.
    registers = {"num_reg_tokens": 0} if hasattr(reference, "rope") else {"reg_tokens": 0}
    patches_only = timm_model(name, class_token=False, global_pool="avg", **registers)
    weights = reference.state_dict()
    if "pos_embed" in weights and not reference.no_embed_class:
        weights["pos_embed"] = weights["pos_embed"][:, reference.num_prefix_tokens :]
    patches_only.load_state_dict(weights, strict=False)
    images = images_of(size)
    maps = patches_only.forward_intermediates(images, norm=False, intermediates_only=True)  # depth x (B, C, H, W)

    model = split_vit(reference, name, split)
    tokens = model.early(images)
    torch.testing.assert_close(tokens, maps[split - 1].permute(0, 2, 3, 1), rtol=0, atol=1e-5)
    features = late_oracle(reference, tokens, split)
    torch.testing.assert_close(model.late(tokens), features, rtol=0, atol=1e-5)
    torch.testing.assert_close(model(images), reference.forward_head(features, pre_logits=True), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", PREFIX_FAMILIES)
@torch.no_grad()
def test_early_does_not_see_the_prefix_tokens(name: str) -> None:
    model = split_vit(timm_model(name), name, split=2)
    images = images_of(OTHER)
    early = model.early(images)
    patches = model.late(early)[:, model.num_prefix_tokens :]
    for token in {"cls_token", "reg_token"} & set(model.state_dict()):
        model.get_parameter(token).normal_()
        assert torch.equal(model.early(images), early)
        changed = model.late(early)[:, model.num_prefix_tokens :]
        assert not torch.allclose(changed, patches, atol=1e-3)
        patches = changed


@pytest.mark.parametrize("split", [0, 2, 3])
@pytest.mark.parametrize("name", [PLAIN, ROTARY, "vit_base_patch16_gap_224"])
@torch.no_grad()
def test_layer_maps(name: str, split: int) -> None:
    model = split_vit(timm_model(name), name, split)
    images = images_of(NON_SQUARE)
    maps = model.layer_maps(images)
    assert [m.shape for m in maps] == [(2, 3, 5, 48)] * 3
    if split:
        assert torch.equal(maps[split - 1], model.early(images))
    features = model.late(model.early(images))[:, model.num_prefix_tokens :]
    if split < model.depth:
        torch.testing.assert_close(model.get_submodule("norm")(maps[-1]).flatten(1, 2), features)


@pytest.mark.parametrize("name", FAMILIES)
def test_names_are_timms(name: str) -> None:
    reference = timm_model(name)
    model = split_vit(reference, name, split=1)
    assert list(model.state_dict()) == list(reference.state_dict())
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in reference.named_parameters()]
    reference.load_state_dict(model.state_dict(), strict=True)
    assert model.no_weight_decay() == reference.no_weight_decay()
    assert (model.embed_dim, model.depth, model.patch_size, model.split) == (48, 3, (8, 8), 1)
    assert isinstance(model.patch_embed, timm.layers.PatchEmbed)


def test_an_instance_is_taken_over_with_its_weights() -> None:
    reference = timm_model(PLAIN)
    model = SplitViT(reference, split=1)
    assert all(a is b for a, b in zip(model.parameters(), reference.parameters(), strict=True))


@pytest.mark.parametrize("name", [PLAIN, ROTARY])
def test_copies_and_conversions_keep_one_set_of_tensors(name: str) -> None:
    model = split_vit(timm_model(name), name, split=1)
    images = images_of(NATIVE)
    output = model(images)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(images), output)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert twin(images).abs().max() == 0
    assert torch.equal(model(images), output)
    model.cls_token = nn.Parameter(torch.randn(1, 1, 48))  # replaced, as meta and sharded tensors are
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(images), model(images))
    assert not torch.allclose(model(images), output, atol=1e-3)
    output = model(images)
    converted = model.to(torch.float64)
    assert all(p.dtype == torch.float64 for p in converted.parameters())
    torch.testing.assert_close(converted(images.double()), output.double(), rtol=0, atol=1e-5)


def gradients(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(images).square().sum().backward()
    return {n.removeprefix("module."): p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", [PLAIN, ROTARY, "vit_small_patch16_rope_mixed_224"])
def test_gradient_checkpointing(name: str) -> None:
    model = split_vit(timm_model(name), name, split=2)
    images = images_of(OTHER)
    expected = gradients(model, images)
    assert set(expected) == {n for n, _ in model.named_parameters()}
    runs = [0] * model.depth
    for i in range(model.depth):
        block = model.get_submodule(f"blocks.{i}")
        block.register_forward_pre_hook(lambda *_, i=i: runs.__setitem__(i, runs[i] + 1))
    model.set_grad_checkpointing(True)
    actual = gradients(model, images)
    assert runs == [2, 2, 2]  # forward, and again in backward
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_gradients_reach_resized_positions() -> None:
    model = split_vit(timm_model(PLAIN), PLAIN, split=1)
    position = model.get_parameter("pos_embed")
    model.early(images_of(NON_SQUARE)).square().sum().backward()
    assert position.grad is not None
    assert (position.grad[0, 1:].abs().sum(-1) > 0).all()
    assert (position.grad[0, 0] == 0).all()  # [CLS] is not there yet
    model(images_of(NON_SQUARE)).square().sum().backward()
    assert (position.grad[0].abs().sum(-1) > 0).all()


def test_distributed_data_parallel(tmp_path) -> None:
    model = split_vit(timm_model(PLAIN), PLAIN, split=1)
    images = images_of(NON_SQUARE)
    expected = gradients(model, images)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        torch.testing.assert_close(gradients(DistributedDataParallel(model), images), expected)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("name", [PLAIN, ROTARY])
@torch.no_grad()
def test_compiles_without_graph_breaks(name: str) -> None:
    model = split_vit(timm_model(name), name, split=1)
    early = torch.compile(model.early, fullgraph=True, backend="eager")
    late = torch.compile(model.late, fullgraph=True, backend="eager")
    for size in (NATIVE, NON_SQUARE):
        images = images_of(size)
        tokens = early(images)
        torch.testing.assert_close(tokens, model.early(images))
        torch.testing.assert_close(late(tokens), model.late(tokens))


def test_fixed_sincos_positions() -> None:
    model = split_vit(timm_model(PLAIN), PLAIN, split=1)
    keys = list(model.state_dict())
    model.fix_sincos_positions()
    position = model.get_parameter("pos_embed")
    assert list(model.state_dict()) == keys
    assert not position.requires_grad
    assert (position[0, 0] == 0).all()
    # MoCo-v3: sines and cosines of row / 10000^(i / (C/4)), then of the column.
    i, row, col = torch.arange(12), 2, 3
    frequency = 10000 ** (-i / 12)
    expected = torch.cat([f(n * frequency) for n in (row, col) for f in (torch.sin, torch.cos)])
    torch.testing.assert_close(position[0, 1 + row * 4 + col], expected)
    with pytest.raises(ValueError, match=r"model: sin-cos .* got none and 48"):
        SplitViT(ROTARY, 1, **TINY).fix_sincos_positions()


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_checkpoint_round_trip(name: str, tmp_path) -> None:
    model = split_vit(timm_model(name), name, split=2)
    images = images_of(NON_SQUARE)
    save_split_vit(tmp_path / "vit.safetensors", model, metadata={"step": "7"})
    loaded = load_split_vit(tmp_path / "vit.safetensors").eval()
    assert loaded.split == 2
    assert torch.equal(loaded(images), model(images))
    with safe_open(tmp_path / "vit.safetensors", "pt") as file:
        assert file.metadata()["step"] == "7"
        assert set(file.keys()) == set(timm_model(name).state_dict())


def test_checkpoint_does_not_ask_for_pretrained_weights(tmp_path, monkeypatch) -> None:
    create_model, asked = timm.create_model, []

    def offline(name: str, pretrained: bool = False, **kwargs: object) -> nn.Module:
        asked.append(pretrained)
        return create_model(name, **kwargs)

    monkeypatch.setattr(timm, "create_model", offline)
    save_split_vit(tmp_path / "vit.safetensors", SplitViT(PLAIN, 1, pretrained=True))
    assert asked == [False, True]
    load_split_vit(tmp_path / "vit.safetensors")
    assert asked == [False, True, False, False]


def test_a_checkpoint_is_found_in_a_run_and_says_what_images_need(tmp_path) -> None:
    model = SplitViT(PLAIN, 1, **TINY)
    previous = os.umask(0o027)
    try:
        save_split_vit(tmp_path / "encoder.safetensors", model)
    finally:
        os.umask(previous)
    assert (tmp_path / "encoder.safetensors").stat().st_mode & 0o777 == 0o640
    loaded = load_split_vit(tmp_path)
    assert torch.equal(loaded.get_parameter("pos_embed"), model.get_parameter("pos_embed"))
    assert loaded.pretrained
    with safe_open(tmp_path / "encoder.safetensors", "pt") as file:
        said = json.loads(file.metadata()["preprocessing"])
    assert said == loaded.preprocessing()
    assert said["image_size"] == [32, 32]
    assert said["mean"] == [0.485, 0.456, 0.406]


@torch.no_grad()
def test_hugging_faces_layout(tmp_path) -> None:
    model = split_vit(timm_model(ROTARY), ROTARY, split=1)
    model.save_pretrained(tmp_path / "hub" / "encoder")
    assert sorted(path.name for path in (tmp_path / "hub" / "encoder").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    config = json.loads((tmp_path / "hub" / "encoder" / "config.json").read_text())
    assert (config["library_name"], config["model"], config["split"]) == ("ser-fast", ROTARY, 1)
    loaded = SplitViT.from_pretrained(tmp_path / "hub" / "encoder")
    assert not loaded.training
    images = images_of(NON_SQUARE)
    assert torch.equal(loaded(images), model(images))
    with pytest.raises(ValueError, match=r"path: .* holds no encoder.safetensors or model.safetensors"):
        SplitViT.from_pretrained(tmp_path)


def test_checkpoint_errors(tmp_path) -> None:
    save_file(timm_model(PLAIN).state_dict(), tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match=r"path: .*plain.safetensors has no 'split_vit' metadata"):
        load_split_vit(tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match=r"path: .*absent.safetensors is no file"):
        load_split_vit(tmp_path / "absent.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"path: .*cut.safetensors can't be read as safetensors: \w+"):
        load_split_vit(tmp_path / "cut.safetensors")
    with pytest.raises(TypeError, match="model: got a OptimizedModule, takes a SplitViT"):
        save_split_vit(tmp_path / "compiled.safetensors", torch.compile(SplitViT(PLAIN, 1, **TINY)))
    with pytest.raises(ValueError, match="model: wraps a timm instance"):
        save_split_vit(tmp_path / "instance.safetensors", SplitViT(timm_model(PLAIN), 1))
    with pytest.raises(ValueError, match=r"model: was built with .*norm_layer.* which JSON cannot hold"):
        save_split_vit(tmp_path / "class.safetensors", SplitViT(PLAIN, 1, norm_layer=nn.LayerNorm, **TINY))


@pytest.mark.parametrize("name", ["resnet18", "swin_tiny_patch4_window7_224", "vit_tiny_r_s16_p8_224", "no_such_vit"])
def test_unsupported_names(name: str) -> None:
    with pytest.raises(ValueError, match=f"model: '{name}' is not supported; SplitViT takes timm's ViT"):
        SplitViT(name, 1)


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: timm.create_model("resnet18"), "model: 'ResNet' is not supported"),
        (lambda: timm.create_model("vit_tiny_r_s16_p8_224"), "model: 'VisionTransformer' is not supported"),
        (lambda: timm.create_model(PLAIN, **TINY), "model: 'VisionTransformer' has a fixed image size"),
        (lambda: timm_model(PLAIN, patch_drop_rate=0.5), "model: 'VisionTransformer' drops patches"),
        (lambda: timm_model("eva02_tiny_patch14_224", patch_drop_rate=0.5), "model: 'Eva' drops patches"),
    ],
)
def test_unsupported_instances(build, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        SplitViT(build(), 1)


@pytest.mark.parametrize("split", [-1, 4])
def test_split_out_of_range(split: int) -> None:
    with pytest.raises(ValueError, match=rf"split: '{PLAIN}' can be split at 0 to 3 blocks, got {split}"):
        SplitViT(PLAIN, split, **TINY)


def test_timm_kwargs_do_not_go_with_an_instance() -> None:
    with pytest.raises(ValueError, match=r"timm_kwargs: \['depth'\] came with a built model"):
        SplitViT(timm_model(PLAIN), 1, depth=2)
    with pytest.raises(ValueError, match="pretrained: came with a built model"):
        SplitViT(timm_model(PLAIN), 1, pretrained=True)


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 1, 32, 32), (2, 3, 30, 32), (2, 3, 32, 36), (2, 3, 0, 32)])
def test_bad_images(shape: tuple[int, ...]) -> None:
    model = SplitViT(PLAIN, 1, **TINY)
    for method in (model.early, model.layer_maps, model):
        with pytest.raises(ValueError, match=r"images: got .*, takes \(B, 3, height, width\).*\(8, 8\)"):
            method(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(2, 16, 48), (2, 4, 4, 47)])
def test_bad_tokens(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"tokens: got .*, takes \(B, H, W, 48\)"):
        SplitViT(PLAIN, 1, **TINY).late(torch.zeros(shape))


@pytest.mark.parametrize("split", [0, 1, 3])
@pytest.mark.parametrize("name", [PLAIN, ROTARY, "vit_base_patch16_gap_224"])
@torch.no_grad()
def test_one_walk_reads_any_layers(name: str, split: int) -> None:
    model = split_vit(timm_model(name), name, split)
    images = images_of(OTHER)
    encoded = model.encode(images, layers=(0, 2, 3))
    assert encoded.embedding is not None
    torch.testing.assert_close(encoded.embedding, model.pool(model.late(model.early(images))), rtol=0, atol=0)
    maps = model.layer_maps(images)
    assert encoded.tokens.keys() == {0, 2, 3}
    assert torch.equal(encoded.tokens[2], maps[1])
    assert torch.equal(encoded.tokens[3], maps[2])
    # [CLS] is there once it has been through a block.
    entered = {layer for layer in (0, 2, 3) if layer > split and "gap" not in name}
    assert encoded.cls.keys() == entered
    if 3 in entered:
        assert torch.equal(model.norm_final(encoded.cls[3]), model.class_tokens(images, 1)[0])


def test_a_walk_ends_where_it_is_told_to() -> None:
    model = SplitViT(PLAIN, 2, **TINY)
    for block in model.blocks[1:]:
        block.forward = None  # would fail
    encoded = model.encode(images_of(NATIVE), layers=(1,), until=1)
    assert encoded.embedding is None
    assert encoded.tokens[1].shape == (2, 4, 4, 48)


@pytest.mark.parametrize(
    ("layers", "until", "message"),
    [
        ((4,), None, "layers: got \\[4\\], takes 0 to 3"),
        ((2,), 1, "layers: got \\[2\\], takes 0 to 1"),
        ((), 4, "until: got 4"),
    ],
)
def test_layers_off_the_way_are_named(layers: tuple[int, ...], until: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SplitViT(PLAIN, 2, **TINY).encode(images_of(NATIVE), layers=layers, until=until)


# ---------------------------------------------------------------- files from others


HOSTILE = {
    "pretrained_cfg": {"pretrained": True, "pretrained_cfg": {"url": "file://WEIGHTS"}, "cache_dir": "TARGET"},
    "cache_dir": {"cache_dir": "TARGET"},
    "checkpoint_path": {"checkpoint_path": "WEIGHTS"},
    "pretrained": {"pretrained": True},
    "norm_layer": {"norm_layer": "layernorm"},
    "img_size": {"img_size": {"url": "x"}},
    "global_pool": {"global_pool": "../" * 20},
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_file_names_no_file_and_no_address(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def replaced(value: object) -> object:
        if isinstance(value, dict):
            return {key: replaced(entry) for key, entry in value.items()}
        if isinstance(value, str):
            return value.replace("WEIGHTS", str(tmp_path / "weights.pth")).replace("TARGET", str(tmp_path / "target"))
        return value

    torch.save({}, tmp_path / "weights.pth")
    recipe = {"model": PLAIN, "split": 1, "timm_kwargs": {**TINY, **replaced(HOSTILE[case])}}
    tensors = SplitViT(PLAIN, 1, **TINY).state_dict()
    save_file(tensors, tmp_path / "hostile.safetensors", metadata={"split_vit": json.dumps(recipe)})
    monkeypatch.setattr(timm, "create_model", None)  # is not reached
    with pytest.raises(ValueError, match=r"hostile\.safetensors have arguments that no architecture has: .*" + case):
        load_split_vit(tmp_path / "hostile.safetensors")
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("name", ["hf-hub:somebody/model", "local-dir:/etc", "resnet18", "../x", ""])
def test_a_file_names_a_known_model(name: str, tmp_path: Path) -> None:
    recipe = {"model": name, "split": 1, "timm_kwargs": {}}
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors", metadata={"split_vit": json.dumps(recipe)})
    with pytest.raises(ValueError, match=r"model: .* is not supported"):
        load_split_vit(tmp_path / "other.safetensors")


@pytest.mark.parametrize("text", ["{}", "[1]", "{", '{"model": 1, "split": 1, "timm_kwargs": {}}', "null"])
def test_metadata_that_are_no_description_are_refused(text: str, tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors", metadata={"split_vit": text})
    with pytest.raises(ValueError, match=r"other\.safetensors do not describe a SplitViT"):
        load_split_vit(tmp_path / "other.safetensors")


@pytest.mark.parametrize("change", ["missing", "shape", "unknown argument"])
def test_weights_that_do_not_fit_their_description_are_refused(change: str, tmp_path: Path) -> None:
    tensors = SplitViT(PLAIN, 1, **TINY).state_dict()
    options: dict[str, object] = dict(TINY)
    if change == "missing":
        tensors.pop("norm.weight")
    elif change == "shape":
        tensors["norm.weight"] = torch.zeros(3)
    else:
        options["swiglu_mlp"] = True
    recipe = {"model": PLAIN, "split": 1, "timm_kwargs": options}
    save_file(tensors, tmp_path / "other.safetensors", metadata={"split_vit": json.dumps(recipe)})
    with pytest.raises(ValueError, match=r"other\.safetensors does not hold the weights"):
        load_split_vit(tmp_path / "other.safetensors")


# ---------------------------------------------------------------- damage


def small_file(path: Path) -> Path:
    model = SplitViT(PLAIN, 1, **{**TINY, "embed_dim": 12, "depth": 1, "mlp_ratio": 1.0})
    save_split_vit(path, model, {"step": "7"})
    return path


def test_a_flipped_bit_is_found_wherever_it_is(tmp_path: Path) -> None:
    """In the weights, in their names and in what the file says of itself; never loaded, and the file is named."""
    whole = small_file(tmp_path / "whole.safetensors").read_bytes()
    load_split_vit(tmp_path / "whole.safetensors")
    header = 8 + int.from_bytes(whole[:8], "little")
    rng = np.random.default_rng(0)
    places = [*range(0, header, 7), *rng.integers(header, len(whole), size=40).tolist(), len(whole) - 1]
    damaged = tmp_path / "damaged.safetensors"
    for place in places:
        content = bytearray(whole)
        content[place] ^= 1 << int(rng.integers(8))
        damaged.write_bytes(content)
        for load in (load_split_vit, lambda path: SplitViT(PLAIN, 1, pretrained=path, **TINY)):
            with pytest.raises(ValueError, match=r"damaged\.safetensors"):
                load(damaged)
    with pytest.raises(ValueError, match=r"^path: .*damaged\.safetensors is damaged: its checksum does not fit$"):
        load_split_vit(damaged)  # the last byte: of a weight
    damaged.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"damaged\.safetensors can't be read as safetensors"):
        load_split_vit(damaged)


def test_files_without_a_checksum_still_load(tmp_path: Path) -> None:
    path = small_file(tmp_path / "whole.safetensors")
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    recipe = json.loads(metadata["split_vit"])
    assert len(recipe.pop("sha256")) == 64
    metadata["split_vit"] = json.dumps(recipe)
    save_file(load_file(path), tmp_path / "old.safetensors", metadata=metadata)
    old, new = load_split_vit(tmp_path / "old.safetensors").state_dict(), load_split_vit(path).state_dict()
    assert all(torch.equal(old[name], new[name]) for name in new)


@pytest.mark.parametrize("text", ["{}", "[1]", "{", "null", '{"split": "1"}'])
def test_weights_to_start_from_say_their_split(text: str, tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors", metadata={"split_vit": text})
    with pytest.raises(ValueError, match=r"pretrained: the metadata 'split_vit' of .*other\.safetensors do not say"):
        SplitViT(PLAIN, 1, pretrained=tmp_path / "other.safetensors", **TINY)


def test_a_file_with_fewer_tensors_than_blocks_builds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "encoder.safetensors"
    save_split_vit(path, SplitViT("vit_tiny_patch16_224", 1, img_size=32, embed_dim=24, depth=2, num_heads=2))
    tensors, metadata = read_safetensors(path)
    recipe = json.loads(metadata[METADATA_KEY])
    recipe["timm_kwargs"]["depth"] = 10**6
    save_file(tensors, path, metadata=seal(tensors, metadata | {METADATA_KEY: json.dumps(recipe)}))
    monkeypatch.setattr("timm.create_model", None)
    with pytest.raises(ValueError, match=r"has [0-9]+ tensors, too few for the 1000000 blocks of its metadata"):
        load_split_vit(path)


@pytest.mark.parametrize("asked", [{"img_size": 8 * 10**5}, {"embed_dim": 2 * 10**5}, {"mlp_ratio": 10**6}], ids=str)
def test_a_file_that_asks_for_more_than_it_holds_takes_no_memory(
    asked: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "encoder.safetensors"
    save_split_vit(path, SplitViT(PLAIN, 1, img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2))
    tensors, metadata = read_safetensors(path)
    recipe = json.loads(metadata[METADATA_KEY])
    recipe["timm_kwargs"] |= asked
    save_file(tensors, path, metadata=seal(tensors, metadata | {METADATA_KEY: json.dumps(recipe)}))
    devices = []
    create = timm.create_model
    monkeypatch.setattr(
        "timm.create_model", lambda *a, **k: (devices.append(torch.empty(0).device.type), create(*a, **k))[1]
    )
    with pytest.raises(ValueError, match=r"does not hold the weights that its metadata describe: .*described as"):
        load_split_vit(path)
    assert devices == ["meta"]
