"""Batches of images in an order that the seed and the epoch decide, and what becomes of files that can't be read."""

import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

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


# What ends a worker, also a stopped one; SIGTERM lets it close its files.
_END = [getattr(signal, name) for name in ("SIGTERM", "SIGCONT") if hasattr(signal, name)]


class LoaderError(ChildProcessError):
    """A worker gave no batch in time, or died; the message names it, and the file that it was reading."""


class _BatchReader(Dataset[Batch]):
    """Reads whole batches, so that what becomes of an unreadable file is decided in one place.

    In training the next readable item takes its place: batches keep their size, on every rank. In evaluation it is
    left out: no item counts twice.

    Attributes:
        places: (workers,) int64 in shared memory, the index of the image that each is reading; -1 for none.
    """

    def __init__(self, images: ImageDataset, *, train: bool, workers: int = 0) -> None:
        self.images, self.train = images, train
        self.places = torch.full((workers,), -1).share_memory_()

    def __getitem__(self, indices: list[int]) -> Batch:
        items: list[tuple[Any, ...]] = []  # (image, label, index), and the aspect where it isn't 1
        skipped: list[tuple[str, str]] = []
        worker = get_worker_info()
        place = torch.empty(()) if worker is None else self.places[worker.id]
        for index in indices:
            for offset in range(len(self.images) if self.train else 1):
                place.fill_((index + offset) % len(self.images))
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
        place.fill_(-1)
        return Batch(
            images=self._stack([item[0] for item in items]),
            aspects=torch.tensor([item[3] if len(item) > 3 else 1 for item in items], dtype=torch.float64),
            labels=torch.tensor([item[1] for item in items], dtype=torch.int64),
            indices=torch.tensor([item[2] for item in items], dtype=torch.int64),
            skipped=skipped,
        )

    def _stack(self, images: list[Tensor]) -> Tensor:
        """(B, 3, S, S); a worker's in shared memory from the start, which spares the copy when it is sent."""
        size = self.images.image_size
        shape = len(images), 3, size, size
        if not images or get_worker_info() is None:
            return torch.stack(images) if images else torch.empty(shape, dtype=torch.uint8)
        # Not share_memory_(), which would copy what is not written yet; torch's default_collate does so.
        storage = torch.UntypedStorage._new_shared(math.prod(shape))
        return torch.stack(images, out=images[0].new_empty(0).set_(storage, 0, shape))  # type: ignore[call-overload]


class Loader(DataLoader[Batch]):
    """The DataLoader of make_loader: iterates over Batch, and enters unreadable files in the dataset's `skipped`.

    Attributes:
        limit: seconds that the workers may take for a batch within `failures_named`; 0 waits for ever.
    """

    sampler: EpochSampler
    dataset: _BatchReader
    limit: float = 0
    _waiting: tuple[float, int] | None = None  # since when, and for which worker

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        # Worker processes read copies of the dataset: what they could not read becomes known here, with the batch.
        skipped = self.dataset.images.skipped
        self._waiting = time.monotonic(), 0
        with _held_back(signal.SIGINT), _without_torchs_handler():
            batches = super().__iter__()
        for number, batch in enumerate(batches, start=1):
            self._waiting = None
            skipped += [entry for entry in dict.fromkeys(batch.skipped) if entry not in skipped]
            yield batch
            self._waiting = time.monotonic(), number % max(1, self.num_workers)  # workers take turns
        self._waiting = None

    @contextmanager
    def failures_named(self) -> Iterator[None]:
        """Iterate in here: what ends the workers becomes an error of one line.

        Raises:
            LoaderError: a worker gave no batch in time, or died.
            ValueError: a worker raised it.
        """
        done, late = threading.Event(), list[str]()
        watch = threading.Thread(target=self._watch, args=(done, late), daemon=True)
        if self.limit and self.num_workers:
            watch.start()
        try:
            with _without_torchs_handler():
                yield
        except (RuntimeError, EOFError, OSError) as error:
            if late:
                raise LoaderError(late[0]) from error
            if isinstance(error, RuntimeError) and str(error).startswith("DataLoader "):  # which has no type of its own
                raise LoaderError(f"data: {str(error).strip().rstrip('.')}{self._reading()}") from error
            raise
        except ValueError as error:
            if not str(error).startswith("Caught "):  # the worker's traceback stands in the message
                raise
            raise ValueError(str(error).splitlines()[-1].partition(": ")[2]) from error
        finally:
            done.set()

    def _watch(self, done: threading.Event, late: list[str]) -> None:
        """End the workers where a batch is late, and say so.

        DataLoader's own limit does not see a stopped worker whose batch is being fetched, and names nobody.
        """
        while not done.wait(min(1.0, self.limit / 4)):
            waiting = self._waiting
            if waiting is not None and time.monotonic() - waiting[0] > self.limit:
                process = self._processes()[waiting[1]]
                late.append(
                    f"data: worker {waiting[1]} (process {process}) gave no batch in {self.limit:g} s (loader_timeout)"
                    f"{self._reading()}"
                )
                for process, number in product(self._processes(), _END):
                    with suppress(ProcessLookupError):
                        os.kill(process, number)
                return

    def _processes(self) -> list[int]:
        """The workers' process numbers."""
        iterator: Any = self._iterator
        return [worker.pid for worker in iterator._workers]

    def _reading(self) -> str:
        """Where each worker is that reads a file."""
        images = self.dataset.images
        return "".join(
            f"; worker {number} was reading "
            + (images.locate(index) if hasattr(images, "locate") else f"image {index}")
            for number, index in enumerate(self.dataset.places.tolist())
            if index >= 0
        )


@contextmanager
def _held_back(number: int) -> Iterator[None]:
    """Processes that are started in here never see the signal; this one gets it afterwards."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _without_torchs_handler() -> Iterator[None]:
    """What handled SIGCHLD before is put back afterwards; torch's handler is out of use meanwhile.

    It raises wherever the main thread is: also between taking a lock, as that of the queue of TensorBoard's writer, and
    the block that gives it back, after which everything waits for it. DataLoader looks for dead workers by itself every
    five seconds while it waits for a batch.
    """
    handler = getattr(signal, "SIGCHLD", None) and signal.getsignal(signal.SIGCHLD)
    if handler is None or threading.current_thread() is not threading.main_thread():
        yield  # there is none that Python could set, as on Windows
        return
    torchs = (getattr(handler, "__module__", None) or "").startswith("torch.utils.data.")
    signal.signal(signal.SIGCHLD, signal.SIG_DFL if torchs else handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, handler)


def _begin_worker(_: int) -> None:
    """Ctrl-C reaches every process of the terminal: the training ends after its step, and its workers with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # also where a server that forks was started before


def make_loader(
    dataset: ImageDataset,
    *,
    batch_size: int,
    train: bool,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    timeout: float = 0,
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
        timeout: seconds that the workers may take for a batch, see `Loader.failures_named`; 0 waits for ever.

    Raises:
        ValueError: batch_size is not a positive multiple of world_size or, in training, exceeds the dataset; rank is
            not in 0 .. world_size - 1; or seed, workers or timeout are negative.

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
    for name, number in (("seed", seed), ("workers", workers), ("timeout", timeout)):
        if number < 0:
            raise ValueError(f"{name}: got {number}, takes 0 or more")
    loader = Loader(
        _BatchReader(dataset, train=train, workers=workers),
        sampler=EpochSampler(
            len(dataset), batch_size=batch_size, seed=seed, rank=rank, world_size=world_size, train=train
        ),
        batch_size=None,  # the sampler yields whole batches
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=_begin_worker,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # DataLoader draws from it: the global random state stays as it was
    )
    loader.limit = timeout
    return loader
