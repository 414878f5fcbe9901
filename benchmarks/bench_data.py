"""From JPEG bytes to the two views of a picture, on one core: what the loader's processes do, and what others do there.

Ours decodes a picture and stretches it on a canvas; both views are cut and colored on the device, batch by batch, which
`bench_views` times by itself. The others hand over finished views. The floor is the decoder alone. What is compared is
CPU time, so that a busy machine changes little.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.resources import files
from io import BytesIO
from typing import Any

import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import v2

from ser_fast.data.photo_tiles import PHOTOGRAPHS
from ser_fast.data.pictures import decode, to_canvas
from ser_fast.training.config import ViewsConfig
from ser_fast.views.pixels import IMAGENET_MEAN, IMAGENET_STD

try:
    from lightly.transforms import MoCoV2Transform
except ImportError:
    MoCoV2Transform = None

SIDE, CANVAS, PATCH = 224, 512, 16


def _files(width: int, height: int) -> list[bytes]:
    """The photographs as JPEG files of a size."""
    encoded = []
    for name in PHOTOGRAPHS:
        with files("skimage").joinpath("data", name).open("rb") as file, Image.open(file) as image:
            data = BytesIO()
            ImageOps.fit(image.convert("RGB"), (width, height)).save(data, "jpeg", quality=90)
            encoded.append(data.getvalue())
    return encoded


def _packed(encoded: list[bytes]) -> Tensor:
    """(N, bytes) uint8, padded with zeros, which no decoder reads past the end of the image."""
    longest = max(map(len, encoded))
    return torch.stack([torch.frombuffer(bytearray(data.ljust(longest, b"\0")), dtype=torch.uint8) for data in encoded])


def _moco_v3() -> list[Callable[[Image.Image], Tensor]]:
    """The two views of MoCo-v3 as its authors released them, in torchvision's v2; blurred by PIL, as there."""

    def view(blur: float, solarize: float) -> Callable[[Image.Image], Tensor]:
        def blurred(image: Image.Image) -> Image.Image:
            return image.filter(ImageFilter.GaussianBlur(float(torch.empty(()).uniform_(0.1, 2.0))))

        return v2.Compose(
            [
                v2.RandomResizedCrop(SIDE, scale=(0.08, 1.0)),
                v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
                v2.RandomGrayscale(p=0.2),
                v2.RandomApply([v2.Lambda(blurred)], p=blur),
                v2.RandomSolarize(128, p=solarize),
                v2.RandomHorizontalFlip(),
                v2.PILToTensor(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            ]
        )

    return [view(1.0, 0.0), view(0.1, 0.2)]


def _each(make: Callable[[bytes], list[Tensor]]) -> Callable[[Tensor], Tensor]:
    """Packed files to the side of what is made of each, and how many parts it has: (N, 2)."""

    def run(packed: Tensor) -> Tensor:
        made = [make(row.numpy().tobytes()) for row in packed]
        return torch.tensor([[parts[0].shape[-1], len(parts)] for parts in made])

    return run


def _opened(transforms: list[Callable[[Image.Image], Tensor]]) -> Callable[[bytes], list[Tensor]]:
    def make(data: bytes) -> list[Tensor]:
        with Image.open(BytesIO(data)) as file:
            image = file.convert("RGB")
        return [transform(image) for transform in transforms]

    return make


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("width", "height"), [(500, 375), pytest.param(1600, 1200, marks=pytest.mark.large)])
def bench_pictures(compare, width: int, height: int) -> None:
    encoded = _files(width, height)

    def canvas(data: bytes) -> list[Tensor]:
        return [to_canvas(decode(data, "a file"), CANVAS)]

    rivals = {"canvas": _each(canvas), "torchvision v2 on PIL, MoCo-v3": _each(_opened(_moco_v3()))}
    if MoCoV2Transform is not None:
        lightly = MoCoV2Transform(input_size=SIDE).transforms
        rivals["lightly, MoCo-v2"] = _each(_opened(lightly))
    views = torch.tensor([[SIDE, 2]] * len(encoded))
    with _one_thread():
        compare(
            "pictures",
            rivals,
            _packed(encoded),
            oracle=lambda packed: torch.tensor([[CANVAS, 1]] * len(packed)),
            other=dict.fromkeys([name for name in rivals if name != "canvas"], lambda packed: views),
            floor=_each(lambda data: [decode(data, "a file")]),
            tolerance=dict.fromkeys(rivals, 0.0),
            ours="canvas",
            items=len(encoded),
            clock=time.process_time,
            pictures=len(encoded),
            pixels=f"{width}x{height}",
            time="CPU",
            kilobytes=sum(map(len, encoded)) // len(encoded) // 1000,
        )


class _Calls(TorchDispatchMode):
    """How many operators were called, those that only look at a tensor differently left out."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("batch", [64])
def bench_views(compare, device, batch: int) -> None:
    make = ViewsConfig().build(PATCH, 0, image_size=SIDE)
    canvases = torch.randint(256, (batch, 3, CANVAS, CANVAS), dtype=torch.uint8, device=device)
    samples, aspects = torch.arange(batch), torch.full((batch,), 4 / 3)

    def views(images: Tensor) -> Tensor:
        made = make(images, samples, 0, aspects).views
        return torch.tensor([sum(len(part) for part in view.images) for view in made])

    with _Calls() as calls:
        views(canvases)
    on_cpu = device.type == "cpu"
    with _one_thread():
        compare(
            "views on the device",
            {"views": views},
            canvases,
            oracle=lambda images: torch.tensor([batch, batch]),
            moved=canvases.numel() + 2 * batch * 3 * SIDE**2 * 4,
            tolerance={"views": 0.0},
            ours="views",
            items=batch,
            clock=time.process_time if on_cpu else time.perf_counter,
            B=batch,
            canvas=CANVAS,
            calls=calls.count,
            time="CPU" if on_cpu else "wall",
        )
