"""Progress on the terminal, alike wherever something takes long."""

from collections.abc import Iterable
from typing import TypeVar

import rich.progress
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

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
    """The items, with a bar that goes when they end; none where the output is no terminal.

    Args:
        items: any iterable.
        description: what is being done.
        show: False shows nothing.
        total: how many items there are, where they can't say.
    """
    console = Console()
    shown = show and console.is_terminal  # elsewhere it would leave empty lines
    return rich.progress.track(items, description, total, console=console, transient=True, disable=not shown)
