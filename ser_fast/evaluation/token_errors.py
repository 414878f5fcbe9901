"""The errors of token maps, f(g x) against rho(g) f(x), for each layer and g; and how much g changes an embedding."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.v2.functional import to_dtype

from ser_fast.evaluation.controls import TokenMaps
from ser_fast.evaluation.elements import default_elements
from ser_fast.evaluation.features import evaluating
from ser_fast.evaluation.protocol import check_images
from ser_fast.lattice import LatticeMap, Size
from ser_fast.ops.group_action import group_action
from ser_fast.progress import track
from ser_fast.views.pixels import normalize, transform_images
from ser_fast.vit import SplitViT

# Of the energy of a layer's tokens: less variance than this is what float32 leaves of a constant.
NO_VARIANCE = 1e-12
# Cosines this close tie: the rounding of a float32 product.
_TIE = 1e-6

_Key = tuple[str, int, bool]  # element, layer, and whether it is the other way, from g x to x


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
        inverse_error: the relative error the other way, of rho(g)^-1 f(gx) against f(x), over the tokens of x that gx
            shows.
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
    inverse_error: float


@dataclass(frozen=True)
class EmbeddingRecord:
    """How little g changes an embedding: e(g x) against e(x), over all images.

    Attributes:
        embedding: "cls", the class token, or "mean", the mean patch token, of the last block through the final norm.
        element, group: as `LayerRecord`.
        relative_error: sqrt(sum |e(x) - e(gx)|^2 / sum |e(gx) - m|^2), m the mean of e(gx). 0: invariant.
        aligned_cosine: the mean cosine of e(x) and e(gx), each less its mean.
        retrieval: how often the image whose e(x) is most like e(gx) is x.
        chance: the retrieval of a guess, 1 / images.
        images: how many.
    """

    embedding: str
    element: str
    group: str
    relative_error: float
    aligned_cosine: float
    retrieval: float
    chance: float
    images: int


def equivariance_errors(
    model: TokenMaps,
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
    elements = check_elements(default_elements(size) if elements is None else elements, size)
    resampling = {"interpolation": interpolation, "padding": padding}
    pairs = partial(_pairs, model, elements=elements, resampling=resampling)
    bar = partial(track, images.split(batch_size), show=progress)
    tokens = {
        (name, back): int((g.inverse() if back else g).valid().sum())
        for name, g in elements.items()
        for back in (False, True)
    }
    with evaluating(cast(nn.Module, model)):
        sums = _sum(
            (key, torch.stack([moved.sum((0, 1)), target.sum((0, 1))]))  # (2, C)
            for key, moved, target in pairs(bar("mean tokens"))
        )
        means = {key: total / (len(images) * tokens[key[0], key[2]]) for key, total in sums.items()}
        totals = _sum(
            (key, (token_sums(moved, target, *means[key]).sum(0) if key[2] else _compare(moved, target, *means[key])))
            for key, moved, target in pairs(bar("equivariance"))
        )
    return [
        _record((name, layer), elements[name], len(images), total, totals.get((name, layer, True)))
        for (name, layer, back), total in totals.items()
        if not back
    ]


def embedding_errors(
    model: SplitViT,
    images: Tensor,
    *,
    elements: Mapping[str, LatticeMap] | None = None,
    batch_size: int = 64,
    interpolation: str = "bicubic",
    padding: str = "border",
    progress: bool = False,
) -> list[EmbeddingRecord]:
    """Compare e(g x) with e(x): how invariant the class token and the mean patch token are.

    Args:
        model, images, elements, batch_size, interpolation, padding, progress: as `equivariance_errors`.

    Returns:
        A record for each element, of the class token where the model has one, and of the mean patch token.

    Raises:
        TypeError: images of another type.
        ValueError: images of another shape, or an element that isn't one map of their lattice.
    """
    size = check_images(model, images)
    elements = check_elements(default_elements(size) if elements is None else elements, size)
    resampling = {"interpolation": interpolation, "padding": padding}
    found: dict[tuple[str, str], list[Tensor]] = {}  # of the images as they are under the element ""
    with evaluating(model):
        for batch in track(images.split(batch_size), "embeddings", show=progress):
            pixels = to_dtype(batch, torch.float32, scale=True)
            for name, g in {"": None, **elements}.items():
                moved = pixels if g is None else _move(pixels, g, model.patch_size, resampling)
                encoded = model.encode(normalize(moved), (model.depth,))
                cls = encoded.cls.get(model.depth)
                read = {} if cls is None else {"cls": cls}
                read["mean"] = encoded.tokens[model.depth].mean((1, 2))
                for kind, token in read.items():
                    found.setdefault((kind, name), []).append(model.norm_final(token).double())
    joined = {key: torch.cat(parts)[None] for key, parts in found.items()}  # (1, N, C)
    records = []
    for (kind, name), after in joined.items():
        if name:
            before = joined[kind, ""]
            sums = _compare(before, after, before.mean((0, 1)), after.mean((0, 1)))
            as_tokens = _measures(sums, len(images), 1)
            records.append(
                EmbeddingRecord(
                    kind,
                    name,
                    _group(elements[name]),
                    as_tokens["relative_error"],
                    as_tokens["aligned_cosine"],
                    as_tokens["retrieval"],
                    1 / len(images),
                    len(images),
                )
            )
    return records


def check_elements(elements: Mapping[str, LatticeMap], size: Size) -> Mapping[str, LatticeMap]:
    """Raise ValueError unless each element is one map of a lattice with a valid token; the elements."""
    for name, g in elements.items():
        if g.size_in != size or len(g) != 1:
            raise ValueError(f"elements: {name!r} is {len(g)} maps of a {g.size_in} lattice, takes 1 of {size}")
        if not bool(g.valid().any()):
            raise ValueError(f"elements: {name!r} leaves no valid token")
    return elements


def _move(pixels: Tensor, g: LatticeMap, patch_size: Size, resampling: dict[str, Any]) -> Tensor:
    """Images (B, 3, Hp, Wp) in [0, 1], moved by a map of their tokens."""
    (height, width), (h, w), (patch_height, patch_width) = g.size_in, g.size_out, patch_size
    g_pixels = g.on((height * patch_height, width * patch_width), (h * patch_height, w * patch_width))
    return transform_images(pixels, g_pixels, **resampling).clamp(0, 1)


def _pairs(
    model: TokenMaps, batches: Iterable[Tensor], *, elements: Mapping[str, LatticeMap], resampling: dict[str, Any]
) -> Iterator[tuple[_Key, Tensor, Tensor]]:
    """(element, layer, False), rho(g) f(x) and f(g x), and (element, layer, True), rho(g)^-1 f(g x) and f(x).

    For each batch the n valid tokens of both, (B, n, C) float64.
    """
    for images in batches:  # (B, 3, Hp, Wp) uint8
        pixels = to_dtype(images, torch.float32, scale=True)
        maps = model.layer_maps(normalize(pixels))  # (B, H, W, C) each
        for name, g in elements.items():
            maps_after = model.layer_maps(normalize(_move(pixels, g, model.patch_size, resampling)))
            for back, way in enumerate((g, g.inverse())):
                valid = way.valid()[0].unflatten(0, way.size_out).to(images.device)  # (h, w)
                if not bool(valid.any()):  # a map back from tokens that show nothing of the image
                    continue
                g_there = way.to(images.device)
                for layer, (before, after) in enumerate(zip(maps, maps_after, strict=True), start=1):
                    source, target = (after, before) if back else (before, after)
                    moved: Any = group_action(source, g_there, **resampling)  # (B, h, w, C)
                    yield (name, layer, bool(back)), moved[:, valid].double(), target[:, valid].double()


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


def _measures(sums: Tensor, images: int, tokens: int) -> dict[str, float]:
    """The measures of `_compare`'s sums over so many tokens of each image."""
    error, variance, energy, cosine, hit1, hit5, reciprocal = sums.tolist()
    if variance <= NO_VARIANCE * energy:
        return dict.fromkeys(("relative_error", "aligned_cosine", "retrieval", "hit5", "mrr"), math.nan)
    count = images * tokens
    return {
        "relative_error": math.sqrt(error / variance),
        "aligned_cosine": cosine / count,
        "retrieval": hit1 / count,
        "hit5": hit5 / count,
        "mrr": reciprocal / count,
    }


def _group(g: LatticeMap) -> str:
    code = int(g.d4_code)
    return "resampled" if code < 0 else "D4" if code else "identity"


def _record(key: tuple[str, int], g: LatticeMap, images: int, sums: Tensor, inverse_sums: Tensor | None) -> LayerRecord:
    valid = g.valid()
    image_tokens = int(valid.sum())
    inverse_error = math.nan
    if inverse_sums is not None:
        error, variance, energy, _ = inverse_sums.tolist()
        inverse_error = math.nan if variance <= NO_VARIANCE * energy else math.sqrt(error / variance)
    return LayerRecord(
        layer=key[1],
        element=key[0],
        group=_group(g),
        chance=1 / image_tokens,
        valid_share=float(valid.double().mean()),
        images=images,
        chance_hit5=min(5, image_tokens) / image_tokens,
        chance_mrr=sum(1 / rank for rank in range(1, image_tokens + 1)) / image_tokens,
        inverse_error=inverse_error,
        **_measures(sums, images, image_tokens),
    )
