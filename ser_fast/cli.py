"""The command line: `ser-fast train | demo | equivariance | knn | detection | report | doctor`."""

import csv
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from ser_fast.demo import demo
from ser_fast.evaluation import detection as transfer
from ser_fast.evaluation import equivariance as scores
from ser_fast.evaluation.features import embed, spread_images
from ser_fast.evaluation.knn import knn_accuracy
from ser_fast.evaluation.shapes import write_shapes
from ser_fast.ops.backends import BACKENDS, reason_not
from ser_fast.report import read_runs, write_report
from ser_fast.training.checkpoint import find_encoder, write_atomically
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


def detection(
    checkpoint: tyro.conf.Positional[Path],
    data: Path | None = None,
    steps: int = 250,
    batch_size: int = 8,
    lr: float = 4e-3,
    image_size: int | None = None,
    out: Path | None = None,
    save_every: int = 50,
    workers: int = 0,
    seed: int = 0,
    device: str = "auto",
) -> None:
    """The COCO mAP of a Faster R-CNN on a frozen checkpoint, beside one on a random initialisation.

    Only the pyramid and the heads are trained. What is interrupted goes on from the heads in out/detection.

    Args:
        checkpoint: a run's folder or an encoder.safetensors.
        data: a folder in COCO's layout: annotations/instances_train*.json and instances_val*.json, and the images in
            folders named like the part behind "instances_"; default shapes on photographs, written to out/detection.
        steps: to train each of the two heads.
        batch_size: images a step.
        lr: the largest learning rate.
        image_size: of an image's shorter side in the detector, in pixels; default twice the model's.
        out: folder for detection.csv, detection.png and detection/ (heads, predictions); default the checkpoint's.
        save_every: steps between two writes of a head.
        workers: processes that load images.
        seed: of the heads' weights, the order of the images and the generated set.
        device: "auto", "cpu" or "cuda".
    """
    model, _, size, out, where = _open(checkpoint, None, image_size, out, device)
    folder = out / "detection"
    if data is None:
        data = folder / f"shapes_{seed}"
        if not (data / "annotations" / "instances_val.json").is_file():  # what is written last
            write_shapes(data, seed=seed)
    train_images, held_out = (transfer.CocoFolder(data, train=part) for part in (True, False))
    records, results = {}, {}
    for name, encoder in {"checkpoint": model, "random": scores.random_control(model)}.items():
        torch.manual_seed(seed)  # the same initial head on both
        detector = transfer.build_detector(
            encoder, categories=len(train_images.categories), image_size=image_size or 2 * size
        ).to(where)
        transfer.train_head(
            detector,
            train_images,
            folder / f"{name}.pt",
            steps=steps,
            batch_size=batch_size,
            lr=lr,
            seed=seed,
            save_every=save_every,
            workers=workers,
            progress=True,
        )
        results[name] = transfer.predict(detector, held_out, batch_size=batch_size, workers=workers, progress=True)
        write_atomically(folder / f"{name}.json", partial(Path.write_text, data=json.dumps(results[name])))
        records[name] = transfer.score(held_out.coco, results[name])

    transfer.print_table(records)
    transfer.write_table(records, out / "detection.csv")
    transfer.plot(held_out, results, out / "detection.png")
    Console().print(f"written: {out / 'detection.csv'}, {out / 'detection.png'}, {folder}")


def report(runs: tyro.conf.Positional[tuple[Path, ...]], out: Path = Path("runs/report.html")) -> None:
    """Compare runs in one HTML file: their curves, options, figures and every CSV file in their folders.

    Args:
        runs: folders of training runs, or any folders with CSV files.
        out: the file, which needs no other.
    """
    write_report(read_runs(runs), out)
    Console().print(f"written: {out}")


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
        "knn": knn,
        "detection": detection,
        "report": report,
        "doctor": doctor,
    }
    try:
        tyro.extras.subcommand_cli_from_dict(commands, description=__doc__)
    except (ValueError, NonFiniteLossError) as error:
        sys.exit(f"ser-fast: {error}")


if __name__ == "__main__":
    main()
