"""The cells of a sweep: which options each changes."""

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import get_type_hints

from ser_fast.addons import ADDONS


@dataclass(frozen=True)
class Cell:
    """One setting of the options that a sweep varies.

    Attributes:
        name: in tables and figures.
        options: (option, value) as on the command line of `ser-fast train`; several values are parted by commas, and a
            flag's are "true" and "false".
    """

    name: str
    options: tuple[tuple[str, str], ...]

    @property
    def arguments(self) -> list[str]:
        """What is added to the command line."""
        return [word for option, value in self.options for word in _words(option, value)]

    @property
    def folder(self) -> str:
        """The name, as that of a folder."""
        return re.sub(r"[^\w.,=+-]+", "_", self.name)


def _words(option: str, value: str) -> list[str]:
    if value.lower() not in ("true", "false"):
        return [f"--{option}", *value.split(",")]
    group, dot, name = option.rpartition(".")
    if group in ADDONS and get_type_hints(ADDONS[group]).get(name.replace("-", "_")) == bool | None:
        return [f"--{option}", value.capitalize()]  # with a third value it is no flag
    return [f"--{group}{dot}{'no-' if value.lower() == 'false' else ''}{name}"]


def make_cells(varied: Iterable[Sequence[str]], named: Iterable[Sequence[str]]) -> list[Cell]:
    """All combinations of the varied options' values, then the named cells.

    Args:
        varied: an option's name and its values, each.
        named: a cell's name and its options as OPTION=VALUE, each. No option is the base.

    Raises:
        ValueError: no cell at all, an option without a value, a cell's option without "=", or a cell that comes twice.

    Example:
        >>> make_cells([["ser.weight", "0", "1"], ["ser.layers", "1", "2,4"]], [["base"]])[3].arguments
        ['--ser.weight', '1', '--ser.layers', '2', '4']
    """
    axes = []
    for option, *values in varied:
        if not values:
            raise ValueError(f"vary: got {option} without a value, takes OPTION VALUE ...")
        axes.append([(option.removeprefix("--"), value) for value in values])
    cells = [Cell(", ".join(map("=".join, options)), options) for options in itertools.product(*axes)] if axes else []
    for name, *settings in named:
        for setting in settings:
            if "=" not in setting.removeprefix("="):
                raise ValueError(f"cell: got {setting!r} in {name}, takes OPTION=VALUE")
        pairs = (setting.removeprefix("--").partition("=")[::2] for setting in settings)
        cells.append(Cell(name, tuple(pairs)))
    if not cells:
        raise ValueError("vary: got nothing, takes OPTION VALUE ..., or cells by name")
    for kind in ("name", "options", "folder"):
        values = [getattr(cell, kind) for cell in cells]
        if twice := [value for value in values if values.count(value) > 1]:
            raise ValueError(f"cell: got the {kind} {twice[0]} twice")
    return cells
