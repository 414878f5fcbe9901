"""The map g on images, one resampling, against what others have for the same map."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ser_fast import LatticeMap
from ser_fast.views.pixels import transform_images

try:
    from kornia.geometry.transform import warp_affine
except ImportError:
    warp_affine = None
try:
    import torchtransform
except ImportError:
    torchtransform = None

Rival = Callable[[Tensor], Tensor]
BATCH, SIZE_IN, SIZE_OUT = 32, (256, 256), (224, 224)


def _map(name: str) -> LatticeMap:
    if name == "rotation":
        return LatticeMap.resize(SIZE_IN, SIZE_OUT) @ LatticeMap.rotate(SIZE_IN, torch.linspace(-40, 40, BATCH))
    extent = torch.linspace(80, 220, BATCH)  # enlarged, or hardly reduced: no antialiasing
    boxes = torch.stack([30 - extent / 10, extent / 8, extent, extent], 1)
    return LatticeMap.d4(SIZE_OUT, 4 * (torch.arange(BATCH) % 2)) @ LatticeMap.crop(SIZE_IN, boxes, SIZE_OUT)


def _grid_sample(g: LatticeMap) -> Rival:
    def sample(images: Tensor) -> Tensor:
        grid = F.affine_grid(g.theta(images.dtype), [*images.shape[:2], *g.size_out], align_corners=False)
        return F.grid_sample(images, grid, "bilinear", "border", align_corners=False)

    return sample


def _forward(g: LatticeMap) -> Tensor:
    """(B, 3, 3) float64, from the images to the views, about both centers and in (x, y)."""
    forward = g.inverse()
    matrix = torch.eye(3, dtype=torch.float64).repeat(len(g), 1, 1)
    matrix[:, :2, :2], matrix[:, :2, 2] = forward.linear.flip(-1, -2), forward.offset.flip(-1)
    return matrix


def _torchtransform(g: LatticeMap) -> Rival:
    class Given(torchtransform.CanvasTransform):
        def get_output_shape(self, context: object) -> tuple[int, ...]:
            return g.size_out

        def get_matrices(self, context: object, output_shape: tuple[int, ...]) -> Tensor:
            return _forward(g)

    transform = Given()
    return lambda images: transform(torchtransform.Image(images, padding="border", antialias=False))


def _kornia(g: LatticeMap) -> Rival:
    def pixels(size: tuple[int, int], sign: int) -> Tensor:
        """From pixel indices to coordinates about the center, or with sign -1 back."""
        shift = torch.eye(3, dtype=torch.float64)
        shift[:2, 2] = -sign * (torch.tensor(size[::-1], dtype=torch.float64) - 1) / 2
        return shift

    matrix = (pixels(g.size_out, -1) @ _forward(g) @ pixels(g.size_in, 1))[:, :2]

    def warp(images: Tensor) -> Tensor:
        return warp_affine(images, matrix.to(images), g.size_out, padding_mode="border", align_corners=True)

    return warp


@pytest.mark.parametrize("name", ["crop and mirror", "rotation"])
def bench_images(compare, device, name: str) -> None:
    g = _map(name)
    images = torch.rand(BATCH, 3, *SIZE_IN, device=device)
    here = g.to(device)
    rivals: dict[str, Rival] = {"transform_images": lambda x: transform_images(x, g, interpolation="bilinear")}
    if name != "rotation":  # of which ours is one
        rivals["grid_sample"] = _grid_sample(here)
    if torchtransform is not None:
        rivals["torchtransform"] = _torchtransform(g)
    if warp_affine is not None:
        rivals["kornia"] = _kornia(g)
    compare(
        "images",
        rivals,
        images,
        oracle=_grid_sample(here),
        moved=images.element_size() * BATCH * 3 * (SIZE_IN[0] * SIZE_IN[1] + SIZE_OUT[0] * SIZE_OUT[1]),
        tolerance=dict.fromkeys(rivals, 1e-3),
        ours="transform_images",
        items=BATCH,
        map=name,
        interpolation="bilinear",
        B=BATCH,
        pixels=f"{SIZE_IN[0]}x{SIZE_IN[1]}->{SIZE_OUT[0]}x{SIZE_OUT[1]}",
    )
