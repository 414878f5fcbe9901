"""MoCo-v3: a momentum encoder's embeddings of one view are the targets of a predictor on the other view's."""

import copy
import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ser_fast.distributed import all_gather_rows, gather_counts, rank
from ser_fast.ops.nt_xent import info_nce
from ser_fast.vit import SplitViT


class ObjectiveOutput(NamedTuple):
    """What an objective gives the trainer for one batch.

    Attributes:
        loss: the invariance loss, a scalar.
        tokens: of the two views, (B, H, W, C) after block split-1, of the batch's first part.
        keys: the momentum encoder's tokens of the same images, without gradient.
    """

    loss: Tensor
    tokens: tuple[Tensor, Tensor]
    keys: tuple[Tensor, Tensor]


def _mlp(widths: list[int]) -> nn.Sequential:
    """Linear layers, each with batch normalisation; ReLU between them, none (and no affine) after the last."""
    layers: list[nn.Module] = []
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
        last = i == len(widths) - 2
        layers += [nn.Linear(fan_in, fan_out, bias=False), nn.BatchNorm1d(fan_out, affine=not last)]
        if not last:
            layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


class MoCoV3(nn.Module):
    """The MoCo-v3 objective on a SplitViT.

    Args:
        encoder: the model to pretrain. Its patch embedding is frozen and its absolute positions, where it has them,
            are fixed sin-cos, as the paper does for stability.
        dim: width of the embeddings that are contrasted.
        mlp_dim: hidden width of projector and predictor.
        temperature: of the contrast.
        momentum: of the momentum encoder at the start; it rises to 1 along a cosine.

    Source: Chen, Xie and He, arXiv 2104.02057, algorithm 1.
    """

    def __init__(
        self,
        encoder: SplitViT,
        *,
        dim: int = 256,
        mlp_dim: int = 4096,
        temperature: float = 0.2,
        momentum: float = 0.99,
    ) -> None:
        super().__init__()
        self.temperature, self.momentum = temperature, momentum
        if getattr(encoder, "pos_embed", None) is not None:
            encoder.fix_sincos_positions()
        encoder.patch_embed.requires_grad_(False)
        self.encoder = encoder
        self.projector = _mlp([encoder.embed_dim, mlp_dim, mlp_dim, dim])
        self.predictor = _mlp([dim, mlp_dim, dim])
        self.momentum_encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.momentum_projector = copy.deepcopy(self.projector).requires_grad_(False)

    @torch.no_grad()
    def update_momentum(self, progress: float) -> None:
        """Move the momentum encoder towards the encoder; progress in [0, 1] of the training."""
        rate = (1 - self.momentum) * (1 + math.cos(math.pi * progress)) / 2
        for slow, fast in ((self.momentum_encoder, self.encoder), (self.momentum_projector, self.projector)):
            for target, source in zip(slow.parameters(), fast.parameters(), strict=True):
                target.lerp_(source, rate)

    def forward(self, images0: list[Tensor], images1: list[Tensor]) -> ObjectiveOutput:
        """Both views of a batch, cut into the same parts: each part (B_part, 3, h, w) has one size in each view."""
        z0, tokens0 = _encode(self.encoder, images0)
        z1, tokens1 = _encode(self.encoder, images1)
        query0, query1 = (self.predictor(self.projector(z)) for z in (z0, z1))
        with torch.no_grad():
            k0, keys0 = _encode(self.momentum_encoder, images0)
            k1, keys1 = _encode(self.momentum_encoder, images1)
            key0, key1 = self.momentum_projector(k0), self.momentum_projector(k1)
        loss = self._contrast(query0, key1) + self._contrast(query1, key0)
        return ObjectiveOutput(loss, (tokens0, tokens1), (keys0, keys1))

    def _contrast(self, query: Tensor, key: Tensor) -> Tensor:  # (B, D), (B, D)
        counts = gather_counts(len(key), key.device)
        positive = sum(counts[: rank()]) + torch.arange(len(query), device=query.device)
        keys = all_gather_rows(key, counts)
        return 2 * self.temperature * info_nce(query, keys, temperature=self.temperature, positive=positive)


def _encode(encoder: SplitViT, parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The embeddings (B, C) of all parts, and the tokens (B_0, H, W, C) of the first one."""
    tokens = [encoder.early(images) for images in parts]
    return torch.cat([encoder.pool(encoder.late(part)) for part in tokens]), tokens[0]
