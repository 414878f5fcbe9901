"""SER as an add-on: `SERLoss` on the patch tokens of each layer."""

from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ser_fast.addons.base import AddOn, AddOnConfig, Layers, LayerView
from ser_fast.loss import TEMPERATURES, SERLoss


class SER(AddOn):
    """The mean over the layers of `SERLoss`, each with a projector of its own.

    Args:
        losses: by layer.
        momentum_keys: contrast with the teacher's tokens instead of the encoder's own.
    """

    reads = "tokens"

    def __init__(self, losses: dict[int, SERLoss], *, momentum_keys: bool = False) -> None:
        super().__init__()
        self.layers = tuple(losses)
        self.losses = nn.ModuleDict({str(layer): loss for layer, loss in losses.items()})
        self.needs = frozenset({"teacher"} if momentum_keys else ())

    def forward(self, views: list[LayerView]) -> dict[str, Tensor]:
        view0, view1 = (view for view in views if view.role == "global")
        losses = []
        for layer in self.layers:
            tokens = view0.features[layer], view1.features[layer]
            keys = [view.teacher[layer] for view in (view0, view1) if view.teacher is not None]
            losses.append(self.losses[str(layer)](*tokens, view0.g, view1.g, *keys))
        return {"loss": torch.stack(losses).mean() if len(losses) > 1 else losses[0]}


@dataclass(frozen=True)
class SERConfig(AddOnConfig):
    """Soft Equivariance Regularization; see SERLoss."""

    layers: Layers = "split"
    """Blocks after which it acts: numbers, "split" (where [CLS] enters), "last", "all" or "off"."""
    weight: float = 1.0
    """lambda. 0 shapes nothing: the term is computed on detached tokens, for comparison."""
    preset: Literal["paper", "released"] = "paper"
    """What the paper's text says, or what its released scripts say; the options below override it."""
    temperature: float | None = None
    """Of the contrast; default the preset's for the objective."""
    negatives: Literal["both", "other"] | None = None
    """The tokens of other images in both views, or in the other view alone."""
    both_directions: bool | None = None
    """Also move view 1 to view 0."""
    momentum_keys: bool = False
    """Contrast with the momentum encoder's tokens instead of the encoder's own."""
    hidden_dim: int = 512
    """Hidden width of the projector."""
    out_dim: int = 512
    """Width of the tokens that are contrasted."""
    interpolation: Literal["nearest", "bilinear", "bicubic", "catmull_rom", "mitchell", "lanczos3", "area"] = "bicubic"
    """How tokens are resampled."""
    padding: Literal["zeros", "border", "reflection"] = "border"
    """What lies outside the lattice of tokens."""
    antialias: bool = False
    """Stretch the kernel where the map shrinks the lattice."""
    max_tokens: int | None = None
    """Sample at most so many pairs of tokens a step, on each rank."""
    gather: bool = True
    """Contrast with the tokens of all ranks."""
    backend: Literal["auto", "reference", "cpu", "triton", "cuda"] = "auto"
    """Which kernels run; `ser-fast doctor` lists them."""

    def build(self, dim: int, layers: tuple[int, ...], objective: str) -> SER:
        options = asdict(self)
        for name in ("layers", "weight", "momentum_keys"):
            options.pop(name)
        # The paper has a temperature for three objectives; the others are contrastive as MoCo-v3, or have its scale.
        options["objective"] = objective if objective in TEMPERATURES else "moco_v3"
        losses = {layer: SERLoss(dim, **options) for layer in layers}
        return SER(losses, momentum_keys=self.momentum_keys)
