"""Every number among the options has a range, and is refused by its name before the run's folder exists."""

import math
from collections.abc import Iterator
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
from cases.runs import CPU, patterns, tiny_config

from ser_fast.addons import ADDONS
from ser_fast.objectives import OBJECTIVES
from ser_fast.training.config import TrainConfig, default_config, with_options
from ser_fast.training.trainer import Trainer
from ser_fast.training.validation import check_options

ABSURD = (-1, 0, math.nan, math.inf, 10**12)
# 0 leaves something out, or is a probability, a weight or a number that draws start from.
FROM_0 = {
    *("seed", "workers", "loader_timeout", "max_skipped", "model.split", "model.drop_path_rate"),
    *("views.share", "views.locals", "views.color_strength", "views.color_jitter", "views.color_gray"),
    *("views.color_blur", "views.color_solarize", "views.local_gray", "views.local_blur"),
    *("optim.lr", "optim.lr_end", "optim.weight_decay", "optim.weight_decay_end", "optim.warmup", "optim.clip_grad"),
    *("moco.momentum", "byol.momentum", "dino.momentum", "dino.center_momentum", "dino.temperature_warmup"),
    *("dino.freeze_last_layer", "barlow.off_diagonal", "vicreg.invariance", "vicreg.variance", "vicreg.covariance"),
    *("augself.crop", "augself.color", "augself.flip", "augself.turn", "augself.blur", "augself.solarize"),
    *("stl.equivariance", "stl.transformation", "ser.noise", "ser.masked", "evaluate.every", "evaluate.share"),
    *(f"{name}.{option}" for name in ADDONS for option in ("weight", "layers")),
}
# A rate or a weight may be of any size (what comes of it is not finite, and stops the run), and a number of steps.
ANY_SIZE = {
    *(
        "seed",
        "save_every",
        "keep_checkpoints",
        "loader_timeout",
        "optim.epochs",
        "optim.steps",
        "ser.max_tokens",
        "ser.noise",
    ),
    *("evaluate.every", "evaluate.train", "evaluate.test", "evaluate.equivariance"),
    *("optim.lr", "optim.lr_end", "optim.weight_decay", "optim.weight_decay_end", "optim.clip_grad"),
    *("barlow.off_diagonal", "vicreg.invariance", "vicreg.variance", "vicreg.covariance"),
    *("moco.temperature", "simclr.temperature", "ser.temperature", "equimod.temperature", "stl.temperature"),
    *("dino.student_temperature", "dino.first_temperature", "dino.teacher_temperature"),
    *("augself.crop", "augself.color", "augself.flip", "augself.turn", "augself.blur", "augself.solarize"),
    *("stl.equivariance", "stl.transformation", *(f"{name}.weight" for name in ADDONS)),
}


def numbers(part: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(name, default) of every option that takes a number, or several."""
    for field in fields(part):
        value = getattr(part, field.name)
        if is_dataclass(value):
            yield from numbers(value, f"{prefix}{field.name}.")
        elif "int" in str(field.type) or "float" in str(field.type) or isinstance(value, float):
            yield prefix + field.name, value


def options() -> list[tuple[str, str, Any]]:
    """(objective, name, default) of all."""
    found = {name: ("moco_v3", value) for name, value in numbers(TrainConfig()) if not name.startswith("objective.")}
    for objective, kind in OBJECTIVES.items():
        found |= {name: (objective, value) for name, value in numbers(kind(), f"{kind.section}.")}
    for name, kind in ADDONS.items():
        found |= {option: ("moco_v3", value) for option, value in numbers(kind(), f"{name}.")}
    return [(objective, name, value) for name, (objective, value) in found.items()]


def test_all_options_are_there() -> None:
    names = [name for _, name, _ in options()]
    assert len(names) == len(set(names)) > 75
    assert {*FROM_0, *ANY_SIZE} <= {*names}


@pytest.mark.parametrize(("objective", "name", "default"), options(), ids=[name for _, name, _ in options()])
def test_an_absurd_number_is_refused_by_its_name(objective: str, name: str, default: Any, tmp_path: Path) -> None:
    base = tiny_config(tmp_path / "run", "photos")
    small = {"dim": 8, "mlp_dim": 8, "bottleneck_dim": 8}
    kind = default_config(objective).objective
    base = with_options(TrainConfig(**{**vars(base), "objective": kind}), {
        f"{kind.section}.{option}": value for option, value in small.items() if option in asdict(kind)
    })  # fmt: skip
    section = name.partition(".")[0]
    if section in ADDONS:
        base = with_options(base, {f"{section}.layers": (2,)})
    base = with_options(base, {"data": patterns(tmp_path / "images", 12)})
    for value in ABSURD:
        if name in (FROM_0 if value == 0 else ANY_SIZE if value == 10**12 else ()):
            check_options(with_options(base, {name: alike(default, value)}), 1)
            continue
        option = name.rpartition(".")[2].replace("_", "[_ ]")
        with pytest.raises(ValueError, match=rf"(^|[ .]){option}\b.*"):
            Trainer(with_options(base, {name: alike(default, value)}), CPU)
    assert not base.out.exists()


def test_a_rate_that_float32_does_not_have_is_refused(tmp_path: Path) -> None:
    for option in ("optim.lr", "optim.lr_end", "optim.weight_decay", "optim.weight_decay_end"):
        with pytest.raises(ValueError, match=rf"{option}: got 1e\+300, takes a number in \[0, 1e\+30\]"):
            check_options(with_options(tiny_config(tmp_path / "run", "photos"), {option: 1e300}), 1)


def alike(default: Any, value: Any) -> Any:
    """The value, in place of the last of several numbers."""
    if isinstance(default, tuple):
        return (*default[:-1], value)
    return (value,) if default in ("split", "off") else value


def test_a_hue_beyond_half_a_turn_is_refused_by_its_name(tmp_path: Path) -> None:
    base = tiny_config(tmp_path / "run", "photos")
    changed = with_options(base, {"views.color_strength": 3.0, "views.color_jitter": (0.4, 0.4, 0.2, 0.2)})
    with pytest.raises(ValueError, match=r"views.color_jitter: got a hue of 0.2 x views.color_strength 3, takes half"):
        check_options(changed, 1)
