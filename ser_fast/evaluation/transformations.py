"""Can g be read from the tokens of x and of g x? Which element of D4, which scale, which angle, for each layer."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torchvision.transforms.v2.functional import to_dtype

from ser_fast.evaluation.features import evaluating
from ser_fast.evaluation.protocol import check_images, check_positive
from ser_fast.evaluation.tables import shown
from ser_fast.lattice import LatticeMap
from ser_fast.progress import track
from ser_fast.views.pixels import normalize, transform_images
from ser_fast.vit import SplitViT

TARGETS = {
    "D4": "Element of D4: accuracy (1 / 8: a guess)",
    "scale": "Logarithm of the scale: R^2 (0: the mean)",
    "angle": "Angle: R^2 (0: the mean)",
}
REGRESSORS = ("linear", "MLP")

_CELLS = 4  # token maps are averaged to at most 4 x 4
_NO_VARIANCE = 1e-6  # of a token's length: what is less is float32's rounding of a constant
_RIDGES = (0.01, 0.1, 1.0, 10.0, 100.0)  # of the variance of a standardized feature
_HIDDEN, _STEPS, _RATE, _DECAY = 64, 200, 3e-3, 0.1


@dataclass(frozen=True)
class Prediction:
    """How well g is predicted for images that the regressor has not seen.

    Attributes:
        layer: the number of blocks up to it, from 1.
        target: "D4", the element; "scale", the logarithm of a scale in [1 / sqrt 2, sqrt 2]; "angle", in +-45 degrees.
        regressor: "linear" or "MLP".
        score: accuracy for D4, R^2 for the others, on the pairs of the test images.
        chance: the score of a guess: 1/8 for D4, 0 for R^2.
        train_pairs, test_pairs: how many pairs of tokens maps.
    """

    layer: int
    target: str
    regressor: str
    score: float
    chance: float
    train_pairs: int
    test_pairs: int


def predict_transformations(
    model: SplitViT,
    images: Tensor,
    *,
    pairs: int = 4,
    test_share: float = 0.25,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = False,
) -> list[Prediction]:
    """Predict g from the tokens f(x) and f(g x) of every block.

    What is read from a pair is how alike each part of one image is to each part of the other: both maps averaged to at
    most 4 x 4 cells, each less its mean cell, and the cosines of all cells of the one with all cells of the other. A
    linear regressor can't relate two vectors laid side by side; from their products it can, and layers of any width
    give as many numbers. A constant map, and one that says where but not what, give the same numbers for every g.

    Each image makes a pair for each element of D4, and `pairs` for scales and for angles. Those enlarge the image, by
    sqrt 2 if it is square, so that neither x nor g x sees beyond it: no border gives g away.

    The linear regressor is ridge regression in closed form (for D4 onto the indicators of the elements), the MLP has
    one hidden layer. Of the images that are not held out the last quarter decides how much ridge and how many steps.

    Args:
        model: a SplitViT, or anything with its patch_size and layer_maps.
        images: (N, 3, Hp, Wp) uint8, on the model's device; sides in pixels, multiples of the patch size.
        pairs: scales and angles drawn for each image.
        test_share: share of the images, in (0, 1), that the score is of; the last ones.
        seed: of the scales, the angles and the MLPs.
        batch_size: images at a time.
        progress: show a bar on the terminal.

    Returns:
        For each layer and target, one of each regressor.

    Raises:
        TypeError: images of another type.
        ValueError: images of another shape, pairs below 1, or a share that leaves no image on one side.

    Example:
        >>> for prediction in predict_transformations(model, images):
        ...     print(prediction.layer, prediction.target, prediction.score)
    """
    check_images(model, images)
    rest, held_out = check_prediction(len(images), pairs=pairs, test_share=test_share)
    sizes = [rest - max(1, rest // 4), max(1, rest // 4), held_out]

    features, targets = _pairs(model, images, pairs=pairs, seed=seed, batch_size=batch_size, progress=progress)
    predictions = []
    for target, layer_features in features.items():
        fit_y, val_y, test_y = (y.flatten(0, 1) for y in targets[target].split(sizes))  # (pairs, K) each
        for layer, x in enumerate(track(layer_features, "regressors", show=progress), start=1):
            parts = [part.flatten(0, 1) for part in x.split(sizes)]  # (pairs, Q) each
            mean, deviation = parts[0].mean(0), parts[0].std(0) + _NO_VARIANCE
            fit_x, val_x, test_x = ((part - mean) / deviation for part in parts)
            both = (
                _linear(fit_x, fit_y, val_x, val_y, test_x),
                _mlp(fit_x, fit_y, val_x, val_y, test_x, seed=seed),
            )
            for regressor, predicted in zip(REGRESSORS, both, strict=True):
                if target == "D4":
                    score = (predicted.argmax(1) == test_y.argmax(1)).double().mean()
                else:
                    score = 1 - (predicted - test_y).square().sum() / (test_y - test_y.mean(0)).square().sum()
                chance = 1 / 8 if target == "D4" else 0.0
                predictions.append(
                    Prediction(layer, target, regressor, float(score), chance, len(fit_y) + len(val_y), len(test_y))
                )
    return predictions


def check_prediction(images: int, *, pairs: int, test_share: float = 0.25) -> tuple[int, int]:
    """How many of the images `predict_transformations` fits and chooses on, and how many it tests on.

    Raises:
        ValueError: pairs below 1, or a share that leaves too few images on one side.
    """
    check_positive(pairs=pairs)
    held_out = round(test_share * images)
    if not 0 < held_out < images:
        raise ValueError(
            f"test_share: got {test_share}, which holds out {held_out} of {images} images, takes a share that leaves "
            "some on both sides"
        )
    rest = images - held_out
    if rest < 2:
        raise ValueError(f"images: got {images}, which leaves {rest} to fit and to choose on, takes 2 or more")
    return rest, held_out


def print_predictions(predictions: Mapping[str, Sequence[Prediction]], console: Console | None = None) -> None:
    """Print a table for each target: a row a model and regressor, a column a layer."""
    console = console or Console()
    for target, title in TARGETS.items():
        console.print(f"Prediction of g from pairs. {title}", highlight=False)
        scores = {
            (name, row.regressor, row.layer): row.score
            for name, model_predictions in predictions.items()
            for row in model_predictions
            if row.target == target
        }
        layers = sorted({layer for _, _, layer in scores})
        table = Table("", box=SIMPLE_HEAD, padding=0)
        for layer in layers:
            table.add_column(str(layer), justify="right")
        for name in predictions:
            for regressor in REGRESSORS:
                found = (scores.get((name, regressor, layer)) for layer in layers)
                table.add_row(
                    f"{shown(name)} {regressor}", *("" if score is None else f"{score:.2f}" for score in found)
                )
        console.print(table)


def _pairs(
    model: SplitViT, images: Tensor, *, pairs: int, seed: int, batch_size: int, progress: bool
) -> tuple[dict[str, list[Tensor]], dict[str, Tensor]]:
    """For each target: what is read from the pairs, (N, P, Q) for each layer, and g, (N, P, K); float32, on the CPU."""
    count, (height, width) = len(images), images.shape[2:]
    size = height, width
    generator = torch.Generator().manual_seed(seed)
    # One in each of as many equal parts of the range: images have the same mean, but for the draws within the parts.
    drawn = torch.arange(pairs) + torch.rand(2, count, pairs, generator=generator, dtype=torch.float64)
    exponent, turn = (2 * drawn / pairs - 1).unbind()  # in [-1, 1]
    scale, angle = 2 ** (exponent / 2), 45 * turn  # (N, pairs)
    targets = {
        "D4": torch.eye(8).expand(count, 8, 8),
        "scale": exponent[..., None].float(),
        "angle": turn[..., None].float(),
    }
    # Of a square turned by 45 degrees the side shows sqrt 2 of it.
    enlarged = (height + width) / (min(height, width) * math.sqrt(2))
    window = torch.eye(2, dtype=torch.float64) / enlarged
    batches: list[dict[str, list[Tensor]]] = []
    with evaluating(model):
        for rows in track(torch.arange(count).split(batch_size), "pairs for prediction", show=progress):
            pixels = to_dtype(images[rows.to(images.device)], torch.float32, scale=True)  # (B, 3, Hp, Wp)

            def cells(linear: Tensor | None, code: int = 0, pixels: Tensor = pixels) -> list[Tensor]:
                """For each layer the unit cells (B, q*q, C) of the images moved by a linear map or element of D4."""
                g = LatticeMap.d4(size, code) if linear is None else LatticeMap.affine(size, linear)
                return [_cells(tokens) for tokens in model.layer_maps(normalize(transform_images(pixels, g)))]

            still, near = cells(None), cells(window.expand(len(rows), 2, 2))
            turned = [LatticeMap.rotate(size, angle[rows, pair]).linear @ window for pair in range(pairs)]
            scaled = [window / scale[rows, pair, None, None] for pair in range(pairs)]
            batches.append(
                {
                    "D4": _cosines(still, [cells(None, code) for code in range(8)]),
                    "scale": _cosines(near, [cells(linear) for linear in scaled]),
                    "angle": _cosines(near, [cells(linear) for linear in turned]),
                }
            )
    features = {
        target: [torch.cat(parts) for parts in zip(*(batch[target] for batch in batches), strict=True)]
        for target in TARGETS
    }
    return features, targets


def _cells(tokens: Tensor) -> Tensor:
    """(B, H, W, C) -> (B, q*q, C): means of parts of the map, less their mean, of length 1; 0 where all are alike."""
    q = min(_CELLS, *tokens.shape[1:3])
    cells = F.adaptive_avg_pool2d(tokens.permute(0, 3, 1, 2).float(), q).flatten(2).mT  # (B, q*q, C)
    centered = cells - cells.mean(1, keepdim=True)
    length = centered.norm(dim=-1, keepdim=True)
    varies = length > _NO_VARIANCE * cells.norm(dim=-1, keepdim=True)
    return torch.where(varies, centered / length, 0)


def _cosines(before: list[Tensor], after: list[list[Tensor]]) -> list[Tensor]:
    """For each layer (B, P, Q): the cosines of the cells of f(x) with those of f(g x), for each of P maps g."""
    return [torch.stack([(b @ maps[layer].mT).flatten(1) for maps in after], 1).cpu() for layer, b in enumerate(before)]


def _linear(x: Tensor, y: Tensor, val_x: Tensor, val_y: Tensor, test_x: Tensor) -> Tensor:
    """Ridge regression of y (N, K) on standardized x (N, Q), at `test_x`; an intercept through the means."""
    x, y, val_x, val_y, test_x = (part.double() for part in (x, y, val_x, val_y, test_x))
    mean = y.mean(0)
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))  # (Q,), (Q, Q)
    onto = vectors.T @ (x.T @ (y - mean)) / len(x)  # (Q, K)
    weights = [vectors @ (onto / (values.clamp(min=0) + ridge)[:, None]) for ridge in _RIDGES]
    best = min(weights, key=lambda weight: F.mse_loss(val_x @ weight + mean, val_y).item())
    return test_x @ best + mean


def _mlp(x: Tensor, y: Tensor, val_x: Tensor, val_y: Tensor, test_x: Tensor, *, seed: int) -> Tensor:
    """An MLP of one hidden layer, by squared error of one target or cross-entropy of several, at `test_x`."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        last = nn.Linear(_HIDDEN, y.shape[1])
        mlp = nn.Sequential(nn.Linear(x.shape[1], _HIDDEN), nn.GELU(), last)
    nn.init.zeros_(last.weight)  # it starts from the middle of the targets, and stays there if no step is better
    nn.init.zeros_(last.bias)
    loss_of = F.cross_entropy if y.shape[1] > 1 else F.mse_loss
    optimizer = torch.optim.AdamW(mlp.parameters(), lr=_RATE, weight_decay=_DECAY)
    least, best = math.inf, torch.zeros(len(test_x), y.shape[1])
    for _ in range(_STEPS):
        with torch.no_grad():
            if (error := loss_of(mlp(val_x), val_y).item()) < least:
                least, best = error, mlp(test_x)
        loss = loss_of(mlp(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return best
