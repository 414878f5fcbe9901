"""Which part of a map's output shows its picture: the frames that the picture was cut by on its way.

A rotation within a frame fills the corners that come from outside of it. As one affine map, what follows knows nothing
of that frame: turned by 30 degrees and then mirrored, the corners are as black, and their preimages may all lie in the
picture. So each frame is kept beside the map, as a set of points of the output. A frame is a rectangle, and its
preimage under an affine map a parallelogram: where two bands cross, of the points u about the output's center with

    | y u_y + x u_x + shift | <= 1

Frames are (B, K, 3) tensors of such bands (y, x, shift), two for each frame, in the precision of maps.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def frame_of_lattice(linear: Tensor, offset: Tensor, size_in: Sequence[int]) -> Tensor:
    """(B, 2, 3) the frame of a map's own input lattice, of H x W tokens: |u_in - (H, W)/2| <= (H, W)/2."""
    half = linear.new_tensor(size_in)[:, None] / 2
    return torch.cat([linear, offset[:, :, None]], -1) / half


def frames_through(frames: Tensor, linear: Tensor, offset: Tensor) -> Tensor:
    """The frames on a map's input as frames on its output."""
    directions = frames[:, :, :2]
    shift = frames[:, :, 2:] + directions @ offset[:, :, None]
    return torch.cat([directions @ linear, shift], -1)


def join_frames(frames: Sequence[Tensor], batch: int) -> Tensor | None:
    """All these frames, each of a batch of maps or of one for all, as those of a batch of maps; None for none."""
    return torch.cat([of.expand(batch, -1, 3) for of in frames], 1) if frames else None


def cat_frames(frames: Sequence[Tensor | None], maps: Sequence[Tensor]) -> Tensor | None:
    """The frames of several batches of maps (their `linear`) as those of one batch."""
    most = max([0, *(of.shape[1] for of in frames if of is not None)])  # torch.compile knows no `default`
    if most == 0:
        return None
    padded = []
    for of, linear in zip(frames, maps, strict=True):
        of = linear.new_zeros(len(linear), 0, 3) if of is None else of
        everywhere = linear.new_zeros(len(linear), most - of.shape[1], 3)  # |0| <= 1
        padded.append(torch.cat([of, everywhere], 1))
    return torch.cat(padded)


def in_frames(frames: Tensor, y: Tensor, x: Tensor, tolerance: float) -> Tensor:
    """(B, N) bool: whether points (N,) of the output, about its center, are in all frames, or as near as tolerance."""
    directions = frames[:, :, :2]
    place = directions[:, :, :1] * y + directions[:, :, 1:] * x + frames[:, :, 2:]  # (B, K, N)
    return (place.abs() <= 1 + tolerance * directions.norm(dim=-1, keepdim=True)).all(1)
