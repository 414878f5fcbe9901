"""One training step of the demo, with SER by every backend; the floor is the step without SER."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ser_fast.training.config import TrainConfig, with_options
from ser_fast.training.recipes import demo_recipes
from ser_fast.training.trainer import Trainer


def _step(config: TrainConfig, device: torch.device) -> Callable[[Tensor], Tensor]:
    """images (B, 3, S, S) uint8 to the losses of a step, from the initial weights on."""
    trainer, steps = Trainer(config, device), iter(range(config.optim.steps))

    def step(images: Tensor) -> Tensor:
        record = trainer.step(next(steps), 0, images, torch.arange(len(images)))
        return torch.tensor([record["invariance"], record.get("ser", 0.0)])

    return step


def bench_training_step(compare, backends, device, tmp_path: Path) -> None:
    config = demo_recipes(tmp_path, data="photos", steps=1000, seed=0)["ser"]
    rivals = {backend: _step(with_options(config, {"ser.backend": backend}), device) for backend in backends}
    batch, side = config.optim.batch_size, config.model.image_size
    images = torch.randint(256, (batch, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = _step(with_options(config, {"ser.backend": "reference"}), device)(images)
    compare(
        "training step",
        rivals,
        images,
        oracle=lambda images: expected,
        floor=_step(replace(config, views=replace(config.views, share=0.0)), device),
        B=batch,
        image=side,
        model=config.model.name,
    )
