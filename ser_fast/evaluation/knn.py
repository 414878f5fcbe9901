"""k-nearest-neighbor classification of frozen features."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor

from ser_fast.data import MAX_PIXELS
from ser_fast.data.loader import make_loader
from ser_fast.evaluation.classification import Rows, grade, rank
from ser_fast.evaluation.features import check_labelled, embed
from ser_fast.evaluation.figures import plot_confusion, save
from ser_fast.evaluation.protocol import (
    DEFAULT_DATA,
    check_image_size,
    check_positive,
    device_of,
    open_labelled,
    tell_skipped,
    with_control,
)
from ser_fast.evaluation.tables import print_rows, write_confusion, write_rows
from ser_fast.vit import SplitViT

SIMILARITIES = 2**26  # test x train entries in memory at a time: 256 MiB


def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    k: int | Sequence[int] = 20,
    temperature: float = 0.07,
) -> dict[int, float]:
    """Top-1 accuracy of `knn_predictions`: for each k the share of test images, 0 to 1, whose class wins the vote.

    Args:
        train_features, train_labels, test_features, k, temperature: as `knn_scores`.
        test_labels: (M,) int64 of at least 0.

    Raises:
        ValueError: as `knn_scores`, and test labels that don't fit or are negative.

    Example:
        >>> train, test = embed(model, train_loader, "cuda"), embed(model, test_loader, "cuda")
        >>> knn_accuracy(*train, *test, k=[10, 20])
        {10: 0.71, 20: 0.73}
    """
    check_labelled("test", test_features, test_labels)
    ranked = knn_predictions(train_features, train_labels, test_features, k=k, temperature=temperature)
    return {count: (classes[:, 0] == test_labels).float().mean().item() for count, classes in ranked.items()}


def knn_predictions(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    *,
    k: int | Sequence[int] = 20,
    temperature: float = 0.07,
) -> dict[int, Tensor]:
    """The five classes with most votes of `knn_scores`, for any number M of test images.

    Args:
        train_features, train_labels, test_features, k, temperature: as `knn_scores`.

    Returns:
        For each k (M, 5) int64 (fewer where there are fewer classes), most votes first, -1 for no vote: with one
        neighbor only the first entry is a class.

    Raises:
        ValueError: as `knn_scores`.
    """
    ranked: dict[int, list[Tensor]] = {}
    for queries in test_features.split(max(1, SIMILARITIES // max(1, len(train_features)))):
        for count, scores in knn_scores(train_features, train_labels, queries, k=k, temperature=temperature).items():
            ranked.setdefault(count, []).append(rank(scores))
    return {count: torch.cat(parts) for count, parts in ranked.items()}


def knn_scores(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    *,
    k: int | Sequence[int] = 20,
    temperature: float = 0.07,
) -> dict[int, Tensor]:
    """The votes for each class: the k nearest vote for their own, each with exp(cosine / T).

    Args:
        train_features: (N, C) floats, not necessarily normalized.
        train_labels: (N,) int64 of at least 0.
        test_features: (M, C), on the same device.
        k: how many neighbors vote; several values share one search.
        temperature: T; a small one lets the nearest decide, a large one counts heads.

    Returns:
        For each k (M, K) float32, the logarithm of the votes up to a constant of each test image; -inf for no vote.

    Raises:
        ValueError: shapes that don't fit, features that aren't finite, negative labels, a k outside 1..N, or a
            temperature that isn't positive.

    Source: Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", 2018, section 3.4;
    DINO's eval_knn uses the same.
    """
    ks = [k] if isinstance(k, int) else list(k)
    check_labelled("train", train_features, train_labels)
    check_labelled("test", test_features)
    if train_features.shape[1] != test_features.shape[1]:
        raise ValueError(
            f"test_features: got {test_features.shape[1]} channels, takes the {train_features.shape[1]} of "
            "train_features"
        )
    check_vote(k, temperature, len(train_features))

    train = F.normalize(train_features.float(), dim=1)  # (N, C)
    test = F.normalize(test_features.float(), dim=1)  # (M, C)
    similarity, neighbor = (test @ train.T).topk(max(ks))  # (M, max k), nearest first
    # Relative to the nearest, so that no small temperature overflows.
    weight = ((similarity - similarity[:, :1]) / temperature).exp()
    vote = train_labels[neighbor]  # (M, max k)
    none = weight.new_zeros(len(test), int(train_labels.max()) + 1)
    return {count: none.scatter_add(1, vote[:, :count], weight[:, :count]).log() for count in ks}


def check_vote(k: int | Sequence[int], temperature: float, neighbors: int) -> None:
    """Raise ValueError unless every k is one of 1 .. `neighbors` and the temperature is positive."""
    ks = [k] if isinstance(k, int) else list(k)
    if not ks or min(ks) < 1 or max(ks) > neighbors:
        raise ValueError(f"k: got {k}, takes 1 to {neighbors}, the number of training images")
    check_positive(temperature=temperature)


# ---------------------------------------------------------------- the protocol


@dataclass(frozen=True)
class KNNResult:
    """How k nearest neighbors did, on a checkpoint's embeddings and on those of its random control.

    Attributes:
        rows: {"model": "checkpoint" or "random", "k": neighbors}, and how they did.
        classes: the names of the K classes.
        data: the source of the images.
    """

    rows: Rows
    classes: list[str]
    data: str

    def write(self, folder: Path) -> list[Path]:
        """Write knn.csv, knn.png, knn_confusion.csv and knn_confusion.png; returns their paths."""
        return [
            write_rows(self.rows, folder / "knn.csv"),
            save(self._figure(), folder / "knn.png"),
            write_confusion(self.rows, self.classes, folder / "knn_confusion.csv"),
            plot_confusion(self.rows, self.classes, folder / "knn_confusion.png"),
        ]

    def print(self, console: Console | None = None) -> None:
        """Print top-1 and top-5 of each model and k."""
        print_rows(self.rows, f"kNN on held-out images of {self.data}", console)

    def _figure(self) -> Figure:
        """Top-1 against k, a line a model."""
        figure = Figure(figsize=(5, 3.6), layout="constrained")
        axes = figure.subplots()
        for name in dict.fromkeys(labels["model"] for labels, _ in self.rows):
            results = [(labels["k"], result.top1) for labels, result in self.rows if labels["model"] == name]
            ks = [k for k, _ in results]
            axes.plot(ks, [top1.value for _, top1 in results], marker="o", label=name)
            axes.fill_between(ks, [top1.low for _, top1 in results], [top1.high for _, top1 in results], alpha=0.2)
        axes.set(xlabel="k", ylabel="kNN top-1, 95 % interval", ylim=(0, 1))
        axes.legend()
        return figure


def evaluate(
    model: SplitViT,
    data: str = DEFAULT_DATA,
    *,
    k: Sequence[int] = (1, 5, 10, 20, 50),
    temperature: float = 0.07,
    image_size: int | None = None,
    crop_pct: float = 1.0,
    max_pixels: int = MAX_PIXELS,
    batch_size: int = 256,
    workers: int = 0,
    progress: bool = False,
) -> KNNResult:
    """Classify held-out images by the embeddings of training images, beside a random initialization.

    Args:
        model: on its device.
        data: whose training images vote and whose held-out images are classified, as `open_dataset` takes it.
        k: numbers of neighbors.
        temperature: of the neighbors' votes.
        image_size: side of the images in pixels; default the model's.
        crop_pct: share of a picture's shorter side that the center crop shows; ImageNet's protocol has 0.875.
        max_pixels: of one picture; one of more is left out, as one that can't be read.
        batch_size: images at a time.
        workers: processes that load images.
        progress: show bars on the terminal.

    Raises:
        ValueError: data that can't be opened or has no classes, an image size that the model can't take, or options
            out of range; before anything is embedded.

    Example:
        >>> result = evaluate(load_split_vit("encoder.safetensors"), "folder:images", k=(10, 20))
        >>> {labels["k"]: graded.top1.value for labels, graded in result.rows if labels["model"] == "checkpoint"}
        {10: 0.71, 20: 0.73}
        >>> result.write(Path("results"))
    """
    size = check_image_size(model, image_size)
    train_set, test_set = open_labelled(data, size, crop_pct=crop_pct, max_pixels=max_pixels)
    check_vote(k, temperature, len(train_set))
    loaders = [
        make_loader(dataset, batch_size=batch_size, train=False, workers=workers) for dataset in (train_set, test_set)
    ]
    rows: Rows = []
    for name, encoder in with_control(model).items():
        train, (features, labels) = (embed(encoder, loader, device_of(model), progress=progress) for loader in loaders)
        check_labelled("test", features, labels)
        predictions = knn_predictions(*train, features, k=k, temperature=temperature)
        for count, ranked in predictions.items():
            rows.append(({"model": name, "k": count}, grade(ranked, labels, len(train_set.classes))))
    tell_skipped(train_set, test_set)
    return KNNResult(rows, train_set.classes, data)
