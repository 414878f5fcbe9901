"""Progress on the terminal, alike wherever something takes long."""

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

import rich.progress
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_APART = 15.0
"""Between lines that tell how far something is."""

_Item = TypeVar("_Item")


def progress_bar(*, show: bool = True, console: Console | None = None) -> Progress:
    """A bar of steps done, steps in all and the time that is left, which stays on the terminal.

    Args:
        show: False shows nothing.
        console: where it is drawn; default the terminal.

    Example:
        >>> with progress_bar() as bar:
        ...     task = bar.add_task("training", total=100)
        ...     bar.advance(task)
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not show)


def track(items: Iterable[_Item], description: str, *, show: bool, total: int | None = None) -> Iterable[_Item]:
    """The items, with a bar that goes when they end; where nobody watches one, a line on stderr now and then.

    Args:
        items: any iterable.
        description: what is being done.
        show: False shows nothing.
        total: how many items there are, where they can't say.
    """
    # Results go to stdout. Where that is a file or a pipe, the progress of long work goes to the other one.
    console = next((console for console in (Console(), Console(stderr=True)) if console.is_terminal), None)
    if show and console is None:
        return _tell(items, description, total)
    return rich.progress.track(items, description, total, console=console, transient=True, disable=not show)


def _tell(items: Iterable[_Item], description: str, total: int | None) -> Iterator[_Item]:
    """The items; a line of how many are done whenever it was long since the last one."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    last = time.monotonic()
    for done, item in enumerate(items):
        if (now := time.monotonic()) - last > SECONDS_APART:
            print(f"{description}: {done}{'' if total is None else f' of {total}'}", file=sys.stderr, flush=True)
            last = now
        yield item
