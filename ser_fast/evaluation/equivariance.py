"""How equivariant a model's token maps are: f(g x) against rho(g) f(x), for each layer and each g.

g moves the pixels of an image x, rho(g) moves the tokens f(x) of a layer along it (`group_action`).
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torchvision.transforms.v2.functional import to_dtype

from ser_fast.data import MAX_PIXELS
from ser_fast.data.sources import open_dataset
from ser_fast.evaluation.features import evaluating, spread_images
from ser_fast.evaluation.figures import save
from ser_fast.evaluation.protocol import (
    DEFAULT_DATA,
    check_image_size,
    check_images,
    check_positive,
    device_of,
    tell_skipped,
    with_control,
)
from ser_fast.evaluation.tables import write_table
from ser_fast.evaluation.transformations import (
    Prediction,
    check_prediction,
    predict_transformations,
    print_predictions,
)
from ser_fast.lattice import LatticeMap, Size
from ser_fast.ops.group_action import group_action
from ser_fast.progress import track
from ser_fast.views.pixels import normalize, transform_images
from ser_fast.vit import SplitViT

D4_NAMES = ("identity", "rot90", "rot180", "rot270", "hflip", "transpose", "vflip", "antitranspose")  # by d4_code
AREAS = (0.7, 1.3)
ASPECTS = (3 / 4, 4 / 3)  # width / height

# Of the energy of a layer's tokens: less variance than this is what float32 leaves of a constant.
NO_VARIANCE = 1e-12
# Cosines this close tie: the rounding of a float32 product.
_TIE = 1e-6

_METRICS = {
    "relative_error": "Relative error (0: equivariant, 1: no better than the mean token)",
    "aligned_cosine": "Aligned cosine (1: equivariant)",
    "retrieval": "Token retrieval, hit@1 (1: equivariant)",
    "hit5": "Token retrieval, hit@5 (1: equivariant)",
    "mrr": "Token retrieval, mean reciprocal rank (1: equivariant)",
}
_CHANCES = {"retrieval": "chance", "hit5": "chance_hit5", "mrr": "chance_mrr"}
_GROUPS = {"D4": "rotations and flips (D4)", "resampled": "scales (resampled)"}
_LAYERS_WIDE = 12  # side by side in a table of 80 columns

_Key = tuple[str, int]  # element and layer


@dataclass(frozen=True)
class LayerRecord:
    """How equivariant one layer is to one g, over all images and all valid tokens (see `equivariance_errors`).

    Attributes:
        layer: the number of blocks up to it, from 1.
        element: the name of g.
        group: "identity"; "D4", where g only copies tokens and pixels; or "resampled".
        relative_error: sqrt(sum |rho f(x) - f(gx)|^2 / sum |f(gx) - m|^2), m the mean token of f(gx).
        aligned_cosine: the mean cosine of rho f(x) and f(gx), each less its mean token.
        retrieval: how often the token of rho f(x) most like a token of f(gx) is the one in its place.
        chance: the retrieval of a guess, 1 / valid tokens.
        valid_share: the share of tokens whose preimage lies in the image.
        images: how many.
        hit5: how often the one in its place is among the five most like it.
        mrr: the mean of 1 / its rank among the tokens of rho f(x).
        chance_hit5, chance_mrr: those of a guess, min(5, n) / n and (1 + 1/2 + ... + 1/n) / n for n valid tokens.
    """

    layer: int
    element: str
    group: str
    relative_error: float
    aligned_cosine: float
    retrieval: float
    chance: float
    valid_share: float
    images: int
    hit5: float
    mrr: float
    chance_hit5: float
    chance_mrr: float


def default_elements(size: Size) -> dict[str, LatticeMap]:
    """The eight elements of D4 and four changes of scale in whole tokens.

    The scales are the corners of SER's recipe: areas 0.7 and 1.3, and aspects 3/4 and 4/3 at the same area, each
    rounded to h x w whole tokens and named so. Those that a small lattice rounds to itself are left out.

    Args:
        size: (H, W) of the lattice, in tokens.

    Returns:
        Name: one map of that lattice.
    """
    elements = {name: LatticeMap.d4(size, code) for code, name in enumerate(D4_NAMES)}
    for area, aspect in [*((area, 1.0) for area in AREAS), *((1.0, aspect) for aspect in ASPECTS)]:
        h, w = round(size[0] * math.sqrt(area / aspect)), round(size[1] * math.sqrt(area * aspect))
        if (h, w) != size:
            elements[f"{h}x{w}"] = LatticeMap.resize(size, (h, w))
    return elements


def equivariance_errors(
    model: SplitViT,
    images: Tensor,
    *,
    elements: Mapping[str, LatticeMap] | None = None,
    batch_size: int = 64,
    interpolation: str = "bicubic",
    padding: str = "border",
    progress: bool = False,
) -> list[LayerRecord]:
    """Compare f(g x) with rho(g) f(x), for the tokens f of every block and every g.

    Tokens whose preimage lies outside the image are left out. The mean tokens are taken off so that a constant f gains
    nothing: a layer whose tokens are all alike has nan for its measures. A map that says only which image it is from,
    the same everywhere, still has error 0: read retrieval beside it, which looks for a token among those of its own
    image and where tokens that tie share their ranks. Sums are float64, over two passes: the first for the means.

    The embedding itself is no layer here, but the positions it adds are in every layer.

    Args:
        model: a SplitViT, or anything with its patch_size and layer_maps.
        images: (N, 3, Hp, Wp) uint8, on the model's device; sides in pixels, multiples of the patch size.
        elements: name: one map of the token lattice (Hp / patch, Wp / patch); default `default_elements`.
        batch_size: images at a time.
        interpolation, padding: how g resamples pixels and tokens alike (see `transform_images`, `group_action`).
        progress: show a bar on the terminal.

    Returns:
        A record for each element and layer.

    Raises:
        TypeError: images of another type.
        ValueError: images of another shape, or an element that isn't one map of their lattice or has no valid token.

    Example:
        >>> model = load_split_vit("encoder.safetensors")
        >>> records = {"checkpoint": equivariance_errors(model, images)}
        >>> records["random"] = equivariance_errors(random_control(model), images)
    """
    size = check_images(model, images)
    elements = default_elements(size) if elements is None else elements
    for name, g in elements.items():
        if g.size_in != size or len(g) != 1:
            raise ValueError(f"elements: {name!r} is {len(g)} maps of a {g.size_in} lattice, takes 1 of {size}")
        if not bool(g.valid().any()):
            raise ValueError(f"elements: {name!r} leaves no valid token")

    resampling = {"interpolation": interpolation, "padding": padding}
    pairs = partial(_pairs, model, elements=elements, resampling=resampling)
    bar = partial(track, images.split(batch_size), show=progress)
    with evaluating(model):
        sums = _sum(
            (key, torch.stack([moved.sum((0, 1)), target.sum((0, 1))]))  # (2, C)
            for key, moved, target in pairs(bar("mean tokens"))
        )
        means = {key: total / (len(images) * int(elements[key[0]].valid().sum())) for key, total in sums.items()}
        totals = _sum((key, _compare(moved, target, *means[key])) for key, moved, target in pairs(bar("equivariance")))
    return [_record(key, elements[key[0]], len(images), total) for key, total in totals.items()]


def plot(records: Mapping[str, Sequence[LayerRecord]], path: Path, *, split: int | None = None) -> Path:
    """Draw relative error against layer: one line a model, one panel the mean over D4, one that over the scales.

    Args:
        records: those of each model, by name.
        path: the figure, in the format of its suffix (.png, .pdf, .svg).
        split: the last layer before the prefix tokens, to mark it.
    """
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, len(_GROUPS), sharey=True)
    for axes, (group, title) in zip(panels, _GROUPS.items(), strict=True):
        for name, model_records in records.items():
            errors = _means(model_records, group, "relative_error")
            axes.plot(list(errors), list(errors.values()), marker="o", label=name)
        axes.axhline(1, color="grey", linewidth=1, linestyle=":", label="mean token")
        if split is not None:
            axes.axvline(split, color="grey", linewidth=1, linestyle="--", label="split")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set(title=title, xlabel="layer", ylim=(0, None))
    panels[0].set_ylabel("relative error")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper")
    return save(figure, path)


def print_table(records: Mapping[str, Sequence[LayerRecord]], console: Console | None = None) -> None:
    """Print a table for each measure: a section a model, by name, a row an element and a column a layer."""
    console = console or Console()
    layers = sorted({record.layer for model_records in records.values() for record in model_records})
    for metric, title in _METRICS.items():
        console.print(title, highlight=False)
        for start in range(0, len(layers), _LAYERS_WIDE):
            table = Table("", box=SIMPLE_HEAD, padding=0)
            columns = layers[start : start + _LAYERS_WIDE]
            for layer in columns:
                table.add_column(str(layer), justify="right")
            for name, model_records in records.items():
                rows = {f"mean {group}": _means(model_records, group, metric) for group in _GROUPS}
                for record in model_records:
                    rows.setdefault(record.element, {})[record.layer] = getattr(record, metric)
                table.add_section()
                table.add_row(name, style="bold")
                for element, values in rows.items():
                    if values:
                        table.add_row(element, *(f"{values[layer]:.2f}" for layer in columns))
                if metric in _CHANCES:
                    guess = fmean(getattr(record, _CHANCES[metric]) for record in model_records)
                    table.add_row("a guess, mean", *(f"{guess:.2f}" for _ in columns))
            console.print(table)


def _means(records: Sequence[LayerRecord], group: str, metric: str) -> dict[int, float]:
    """Layer: the mean of a measure over the elements of a group."""
    values: dict[int, list[float]] = {}
    for record in records:
        if record.group == group:
            values.setdefault(record.layer, []).append(getattr(record, metric))
    return {layer: fmean(values[layer]) for layer in sorted(values)}


def _pairs(
    model: SplitViT, batches: Iterable[Tensor], *, elements: Mapping[str, LatticeMap], resampling: dict[str, Any]
) -> Iterator[tuple[_Key, Tensor, Tensor]]:
    """(element, layer), rho(g) f(x) and f(g x): for each batch the n valid tokens of both, (B, n, C) float64."""
    patch_height, patch_width = model.patch_size
    for images in batches:  # (B, 3, Hp, Wp) uint8
        pixels = to_dtype(images, torch.float32, scale=True)
        maps = model.layer_maps(normalize(pixels))  # (B, H, W, C) each
        for name, g in elements.items():
            (height, width), (h, w) = g.size_in, g.size_out
            g_pixels = g.on((height * patch_height, width * patch_width), (h * patch_height, w * patch_width))
            transformed = transform_images(pixels, g_pixels, **resampling).clamp(0, 1)
            maps_after = model.layer_maps(normalize(transformed))  # (B, h, w, C) each
            g = g.to(images.device)
            valid = g.valid()[0].unflatten(0, (h, w))  # (h, w)
            for layer, (before, after) in enumerate(zip(maps, maps_after, strict=True), start=1):
                moved: Any = group_action(before, g, **resampling)  # (B, h, w, C)
                yield (name, layer), moved[:, valid].double(), after[:, valid].double()


def _sum(terms: Iterable[tuple[_Key, Tensor]]) -> dict[_Key, Tensor]:
    totals: dict[_Key, Tensor] = {}
    for key, term in terms:
        totals[key] = totals[key] + term if key in totals else term
    return totals


def token_sums(moved: Tensor, target: Tensor, mean_moved: Tensor, mean_target: Tensor) -> Tensor:
    """(B, 4) sums over the tokens of each image: squared error, variance and energy of the target, cosine.

    moved, target: (B, n, C) float64, rho(g) f(x) and f(g x); mean_moved, mean_target: (C,), their mean tokens.
    """
    a, b = moved - mean_moved, target - mean_target  # (B, n, C)
    aa, bb = a.square().sum(-1), b.square().sum(-1)  # (B, n)
    # The root of the product and not the product of roots: equal tokens have a cosine of exactly 1. That of 0 is 0.
    cosine = (a * b).sum(-1) / (aa * bb).sqrt().clamp(min=torch.finfo(torch.float64).tiny)
    return torch.stack(
        [(moved - target).square().sum((1, 2)), bb.sum(1), target.square().sum((1, 2)), cosine.sum(1)], 1
    )


def retrieval_sums(moved: Tensor, target: Tensor, mean_moved: Tensor, mean_target: Tensor) -> Tensor:
    """(B, 3) sums over the target tokens of each image that seek their own among its moved tokens: hit at 1, hit at 5
    and reciprocal rank; arguments as `token_sums`.
    """
    a, b = F.normalize(moved - mean_moved, dim=-1).float(), F.normalize(target - mean_target, dim=-1).float()
    similarity = b @ a.mT  # (B, n, n)
    margin = similarity - similarity.diagonal(dim1=1, dim2=2)[..., None]  # over that of the token in its place
    nearer, alike = (margin > _TIE).sum(-1).double(), (margin.abs() <= _TIE).sum(-1).double()  # (B, n)
    # The token in its place and those alike hold the ranks nearer + 1 ... nearer + alike, in any order: the mean over
    # them, of 1 / rank through sum of 1 / r for r in a + 1 ... b = digamma(b + 1) - digamma(a + 1).
    hit1, hit5 = (((k - nearer) / alike).clamp(0, 1) for k in (1, 5))
    reciprocal = (torch.digamma(nearer + alike + 1) - torch.digamma(nearer + 1)) / alike
    return torch.stack([hit1.sum(1), hit5.sum(1), reciprocal.sum(1)], 1)


def _compare(moved: Tensor, target: Tensor, mean_moved: Tensor, mean_target: Tensor) -> Tensor:
    """(7,) sums over all images and tokens: those of `token_sums` and `retrieval_sums`."""
    tokens = moved, target, mean_moved, mean_target
    return torch.cat([token_sums(*tokens), retrieval_sums(*tokens)], 1).sum(0)


def _record(key: _Key, g: LatticeMap, images: int, sums: Tensor) -> LayerRecord:
    error, variance, energy, cosine, hit1, hit5, reciprocal = sums.tolist()
    valid, code = g.valid(), int(g.d4_code)
    image_tokens = int(valid.sum())
    tokens = images * image_tokens
    no_variance = variance <= NO_VARIANCE * energy
    return LayerRecord(
        layer=key[1],
        element=key[0],
        group="resampled" if code < 0 else "D4" if code else "identity",
        relative_error=math.nan if no_variance else math.sqrt(error / variance),
        aligned_cosine=math.nan if no_variance else cosine / tokens,
        retrieval=math.nan if no_variance else hit1 / tokens,
        chance=1 / image_tokens,
        valid_share=float(valid.double().mean()),
        images=images,
        hit5=math.nan if no_variance else hit5 / tokens,
        mrr=math.nan if no_variance else reciprocal / tokens,
        chance_hit5=min(5, image_tokens) / image_tokens,
        chance_mrr=sum(1 / rank for rank in range(1, image_tokens + 1)) / image_tokens,
    )


# ---------------------------------------------------------------- the protocol


@dataclass(frozen=True)
class EquivarianceResult:
    """How equivariant a checkpoint and its random control are, and how well g is predicted from their tokens.

    Attributes:
        records: of each layer and element, by model.
        predictions: of each layer, target and regressor, by model.
        split: blocks before the prefix tokens enter.
    """

    records: dict[str, list[LayerRecord]]
    predictions: dict[str, list[Prediction]]
    split: int

    def write(self, folder: Path) -> list[Path]:
        """Write equivariance.csv, prediction.csv and equivariance.png; returns their paths."""
        return [
            write_table(self.records, folder / "equivariance.csv"),
            write_table(self.predictions, folder / "prediction.csv"),
            plot(self.records, folder / "equivariance.png", split=self.split),
        ]

    def print(self, console: Console | None = None) -> None:
        """Print a table for each measure and for each target of the prediction."""
        print_table(self.records, console)
        print_predictions(self.predictions, console)


def evaluate(
    model: SplitViT,
    data: str = DEFAULT_DATA,
    *,
    images: int = 256,
    image_size: int | None = None,
    crop_pct: float = 1.0,
    max_pixels: int = MAX_PIXELS,
    pairs: int = 4,
    progress: bool = False,
) -> EquivarianceResult:
    """Measure the equivariance of every layer, and predict g from its tokens, beside a random initialization.

    Args:
        model: on its device.
        data: whose held-out images are used, as `open_dataset` takes it.
        images: how many of them, spread evenly.
        image_size: their side in pixels; default the model's.
        crop_pct: share of a picture's shorter side that the center crop shows; ImageNet's protocol has 0.875.
        max_pixels: of one picture; one of more is left out, as one that can't be read.
        pairs: scales and angles of each image, for the prediction of g from pairs of images; the last quarter of the
            images tests it.
        progress: show bars on the terminal.

    Raises:
        ValueError: data that can't be opened, an image size that the model can't take, too few images, or options out
            of range; before anything is measured.

    Example:
        >>> result = evaluate(load_split_vit("encoder.safetensors"), "folder:images")
        >>> [r.relative_error for r in result.records["checkpoint"] if r.element == "rot90"]  # by layer
        [0.21, 0.25, 0.40]
        >>> result.write(Path("results"))
    """
    check_positive(images=images, pairs=pairs)
    size = check_image_size(model, image_size)
    test_set = open_dataset(data, train=False, image_size=size, crop_pct=crop_pct, max_pixels=max_pixels)
    held_out = spread_images(test_set, images).to(device_of(model))
    check_images(model, held_out)
    check_prediction(len(held_out), pairs=pairs)
    models = with_control(model)
    tell_skipped(test_set)
    return EquivarianceResult(
        records={name: equivariance_errors(vit, held_out, progress=progress) for name, vit in models.items()},
        predictions={
            name: predict_transformations(vit, held_out, pairs=pairs, progress=progress) for name, vit in models.items()
        },
        split=model.split,
    )
