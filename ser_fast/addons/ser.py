"""SER as an add-on: `SERLoss` on the patch tokens of each layer."""

import itertools
from dataclasses import asdict, dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from ser_fast.addons.base import AddOn, AddOnConfig, Layers, LayerView
from ser_fast.lattice import LatticeMap
from ser_fast.loss import TEMPERATURES, SERLoss


class SER(AddOn):
    """The mean over the layers of `SERLoss`, each with a projector of its own.

    Args:
        losses: by layer.
        momentum_keys: contrast with the teacher's tokens instead of the encoder's own.
        locals: ask it of each pair of a global and a local view, too. What a local view shows of the global one is a
            partial map; the loss is the mean over all pairs.
        noise: what is wrong with the maps that it is told, for studies of it: the largest error of a linear part, as a
            share, and of a shift, in tokens. Uniform, drawn for each sample and view.
        masked: the share of each view's tokens that take no part, drawn for each sample.

    Raises:
        ValueError: locals with momentum_keys: the teacher sees no local views; noise below 0; or a share outside
            [0, 1).
    """

    reads = "tokens"

    def __init__(
        self,
        losses: dict[int, SERLoss],
        *,
        momentum_keys: bool = False,
        locals: bool = False,
        noise: tuple[float, float] = (0.0, 0.0),
        masked: float = 0.0,
    ) -> None:
        super().__init__()
        if not min(noise) >= 0 or not max(noise) < float("inf"):
            raise ValueError(f"ser.noise: got {noise}, takes two numbers from 0")
        if not 0 <= masked < 1:
            raise ValueError(f"ser.masked: got {masked}, takes a number from 0 to below 1")
        if locals and momentum_keys:
            raise ValueError("ser.locals: got True with momentum_keys; the teacher sees no local views")
        self.layers, self.noise, self.masked = tuple(losses), noise, masked
        self.losses = nn.ModuleDict({str(layer): loss for layer, loss in losses.items()})
        self.needs = frozenset({*(["teacher"] if momentum_keys else []), *(["locals"] if locals else [])})

    def forward(self, views: list[LayerView]) -> dict[str, Tensor]:
        view0, view1, *local = (self._disturbed(view) for view in views)
        pairs = [(view0, view1), *itertools.product((view0, view1), local)]
        losses = []
        for layer, (one, other) in itertools.product(self.layers, pairs):
            tokens = one.features[layer], other.features[layer]
            keys = [view.teacher[layer] for view in (one, other) if view.teacher is not None]
            masks = {"mask0": self._mask(tokens[0]), "mask1": self._mask(tokens[1])}
            losses.append(self.losses[str(layer)](*tokens, one.g, other.g, *keys, **masks))
        return {"loss": torch.stack(losses).mean() if len(losses) > 1 else losses[0]}

    def _disturbed(self, view: LayerView) -> LayerView:
        """The view with another map than the one that made it, where there is noise."""
        if not any(self.noise):
            return view
        g, lattice = view.g, next(iter(view.features.values())).shape[1:3]
        share, shift = self.noise
        # On the CPU, as all draws: the same on every device.
        linear, offset = 2 * torch.rand(len(g), 2, 2, dtype=torch.float64) - 1, 2 * torch.rand(len(g), 2).double() - 1
        offset *= shift * torch.tensor([side / n for side, n in zip(g.size_out, lattice, strict=True)])
        wrong = LatticeMap.affine(g.size_out, torch.eye(2, dtype=torch.float64) + share * linear, offset)
        told = wrong.to(g.linear.device) @ g
        return view._replace(g=replace(told, frames=g.frames))  # an error of the map fills nothing

    def _mask(self, tokens: Tensor) -> Tensor | None:
        """(B, H*W) bool, the tokens that take part; None for all."""
        if not self.masked:
            return None
        return (torch.rand(len(tokens), tokens.shape[1] * tokens.shape[2]) >= self.masked).to(tokens.device)


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
    noise: tuple[float, float] = (0.0, 0.0)
    """What is wrong with the maps that it is told, for studies: the largest error of a linear part, as a share, and of
    a shift, in tokens."""
    masked: float = 0.0
    """Share of each view's tokens that take no part, as if an encoder of masked images had dropped them."""
    max_tokens: int | None = None
    """Sample at most so many pairs of tokens a step, on each rank."""
    gather: bool = True
    """Contrast with the tokens of all ranks."""
    backend: Literal["auto", "reference", "cpu", "triton", "cuda"] = "auto"
    """Which kernels run; `ser-fast doctor` lists them."""

    def build(self, dim: int, layers: tuple[int, ...], objective: str) -> SER:
        options = asdict(self)
        own = {name: options.pop(name) for name in ("momentum_keys", "locals", "noise", "masked")}
        for name in ("layers", "weight"):
            options.pop(name)
        # The paper has a temperature for three objectives; the others are contrastive as MoCo-v3, or have its scale.
        options["objective"] = objective if objective in TEMPERATURES else "moco_v3"
        losses = {layer: SERLoss(dim, **options) for layer in layers}
        return SER(losses, **own)
