"""The command line: `ser-fast COMMAND`, of which `ser-fast --help` tells the names."""

import csv
import json
import sys
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ser_fast.data.loader import make_loader
from ser_fast.data.sources import open_dataset
from ser_fast.demo import demo
from ser_fast.device import choose_device
from ser_fast.evaluation import detection as transfer
from ser_fast.evaluation import equivariance as scores
from ser_fast.evaluation import prediction, robustness
from ser_fast.evaluation.classification import (
    Rows,
    grade,
    plot_confusion,
    print_rows,
    rank,
    write_confusion,
    write_rows,
)
from ser_fast.evaluation.features import check_labelled, embed, embed_cached, spread_images, spread_items
from ser_fast.evaluation.knn import knn_predictions, knn_scores
from ser_fast.evaluation.linear_probe import RATES, probe_scores, train_probe
from ser_fast.evaluation.shapes import write_shapes
from ser_fast.export import export as export_encoder
from ser_fast.io import write_atomically
from ser_fast.ops.backends import BACKENDS, PREFERRED, fastest, preferred, reason_not
from ser_fast.report import read_runs, write_report
from ser_fast.sensitivity import report as sensitivity_report
from ser_fast.sensitivity import training as training_side
from ser_fast.sensitivity.rows import TABLE, read_rows
from ser_fast.sensitivity.study import Protocol, run_study
from ser_fast.training.options import parse
from ser_fast.training.run_folder import RunFolder, find_encoder
from ser_fast.training.trainer import NonFiniteLossError
from ser_fast.training.trainer import train as run_training
from ser_fast.vit import SplitViT, load_split_vit


def train() -> None:
    """Pretrain a vision transformer with an invariance objective and equivariance terms (also under torchrun)."""
    run_training(parse(sys.argv[2:]))


def equivariance(
    checkpoint: tyro.conf.Positional[Path],
    data: str | None = None,
    images: int = 256,
    image_size: int | None = None,
    pairs: int = 4,
    out: Path | None = None,
    device: str = "auto",
) -> None:
    """How equivariant is a checkpoint, per layer and per element of D4 and scale, beside a random initialisation?

    Args:
        checkpoint: a run's folder or an encoder.safetensors.
        data: whose held-out images are used; default the run's own, else "photos".
        images: how many of them, spread evenly.
        image_size: their side in pixels; default the model's.
        pairs: scales and angles of each image, for the prediction of g from pairs of images; the last quarter of the
            images tests it.
        out: folder for equivariance.csv, prediction.csv and equivariance.png; default the checkpoint's.
        device: "auto", "cpu" or "cuda".
    """
    model, data, image_size, out, where = _open(checkpoint, data, image_size, out, device)
    held_out = open_dataset(data, train=False, image_size=image_size)
    pictures = spread_images(held_out, images).to(where)
    models = {"checkpoint": model, "random": scores.random_control(model)}
    records = {name: scores.equivariance_errors(of, pictures, progress=True) for name, of in models.items()}
    predictions = {
        name: prediction.predict_transformations(of, pictures, pairs=pairs, progress=True)
        for name, of in models.items()
    }
    scores.print_table(records)
    prediction.print_table(predictions)
    scores.write_table(records, out / "equivariance.csv")
    scores.write_table(predictions, out / "prediction.csv")
    scores.plot(records, out / "equivariance.png", split=model.split)
    _written(out, "equivariance.csv", "prediction.csv", "equivariance.png")


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
        for number, line in enumerate(sensitivity_report.write_report(read_rows(out / TABLE), scores, out), start=1):
            console.print(f"{number}. {line}", highlight=False, markup=False)
        console.print(f"written: {out / TABLE}, {out / sensitivity_report.REPORT}")


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
    """k nearest neighbours classify held-out images by a checkpoint's embeddings, beside a random initialisation.

    Args:
        checkpoint: a run's folder or an encoder.safetensors.
        data: whose training images vote and whose held-out images are classified; default the run's own, else "photos".
        k: numbers of neighbours.
        temperature: of the neighbours' votes.
        image_size: side of the images in pixels; default the model's.
        out: folder for knn.csv, knn.png, knn_confusion.csv and knn_confusion.png; default the checkpoint's.
        batch_size: images at a time.
        workers: processes that load images.
        device: "auto", "cpu" or "cuda".
    """
    model, data, image_size, out, where = _open(checkpoint, data, image_size, out, device)
    known, held_out = (open_dataset(data, train=train, image_size=image_size) for train in (True, False))
    loaders = [
        make_loader(dataset, batch_size=batch_size, train=False, workers=workers) for dataset in (known, held_out)
    ]
    rows: Rows = []
    for name, of in {"checkpoint": model, "random": scores.random_control(model)}.items():
        train, (features, labels) = (embed(of, loader, where, progress=True) for loader in loaders)
        check_labelled("test", features, labels)
        ranked = knn_predictions(*train, features, k=k, temperature=temperature)
        for count, predicted in ranked.items():
            rows.append(({"model": name, "k": count}, grade(predicted, labels, len(known.classes))))

    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axes = figure.subplots()
    for name in ("checkpoint", "random"):
        top1 = [result.top1 for of, result in rows if of["model"] == name]
        axes.plot(k, [share.value for share in top1], marker="o", label=name)
        axes.fill_between(k, [share.low for share in top1], [share.high for share in top1], alpha=0.2)
    axes.set(xlabel="k", ylabel="kNN top-1, 95 % interval", ylim=(0, 1))
    axes.legend()
    figure.savefig(out / "knn.png", dpi=150)
    _write_classifiers(rows, known.classes, out, "knn", f"kNN on held-out images of {data}")
    _written(out, "knn.csv", "knn.png", "knn_confusion.csv", "knn_confusion.png")


def linear(
    checkpoint: tyro.conf.Positional[Path],
    data: str | None = None,
    heads: tuple[Literal["linear", "mlp"], ...] = ("linear",),
    blocks: int | None = None,
    rates: tuple[float, ...] = RATES,
    epochs: int = 100,
    hidden: int = 512,
    held_out: float = 0.1,
    seed: int = 0,
    image_size: int | None = None,
    out: Path | None = None,
    cache: Path | None = None,
    batch_size: int = 256,
    workers: int = 0,
    device: str = "auto",
) -> None:
    """Probes trained on a checkpoint's frozen features classify held-out images, beside a random initialisation.

    Args:
        checkpoint: a run's folder or an encoder.safetensors.
        data: whose training images train the probe and whose held-out images are classified; default the run's own,
            else "photos".
        heads: "linear", and "mlp" of two layers.
        blocks: read [CLS] of so many last blocks, concatenated (DINO's protocol: 4); default the embedding.
        rates: learning rates, trained side by side; one is chosen on held-out training images.
        epochs: passes over the training images.
        hidden: width of the hidden layer of "mlp".
        held_out: share of the training images that the rate is chosen on.
        seed: of that share, the order and the weights.
        image_size: side of the images in pixels; default the model's.
        out: folder for linear.csv, linear_rates.csv, linear_confusion.csv and linear_confusion.png; default the
            checkpoint's.
        cache: folder of the features, computed once for each checkpoint and data set; default OUT/features.
        batch_size: images at a time.
        workers: processes that load images.
        device: "auto", "cpu" or "cuda".
    """
    model, data, image_size, out, where = _open(checkpoint, data, image_size, out, device)
    known, asked = (open_dataset(data, train=train, image_size=image_size) for train in (True, False))
    rows: Rows = []
    with (out / "linear_rates.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("model", "head", "rate", "held_out_top1", "chosen"))
        for name, of in {"checkpoint": model, "random": scores.random_control(model)}.items():
            train, (features, labels) = (
                embed_cached(
                    of,
                    dataset,
                    where,
                    cache=cache or out / "features",
                    blocks=blocks,
                    batch_size=batch_size,
                    workers=workers,
                    progress=True,
                )
                for dataset in (known, asked)
            )
            check_labelled("test", features, labels)
            for head in heads:
                probe = train_probe(
                    *train,
                    classes=len(known.classes),
                    hidden=hidden if head == "mlp" else None,
                    rates=rates,
                    epochs=epochs,
                    batch_size=batch_size,
                    held_out=held_out,
                    seed=seed,
                    device=where,
                    progress=True,
                )
                ranked = rank(probe_scores(probe.head, features, where))
                best = probe.held_out[probe.rate]
                graded = grade(ranked, labels, len(known.classes))
                rows.append(({"model": name, "head": head, "rate": probe.rate, "held_out_top1": best}, graded))
                for rate, accuracy in probe.held_out.items():
                    writer.writerow((name, head, rate, accuracy, rate == probe.rate))
    _write_classifiers(rows, known.classes, out, "linear", f"Probes on held-out images of {data}")
    _written(out, "linear.csv", "linear_rates.csv", "linear_confusion.csv", "linear_confusion.png")


def corruptions(
    checkpoint: tyro.conf.Positional[Path],
    data: str | None = None,
    images: int = 128,
    sequences: int = 32,
    corrupted: Path | None = None,
    perturbed: Path | None = None,
    shifted: tuple[Path, ...] = (),
    baseline: Path | None = None,
    classifier: Literal["knn", "linear"] = "linear",
    k: int = 20,
    temperature: float = 0.07,
    seed: int = 0,
    image_size: int | None = None,
    out: Path | None = None,
    cache: Path | None = None,
    batch_size: int = 256,
    workers: int = 0,
    device: str = "auto",
) -> None:
    """How a classifier on a checkpoint's features bears corrupted, perturbed and shifted images.

    It is trained on the clean training images. Beside it stands a random initialisation.

    Args:
        checkpoint: a run's folder or an encoder.safetensors.
        data: whose training images train the classifier and whose held-out images are corrupted; default the run's
            own, else "photos".
        images: how many held-out images are corrupted, spread evenly: 15 kinds at 5 severities.
        sequences: how many are perturbed, step by step: 10 kinds.
        corrupted: folder of corrupted images instead, in the layout of ImageNet-C or CIFAR-10-C.
        perturbed: folder of sequences instead, in the layout of ImageNet-P (videos, which take the package av)
            or CIFAR-10-P.
        shifted: folders of other images of the classes, as ImageNet-V2, ImageNet-R and ImageNet-Sketch.
        baseline: corruptions.csv of another run; its checkpoint's errors make the mean corruption error relative.
        classifier: "linear" or "knn".
        k: number of neighbours of "knn".
        temperature: of the neighbours' votes.
        seed: of the corruptions and the probe.
        image_size: side of the images in pixels; default the model's.
        out: folder for corruptions.csv, perturbations.csv, corruptions.png and, of shifted images, shifts.csv; default
            the checkpoint's.
        cache: folder of the training features; default OUT/features.
        batch_size: images at a time.
        workers: processes that load images.
        device: "auto", "cpu" or "cuda".
    """
    model, data, image_size, out, where = _open(checkpoint, data, image_size, out, device)
    known, asked = (open_dataset(data, train=train, image_size=image_size) for train in (True, False))
    folders = [robustness.ClassFolder(folder, known.classes, image_size=image_size) for folder in shifted]
    others = None if baseline is None else robustness.read_errors(baseline)
    classifiers: dict[str, robustness.Classifier] = {}
    for name, of in {"checkpoint": model, "random": scores.random_control(model)}.items():
        train = embed_cached(
            of, known, where, cache=cache or out / "features", batch_size=batch_size, workers=workers, progress=True
        )
        head: robustness.Head
        if classifier == "linear":
            head = train_probe(*train, classes=len(known.classes), seed=seed, device=where, progress=True).head
        else:
            head = partial(_vote, *(part.to(where) for part in train), k=k, temperature=temperature)
        classifiers[name] = robustness.image_classifier(of, head, where)

    pictures, labels = spread_items(asked, images)
    if corrupted is None:
        sets = robustness.generate_corruptions(pictures, labels, seed=seed, batch_size=batch_size)
    else:
        sets = robustness.read_corruptions(
            corrupted, known.classes, image_size=image_size, batch_size=batch_size, workers=workers
        )
    clean = robustness.clean_images(pictures, labels, batch_size=batch_size)
    errors = robustness.error_rates(classifiers, chain([clean], sets), progress=True)
    if perturbed is None:
        kinds = robustness.generate_perturbations(spread_images(asked, sequences), seed=seed)
    else:
        kinds = robustness.read_perturbations(perturbed, image_size=image_size)
    flips = robustness.flip_rates(classifiers, kinds, progress=True)
    shifts: Rows = []
    for folder in folders:
        for name, classify in classifiers.items():
            graded = folder.grade(classify, batch_size=batch_size, workers=workers)
            shifts.append(({"model": name, "folder": folder.name, "classes": len(folder.indices)}, graded))

    robustness.print_errors(errors, others)
    robustness.print_flips(flips)
    scores.write_table(errors, out / "corruptions.csv")
    scores.write_table(flips, out / "perturbations.csv")
    robustness.plot_errors(errors, out / "corruptions.png")
    written = ["corruptions.csv", "perturbations.csv", "corruptions.png"]
    if shifts:
        print_rows(shifts, "Shifted images, among the classes of their folder")
        write_rows(shifts, out / "shifts.csv")
        written.append("shifts.csv")
    _written(out, *written)


def _vote(train_features: Tensor, train_labels: Tensor, features: Tensor, *, k: int, temperature: float) -> Tensor:
    return knn_scores(train_features, train_labels, features, k=k, temperature=temperature)[k]


def _write_classifiers(rows: Rows, classes: list[str], out: Path, stem: str, title: str) -> None:
    """The table on the terminal and as STEM.csv, the confusion matrices as STEM_confusion.csv and .png."""
    print_rows(rows, title)
    write_rows(rows, out / f"{stem}.csv")
    write_confusion(rows, classes, out / f"{stem}_confusion.csv")
    plot_confusion(rows, classes, out / f"{stem}_confusion.png")


def _written(out: Path, *names: str) -> None:
    Console().print(f"written: {', '.join(str(out / name) for name in names)}")


def detection(
    checkpoint: tyro.conf.Positional[Path],
    data: Path | None = None,
    steps: int = 400,
    batch_size: int = 4,
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


def export(
    run: tyro.conf.Positional[Path], format: Literal["timm", "onnx", "torch"] = "onnx", out: Path | None = None
) -> None:
    """Write a run's encoder for another program, and compare it with the encoder.

    Args:
        run: its folder, or an encoder.safetensors.
        format: "timm", weights that plain timm loads, where the split is 0; "onnx"; "torch", a torch.export program.
        out: the file; default encoder_timm.safetensors, encoder.onnx or encoder.pt2 beside the weights.
    """
    Console().print(f"written: {export_encoder(run, format, out)}")


def doctor() -> None:
    """What can run here: the backends of the kernels on each device, why another one can't, and what auto takes."""
    table = Table(title=f"torch {torch.__version__}, CUDA {'available' if torch.cuda.is_available() else 'absent'}")
    for heading in ("backend", "on cpu tensors", "on cuda tensors"):
        table.add_column(heading)
    for backend in BACKENDS:
        table.add_row(backend, *(reason_not(backend, device) or "runs" for device in ("cpu", "cuda")))
    automatic = Table(title='what backend="auto" takes')
    for heading in ("tensors on", *PREFERRED):
        automatic.add_column(heading)
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    for device in (torch.device("cpu"), *gpus):
        automatic.add_row(str(device), *(fastest(op, device) for op in PREFERRED))
    if not gpus:
        starts = sorted({start for table in PREFERRED.values() for start in table})
        for start, end in zip(starts, [*starts[1:], None], strict=True):
            of = f"from {start}.0 on" if end is None else f"below {end}.0"
            automatic.add_row(f"a GPU of compute capability {of}", *(preferred(op, start) for op in PREFERRED))
    Console().print(table, automatic)


def _open(
    checkpoint: Path, data: str | None, image_size: int | None, out: Path | None, device: str
) -> tuple[SplitViT, str, int, Path, torch.device]:
    """The encoder on its device, and what an evaluation takes from the run where it isn't told."""
    weights = find_encoder(checkpoint)
    chosen = choose_device(device)
    model = load_split_vit(weights).to(chosen)
    run = RunFolder(weights.parent)
    if data is None:
        data = run.read_config().data if run.config.is_file() else "photos"
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
        "linear": linear,
        "corruptions": corruptions,
        "detection": detection,
        "report": report,
        "export": export,
        "doctor": doctor,
    }
    try:
        if sys.argv[1:2] == ["train"]:  # its options depend on the objective
            train()
        else:
            tyro.extras.subcommand_cli_from_dict(commands, description=__doc__)
    except (ValueError, NonFiniteLossError) as error:
        sys.exit(f"ser-fast: {error}")
    except KeyboardInterrupt:
        sys.exit("ser-fast: stopped")


if __name__ == "__main__":
    main()
