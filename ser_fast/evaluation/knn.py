"""k-nearest-neighbor classification of frozen features."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor
from torchvision.transforms.v2.functional import to_dtype

from ser_fast.data import MAX_PIXELS
from ser_fast.data.loader import make_loader
from ser_fast.data.sources import open_dataset
from ser_fast.evaluation.classification import ENTRIES, Rows, grade, rank
from ser_fast.evaluation.features import check_labelled, embed, evaluating, spread_items
from ser_fast.evaluation.figures import plot_confusion, save
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
from ser_fast.evaluation.tables import print_rows, write_confusion, write_rows
from ser_fast.views.pixels import normalize
from ser_fast.vit import SplitViT

DEFAULT_KS = (1, 5, 10, 20, 50)
"""Numbers of neighbors where none are asked for."""
_NEIGHBORS = 20

_logger = logging.getLogger(__name__)


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
    for queries in test_features.split(max(1, ENTRIES // max(1, len(train_features)))):
        found = _search(train_features, train_labels, queries, k=k, temperature=temperature)
        for count in found.ks:
            ranked.setdefault(count, []).extend(map(rank, found.scores(count)))
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
    found = _search(train_features, train_labels, test_features, k=k, temperature=temperature)
    return {count: torch.cat(list(found.scores(count))) for count in found.ks}


class _Neighbors(NamedTuple):
    """The nearest training images of test images.

    Attributes:
        ks: numbers of neighbors.
        vote: (M, max k) int64, their classes, nearest first.
        weight: (M, max k), of their votes.
        classes: K.
    """

    ks: list[int]
    vote: Tensor
    weight: Tensor
    classes: int

    def scores(self, count: int) -> Iterator[Tensor]:
        """The votes (B, K) of `count` neighbors, as `knn_scores`, so many images at a time that memory is bounded."""
        rows = max(1, ENTRIES // self.classes)
        for vote, weight in zip(self.vote[:, :count].split(rows), self.weight[:, :count].split(rows), strict=True):
            yield weight.new_zeros(len(vote), self.classes).scatter_add_(1, vote, weight).log_()


def _search(
    train_features: Tensor, train_labels: Tensor, test_features: Tensor, *, k: int | Sequence[int], temperature: float
) -> _Neighbors:
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
    return _Neighbors(ks, train_labels[neighbor], weight, int(train_labels.max()) + 1)


def choose_ks(k: Sequence[int] | None, temperature: float, neighbors: int) -> tuple[int, ...]:
    """The numbers of neighbors that vote: those asked for, else those of DEFAULT_KS that there are images for.

    What is left out of the default is logged in a line.

    Raises:
        ValueError: as `check_vote`.
    """
    chosen = tuple(count for count in DEFAULT_KS if count <= neighbors) if k is None else tuple(k)
    check_vote(chosen, temperature, neighbors)
    if k is None and (left_out := DEFAULT_KS[len(chosen) :]):
        told = ", ".join(map(str, left_out))
        _logger.warning("k: left out %s, since there are %d training images", told, neighbors)
    return chosen


def check_vote(k: int | Sequence[int], temperature: float, neighbors: int) -> None:
    """Raise ValueError unless every k is one of 1 .. `neighbors` and the temperature is positive."""
    ks = [k] if isinstance(k, int) else list(k)
    if not ks or min(ks) < 1 or max(ks) > neighbors:
        raise ValueError(f"k: got {k}, takes 1 to {neighbors}, the number of training images")
    check_positive(temperature=temperature)


# ---------------------------------------------------------------- a sample, in memory


@dataclass(frozen=True)
class SampledImages:
    """The images that encoders are scored on while they train or side by side, in memory.

    Attributes:
        train: (N, 3, S, S) uint8, and their labels (N,) int64; -1 for none.
        test: the same of held-out images.
        equivariance: how many of the held-out ones, from the first, the errors are measured on.
    """

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    equivariance: int

    @classmethod
    def open(
        cls,
        data: str,
        image_size: int,
        *,
        train: int = 5000,
        test: int = 2000,
        equivariance: int = 256,
        crop_pct: float = 1.0,
        max_pixels: int = MAX_PIXELS,
    ) -> "SampledImages":
        """The images of a source, each part spread evenly over it.

        Args:
            data: as `open_dataset` takes it; without labels there is no kNN.
            image_size: their side in pixels.
            train: training images, which vote; at most.
            test: held-out images, which are classified and whose rank is measured; at most.
            equivariance: held-out images that the errors are measured on, spread evenly over those; at most.
            crop_pct, max_pixels: as `open_dataset`.

        Raises:
            ValueError: a number that isn't positive, or data that can't be opened.
        """
        check_positive(train=train, test=test, equivariance=equivariance)

        def sample(count: int, *, training: bool) -> tuple[Tensor, Tensor]:
            dataset = open_dataset(
                data, train=training, image_size=image_size, crop_pct=crop_pct, max_pixels=max_pixels
            )
            images, labels = spread_items(dataset, count)
            tell_skipped(dataset)
            return images, labels if dataset.classes else torch.full_like(labels, -1)

        return cls(sample(train, training=True), sample(test, training=False), equivariance)

    @property
    def labelled(self) -> bool:
        """Whether there are classes to tell apart."""
        return bool((self.train[1] >= 0).all()) and bool((self.test[1] >= 0).all())

    def embed(self, model: SplitViT, part: Literal["train", "test"], batch_size: int = 256) -> Tensor:
        """The embeddings (N, C) float32 of a part, on the CPU."""
        device, images = device_of(model), (self.train if part == "train" else self.test)[0]
        with evaluating(model):
            return torch.cat(
                [
                    model(normalize(to_dtype(batch.to(device), torch.float32, scale=True))).float().cpu()
                    for batch in images.split(batch_size)
                ]
            )

    def top1(self, train: Tensor, test: Tensor) -> float:
        """kNN top-1 of embeddings of both parts, by 20 neighbors or as many as there are."""
        neighbors = min(_NEIGHBORS, len(train))
        ranked = knn_predictions(train, self.train[1], test, k=neighbors)[neighbors]
        return (ranked[:, 0] == self.test[1]).double().mean().item()


# ---------------------------------------------------------------- the protocol


@dataclass(frozen=True)
class KNNResult:
    """How k nearest neighbors did, on encoders' embeddings and on those of random controls.

    Attributes:
        rows: {"model": its name, "k": neighbors}, and how they did.
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
    models: Models,
    data: str = DEFAULT_DATA,
    *,
    k: Sequence[int] | None = None,
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
        models: on their device: one, called "checkpoint", or several by name. Random initializations stand beside them.
        data: whose training images vote and whose held-out images are classified, as `open_dataset` takes it.
        k: numbers of neighbors; default those of DEFAULT_KS that there are training images for.
        temperature: of the neighbors' votes.
        image_size: side of the images in pixels; default each model's own.
        crop_pct: share of a picture's shorter side that the center crop shows; ImageNet's protocol has 0.875.
        max_pixels: of one picture; one of more is left out, as one that can't be read.
        batch_size: images at a time.
        workers: processes that load images.
        progress: show bars on the terminal.

    Raises:
        ValueError: data that can't be opened or has no classes, an image size that a model can't take, or options
            out of range; before anything is embedded.

    Example:
        >>> result = evaluate(load_split_vit("encoder.safetensors"), "folder:images", k=(10, 20))
        >>> {labels["k"]: graded.top1.value for labels, graded in result.rows if labels["model"] == "checkpoint"}
        {10: 0.71, 20: 0.73}
        >>> result.write(Path("results"))
    """
    sizes = [check_image_size(encoder, image_size) for encoder in name_models(models).values()]
    sets = {size: open_labelled(data, size, crop_pct=crop_pct, max_pixels=max_pixels) for size in sizes}
    train_set = sets[sizes[0]][0]
    k = choose_ks(k, temperature, len(train_set))
    loading: dict[str, Any] = {"batch_size": batch_size, "train": False, "workers": workers}
    loaders = {size: [make_loader(dataset, **loading) for dataset in pair] for size, pair in sets.items()}
    rows: Rows = []
    for name, encoder in with_controls(models).items():
        size = image_size_of(encoder, image_size)
        train, (features, labels) = (
            embed(encoder, loader, device_of(encoder), progress=progress) for loader in loaders[size]
        )
        check_labelled("test", features, labels)
        predictions = knn_predictions(*train, features, k=k, temperature=temperature)
        for count, ranked in predictions.items():
            rows.append(({"model": name, "k": count}, grade(ranked, labels, len(train_set.classes))))
    tell_skipped(*(dataset for pair in sets.values() for dataset in pair))
    return KNNResult(rows, train_set.classes, data)
