"""SER as an add-on: `SERLoss` on the patch tokens of each layer."""

import itertools
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
        locals: ask it of each pair of a global and a local view, too. What a local view shows of the global one is a
            partial map; the loss is the mean over all pairs.

    Raises:
        ValueError: locals with momentum_keys: the teacher sees no local views.
    """

    reads = "tokens"

    def __init__(self, losses: dict[int, SERLoss], *, momentum_keys: bool = False, locals: bool = False) -> None:
        super().__init__()
        if locals and momentum_keys:
            raise ValueError("ser.locals: got True with momentum_keys; the teacher sees no local views")
        self.layers = tuple(losses)
        self.losses = nn.ModuleDict({str(layer): loss for layer, loss in losses.items()})
        self.needs = frozenset({*(["teacher"] if momentum_keys else []), *(["locals"] if locals else [])})

    def forward(self, views: list[LayerView]) -> dict[str, Tensor]:
        view0, view1, *local = views
        pairs = [(view0, view1), *itertools.product((view0, view1), local)]
        losses = []
        for layer, (one, other) in itertools.product(self.layers, pairs):
            tokens = one.features[layer], other.features[layer]
            keys = [view.teacher[layer] for view in (one, other) if view.teacher is not None]
            losses.append(self.losses[str(layer)](*tokens, one.g, other.g, *keys))
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
    locals: bool = False
    """Also ask it of each pair of a global and a local view (--views.locals)."""
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
        for name in ("layers", "weight", "momentum_keys", "locals"):
            options.pop(name)
        # The paper has a temperature for three objectives; the others are contrastive as MoCo-v3, or have its scale.
        options["objective"] = objective if objective in TEMPERATURES else "moco_v3"
        losses = {layer: SERLoss(dim, **options) for layer in layers}
        return SER(losses, momentum_keys=self.momentum_keys, locals=self.locals)
