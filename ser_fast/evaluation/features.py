"""Frozen features: what every evaluation reads from a model."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

import torch
from rich.progress import track
from torch import Tensor, nn
from torchvision.transforms.v2.functional import to_dtype

from ser_fast.training.data import Batch, ImageDataset, UnreadableImageError
from ser_fast.views import normalize


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
    """Images (N, 3, S, S) uint8 from evenly over a dataset, N at most `count`; unreadable files are left out.

    Raises:
        ValueError: a count below 1, or none of them can be read.
    """
    if count < 1:
        raise ValueError(f"images: got {count}, takes a positive number")
    images = []
    for index in torch.linspace(0, len(dataset) - 1, min(count, len(dataset))).long().tolist():
        with suppress(UnreadableImageError):
            images.append(dataset[index][0])
    if not images:
        raise ValueError("images: none of those chosen can be read")
    return torch.stack(images)


def embed(
    model: nn.Module, loader: Iterable[Batch], device: torch.device | str, *, progress: bool = False
) -> tuple[Tensor, Tensor]:
    """The embeddings of all images of a loader, in its order.

    Args:
        model: images (B, 3, S, S), normalised, to embeddings (B, C); on `device`.
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
    with evaluating(model):
        for batch in track(loader, "embedding", transient=True, disable=not progress):
            if len(batch.images):
                pixels = to_dtype(batch.images.to(device), torch.float32, scale=True)  # (B, 3, S, S)
                embeddings.append(model(normalize(pixels)).float().cpu())  # (B, C)
                labels.append(batch.labels)
    if not embeddings:
        raise ValueError("loader: gave no images to embed")
    return torch.cat(embeddings), torch.cat(labels)
