"""The commands of `ser-fast`, a module a family. Each imports what it needs when it runs, so that all start fast."""

from rich.console import Console

from ser_fast.io import printable


def say(line: str) -> None:
    """Print a line that may hold names of files: none of them is markup, or steers the terminal."""
    Console().print(printable(line), markup=False, soft_wrap=True)
