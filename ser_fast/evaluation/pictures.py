"""Pictures of token maps: their principal components as colors for x, g x and rho(g) f(x), and where tokens are found.

g moves the pixels of an image x, rho(g) moves the tokens f(x) of a layer along it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor
from torchvision.transforms.v2.functional import to_dtype

from ser_fast.csv_files import write_csv
from ser_fast.data import MAX_PIXELS
from ser_fast.data.sources import open_dataset
from ser_fast.evaluation.elements import parse_elements
from ser_fast.evaluation.features import evaluating, spread_images
from ser_fast.evaluation.picture_figures import draw_matches, draw_tokens
from ser_fast.evaluation.protocol import (
    DEFAULT_DATA,
    Models,
    check_image_size,
    check_images,
    check_positive,
    device_of,
    tell_skipped,
    with_controls,
)
from ser_fast.evaluation.token_errors import check_elements
from ser_fast.io import printable
from ser_fast.lattice import LatticeMap, positions
from ser_fast.ops.group_action import group_action
from ser_fast.report.engine import data_uri, render, write_page
from ser_fast.views.pixels import normalize, transform_images
from ser_fast.vit import SplitViT

ELEMENTS = ("rot90", "angle:30")
"""The maps that are drawn unless others are named."""

_LAYERS = 4  # of a model, by default, at most
_SMALLEST = 128  # pixels, the default side of the images of small models
_QUANTILES = (0.01, 0.99)  # of a principal component, at the ends of the color scale


class Maps(NamedTuple):
    """One layer's tokens of one image, before and after g.

    Attributes:
        plain: (H, W, C), f(x).
        after: (h, w, C), f(g x).
        moved: (h, w, C), rho(g) f(x).
    """

    plain: Tensor
    after: Tensor
    moved: Tensor


@dataclass(frozen=True)
class Match:
    """A token of x, and where it is in g x; places are (y, x) in the lattice's coordinates, of a token's center.

    Attributes:
        place: in x.
        true: in g x.
        found: the token of f(g x) that is most like it, by cosine from the mean token.
    """

    place: tuple[float, float]
    true: tuple[float, float]
    found: tuple[float, float]

    @property
    def hit(self) -> bool:
        """Whether the token that was found has the true place in it."""
        return max(abs(a - b) for a, b in zip(self.true, self.found, strict=True)) <= 0.5 + 1e-6


@dataclass(frozen=True)
class Layer:
    """What is drawn of one layer of one model.

    Attributes:
        colors: (H, W, 3), (h, w, 3) and (h, w, 3) in [0, 1]: f(x), f(g x) and rho(g) f(x).
        error: of rho(g) f(x) against f(g x), relative to the latter's deviation from its mean; nan where that is 0.
        hit: the share of all tokens that are found where they are.
        chance: the same of a guess.
        matches: of a few tokens.
    """

    colors: Maps
    error: float
    hit: float
    chance: float
    matches: list[Match]


@dataclass(frozen=True)
class Panel:
    """One model on one image and one g.

    Attributes:
        image: (3, Hp, Wp) uint8, x.
        moved: (3, hp, wp) uint8, g x.
        valid: (h, w) bool, the tokens of g x that x shows.
        layers: by number.
        split: blocks before the prefix tokens enter.
    """

    image: Tensor
    moved: Tensor
    valid: Tensor
    layers: dict[int, Layer]
    split: int


@dataclass(frozen=True)
class PicturesResult:
    """What is drawn, by image and element: a panel a model.

    Attributes:
        panels: (image, element): model: its panel.
        data: where the images are from.
    """

    panels: dict[tuple[int, str], dict[str, Panel]]
    data: str

    def write(self, folder: Path) -> list[Path]:
        """Write show.html, which holds everything, show.csv, and show/ with two PNG files an image and element.

        IMAGE_ELEMENT_tokens.png has the tokens as colors, IMAGE_ELEMENT_matches.png where tokens are found.
        """
        files, sections = [], []
        for (image, element), panels in self.panels.items():
            stem = f"{image}_{element.replace(':', '_').replace(',', '_')}"
            drawn = [
                draw_tokens(panels, element, folder / "show" / f"{stem}_tokens.png"),
                draw_matches(panels, element, folder / "show" / f"{stem}_matches.png"),
            ]
            sections.append((f"Image {image + 1}, g = {element}", [data_uri(path.read_bytes()) for path in drawn]))
            files += drawn
        table = write_csv(("image", *self._rows()[0]), self._lines(), folder / "show.csv")
        page = render(
            "show.html",
            title="Token maps",
            data=self.data,
            models=list(next(iter(self.panels.values()))),
            sections=sections,
        )
        return [write_page(folder / "show.html", page), table, *files]

    def print(self, console: Console | None = None) -> None:
        """Print the error and the share of tokens found, a row a model and layer: means over the images."""
        title = f"Token maps of {escape(printable(self.data))}: error, tokens found (a guess)"
        table = Table("", title=title, box=SIMPLE_HEAD, padding=0)
        table.add_column("layer", justify="right")
        elements = list(dict.fromkeys(element for _, element in self.panels))
        for element in elements:
            table.add_column(element, justify="right")
        rows = self._rows()
        for model, layer in dict.fromkeys((row["model"], row["layer"]) for row in rows):
            cells = []
            for element in elements:
                of = [r for r in rows if (r["model"], r["layer"], r["element"]) == (model, layer, element)]
                error, hit, chance = (fmean(r[column] for r in of) for column in ("relative_error", "hit1", "chance"))
                cells.append(f"{error:.2f}, {hit:.2f} ({chance:.2f})")
            table.add_row(escape(printable(model)), str(layer), *cells)
        (console or Console()).print(table)

    def _lines(self) -> list[dict[str, Any]]:
        return [{"image": image, **row} for row, image in zip(self._rows(), self._images(), strict=True)]

    def _images(self) -> list[int]:
        return [image for (image, _), panels in self.panels.items() for p in panels.values() for _ in p.layers]

    def _rows(self) -> list[dict[str, Any]]:
        return [
            {
                "element": element,
                "model": model,
                "layer": number,
                "relative_error": layer.error,
                "hit1": layer.hit,
                "chance": layer.chance,
            }
            for (_, element), panels in self.panels.items()
            for model, panel in panels.items()
            for number, layer in panel.layers.items()
        ]


# ---------------------------------------------------------------- the protocol


def evaluate(
    models: Models,
    data: str = DEFAULT_DATA,
    *,
    images: int = 3,
    elements: Sequence[str] = ELEMENTS,
    layers: Sequence[int] | None = None,
    image_size: int | None = None,
    crop_pct: float = 1.0,
    max_pixels: int = MAX_PIXELS,
    tokens: int = 6,
) -> PicturesResult:
    """Draw the token maps of encoders side by side, beside random initializations.

    The three first principal components of a layer's tokens are red, green and blue. They are those of f(x), f(g x) and
    rho(g) f(x) together, over all images and maps, so that a color is one feature wherever it is in a model's row. No
    token is taken off as background. Components have no sign and models no common axes: between models compare shapes,
    not hues.

    Args:
        models: on their device; one, or several by name.
        data: whose held-out images are drawn, as `open_dataset` takes it.
        images: how many of them, spread evenly.
        elements: maps by name, as `parse_elements` takes them.
        layers: blocks before the tokens, 1 to the depth; default at most four, evenly from each model's split to its
            last.
        image_size: side of the images in pixels; default the model's, at least 128.
        crop_pct: share of a picture's shorter side that the center crop shows; ImageNet's protocol has 0.875.
        max_pixels: of one picture; one of more is left out, as one that can't be read.
        tokens: how many tokens of each image are looked for in the other view.

    Raises:
        ValueError: data that can't be opened, an image size, layers or elements that a model can't take, or options out
            of range; before anything is drawn.

    Example:
        >>> models = {"with SER": load_split_vit("runs/ser"), "without": load_split_vit("runs/off")}
        >>> evaluate(models, "folder:photos", elements=("angle:45",)).write(Path("results"))
    """
    check_positive(images=images, tokens=tokens, image_size=image_size)
    compared = with_controls(models)
    held_out: dict[str, Tensor] = {}
    opened: dict[int, Tensor] = {}
    maps: dict[str, Mapping[str, LatticeMap]] = {}
    for name, model in compared.items():
        if wrong := [layer for layer in layers or () if layer not in range(1, model.depth + 1)]:
            raise ValueError(f"layers: got {wrong[0]}, {name} takes 1 to {model.depth}")
        size = check_image_size(model, image_size or _default_size(model))
        if size not in opened:
            dataset = open_dataset(data, train=False, image_size=size, crop_pct=crop_pct, max_pixels=max_pixels)
            opened[size] = spread_images(dataset, images)
            tell_skipped(dataset)
        held_out[name] = opened[size].to(device_of(model))
        lattice = check_images(model, held_out[name])
        maps[name] = check_elements(parse_elements(elements, lattice), lattice)
    drawn: dict[tuple[int, str], dict[str, Panel]] = {}
    for name, model in compared.items():
        chosen = sorted(set(layers)) if layers else _default_layers(model)
        panels = _panels(model, held_out[name], maps[name], chosen, tokens)
        for key, panel in panels.items():
            drawn.setdefault(key, {})[name] = panel
    return PicturesResult(dict(sorted(drawn.items(), key=lambda item: item[0][0])), data)


def _default_size(model: SplitViT) -> int:
    side, patch = model.image_size[0], model.patch_size[0]
    return max(side, _SMALLEST // patch * patch)


def _default_layers(model: SplitViT) -> list[int]:
    first = max(1, model.split)
    return sorted(set(torch.linspace(first, model.depth, _LAYERS).round().long().tolist()))


def _panels(
    model: SplitViT, images: Tensor, maps: Mapping[str, LatticeMap], layers: Sequence[int], tokens: int
) -> dict[tuple[int, str], Panel]:
    """What is drawn of a model, by image and element."""
    (patch_height, patch_width), drawn = model.patch_size, {}
    pixels = to_dtype(images, torch.float32, scale=True)

    def read(batch: Tensor) -> dict[int, Tensor]:
        found = model.encode(normalize(batch), layers, until=max(layers)).tokens
        return {layer: found[layer].float() for layer in layers}  # (N, H, W, C) each

    with evaluating(model):
        plain = read(pixels)
        for element, g in maps.items():
            (height, width), (h, w) = g.size_in, g.size_out
            g_pixels = g.on((height * patch_height, width * patch_width), (h * patch_height, w * patch_width))
            drawn[element] = transform_images(pixels, g_pixels).clamp(0, 1)
        after = {element: read(moved) for element, moved in drawn.items()}
        moved = {
            element: {layer: group_action(plain[layer], g.to(images.device)) for layer in layers}
            for element, g in maps.items()
        }
    panels: dict[tuple[int, str], Panel] = {}
    size = check_images(model, images)
    queries = [_busiest(image, size, tokens) for image in pixels]
    for layer in layers:
        axes = _principal_axes([plain[layer], *(m[layer] for views in (after, moved) for m in views.values())])
        for number in range(len(images)):
            for element, g in maps.items():
                of = Maps(plain[layer][number], after[element][layer][number], moved[element][layer][number])
                valid = g.valid()[0].unflatten(0, g.size_out).cpu()
                panel = panels.setdefault(
                    (number, element),
                    Panel(
                        images[number].cpu(),
                        to_dtype(drawn[element][number], torch.uint8, scale=True).cpu(),
                        valid,
                        {},
                        model.split,
                    ),
                )
                panel.layers[layer] = _layer(of, g, valid.to(images.device), axes, queries[number])
    return panels


def _layer(of: Maps, g: LatticeMap, valid: Tensor, axes: "_Axes", queries: Tensor) -> Layer:
    target, moved = of.after[valid].double(), of.moved[valid].double()  # (n, C)
    deviation = (target - target.mean(0)).square().sum().sqrt()
    error = float((moved - target).square().sum().sqrt() / deviation) if deviation > 0 else math.nan
    matches, known = _matches(of, g)
    return Layer(
        Maps(*(axes.colors(tokens).cpu() for tokens in of)),
        error,
        fmean(match.hit for match in matches.values()) if matches else math.nan,
        1 / known,
        [matches[query] for query in queries.tolist() if query in matches],
    )


def _matches(of: Maps, g: LatticeMap) -> tuple[dict[int, Match], int]:
    """Where each token of x that g x shows is found in g x, by its number, and among how many tokens."""
    back = g.inverse()
    true_y, true_x = (place[0] for place in positions(back.linear, back.offset, back.size_in, back.size_out))
    shown = back.valid()[0].nonzero().flatten().tolist()
    plain, after = of.plain.flatten(0, 1).double(), of.after.flatten(0, 1).double()  # (H*W, C), (h*w, C)
    a, b = (F.normalize(tokens - tokens.mean(0), dim=-1) for tokens in (plain, after))
    best = (a @ b.T).argmax(1).tolist()
    width, w = g.size_in[1], g.size_out[1]
    return {
        token: Match(
            (token // width + 0.5, token % width + 0.5),
            (float(true_y[token]), float(true_x[token])),
            (best[token] // w + 0.5, best[token] % w + 0.5),
        )
        for token in shown
    }, len(b)


def _busiest(image: Tensor, size: tuple[int, int], count: int) -> Tensor:
    """The numbers of tokens with the most contrast, the best of each cell of a grid, so that they are spread.

    image: (3, Hp, Wp).
    """
    height, width = size
    patches = image.mean(0).unflatten(0, (height, -1)).unflatten(2, (width, -1))  # (H, p, W, p)
    contrast = patches.std((1, 3)).cpu()  # (H, W)
    contrast[[0, -1]] = contrast[:, [0, -1]] = -1  # tokens at the border have little to be seen by
    cells = math.ceil(math.sqrt(count))
    rows, columns = torch.arange(height) * cells // height, torch.arange(width) * cells // width
    cell = rows[:, None] * cells + columns  # (H, W)
    best = [int(torch.where(cell == number, contrast, -2).argmax()) for number in cell.unique().tolist()]
    best.sort(key=lambda token: -float(contrast.flatten()[token]))
    return torch.tensor(best[:count])


class _Axes(NamedTuple):
    """Three principal axes (C, 3) about a mean (C,), and the ends (3,) of their scales."""

    mean: Tensor
    axes: Tensor
    low: Tensor
    high: Tensor

    def colors(self, tokens: Tensor) -> Tensor:
        """(H, W, 3) in [0, 1] of tokens (H, W, C)."""
        projected = (tokens - self.mean) @ self.axes
        return ((projected - self.low) / (self.high - self.low).clamp(min=1e-12)).clamp(0, 1)


def _principal_axes(maps: Sequence[Tensor]) -> _Axes:
    """Of the tokens of all maps (N, H, W, C) together."""
    tokens = torch.cat([m.flatten(0, 2) for m in maps])
    mean = tokens.mean(0)
    _, vectors = torch.linalg.eigh((tokens - mean).double().T @ (tokens - mean).double())
    axes = vectors[:, -3:].flip(1)  # the largest first
    largest = axes.abs().argmax(0)
    axes = (axes * axes.gather(0, largest[None]).sign()).to(
        tokens.dtype
    )  # a sign of its own, on every machine the same
    low, high = torch.quantile(_subsample((tokens - mean) @ axes), tokens.new_tensor(_QUANTILES), dim=0)
    return _Axes(mean, axes, low, high)


def _subsample(rows: Tensor, most: int = 2**20) -> Tensor:
    """Evenly spread rows: torch.quantile takes no more than 2^24 numbers."""
    return rows[:: -(-len(rows) // most)]
