"""Batches whose images are on their way to a GPU while the step before runs."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import TypeVar

import torch

from ser_fast.data.loader import Batch
from ser_fast.device import send

T = TypeVar("T")
S = TypeVar("S")


def prefetch(batches: Iterable[tuple[int, Batch]], device: torch.device) -> Iterable[tuple[int, Batch]]:
    """The same (epoch, batch) in the same order; on a GPU, with the images there.

    The copy of a batch runs on a stream of its own, from when the batch before it is given out.
    """
    if device.type != "cuda":
        return batches
    stream = torch.cuda.Stream(device)

    def begin(item: tuple[int, Batch]) -> tuple[int, Batch, torch.cuda.Event]:
        epoch, batch = item
        with torch.cuda.stream(stream):
            return epoch, replace(batch, images=send(batch.images, device)), stream.record_event()

    def finish(begun: tuple[int, Batch, torch.cuda.Event]) -> tuple[int, Batch]:
        epoch, batch, copied = begun
        current = torch.cuda.current_stream(device)
        current.wait_event(copied)
        batch.images.record_stream(current)  # allocated on the other stream: not to be reused there before
        return epoch, batch

    return one_ahead(batches, begin, finish)


def one_ahead(items: Iterable[T], begin: Callable[[T], S], finish: Callable[[S], T]) -> Iterator[T]:
    """What begin and finish make of each item, begun before the item before it is given out.

    An error of `items` is raised in its place, after what came before it.
    """
    begun: deque[S] = deque()
    error: Exception | None = None
    try:
        for item in items:
            begun.append(begin(item))
            if len(begun) > 1:
                yield finish(begun.popleft())
    except Exception as failure:
        error = failure
    while begun:
        yield finish(begun.popleft())
    if error is not None:
        raise error
