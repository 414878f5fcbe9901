"""What a view shows of its image, read off its LatticeMap: where, how large, mirrored, turned."""

from typing import NamedTuple

import torch
from torch import Tensor

from ser_fast.lattice import LatticeMap


class Geometry(NamedTuple):
    """What B views show of their images.

    Attributes:
        center: (B, 2) of the view in the image, less the image's own, relative to the image's height and width.
        extent: (B, 2) height and width of the box around what the view shows, relative to the image's.
        mirrored: (B,) bool.
        turn: (B, 2) cosine and sine of the counter-clockwise rotation, after a mirroring left and right.
    """

    center: Tensor
    extent: Tensor
    mirrored: Tensor
    turn: Tensor

    @property
    def quarter_turns(self) -> Tensor:
        """(B,) int64, the number 0 to 3 of counter-clockwise quarter turns, to the nearest."""
        angle = torch.atan2(self.turn[:, 1], self.turn[:, 0])
        return (angle / (torch.pi / 2)).round().long() % 4

    @property
    def columns(self) -> Tensor:
        """(B, 7): center, extent, mirrored, turn."""
        return torch.cat([self.center, self.extent, self.mirrored[:, None].to(self.center), self.turn], 1)


def geometry(g: LatticeMap) -> Geometry:
    """The geometry of the views that g makes of images; float64, on g's device."""
    on_square = g.on((1, 1), (1, 1))
    linear, center = on_square.linear, on_square.offset
    mirrored = torch.linalg.det(linear) < 0
    unmirrored = torch.where(mirrored[:, None, None], linear * linear.new_tensor([[1.0], [-1.0]]), linear)
    (a, b), (c, d) = unmirrored.permute(1, 2, 0)
    turn = torch.nn.functional.normalize(torch.stack([a + d, b - c], -1), dim=-1)
    return Geometry(center, linear.abs().sum(-1), mirrored, turn)
