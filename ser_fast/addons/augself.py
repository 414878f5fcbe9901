"""AugSelf: from the features of two views, how their augmentations differed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ser_fast.addons.base import AddOnConfig, LayerView, VectorAddOn
from ser_fast.addons.geometry import geometry
from ser_fast.device import send
from ser_fast.distributed import mean_over_rows
from ser_fast.heads import mlp
from ser_fast.views.color import columns

OUTPUTS = {"crop": 4, "color": 4, "flip": 1, "turn": 4, "blur": 1, "solarize": 1}


class AugSelf(VectorAddOn):
    """The AugSelf term, on the two global views in both orders."""

    needs = frozenset({"color"})

    def losses(self, head: nn.Module, features: list[Tensor], views: list[LayerView]) -> dict[str, Tensor]:
        return head(features, [difference(*views), difference(*reversed(views))])


class AugSelfHead(nn.Module):
    """A predictor of each augmentation's difference.

    Args:
        dim: C, channels of the features.
        weights: of the augmentations to predict, names as in OUTPUTS.
        hidden_dim: of the predictors.

    Source: Lee, Lee, Lee, Lee and Shin, arXiv 2111.09613.
    """

    def __init__(self, dim: int, weights: Mapping[str, float], *, hidden_dim: int = 512) -> None:
        super().__init__()
        self.weights = dict(weights)
        self.predictors = nn.ModuleDict(
            {name: mlp([2 * dim, hidden_dim, hidden_dim, OUTPUTS[name]], last="bias") for name in weights}
        )

    def forward(self, features: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The losses: "loss", and each augmentation's, unweighted.

        Args:
            features: of the two views (B, C).
            targets: of both orders, the first view's difference to the second, and the second's to the first; see
                `difference`.
        """
        one, other = features
        pairs = torch.cat([torch.cat([one, other], 1), torch.cat([other, one], 1)])  # (2B, 2C), one batch
        losses = {}
        for name, predictor in self.predictors.items():
            target, output = torch.cat([order[name] for order in targets]), predictor(pairs)
            output = output.float() if output.dtype in (torch.bfloat16, torch.float16) else output
            losses[name] = mean_over_rows(_error(name, output, send(target, output.device)))
        total = sum(self.weights[name] * loss for name, loss in losses.items())
        assert isinstance(total, Tensor)
        return {"loss": total, **losses}


def _error(name: str, output: Tensor, target: Tensor) -> Tensor:
    """The errors, one or more a row."""
    if name == "turn":
        return F.cross_entropy(output, target.long(), reduction="none")
    if name == "flip":
        return F.binary_cross_entropy_with_logits(output, target.to(output), reduction="none")
    return F.mse_loss(output.tanh(), target.to(output), reduction="none")


def difference(view: LayerView, other: LayerView) -> dict[str, Tensor]:
    """What AugSelf predicts of a view and another one of the same images, by the names in OUTPUTS.

    Returns:
        crop: (B, 4) how far the center moved, y and x relative to the image (x as the view sees it: negated where it is
            mirrored), and the change of height and width.
        color: (B, 4) the differences of brightness, contrast, saturation and hue, relative to their ranges.
        flip: (B, 1) 1 where both or neither are mirrored.
        turn: (B,) int64, the quarter turns between them.
        blur: (B, 1) the difference of the sigmas; 0 is no blur.
        solarize: (B, 1) the difference of the thresholds; 1 is no solarization.
    """
    one, two = geometry(view.g), geometry(other.g)
    move = one.center - two.center
    move = torch.where(one.mirrored[:, None], move * move.new_tensor([1.0, -1.0]), move)
    assert view.color is not None
    assert other.color is not None
    change = view.color - other.color
    return {
        "crop": torch.cat([move, one.extent - two.extent], 1),
        "color": columns(change, "brightness", "contrast", "saturation", "hue"),
        "flip": (one.mirrored == two.mirrored)[:, None],
        "turn": (one.quarter_turns - two.quarter_turns) % 4,
        "blur": columns(change, "sigma"),
        "solarize": columns(change, "threshold"),
    }


@dataclass(frozen=True)
class AugSelfConfig(AddOnConfig):
    """AugSelf, arXiv 2111.09613: predicts how the augmentations of two views differ. Weights of 0 leave one out."""

    read: Literal["auto", "cls", "mean"] = "auto"
    """The class token, or the mean of the patch tokens; "auto": the class token where the layers have one."""
    crop: float = 0.5
    """Weight of the difference of position and size."""
    color: float = 0.5
    """Weight of the difference of brightness, contrast, saturation and hue."""
    flip: float = 0.0
    """Weight of whether one view is the other's mirror image."""
    turn: float = 0.0
    """Weight of the quarter turns between the views."""
    blur: float = 0.0
    """Weight of the difference of blur."""
    solarize: float = 0.0
    """Weight of the difference of solarization."""
    hidden_dim: int = 512
    """Hidden width of the predictors."""

    def build(self, dim: int, layers: tuple[int, ...], objective: str) -> AugSelf:
        weights = {name: getattr(self, name) for name in OUTPUTS if getattr(self, name)}
        if not weights or min(weights.values()) < 0:
            raise ValueError(f"augself: got the weights {weights}, takes one or more, none negative")
        heads = {layer: AugSelfHead(dim, weights, hidden_dim=self.hidden_dim) for layer in layers}
        return AugSelf(heads, read=self.read)
