"""The losses of the objectives against the official code's values, and what each does at a training step."""

import copy
import inspect
import math
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases.objectives import SIZES, small_config, small_objective
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn

from ser_fast import info_nce
from ser_fast.heads import SyncBatchNorm1d, mlp
from ser_fast.objectives import OBJECTIVES
from ser_fast.objectives.barlow_twins import BarlowTwins, barlow_twins_loss
from ser_fast.objectives.base import Objective, off_diagonal, view_pairs
from ser_fast.objectives.byol import BYOL, byol_loss
from ser_fast.objectives.dino import DINO, DINOHead, dino_loss
from ser_fast.objectives.moco_v3 import MoCoV3, moco_v3_terms
from ser_fast.objectives.simclr import simclr_loss
from ser_fast.objectives.vicreg import VICReg, vicreg_terms
from ser_fast.training.config import OptimConfig, default_config, from_json, to_json
from ser_fast.training.optim import build_optimizer, clip_gradients, set_schedules, warmup_cosine
from ser_fast.training.pretraining import Pretraining
from ser_fast.training.trainer import Trainer

CPU = torch.device("cpu")
f32, f64 = torch.float32, torch.float64
DTYPES = pytest.mark.parametrize("dtype", [f32, f64], ids=str)
TOLERANCE = {f32: 1e-5, f64: 1e-11}

Case = dict[str, Any]


def golden(name: str) -> dict[str, Case]:
    """The cases of methods_{name}.npz, by name, with tensors for arrays and floats for scalars."""
    file = np.load(Path(__file__).parent / "golden" / f"methods_{name}.npz")
    cases: dict[str, Case] = {str(case): {} for case in file["cases"]}
    for key in file.files:
        case, _, part = key.partition("/")
        if part:
            value = file[key]
            cases[case][part] = value.item() if value.ndim == 0 else torch.tensor(value)
    return cases


def leaves(tensors: Tensor | list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [tensor.detach().clone().to(dtype).requires_grad_() for tensor in tensors]


def assert_close(actual: Any, expected: Any, dtype: torch.dtype) -> None:
    """Equal but for an error relative to the largest entry."""
    actual, expected = torch.as_tensor(actual, dtype=f64).detach(), torch.as_tensor(expected, dtype=f64)
    assert actual.shape == expected.shape
    assert float((actual - expected).abs().max() / expected.abs().max()) <= TOLERANCE[dtype]


def assert_gradients(inputs: list[Tensor], expected: Tensor | list[Tensor], dtype: torch.dtype) -> None:
    gradients = torch.stack([tensor.grad for tensor in inputs if tensor.grad is not None])
    assert_close(gradients, torch.stack(list(expected)), dtype)


# ---------------------------------------------------------------- values of the official code


@DTYPES
@pytest.mark.parametrize("name", ["loss_2", "loss_2_4"])
def test_dino_loss_and_center(name: str, dtype: torch.dtype) -> None:
    case = golden("dino")[name]
    epochs, warmup = case["nepochs"], case["warmup_teacher_temp_epochs"]
    dino = small_dino(
        dim=case["student"].shape[-1],
        center_momentum=case["centre_momentum"],
        student_temperature=case["student_temp"],
        first_temperature=case["warmup_teacher_temp"],
        teacher_temperature=case["teacher_temp"],
        temperature_warmup=warmup / epochs,
    ).to(dtype)
    dino.epochs = epochs
    for call, epoch in enumerate(case["epochs"].tolist()):
        student = leaves(case["student"][call], dtype)
        loss = dino(student, list(case["teacher"][call].to(dtype)), epoch / epochs)["loss"]
        loss.backward()
        assert_close(loss, case["loss"][call], dtype)
        assert_gradients(student, case["grad_student"][call], dtype)
        dino.after_step(epoch / epochs)
        assert_close(dino.center, case["centre"][call], dtype)
    temperatures = [dino.temperature(epoch / epochs) for epoch in range(epochs)]
    assert_close(temperatures, case["teacher_temp_schedule"], f64)
    assert temperatures == [dino.temperature((epoch + 0.9) / epochs) for epoch in range(epochs)]


def small_dino(**options: Any) -> DINO:
    return DINO(6, **{**SIZES["dino"], **options})


@DTYPES
@pytest.mark.parametrize("name", ["head_free", "head_fixed"])
def test_dino_head(name: str, dtype: torch.dtype) -> None:
    case = golden("dino")[name]
    (mlp_dim, dim), (prototypes, bottleneck) = case["w.mlp.0.weight"].shape, case["w.last_layer.weight_v"].shape
    head = DINOHead(
        dim, dim=prototypes, mlp_dim=mlp_dim, bottleneck_dim=bottleneck, norm_last_layer=case["norm_last_layer"]
    ).to(dtype)
    names = {name.replace("weight_", "last_layer.weight_"): p for name, p in head.named_parameters()}
    with torch.no_grad():
        for name, p in names.items():
            p.copy_(case[f"w.{name}"])
    (x,) = leaves([case["x"]], dtype)
    out = head(x)
    (out * case["upstream"].to(dtype)).sum().backward()
    assert_close(out, case["out"], dtype)
    assert_close(x.grad, case["grad_x"], dtype)
    assert {name for name, p in names.items() if p.grad is not None} == {
        key.removeprefix("grad_w.") for key in case if key.startswith("grad_w.")
    }
    for name, p in names.items():
        if p.grad is not None:
            assert_close(p.grad, case[f"grad_w.{name}"], dtype)


def test_schedules_of_dino() -> None:
    """The released learning rate starts from 0 and stays at its peak for two steps; ours does neither."""
    case = golden("dino")["schedule"]
    steps, warmup = case["epochs"] * case["per_epoch"], case["warmup_epochs"] * case["per_epoch"]
    base, end = case["lr"].tolist()
    rising = [warmup_cosine(step, steps, base, end, warmup - 1) for step in range(warmup)]
    falling = [warmup_cosine(step, steps, base, end, warmup) for step in range(warmup, steps)]
    assert_close(rising + falling, case["lr_by_step"], f64)
    assert_close([warmup_cosine(s, steps, *case["wd"].tolist()) for s in range(steps)], case["wd_by_step"], f64)
    assert_close(
        [warmup_cosine(s, steps, *case["momentum"].tolist()) for s in range(steps)], case["momentum_by_step"], f64
    )

    model = default_config("dino").model
    encoder = small_config("dino", Path()).model.build()
    assert model.drop_path_rate == 0.1
    pretraining = Pretraining(encoder, small_dino_for(encoder.embed_dim, momentum=case["momentum"][0].item())).double()
    for step in (0, 7, 39):
        for slow, fast in (
            (pretraining.teacher.encoder, encoder),
            (pretraining.teacher.head, pretraining.objective.head),
        ):
            for target, source in zip(slow.parameters(), fast.parameters(), strict=True):
                target.data.fill_(1.0)
                source.data.zero_()
        pretraining.move_teacher(step / steps)
        for p in pretraining.teacher.parameters():
            assert_close(p, torch.full_like(p, case["momentum_by_step"][step]), f64)


def small_dino_for(dim: int, **options: Any) -> DINO:
    return DINO(dim, **SIZES["dino"], **options)


@DTYPES
@pytest.mark.parametrize("name", ["random", "near", "offset", "constant"])
def test_barlow_twins(name: str, dtype: torch.dtype) -> None:
    case = golden("barlow")[name]
    views = leaves([case["z1"], case["z2"]], dtype)
    loss = barlow_twins_loss(views, weight=case["lambd"])
    loss.backward()
    assert_close(loss, case["loss"], dtype)
    assert_gradients(views, [case["grad_z1"], case["grad_z2"]], dtype)


@DTYPES
def test_barlow_twins_with_its_projector(dtype: torch.dtype) -> None:
    case = golden("barlow")["projector"]
    dim, *hidden, out = case["sizes"].tolist()
    barlow = BarlowTwins(dim, dim=out, mlp_dim=hidden[0], off_diagonal=case["lambd"])
    weights = {key.removeprefix("w."): value for key, value in case.items() if key.startswith("w.")}
    assert dict(barlow.head.named_parameters()).keys() == weights.keys()
    barlow.to(dtype).head.load_state_dict(weights, strict=False)
    features = leaves([case["y1"], case["y2"]], dtype)
    loss = barlow([barlow.head(y) for y in features], [], 0.0)["loss"]
    loss.backward()
    assert_close(loss, case["loss"], dtype)
    assert_gradients(features, [case["grad_y1"], case["grad_y2"]], dtype)
    for name, p in barlow.head.named_parameters():
        assert_close(p.grad, case[f"grad_w.{name}"], dtype)


def test_schedule_of_barlow_twins() -> None:
    case = golden("barlow")["schedule"]
    steps, warmup = case["epochs"] * case["per_epoch"], 10 * case["per_epoch"]
    for base, expected in zip((case["lr_weights"], case["lr_biases"]), case["lr_by_step"], strict=True):
        peak = base * case["batch_size"] / 256
        rates = [warmup_cosine(step, steps, peak, 0.001 * peak, warmup) for step in range(steps)]
        assert_close(rates, expected, f64)


@DTYPES
@pytest.mark.parametrize("name", ["simclr_0.5", "simclr_0.1"])
def test_simclr(name: str, dtype: torch.dtype) -> None:
    case = golden("base")[name]
    temperature = case["temperature"]
    views = leaves([case["z0"], case["z1"]], dtype)
    loss = simclr_loss(views, temperature=temperature)
    loss.backward()
    assert_close(loss, case["loss"], dtype)
    assert_gradients(views, [case["grad_z0"], case["grad_z1"]], dtype)

    views = leaves([case["z0"], case["z1"]], dtype)
    loss = sum(info_nce(*pair, temperature=temperature) for pair in (views, views[::-1])) / 2
    loss.backward()
    assert_close(loss, case["crossview_loss"], dtype)
    assert_gradients(views, [case["crossview_grad_z0"], case["crossview_grad_z1"]], dtype)


@DTYPES
def test_moco_v3_with_local_views(dtype: torch.dtype) -> None:
    case = golden("base")["moco_2_4"]
    keys = list(case["key"].to(dtype))
    expected = [case["terms"][v, u] for v in range(6) for u in range(2) if u != v]
    queries = leaves(case["query"], dtype)
    assert_close(moco_v3_terms(queries, keys, temperature=case["temperature"]), expected, dtype)
    for multi_crop, factor in (("released", 1.0), ("mean", 2 / 10)):
        moco = MoCoV3(4, dim=10, mlp_dim=4, temperature=case["temperature"], multi_crop=multi_crop)
        moco.predictor = nn.Identity()
        queries = leaves(case["query"], dtype)
        loss = moco(queries, keys, 0.0)["loss"]
        loss.backward()
        assert_close(loss, factor * case["loss"], dtype)
        assert_gradients(queries, factor * case["grad_query"], dtype)
        assert_close(moco(queries[:2], keys, 0.0)["loss"], case["loss_two_views"], dtype)


@DTYPES
def test_byol(dtype: torch.dtype) -> None:
    case = golden("base")["byol"]
    byol = BYOL(4, dim=9, mlp_dim=4)
    byol.predictor = nn.Identity()
    predictions, targets = leaves(case["prediction"], dtype), leaves(case["target"], dtype)
    loss = byol(predictions, targets, 0.0)["loss"]
    loss.backward()
    assert_close(loss, case["loss"], dtype)
    assert_gradients(predictions, case["grad_prediction"], dtype)
    assert all(target.grad is None for target in targets)


@DTYPES
def test_vicreg(dtype: torch.dtype) -> None:
    case = golden("base")["vicreg"]
    vicreg = VICReg(4, dim=8, mlp_dim=4, invariance=case["sim"], variance=case["std"], covariance=case["cov"])
    views = leaves([case["x"], case["y"]], dtype)
    losses = vicreg(views, [], 0.0)
    losses["loss"].backward()
    assert_close(losses["loss"], case["loss"], dtype)
    assert_gradients(views, [case["grad_x"], case["grad_y"]], dtype)
    assert_close(25 * losses["distance"] + 25 * losses["variance"] + losses["covariance"], case["loss"], dtype)


# ---------------------------------------------------------------- gradients


TARGETS = [torch.linspace(-1, 1, 20, dtype=f64).view(4, 5).sin(), torch.linspace(2, -1, 20, dtype=f64).view(4, 5).cos()]
LOSSES: dict[str, Callable[[list[Tensor]], Tensor]] = {
    "moco_v3": lambda views: moco_v3_terms(views, TARGETS, temperature=0.3),
    "dino": lambda views: dino_loss(
        views, TARGETS, TARGETS[0].mean(0), student_temperature=0.3, teacher_temperature=0.2
    ),
    "barlow_twins": lambda views: barlow_twins_loss(views, weight=0.1),
    "simclr": lambda views: simclr_loss(views, temperature=0.3),
    "byol": lambda views: byol_loss(views, TARGETS),
    "vicreg": vicreg_terms,
}


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradcheck(name: str, count: int) -> None:
    views = [torch.randn(4, 5, dtype=f64, requires_grad=True) for _ in range(count)]
    assert torch.autograd.gradcheck(lambda *views: LOSSES[name](list(views)), views)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_are_in_float32_under_autocast(name: str) -> None:
    """Rounded outputs give the loss of the rounded outputs: nothing is rounded after them."""
    objective = small_objective(name, 6)
    if hasattr(objective, "predictor"):
        objective.predictor = nn.Identity()
    dim = SIZES[name]["dim"]
    views = [torch.randn(6, dim).bfloat16() for _ in range(4)]
    exact = objective([z.float() for z in views], [z.float() for z in views[2:]], 0.5)["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        loss = objective(views, views[2:], 0.5)["loss"]
    assert loss.dtype == f32
    torch.testing.assert_close(loss, exact, rtol=1e-6, atol=0)


def test_logits_of_dino_are_in_float32_under_autocast() -> None:
    head = small_dino().head
    head.mlp = nn.Identity()
    x = torch.randn(5, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        logits = head(x)
    torch.testing.assert_close(logits, head(x.float()), rtol=1e-6, atol=1e-7)
    assert float(logits.detach().abs().max()) <= 1


# ---------------------------------------------------------------- many views


def test_pairs_have_a_global_view() -> None:
    assert view_pairs(2) == [(0, 1)]
    assert view_pairs(4) == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3)]


def test_off_diagonal() -> None:
    assert off_diagonal(torch.arange(9).view(3, 3)).tolist() == [1, 2, 3, 5, 6, 7]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_local_views_keep_the_scale_of_two(name: str) -> None:
    """Local views that are the second global one: the mean over pairs of the same two views but for one pair."""
    objective = small_objective(name, 6)
    if hasattr(objective, "predictor"):
        objective.predictor = nn.Identity()
    one, other = torch.randn(2, 8, SIZES[name]["dim"])

    def loss(*views: Tensor) -> float:
        teacher = list(views[:2]) if objective.momentum is not None else []
        return float(objective(list(views), teacher, 0.5)["loss"])

    two, same = loss(one, other), loss(other, other)
    # Ordered pairs for those with a teacher: of 10, view 0 as key meets 5 of `other`, view 1 as key one of view 0
    # and 4 of itself; of 9 unordered pairs 5 are of different views. VICReg's terms have weights of their own.
    if objective.momentum is not None:
        many = loss(one, other, other, other, other, other)
        forward = 2 * _term(objective, other, one)
        backward = 2 * _term(objective, one, other)
        assert (forward + backward) / 2 == pytest.approx(two, rel=1e-5)
        assert many == pytest.approx((5 * forward + backward + 4 * same) / 10, rel=1e-5)
    elif name != "vicreg":
        assert loss(one, other, other, other, other, other) == pytest.approx((5 * two + 4 * same) / 9, rel=1e-5)
    else:
        terms, of_one, of_other = (vicreg_terms(pair) for pair in ([one, other], [one, one], [other, other]))
        many = vicreg_terms([one, other, other, other, other, other])
        torch.testing.assert_close(many[0], (5 * terms[0]) / 9)
        torch.testing.assert_close(many[1:], (of_one + 5 * of_other)[1:] / 6)


def _term(objective: Objective, query: Tensor, key: Tensor) -> float:
    """The loss of one query and one key, where views 0 and 1 are (key, query): all other terms are left out."""
    if isinstance(objective, MoCoV3):
        return float(moco_v3_terms([key, query], [key, query], temperature=objective.temperature)[1])
    if isinstance(objective, BYOL):
        return float(byol_loss([query], [query, key])) / 2
    assert isinstance(objective, DINO)
    options = {"student_temperature": 0.1, "teacher_temperature": objective.temperature(0.5)}
    return float(dino_loss([query], [query, key], objective.center, **options)) / 2


@pytest.mark.parametrize("name", OBJECTIVES)
def test_local_views_of_a_batch_reach_the_student_alone(name: str, tmp_path: Path) -> None:
    config = small_config(name, tmp_path, views__locals=3, views__local_size=16)
    trainer = Trainer(config, CPU)
    seen: list[tuple[list[Tensor], list[Tensor]]] = []
    trainer.model.objective.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[:2]))
    batch = next(trainer.batches())[1]
    record = trainer.step(0, 0, batch.images, batch.indices)
    ((student, teacher),) = seen
    assert [len(view) for view in student] == [8] * 5
    assert [len(view) for view in teacher] == [8] * 2 * (trainer.model.objective.momentum is not None)
    assert math.isfinite(record["loss"])
    # Local views are others than global ones: the head ran on each.
    assert len({float(view[0].detach().sum()) for view in student}) == 5


# ---------------------------------------------------------------- heads


def layers_of(head: nn.Sequential) -> list[str]:
    names = []
    for layer in head:
        if isinstance(layer, nn.Linear):
            names.append(f"{layer.in_features}-{layer.out_features}{'+' * (layer.bias is not None)}")
        else:
            names.append(
                {SyncBatchNorm1d: "BN", nn.ReLU: "ReLU"}[type(layer)] + "*" * bool(getattr(layer, "affine", 0))
            )
    return names


@pytest.mark.parametrize(
    ("last", "end"), [("linear", ["4-2"]), ("bias", ["4-2+"]), ("norm", ["4-2", "BN"]), ("affine", ["4-2", "BN*"])]
)
def test_mlp(last: Any, end: list[str]) -> None:
    assert layers_of(mlp([3, 4, 4, 2], last=last)) == ["3-4", "BN*", "ReLU", "4-4", "BN*", "ReLU", *end]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_of_one_rank_is_torchs(affine: bool, training: bool) -> None:
    ours, theirs = SyncBatchNorm1d(5, affine=affine), nn.BatchNorm1d(5, affine=affine)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    results = []
    for module in (ours, theirs):
        torch.manual_seed(0)
        module(10 + 3 * torch.randn(7, 5))
        module.train(training)
        rows = torch.randn(7, 5, requires_grad=True)
        out = module(rows)
        out.square().mul(torch.randn(7, 5)).sum().backward()
        results.append([out, rows.grad, *module.state_dict().values()])
    assert all(map(torch.equal, *results))


# ---------------------------------------------------------------- configs


@pytest.mark.parametrize("name", OBJECTIVES)
def test_options_are_the_arguments_of_the_class(name: str) -> None:
    config = OBJECTIVES[name]()
    signature = inspect.signature(type(small_objective(name, 6)).__init__).parameters
    defaults = {option: p.default for option, p in signature.items() if p.default is not p.empty}
    assert asdict(config) == defaults
    assert config.__class__.__doc__
    content = to_json(default_config(name))
    assert to_json(from_json(content)) == content


def test_recipes() -> None:
    dino, barlow = default_config("dino"), default_config("barlow_twins")
    assert (dino.optim.lr, dino.optim.weight_decay, dino.optim.weight_decay_end) == (1e-4, 0.04, 0.4)
    assert (dino.optim.clip, dino.optim.clip_grad, dino.optim.decay_1d) == ("parameter", 0.3, False)
    assert dino.optim.lr_end * 2048 / 256 == pytest.approx(1e-5)
    assert (dino.views.crop_area, dino.addons["ser"].weight) == ((0.25, 1.0), 0.3)
    assert barlow.optim.lr_end == pytest.approx(barlow.optim.lr * 0.001)
    assert default_config("moco_v3").optim == OptimConfig()
    assert {str(default_config(name).out) for name in OBJECTIVES} == {f"runs/{name}_ser" for name in OBJECTIVES}


def test_the_example_of_an_objective_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[1] / "docs" / "adding_a_method.md").read_text()
    code: dict[str, Any] = {"__name__": "cosine"}
    exec(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0], code)
    monkeypatch.setitem(OBJECTIVES, "cosine", code["CosineConfig"])
    monkeypatch.setitem(SIZES, "cosine", {"dim": 8})
    config = small_config("cosine", tmp_path)
    assert config.optim.lr == 1e-4
    trainer = Trainer(config, CPU)
    batch = next(trainer.batches())[1]
    record = trainer.step(0, 0, batch.images, batch.indices)
    assert 0 < record["invariance"] < 2
    assert all(p.grad is not None for p in trainer.model.parameters())


# ---------------------------------------------------------------- the optimizer


@pytest.mark.parametrize("warmup", [0.0, 0.25, 1.0])
def test_default_schedule_is_timms(warmup: float) -> None:
    options = OptimConfig(warmup=warmup, lr=0.7, batch_size=96)
    steps = 12
    model = nn.Linear(2, 2)
    ours, theirs = build_optimizer(options, model), build_optimizer(options, model)
    scheduler = CosineLRScheduler(
        theirs,
        t_initial=steps + 1 - round(warmup * steps),
        warmup_t=round(warmup * steps),
        warmup_prefix=True,
        t_in_epochs=False,
    )
    for step in range(steps):
        set_schedules(ours, options, step, steps)
        scheduler.step_update(step + 1)
        assert ours.param_groups[0]["lr"] == theirs.param_groups[0]["lr"]
        assert ours.param_groups[0]["weight_decay"] == options.weight_decay


def test_schedules_end_where_they_are_asked_to() -> None:
    options = OptimConfig(lr=1.0, lr_end=0.1, batch_size=512, weight_decay=0.04, weight_decay_end=0.4, decay_1d=False)
    optimizer = build_optimizer(options, nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3)))
    decayed, others = optimizer.param_groups
    assert [p.ndim for p in decayed["params"]] == [2]
    assert [p.ndim for p in others["params"]] == [1, 1, 1]
    rates, decays = [], []
    for step in range(1000):
        set_schedules(optimizer, options, step, 1000)
        assert others["weight_decay"] == 0.0
        assert others["lr"] == decayed["lr"]
        rates.append(decayed["lr"])
        decays.append(decayed["weight_decay"])
    assert max(rates) == 2.0
    assert rates.index(2.0) == 99
    assert rates[-1] == pytest.approx(0.2, rel=1e-4)
    assert rates[-1] > 0.2
    assert decays[0] == pytest.approx(0.04)
    assert decays[-1] == pytest.approx(0.4, rel=1e-4)
    assert decays[-1] < 0.4


def test_clipping_per_parameter() -> None:
    parameters = [nn.Parameter(torch.zeros(3)) for _ in range(4)]
    gradients = [torch.tensor([3.0, 0, 4]), torch.tensor([0.1, 0, 0]), torch.zeros(3)]
    for p, gradient in zip(parameters, gradients, strict=False):  # the last has none
        p.grad = gradient.clone()
    assert clip_gradients(parameters, 0.5, "parameter") == pytest.approx(math.sqrt(25 + 0.01))
    torch.testing.assert_close(parameters[0].grad, gradients[0] / 10, rtol=1e-5, atol=0)
    assert torch.equal(parameters[1].grad, gradients[1])
    assert torch.equal(parameters[2].grad, gradients[2])
    assert parameters[3].grad is None
    assert clip_gradients(parameters, float("inf"), "parameter") == pytest.approx(math.sqrt(0.25 + 0.01), rel=1e-5)
    assert clip_gradients(parameters, 0.05, "global") == pytest.approx(math.sqrt(0.25 + 0.01), rel=1e-5)
    assert clip_gradients(parameters[3:], 0.05, "parameter") == 0
    norms = torch.stack([p.grad.norm() for p in parameters[:2]])
    assert float(norms.norm()) == pytest.approx(0.05, rel=1e-4)


# ---------------------------------------------------------------- a training step


def first_step(name: str, out: Path, **options: Any) -> tuple[Trainer, Trainer]:
    """The training before and after its first step, in which the teacher is not the student."""
    config = small_config(name, out, **options)
    trainer, before = Trainer(config, CPU), Trainer(config, CPU)
    for run in (trainer, before):
        torch.manual_seed(1)
        for p in [] if run.model.teacher is None else run.model.teacher.parameters():
            p.add_(0.1 * torch.randn_like(p))
    epoch, batch = next(trainer.batches())
    trainer.step(0, epoch, batch.images, batch.indices)
    return before, trainer


@pytest.mark.parametrize("name", OBJECTIVES)
def test_all_but_the_frozen_parameters_get_gradients(name: str, tmp_path: Path) -> None:
    _, trainer = first_step(name, tmp_path)
    without = {of for of, p in trainer.model.named_parameters() if p.grad is None}
    expected = {of for of, _ in trainer.model.named_parameters() if of.startswith("teacher.")}
    if name in ("moco_v3", "simclr", "byol"):
        expected |= {"encoder.pos_embed", "encoder.patch_embed.proj.weight", "encoder.patch_embed.proj.bias"}
    if name == "dino":
        expected |= {"objective.head.weight_g", "objective.head.weight_v"}
    assert without == expected
    assert (trainer.model.teacher is None) == (name in ("barlow_twins", "simclr", "vicreg"))
    assert all(not p.requires_grad for p in trainer.model.parameters() if p.grad is None) == (name != "dino")


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if small_objective(name, 4).momentum is not None])
def test_the_teacher_moves_once_a_step(name: str, tmp_path: Path) -> None:
    before, trainer = first_step(name, tmp_path, optim__lr=0.1, model__drop_path_rate=0.2)
    momentum = trainer.model.objective.momentum
    student = trainer.model.encoder if trainer.model.objective.moves_teacher == "after" else before.model.encoder
    start = dict(before.model.teacher.encoder.named_parameters())
    for of, p in trainer.model.teacher.encoder.named_parameters():
        expected = start[of] + (1 - momentum) * (dict(student.named_parameters())[of] - start[of])
        torch.testing.assert_close(p, expected, rtol=1e-5, atol=1e-7)
    assert trainer.model.objective.moves_teacher == ("before" if name == "moco_v3" else "after")
    exported = trainer.model.teacher.encoder if name == "dino" else trainer.model.encoder
    assert trainer.model.product is exported
    dropped = [block.drop_path1.drop_prob for block in trainer.model.encoder.blocks[1:]]
    assert min(dropped) > 0
    for block in trainer.model.teacher.encoder.blocks:
        assert getattr(block.drop_path1, "drop_prob", 0.0) == 0.0


def test_prototypes_of_dino_are_frozen_at_first(tmp_path: Path) -> None:
    before, trainer = first_step("dino", tmp_path, optim__steps=10, optim__lr=0.1, dino__freeze_last_layer=0.1)
    head, start = trainer.model.objective.head, before.model.objective.head
    assert torch.equal(head.weight_v, start.weight_v)
    assert torch.equal(head.weight_g, start.weight_g)
    assert not torch.equal(head.mlp[0].weight, start.mlp[0].weight)
    batch = next(trainer.batches())[1]
    trainer.step(1, 0, batch.images, batch.indices)
    assert not torch.equal(head.weight_v, start.weight_v)
    assert not torch.equal(head.weight_g, start.weight_g)


def test_prototypes_of_dino_can_keep_their_norm(tmp_path: Path) -> None:
    _, trainer = first_step("dino", tmp_path, dino__norm_last_layer=True, dino__freeze_last_layer=0.0)
    head = trainer.model.objective.head
    assert not head.weight_g.requires_grad
    assert torch.equal(head.weight_g, torch.ones(24, 1))
    assert head.weight_v.grad is not None


def test_center_of_dino_moves_once_a_step_of_accumulated_parts() -> None:
    whole = small_dino()
    parts = copy.deepcopy(whole)
    student, teacher = torch.randn(2, 2, 6, 24)
    whole(list(student), list(teacher), 0.0)
    for rows in (slice(0, 4), slice(4, 6)):
        parts(list(student[:, rows]), list(teacher[:, rows]), 0.0)
        assert not parts.center.any()
    for dino in (whole, parts):
        dino.after_step(0.0)
    torch.testing.assert_close(whole.center, 0.1 * teacher.mean((0, 1)))
    torch.testing.assert_close(parts.center, whole.center)
    center = whole.center.clone()
    whole.eval()(list(student), list(teacher), 0.0)
    whole.after_step(0.0)
    assert torch.equal(whole.center, center)


def test_decay_and_clipping_of_the_recipe_reach_the_training(tmp_path: Path) -> None:
    _, trainer = first_step("dino", tmp_path, optim__clip_grad=1e-3, optim__epochs=7)
    assert trainer.model.objective.epochs == 7
    decayed, others = trainer.optimizer.param_groups
    assert decayed["weight_decay"] == pytest.approx(0.04)
    assert others["weight_decay"] == 0.0
    assert {p.ndim for p in others["params"]} == {1}
    norms = [float(p.grad.norm()) for p in trainer.model.encoder.parameters() if p.grad is not None]
    assert max(norms) == pytest.approx(1e-3, rel=1e-3)
    assert sorted(norms)[len(norms) // 2] == pytest.approx(1e-3, rel=1e-2)
