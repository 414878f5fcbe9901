"""A few numbers that tell one encoder from another, in seconds: for sweeps, and for training runs as they go."""

import math
from collections.abc import Mapping
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor

from ser_fast.evaluation.knn import SampledImages
from ser_fast.evaluation.protocol import device_of
from ser_fast.evaluation.token_errors import LayerRecord, equivariance_errors
from ser_fast.vit import SplitViT

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

    @property
    def name(self) -> str:
        """ "knn", or of a layer "d4_error@3"."""
        return f"{self.measure}@{self.layer}" if self.layer else self.measure


def score_encoder(model: SplitViT, images: SampledImages, *, batch_size: int = 256) -> list[ScoreRecord]:
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
    train, test = (images.embed(model, part, batch_size) for part in ("train", "test"))
    scores = [ScoreRecord("rankme", 0, rankme(test))]
    if images.labelled:
        scores.insert(0, ScoreRecord("knn", 0, images.top1(train, test)))
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
