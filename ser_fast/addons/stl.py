"""STL: two images that were augmented alike share their unknown transformation."""

from dataclasses import asdict, dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ser_fast.addons.base import AddOnConfig, LayerView, VectorAddOn
from ser_fast.addons.contrast import cross_view, symmetric
from ser_fast.heads import mlp


class STL(VectorAddOn):
    """The term of STL, on the two global views of neighbors that share their draws."""

    needs = frozenset({"pairs"})

    def losses(self, head: nn.Module, features: list[Tensor], views: list[LayerView]) -> dict[str, Tensor]:
        count = len(features[0]) // 2 * 2  # a last one without a neighbor stays out
        return head(*(feature[:count] for feature in features))


class STLHead(nn.Module):
    """What transformation leads from one view to the other, and what it makes of the neighbor's.

    t(a, b) is the transformation from a to b; A(y, t) applies it, by a matrix that depends linearly on t. Equivariance:
    A(y1, t of the neighbor's y1 to its y0) finds y0, and likewise back. Transformation: both neighbors have the same t.

    Args:
        dim: C, channels of the features.
        transformation_dim: of t.
        hidden_dim: of the network of t, and of the projector of t.
        equivariance_dims: hidden and last width of the projector of y.
        out_dim: last width of the projector of t.
        temperature: of both contrasts.
        equivariance, transformation: weights.
        form: "official": NT-Xent with all other rows of both sides as negatives. "released", by SER: each side against
            the other alone, no gradient to keys.

    Source: Yu, Kim and Kim, arXiv 2501.08712.
    """

    def __init__(
        self,
        dim: int,
        *,
        transformation_dim: int = 128,
        hidden_dim: int = 128,
        equivariance_dims: tuple[int, int] = (512, 128),
        out_dim: int = 128,
        temperature: float = 0.2,
        equivariance: float = 1.0,
        transformation: float = 0.1,
        form: Literal["official", "released"] = "official",
    ) -> None:
        super().__init__()
        self.temperature, self.form = temperature, form
        self.equivariance, self.transformation = equivariance, transformation
        self.infer = mlp([2 * dim, hidden_dim, transformation_dim])
        self.matrix = nn.Linear(transformation_dim, dim * dim, bias=False)
        self.project = mlp([dim, *equivariance_dims])
        self.project_transformation = mlp([transformation_dim, hidden_dim, out_dim])

    def forward(self, y0: Tensor, y1: Tensor) -> dict[str, Tensor]:
        """The losses "loss", "equivariance" and "transformation" of views (B, C), neighbors 2i and 2i + 1 alike."""
        forth, back = self.infer(torch.cat([y0, y1], 1)), self.infer(torch.cat([y1, y0], 1))
        neighbor = torch.arange(len(y0), device=y0.device) ^ 1
        predictions = self.apply_transformation(y1, back[neighbor]), self.apply_transformation(y0, forth[neighbor])
        contrast = symmetric if self.form == "official" else cross_view
        equivariance = contrast(
            torch.cat([self.project(y0), self.project(y1)]),
            torch.cat([self.project(prediction) for prediction in predictions]),
            self.temperature,
        )
        even, odd = (self.project_transformation(torch.cat([forth[start::2], back[start::2]])) for start in range(2))
        transformation = contrast(even, odd, self.temperature)
        return {
            "loss": self.equivariance * equivariance + self.transformation * transformation,
            "equivariance": equivariance,
            "transformation": transformation,
        }

    def apply_transformation(self, y: Tensor, t: Tensor) -> Tensor:
        """A(y, t), (B, C) and (B, T) to (B, C): the matrix (C, C) of each t times y.

        By the outer products (B, C T), which are smaller than B matrices where T < C.
        """
        dim = y.shape[1]
        return F.linear((y[:, :, None] * t[:, None, :]).flatten(1), self.matrix.weight.view(dim, -1))


@dataclass(frozen=True)
class STLConfig(AddOnConfig):
    """STL, arXiv 2501.08712: neighbors in a batch share their draws, and so their transformation between two views."""

    read: Literal["auto", "cls", "mean"] = "auto"
    """The class token, or the mean of the patch tokens; "auto": the class token where the layers have one."""
    form: Literal["official", "released"] = "official"
    """The authors' loss, or that of SER's released code."""
    equivariance: float = 1.0
    """Weight of the views that are predicted by the neighbor's transformation."""
    transformation: float = 0.1
    """Weight of the contrast of transformations."""
    transformation_dim: int = 128
    """Width of a transformation; the matrices take as many parameters times the square of the encoder's width."""
    hidden_dim: int = 128
    """Hidden width of the network of transformations, and of their projector."""
    equivariance_dims: tuple[int, int] = (512, 128)
    """Hidden and last width of the projector of views."""
    out_dim: int = 128
    """Last width of the projector of transformations."""
    temperature: float = 0.2
    """Of both contrasts."""

    def build(self, dim: int, layers: tuple[int, ...], objective: str) -> STL:
        options = asdict(self)
        for name in ("layers", "weight", "read"):
            options.pop(name)
        return STL({layer: STLHead(dim, **options) for layer in layers}, read=self.read)
