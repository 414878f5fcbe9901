"""Frozen tokens to classes of pixels: a linear head, the nearest training tokens, and how both are scored."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from ser_fast.evaluation.classification import Interval
from ser_fast.evaluation.segmentation_sets import IGNORED
from ser_fast.lattice import Size
from ser_fast.progress import track

Head = Callable[[Tensor], Tensor]
"""Tokens (B, H, W, C) to scores of classes (B, H, W, K)."""

_RESAMPLES = 1000
_PRODUCTS = 2**24  # similarities at a time: 64 MiB


# ---------------------------------------------------------------- scores


@dataclass(frozen=True)
class Overlap:
    """How masks were predicted, with 95 % bootstrap intervals over images.

    The intersection over union (IoU) of a class is nan where neither mask has it.

    Attributes:
        miou: the mean IoU of the classes that the masks or the predictions have.
        accuracy: the share of pixels predicted right.
        iou: of each of K classes.
        pixels: (K,) int64, of each class in the masks.
        images: how many.
    """

    miou: Interval
    accuracy: Interval
    iou: list[Interval]
    pixels: Tensor
    images: int


def count_pixels(predicted: Tensor, mask: Tensor, classes: int) -> Tensor:
    """(3, K) int64 of one picture: the pixels of each class that are right, in the mask, and predicted.

    Args:
        predicted: (H, W) int64.
        mask: (H, W) uint8; IGNORED pixels count nowhere.
        classes: K.
    """
    valid = mask != IGNORED
    truth, found = mask[valid].long(), predicted[valid]
    parts = (truth[truth == found], truth, found)
    return torch.stack([torch.bincount(part, minlength=classes) for part in parts])


def overlap(counts: Tensor, *, seed: int = 0) -> Overlap:
    """Intersections over unions with intervals.

    Images are drawn with replacement, 1000 times; a class that a draw has in no mask and no prediction is left out of
    its mean.

    Args:
        counts: (N, 3, K) as `count_pixels` gives them.
        seed: of the bootstrap.

    Returns:
        Percentile intervals; nan where nothing was measured.
    """
    images, _, classes = counts.shape
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(images, (_RESAMPLES, images), generator=generator)
    weights = torch.zeros(_RESAMPLES, images, dtype=torch.float64).scatter_add_(
        1, drawn, torch.ones(_RESAMPLES, images, dtype=torch.float64)
    )
    whole = counts.double().sum(0, keepdim=True)  # (1, 3, K)
    sums = torch.cat([whole, (weights @ counts.double().flatten(1)).unflatten(1, (3, classes))])  # (1 + R, 3, K)
    right, truth, found = sums.unbind(1)
    iou = right / (truth + found - right)  # (1 + R, K), nan where there is neither
    accuracy = right.sum(1) / truth.sum(1)
    return Overlap(
        _interval(iou.nanmean(1)),
        _interval(accuracy),
        [_interval(column) for column in iou.unbind(1)],
        counts[:, 1].sum(0),
        images,
    )


def _interval(values: Tensor) -> Interval:
    """The first value, and the 2.5 % and 97.5 % quantiles of the others that aren't nan."""
    low, high = torch.nanquantile(values[1:], torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(float(values[0]), low, high)


# ---------------------------------------------------------------- heads


def upsample(scores: Tensor, size: Size) -> Tensor:
    """Scores (B, H, W, K) at the tokens to (B, K, h, w) at pixels, bilinear between the tokens' centers."""
    return F.interpolate(scores.permute(0, 3, 1, 2), size=size, mode="bilinear", align_corners=False)


@dataclass(frozen=True)
class LinearHead:
    """A trained linear head.

    Attributes:
        head: tokens (B, H, W, C), as they come, to scores (B, H, W, K), on the device that it was trained on.
        rate: the learning rate that was chosen.
        held_out: rate: the mean IoU on the held-out part of the training images, of a head trained on the rest.
    """

    head: nn.Module
    rate: float
    held_out: dict[float, float]


def train_head(
    tokens: Tensor,
    masks: Tensor,
    *,
    classes: int,
    rates: Sequence[float],
    epochs: int,
    batch_size: int,
    held_out: float,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> LinearHead:
    """Train a linear head at every learning rate side by side, choose the rate, and train it on all training images.

    Cross-entropy at the pixels of the scores between the tokens, AdamW without weight decay, the rate falling to 0
    along a cosine. Each channel is first standardized over the tokens. All rates start from zero and see the same
    batches.

    Args:
        tokens: (N, H, W, C) floats, on the CPU, may be memory-mapped.
        masks: (N, S, S) uint8, likewise.
        classes: K, more than any class of the masks.
        rates: learning rates; the first best is chosen.
        epochs: passes over the training images.
        batch_size: images a step.
        held_out: share of the training images that the rate is chosen on, in (0, 1).
        seed: of that share and the order.
        device: where the head is trained.
        progress: show a bar on the terminal.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(tokens), generator=generator)
    validation, rest = order.tensor_split([round(held_out * len(order))])
    start = nn.Sequential(_standardization(tokens), nn.Linear(tokens.shape[-1], classes)).to(device)
    for parameter in start[1].parameters():
        nn.init.zeros_(parameter)

    def fit(rows: Tensor, head_rates: Sequence[float], title: str) -> list[nn.Module]:
        heads: list[nn.Module] = [deepcopy(start) for _ in head_rates]
        groups = [{"params": head.parameters(), "lr": rate} for head, rate in zip(heads, head_rates, strict=True)]
        optimizer = torch.optim.AdamW(groups, weight_decay=0)
        schedule = CosineAnnealingLR(optimizer, epochs * -(-len(rows) // batch_size))
        for _ in track(range(epochs), title, show=progress):
            for batch in rows[torch.randperm(len(rows), generator=generator)].split(batch_size):
                features, truth = tokens[batch].to(device), masks[batch].to(device).long()
                optimizer.zero_grad()
                for head in heads:  # one after another: pixels x classes scores of all rates would be held at once
                    _cross_entropy(head(features), truth).backward()
                optimizer.step()
                schedule.step()
        return heads

    miou = {}
    for rate, head in zip(rates, fit(rest, rates, "learning rates"), strict=True):
        miou[rate] = overlap(
            torch.stack([predict(head, tokens[i : i + 1].to(device), masks[i]) for i in validation.tolist()])
        ).miou.value
    rate = max(miou, key=lambda rate: miou[rate])
    (head,) = fit(order, [rate], "linear head")
    return LinearHead(head, rate, miou)


class _Standardize(nn.Module):
    """Channels less their mean, over their deviation."""

    def __init__(self, mean: Tensor, deviation: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", deviation)
        self.mean: Tensor
        self.deviation: Tensor

    def forward(self, tokens: Tensor) -> Tensor:
        return (tokens - self.mean) / self.deviation


def _standardization(tokens: Tensor) -> _Standardize:
    """Over all tokens (N, H, W, C), an image at a time."""
    total = torch.zeros(2, tokens.shape[-1], dtype=torch.float64)
    for image in tokens:
        flat = image.flatten(0, 1).double()
        total += torch.stack([flat.sum(0), flat.square().sum(0)])
    mean, square = total / tokens[..., 0].numel()
    return _Standardize(mean.float(), (square - mean.square()).clamp(min=1e-12).sqrt().float())


def _cross_entropy(scores: Tensor, truth: Tensor) -> Tensor:
    """The mean over the pixels of truth (B, S, S) that count; 0 where none does."""
    losses = F.cross_entropy(
        upsample(scores, (truth.shape[1], truth.shape[2])), truth, ignore_index=IGNORED, reduction="sum"
    )
    return losses / (truth != IGNORED).sum().clamp(min=1)


class Retrieval(nn.Module):
    """The classes of the most similar training tokens, by cosine from their mean.

    A token's scores are the shares of classes among the pixels of its k nearest tokens, weighted by
    exp(cosine / temperature).

    Args:
        tokens: (N, H, W, C) of training images, on the CPU, may be memory-mapped.
        masks: (N, S, S) uint8, S / H and S / W whole.
        classes: K.
        k: neighbors.
        temperature: of their weights.
        bank: tokens that are kept, at most; as many of each image, drawn by the seed.
        seed: of the draw.

    Source: Balazevic et al., "Towards In-Context Scene Understanding", 2023 (k = 30, temperature 0.02), without the
    learned augmentations.
    """

    def __init__(
        self, tokens: Tensor, masks: Tensor, *, classes: int, k: int, temperature: float, bank: int, seed: int = 0
    ) -> None:
        super().__init__()
        images, height, width, _ = tokens.shape
        generator = torch.Generator().manual_seed(seed)
        # Where the bank is smaller than the images are many, a token of some of them.
        chosen = torch.randperm(images, generator=generator)[: min(images, bank)].sort().values
        count = min(height * width, bank // len(chosen))
        kept, shares = [], []
        for index in chosen.tolist():
            rows = torch.randperm(height * width, generator=generator)[:count]
            image_shares = class_shares(masks[index], (height, width), classes)[rows]
            counted = image_shares.sum(1) > 0
            kept.append(tokens[index].flatten(0, 1)[rows][counted])
            shares.append(image_shares[counted])
        keys = torch.cat(kept).float()
        self.k, self.temperature = min(k, len(keys)), temperature
        self.register_buffer("mean", keys.mean(0))
        self.register_buffer("keys", F.normalize(keys - keys.mean(0), dim=-1))
        self.register_buffer("shares", torch.cat(shares))
        self.mean: Tensor
        self.keys: Tensor
        self.shares: Tensor

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, H, W, C) to shares of classes (B, H, W, K)."""
        queries = F.normalize(tokens.flatten(0, 2).float() - self.mean, dim=-1)
        found = []
        for part in queries.split(max(1, _PRODUCTS // max(len(self.keys), self.k * self.shares.shape[1]))):
            cosines, rows = (part @ self.keys.T).topk(self.k, dim=1)
            weights = (cosines / self.temperature).softmax(1)
            found.append((weights[..., None] * self.shares[rows]).sum(1))
        return torch.cat(found).unflatten(0, tokens.shape[:3])


def class_shares(mask: Tensor, size: Size, classes: int) -> Tensor:
    """(H*W, K) float32: the share of each class among the pixels of each token that count; 0 where none does.

    Args:
        mask: (S, S) uint8.
        size: (H, W) of the tokens, which divide S.
        classes: K.
    """
    rows, columns = (torch.arange(side) * tokens // side for side, tokens in zip(mask.shape, size, strict=True))
    token = rows[:, None] * size[1] + columns  # (S, S)
    valid = mask != IGNORED
    entries = torch.bincount(token[valid] * classes + mask[valid].long(), minlength=size[0] * size[1] * classes)
    counts = entries.view(-1, classes).float()
    return counts / counts.sum(1, keepdim=True).clamp(min=1)


@torch.no_grad()
def predict(head: Head, tokens: Tensor, mask: Tensor) -> Tensor:
    """`count_pixels` of one picture's tokens (1, H, W, C) against its mask (h, w) of any size."""
    scores = head(tokens)
    return count_pixels(classes_of(scores, (mask.shape[0], mask.shape[1])), mask, scores.shape[-1])


def classes_of(scores: Tensor, size: Size) -> Tensor:
    """(h, w) int64 on the CPU: the likeliest class of each pixel, from scores (1, H, W, K) at the tokens."""
    return upsample(scores.float(), size)[0].argmax(0).cpu()
