"""What an add-on is: an equivariance term at one layer or several. It knows no objective."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor, nn

from ser_fast.lattice import LatticeMap

Layers = tuple[int, ...] | Literal["off", "split", "last", "all"]
"""Where an add-on reads: numbers of blocks, or "split" (where the prefix tokens enter), "last", "all", or "off"."""


class LayerView(NamedTuple):
    """One view, as an add-on sees it: the samples of the equivariance share alone.

    Attributes:
        features: by layer, (B, H, W, C) where the add-on reads "tokens", else (B, C). The last layer's are after the
            encoder's final norm.
        teacher: the same of the teacher, without gradient; None unless the add-on needs "teacher".
        g: the maps from the images to this view, in pixels.
        color: (B, P) what was drawn for the colors; None unless the add-on needs "color".
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
        needs: of "teacher" (the teacher's features), "color" (the draws of every sample's colors), "plain" (a view of
            the image itself), "turns" (four quarter turns of a small crop), "pairs" (neighbors share their draws).
    """

    layers: tuple[int, ...]
    reads: Literal["tokens", "cls", "mean"]
    needs: frozenset[str] = frozenset()

    def forward(self, views: list[LayerView]) -> dict[str, Tensor]:
        """The losses of one batch.

        Args:
            views: global views first; then those that the add-on needs.

        Returns:
            Scalars: "loss", and its parts by name, for the log.
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
