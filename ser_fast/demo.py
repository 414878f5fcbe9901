"""The demo: does the regulariser do what it says, on real photographs, in minutes on two cores?"""

from dataclasses import replace
from itertools import islice
from pathlib import Path
from statistics import fmean

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ser_fast.addons.ser import SERConfig
from ser_fast.data.loader import make_loader
from ser_fast.data.sources import ImageDataset, open_dataset
from ser_fast.evaluation.equivariance import Record, equivariance_errors, plot, random_control, write_table
from ser_fast.evaluation.features import embed, spread_images
from ser_fast.evaluation.knn import knn_accuracy
from ser_fast.objectives.moco_v3 import MoCoV3Config
from ser_fast.training.config import ModelConfig, OptimConfig, TrainConfig, ViewsConfig, with_options
from ser_fast.training.run_folder import RunFolder
from ser_fast.training.trainer import train
from ser_fast.vit import SplitViT, load_split_vit


def demo_runs(
    out: Path, *, data: str, steps: int, seed: int, image_size: int, patch_size: int
) -> dict[str, TrainConfig]:
    """The three trainings that the demo compares: the same recipe without SER, with it, and with it on crops."""
    base = TrainConfig(
        data=data,
        model=ModelConfig(
            "vit_tiny_patch16_224",
            split=2,
            image_size=image_size,
            patch_size=patch_size,
            embed_dim=192,
            depth=6,
            num_heads=3,
        ),
        views=ViewsConfig(share=0.5),
        objective=MoCoV3Config(mlp_dim=512),
        addons={"ser": SERConfig(hidden_dim=256, out_dim=128, max_tokens=1024)},
        optim=OptimConfig(batch_size=32, steps=steps, lr=12e-3),
        resume="auto",
        workers=0,
        seed=seed,
    )
    variants = {
        "lambda = 0": with_options(base, {"ser.weight": 0.0}),
        "lambda = 1": base,
        "lambda = 1, crops": with_options(base, {"views.sampler": "crop"}),
    }
    return {name: replace(run, out=out / name.replace(" = ", "_").replace(", ", "_")) for name, run in variants.items()}


def demo(
    out: Path = Path("runs/demo"),
    data: str = "photos",
    steps: int = 60,
    images: int = 64,
    image_size: int = 64,
    patch_size: int = 8,
    seed: int = 0,
    device: str = "auto",
) -> None:
    """Pretrain a small ViT three times (lambda 0, lambda 1, lambda 1 on crops) and compare, on held-out images.

    Args:
        out: folder of the runs, of demo.csv and of demo.png. Runs that are finished there are not repeated.
        data: "photos", "folder:PATH" or "cifar10:PATH".
        steps: optimiser steps of each run.
        images: held-out images that the equivariance error is measured on.
        image_size: side of the images, in pixels.
        patch_size: side of a token, in pixels.
        seed: of all three runs.
        device: "auto", "cpu" or "cuda".
    """
    runs = demo_runs(out, data=data, steps=steps, seed=seed, image_size=image_size, patch_size=patch_size)
    held_out = open_dataset(data, train=False, image_size=image_size)
    known = open_dataset(data, train=True, image_size=image_size)
    pictures = spread_images(held_out, images)

    models: dict[str, SplitViT] = {}
    losses: dict[str, dict[str, float]] = {}
    for name, config in runs.items():
        folder = train(replace(config, device=device))
        models[name] = load_split_vit(RunFolder(folder).encoder)
        losses[name] = _last_losses(folder)
    models = {"random": random_control(next(iter(models.values())), seed=seed), **models}
    records = {name: equivariance_errors(model, pictures) for name, model in models.items()}
    accuracy = {name: _knn(model, known, held_out, seed=seed) for name, model in models.items()}

    write_table(records, out / "demo.csv")
    plot(records, out / "demo.png", split=models["random"].split)
    console = Console()
    console.print(_table(records, losses, accuracy, split=models["random"].split))
    console.print(f"{out / 'demo.png'} and {out / 'demo.csv'} hold every layer and every element.")


def _last_losses(folder: Path) -> dict[str, float]:
    """The mean losses of the last tenth of a run."""
    log = RunFolder(folder).read_log()
    log = log[-max(1, len(log) // 10) :]
    return {name: fmean(step[name] for step in log) for name in ("invariance", "ser")}


def _knn(model: SplitViT, known: ImageDataset, held_out: ImageDataset, *, seed: int) -> float:
    """Top-1 accuracy on all held-out images, by about a thousand training images."""
    batch = min(64, len(known))
    votes = islice(make_loader(known, batch_size=batch, train=True, seed=seed), 16)
    asked = make_loader(held_out, batch_size=batch, train=False)
    return knn_accuracy(*embed(model, votes, "cpu"), *embed(model, asked, "cpu"), k=20)[20]


def _table(
    records: dict[str, list[Record]], losses: dict[str, dict[str, float]], accuracy: dict[str, float], *, split: int
) -> Table:
    layers = sorted({record.layer for record in records["random"]})
    table = Table(
        title=f"Equivariance error of layers {layers[0]} to {layers[-1]} (SER acts on {split}), on held-out images",
        box=SIMPLE_HEAD,
        padding=0,
    )
    for heading in ("", "inv. loss", "SER loss", *map(str, layers), "kNN"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for name, of_model in records.items():
        errors = [
            fmean(r.relative_error for r in of_model if r.layer == layer and r.group != "identity") for layer in layers
        ]
        parts = [f"{losses[name][part]:.2f}" if name in losses else "" for part in ("invariance", "ser")]
        table.add_row(name, *parts, *(f"{error:.2f}" for error in errors), f"{accuracy[name]:.3f}")
    return table
