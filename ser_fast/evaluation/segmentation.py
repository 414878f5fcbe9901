"""Segmentation: how well a frozen encoder's tokens tell what each pixel shows."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resize, to_dtype

from ser_fast.data import MAX_PIXELS
from ser_fast.evaluation import TOKEN_RATES
from ser_fast.evaluation.features import evaluating
from ser_fast.evaluation.figures import save
from ser_fast.evaluation.linear_probe import check_probe
from ser_fast.evaluation.protocol import Models, check_image_size, check_positive, device_of, with_controls
from ser_fast.evaluation.segmentation_heads import (
    Head,
    Overlap,
    Retrieval,
    classes_of,
    count_pixels,
    overlap,
    predict,
    train_head,
)
from ser_fast.evaluation.segmentation_sets import IGNORED, SegmentationSet, open_segmentation
from ser_fast.evaluation.synthetic_coco import write_shapes
from ser_fast.evaluation.tables import write_table
from ser_fast.io import printable
from ser_fast.lattice import Size
from ser_fast.progress import track
from ser_fast.views.pixels import normalize
from ser_fast.vit import SplitViT

COLORS = "patch colors"
"""In the tables: what the mean color of each patch is worth. An encoder that isn't above it sees no more than color."""
GUESS = "a guess"
"""In the tables: every pixel is of the class that the training masks have most of."""
METHODS = ("linear", "retrieval")

_LARGEST = 512  # the default side in pixels, unless the model's own is larger
_SHOWN = 5  # images of the figure


# ---------------------------------------------------------------- results


@dataclass(frozen=True)
class SegmentationRecord:
    """How one method did on one layer's tokens; `_low` to `_high` are 95 % bootstrap intervals over images.

    Attributes:
        method: "linear" or "retrieval"; "largest class" of a guess.
        layer: blocks before the tokens; 0 for none.
        miou: the mean intersection over union of the classes.
        accuracy: the share of pixels predicted right.
        rate: the learning rate that was chosen; nan for what isn't trained.
        held_out_miou: on held-out training images at that rate.
        images: held-out images.
    """

    method: str
    layer: int
    miou: float
    miou_low: float
    miou_high: float
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    rate: float
    held_out_miou: float
    images: int


@dataclass(frozen=True)
class ClassRecord:
    """The intersection over union of a class, nan where no mask and no prediction has it, and its 95 % interval."""

    method: str
    layer: int
    name: str
    iou: float
    iou_low: float
    iou_high: float
    pixels: int


class Shown(NamedTuple):
    """A picture of the figure.

    Attributes:
        image: (3, H, W) uint8.
        masks: (H, W) uint8 each: the "truth", then what each model's linear head predicts, by name.
    """

    image: Tensor
    masks: dict[str, Tensor]


@dataclass(frozen=True)
class SegmentationResult:
    """What the tokens of checkpoints, their random controls, the colors of patches and a guess are worth.

    Attributes:
        records: of each method and layer, by model.
        classes: of each method, layer and class, by model.
        shown: pictures of the figure.
        names: of the K classes.
        data: where the images are from.
    """

    records: dict[str, list[SegmentationRecord]]
    classes: dict[str, list[ClassRecord]]
    shown: list[Shown]
    names: list[str]
    data: str

    def write(self, folder: Path) -> list[Path]:
        """Write segmentation.csv, segmentation_classes.csv and segmentation.png; returns their paths."""
        return [
            write_table(self.records, folder / "segmentation.csv"),
            write_table(self.classes, folder / "segmentation_classes.csv"),
            plot(self.shown, len(self.names), folder / "segmentation.png"),
        ]

    def print(self, console: Console | None = None) -> None:
        """Print mean IoU and pixel accuracy with their intervals, a row a model, method and layer."""
        title = f"Segmentation of held-out images of {escape(printable(self.data))}"
        table = Table("", "method", title=title, box=SIMPLE_HEAD, padding=0)
        for heading in ("layer", "mean IoU (95 % interval)", "pixel accuracy"):
            table.add_column(heading, justify="right")
        for name, records in self.records.items():
            for r in records:
                cells = (
                    f"{value:.3f} ({low:.3f} to {high:.3f})"
                    for value, low, high in (
                        (r.miou, r.miou_low, r.miou_high),
                        (r.accuracy, r.accuracy_low, r.accuracy_high),
                    )
                )
                table.add_row(escape(printable(name)), r.method, str(r.layer or ""), *cells)
        (console or Console()).print(table)


def plot(shown: Sequence[Shown], classes: int, path: Path) -> Path:
    """Draw pictures, their masks and what each model's linear head predicts: a row each, a column a picture.

    Args:
        shown: the pictures, with the same masks each.
        classes: K, which gives the colors; ignored pixels are white.
        path: of the figure.
    """
    names = list(shown[0].masks)
    figure = Figure(figsize=(1.9 * len(shown) + 0.3, 1.9 * (1 + len(names))), layout="constrained")
    panels = figure.subplots(1 + len(names), len(shown), squeeze=False)
    for column, picture in enumerate(shown):
        panels[0, column].imshow(picture.image.permute(1, 2, 0).numpy())
        for row, name in enumerate(names, start=1):
            mask = np.ma.masked_equal(picture.masks[name].numpy(), IGNORED)
            panels[row, column].imshow(
                mask, cmap="tab10" if classes <= 10 else "tab20", vmin=0, vmax=9 if classes <= 10 else 19
            )
    for axes, name in zip(panels[:, 0], ("image", *names), strict=True):
        axes.set_ylabel(name)
    for axes in panels.flat:
        axes.set(xticks=[], yticks=[])
    return save(figure, path)


# ---------------------------------------------------------------- tokens


class PatchColors(nn.Module):
    """The mean color of each patch as points on three circles: the farther two colors, the smaller their cosine.

    Args:
        patch_size: sides of a patch, in pixels.
    """

    def __init__(self, patch_size: tuple[int, int]) -> None:
        super().__init__()
        self.patch_size = patch_size

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, H, W, 6) of pixels (B, 3, Hp, Wp) in [0, 1]."""
        angles = math.pi * F.avg_pool2d(pixels, self.patch_size).permute(0, 2, 3, 1)
        return torch.cat([angles.sin(), angles.cos()], -1)


class _Tokens(NamedTuple):
    """Tokens of one layer of one encoder.

    Attributes:
        model: on its device.
        layer: blocks before the tokens; the last one's go through the final norm.
    """

    model: SplitViT | PatchColors
    layer: int

    def __call__(self, images: Tensor) -> Tensor:
        """(B, H, W, C) of images (B, 3, S, S) uint8 on the model's device."""
        pixels = to_dtype(images, torch.float32, scale=True)
        if isinstance(self.model, PatchColors):
            return self.model(pixels)
        tokens = self.model.encode(normalize(pixels), (self.layer,), until=self.layer).tokens[self.layer]
        return (self.model.norm_final(tokens) if self.layer == self.model.depth else tokens).float()


@contextmanager
def _training_tokens(
    read: _Tokens, dataset: SegmentationSet, rows: Sequence[int], size: Size, device: torch.device, *, progress: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens (N, H, W, C) float32 and masks (N, S, S) uint8 of pictures stretched to a size, on disk until the end."""
    with TemporaryDirectory() as folder:
        tokens = masks = torch.empty(0)
        for number, row in enumerate(track(rows, "tokens", show=progress)):
            picture = dataset[row]
            found = read(resize(picture.image[None], list(size), antialias=True).to(device))[0].cpu()
            if not number:
                shape, square = (len(rows), *found.shape), (len(rows), *size)
                tokens = torch.from_file(
                    f"{folder}/tokens", shared=True, size=math.prod(shape), dtype=torch.float32
                ).view(shape)
                masks = torch.from_file(f"{folder}/masks", shared=True, size=math.prod(square), dtype=torch.uint8).view(
                    square
                )
            tokens[number] = found
            masks[number] = resize(picture.mask[None], list(size), InterpolationMode.NEAREST_EXACT)[0]
        yield tokens, masks


def _spread(length: int, count: int | None) -> list[int]:
    """So many numbers evenly over 0 ... length - 1; all where there are no more."""
    return torch.linspace(0, length - 1, length if count is None else min(count, length)).long().tolist()


# ---------------------------------------------------------------- the protocol


def evaluate(
    models: Models,
    data: Path | str | None = None,
    *,
    layers: Sequence[int] | None = None,
    rates: Sequence[float] = TOKEN_RATES,
    epochs: int = 10,
    held_out: float = 0.1,
    batch_size: int = 16,
    k: int = 30,
    temperature: float = 0.02,
    bank: int = 20_000,
    images: int | None = None,
    image_size: int | None = None,
    max_pixels: int = MAX_PIXELS,
    seed: int = 0,
    folder: Path | None = None,
    progress: bool = False,
) -> SegmentationResult:
    """Predict the class of each pixel from frozen tokens, beside random initializations, colors and a guess.

    Pictures are stretched to a square; scores between the tokens are bilinear; each held-out picture is scored at its
    own pixels.

    Args:
        models: on their device; one, or several by name.
        data: a folder as Pascal VOC has it, or in COCO's layout with masks; default materials in
            shapes (`write_shapes`).
        layers: blocks before the tokens, 1 to the depth; default each model's last.
        rates: learning rates of the linear head, trained side by side; one is chosen on held-out training images.
        epochs: passes over the training images.
        held_out: share of the training images that the rate is chosen on.
        batch_size: images a step of the linear head.
        k: neighbors of a token, for the retrieval.
        temperature: of their weights.
        bank: training tokens that are neighbors, at most.
        images: of the training images and of the held-out ones, spread evenly; default all.
        image_size: side of the square in pixels; default twice the model's, at most 512 unless the model's is more.
        max_pixels: of one picture; more is an error, since all of them are scored.
        seed: of the held-out share, the order, the bank, the bootstrap and the generated set.
        folder: of the generated set; None keeps none.
        progress: show bars on the terminal.

    Raises:
        ValueError: data in another layout, layers or an image size that a model can't take, or options out of range;
            before anything is read from the tokens.

    Example:
        >>> result = evaluate(load_split_vit("encoder.safetensors"), "VOCdevkit/VOC2012")
        >>> result.records["checkpoint"][0].miou
        0.31
        >>> result.write(Path("results"))
    """
    check_positive(k=k, temperature=temperature, bank=bank, images=images, image_size=image_size)
    compared = with_controls(models)
    for name, model in compared.items():
        if wrong := [layer for layer in layers or () if layer not in range(1, model.depth + 1)]:
            raise ValueError(f"layers: got {wrong[0]}, {name} takes 1 to {model.depth}")
    sizes = {name: check_image_size(model, image_size or _default_size(model)) for name, model in compared.items()}
    with TemporaryDirectory() if folder is None else nullcontext(folder) as kept:
        if data is None:
            data, source = Path(kept) / f"materials_{seed}", "the generated set"
            if not (data / "annotations" / "instances_val.json").is_file():  # what is written last
                write_shapes(data, seed=seed)
        else:
            source = str(data)
        train_set, test_set = open_segmentation(Path(data), max_pixels=max_pixels)
        train_rows, test_rows = (_spread(len(part), images) for part in (train_set, test_set))
        check_probe(rates, epochs, batch_size, None, held_out, len(train_rows))

        result = SegmentationResult({}, {}, [], train_set.classes, source)
        pictures = [test_set[row] for row in test_rows[:: max(1, len(test_rows) // _SHOWN)][:_SHOWN]]
        result.shown.extend(Shown(picture.image, {"truth": picture.mask}) for picture in pictures)
        first = next(iter(compared.values()))
        readers = {
            name: [_Tokens(model, layer) for layer in layers or (model.depth,)] for name, model in compared.items()
        }
        readers[COLORS] = [_Tokens(PatchColors(first.patch_size), 0)]
        sizes[COLORS] = sizes[next(iter(compared))]
        device = device_of(first)
        pixels = torch.zeros(len(train_set.classes), dtype=torch.int64)
        for name, model_readers in readers.items():
            for read in model_readers:
                size = (sizes[name], sizes[name])
                with (
                    evaluating(read.model),
                    _training_tokens(read, train_set, train_rows, size, device, progress=progress) as (tokens, masks),
                ):
                    pixels = torch.bincount(masks[masks != IGNORED].long(), minlength=len(pixels))
                    with torch.enable_grad():
                        linear = train_head(
                            tokens,
                            masks,
                            classes=len(train_set.classes),
                            rates=rates,
                            epochs=epochs,
                            batch_size=batch_size,
                            held_out=held_out,
                            seed=seed,
                            device=device,
                            progress=progress,
                        )
                    retrieval = Retrieval(
                        tokens,
                        masks,
                        classes=len(train_set.classes),
                        k=k,
                        temperature=temperature,
                        bank=bank,
                        seed=seed,
                    ).to(device)
                    heads: dict[str, Head] = {"linear": linear.head, "retrieval": retrieval}
                    counts: dict[str, list[Tensor]] = {method: [] for method in heads}
                    for row in track(test_rows, "segmenting", show=progress):
                        picture = test_set[row]
                        found = read(resize(picture.image[None], list(size), antialias=True).to(device))
                        for method, head in heads.items():
                            counts[method].append(predict(head, found, picture.mask))
                    if read is model_readers[-1]:
                        for picture, shown in zip(pictures, result.shown, strict=True):
                            found = read(resize(picture.image[None], list(size), antialias=True).to(device))
                            height, width = picture.mask.shape
                            shown.masks[name] = classes_of(linear.head(found), (height, width)).byte()
                chosen = {"linear": (linear.rate, linear.held_out[linear.rate]), "retrieval": (math.nan, math.nan)}
                for method, of in counts.items():
                    graded = overlap(torch.stack(of), seed=seed)
                    _add(result, name, method, read.layer, graded, *chosen[method])
        largest = int(pixels.argmax())
        guesses = [
            count_pixels(torch.full(mask.shape, largest), mask, len(pixels))
            for mask in (test_set[row].mask for row in test_rows)
        ]
        _add(result, GUESS, "largest class", 0, overlap(torch.stack(guesses), seed=seed), math.nan, math.nan)
        return result


def _default_size(model: SplitViT) -> int:
    """Twice the model's side, at most the larger of it and 512, in whole patches."""
    side, patch = model.image_size[0], model.patch_size[0]
    return min(2 * side, max(side, _LARGEST // patch * patch))


def _add(
    result: SegmentationResult, name: str, method: str, layer: int, graded: Overlap, rate: float, held_out: float
) -> None:
    miou, accuracy = graded.miou, graded.accuracy
    bounds = (miou.value, miou.low, miou.high, accuracy.value, accuracy.low, accuracy.high)
    record = SegmentationRecord(method, layer, *bounds, rate, held_out, graded.images)
    result.records.setdefault(name, []).append(record)
    result.classes.setdefault(name, []).extend(
        ClassRecord(method, layer, category, iou.value, iou.low, iou.high, pixels)
        for category, iou, pixels in zip(result.names, graded.iou, graded.pixels.tolist(), strict=True)
    )
