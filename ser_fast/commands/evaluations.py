"""Commands that measure checkpoints."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import tyro

from ser_fast.commands import say
from ser_fast.data import MAX_PIXELS
from ser_fast.evaluation import RATES, TOKEN_RATES
from ser_fast.sensitivity import VARIANTS


def equivariance(
    checkpoints: tyro.conf.Positional[tuple[str, ...]],
    data: str | None = None,
    images: int = 256,
    image_size: int | None = None,
    elements: tuple[str, ...] = ("d4", "scales"),
    crop_pct: float = 1.0,
    max_pixels: int = MAX_PIXELS,
    predict: bool = True,
    pairs: int = 4,
    out: Path | None = None,
    device: str = "auto",
) -> None:
    """How equivariant are checkpoints, per layer and per map g, beside random initializations and mean colors?

    Of several checkpoints on images with labels, kNN accuracy is measured, too: error against accuracy.

    Args:
        checkpoints: runs' folders, safetensors files or timm:NAME (public weights).
        data: whose held-out images are used; default the run's own, else "photos".
        images: how many of them, spread evenly.
        image_size: their side in pixels; default each model's.
        elements: the maps: d4, scales, a name such as rot90, angle:DEGREES, scale:AREA, shift:DY,DX (tokens),
            crop:TOP,LEFT,HEIGHT,WIDTH (shares), affine:A,B,C,D[,DY,DX] (output to input, y before x).
        crop_pct: share of a picture's shorter side that the center crop shows; ImageNet's protocol has 0.875.
        max_pixels: of one picture; one of more is left out, as one that can't be read.
        predict: also predict g from the tokens of x and g x, which trains regressors for each layer: most of the time.
        pairs: scales and angles of each image for it; the last quarter of the images tests it.
        out: folder for equivariance.csv, embedding.csv, prediction.csv and equivariance.png, and of several checkpoints
            error_accuracy.csv and .png; default the checkpoint's, of several runs/comparison.
        device: "auto", "cpu" or "cuda".
    """
    from ser_fast.evaluation.equivariance import evaluate

    models, data, out = _open(checkpoints, data, out, device)
    options: dict[str, Any] = {"images": images, "image_size": image_size, "elements": elements, "pairs": pairs}
    options["predict"] = predict
    options |= {"crop_pct": crop_pct, "max_pixels": max_pixels}
    _show(evaluate(models, data, progress=True, **options), out)


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
    variants: tuple[str, ...] = tuple(VARIANTS),
    seeds: int = 3,
    steps: int = 60,
) -> None:
    """How much do interpolation, padding and alignment on the token lattice matter? A report with a recommendation.

    Synthetic fields, pooled photographs and the features of each layer are moved by rotations, flips, scales, shifts
    and crops, in tokens and in pixels. What is in `out` already is kept: a call that was stopped goes on.

    Args:
        checkpoints: runs' folders, encoder.safetensors files or names of timm models (pretrained weights); a random
            initialization of each architecture is measured with them, or that of the demo's alone.
        preset: "quick" varies one factor at a time, "full" measures the whole grid, for hours.
        train: train the demo's recipe with each of the variants instead, and say whether the choice matters after it.
        data: whose held-out images are used: "photos", "folder:PATH" or another source, as `ser-fast train` takes it.
        images: how many of them, spread evenly, and how many synthetic fields; for the trained models, four times that.
        image_size: their side in pixels; enlarged where a model needs more.
        out: folder for sensitivity.csv, report.html, summary.txt and the figures.
        seed: of the fields, the random initializations and the bootstrap.
        device: "auto", "cpu" or "cuda".
        variants: with --train, the settings of SERLoss.
        seeds: with --train, how many runs of each.
        steps: with --train, optimizer steps of a run.
    """
    from ser_fast.device import choose_device
    from ser_fast.sensitivity import retraining
    from ser_fast.sensitivity.evaluation import REPORT, TABLE, SensitivityResult, evaluate
    from ser_fast.sensitivity.sources import open_model

    if train:
        protocol: dict[str, Any] = {"variants": variants, "seeds": seeds, "steps": steps, "images": 4 * images}
        trained = retraining.evaluate(out / "runs", data, device=device, **protocol)
        trained.print()
        say(f"written: {', '.join(map(str, trained.write(out)))}")
        if not (out / TABLE).exists():
            return
        result = SensitivityResult.read(out)
    else:
        models = {name: open_model(name) for name in checkpoints}
        options: dict[str, Any] = {"preset": preset, "images": images, "image_size": image_size, "seed": seed}
        result = evaluate(models, data, folder=out, device=choose_device(device), progress=True, **options)
    result.print()
    result.write(out)
    say(f"written: {out / TABLE}, {out / REPORT}")


def knn(
    checkpoints: tyro.conf.Positional[tuple[str, ...]],
    data: str | None = None,
    k: tuple[int, ...] | None = None,
    temperature: float = 0.07,
    image_size: int | None = None,
    crop_pct: float = 1.0,
    max_pixels: int = MAX_PIXELS,
    out: Path | None = None,
    batch_size: int = 256,
    workers: int = 0,
    device: str = "auto",
) -> None:
    """k nearest neighbors classify held-out images by a checkpoint's embeddings, beside a random initialization.

    Args:
        checkpoints: runs' folders, safetensors files or timm:NAME (public weights), side by side.
        data: whose training images vote and whose held-out images are classified; default the run's own, else "photos".
        k: numbers of neighbors; default those of 1, 5, 10, 20 and 50 that there are training images for.
        temperature: of the neighbors' votes.
        image_size: side of the images in pixels; default each model's.
        crop_pct: share of a picture's shorter side that the center crop shows; ImageNet's protocol has 0.875.
        max_pixels: of one picture; one of more is left out, as one that can't be read.
        out: folder for knn.csv, knn.png, knn_confusion.csv and knn_confusion.png; default the checkpoint's,
            of several runs/comparison.
        batch_size: images at a time.
        workers: processes that load images.
        device: "auto", "cpu" or "cuda".
    """
    from ser_fast.evaluation.knn import evaluate

    models, data, out = _open(checkpoints, data, out, device)
    loading: dict[str, Any] = {"image_size": image_size, "batch_size": batch_size, "workers": workers}
    loading |= {"crop_pct": crop_pct, "max_pixels": max_pixels}
    _show(evaluate(models, data, k=k, temperature=temperature, progress=True, **loading), out)


def linear(
    checkpoints: tyro.conf.Positional[tuple[str, ...]],
    data: str | None = None,
    heads: tuple[Literal["linear", "mlp"], ...] = ("linear",),
    blocks: int | None = None,
    rates: tuple[float, ...] = RATES,
    epochs: int = 100,
    hidden: int = 512,
    held_out: float = 0.1,
    seed: int = 0,
    image_size: int | None = None,
    crop_pct: float = 1.0,
    max_pixels: int = MAX_PIXELS,
    out: Path | None = None,
    cache: Path | None = None,
    batch_size: int = 256,
    workers: int = 0,
    device: str = "auto",
) -> None:
    """Probes trained on a checkpoint's frozen features classify held-out images, beside a random initialization.

    Args:
        checkpoints: runs' folders, safetensors files or timm:NAME (public weights), side by side.
        data: whose training images train the probe and whose held-out images are classified; default the run's own,
            else "photos".
        heads: "linear", and "mlp" of two layers.
        blocks: read [CLS] of so many last blocks, concatenated (DINO's protocol: 4); default the embedding.
        rates: learning rates, trained side by side; one is chosen on held-out training images.
        epochs: passes over the training images.
        hidden: width of the hidden layer of "mlp".
        held_out: share of the training images that the rate is chosen on.
        seed: of that share, the order and the weights.
        image_size: side of the images in pixels; default each model's.
        crop_pct: share of a picture's shorter side that the center crop shows; ImageNet's protocol has 0.875.
        max_pixels: of one picture; one of more is left out, as one that can't be read.
        out: folder for linear.csv, linear_rates.csv, linear_confusion.csv and linear_confusion.png; default the
            checkpoint's.
        cache: folder of the features, computed once for each checkpoint and data set; default OUT/features.
        batch_size: images at a time.
        workers: processes that load images.
        device: "auto", "cpu" or "cuda".
    """
    from ser_fast.evaluation.linear_probe import evaluate

    models, data, out = _open(checkpoints, data, out, device)
    probe: dict[str, Any] = {"rates": rates, "epochs": epochs, "hidden": hidden, "held_out": held_out, "seed": seed}
    loading: dict[str, Any] = {"image_size": image_size, "batch_size": batch_size, "workers": workers}
    loading |= {"crop_pct": crop_pct, "max_pixels": max_pixels}
    loading["cache"] = cache or out / "features"
    _show(evaluate(models, data, heads=heads, blocks=blocks, progress=True, **probe, **loading), out)


def corruptions(
    checkpoints: tyro.conf.Positional[tuple[str, ...]],
    data: str | None = None,
    images: int = 128,
    sequences: int = 32,
    corrupted: Path | None = None,
    perturbed: Path | None = None,
    shifted: tuple[Path, ...] = (),
    baseline: Path | None = None,
    classifier: Literal["knn", "linear"] = "linear",
    k: int | None = None,
    temperature: float = 0.07,
    seed: int = 0,
    image_size: int | None = None,
    crop_pct: float = 1.0,
    max_pixels: int = MAX_PIXELS,
    out: Path | None = None,
    cache: Path | None = None,
    batch_size: int = 256,
    workers: int = 0,
    device: str = "auto",
) -> None:
    """How robust is a classifier on a checkpoint's features to corrupted, perturbed and shifted images?

    It is trained on the clean training images. Beside it stands a random initialization.

    Args:
        checkpoints: runs' folders, safetensors files or timm:NAME (public weights), side by side.
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
        k: number of neighbors of "knn"; default 20, or all where there are fewer training images.
        temperature: of the neighbors' votes.
        seed: of the corruptions and the probe.
        image_size: side of the images in pixels; default each model's.
        crop_pct: share of a picture's shorter side that the center crop shows; ImageNet's protocol has 0.875. Folders
            of corrupted or perturbed images are taken as they are: they were cropped when they were made.
        max_pixels: of one picture; one of more is left out, as one that can't be read.
        out: folder for corruptions.csv, perturbations.csv, corruptions.png and, of shifted images, shifts.csv; default
            the checkpoint's.
        cache: folder of the training features; default OUT/features.
        batch_size: images at a time.
        workers: processes that load images.
        device: "auto", "cpu" or "cuda".
    """
    from ser_fast.evaluation.robustness import evaluate

    models, data, out = _open(checkpoints, data, out, device)
    sets: dict[str, Any] = {"images": images, "sequences": sequences, "corrupted": corrupted, "perturbed": perturbed}
    sets |= {"shifted": shifted, "baseline": baseline, "seed": seed}
    vote: dict[str, Any] = {"classifier": classifier, "k": k, "temperature": temperature}
    loading: dict[str, Any] = {"image_size": image_size, "batch_size": batch_size, "workers": workers}
    loading |= {"crop_pct": crop_pct, "max_pixels": max_pixels, "cache": cache or out / "features"}
    _show(evaluate(models, data, progress=True, **sets, **vote, **loading), out)


def detection(
    checkpoints: tyro.conf.Positional[tuple[str, ...]],
    data: Path | None = None,
    steps: int = 400,
    batch_size: int = 4,
    lr: float = 4e-3,
    image_size: int | None = None,
    max_pixels: int = MAX_PIXELS,
    out: Path | None = None,
    save_every: int = 50,
    workers: int = 0,
    seed: int = 0,
    device: str = "auto",
) -> None:
    """The COCO mAP of a Faster R-CNN on a frozen checkpoint, beside one on a random initialization.

    Only the pyramid and the heads are trained. What is interrupted goes on from the heads in out/detection.

    Args:
        checkpoints: runs' folders, safetensors files or timm:NAME (public weights), side by side.
        data: a folder in COCO's layout: annotations/instances_train*.json and instances_val*.json, and the images in
            folders named like the part behind "instances_"; default materials in shapes on photographs, written to
            out/detection.
        steps: to train each of the two heads.
        batch_size: images a step.
        lr: the largest learning rate.
        image_size: of an image's shorter side in the detector, in pixels; default twice each model's.
        max_pixels: of one image; more is an error, since a detector is scored on all of them.
        out: folder for detection.csv, detection.png and detection/ (heads, predictions); default the checkpoint's,
            of several runs/comparison.
        save_every: steps between two writes of a head.
        workers: processes that load images.
        seed: of the heads' weights, the order of the images and the generated set.
        device: "auto", "cpu" or "cuda".
    """
    from ser_fast.evaluation.detection import evaluate

    models, _, out = _open(checkpoints, None, out, device)
    head: dict[str, Any] = {"steps": steps, "batch_size": batch_size, "lr": lr, "seed": seed, "save_every": save_every}
    head |= {"image_size": image_size, "max_pixels": max_pixels, "heads": out / "detection"}
    _show(evaluate(models, data, workers=workers, progress=True, **head), out)


def segmentation(
    checkpoints: tyro.conf.Positional[tuple[str, ...]],
    data: Path | None = None,
    layers: tuple[int, ...] = (),
    rates: tuple[float, ...] = TOKEN_RATES,
    epochs: int = 10,
    held_out: float = 0.1,
    k: int = 30,
    temperature: float = 0.02,
    bank: int = 20_000,
    images: int | None = None,
    image_size: int | None = None,
    max_pixels: int = MAX_PIXELS,
    out: Path | None = None,
    batch_size: int = 16,
    seed: int = 0,
    device: str = "auto",
) -> None:
    """The mean IoU of a linear head and of the nearest training tokens, on frozen tokens of checkpoints.

    Beside them stand random initializations, the mean colors of patches, and a guess.

    Args:
        checkpoints: runs' folders, .safetensors files or timm:NAME; several are compared.
        data: a folder as Pascal VOC has it (JPEGImages, SegmentationClass, ImageSets/Segmentation/train.txt and
            val.txt) or in COCO's layout (annotations/instances_train*.json and instances_val*.json with polygons or
            run lengths); default materials in shapes on photographs, written to out/segmentation.
        layers: blocks before the tokens; default the last.
        rates: learning rates of the linear head, trained side by side; one is chosen on held-out training images.
        epochs: passes over the training images.
        held_out: share of the training images that the rate is chosen on.
        k: number of nearest training tokens.
        temperature: of their weights.
        bank: training tokens that are kept for it, at most.
        images: of the training images and of the held-out ones, at most, spread evenly; default all.
        image_size: side of the square that pictures are stretched to, in pixels; default twice the model's, at most
            512 unless the model's is more.
        max_pixels: of one picture; more is an error, since all of them are scored.
        out: folder for segmentation.csv, segmentation_classes.csv and segmentation.png; default the checkpoint's, or
            runs/comparison.
        batch_size: images a step of the linear head.
        seed: of the held-out share, the order, the kept tokens, the intervals and the generated set.
        device: "auto", "cpu" or "cuda".
    """
    from ser_fast.evaluation.segmentation import evaluate

    models, _, out = _open(checkpoints, "photos", out, device)  # what they were trained on doesn't matter
    head: dict[str, Any] = {"rates": rates, "epochs": epochs, "held_out": held_out, "batch_size": batch_size}
    vote: dict[str, Any] = {"k": k, "temperature": temperature, "bank": bank}
    sets: dict[str, Any] = {"images": images, "image_size": image_size, "seed": seed, "folder": out / "segmentation"}
    sets["max_pixels"] = max_pixels
    _show(evaluate(models, data, layers=layers or None, progress=True, **head, **vote, **sets), out)


def show(
    checkpoints: tyro.conf.Positional[tuple[str, ...]],
    data: str | None = None,
    images: int = 3,
    elements: tuple[str, ...] = ("rot90", "angle:30"),
    layers: tuple[int, ...] = (),
    image_size: int | None = None,
    crop_pct: float = 1.0,
    max_pixels: int = MAX_PIXELS,
    tokens: int = 6,
    out: Path | None = None,
    device: str = "auto",
) -> None:
    """Draw token maps: principal components as colors for x, g x and rho(g) f(x), and where tokens are found in g x.

    Several checkpoints, such as one with and one without SER, stand side by side, beside random initializations.

    Args:
        checkpoints: runs' folders, .safetensors files or timm:NAME.
        data: whose held-out images are drawn; default the run's own, else "photos".
        images: how many of them, spread evenly.
        elements: maps g, such as rot90, hflip, angle:30, scale:0.7 or crop:0,0,0.5,0.5.
        layers: blocks before the tokens; default at most four, from the split to the last.
        image_size: side of the images in pixels; default the model's, at least 128.
        crop_pct: share of a picture's shorter side that the center crop shows; ImageNet's protocol has 0.875.
        max_pixels: of one picture; one of more is left out, as one that can't be read.
        tokens: how many tokens of each image are looked for in g x.
        out: folder for show.html, show.csv and show/ (PNG files); default the checkpoint's, or runs/comparison.
        device: "auto", "cpu" or "cuda".
    """
    from ser_fast.evaluation.pictures import evaluate

    models, data, out = _open(checkpoints, data, out, device)
    drawn: dict[str, Any] = {"images": images, "elements": elements, "image_size": image_size, "tokens": tokens}
    drawn |= {"crop_pct": crop_pct, "max_pixels": max_pixels}
    _show(evaluate(models, data, layers=layers or None, **drawn), out)


def _open(checkpoints: Sequence[str], data: str | None, out: Path | None, device: str) -> tuple[Any, str, Path]:
    """The encoders on their device, and the data and folder that an evaluation takes where it isn't told."""
    from ser_fast.evaluation.protocol import make_folder, open_encoders

    models, data, folder = open_encoders(checkpoints, data, device=device)
    return models, data, make_folder(out or folder)


def _show(result: Any, out: Path) -> None:
    """Print an evaluation's result, write it, and say what was written."""
    result.print()  # before the write, which may fail: hours of work are in it
    written = result.write(out)
    # Beside tables and figures, the folder of what isn't for reading.
    shown = dict.fromkeys(path if path.parent == out else path.parent for path in written)
    say(f"written: {', '.join(map(str, shown))}")
