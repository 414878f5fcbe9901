"""How many operations of torch a training step of MoCo-v3 and SER calls, and how many of them run a kernel.

On a GPU that is what the host launches before it can go on. They depend on the blocks and on what is drawn for the
pictures, and neither on the width of the model nor on the side of the pictures; a model of small ones on the CPU, with
the optimizer that a GPU would use, has those of a ViT-S.

    python benchmarks/step_calls.py
"""

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from ser_fast.training.config import TrainConfig, default_config, with_options
from ser_fast.training.optim import build_optimizer
from ser_fast.training.trainer import Trainer

CPU = torch.device("cpu")
SIDE = 32


class Calls(TorchDispatchMode):
    """Counts the calls of a step, of its views apart."""

    def __init__(self) -> None:
        super().__init__()
        self.part = "rest"
        self.calls: Counter[str] = Counter()
        self.kernels: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[self.part] += 1
        # A result that aliases an argument without writing to it is a view, and an empty tensor has only memory.
        results = [result.alias_info for result in func._schema.returns]
        views = any(alias is not None and not alias.is_write for alias in results)
        if not views and not func._schema.name.startswith(("aten::empty", "aten::new_empty", "aten::detach")):
            self.kernels[self.part] += 1
        return func(*args, **(kwargs or {}))


def count(config: TrainConfig) -> Calls:
    """Of the second step: the first one also allocates moments."""
    trainer, calls = Trainer(config, CPU), Calls()
    trainer.optimizer = build_optimizer(config.optim, trainer.model, fused=True)
    make = trainer.make_views

    def made(*args: Any) -> Any:
        calls.part = "views"
        try:
            return make(*args)
        finally:
            calls.part = "rest"

    trainer.make_views = made  # type: ignore[assignment]
    for step, (epoch, batch) in zip(range(2), trainer.batches(), strict=False):
        if step == 0:
            trainer.step(step, epoch, batch.images, batch.indices, batch.aspects)
            continue
        with calls:
            trainer.step(step, epoch, batch.images, batch.indices, batch.aspects)
    return calls


def main() -> None:
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(512):
            picture = Image.fromarray(rng.integers(256, size=(SIDE, SIDE, 3), dtype=np.uint8))
            picture.save(Path(folder) / f"{number:03}.png")
        print("| blocks | batch | calls: views | rest | all | kernels: views | rest | all |")
        print("|---|---|---|---|---|---|---|---|")
        for depth in (3, 12):
            for batch in (64, 256):
                options = {
                    "out": Path(folder) / "run",
                    "data": f"folder:{folder}",
                    "workers": 0,
                    "model.name": "vit_tiny_patch16_224",
                    "model.image_size": SIDE,
                    "model.patch_size": 8,
                    "model.embed_dim": 48,
                    "model.num_heads": 3,
                    "model.depth": depth,
                    "moco.mlp_dim": 64,
                    "model.split": min(3, depth - 1),
                    "optim.batch_size": batch,
                    "optim.steps": 10,
                }
                found = count(with_options(default_config("moco_v3"), options))
                numbers = [
                    number
                    for counted in (found.calls, found.kernels)
                    for number in (counted["views"], counted["rest"], counted.total())
                ]
                print(f"| {depth} | {batch} | {' | '.join(map(str, numbers))} |", flush=True)


if __name__ == "__main__":
    main()
