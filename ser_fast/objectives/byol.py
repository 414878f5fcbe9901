"""BYOL: a predictor on the embeddings of one view finds the direction of the teacher's on the other view."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ser_fast.distributed import mean_over_rows
from ser_fast.heads import mlp
from ser_fast.objectives.base import Objective, ObjectiveConfig, fix_patches, in_float32

if TYPE_CHECKING:  # the options of a training are read without timm
    from ser_fast.vit import SplitViT


class BYOL(Objective):
    """The BYOL objective; on a vision transformer with MoCo-v3's frozen patch embedding and sin-cos positions.

    Args:
        encoder_dim: C, channels of the embeddings.
        dim: width of the embeddings that are compared.
        mlp_dim: hidden width of projector and predictor.
        momentum: of the teacher at the start; it rises to 1 along a cosine. The paper's .996 is for 1000 epochs.

    Source: Grill et al., arXiv 2006.07733, section 3.1.
    """

    def __init__(self, encoder_dim: int, *, dim: int = 256, mlp_dim: int = 4096, momentum: float = 0.99) -> None:
        super().__init__()
        self.momentum = momentum
        self.head = mlp([encoder_dim, mlp_dim, dim], last="bias")
        self.predictor = mlp([dim, mlp_dim, dim], last="bias")

    def prepare(self, encoder: "SplitViT") -> None:
        fix_patches(encoder)

    def forward(self, student: list[Tensor], teacher: list[Tensor], progress: float) -> dict[str, Tensor]:
        return {"loss": byol_loss([self.predictor(z) for z in student], teacher)}


@in_float32
def byol_loss(predictions: list[Tensor], targets: list[Tensor]) -> Tensor:
    """Twice the mean of 2 - 2 cos over the pairs of a prediction and the target of another view.

    Args:
        predictions: of each view (B, D), global views first.
        targets: of each global view (B, D); they get no gradient.
    """
    terms = [
        mean_over_rows(2 - 2 * cosine_similarity(prediction, target.detach(), dim=-1))
        for v, prediction in enumerate(predictions)
        for u, target in enumerate(targets)
        if u != v
    ]
    return 2 * torch.stack(terms).mean()


@dataclass(frozen=True)
class BYOLConfig(ObjectiveConfig):
    """BYOL, arXiv 2006.07733."""

    section: ClassVar[str] = "byol"
    recipe: ClassVar = {"views.crop_area": (0.08, 1.0)}

    dim: int = 256
    """Width of the embeddings that are compared."""
    mlp_dim: int = 4096
    """Hidden width of projector and predictor."""
    momentum: float = 0.99
    """Of the teacher at the start; it rises to 1 along a cosine."""

    def build(self, dim: int) -> BYOL:
        return BYOL(dim, **asdict(self))
