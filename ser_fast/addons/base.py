"""What an add-on is: an equivariance term at one layer or several. It knows no objective."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ser_fast.lattice import LatticeMap

if TYPE_CHECKING:  # the options of a training are read without timm
    from ser_fast.vit import SplitViT

Layers = tuple[int, ...] | Literal["off", "split", "last", "all"]
"""Where an add-on reads: numbers of blocks, or "split" (where the prefix tokens enter), "last", "all", or "off"."""


class LayerView(NamedTuple):
    """One view, as an add-on sees it: the samples of the equivariance share alone.

    Attributes:
        features: by layer, (B, H, W, C) where the add-on reads "tokens", else (B, C). The last layer's are after the
            encoder's final norm.
        teacher: the same of the teacher, without gradient; None unless the add-on needs "teacher".
        g: the maps from the images to this view, in pixels.
        color: (B, P) what was drawn for the colors, as `ser_fast.views.color.LAYOUT` says; None
            unless the add-on needs "color", and of plain views.
        role: of the view; see `ser_fast.views.recipe.View`.
    """

    features: dict[int, Tensor]
    teacher: dict[int, Tensor] | None
    g: LatticeMap
    color: Tensor | None
    role: Literal["global", "local", "plain", "turn"]


class AddOn(nn.Module):
    """A term on the features of some layers.

    Attributes:
        layers: numbers of blocks after which it reads, ascending.
        reads: "tokens", the patch tokens; "cls", the class token; "mean", the mean of the patch tokens.
        needs: of "teacher" (the teacher's features), "color" (the draws of every sample's colors), "locals" (the local
            views), "plain" (a view of the image itself), "turns" (four quarter turns of a small crop), "pairs"
            (neighbors 2i and 2i + 1 share their draws in each global view).
    """

    layers: tuple[int, ...]
    reads: Literal["tokens", "cls", "mean"]
    needs: frozenset[str] = frozenset()

    @property
    def roles(self) -> frozenset[str]:
        """The roles of the views that it sees: global ones, and those that it needs."""
        made = {"locals": "local", "plain": "plain", "turns": "turn"}
        return frozenset({"global", *(made[need] for need in self.needs if need in made)})

    def prepare(self, encoder: "SplitViT") -> None:
        """Fit to the encoder before training.

        Raises:
            ValueError: the encoder lacks what the add-on reads.
        """

    def forward(self, views: list[LayerView]) -> dict[str, Tensor]:
        """The losses of one batch.

        Args:
            views: those of its roles: global views first, then local ones, then what it needs besides.

        Returns:
            Scalars: "loss", and its parts by name, for the log.
        """
        raise NotImplementedError


class VectorAddOn(AddOn):
    """An add-on on (B, C) features, with a head of its own at each layer; the loss is the mean over the layers.

    Below the last layer a LayerNorm of its own comes before each head: features there have no norm yet.

    Args:
        heads: by layer.
        read: "cls", "mean", or "auto": the class token where all layers have one, else the mean of the patch tokens.
    """

    def __init__(self, heads: Mapping[int, nn.Module], *, read: Literal["auto", "cls", "mean"] = "auto") -> None:
        super().__init__()
        self.layers, self.read = tuple(heads), read
        self.reads = "mean" if read == "auto" else read
        self.heads = nn.ModuleDict({str(layer): head for layer, head in heads.items()})
        self.norms = nn.ModuleDict({str(layer): nn.Identity() for layer in heads})

    def prepare(self, encoder: "SplitViT") -> None:
        has_cls = getattr(encoder, "cls_token", None) is not None and min(self.layers) > encoder.split
        if self.read == "auto":
            self.reads = "cls" if has_cls else "mean"
        for layer in self.layers:
            if layer < encoder.depth:
                self.norms[str(layer)] = nn.LayerNorm(encoder.embed_dim, eps=1e-6)

    def forward(self, views: list[LayerView]) -> dict[str, Tensor]:
        by_layer = []
        for layer in self.layers:
            norm = self.norms[str(layer)]
            features = [norm(view.features[layer]) for view in views]
            by_layer.append(self.losses(self.heads[str(layer)], features, views))
        if len(by_layer) == 1:
            return by_layer[0]
        return {name: torch.stack([losses[name] for losses in by_layer]).mean() for name in by_layer[0]}

    def losses(self, head: nn.Module, features: list[Tensor], views: list[LayerView]) -> dict[str, Tensor]:
        """The losses of one layer: "loss" and its parts.

        Args:
            head: of the layer.
            features: of each view (B, C).
            views: as in `forward`.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class AddOnConfig:
    """The options of an add-on."""

    layers: Layers = "off"
    """Blocks after which it reads: numbers, "split" (where [CLS] enters), "last", "all" or "off"."""
    weight: float = 1.0
    """Of the term beside the invariance loss. 0 shapes nothing: it is computed on detached features, for comparison."""

    def build(self, dim: int, layers: tuple[int, ...], objective: str) -> AddOn:
        """The add-on on features of `dim` channels, at `layers`, beside the objective of that name."""
        raise NotImplementedError


def resolve_layers(layers: Layers, *, split: int, depth: int) -> tuple[int, ...]:
    """The layers, 0 to depth and ascending, that an option names in an encoder of `depth` blocks.

    Raises:
        ValueError: one that the encoder does not have.
    """
    if layers == "split" and split == 0:
        raise ValueError('layers: got "split", which is 0 here, the patch embedding itself; name the blocks, as 3')
    named = {"off": (), "split": (split,), "last": (depth,), "all": tuple(range(1, depth + 1))}
    found = named[layers] if isinstance(layers, str) else tuple(sorted(set(layers)))
    if out := [layer for layer in found if layer not in range(depth + 1)]:
        raise ValueError(f"layers: got {out[0]}, takes 0 to {depth}, the blocks of the encoder")
    return found
