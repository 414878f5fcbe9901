"""VICReg: embeddings of two views are near each other, and their entries vary and do not covary."""

from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import relu

from ser_fast.distributed import all_reduce_sum, mean_over_rows
from ser_fast.heads import mlp, moments
from ser_fast.objectives.barlow_twins import BarlowTwinsConfig
from ser_fast.objectives.base import Objective, ObjectiveConfig, in_float32, off_diagonal, view_pairs


class VICReg(Objective):
    """The VICReg objective.

    Args:
        encoder_dim: C, channels of the embeddings.
        dim: width D of the embeddings.
        mlp_dim: hidden width of the expander.
        invariance, variance, covariance: weights of the three terms.

    Source: Bardes, Ponce and LeCun, arXiv 2105.04906, algorithm 1.
    """

    def __init__(
        self,
        encoder_dim: int,
        *,
        dim: int = 8192,
        mlp_dim: int = 8192,
        invariance: float = 25.0,
        variance: float = 25.0,
        covariance: float = 1.0,
    ) -> None:
        super().__init__()
        self.weights: Tensor
        self.register_buffer("weights", torch.tensor([invariance, variance, covariance]), persistent=False)
        self.head = mlp([encoder_dim, mlp_dim, mlp_dim, dim])

    def forward(self, student: list[Tensor], teacher: list[Tensor], progress: float) -> dict[str, Tensor]:
        terms = vicreg_terms(student)
        parts = dict(zip(("distance", "variance", "covariance"), terms.detach(), strict=True))
        return {"loss": torch.dot(self.weights.to(terms.dtype), terms), **parts}


@in_float32
def vicreg_terms(views: list[Tensor]) -> Tensor:
    """The three terms, with the statistics of all ranks' rows.

    Args:
        views: of each (B, D), global views first.

    Returns:
        (3,): the mean square distance, over the pairs of views; the mean of relu(1 - sqrt(var + 1e-4)), over the views
        and entries; the sum of the squared covariances of different entries over D, twice its mean over the views.
        Variances and covariances are unbiased.
    """
    distances = [mean_over_rows((views[one] - views[other]).square()) for one, other in view_pairs(len(views))]
    hinges, covariances = [], []
    for view in views:
        mean, variance, count = moments(view)
        hinges.append(relu(1 - (variance * count / (count - 1) + 1e-4).sqrt()).mean())
        centered = view - mean
        covariance = all_reduce_sum(centered.T @ centered) / (count - 1)  # (D, D)
        covariances.append(off_diagonal(covariance).square().sum() / len(covariance))
    means = [torch.stack(terms).mean() for terms in (distances, hinges, covariances)]
    return torch.stack([means[0], means[1], 2 * means[2]])


@dataclass(frozen=True)
class VICRegConfig(ObjectiveConfig):
    """VICReg, arXiv 2105.04906."""

    section: ClassVar[str] = "vicreg"
    recipe: ClassVar = BarlowTwinsConfig.recipe  # its paper trains ResNets with LARS

    dim: int = 8192
    """Width of the embeddings."""
    mlp_dim: int = 8192
    """Hidden width of the expander."""
    invariance: float = 25.0
    """Weight of the distance of two views."""
    variance: float = 25.0
    """Weight of the variance's distance from 1."""
    covariance: float = 1.0
    """Weight of the covariances."""

    def build(self, dim: int) -> VICReg:
        return VICReg(dim, **asdict(self))
