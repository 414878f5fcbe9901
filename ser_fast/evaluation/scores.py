"""A few numbers that tell one encoder from another, in seconds: for sweeps, and for training runs as they go."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import to_dtype

from ser_fast.data.sources import open_dataset
from ser_fast.evaluation.equivariance import LayerRecord, equivariance_errors
from ser_fast.evaluation.features import evaluating, spread_items
from ser_fast.evaluation.knn import knn_predictions
from ser_fast.evaluation.protocol import check_positive, device_of
from ser_fast.views.pixels import normalize
from ser_fast.vit import SplitViT

NEIGHBORS = 20
MEASURES = {
    "knn": "kNN top-1",
    "d4_error": "error on D4",
    "scale_error": "error on scales",
    "retrieval": "token retrieval",
    "rankme": "RankMe",
}
"""Measures of an encoder, and what they are called in tables and figures."""
OF_A_LAYER = ("d4_error", "scale_error", "retrieval")


class ScoreRecord(NamedTuple):
    """One number.

    Attributes:
        measure: a name in MEASURES.
        layer: blocks up to where it was measured; 0 for the embedding.
        value: nan where it is undefined.
    """

    measure: str
    layer: int
    value: float


@dataclass(frozen=True)
class ScoreImages:
    """The images that encoders are scored on, in memory.

    Attributes:
        train: (N, 3, S, S) uint8, and their labels (N,) int64; -1 for none.
        test: the same of held-out images.
        equivariance: how many of the held-out ones, from the first, the errors are measured on.
    """

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    equivariance: int

    @classmethod
    def open(
        cls, data: str, image_size: int, *, train: int = 5000, test: int = 2000, equivariance: int = 256
    ) -> "ScoreImages":
        """The images of a source, each part spread evenly over it.

        Args:
            data: as `open_dataset` takes it; without labels there is no kNN.
            image_size: their side in pixels.
            train: training images, which vote; at most.
            test: held-out images, which are classified and whose rank is measured; at most.
            equivariance: held-out images that the errors are measured on, spread evenly over those; at most.

        Raises:
            ValueError: a number that isn't positive, or data that can't be opened.
        """
        check_positive(train=train, test=test, equivariance=equivariance)
        parts = []
        for count, training in ((train, True), (test, False)):
            dataset = open_dataset(data, train=training, image_size=image_size)
            images, labels = spread_items(dataset, count)
            parts.append((images, labels if dataset.classes else torch.full_like(labels, -1)))
        return cls(*parts, equivariance)

    @property
    def labelled(self) -> bool:
        """Whether there are classes to tell apart."""
        return bool((self.train[1] >= 0).all()) and bool((self.test[1] >= 0).all())


def score_encoder(model: SplitViT, images: ScoreImages, *, batch_size: int = 256) -> list[ScoreRecord]:
    """Score an encoder.

    Args:
        model: on its device; it is left in the mode that it was in.
        images: of its size.
        batch_size: images at a time.

    Returns:
        "knn" (top-1 of 20 neighbors, where the images have labels) and "rankme" of the embedding; "d4_error",
        "scale_error" and "retrieval" of each layer, means over the elements of `default_elements`.
    """
    device = device_of(model)
    train, test = (_embed(model, part, batch_size) for part in (images.train[0], images.test[0]))
    scores = [ScoreRecord("rankme", 0, rankme(test))]
    if images.labelled:
        neighbors = min(NEIGHBORS, len(train))
        ranked = knn_predictions(train, images.train[1], test, k=neighbors)[neighbors]
        scores.insert(0, ScoreRecord("knn", 0, (ranked[:, 0] == images.test[1]).double().mean().item()))
    count = min(images.equivariance, len(images.test[0]))
    chosen = torch.linspace(0, len(images.test[0]) - 1, count).long()
    records = equivariance_errors(model, images.test[0][chosen].to(device), batch_size=batch_size)
    return scores + [
        ScoreRecord(measure, layer, value)
        for measure in OF_A_LAYER
        for layer, value in layer_means(records, measure).items()
    ]


def layer_means(records: list[LayerRecord], measure: str) -> Mapping[int, float]:
    """Layer: a measure of `score_encoder`, from the errors of each element."""
    group, field = {
        "d4_error": ("D4", "relative_error"),
        "scale_error": ("resampled", "relative_error"),
        "retrieval": (None, "retrieval"),
    }[measure]
    chosen = [record for record in records if record.group == group or (group is None and record.group != "identity")]
    layers = sorted({record.layer for record in chosen})
    return {layer: fmean(getattr(record, field) for record in chosen if record.layer == layer) for layer in layers}


def rankme(features: Tensor) -> float:
    """The effective rank of features: exp of the entropy of their singular values, as shares of the sum.

    Args:
        features: (N, C).

    Returns:
        1 where all lie on a line through 0, min(N, C) where no direction is preferred; nan for zeros.

    Source: Garrido et al., "RankMe", arXiv 2210.02885, equation 1, without its guard against log 0: 0 log 0 is 0.
    """
    values = torch.linalg.svdvals(features.double())
    total = values.sum()
    if not total > 0:
        return math.nan
    return torch.special.entr(values / total).sum().exp().item()


def _embed(model: SplitViT, images: Tensor, batch_size: int) -> Tensor:
    """(N, C) float32 on the CPU."""
    device = device_of(model)
    with evaluating(model):
        return torch.cat(
            [
                model(normalize(to_dtype(batch.to(device), torch.float32, scale=True))).float().cpu()
                for batch in images.split(batch_size)
            ]
        )
