"""Encoders whose equivariance is known, to measure beside a checkpoint: what the resampling itself costs, and none."""

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from ser_fast.lattice import LatticeMap
from ser_fast.ops.group_action import group_action
from ser_fast.views.pixels import transform_images


class TokenMaps(Protocol):
    """What the equivariance of token maps is measured of: a SplitViT, or anything with these two."""

    @property
    def patch_size(self) -> tuple[int, int]:
        """Sides of a patch in pixels."""

    def layer_maps(self, images: Tensor) -> list[Tensor]:
        """(B, H, W, C) for each layer, of normalized images (B, 3, Hp, Wp)."""


class PatchMeans(nn.Module):
    """The mean color of each patch: whatever error it has is the resampling's own, on the same lattice.

    Args:
        patch_size: sides of a patch, in pixels.
    """

    def __init__(self, patch_size: tuple[int, int]) -> None:
        super().__init__()
        self.patch_size = patch_size

    def layer_maps(self, images: Tensor) -> list[Tensor]:
        """One map (B, H, W, 3)."""
        return [F.avg_pool2d(images, self.patch_size).permute(0, 2, 3, 1)]


class AveragedOverD4(nn.Module):
    """The mean over D4 of rho(h)^-1 f(h x): exactly equivariant to D4, whatever f is, on square images.

    Args:
        model: f; it is walked eight times.
    """

    def __init__(self, model: TokenMaps) -> None:
        super().__init__()
        self.model = model

    @property
    def patch_size(self) -> tuple[int, int]:
        """Sides of a patch in pixels."""
        return self.model.patch_size

    def layer_maps(self, images: Tensor) -> list[Tensor]:
        """As the model's."""
        total: list[Tensor] = []
        lattice = images.shape[2] // self.patch_size[0], images.shape[3] // self.patch_size[1]
        for code in range(8):
            g = LatticeMap.d4((images.shape[2], images.shape[3]), code)
            moved = self.model.layer_maps(transform_images(images, g))
            back = [self._back(tokens, LatticeMap.d4(lattice, code).inverse()) for tokens in moved]
            total = back if not total else [a + b for a, b in zip(total, back, strict=True)]
        return [tokens / 8 for tokens in total]

    @staticmethod
    def _back(tokens: Tensor, g: LatticeMap) -> Tensor:
        moved = group_action(tokens, g.to(tokens.device))
        assert isinstance(moved, Tensor)  # without return_valid
        return moved
