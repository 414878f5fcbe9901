"""Batches of images in an order that the seed and the epoch decide, and what becomes of files that can't be read."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ser_fast.data.pictures import UnreadableImageError
from ser_fast.data.sources import ImageDataset


@dataclass(frozen=True)
class Batch:
    """One rank's part of a batch.

    Attributes:
        images: (B, 3, S, S) uint8, square crops of the pictures or whole pictures stretched on a canvas.
        aspects: (B,) float64, the true width over height of what the images show.
        labels: (B,) int64; -1 for none.
        indices: (B,) int64, the items' own: where an unreadable file was replaced, those of the replacement.
        skipped: (path, reason) of the files that could not be read for this batch.
    """

    images: Tensor
    aspects: Tensor
    labels: Tensor
    indices: Tensor
    skipped: list[tuple[str, str]]

    def pin_memory(self) -> "Batch":
        """A copy in page-locked memory; DataLoader calls it."""
        images, aspects = self.images.pin_memory(), self.aspects.pin_memory()
        return Batch(images, aspects, self.labels.pin_memory(), self.indices.pin_memory(), self.skipped)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Batch":
        """The batch on a device."""
        return Batch(
            self.images.to(device, non_blocking=non_blocking),
            self.aspects.to(device, non_blocking=non_blocking),
            self.labels.to(device, non_blocking=non_blocking),
            self.indices.to(device, non_blocking=non_blocking),
            self.skipped,
        )


class EpochSampler(Sampler[list[int]]):
    """The indices of one rank's part of each batch, batch after batch.

    The order of an epoch is a permutation of the dataset that depends on (seed, epoch) alone. Batch b is its entries
    [b * batch_size, (b + 1) * batch_size), and rank r takes the r-th of world_size equal slices of it: a batch
    holds the same images for any number of ranks.

    Args:
        length: of the dataset.
        batch_size: images in a batch over all ranks.
        seed: of the order.
        rank, world_size: which of how many parts of a batch.
        train: False keeps the order of the dataset and its last, short batch.

    Attributes:
        batches: in an epoch.
    """

    def __init__(self, length: int, *, batch_size: int, seed: int, rank: int, world_size: int, train: bool) -> None:
        self.length, self.batch_size, self.seed, self.train = length, batch_size, seed, train
        self.rank, self.world_size = rank, world_size
        self.batches = length // batch_size if train else -(-length // batch_size)
        self.epoch = self.start = 0

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch."""
        self.epoch, self.start = epoch, 0

    def set_start(self, batch: int) -> None:
        """Begin this epoch at a batch, to resume in its middle; the images before it are not loaded.

        Raises:
            ValueError: an epoch has no such batch.
        """
        if not 0 <= batch <= self.batches:
            raise ValueError(f"batch: got {batch}, takes 0 to {self.batches}, the batches of an epoch")
        self.start = batch

    def __len__(self) -> int:
        return self.batches - self.start

    def __iter__(self) -> Iterator[list[int]]:
        order = np.arange(self.length)
        if self.train:
            order = np.random.default_rng((self.seed, self.epoch)).permutation(self.length)
        share = self.batch_size // self.world_size
        for batch in range(self.start, self.batches):
            indices = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield indices[self.rank * share : (self.rank + 1) * share].tolist()


class _BatchReader(Dataset[Batch]):
    """Reads whole batches, so that what becomes of an unreadable file is decided in one place.

    In training the next readable item takes its place: batches keep their size, on every rank. In evaluation it is
    left out: no item counts twice.
    """

    def __init__(self, images: ImageDataset, *, train: bool) -> None:
        self.images, self.train = images, train

    def __getitem__(self, indices: list[int]) -> Batch:
        items: list[tuple[Any, ...]] = []  # (image, label, index), and the aspect where it isn't 1
        skipped: list[tuple[str, str]] = []
        for index in indices:
            for offset in range(len(self.images) if self.train else 1):
                try:
                    items.append(self.images[(index + offset) % len(self.images)])
                    break
                except UnreadableImageError as error:
                    skipped.append((error.path, error.reason))
            else:
                if self.train:
                    raise ValueError(
                        f"data: got {len(self.images)} images, none of which can be read any more: {skipped[-1]}"
                    )
        size = self.images.image_size
        return Batch(
            images=torch.stack([item[0] for item in items]) if items else torch.empty(0, 3, size, size).byte(),
            aspects=torch.tensor([item[3] if len(item) > 3 else 1 for item in items], dtype=torch.float64),
            labels=torch.tensor([item[1] for item in items], dtype=torch.int64),
            indices=torch.tensor([item[2] for item in items], dtype=torch.int64),
            skipped=skipped,
        )


class Loader(DataLoader[Batch]):
    """The DataLoader of make_loader: iterates over Batch, and enters unreadable files in the dataset's `skipped`."""

    sampler: EpochSampler
    dataset: _BatchReader

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        # Worker processes read copies of the dataset: what they could not read becomes known here, with the batch.
        skipped = self.dataset.images.skipped
        for batch in super().__iter__():
            skipped += [entry for entry in dict.fromkeys(batch.skipped) if entry not in skipped]
            yield batch


def make_loader(
    dataset: ImageDataset,
    *,
    batch_size: int,
    train: bool,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
) -> Loader:
    """Load a dataset in batches, in an order that (seed, epoch) decides whatever the number of ranks and workers.

    loader.sampler.set_epoch(epoch) begins an epoch and set_start(batch) resumes in it; len(loader) counts what is left.
    With CUDA, batches are in pinned memory.

    Args:
        dataset: of `open_dataset`, or alike.
        batch_size: images in a batch over all ranks; each of world_size ranks loads batch_size / world_size of them.
        train: True shuffles, gives whole batches only, and replaces an unreadable file by the next readable one. False
            gives all of the dataset in its order, an unreadable file left out (a rank's last batches may be shorter).
        seed: of the order.
        rank, world_size: which of how many parts of a batch.
        workers: processes that load, kept between epochs; 0 loads in this process.

    Raises:
        ValueError: batch_size is not a positive multiple of world_size or, in training, exceeds the dataset; rank is
            not in 0 .. world_size - 1; or seed or workers are negative.

    Example:
        >>> loader = make_loader(dataset, batch_size=256, train=True, seed=0, workers=2)
        >>> loader.sampler.set_epoch(3)
        >>> for batch in loader:
        ...     batch.images  # (256, 3, S, S) uint8
    """
    if world_size < 1 or not 0 <= rank < world_size:
        raise ValueError(f"rank: got {rank} of world_size={world_size}, takes 0 to world_size - 1")
    if batch_size < 1 or batch_size % world_size:
        raise ValueError(f"batch_size: got {batch_size}, takes a positive multiple of world_size={world_size}")
    if train and batch_size > len(dataset):
        raise ValueError(f"batch_size: got {batch_size}, takes the {len(dataset)} images of the dataset at most")
    for name, number in (("seed", seed), ("workers", workers)):
        if number < 0:
            raise ValueError(f"{name}: got {number}, takes 0 or more")
    return Loader(
        _BatchReader(dataset, train=train),
        sampler=EpochSampler(
            len(dataset), batch_size=batch_size, seed=seed, rank=rank, world_size=world_size, train=train
        ),
        batch_size=None,  # the sampler yields whole batches
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # DataLoader draws from it: the global random state stays as it was
    )
