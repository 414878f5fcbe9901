"""The add-ons: their losses against golden values, what they read, and what they reach."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ser_fast.addons import ADDONS
from ser_fast.addons.augself import OUTPUTS, AugSelfConfig, AugSelfHead, difference
from ser_fast.addons.base import LayerView
from ser_fast.addons.contrast import cross_view, symmetric
from ser_fast.addons.equimod import EquiModConfig, EquiModHead
from ser_fast.addons.essl import predictor, turn_loss
from ser_fast.addons.geometry import geometry
from ser_fast.addons.stl import STLHead
from ser_fast.lattice import LatticeMap
from ser_fast.loss import SERLoss
from ser_fast.ops.group_action import group_action
from ser_fast.training.config import TrainConfig, default_config, with_options
from ser_fast.training.options import parse
from ser_fast.training.pretraining import Pretraining
from ser_fast.views.color import LAYOUT, Color
from ser_fast.views.pixels import transform_images
from ser_fast.views.recipe import Views

GOLDEN = Path(__file__).parent / "golden"
f32, f64 = torch.float32, torch.float64
TERMS = [name for name in ADDONS if name != "ser"]


def golden(name: str, case: str, dtype: torch.dtype = f64) -> dict[str, Tensor]:
    """The arrays of a case, those in floating point in `dtype`."""
    with np.load(GOLDEN / f"methods_{name}.npz") as file:
        found = {
            key.removeprefix(f"{case}/"): torch.from_numpy(file[key]) for key in file if key.startswith(f"{case}/")
        }
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in found.items()}


def load(module: nn.Module, values: dict[str, Tensor], **official: str) -> None:
    """Load golden weights: by our name of a part, the official one."""
    for ours, theirs in official.items():
        part, prefix = module.get_submodule(ours.replace("__", ".")), f"w.{theirs}."
        given = {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}
        missing, unexpected = part.to(next(iter(given.values())).dtype).load_state_dict(given, strict=False)
        assert not unexpected
        assert not [name for name in missing if "running" not in name and "num_batches" not in name]


def assert_weights_gradients(module: nn.Module, values: dict[str, Tensor], rtol: float, **official: str) -> None:
    for ours, theirs in official.items():
        for name, parameter in module.get_submodule(ours.replace("__", ".")).named_parameters():
            close(parameter.grad, values[f"grad_w.{theirs}.{name}"], rtol)


def close(actual: Tensor | None, expected: Tensor, rtol: float) -> None:
    """Equal up to rtol of the largest entry; what is 0 but for rounding (a shift before batch norm), to rounding."""
    assert actual is not None
    assert actual.shape == expected.shape
    actual, expected = actual.detach(), expected.detach()
    rounding = {f64: 1e-15, f32: 1e-7}[actual.dtype]
    assert (actual - expected).abs().max() <= max(rtol * float(expected.abs().max()), rounding)


VALUES, GRADIENTS = {f64: 1e-11, f32: 1e-5}, {f64: 1e-11, f32: 2e-5}


# ---------------------------------------------------------------- golden cases

EQUIMOD = {"project": "proj_head_eq", "encode": "proj_head_t", "predict": "predictor_eq"}


@pytest.mark.parametrize("dtype", [f64, f32])
@pytest.mark.parametrize(("form", "prefix"), [("official", ""), ("released", "ser_")])
def test_equimod_golden(form: Any, prefix: str, dtype: torch.dtype) -> None:
    values = golden("equimod", "a", dtype)
    head = EquiModHead(
        14, 17, hidden_dim=16, out_dim=8, code_dim=9, temperature=float(values["temperature"]), form=form
    )
    load(head, values, **EQUIMOD)
    head.standardize = nn.Identity()  # they are already
    h = values["h"].requires_grad_()
    loss = head(h[0], list(h[1:]), list(values["params"]))
    loss.backward()
    close(loss, values[f"{prefix}loss"], VALUES[dtype])
    close(h.grad, values[f"{prefix}grad_h"], {f64: 1e-11, f32: 2e-4}[dtype])
    if form == "official":
        assert_weights_gradients(head, values, {f64: 1e-11, f32: 2e-4}[dtype], **EQUIMOD)


def test_equimod_standardizes_its_parameters() -> None:
    """Their units and origins change nothing."""
    head = EquiModHead(6, 5, hidden_dim=8, out_dim=4, code_dim=4).double()
    plain, *views = torch.randn(3, 16, 6, dtype=f64)
    parameters = list(torch.randn(2, 16, 5, dtype=f64))
    units, origins = torch.tensor([100.0, 3, 7, 1, 2]), torch.tensor([5.0, 0, 1, -9, 2])
    close(head(plain, views, [p * units + origins for p in parameters]), head(plain, views, parameters), 1e-4)


AUGSELF = {"crop": "crop", "color": "color", "flip": "flip", "blur": "blur", "turn": "rot", "solarize": "sol"}


@pytest.mark.parametrize("dtype", [f64, f32])
@pytest.mark.parametrize("case", ["crop_color", "all"])
def test_augself_golden(case: str, dtype: torch.dtype) -> None:
    values = golden("augself", case, dtype)
    names = {ours: theirs for ours, theirs in AUGSELF.items() if f"weight_{theirs}" in values}
    hidden = len(values["w.crop.1.weight"])
    weights = {ours: float(values[f"weight_{theirs}"]) for ours, theirs in names.items()}
    head = AugSelfHead(values["z"].shape[-1], weights, hidden_dim=hidden)
    parts = {f"predictors__{ours}": theirs for ours, theirs in names.items()}
    load(head, values, **parts)
    z = values["z"].requires_grad_()
    targets = [{ours: values[f"diff_{theirs}"][order] for ours, theirs in names.items()} for order in (0, 1)]
    losses = head(list(z), targets)
    losses["loss"].backward()
    close(losses["loss"], values["loss_total"], VALUES[dtype])
    for ours, theirs in names.items():
        close(losses[ours], values[f"loss_{theirs}"], VALUES[dtype])
    close(z.grad, values["grad_z"], GRADIENTS[dtype])
    assert_weights_gradients(head, values, GRADIENTS[dtype], **parts)


def augself_views(values: dict[str, Tensor]) -> list[LayerView]:
    """The views whose draws the golden targets were made of."""
    color = Color(jitter=(0.4, 0.4, 0.4, 0.1))
    size, views = (30, 50), []
    for v in (0, 1):
        turns = values["degrees"][v].nan_to_num().long() * values["rot_applied"][v]
        code = turns % 4 + 4 * values["flip_applied"][v].long()
        box = values["crop"][v] * torch.tensor([*size, *size])
        g = LatticeMap.d4((1, 1), code).on(size, size) @ LatticeMap.crop(size, box, size)
        draws = torch.zeros(len(code), len(LAYOUT), dtype=f64)
        factors = [values[f"{name}_factor"][v] for name in ("brightness", "contrast", "saturation", "hue")]
        draws[:, 1:5] = color.positions(torch.stack(factors, 1)).nan_to_num() * values["color_applied"][v][:, None]
        draws[:, LAYOUT.index("sigma")] = values["sigma"][v].nan_to_num() * values["blur_applied"][v]
        threshold = torch.where(values["sol_applied"][v], values["thresholds_factor"][v].nan_to_num(), 1.0)
        draws[:, LAYOUT.index("threshold")] = threshold
        views.append(LayerView({}, None, g, draws, "global"))
    return views


def test_augself_golden_targets() -> None:
    values = golden("augself", "targets")
    views = augself_views(values)
    for v, order in enumerate((views, views[::-1])):
        found = difference(*order)
        for ours, theirs in AUGSELF.items():
            expected = values[f"diff_{theirs}"][v]
            actual = found[ours].to(f64).reshape(expected.shape)
            assert (actual - expected).abs().max() < 2e-6, ours
    assert set(found) == set(OUTPUTS)


@pytest.mark.parametrize("dtype", [f64, f32])
def test_essl_golden(dtype: torch.dtype) -> None:
    values = golden("essl", "a", dtype)
    head = nn.ModuleDict({"predictor": predictor(10, last_dim=6)})
    for name in ("weight", "bias"):
        for index in (0, 1, 3, 4, 6, 7, 8):
            values[f"w.p.{index}.{name}"] = values[f"w.{index}.{name}"]
            values[f"grad_w.p.{index}.{name}"] = values[f"grad_w.{index}.{name}"]
    load(head, values, predictor="p")
    features = values["features"].requires_grad_()
    logits = head["predictor"](features)
    loss = turn_loss(logits)
    loss.backward()
    close(logits, values["logits"], VALUES[dtype])
    close(loss, values["loss"], VALUES[dtype])
    close(features.grad, values["grad_features"], GRADIENTS[dtype])
    assert_weights_gradients(head, values, GRADIENTS[dtype], predictor="p")


def test_essl_golden_turns() -> None:
    values = golden("essl", "a", f32)
    turned = [transform_images(values["images"], LatticeMap.rot90((6, 6), k)) for k in range(4)]
    assert torch.equal(torch.cat(turned), values["rotated"])
    assert turn_loss(100 * torch.nn.functional.one_hot(values["labels"], 4).double()).item() < 1e-6


STL_PARTS = {
    "infer": "trans_backbone",
    "project": "equi_projector",
    "project_transformation": "trans_projector",
}


@pytest.mark.parametrize("dtype", [f64, f32])
@pytest.mark.parametrize("form", ["official", "released"])
def test_stl_golden(form: Any, dtype: torch.dtype) -> None:
    values = golden("stl", "a", dtype)
    head = nn.ModuleDict({"stl": STLHead(
        10, transformation_dim=8, hidden_dim=9, equivariance_dims=(11, 7), out_dim=6,
        temperature=float(values["temperature"]), equivariance=float(values["weight_equi"]),
        transformation=float(values["weight_trans"]), form=form,
    )})  # fmt: skip
    stl: Any = head["stl"]
    stl.infer = nn.Sequential(nn.Linear(20, 10, bias=False), *stl.infer[1:])  # its hidden width is C here
    stl.infer[1], stl.infer[3] = type(stl.infer[1])(10), nn.Linear(10, 8, bias=False)
    head["inv"] = nn.Sequential(
        nn.Linear(10, 11, bias=False), nn.BatchNorm1d(11), nn.ReLU(), nn.Linear(11, 7, bias=False)
    )
    parts = {f"stl__{ours}": theirs for ours, theirs in STL_PARTS.items()} | {"inv": "inv_projector"}
    values["w.matrix.weight"] = values["w.equi_transform.hypernet.weight"]
    values["grad_w.matrix.weight"] = values["grad_w.equi_transform.hypernet.weight"]
    parts["stl__matrix"] = "matrix"
    load(head, values, **parts)
    y = values["y"].requires_grad_()
    losses = head["stl"](*y)
    prefix = "loss" if form == "official" else "ser_loss"
    close(losses["equivariance"], values[f"{prefix}_equi"], VALUES[dtype])
    close(losses["transformation"], values[f"{prefix}_trans"], VALUES[dtype])
    if form == "official":
        invariance = symmetric(*(head["inv"](view) for view in y), float(values["temperature"]))
        total = values["weight_inv"] * invariance + losses["loss"]
        total.backward()
        close(total, values["loss_total"], VALUES[dtype])
        close(y.grad, values["grad_y"], GRADIENTS[dtype])
        assert_weights_gradients(head, values, GRADIENTS[dtype], **parts)


# ---------------------------------------------------------------- gradients


def small_head(name: str) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """A small head in float64 as a function of features, and the features."""
    views = list(torch.randn(4, 6, 5, dtype=f64).requires_grad_().unbind())
    if name == "equimod":
        equimod, parameters = EquiModHead(5, 4, hidden_dim=6, out_dim=4, code_dim=3).double(), torch.randn(2, 6, 4)
        return lambda plain, one, two: equimod(plain, [one, two], list(parameters.double())), views[:3]
    if name == "augself":
        weights = dict.fromkeys(OUTPUTS, 0.5)
        augself = AugSelfHead(5, weights, hidden_dim=6).double()
        targets = [
            {key: torch.rand(6, width, dtype=f64) for key, width in OUTPUTS.items() if key != "turn"}
            | {"turn": torch.arange(6) % 4}
            for _ in range(2)
        ]
        return lambda one, two: augself([one, two], targets)["loss"], views[:2]
    if name == "essl":
        essl = predictor(5, last_dim=4).double()
        return lambda *turns: turn_loss(essl(torch.cat(turns))), views
    options: dict[str, Any] = {"transformation_dim": 3, "hidden_dim": 4, "equivariance_dims": (5, 4), "out_dim": 3}
    stl = STLHead(5, **options).double()
    return lambda one, two: stl(one, two)["loss"], views[:2]


@pytest.mark.parametrize("name", TERMS)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    function, features = small_head(name)
    inputs = [feature.detach().requires_grad_() for feature in features]
    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("contrast", [symmetric, cross_view])
def test_contrasts_are_their_formulas(contrast: Callable[..., Tensor]) -> None:
    z0, z1 = torch.randn(2, 7, 5, dtype=f64)
    unit = [torch.nn.functional.normalize(z, dim=1) for z in (z0, z1)]
    if contrast is symmetric:
        rows = torch.cat(unit)
        logits = (rows @ rows.T / 0.3).fill_diagonal_(-torch.inf)
        expected = torch.nn.functional.cross_entropy(logits, torch.arange(14).roll(7))
    else:
        logits = unit[0] @ unit[1].T / 0.3
        both = [torch.nn.functional.cross_entropy(each, torch.arange(7)) for each in (logits, logits.T)]
        expected = 2 * 0.3 * sum(both)
    close(contrast(z0, z1, 0.3), expected, 1e-12)


# ---------------------------------------------------------------- geometry


@pytest.mark.parametrize("code", range(8))
def test_geometry_of_a_turned_and_mirrored_crop(code: int) -> None:
    size = (40, 80)
    crop = LatticeMap.crop(size, (10.0, 20.0, 20.0, 10.0), size)
    found = geometry(LatticeMap.d4((1, 1), code).on(size, size) @ crop)
    assert found.center[0].tolist() == pytest.approx([0.0, -0.1875])
    assert found.extent[0].tolist() == pytest.approx([0.5, 0.125])
    assert bool(found.mirrored[0]) == (code >= 4)
    assert int(found.quarter_turns[0]) == code % 4
    assert found.turn[0].norm() == pytest.approx(1)
    assert found.columns.shape == (1, 7)


def test_geometry_of_a_rotation() -> None:
    found = geometry(LatticeMap.rotate((20, 20), torch.tensor([30.0, -60.0, 200.0])))
    angle = torch.atan2(found.turn[:, 1], found.turn[:, 0]).rad2deg()
    assert angle.tolist() == pytest.approx([30, -60, -160])
    assert found.quarter_turns.tolist() == [0, 3, 2]


# ---------------------------------------------------------------- inside a training

TINY = {
    "model.name": "vit_tiny_patch16_224", "model.split": 1, "model.image_size": 32, "model.patch_size": 8,
    "model.embed_dim": 48, "model.depth": 3, "model.num_heads": 3, "views.share": 0.5,
    "moco.dim": 16, "moco.mlp_dim": 32, "ser.layers": "off",
}  # fmt: skip
WIDTHS = {
    "ser": {"hidden_dim": 32, "out_dim": 16},
    "equimod": {"hidden_dim": 32, "out_dim": 16, "code_dim": 16},
    "augself": {"hidden_dim": 32, "flip": 0.5, "turn": 0.5, "blur": 0.5, "solarize": 0.5},
    "essl": {"last_dim": 16},
    "stl": {"transformation_dim": 8, "hidden_dim": 16, "equivariance_dims": (32, 16), "out_dim": 16},
}


def tiny(name: str, layers: Any, **options: Any) -> TrainConfig:
    """A config with one add-on, at some layers."""
    chosen = {"layers": layers, **WIDTHS[name]}
    named = {f"{name}.{option}": value for option, value in chosen.items()}
    return with_options(default_config("moco_v3"), TINY | named | options)


def views_of(config: TrainConfig, model: Pretraining, count: int = 12) -> Views:
    make = config.views.build(model.encoder.patch_size[0], 0, model.needs)
    images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8)
    return make(images, torch.arange(count), epoch=0)


def reached(model: Pretraining) -> list[int]:
    """The blocks that have a gradient."""
    blocks = model.encoder.blocks
    return [i for i, block in enumerate(blocks) if any(p.grad is not None and p.grad.any() for p in block.parameters())]


@pytest.mark.parametrize("layers", [(1,), (2,), "last", (1, 2)], ids=str)
@pytest.mark.parametrize("name", ADDONS)
def test_gradients_reach_the_blocks_up_to_the_layer_and_none_above(name: str, layers: Any) -> None:
    config = tiny(name, layers)
    model = config.build()
    model.encoder.requires_grad_(True)
    losses = model(views_of(config, model), 0.0)
    losses[name].backward()
    highest = 3 if layers == "last" else max(layers)
    assert reached(model) == list(range(highest))
    assert all(p.grad is not None for p in model.addons[name].parameters())
    assert not any(p.grad is not None for p in model.objective.parameters())
    assert losses["loss"].item() == pytest.approx(
        losses["invariance"].item() + model.weights[name] * losses[name].item(), rel=1e-6
    )


@pytest.mark.parametrize("name", ADDONS)
def test_weight_0_leaves_the_encoder_alone(name: str) -> None:
    config = tiny(name, (2,), **{f"{name}.weight": 0.0})
    model = config.build()
    model(views_of(config, model), 0.0)[name].backward()
    assert reached(model) == []
    assert all(p.grad is not None and p.grad.any() for p in model.addons[name].parameters())


@pytest.mark.parametrize("name", TERMS)
def test_the_loss_of_several_layers_is_their_mean(name: str) -> None:
    config = tiny(name, (1, 3))
    model = config.build()
    views = views_of(config, model)
    together = model(views, 0.0)[name]
    addon: Any = model.addons[name]
    assert isinstance(addon.norms["1"], nn.LayerNorm)  # below the last layer features have no norm
    assert isinstance(addon.norms["3"], nn.Identity)
    separate = []
    for layer in (1, 3):
        addon.layers = (layer,)
        separate.append(model(views, 0.0)[name])
    torch.testing.assert_close(together, (separate[0] + separate[1]) / 2)


@pytest.mark.parametrize("name", TERMS)
def test_features_below_the_last_layer_are_normalized(name: str) -> None:
    """Their scale, which grows from block to block, changes nothing."""
    config = tiny(name, (2,))
    model = config.build()
    views = views_of(config, model)
    addon: Any = model.addons[name]
    seen: list[Tensor] = []
    addon.heads["2"].register_forward_pre_hook(lambda _, inputs: seen.append(_first(inputs)))
    model(views, 0.0)
    torch.testing.assert_close(seen[0].var(-1, unbiased=False), torch.ones(len(seen[0])), rtol=1e-2, atol=0)


def _first(inputs: Any) -> Tensor:
    while not isinstance(inputs, Tensor):
        inputs = inputs[0]
    return inputs.detach()


@pytest.mark.parametrize(("layers", "read", "reads"), [
    ((1,), "auto", "mean"), ((2,), "auto", "cls"), ((1, 2), "auto", "mean"), ((3,), "mean", "mean"),
    ((3,), "cls", "cls"),
])  # fmt: skip
def test_what_is_read_where(layers: Any, read: str, reads: str) -> None:
    config = tiny("equimod", layers, **{"equimod.read": read})
    model = config.build()
    addon = model.addons["equimod"]
    assert addon.reads == reads
    views = views_of(config, model)
    features: list[Tensor] = []
    addon.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0][0].features[layers[0]]))
    model(views, 0.0)
    encoded = model.encoder.encode(views.views[0].images[0], layers)
    sequence = encoded.cls[layers[0]] if reads == "cls" else encoded.tokens[layers[0]]
    sequence = model.encoder.norm_final(sequence) if layers[0] == 3 else sequence
    torch.testing.assert_close(features[0], sequence if reads == "cls" else sequence.mean((1, 2)))


def test_a_class_token_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match=r"equimod.layers: got 1, where there is no class token"):
        tiny("equimod", (1,), **{"equimod.read": "cls"}).build()


def test_an_add_on_is_walked_to_its_layers_alone() -> None:
    """Plain views to EquiMod's layer and turned ones to E-SSL's, in one walk; nothing is walked twice."""
    config = with_options(
        tiny("equimod", (2,)), {f"essl.{key}": value for key, value in {"layers": (1,), **WIDTHS["essl"]}.items()}
    )
    model = config.build()
    views = views_of(config, model)
    walked: list[list[int]] = [[] for _ in range(3)]
    for block, lengths in zip(model.encoder.blocks, walked, strict=True):
        block.register_forward_hook(lambda _, inputs, __, lengths=lengths: lengths.append(len(inputs[0])))
    model(views, 0.0)
    globals_ = [6, 6, 6, 6]  # two parts of two views, half the batch each
    assert walked == [[*globals_, 6, 24], [*globals_, 6], globals_]


def test_several_add_ons_share_one_walk() -> None:
    config = tiny("stl", (2,))
    for name in ("ser", "equimod", "augself", "essl"):
        config = with_options(config, {f"{name}.{k}": v for k, v in {"layers": "last", **WIDTHS[name]}.items()})
    model = config.build()
    losses = model(views_of(config, model), 0.0)
    assert {*ADDONS, "augself_crop", "augself_turn", "stl_equivariance"} <= losses.keys()
    losses["loss"].backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_heads_learn_what_the_views_say() -> None:
    """E-SSL's head at a layer of an encoder that is told the turn by the pixels: the labels are those of the views."""
    config = tiny("essl", (1,), **{"views.color_strength": 0.0})
    model = config.build()
    views = views_of(config, model)
    turned = [view for view in views.views if view.role == "turn"]
    first = turned[0].images[0]
    for k, view in enumerate(turned):
        assert torch.equal(view.images[0], torch.rot90(first, k, (2, 3)))
    labels = torch.eye(4).repeat_interleave(6, 0)
    assert turn_loss(100 * labels).item() < 1e-6
    assert turn_loss(100 * labels.flip(0)).item() > 50


@pytest.mark.parametrize("name", TERMS)
def test_losses_are_in_float32_under_autocast(name: str) -> None:
    config = tiny(name, (2,))
    model = config.build()
    views = views_of(config, model)
    exact = model(views, 0.0)[name]
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(views, 0.0)[name]
    assert rounded.dtype == f32
    assert rounded.item() == pytest.approx(exact.item(), rel=0.1)
    rounded.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.addons.parameters() if p.grad is not None)


def test_options_on_the_command_line() -> None:
    arguments = "--equimod.layers 3 last --equimod.read mean --augself.layers 2 --augself.turn 0.5 --stl.form released"
    with pytest.raises(SystemExit):
        parse(arguments.split())  # names and numbers are not mixed
    addons = parse(arguments.replace(" last", " 12").split()).addons
    assert isinstance(addons["equimod"], EquiModConfig)
    assert (addons["equimod"].layers, addons["equimod"].read) == ((3, 12), "mean")
    assert addons["augself"] == AugSelfConfig(layers=(2,), turn=0.5)
    assert {name: addon.weight for name, addon in addons.items()} == {"ser": 1.0, "equimod": 1.0, "augself": 1.0}
    assert {name: kind().weight for name, kind in ADDONS.items()} == {
        "ser": 1.0, "equimod": 1.0, "augself": 1.0, "essl": 0.4, "stl": 1.0
    }  # fmt: skip


@pytest.mark.parametrize(("options", "message"), [
    ({"augself.crop": 0.0, "augself.color": 0.0}, "augself: got the weights {}, takes one or more"),
    ({"ser.layers": (1,), "ser.locals": True}, "ser.locals: got True with views.locals 0"),
    ({"ser.layers": (1,), "ser.locals": True, "ser.momentum_keys": True}, "ser.locals: got True with momentum_keys"),
    ({"ser.layers": (1,), "ser.noise": (-0.1, 0.0)}, r"ser.noise: got \(-0.1, 0.0\), takes two numbers from 0"),
    ({"ser.layers": (1,), "ser.masked": 1.0}, "ser.masked: got 1.0, takes a number from 0 to below 1"),
])  # fmt: skip
def test_options_that_do_not_fit_are_named(options: dict[str, Any], message: str) -> None:
    base = with_options(default_config("moco_v3"), TINY | {"augself.layers": (2,)})
    with pytest.raises(ValueError, match=message):
        with_options(base, options).build()


# ---------------------------------------------------------------- SER with local views, and with masks


def test_ser_asks_it_of_local_views_too() -> None:
    config = tiny("ser", (1,), **{"ser.locals": True, "views.locals": 2, "views.sampler": "crop"})
    model = config.build()
    addon: Any = model.addons["ser"]
    views = views_of(config, model)
    encoded = [model.encoder.encode(view.images[0], (1,)).tokens[1][: views.equivariant] for view in views.views]
    seen = [
        LayerView({1: tokens}, None, view.g, None, view.role) for tokens, view in zip(encoded, views.views, strict=True)
    ]
    loss: SERLoss = addon.losses["1"]
    pairs = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3)]
    expected = [loss(encoded[i], encoded[j], views.views[i].g, views.views[j].g) for i, j in pairs]
    torch.testing.assert_close(addon(seen)["loss"], torch.stack(expected).mean())
    assert encoded[2].shape[1:3] == (2, 2)


def told_to(addon: Any, model: Pretraining, views: Views) -> tuple[list[Any], dict[str, Any]]:
    """What an add-on of one layer gives its SERLoss: positional and named arguments."""
    told: list[Any] = []
    hook = addon.losses["1"].register_forward_pre_hook(
        lambda _, given, named: told.append((given, named)), with_kwargs=True
    )
    model(views, 0.0)
    hook.remove()
    (given,) = told
    return given


def test_ser_is_told_wrong_maps_as_far_as_asked() -> None:
    share, shift = 0.2, 1.5
    errors, shifts = [], []
    for noise in ((share, shift), (0.0, 0.0)):
        torch.manual_seed(0)
        config = tiny("ser", (1,), **{"ser.noise": noise})
        model = config.build()
        views = views_of(config, model, count=64)
        (_, _, *told), _ = told_to(model.addons["ser"], model, views)
        for g, view in zip(told, views.views, strict=False):
            wrong = g @ view.g.inverse()  # from the view to what it is told to be, about its centre
            errors.append((wrong.linear - torch.eye(2, dtype=torch.float64)).abs().max().item())
            shifts.append((wrong.offset.abs() / 8).max().item())  # tokens of 8 pixels
    for found, largest in ((errors, share), (shifts, shift)):
        assert all(0.8 * largest < value <= largest + 1e-6 for value in found[:2])
        assert max(found[2:]) < 1e-9


def test_ser_masks_the_share_that_it_is_told() -> None:
    torch.manual_seed(0)
    config = tiny("ser", (1,), **{"ser.masked": 0.5})
    model = config.build()
    _, masks = told_to(model.addons["ser"], model, views_of(config, model, count=64))
    shown = [masks[name].double().mean().item() for name in ("mask0", "mask1")]
    assert all(0.4 < share < 0.6 for share in shown)
    assert not torch.equal(masks["mask0"], masks["mask1"])


MAPS: dict[str, Callable[[], tuple[LatticeMap, LatticeMap]]] = {
    "d4": lambda: (LatticeMap.d4((4, 4), torch.tensor([0, 3, 5])), LatticeMap.d4((4, 4), torch.tensor([6, 1, 2]))),
    "resize": lambda: (LatticeMap.identity((4, 4), batch=3), LatticeMap.resize((4, 4), (5, 3), batch=3)),
    "crop": lambda: (
        LatticeMap.crop((4, 4), torch.tensor([[0.0, 0, 3, 3], [1, 1, 2, 3], [0, 0, 4, 4]]), (4, 4)),
        LatticeMap.crop((4, 4), torch.tensor([[0.5, 0, 3, 3], [0, 1, 4, 3], [1, 1, 2, 2]]), (4, 4)),
    ),
    "rotation": lambda: (LatticeMap.identity((4, 4), batch=3), LatticeMap.rotate((4, 4), torch.tensor([10.0, 45, 90]))),
}


@pytest.mark.parametrize("padding", ["zeros", "border"])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("both_directions", [False, True])
@pytest.mark.parametrize("name", MAPS)
def test_a_token_that_does_not_exist_changes_nothing(
    name: str, both_directions: bool, interpolation: str, padding: str
) -> None:
    """Whatever stands in the place of missing tokens: the same loss, and no gradient there."""
    g0, g1 = MAPS[name]()
    options: dict[str, Any] = {"interpolation": interpolation, "padding": padding, "both_directions": both_directions}
    ser = SERLoss(6, hidden_dim=8, out_dim=4, backend="reference", **options).double()
    tokens = [torch.randn(3, g.size_out[0] * g.size_out[1], 6, dtype=f64) for g in (g0, g1)]
    masks = [torch.rand(t.shape[:2]) < 0.9 for t in tokens]
    for mask in masks:
        mask[:2, :9] = True  # some tokens have all that they are blended of, some don't
        mask[0] = True
    named = {"mask0": masks[0], "mask1": masks[1]}
    given = [t.clone().requires_grad_() for t in tokens]
    loss = ser(*given, g0, g1, **named)
    loss.backward()
    other = [torch.where(m[..., None], t, 50 * torch.randn_like(t)) for t, m in zip(tokens, masks, strict=True)]
    torch.testing.assert_close(ser(*other, g0, g1, **named), loss.detach(), rtol=1e-12, atol=0)
    for tensor, mask in zip(given, masks, strict=True):
        assert not tensor.grad[~mask].any()
    assert loss > 0
    every = {key: torch.ones_like(mask) for key, mask in named.items()}
    torch.testing.assert_close(ser(*tokens, g0, g1, **every), ser(*tokens, g0, g1), rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", MAPS)
def test_a_token_takes_part_where_all_its_taps_exist(name: str) -> None:
    """As the oracle's matrix says; for D4 that is the mask itself, moved."""
    g0, g1 = MAPS[name]()
    g = LatticeMap.relative(g0, g1)
    ser = SERLoss(6)
    mask = torch.rand(3, 16) < 0.8
    taken = ser._all_taps(mask, g)
    missing = (~mask).double()[..., None]
    large = group_action(1e200 * missing, g, backend="reference")
    assert not large[taken].any()  # no blend that takes part has anything of a missing token
    blended = group_action(missing, g, interpolation="bilinear", backend="reference")[..., 0]
    assert not taken[blended > 1e-12].any()  # bilinear's taps are among bicubic's
    if name == "d4":
        assert torch.equal(taken, blended == 0)
    assert 0 < taken.double().mean() < 1


def test_masks_that_do_not_fit_are_named() -> None:
    g = LatticeMap.identity((2, 2), batch=3)
    tokens, ser = torch.randn(3, 4, 6), SERLoss(6)
    for mask in (torch.ones(3, 5, dtype=torch.bool), torch.ones(3, 4), torch.ones(3, 2, 2, dtype=torch.bool)):
        with pytest.raises(ValueError, match="mask1: got"):
            ser(tokens, tokens, g, g, mask1=mask)


def test_masks_reach_keys_as_well() -> None:
    g0, g1 = MAPS["resize"]()
    ser = SERLoss(6, hidden_dim=8, out_dim=4, backend="reference").double()
    tokens0, tokens1 = (torch.randn(3, g.size_out[0] * g.size_out[1], 6, dtype=f64) for g in (g0, g1))
    keys0, keys1 = tokens0 + 0.1, tokens1 + 0.1
    mask0 = torch.rand(3, 16) < 0.7
    loss = ser(tokens0, tokens1, g0, g1, keys0, keys1, mask0=mask0)
    changed = torch.where(mask0[..., None], keys0, 9 * torch.randn_like(keys0))
    torch.testing.assert_close(ser(tokens0, tokens1, g0, g1, changed, keys1, mask0=mask0), loss)
