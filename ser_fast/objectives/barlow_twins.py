"""Barlow Twins: the correlation matrix of two views' embeddings is to be the identity."""

from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ser_fast.distributed import all_reduce_sum
from ser_fast.heads import mlp, moments
from ser_fast.objectives.base import Objective, ObjectiveConfig, in_float32, off_diagonal, view_pairs


class BarlowTwins(Objective):
    """The Barlow Twins objective.

    Args:
        encoder_dim: C, channels of the embeddings.
        dim: width D of the embeddings that are correlated.
        mlp_dim: hidden width of the projector.
        off_diagonal: weight of the entries off the diagonal.

    Source: Zbontar, Jing, Misra, LeCun and Deny, arXiv 2103.03230, algorithm 1.
    """

    def __init__(self, encoder_dim: int, *, dim: int = 8192, mlp_dim: int = 8192, off_diagonal: float = 0.0051) -> None:
        super().__init__()
        self.off_diagonal = off_diagonal
        self.head = mlp([encoder_dim, mlp_dim, mlp_dim, dim])

    def forward(self, student: list[Tensor], teacher: list[Tensor], progress: float) -> dict[str, Tensor]:
        return {"loss": barlow_twins_loss(student, weight=self.off_diagonal)}


@in_float32
def barlow_twins_loss(views: list[Tensor], *, weight: float) -> Tensor:
    """sum_i (C_ii - 1)^2 + weight sum_{i != j} C_ij^2, the mean over the pairs of views.

    Statistics and correlations are of all ranks' rows, and so is the gradient. Every view is standardized by its own
    mean and biased variance, with 1e-5 added to the variance.

    Args:
        views: of each (B, D), global views first.
        weight: of the entries off the diagonal.
    """
    standardized = []
    for view in views:
        mean, variance, count = moments(view)
        standardized.append((view - mean) * (variance + 1e-5).rsqrt())
    losses = []
    for one, other in view_pairs(len(views)):
        correlation = all_reduce_sum(standardized[one].T @ standardized[other]) / count  # (D, D)
        losses.append((correlation.diagonal() - 1).square().sum() + weight * off_diagonal(correlation).square().sum())
    return torch.stack(losses).mean()


@dataclass(frozen=True)
class BarlowTwinsConfig(ObjectiveConfig):
    """Barlow Twins, arXiv 2103.03230."""

    section: ClassVar[str] = "barlow"
    recipe: ClassVar = {
        "optim.lr": 1e-4,
        "optim.lr_end": 1e-7,
        "optim.clip_grad": 0.3,
        "optim.clip": "parameter",
        "views.crop_area": (0.08, 1.0),
    }

    dim: int = 8192
    """Width of the embeddings that are correlated."""
    mlp_dim: int = 8192
    """Hidden width of the projector."""
    off_diagonal: float = 0.0051
    """Weight of the correlations off the diagonal."""

    def build(self, dim: int) -> BarlowTwins:
        return BarlowTwins(dim, **asdict(self))
