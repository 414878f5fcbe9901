"""Small runs that several test files train."""

import json
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ser_fast.addons.ser import SERConfig
from ser_fast.objectives.moco_v3 import MoCoV3Config
from ser_fast.training.config import ModelConfig, OptimConfig, TrainConfig, ViewsConfig

CPU = torch.device("cpu")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # of other processes: as this one


def patterns(folder: Path, count: int) -> str:
    """The source of so many blurred patterns of 32 x 32 pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(rng.integers(256, size=(6, 6, 3), dtype=np.uint8))
        coarse.resize((32, 32), Image.Resampling.BICUBIC).save(folder / f"{number:02}.png")
    return f"folder:{folder}"


def tiny_config(out: Path, data: str) -> TrainConfig:
    """Two steps of batch 8 on a ViT of three blocks."""
    return TrainConfig(
        out=out,
        data=data,
        model=ModelConfig(
            "vit_tiny_patch16_224", split=1, image_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3
        ),
        views=ViewsConfig(share=0.5),
        objective=MoCoV3Config(dim=16, mlp_dim=32),
        addons={"ser": SERConfig(hidden_dim=32, out_dim=16)},
        optim=OptimConfig(batch_size=8, steps=2, warmup=0.25, lr=0.02),
        device="cpu",
        workers=0,
    )


def read_log(out: Path) -> list[dict[str, float]]:
    """What each step logged."""
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
