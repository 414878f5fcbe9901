"""The order, the end and the errors of batches that are begun one ahead."""

from collections.abc import Iterator

import pytest
import torch

from ser_fast.data.prefetch import one_ahead, prefetch


def logged(items: Iterator[int] | range, count: int | None = None) -> list[str]:
    """What happens, in which order: items are read (r), begun (b), finished (f) and used (u)."""
    log: list[str] = []

    def read() -> Iterator[int]:
        for item in items:
            log.append(f"r{item}")
            yield item

    def note(letter: str, item: int) -> int:
        log.append(f"{letter}{item}")
        return item

    try:
        for number, item in enumerate(
            one_ahead(read(), lambda item: note("b", item), lambda item: note("f", item)), start=1
        ):
            log.append(f"u{item}")
            if number == count:
                break
    except OSError as error:
        log.append(str(error))
    return log


def failing() -> Iterator[int]:
    yield 0
    yield 1
    raise OSError("no such file")


@pytest.mark.parametrize(
    ("items", "count", "log"),
    [
        (range(3), None, "r0 b0 r1 b1 f0 u0 r2 b2 f1 u1 f2 u2"),
        (range(1), None, "r0 b0 f0 u0"),
        (range(0), None, ""),
        (range(9), 2, "r0 b0 r1 b1 f0 u0 r2 b2 f1 u1"),
        (failing(), None, "r0 b0 r1 b1 f0 u0 f1 u1 no such file"),
    ],
    ids=["three", "one", "none", "left early", "an error"],
)
def test_each_is_begun_before_the_one_before_it_is_used(
    items: Iterator[int] | range, count: int | None, log: str
) -> None:
    assert " ".join(logged(items, count)) == log


def test_nothing_is_ahead_on_the_cpu() -> None:
    batches = iter([(0, None), (0, None)])
    assert prefetch(batches, torch.device("cpu")) is batches
