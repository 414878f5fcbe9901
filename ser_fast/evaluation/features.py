"""Frozen features: what every evaluation reads from a model."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from torchvision.transforms.v2.functional import to_dtype

from ser_fast.data.loader import Batch, make_loader
from ser_fast.data.pictures import UnreadableImageError
from ser_fast.data.sources import ImageDataset, ImageFolder, Squares
from ser_fast.io import write_atomically
from ser_fast.progress import track
from ser_fast.views.pixels import normalize
from ser_fast.vit import SplitViT

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
    """Images from evenly over a dataset, unreadable files left out.

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
        with suppress(UnreadableImageError):
            image, label, _ = dataset[index]
            images.append(image)
            labels.append(label)
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
    and arguments, split), of what is read from it, and of the data set: its kind, length, image size and classes, the
    pixels of 16 images evenly over it and, of a folder, each file's name, size and time of change.

    Args:
        model: on `device`.
        dataset: labelled images.
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

    stem = cache / _digest(model, dataset, blocks)
    features_file, labels_file = stem.with_suffix(".f32"), stem.with_suffix(".npy")
    if not labels_file.is_file():  # written last
        labels: list[Tensor] = []

        def write(path: Path) -> None:
            with path.open("wb") as file:
                for batch_features, batch_labels in batches():
                    file.write(batch_features.numpy().tobytes())
                    labels.append(batch_labels)

        write_atomically(features_file, write)
        if not labels:
            raise ValueError(f"dataset: got {len(dataset)} images that can't be read, takes readable ones")

        def write_labels(path: Path) -> None:
            with path.open("wb") as file:
                np.save(file, torch.cat(labels).numpy())

        write_atomically(labels_file, write_labels)
    image_labels = torch.from_numpy(np.load(labels_file))  # (N,)
    numbers = features_file.stat().st_size // 4
    mapped = torch.from_file(str(features_file), shared=False, size=numbers, dtype=torch.float32)
    return mapped.view(len(image_labels), -1), image_labels


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
    files = []
    source = dataset.source if isinstance(dataset, Squares) else dataset
    if isinstance(source, ImageFolder):
        files = [(path, (stat := Path(path).stat()).st_size, stat.st_mtime_ns) for path, _ in source.files]
    described = [type(source).__name__, len(dataset), dataset.image_size, dataset.classes, dataset.digest(), files]
    digest.update(json.dumps([described, model.recipe, model.split, blocks], default=str).encode())
    digest.update(spread_images(dataset, _PROBED).numpy().tobytes())
    return digest.hexdigest()[:32]
