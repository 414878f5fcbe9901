"""MoCo-v3: a momentum encoder's embeddings of one view are the targets of a predictor on the other view's."""

from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ser_fast.distributed import all_gather_rows, gather_counts, rank
from ser_fast.objectives.base import Objective, ObjectiveConfig
from ser_fast.objectives.heads import mlp
from ser_fast.ops.nt_xent import info_nce
from ser_fast.vit import SplitViT


class MoCoV3(Objective):
    """The MoCo-v3 objective.

    The encoder's patch embedding is frozen and its absolute positions, where it has them, are fixed sin-cos, as the
    paper does for stability.

    Args:
        encoder_dim: C, channels of the embeddings.
        dim: width of the embeddings that are contrasted.
        mlp_dim: hidden width of projector and predictor.
        temperature: of the contrast.
        momentum: of the momentum encoder at the start; it rises to 1 along a cosine.

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
    ) -> None:
        super().__init__()
        self.temperature, self.momentum = temperature, momentum
        self.head = mlp([encoder_dim, mlp_dim, mlp_dim, dim], last="norm")
        self.predictor = mlp([dim, mlp_dim, dim], last="norm")

    def prepare(self, encoder: SplitViT) -> None:
        if getattr(encoder, "pos_embed", None) is not None:
            encoder.fix_sincos_positions()
        encoder.patch_embed.requires_grad_(False)

    def forward(self, student: list[Tensor], teacher: list[Tensor], progress: float) -> dict[str, Tensor]:
        query0, query1 = (self.predictor(z) for z in student)
        key0, key1 = teacher
        return {"loss": self._contrast(query0, key1) + self._contrast(query1, key0)}

    def _contrast(self, query: Tensor, key: Tensor) -> Tensor:  # (B, D), (B, D)
        counts = gather_counts(len(key), key.device)
        positive = sum(counts[: rank()]) + torch.arange(len(query), device=query.device)
        keys = all_gather_rows(key, counts)
        return 2 * self.temperature * info_nce(query, keys, temperature=self.temperature, positive=positive)


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

    def build(self, dim: int) -> MoCoV3:
        return MoCoV3(dim, **asdict(self))
