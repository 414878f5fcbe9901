"""E-SSL: which of its four quarter turns a small crop shows."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ser_fast.addons.base import AddOnConfig, LayerView, VectorAddOn
from ser_fast.distributed import mean_over_rows


class ESSL(VectorAddOn):
    """The term of E-SSL: the cross-entropy of four turns, of a crop drawn for it alone."""

    needs = frozenset({"turns"})

    @property
    def roles(self) -> frozenset[str]:
        return frozenset({"turn"})

    def losses(self, head: nn.Module, features: list[Tensor], views: list[LayerView]) -> dict[str, Tensor]:
        return {"loss": turn_loss(head(torch.cat(features)))}


def turn_loss(logits: Tensor) -> Tensor:
    """The cross-entropy of logits (4 B, 4): first those of all crops as they are, then turned once, twice, thrice."""
    logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    label = torch.arange(4, device=logits.device).repeat_interleave(len(logits) // 4)
    return mean_over_rows(F.cross_entropy(logits, label, reduction="none"))


def predictor(dim: int, hidden_dim: int | None = None, last_dim: int = 128) -> nn.Sequential:
    """C -> hidden -> hidden -> last -> 4, LayerNorm after each but the last, ReLU after the first two.

    Source: Dangovski et al., arXiv 2111.00899, the predictor of its ImageNet models.
    """
    hidden_dim = hidden_dim or dim
    return nn.Sequential(
        nn.Linear(dim, hidden_dim),
        nn.LayerNorm(hidden_dim),
        nn.ReLU(inplace=True),
        nn.Linear(hidden_dim, hidden_dim),
        nn.LayerNorm(hidden_dim),
        nn.ReLU(inplace=True),
        nn.Linear(hidden_dim, last_dim),
        nn.LayerNorm(last_dim),
        nn.Linear(last_dim, 4),
    )


@dataclass(frozen=True)
class ESSLConfig(AddOnConfig):
    """E-SSL, arXiv 2111.00899: predicts which quarter turn of a small crop it sees (--views.turn-size, -area)."""

    weight: float = 0.4
    """Of the term beside the invariance loss: its authors' 0.4 with SimCLR; 8 with Barlow Twins; SER's code has 1."""
    read: Literal["auto", "cls", "mean"] = "auto"
    """The class token, or the mean of the patch tokens; "auto": the class token where the layers have one."""
    hidden_dim: int | None = None
    """Width of the predictor's first two layers; default the encoder's."""
    last_dim: int = 128
    """Width of its third."""

    def build(self, dim: int, layers: tuple[int, ...], objective: str) -> ESSL:
        return ESSL({layer: predictor(dim, self.hidden_dim, self.last_dim) for layer in layers}, read=self.read)
