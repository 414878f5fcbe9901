"""EquiMod: the embedding of a view is predicted from that of the image itself and the view's parameters."""

from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ser_fast.addons.base import AddOnConfig, LayerView, VectorAddOn
from ser_fast.addons.contrast import cross_view, symmetric
from ser_fast.addons.geometry import geometry
from ser_fast.device import send
from ser_fast.heads import SyncBatchNorm1d, mlp
from ser_fast.views.color import LAYOUT

PARAMETERS = 7 + len(LAYOUT)  # geometry and color


class EquiMod(VectorAddOn):
    """The EquiMod term; its parameters are the geometry of each view's map, and the draws of its colors."""

    needs = frozenset({"plain", "color"})

    def losses(self, head: nn.Module, features: list[Tensor], views: list[LayerView]) -> dict[str, Tensor]:
        (plain,) = (h for h, view in zip(features, views, strict=True) if view.role == "plain")
        seen = [(h, view) for h, view in zip(features, views, strict=True) if view.role == "global"]
        parameters = [
            send(torch.cat([geometry(view.g).columns, _color(view)], 1), h.device, h.dtype) for h, view in seen
        ]
        return {"loss": head(plain, [h for h, _ in seen], parameters)}


class EquiModHead(nn.Module):
    """Projector, encoder of the parameters, predictor, and the contrast of predictions with embeddings.

    Args:
        dim: C, channels of the features.
        parameters: P, of a view.
        hidden_dim, out_dim: of the projector.
        code_dim: of the encoded parameters.
        temperature: of the contrast.
        form: "official": batch norm over the image and its views together, NT-Xent with all other rows of both sides as
            negatives, gradients everywhere. "released", by SER: the projector's batch norm view by view, each side
            against the other alone, no gradient to keys.

    Source: Devillers and Lefort, arXiv 2211.01244.
    """

    def __init__(
        self,
        dim: int,
        parameters: int = PARAMETERS,
        *,
        hidden_dim: int = 2048,
        out_dim: int = 128,
        code_dim: int = 128,
        temperature: float = 0.2,
        form: Literal["official", "released"] = "official",
    ) -> None:
        super().__init__()
        self.temperature, self.form = temperature, form
        self.project = mlp([dim, hidden_dim, hidden_dim, out_dim], last="norm")
        # By the batch's own statistics, not by constants of a data set: whatever sampler and colors are chosen.
        self.standardize = SyncBatchNorm1d(parameters, affine=False)
        self.encode = mlp([parameters, code_dim], last="affine")
        self.predict = mlp([out_dim + code_dim, out_dim], last="norm")

    def forward(self, plain: Tensor, views: list[Tensor], parameters: list[Tensor]) -> Tensor:
        """The loss.

        Args:
            plain: (B, C) features of the images.
            views: of each view (B, C).
            parameters: of each view (B, P), in any unit.
        """
        if self.form == "official":
            origin, *embeddings = self.project(torch.cat([plain, *views])).chunk(1 + len(views))
        else:
            origin, *embeddings = (self.project(h) for h in (plain, *views))
        code = self.encode(self.standardize(torch.cat(parameters)))
        predictions = self.predict(torch.cat([origin.repeat(len(views), 1), code], 1))
        if self.form == "official":
            return symmetric(torch.cat(embeddings), predictions, self.temperature)
        return cross_view(torch.cat(embeddings), predictions, self.temperature) / 2


def _color(view: LayerView) -> Tensor:
    assert view.color is not None  # global views have colors, and the add-on needs them
    return view.color


@dataclass(frozen=True)
class EquiModConfig(AddOnConfig):
    """EquiMod, arXiv 2211.01244: predicts a view's embedding from the plain image's and the view's parameters."""

    read: Literal["auto", "cls", "mean"] = "auto"
    """The class token, or the mean of the patch tokens; "auto": the class token where the layers have one."""
    form: Literal["official", "released"] = "official"
    """The authors' loss, or that of SER's released code."""
    hidden_dim: int = 2048
    """Hidden width of the projector."""
    out_dim: int = 128
    """Width of what is contrasted."""
    code_dim: int = 128
    """Width of the encoded parameters."""
    temperature: float = 0.2
    """Of the contrast."""

    def build(self, dim: int, layers: tuple[int, ...], objective: str) -> EquiMod:
        options = asdict(self)
        for name in ("layers", "weight", "read"):
            options.pop(name)
        return EquiMod({layer: EquiModHead(dim, **options) for layer in layers}, read=self.read)
