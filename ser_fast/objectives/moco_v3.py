"""MoCo-v3: a momentum encoder's embeddings of one view are the targets of a predictor on the other view's."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from ser_fast.distributed import all_gather_views, gather_counts, rank, world_size
from ser_fast.heads import mlp
from ser_fast.objectives.base import Objective, ObjectiveConfig, fix_patches, in_float32
from ser_fast.ops.nt_xent import info_nce

if TYPE_CHECKING:  # the options of a training are read without timm
    from ser_fast.vit import SplitViT


class MoCoV3(Objective):
    """The MoCo-v3 objective, with any number of local views.

    The encoder's patch embedding is frozen and its absolute positions, where it has them, are fixed sin-cos, as the
    paper does for stability.

    Args:
        encoder_dim: C, channels of the embeddings.
        dim: width of the embeddings that are contrasted.
        mlp_dim: hidden width of projector and predictor.
        temperature: of the contrast.
        momentum: of the momentum encoder at the start; it rises to 1 along a cosine.
        multi_crop: with local views, twice the "mean" of all terms (the scale of two views), or their sum as
            "released" by SER: 10 terms of 2 + 4 views, 5 times the loss at the same learning rate.

    Source: Chen, Xie and He, arXiv 2104.02057, algorithm 1.
    """

    moves_teacher = "before"

    def __init__(
        self,
        encoder_dim: int,
        *,
        dim: int = 256,
        mlp_dim: int = 4096,
        temperature: float = 0.2,
        momentum: float = 0.99,
        multi_crop: Literal["mean", "released"] = "mean",
    ) -> None:
        super().__init__()
        self.temperature, self.momentum, self.multi_crop = temperature, momentum, multi_crop
        self.head = mlp([encoder_dim, mlp_dim, mlp_dim, dim], last="norm")
        self.predictor = mlp([dim, mlp_dim, dim], last="norm")

    def prepare(self, encoder: "SplitViT") -> None:
        fix_patches(encoder)

    def forward(self, student: list[Tensor], teacher: list[Tensor], progress: float) -> dict[str, Tensor]:
        queries = [self.predictor(z) for z in student]
        terms = moco_v3_terms(queries, teacher, temperature=self.temperature)
        return {"loss": terms.sum() * (1.0 if self.multi_crop == "released" else 2 / len(terms))}


@in_float32
def moco_v3_terms(queries: list[Tensor], keys: list[Tensor], *, temperature: float) -> Tensor:
    """2 tau times the cross-entropy of each view's queries with each other view's keys, of all ranks.

    Args:
        queries: of each view (B, D), global views first.
        keys: of each global view (B, D).
        temperature: tau.

    Returns:
        A term for each pair of different views, by query, then by key.
    """
    counts = gather_counts(len(keys[0]), keys[0].device)
    positive = sum(counts[: rank()]) + torch.arange(len(keys[0]), device=keys[0].device)
    gathered = all_gather_views([key.detach() for key in keys], counts)
    terms = []
    for v, query in enumerate(queries):
        for u, key in enumerate(gathered):
            if u != v:
                total = info_nce(query, key, temperature=temperature, positive=positive, reduction="sum")
                terms.append(2 * temperature * (world_size() * total / sum(counts)))
    return torch.stack(terms)


@dataclass(frozen=True)
class MoCoV3Config(ObjectiveConfig):
    """MoCo-v3, arXiv 2104.02057."""

    section: ClassVar[str] = "moco"

    dim: int = 256
    """Width of the embeddings that are contrasted."""
    mlp_dim: int = 4096
    """Hidden width of projector and predictor."""
    temperature: float = 0.2
    """Of the contrast."""
    momentum: float = 0.99
    """Of the momentum encoder at the start; it rises to 1 along a cosine."""
    multi_crop: Literal["mean", "released"] = "mean"
    """With local views: twice the mean of all terms, or their sum, as SER's scripts have it."""

    def build(self, dim: int) -> MoCoV3:
        return MoCoV3(dim, **asdict(self))
