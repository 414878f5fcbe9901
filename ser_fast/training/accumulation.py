"""Gradient accumulation that is exact: heads, batch norms, contrast and add-ons see the whole batch.

The encoder walks over the parts of a batch twice: without a graph, for the embeddings and token maps that the losses of
the whole batch are computed on; and with one, for the gradients that these have given them. N parts then give what one
part gives, in the memory of one, for one more forward pass of the encoder.

Source: GradCache, arXiv 2101.06983.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ser_fast.distributed import add_up, world_size
from ser_fast.training.pretraining import Pretraining
from ser_fast.views.recipe import Views
from ser_fast.vit import Encoded


def backward_in_parts(
    model: Pretraining,
    views: Views,
    parts: int,
    progress: float,
    *,
    amp: torch.dtype | None = None,
    scale: Callable[[Tensor], Tensor] = lambda loss: loss,
) -> dict[str, Tensor]:
    """Add the gradient of the losses of a whole batch, of all ranks where there are several, to the parameters.

    Args:
        model: not wrapped in DistributedDataParallel: its gradients are averaged over the ranks here.
        views: of the whole batch of this rank.
        parts: how many to walk over, one after another.
        progress: in [0, 1) of the training.
        amp: the dtype of autocast; None: without.
        scale: of the loss, before the backward pass.

    Returns:
        What `Pretraining.forward` returns, without a graph.
    """
    device = views.views[0].images[0].device
    chunks = split_views(views, parts)

    def autocast() -> torch.autocast:
        return torch.autocast(device.type, amp, enabled=amp is not None)

    states, seen, teacher = [], [], []
    for chunk in chunks:
        states.append(_random_state(device))
        with torch.no_grad(), autocast():
            seen.append(model.encode(chunk))
            teacher.append(model.teach(chunk))
    joined = [_join(list(of_view), views, index) for index, of_view in enumerate(zip(*seen, strict=True))]
    leaves = [_leaves(encoded) for encoded in joined]
    taught = [
        None if any(part is None for part in of_view) else _join([part for part in of_view if part], views, index)
        for index, of_view in enumerate(zip(*teacher, strict=True))
    ]
    with autocast():
        losses = model.contrast(views, leaves, taught, progress)
    scale(losses["loss"]).backward()

    after = _random_state(device)
    gradients = [_split(_gradients(encoded), views, index, parts) for index, encoded in enumerate(leaves)]
    for number, (chunk, state) in enumerate(zip(chunks, states, strict=True)):
        _set_random_state(state, device)
        with autocast():
            again = model.encode(chunk)
        pairs = [
            pair
            for encoded, of_view in zip(again, gradients, strict=True)
            for pair in _pairs(encoded, of_view[number])
            if pair[0].requires_grad and pair[0].numel() > 0
        ]
        torch.autograd.backward([value for value, _ in pairs], [gradient for _, gradient in pairs])
    _set_random_state(after, device)
    average_gradients(model)
    return {name: value.detach() for name, value in losses.items()}


def split_views(views: Views, parts: int) -> list[Views]:
    """The views of `parts` shares of the samples, as equal as can be; their maps stay those of all samples."""
    cut = [[images.tensor_split(parts) for images in view.images] for view in views.views]
    return [
        replace(
            views,
            views=[
                replace(view, images=[images[number] for images in of_view])
                for view, of_view in zip(views.views, cut, strict=True)
            ],
        )
        for number in range(parts)
    ]


def average_gradients(model: Pretraining) -> None:
    """Give every rank the mean of the ranks' gradients, as DistributedDataParallel does."""
    if world_size() == 1:
        return
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    for dtype in {gradient.dtype for gradient in gradients}:
        alike = [gradient for gradient in gradients if gradient.dtype == dtype]
        together = torch.cat([gradient.flatten() for gradient in alike])
        add_up(together)
        together /= world_size()
        for gradient, mean in zip(alike, together.split([gradient.numel() for gradient in alike]), strict=True):
            gradient.copy_(mean.view_as(gradient))


def _sizes(views: Views, index: int, parts: int) -> list[list[int]]:
    """For each of the parts of one view's images (its image sizes), the samples of each share."""
    return [[len(share) for share in images.tensor_split(parts)] for images in views.views[index].images]


def _join(encoded: list[Encoded], views: Views, index: int) -> Encoded:
    """What was encoded of a view in shares, in the order of the whole batch."""
    sizes = _sizes(views, index, len(encoded))
    embedding = None
    if encoded[0].embedding is not None:
        # A share's embedding has the samples of every image size one after another.
        pieces = [
            part.embedding.split([size[number] for size in sizes])
            for number, part in enumerate(encoded)
            if part.embedding is not None
        ]
        embedding = torch.cat([piece[size] for size in range(len(sizes)) for piece in pieces])
    tokens = {layer: torch.cat([part.tokens[layer] for part in encoded]) for layer in encoded[0].tokens}
    cls = {layer: torch.cat([part.cls[layer] for part in encoded]) for layer in encoded[0].cls}
    return Encoded(embedding, tokens, cls)


def _split(encoded: Encoded, views: Views, index: int, parts: int) -> list[Encoded]:
    """The opposite of `_join`."""
    sizes = _sizes(views, index, parts)
    embeddings: list[Tensor | None] = [None] * parts
    if encoded.embedding is not None:
        pieces = [
            piece.split(size)
            for piece, size in zip(encoded.embedding.split([sum(size) for size in sizes]), sizes, strict=True)
        ]
        embeddings = [torch.cat([piece[number] for piece in pieces]) for number in range(parts)]
    tokens, cls = (
        [{layer: feature.split(sizes[0])[number] for layer, feature in found.items()} for number in range(parts)]
        for found in (encoded.tokens, encoded.cls)
    )
    return [Encoded(*share) for share in zip(embeddings, tokens, cls, strict=True)]


def _map(encoded: Encoded, change: Callable[[Tensor], Tensor]) -> Encoded:
    tokens, cls = ({layer: change(value) for layer, value in found.items()} for found in (encoded.tokens, encoded.cls))
    return Encoded(None if encoded.embedding is None else change(encoded.embedding), tokens, cls)


def _leaves(encoded: Encoded) -> Encoded:
    return _map(encoded, lambda value: value.detach().requires_grad_())


def _gradients(encoded: Encoded) -> Encoded:
    return _map(encoded, lambda value: torch.zeros_like(value) if value.grad is None else value.grad)


def _pairs(encoded: Encoded, gradient: Encoded) -> list[tuple[Tensor, Tensor]]:
    """Each tensor with its gradient."""
    pairs = [(encoded.tokens[layer], gradient.tokens[layer]) for layer in encoded.tokens]
    pairs += [(encoded.cls[layer], gradient.cls[layer]) for layer in encoded.cls]
    if encoded.embedding is not None and gradient.embedding is not None:
        pairs.append((encoded.embedding, gradient.embedding))
    return pairs


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
