"""Recipes of the demo: small trainings that fit two cores, for the comparison, the sensitivity study and benchmarks."""

from dataclasses import replace
from pathlib import Path

from ser_fast.addons.ser import SERConfig
from ser_fast.objectives.moco_v3 import MoCoV3Config
from ser_fast.training.config import ModelConfig, OptimConfig, TrainConfig, ViewsConfig, with_options

FOLDERS = {"off": "lambda_0", "ser": "lambda_1", "ser_crops": "lambda_1_crops"}
"""The recipes by name, and the folders of their runs."""


def demo_model(*, image_size: int = 64, patch_size: int = 8) -> ModelConfig:
    """A ViT of 6 blocks, 192 wide, split at 2.

    Args:
        image_size: side of the images, in pixels.
        patch_size: side of a token, in pixels.
    """
    return ModelConfig(
        "vit_tiny_patch16_224",
        split=2,
        image_size=image_size,
        patch_size=patch_size,
        embed_dim=192,
        depth=6,
        num_heads=3,
    )


def demo_recipes(
    out: Path, *, data: str, steps: int, seed: int, image_size: int = 64, patch_size: int = 8
) -> dict[str, TrainConfig]:
    """The three trainings that the demo compares: the same recipe without SER, with it, and with it on crops.

    Args:
        out: the folder of the runs' folders (FOLDERS).
        data: what they are trained on, as `open_dataset` takes it.
        steps: optimizer steps of each.
        seed: of all three.
        image_size: side of the images, in pixels.
        patch_size: side of a token, in pixels.

    Returns:
        "off" (lambda 0), "ser" (lambda 1) and "ser_crops" (lambda 1, equivariance to crops).
    """
    ser = TrainConfig(
        data=data,
        model=demo_model(image_size=image_size, patch_size=patch_size),
        views=ViewsConfig(share=0.5, frame="whole"),  # tiles as small as the views: no pixels to spare
        objective=MoCoV3Config(mlp_dim=512),
        addons={"ser": SERConfig(hidden_dim=256, out_dim=128, max_tokens=1024)},
        optim=OptimConfig(batch_size=32, steps=steps, lr=12e-3),
        resume="auto",
        workers=0,
        seed=seed,
    )
    recipes = {
        "off": with_options(ser, {"ser.weight": 0.0}),
        "ser": ser,
        "ser_crops": with_options(ser, {"views.sampler": "crop"}),
    }
    return {name: replace(recipe, out=out / FOLDERS[name]) for name, recipe in recipes.items()}
