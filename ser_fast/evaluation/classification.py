"""Classifiers graded: top-1 and top-5 with confidence intervals, and the confusion matrix."""

from dataclasses import dataclass

import torch
from scipy.stats import binomtest
from torch import Tensor

ENTRIES = 2**26  # of test images x training images, or x classes, in memory at a time: 256 MiB
_BEST = 5


@dataclass(frozen=True)
class Interval:
    """A value, `low` to `high` its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


@dataclass(frozen=True)
class Classification:
    """How a classifier did on labeled images.

    Attributes:
        top1: the share of images whose class is predicted first.
        top5: the share of images whose class is among the first five.
        confusion: (K, K) int64, entry (i, j) the number of images of class i predicted as class j. Images without any
            prediction are in no entry. Sparse and coalesced, since of K^2 pairs of classes at most as many occur as
            there are images; `confusion.to_dense()` is the matrix, of 8 K^2 bytes.
        images: how many.
    """

    top1: Interval
    top5: Interval
    confusion: Tensor
    images: int

    def pairs(self) -> list[tuple[int, int, int]]:
        """(class, predicted class, number of images) of the pairs that occur, by class."""
        counts = self.confusion.values().tolist()
        return [(*pair, count) for pair, count in zip(self.confusion.indices().T.tolist(), counts, strict=True)]

    def columns(self) -> dict[str, float]:
        """A row of a table: top1, top1_low, top1_high, top5, top5_low, top5_high, images."""
        shares = {"top1": self.top1, "top5": self.top5}
        return {
            **{
                column: number
                for name, share in shares.items()
                for column, number in ((name, share.value), (f"{name}_low", share.low), (f"{name}_high", share.high))
            },
            "images": self.images,
        }


Rows = list[tuple[dict[str, str | int | float], Classification]]
"""What identifies each classifier, by column, and how it did."""


def share_of(hits: Tensor) -> Interval:
    """The share of True, with its 95 % Wilson interval, which takes entries to be independent draws.

    Args:
        hits: (M,) bool.

    Raises:
        ValueError: no entries.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", 1927, by scipy.
    """
    if not len(hits):
        raise ValueError("hits: got none, takes one for each image")
    test = binomtest(int(hits.sum()), len(hits))
    interval = test.proportion_ci(0.95, method="wilson")
    return Interval(float(test.statistic), float(interval.low), float(interval.high))


def rank(scores: Tensor) -> Tensor:
    """The classes of the highest scores.

    Args:
        scores: (M, K).

    Returns:
        (M, min(5, K)) int64, best first; -1 where the score is -inf.
    """
    best, classes = scores.topk(min(_BEST, scores.shape[1]))
    return classes.masked_fill(best == -torch.inf, -1)


def grade(ranked: Tensor, labels: Tensor, classes: int) -> Classification:
    """Grade predictions.

    Args:
        ranked: (M, n) int64, the predicted classes of each image, best first; -1 for none.
        labels: (M,) int64 of at least 0.
        classes: K, more than any prediction. A label may be beyond it: predicted by none, it is wrong.

    Example:
        >>> grade(rank(head(features)), labels, classes=10).top1.value
        0.71
    """
    hits = ranked[:, :_BEST] == labels[:, None]  # (M, n)
    size = max(classes, int(labels.max()) + 1)
    first = ranked[:, 0]
    predicted = first >= 0
    occurring, counts = torch.unique(torch.stack([labels[predicted], first[predicted]]), dim=1, return_counts=True)
    with torch.sparse.check_sparse_tensor_invariants(True):
        confusion = torch.sparse_coo_tensor(occurring, counts, (size, size), is_coalesced=True)
    return Classification(share_of(hits[:, 0]), share_of(hits.any(1)), confusion, len(labels))
