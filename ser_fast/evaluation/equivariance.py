"""How equivariant a model's token maps are: f(g x) against rho(g) f(x), for each layer and each g.

g moves the pixels of an image x, rho(g) moves the tokens f(x) of a layer along it (`group_action`).
"""

import csv
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torchvision.transforms.v2.functional import to_dtype

from ser_fast.evaluation.features import evaluating
from ser_fast.lattice import LatticeMap, Size
from ser_fast.ops.group_action import group_action
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
class Record:
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
    """The eight elements of D4 and four changes of scale in whole tokens, on a lattice of (H, W) tokens.

    The scales are the corners of SER's recipe: areas 0.7 and 1.3, and aspects 3/4 and 4/3 at the same area, each
    rounded to h x w whole tokens and named so. Those that a small lattice rounds to itself are left out.
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
) -> list[Record]:
    """Compare f(g x) with rho(g) f(x), for the tokens f of every block and every g.

    Tokens whose preimage lies outside the image take no part. The mean tokens are taken off so that a constant f gains
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
    bar = partial(track, images.split(batch_size), transient=True, disable=not progress)
    with evaluating(model):
        sums = _sum(
            (key, torch.stack([moved.sum((0, 1)), target.sum((0, 1))]))  # (2, C)
            for key, moved, target in pairs(bar("mean tokens"))
        )
        means = {key: total / (len(images) * int(elements[key[0]].valid().sum())) for key, total in sums.items()}
        totals = _sum((key, _compare(moved, target, *means[key])) for key, moved, target in pairs(bar("equivariance")))
    return [_record(key, elements[key[0]], len(images), total) for key, total in totals.items()]


def random_control(model: SplitViT, *, seed: int = 0) -> SplitViT:
    """The same architecture, split and device with fresh random weights: what `model` was before it was trained.

    Fixed sin-cos positions are kept, for training did not make them either. Global random state stays as it was.

    Raises:
        ValueError: model wraps a timm instance, which can't be built again.
    """
    if model.recipe is None:
        raise ValueError("model: wraps a timm instance; only a SplitViT built from a timm name can be built again")
    name, timm_kwargs = model.recipe
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the GPUs too
        control = SplitViT(name, model.split, **timm_kwargs)
    positions = control.state_dict().get("pos_embed")  # (1, P + H*W, C), the model's own memory
    if positions is not None and model.embed_dim % 4 == 0:
        drawn = positions.clone()
        control.fix_sincos_positions()
        if not torch.equal(positions, model.state_dict()["pos_embed"].cpu()):
            positions.copy_(drawn)
    return control.to(next(model.parameters()).device)


def write_table(records: Mapping[str, Sequence[Any]], path: str | Path) -> None:
    """Write the records of each model, by name, to a CSV file: a column "model", then the fields of their dataclass."""
    (kind,) = {type(record) for of_model in records.values() for record in of_model}
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, ["model", *(field.name for field in fields(kind))])
        writer.writeheader()
        writer.writerows({"model": name, **asdict(record)} for name, of_model in records.items() for record in of_model)


def plot(records: Mapping[str, Sequence[Record]], path: str | Path, *, split: int | None = None) -> None:
    """Draw relative error against layer: one line a model, one panel the mean over D4, one that over the scales.

    Args:
        records: those of each model, by name.
        path: the figure, in the format of its suffix (.png, .pdf, .svg).
        split: the last layer before the prefix tokens, to mark it.
    """
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, len(_GROUPS), sharey=True)
    for axes, (group, title) in zip(panels, _GROUPS.items(), strict=True):
        for name, of_model in records.items():
            errors = _means(of_model, group, "relative_error")
            axes.plot(list(errors), list(errors.values()), marker="o", label=name)
        axes.axhline(1, color="grey", linewidth=1, linestyle=":", label="mean token")
        if split is not None:
            axes.axvline(split, color="grey", linewidth=1, linestyle="--", label="split")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set(title=title, xlabel="layer", ylim=(0, None))
    panels[0].set_ylabel("relative error")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(path, dpi=150)


def print_table(records: Mapping[str, Sequence[Record]], console: Console | None = None) -> None:
    """Print a table for each measure: a section a model, by name, a row an element and a column a layer."""
    console = console or Console()
    layers = sorted({record.layer for of_model in records.values() for record in of_model})
    for metric, title in _METRICS.items():
        console.print(title, highlight=False)
        for start in range(0, len(layers), _LAYERS_WIDE):
            table = Table("", box=SIMPLE_HEAD, padding=0)
            columns = layers[start : start + _LAYERS_WIDE]
            for layer in columns:
                table.add_column(str(layer), justify="right")
            for name, of_model in records.items():
                rows = {f"mean {group}": _means(of_model, group, metric) for group in _GROUPS}
                for record in of_model:
                    rows.setdefault(record.element, {})[record.layer] = getattr(record, metric)
                table.add_section()
                table.add_row(name, style="bold")
                for element, values in rows.items():
                    if values:
                        table.add_row(element, *(f"{values[layer]:.2f}" for layer in columns))
                if metric in _CHANCES:
                    guess = fmean(getattr(record, _CHANCES[metric]) for record in of_model)
                    table.add_row("a guess, mean", *(f"{guess:.2f}" for _ in columns))
            console.print(table)


def _means(records: Sequence[Record], group: str, metric: str) -> dict[int, float]:
    """Layer: the mean of a measure over the elements of a group."""
    values: dict[int, list[float]] = {}
    for record in records:
        if record.group == group:
            values.setdefault(record.layer, []).append(getattr(record, metric))
    return {layer: fmean(values[layer]) for layer in sorted(values)}


def check_images(model: SplitViT, images: Tensor) -> Size:
    """The lattice (H, W) of the tokens of images (N, 3, Hp, Wp) uint8, as `equivariance_errors` takes them.

    Raises:
        TypeError: images of another type.
        ValueError: images of another shape.
    """
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        raise TypeError(f"images: got {getattr(images, 'dtype', type(images))}, takes a uint8 tensor (N, 3, Hp, Wp)")
    patch_height, patch_width = model.patch_size
    if images.ndim != 4 or not images.numel() or images.shape[2] % patch_height or images.shape[3] % patch_width:
        raise ValueError(
            f"images: got {tuple(images.shape)}, takes (N, 3, Hp, Wp), N > 0, the sides multiples of the patch size "
            f"{patch_height, patch_width}"
        )
    return images.shape[2] // patch_height, images.shape[3] // patch_width


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


def _record(key: _Key, g: LatticeMap, images: int, sums: Tensor) -> Record:
    error, variance, energy, cosine, hit1, hit5, reciprocal = sums.tolist()
    valid, code = g.valid(), int(g.d4_code)
    of_image = int(valid.sum())
    tokens = images * of_image
    no_variance = variance <= NO_VARIANCE * energy
    return Record(
        layer=key[1],
        element=key[0],
        group="resampled" if code < 0 else "D4" if code else "identity",
        relative_error=math.nan if no_variance else math.sqrt(error / variance),
        aligned_cosine=math.nan if no_variance else cosine / tokens,
        retrieval=math.nan if no_variance else hit1 / tokens,
        chance=1 / of_image,
        valid_share=float(valid.double().mean()),
        images=images,
        hit5=math.nan if no_variance else hit5 / tokens,
        mrr=math.nan if no_variance else reciprocal / tokens,
        chance_hit5=min(5, of_image) / of_image,
        chance_mrr=sum(1 / rank for rank in range(1, of_image + 1)) / of_image,
    )
