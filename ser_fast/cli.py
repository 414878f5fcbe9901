"""The command line: `ser-fast train | demo | equivariance | sensitivity | knn | doctor`."""

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from ser_fast.demo import demo
from ser_fast.evaluation import equivariance as scores
from ser_fast.evaluation.features import embed, spread_images
from ser_fast.evaluation.knn import knn_accuracy
from ser_fast.ops.backends import BACKENDS, reason_not
from ser_fast.sensitivity import training as training_side
from ser_fast.sensitivity.report import REPORT, write_report
from ser_fast.sensitivity.rows import TABLE, read_rows
from ser_fast.sensitivity.study import Protocol, run_study
from ser_fast.training.checkpoint import find_encoder
from ser_fast.training.config import TrainConfig, from_json
from ser_fast.training.data import make_loader, open_dataset
from ser_fast.training.trainer import NonFiniteLossError, choose_device
from ser_fast.training.trainer import train as run_training
from ser_fast.vit import SplitViT, load_split_vit


def train(config: Annotated[TrainConfig, tyro.conf.arg(name="")]) -> None:
    """Pretrain a vision transformer with MoCo-v3 and Soft Equivariance Regularization (also under torchrun)."""
    run_training(config)


def equivariance(
    checkpoint: tyro.conf.Positional[Path],
    data: str | None = None,
    images: int = 256,
    image_size: int | None = None,
    out: Path | None = None,
    device: str = "auto",
) -> None:
    """How equivariant is a checkpoint, per layer and per element of D4 and scale, beside a random initialisation?

    Args:
        checkpoint: a run's folder or an encoder.safetensors.
        data: whose held-out images are used; default the run's own, else "photos".
        images: how many of them, spread evenly.
        image_size: their side in pixels; default the model's.
        out: folder for equivariance.csv and equivariance.png; default the checkpoint's.
        device: "auto", "cpu" or "cuda".
    """
    model, data, image_size, out, where = _open(checkpoint, data, image_size, out, device)
    held_out = open_dataset(data, train=False, image_size=image_size)
    pictures = spread_images(held_out, images).to(where)
    records = {
        name: scores.equivariance_errors(of, pictures, progress=True)
        for name, of in {"checkpoint": model, "random": scores.random_control(model)}.items()
    }
    scores.print_table(records)
    scores.write_table(records, out / "equivariance.csv")
    scores.plot(records, out / "equivariance.png", split=model.split)
    Console().print(f"written: {out / 'equivariance.csv'}, {out / 'equivariance.png'}")


def sensitivity(
    checkpoints: tyro.conf.Positional[tuple[str, ...]] = (),
    preset: Literal["quick", "full"] = "quick",
    train: bool = False,
    data: str = "photos",
    images: int = 16,
    image_size: int = 128,
    out: Path = Path("runs/sensitivity"),
    seed: int = 0,
    device: str = "auto",
    variants: tuple[str, ...] = tuple(training_side.VARIANTS),
    seeds: int = 3,
    steps: int = 60,
) -> None:
    """How much do interpolation, padding and alignment on the token lattice matter? A report with a recommendation.

    Synthetic fields, pooled photographs and the features of each layer are moved by rotations, flips, scales, shifts
    and crops, in tokens and in pixels. What is in `out` already is kept: a call that was stopped goes on.

    Args:
        checkpoints: runs' folders, encoder.safetensors files or names of timm models (pretrained weights); a random
            initialisation of each architecture is measured with them, or that of the demo's alone.
        preset: "quick" varies one factor at a time, "full" measures the whole grid, for hours.
        train: train the demo's recipe with each of the variants instead, and say whether the choice matters after it.
        data: whose held-out images are used: "photos", "folder:PATH" or "cifar10:PATH".
        images: how many of them, spread evenly, and how many synthetic fields; for the trained models, four times that.
        image_size: their side in pixels; enlarged where a model needs more.
        out: folder for sensitivity.csv, report.html, summary.txt and the figures.
        seed: of the fields, the random initialisations and the bootstrap.
        device: "auto", "cpu" or "cuda".
        variants: with --train, the settings of SERLoss.
        seeds: with --train, how many runs of each.
        steps: with --train, optimiser steps of a run.
    """
    console = Console()
    if train:
        runs = training_side.study_runs(out / "runs", variants, seeds, data=data, steps=steps)
        scores = training_side.train_and_score(runs, images=4 * images, device=device)
        training_side.write_scores(scores, out)
        console.print(training_side.table(scores))
        for line in training_side.judge(scores):
            console.print(line, highlight=False)
        console.print(f"written: {out / training_side.TABLE}, {out / training_side.FIGURE}")
    else:
        protocol = Protocol(data, images, image_size, seed)
        run_study(checkpoints, protocol, out, full=preset == "full", device=choose_device(device), progress=True)
    if (out / TABLE).exists():
        scores = training_side.read_scores(out)
        for number, line in enumerate(write_report(read_rows(out / TABLE), scores, out), start=1):
            console.print(f"{number}. {line}", highlight=False, markup=False)
        console.print(f"written: {out / TABLE}, {out / REPORT}")


def knn(
    checkpoint: tyro.conf.Positional[Path],
    data: str | None = None,
    k: tuple[int, ...] = (1, 5, 10, 20, 50),
    temperature: float = 0.07,
    image_size: int | None = None,
    out: Path | None = None,
    batch_size: int = 256,
    workers: int = 0,
    device: str = "auto",
) -> None:
    """The k-nearest-neighbour accuracy of a checkpoint on held-out images, beside a random initialisation.

    Args:
        checkpoint: a run's folder or an encoder.safetensors.
        data: whose training images vote and whose held-out images are classified; default the run's own, else "photos".
        k: numbers of neighbours.
        temperature: of the neighbours' votes.
        image_size: side of the images in pixels; default the model's.
        out: folder for knn.csv and knn.png; default the checkpoint's.
        batch_size: images at a time.
        workers: processes that load images.
        device: "auto", "cpu" or "cuda".
    """
    model, data, image_size, out, where = _open(checkpoint, data, image_size, out, device)
    loaders = [
        make_loader(
            open_dataset(data, train=train, image_size=image_size),
            batch_size=batch_size,
            train=False,
            workers=workers,
        )
        for train in (True, False)
    ]
    accuracy: dict[str, dict[int, float]] = {}
    for name, of in {"checkpoint": model, "random": scores.random_control(model)}.items():
        known, held_out = (embed(of, loader, where, progress=True) for loader in loaders)
        accuracy[name] = knn_accuracy(*known, *held_out, k=k, temperature=temperature)

    table = Table(title=f"kNN top-1 on held-out images of {data}")
    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axes = figure.subplots()
    with (out / "knn.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("model", "k", "top1"))
        table.add_column("")
        for count in k:
            table.add_column(f"k = {count}", justify="right")
        for name, values in accuracy.items():
            table.add_row(name, *(f"{value:.3f}" for value in values.values()))
            rows.writerows((name, count, value) for count, value in values.items())
            axes.plot(list(values), list(values.values()), marker="o", label=name)
    axes.set(xlabel="k", ylabel="kNN top-1", ylim=(0, 1))
    axes.legend()
    figure.savefig(out / "knn.png", dpi=150)
    Console().print(table)
    Console().print(f"written: {out / 'knn.csv'}, {out / 'knn.png'}")


def doctor() -> None:
    """What can run here: the backends of the kernels on each device, and why another one can't."""
    table = Table(title=f"torch {torch.__version__}, CUDA {'available' if torch.cuda.is_available() else 'absent'}")
    for heading in ("backend", "on cpu tensors", "on cuda tensors"):
        table.add_column(heading)
    for backend in BACKENDS:
        table.add_row(backend, *(reason_not(backend, device) or "runs" for device in ("cpu", "cuda")))
    Console().print(table)


def _open(
    checkpoint: Path, data: str | None, image_size: int | None, out: Path | None, device: str
) -> tuple[SplitViT, str, int, Path, torch.device]:
    """The encoder on its device, and what an evaluation takes from the run where it isn't told."""
    weights = find_encoder(checkpoint)
    chosen = choose_device(device)
    model = load_split_vit(weights).to(chosen)
    config = weights.parent / "config.json"
    if data is None:
        data = from_json(json.loads(config.read_text())).data if config.is_file() else "photos"
    out = weights.parent if out is None else out
    out.mkdir(parents=True, exist_ok=True)
    if image_size is None:
        image_size = model.image_size[0]
    return model, data, image_size, out, chosen


def main() -> None:
    """Run the command line; errors of the user's making are one line, not a traceback."""
    commands: dict[str, Callable[..., Any]] = {
        "train": train,
        "demo": demo,
        "equivariance": equivariance,
        "sensitivity": sensitivity,
        "knn": knn,
        "doctor": doctor,
    }
    try:
        tyro.extras.subcommand_cli_from_dict(commands, description=__doc__)
    except (ValueError, NonFiniteLossError) as error:
        sys.exit(f"ser-fast: {error}")
    except KeyboardInterrupt:
        sys.exit("ser-fast: stopped")


if __name__ == "__main__":
    main()
