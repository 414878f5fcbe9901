"""Linear and two-layer probes of frozen features, the learning rate chosen on held-out training images."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR

from ser_fast.data import MAX_PIXELS
from ser_fast.evaluation import RATES
from ser_fast.evaluation.classification import ENTRIES, Rows, grade, rank
from ser_fast.evaluation.features import check_labelled, embed_cached, embedder
from ser_fast.evaluation.figures import plot_confusion
from ser_fast.evaluation.protocol import (
    DEFAULT_DATA,
    Models,
    check_image_size,
    check_positive,
    device_of,
    image_size_of,
    name_models,
    open_labelled,
    tell_skipped,
    with_controls,
)
from ser_fast.evaluation.tables import print_rows, write_confusion, write_rows, write_table
from ser_fast.progress import track

Head = Literal["linear", "mlp"]


@dataclass(frozen=True)
class Probe:
    """A trained probe.

    Attributes:
        head: features (B, C), as they come, to scores (B, K), on the device that it was trained on.
        rate: the learning rate that was chosen.
        held_out: rate: the top-1 accuracy on the held-out part of the training images, of a probe trained on the rest.
    """

    head: nn.Module
    rate: float
    held_out: dict[float, float]


def train_probe(
    train_features: Tensor,
    train_labels: Tensor,
    *,
    classes: int,
    hidden: int | None = None,
    rates: Sequence[float] = RATES,
    epochs: int = 100,
    batch_size: int = 256,
    held_out: float = 0.1,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> Probe:
    """Train a probe at every learning rate side by side, choose the rate, and train it on all training images.

    SGD with momentum 0.9, without weight decay, the rate falling to 0 along a cosine. The features are first
    standardized by the mean and deviation of each channel over the training images: the affine-free BatchNorm of MAE's
    linear probing, with the statistics of the whole set. All rates start from the same weights and see the same
    batches, each read once. The split is drawn by image; where images overlap, as tiles of the photographs do, its
    accuracies are too high, but no test image takes part in the choice.

    Args:
        train_features: (N, C) floats, on the CPU, may be memory-mapped.
        train_labels: (N,) int64.
        classes: K, more than any label.
        hidden: None for a linear probe; else the width of the hidden layer (GELU) of a two-layer one.
        rates: learning rates; the first best is chosen.
        epochs: passes over the training images.
        batch_size: images a step.
        held_out: share of the training images that the rate is chosen on, in (0, 1).
        seed: of the split, the order and the weights.
        device: where the probe is trained.
        progress: show a bar on the terminal.

    Returns:
        The probe, trained at the chosen rate on all training images.

    Raises:
        ValueError: features or labels that don't fit or aren't finite, a label of `classes` or more, no rate or one
            that isn't positive, numbers below 1, or a share that leaves nothing held out or nothing to train on.

    Source: Caron et al., "Emerging Properties in Self-Supervised Vision Transformers" (DINO), 2021, eval_linear; the
    sweep side by side: Oquab et al., "DINOv2", 2023.

    Example:
        >>> probe = train_probe(features, labels, classes=10)
        >>> grade(rank(probe.head(test_features)), test_labels, 10).top1
    """
    check_labelled("train", train_features, train_labels)
    if int(train_labels.max()) >= classes:
        raise ValueError(f"train_labels: got {int(train_labels.max())}, takes 0 to {classes - 1}")
    check_probe(rates, epochs, batch_size, hidden, held_out, len(train_features))

    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(train_features), generator=generator)
    validation, rest = order.tensor_split([round(held_out * len(order))])
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        start = _head(train_features, classes, hidden).to(device)

    def fit(rows: Tensor, head_rates: Sequence[float], title: str) -> list[nn.Module]:
        heads = [deepcopy(start) for _ in head_rates]
        groups = [{"params": head.parameters(), "lr": rate} for head, rate in zip(heads, head_rates, strict=True)]
        optimizer = SGD(groups, momentum=0.9)
        schedule = CosineAnnealingLR(optimizer, epochs * -(-len(rows) // batch_size))
        for _ in track(range(epochs), title, show=progress):
            for batch in rows[torch.randperm(len(rows), generator=generator)].split(batch_size):
                features, labels = train_features[batch].float().to(device), train_labels[batch].to(device)
                # No head's gradient depends on another head: the sum trains each as it would be alone.
                loss = torch.stack([F.cross_entropy(head(features), labels) for head in heads]).sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        return heads

    accuracy = {}
    for rate, head in zip(rates, fit(rest, rates, "learning rates"), strict=True):
        predicted = probe_scores(head, train_features[validation], device, rows=_rows(classes), read=_likeliest)
        accuracy[rate] = (predicted == train_labels[validation]).float().mean().item()
    rate = max(accuracy, key=lambda rate: accuracy[rate])
    (head,) = fit(order, [rate], "probe")
    return Probe(head, rate, accuracy)


def probe_scores(
    head: nn.Module,
    features: Tensor,
    device: torch.device | str,
    *,
    rows: int = 8192,
    read: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The scores of a probe, or what is read from them.

    Args:
        head: features (B, C) to scores (B, K), on `device`.
        features: (M, C), on the CPU, may be memory-mapped.
        device: of the head.
        rows: how many features at a time.
        read: scores (B, K) to what is kept of them, (B, ...), as `rank`; default all. With many classes M x K scores
            are more than memory holds.

    Returns:
        (M, K) or (M, ...), on the CPU.
    """
    with torch.no_grad():
        parts = (head(part.float().to(device)).cpu() for part in features.split(rows))
        return torch.cat([part if read is None else read(part) for part in parts])


def _likeliest(scores: Tensor) -> Tensor:
    return scores.argmax(1)


def _rows(classes: int) -> int:
    """How many images are scored at a time."""
    return max(1, min(8192, ENTRIES // classes))


def check_probe(
    rates: Sequence[float], epochs: int, batch_size: int, hidden: int | None, held_out: float, images: int
) -> None:
    """Raise ValueError for options that `train_probe` can't take with so many training images."""
    if not rates or min(rates) <= 0:
        raise ValueError(f"rates: got {tuple(rates)}, takes positive numbers")
    check_positive(epochs=epochs, batch_size=batch_size, hidden=hidden)
    if not 0 < round(held_out * images) < images:
        raise ValueError(
            f"held_out: got {held_out}, which holds out {round(held_out * images)} of {images} training images, takes "
            "a share that leaves some on both sides"
        )


def _head(features: Tensor, classes: int, hidden: int | None) -> nn.Module:
    """Standardization, then one layer or two."""
    channels = features.shape[1]
    # In eval mode, where it stays: the fixed mean and variance of the training images.
    standardize = nn.BatchNorm1d(channels, affine=False, eps=1e-6)
    variance, mean = torch.var_mean(features.float(), 0, correction=0)
    standardize.running_mean, standardize.running_var = mean, variance
    if hidden is None:
        return nn.Sequential(standardize, nn.Linear(channels, classes)).eval()
    return nn.Sequential(standardize, nn.Linear(channels, hidden), nn.GELU(), nn.Linear(hidden, classes)).eval()


# ---------------------------------------------------------------- the protocol


@dataclass(frozen=True)
class Rate:
    """A learning rate of one head: its top-1 accuracy on the held-out training images, and whether it was chosen."""

    head: str
    rate: float
    held_out_top1: float
    chosen: bool


@dataclass(frozen=True)
class LinearResult:
    """How probes did, on a checkpoint's features and on those of its random control.

    Attributes:
        rows: {"model": its name, "head", "rate": chosen, "held_out_top1": at that rate}, and how they
            did.
        rates: what was tried, by model.
        classes: the names of the K classes.
        data: the source of the images.
    """

    rows: Rows
    rates: dict[str, list[Rate]]
    classes: list[str]
    data: str

    def write(self, folder: Path) -> list[Path]:
        """Write linear.csv, linear_rates.csv, linear_confusion.csv and linear_confusion.png; returns their paths."""
        return [
            write_rows(self.rows, folder / "linear.csv"),
            write_table(self.rates, folder / "linear_rates.csv"),
            write_confusion(self.rows, self.classes, folder / "linear_confusion.csv"),
            plot_confusion(self.rows, self.classes, folder / "linear_confusion.png"),
        ]

    def print(self, console: Console | None = None) -> None:
        """Print top-1 and top-5 of each model and head."""
        print_rows(self.rows, f"Probes on held-out images of {self.data}", console)


def evaluate(
    models: Models,
    data: str = DEFAULT_DATA,
    *,
    heads: Sequence[Head] = ("linear",),
    blocks: int | None = None,
    rates: Sequence[float] = RATES,
    epochs: int = 100,
    hidden: int = 512,
    held_out: float = 0.1,
    seed: int = 0,
    image_size: int | None = None,
    crop_pct: float = 1.0,
    max_pixels: int = MAX_PIXELS,
    cache: Path | None = None,
    batch_size: int = 256,
    workers: int = 0,
    progress: bool = False,
) -> LinearResult:
    """Classify held-out images by probes of frozen features, beside a random initialization.

    Args:
        models: on their device: one, called "checkpoint", or several by name. Random initializations stand beside them.
        data: whose training images train the probe and whose held-out images are classified, as `open_dataset` takes
            it.
        heads: "linear", and "mlp" of two layers.
        blocks: read [CLS] of so many last blocks, concatenated (DINO's protocol: 4); default the embedding.
        rates: learning rates, trained side by side; one is chosen on held-out training images.
        epochs: passes over the training images.
        hidden: width of the hidden layer of "mlp".
        held_out: share of the training images that the rate is chosen on.
        seed: of that share, the order and the weights.
        image_size: side of the images in pixels; default each model's own.
        crop_pct: share of a picture's shorter side that the center crop shows; ImageNet's protocol has 0.875.
        max_pixels: of one picture; one of more is left out, as one that can't be read.
        cache: folder of the features, computed once for each checkpoint and data set; None keeps them in memory.
        batch_size: images at a time.
        workers: processes that load images.
        progress: show bars on the terminal.

    Raises:
        ValueError: data that can't be opened or has no classes, an image size or blocks that a model can't take, or
            options out of range; before anything is embedded.

    Example:
        >>> result = evaluate(load_split_vit("encoder.safetensors"), "folder:images", heads=("linear", "mlp"))
        >>> result.rows[0]
        ({'model': 'checkpoint', 'head': 'linear', 'rate': 0.1, 'held_out_top1': 0.74}, Classification(...))
        >>> result.write(Path("results"))
    """
    if not heads or not set(heads) <= {"linear", "mlp"}:
        raise ValueError(f"heads: got {tuple(heads)}, takes 'linear' and 'mlp'")
    given = name_models(models).values()
    sizes = [check_image_size(vit, image_size, read=embedder(vit, blocks)) for vit in given]
    sets = {size: open_labelled(data, size, crop_pct=crop_pct, max_pixels=max_pixels) for size in sizes}
    train_set = sets[sizes[0]][0]
    check_probe(rates, epochs, batch_size, hidden, held_out, len(train_set))
    classes = train_set.classes
    rows: Rows = []
    tried: dict[str, list[Rate]] = {}
    for name, encoder in with_controls(models).items():
        device, size = device_of(encoder), image_size_of(encoder, image_size)
        train, (features, labels) = (
            embed_cached(
                encoder,
                dataset,
                device,
                cache=cache,
                blocks=blocks,
                batch_size=batch_size,
                workers=workers,
                progress=progress,
            )
            for dataset in sets[size]
        )
        check_labelled("test", features, labels)
        for head in heads:
            probe = train_probe(
                *train,
                classes=len(classes),
                hidden=hidden if head == "mlp" else None,
                rates=rates,
                epochs=epochs,
                batch_size=batch_size,
                held_out=held_out,
                seed=seed,
                device=device,
                progress=progress,
            )
            ranked = probe_scores(probe.head, features, device, rows=_rows(len(classes)), read=rank)
            graded = grade(ranked, labels, len(classes))
            best = probe.held_out[probe.rate]
            rows.append(({"model": name, "head": head, "rate": probe.rate, "held_out_top1": best}, graded))
            tried.setdefault(name, []).extend(
                Rate(head, rate, accuracy, rate == probe.rate) for rate, accuracy in probe.held_out.items()
            )
    tell_skipped(*(dataset for pair in sets.values() for dataset in pair))
    return LinearResult(rows, tried, classes, data)
