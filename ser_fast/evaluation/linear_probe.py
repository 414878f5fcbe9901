"""Linear and two-layer probes of frozen features, the learning rate chosen on held-out training images."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR

from ser_fast.evaluation.features import check_labelled

RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


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
    standardised by the mean and deviation of each channel over the training images: the affine-free BatchNorm of MAE's
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
    if not rates or min(rates) <= 0:
        raise ValueError(f"rates: got {tuple(rates)}, takes positive numbers")
    for name, value in {"epochs": epochs, "batch_size": batch_size, "hidden": hidden}.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}: got {value}, takes a positive number")
    count = len(train_features)
    chosen = round(held_out * count)
    if not 0 < chosen < count:
        raise ValueError(f"held_out: got {held_out}, which holds out {chosen} of {count} training images")

    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(count, generator=generator)
    asked, rest = order[:chosen], order[chosen:]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        start = _head(train_features, classes, hidden).to(device)

    def fit(rows: Tensor, of_rates: Sequence[float], title: str) -> list[nn.Module]:
        heads = [deepcopy(start) for _ in of_rates]
        groups = [{"params": head.parameters(), "lr": rate} for head, rate in zip(heads, of_rates, strict=True)]
        optimizer = SGD(groups, momentum=0.9)
        schedule = CosineAnnealingLR(optimizer, epochs * -(-len(rows) // batch_size))
        for _ in track(range(epochs), title, transient=True, disable=not progress):
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
        predicted = probe_scores(head, train_features[asked], device).argmax(1)
        accuracy[rate] = (predicted == train_labels[asked]).float().mean().item()
    rate = max(accuracy, key=lambda rate: accuracy[rate])
    (head,) = fit(order, [rate], "probe")
    return Probe(head, rate, accuracy)


def probe_scores(head: nn.Module, features: Tensor, device: torch.device | str, *, rows: int = 8192) -> Tensor:
    """Scores (M, K), on the CPU, of features (M, C) that may be memory-mapped, so many rows at a time."""
    with torch.no_grad():
        return torch.cat([head(part.float().to(device)).cpu() for part in features.split(rows)])


def _head(features: Tensor, classes: int, hidden: int | None) -> nn.Module:
    """Standardisation, then one layer or two."""
    channels = features.shape[1]
    # In eval mode, where it stays: the fixed mean and variance of the training images.
    standardise = nn.BatchNorm1d(channels, affine=False, eps=1e-6)
    variance, mean = torch.var_mean(features.float(), 0, correction=0)
    standardise.running_mean, standardise.running_var = mean, variance
    if hidden is None:
        return nn.Sequential(standardise, nn.Linear(channels, classes)).eval()
    return nn.Sequential(standardise, nn.Linear(channels, hidden), nn.GELU(), nn.Linear(hidden, classes)).eval()
