"""Frozen features: what every evaluation reads from a model."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from torchvision.transforms.v2.functional import to_dtype

from ser_fast.data.loader import Batch, make_loader
from ser_fast.data.pictures import UnreadableImageError
from ser_fast.data.sources import ImageDataset, Squares
from ser_fast.io import printable, write_atomically
from ser_fast.progress import track
from ser_fast.views.pixels import normalize
from ser_fast.vit import SplitViT

_logger = logging.getLogger(__name__)

_PROBED = 16  # images whose pixels tell one data set from another


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside the block; after it every submodule has the mode it had before.

    Example:
        >>> with evaluating(model):
        ...     embedding = model(images)
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        # Not inference_mode: its tensors could not train a linear probe, nor stay in a model's caches.
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def spread_images(dataset: ImageDataset, count: int) -> Tensor:
    """The images (N, 3, S, S) uint8 of `spread_items`."""
    return spread_items(dataset, count)[0]


def spread_items(dataset: ImageDataset, count: int) -> tuple[Tensor, Tensor]:
    """Images from evenly over a dataset, unreadable files left out and entered in its `skipped`.

    Args:
        dataset: images (3, S, S) uint8.
        count: how many, at most.

    Returns:
        Images (N, 3, S, S) uint8 and labels (N,) int64, N at most `count`.

    Raises:
        ValueError: a count below 1, or none of them can be read.
    """
    if count < 1:
        raise ValueError(f"images: got {count}, takes a positive number")
    images, labels = [], []
    for index in torch.linspace(0, len(dataset) - 1, min(count, len(dataset))).long().tolist():
        item = _read_item(dataset, index)
        if isinstance(item, UnreadableImageError):
            if (entry := (item.path, item.reason)) not in dataset.skipped:
                dataset.skipped.append(entry)
        else:
            images.append(item[0])
            labels.append(item[1])
    if not images:
        raise ValueError(f"images: got {count} that can't be read, takes readable ones")
    return torch.stack(images), torch.tensor(labels)


def embed(
    model: nn.Module, loader: Iterable[Batch], device: torch.device | str, *, progress: bool = False
) -> tuple[Tensor, Tensor]:
    """The embeddings of all images of a loader, in its order.

    Args:
        model: images (B, 3, S, S), normalized, to embeddings (B, C); on `device`.
        loader: batches of uint8 images and labels, as make_loader(train=False) gives them.
        device: where the model runs.
        progress: show a bar on the terminal.

    Returns:
        On the CPU: embeddings (N, C) float32 and labels (N,) int64.

    Raises:
        ValueError: the loader gives no images.

    Example:
        >>> features, labels = embed(model, make_loader(dataset, batch_size=256, train=False), "cuda")
    """
    embeddings, labels = [], []
    for batch_features, batch_labels in _embed_batches(model, loader, device, model=model, progress=progress):
        embeddings.append(batch_features)
        labels.append(batch_labels)
    if not embeddings:
        raise ValueError("loader: got no images, takes one or more")
    return torch.cat(embeddings), torch.cat(labels)


def embed_cached(
    model: SplitViT,
    dataset: ImageDataset,
    device: torch.device | str,
    *,
    cache: Path | None = None,
    blocks: int | None = None,
    batch_size: int = 256,
    workers: int = 0,
    progress: bool = False,
) -> tuple[Tensor, Tensor]:
    """`embed`, kept in files: the features of a data set are computed once and then memory-mapped.

    Without a cache they are computed and kept in memory. The files' name is a digest of the model (weights, timm name
    and arguments, split), of what is read from it, and of the data set: what it lists, image size, crop and classes,
    the times of its files or all of its pictures (`Source.fingerprint`), and the pixels of 16 images evenly over it.
    Files whose size or checksum does not fit are computed again, which is logged. What could not be read is in the data
    set's `skipped`, whether the features were computed or kept.

    Args:
        model: on `device`.
        dataset: labeled images.
        device: where the model runs.
        cache: folder of the files, made where it is missing; None keeps no files.
        blocks: None for the model's pooled embedding (C = embed_dim); n for [CLS] of the last n blocks, concatenated
            (C = n * embed_dim), as DINO's linear evaluation with n = 4.
        batch_size: images at a time.
        workers: processes that load images.
        progress: show a bar on the terminal.

    Returns:
        On the CPU: features (N, C) float32, memory-mapped, and labels (N,) int64.

    Raises:
        ValueError: no image can be read, or blocks that the model can't give (see `SplitViT.class_tokens`).
    """
    read: Callable[[Tensor], Tensor] = embedder(model, blocks)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        loader = make_loader(dataset, batch_size=batch_size, train=False, workers=workers)
        return _embed_batches(read, loader, device, model=model, progress=progress)

    if cache is None:
        parts = list(batches())
        if not parts:
            raise ValueError(f"dataset: got {len(dataset)} images that can't be read, takes readable ones")
        return torch.cat([features for features, _ in parts]), torch.cat([labels for _, labels in parts])

    kept = FeatureFiles(cache, _digest(model, dataset, blocks))
    content = kept.read()
    if content is None:
        kept.write(batches(), dataset.skipped)
        content = kept.read()
        if content is None:
            raise ValueError(f"cache: got {cache}, whose files another process changes")
    features, image_labels, skipped = content
    dataset.skipped += [entry for entry in skipped if entry not in dataset.skipped]
    return features, image_labels


class FeatureFiles:
    """The features of one model and data set in a folder, and whether they are whole.

    KEY.f32 holds the features, KEY.npz, which is written last, their labels, what could not be read, and what the other
    must be: its width and checksum.

    Args:
        folder: made where it is missing.
        key: of the model and the data set.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.key, self.features, self.labels = key, folder / f"{key}.f32", folder / f"{key}.npz"

    def read(self) -> tuple[Tensor, Tensor, list[tuple[str, str]]] | None:
        """Features (N, C) float32, memory-mapped, labels (N,) int64 and what could not be read.

        None where there are no such files, or damaged ones, which is logged.
        """
        if not self.labels.is_file():
            return None
        try:
            with np.load(self.labels, allow_pickle=False) as kept:
                labels, key, width, checksum = kept["labels"], kept["key"], int(kept["width"]), int(kept["checksum"])
                skipped = [(str(path), str(reason)) for path, reason in kept["skipped"]]
            if key != self.key or labels.dtype != np.int64 or labels.ndim != 1 or not labels.size or width < 1:
                raise ValueError("other labels")
            if self.features.stat().st_size != 4 * width * len(labels):
                raise ValueError(f"{self.features.stat().st_size} bytes for {len(labels)} x {width} features")
            if _checksum(self.features) != checksum:
                raise ValueError("another checksum")
        except Exception as error:  # zipfile, numpy and the file system raise many types for damaged files
            _logger.warning(
                "cache: %s is damaged (%s); its features are computed again",
                printable(self.features),
                printable(error),
            )
            return None
        mapped = np.memmap(self.features, np.float32, mode="c", shape=(len(labels), width))
        return torch.from_numpy(mapped), torch.from_numpy(labels), skipped

    def write(self, batches: Iterable[tuple[Tensor, Tensor]], skipped: Sequence[tuple[str, str]]) -> None:
        """Write the files, each whole or not at all.

        Args:
            batches: features (B, C) float32 and labels (B,) int64.
            skipped: what could not be read; it may grow with the batches.

        Raises:
            ValueError: there are no features.
        """
        labels: list[Tensor] = []
        width = checksum = 0

        def write_features(path: Path) -> None:
            nonlocal width, checksum
            with path.open("wb") as file:
                for batch_features, batch_labels in batches:
                    data = batch_features.numpy().tobytes()
                    width, checksum = batch_features.shape[1], crc32(data, checksum)
                    file.write(data)
                    labels.append(batch_labels)

        def write_labels(path: Path) -> None:
            with path.open("wb") as file:
                entries = np.array(list(skipped), dtype=str)
                np.savez(
                    file,
                    labels=torch.cat(labels).numpy(),
                    key=self.key,
                    width=width,
                    checksum=checksum,
                    skipped=entries.reshape(-1, 2),
                )

        self.labels.unlink(missing_ok=True)  # with damaged features, no reader must take them for whole
        write_atomically(self.features, write_features)
        if not labels:
            self.features.unlink()
            raise ValueError("dataset: got no image that can be read, takes readable ones")
        write_atomically(self.labels, write_labels)


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while data := file.read(2**24):
            checksum = crc32(data, checksum)
    return checksum


def embedder(model: SplitViT, blocks: int | None) -> Callable[[Tensor], Tensor]:
    """What is read from images (B, 3, S, S), normalized: features (B, C).

    Args:
        model: gives the features.
        blocks: None for its pooled embedding, n for [CLS] of its last n blocks, concatenated.
    """
    if blocks is None:
        return model
    return lambda images: torch.cat(model.class_tokens(images, blocks), 1)


def check_labelled(part: str, features: Tensor, labels: Tensor | None = None) -> None:
    """Raise ValueError, naming part_features or part_labels, unless they are finite (N, C) floats and N classes."""
    if features.ndim != 2 or not len(features) or not features.is_floating_point():
        raise ValueError(f"{part}_features: got {features.dtype} {tuple(features.shape)}, takes floats (N, C), N > 0")
    if not bool(torch.isfinite(features).all()):
        raise ValueError(f"{part}_features: got NaN or Inf, takes finite values")
    if labels is None:
        return
    if labels.shape != features.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(f"{part}_labels: got {labels.dtype} {tuple(labels.shape)}, takes int64 ({len(features)},)")
    if bool((labels < 0).any()):
        raise ValueError(f"{part}_labels: got {int(labels.min())}, takes classes from 0: images have one each")


def _embed_batches(
    read: Callable[[Tensor], Tensor],
    loader: Iterable[Batch],
    device: torch.device | str,
    *,
    model: nn.Module,
    progress: bool,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Features (B, C) float32 and labels (B,) of each batch, on the CPU; `read` uses `model`."""
    with evaluating(model):
        for batch in track(loader, "embedding", show=progress):
            if len(batch.images):
                pixels = to_dtype(batch.images.to(device), torch.float32, scale=True)  # (B, 3, S, S)
                yield read(normalize(pixels)).float().cpu(), batch.labels


def _digest(model: SplitViT, dataset: ImageDataset, blocks: int | None) -> str:
    digest = hashlib.sha256(safetensors.torch.save({k: v.cpu() for k, v in model.state_dict().items()}))
    content = dataset.fingerprint() if isinstance(dataset, Squares) else _hash_items(dataset)
    described = [len(dataset), dataset.image_size, dataset.classes, dataset.digest(), content]
    digest.update(json.dumps([described, model.recipe, model.split, blocks], default=str).encode())
    # Another decoder makes other pixels of the same files.
    digest.update(spread_images(dataset, _PROBED).numpy().tobytes())
    return digest.hexdigest()[:32]


def _hash_items(dataset: ImageDataset) -> str:
    """A hash of all images and labels, of a data set that has no shorter way to tell whether they changed."""
    digest = hashlib.sha256()
    for index in range(len(dataset)):
        item = _read_item(dataset, index)
        if isinstance(item, UnreadableImageError):
            digest.update(item.reason.encode(errors="replace"))
        else:
            digest.update(item[0].numpy().tobytes() + str(item[1]).encode())
    return digest.hexdigest()


def _read_item(dataset: ImageDataset, index: int) -> tuple[Any, ...] | UnreadableImageError:
    try:
        return dataset[index]
    except UnreadableImageError as error:
        return error
