"""A small model of every objective, and a small config that trains it."""

from pathlib import Path
from typing import Any

from ser_fast.objectives import OBJECTIVES
from ser_fast.objectives.base import Objective
from ser_fast.training.config import TrainConfig, default_config, with_options

SIZES: dict[str, dict[str, Any]] = {
    "moco_v3": {"dim": 8, "mlp_dim": 16},
    "dino": {"dim": 24, "mlp_dim": 16, "bottleneck_dim": 8},
    "barlow_twins": {"dim": 12, "mlp_dim": 16},
    "simclr": {"dim": 8, "mlp_dim": 16},
    "byol": {"dim": 8, "mlp_dim": 16},
    "vicreg": {"dim": 12, "mlp_dim": 16},
}


def small_objective(name: str, encoder_dim: int, **options: Any) -> Objective:
    return OBJECTIVES[name](**SIZES[name], **options).build(encoder_dim)


def small_config(name: str, out: Path, **options: Any) -> TrainConfig:
    """The objective's recipe on a ViT of three blocks, with SER on half of the batch.

    Args:
        name: in OBJECTIVES.
        out: the run's folder.
        options: others, with __ for the dot of their names.
    """
    section = OBJECTIVES[name].section
    sizes = {f"{section}.{option}": value for option, value in SIZES[name].items()}
    small = {
        "out": out,
        "device": "cpu",
        "workers": 0,
        "model.name": "vit_tiny_patch16_224",
        "model.split": 1,
        "model.image_size": 32,
        "model.patch_size": 8,
        "model.embed_dim": 48,
        "model.depth": 3,
        "model.num_heads": 3,
        "views.share": 0.5,
        "ser.hidden_dim": 32,
        "ser.out_dim": 16,
        "optim.batch_size": 8,
        "optim.steps": 2,
    }
    chosen = {option.replace("__", "."): value for option, value in options.items()}
    return with_options(default_config(name), small | sizes | chosen)
