"""k-nearest-neighbour classification of frozen features."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

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
    """Top-1 accuracy of the weighted kNN classifier: the k nearest vote for their class, each with exp(cosine / T).

    Args:
        train_features: (N, C) floats, not necessarily normalised.
        train_labels: (N,) integers of at least 0.
        test_features: (M, C), on the same device.
        test_labels: (M,).
        k: how many neighbours vote; several values share one search.
        temperature: T; a small one lets the nearest decide, a large one counts heads.

    Returns:
        For each k the share of test images, 0 to 1, whose class wins the vote.

    Raises:
        ValueError: shapes that don't fit, features that aren't finite, negative labels, a k outside 1..N, or a
            temperature that isn't positive.

    Source: Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", 2018, section 3.4;
    DINO's eval_knn uses the same.

    Example:
        >>> train, test = embed(model, train_loader, "cuda"), embed(model, test_loader, "cuda")
        >>> knn_accuracy(*train, *test, k=[10, 20])
        {10: 0.71, 20: 0.73}
    """
    ks = [k] if isinstance(k, int) else list(k)
    _check("train", train_features, train_labels)
    _check("test", test_features, test_labels)
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
    classes = int(train_labels.max()) + 1
    correct = torch.zeros(len(ks), dtype=torch.long, device=train.device)
    rows = max(1, _SIMILARITIES // len(train))
    for queries, labels in zip(test.split(rows), test_labels.split(rows), strict=True):
        similarity, neighbour = (queries @ train.T).topk(max(ks))  # (B, max k), nearest first
        # Relative to the nearest, so that no small temperature overflows.
        weight = ((similarity - similarity[:, :1]) / temperature).exp()
        vote = train_labels[neighbour]  # (B, max k)
        for i, count in enumerate(ks):
            votes = weight.new_zeros(len(queries), classes).scatter_add_(1, vote[:, :count], weight[:, :count])
            correct[i] += (votes.argmax(1) == labels).sum()
    return dict(zip(ks, (correct / len(test)).tolist(), strict=True))


def _check(part: str, features: Tensor, labels: Tensor) -> None:
    if features.ndim != 2 or not len(features) or not features.is_floating_point():
        raise ValueError(f"{part}_features: got {features.dtype} {tuple(features.shape)}, takes floats (N, C), N > 0")
    if labels.shape != features.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(f"{part}_labels: got {labels.dtype} {tuple(labels.shape)}, takes int64 ({len(features)},)")
    if not bool(torch.isfinite(features).all()):
        raise ValueError(f"{part}_features: every value must be finite")
    if bool((labels < 0).any()):
        raise ValueError(f"{part}_labels: got {int(labels.min())}, takes classes from 0 (images without a class?)")
