"""SimCLR: the embeddings of two views of an image find each other among those of all other images."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ser_fast.distributed import all_gather_views, gather_counts, rank, world_size
from ser_fast.heads import mlp
from ser_fast.objectives.base import Objective, ObjectiveConfig, fix_patches, in_float32, view_pairs
from ser_fast.ops.nt_xent import info_nce, nt_xent

if TYPE_CHECKING:  # the options of a training are read without timm
    from ser_fast.vit import SplitViT


class SimCLR(Objective):
    """The SimCLR objective; on a vision transformer with MoCo-v3's frozen patch embedding and sin-cos positions.

    Args:
        encoder_dim: C, channels of the embeddings.
        dim: width of the embeddings that are contrasted.
        mlp_dim: hidden width of the projector.
        temperature: of the contrast.

    Source: Chen, Kornblith, Norouzi and Hinton, arXiv 2002.05709, algorithm 1.
    """

    def __init__(self, encoder_dim: int, *, dim: int = 128, mlp_dim: int = 2048, temperature: float = 0.2) -> None:
        super().__init__()
        self.temperature = temperature
        self.head = mlp([encoder_dim, mlp_dim, mlp_dim, dim], last="norm")

    def prepare(self, encoder: "SplitViT") -> None:
        fix_patches(encoder)

    def forward(self, student: list[Tensor], teacher: list[Tensor], progress: float) -> dict[str, Tensor]:
        return {"loss": simclr_loss(student, temperature=self.temperature)}


@in_float32
def simclr_loss(views: list[Tensor], *, temperature: float) -> Tensor:
    """NT-Xent, the mean over the pairs of views: negatives are all other images of all ranks, in both views.

    Args:
        views: of each (B, D), global views first.
        temperature: of the contrast.
    """
    pairs = view_pairs(len(views))
    if world_size() == 1:
        losses = [nt_xent(views[one], views[other], temperature=temperature) for one, other in pairs]
        return torch.stack(losses).mean()
    counts = gather_counts(len(views[0]), views[0].device)
    images = torch.arange(sum(counts), device=views[0].device)
    own = images.split(counts)[rank()]
    gathered = all_gather_views(views, counts)
    totals = [
        info_nce(
            torch.cat([views[one], views[other]]),
            torch.cat([gathered[one], gathered[other]]),
            temperature=temperature,
            image=own.repeat(2),
            key_image=images.repeat(2),
            positive=torch.cat([own + len(images), own]),
            reduction="sum",
        )
        for one, other in pairs
    ]
    return world_size() * torch.stack(totals).mean() / (2 * len(images))


@dataclass(frozen=True)
class SimCLRConfig(ObjectiveConfig):
    """SimCLR, arXiv 2002.05709."""

    section: ClassVar[str] = "simclr"
    recipe: ClassVar = {"views.crop_area": (0.08, 1.0)}

    dim: int = 128
    """Width of the embeddings that are contrasted."""
    mlp_dim: int = 2048
    """Hidden width of the projector."""
    temperature: float = 0.2
    """Of the contrast."""

    def build(self, dim: int) -> SimCLR:
        return SimCLR(dim, **asdict(self))
