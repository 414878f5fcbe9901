"""k-nearest-neighbour classification of frozen features."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ser_fast.evaluation.classification import rank
from ser_fast.evaluation.features import check_labelled

_SIMILARITIES = 2**26  # test x train entries in memory at a time: 256 MiB


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
        test_labels: (M,) integers of at least 0.

    Raises:
        ValueError: as `knn_predictions`, and labels that don't fit or are negative.

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

    Returns:
        For each k (M, 5) int64 (fewer where there are fewer classes), most votes first, -1 for no vote: with one
        neighbour only the first entry is a class.
    """
    ranked: dict[int, list[Tensor]] = {}
    for queries in test_features.split(max(1, _SIMILARITIES // max(1, len(train_features)))):
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
        train_features: (N, C) floats, not necessarily normalised.
        train_labels: (N,) integers of at least 0.
        test_features: (M, C), on the same device.
        k: how many neighbours vote; several values share one search.
        temperature: T; a small one lets the nearest decide, a large one counts heads.

    Returns:
        For each k (M, K) the logarithm of the votes, up to a constant of each test image; -inf for no vote.

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
    if not ks or min(ks) < 1 or max(ks) > len(train_features):
        raise ValueError(f"k: got {k}, takes 1 to {len(train_features)}, the number of train_features")
    if not temperature > 0:
        raise ValueError(f"temperature: got {temperature}, must be positive")

    train = F.normalize(train_features.float(), dim=1)  # (N, C)
    test = F.normalize(test_features.float(), dim=1)  # (M, C)
    similarity, neighbour = (test @ train.T).topk(max(ks))  # (M, max k), nearest first
    # Relative to the nearest, so that no small temperature overflows.
    weight = ((similarity - similarity[:, :1]) / temperature).exp()
    vote = train_labels[neighbour]  # (M, max k)
    none = weight.new_zeros(len(test), int(train_labels.max()) + 1)
    return {count: none.scatter_add(1, vote[:, :count], weight[:, :count]).log() for count in ks}
