"""Commands as a user types them, run in this process."""

import csv
import sys
from pathlib import Path

import pytest

from ser_fast import cli

PNG = b"\x89PNG\r\n\x1a\n"


def run_cli(*argv: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ser-fast", *map(str, argv)])
        cli.main()


def refusal(*argv: object) -> str:
    """What a command of the user's making ends with: one line, with exit status 1."""
    with pytest.raises(SystemExit) as stopped:
        run_cli(*argv)
    message = stopped.value.code
    assert isinstance(message, str)  # sys.exit prints it and exits with 1
    assert message.startswith("ser-fast: ")
    assert "\n" not in message
    return message.removeprefix("ser-fast: ")


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def assert_same_files(ours: list[Path], theirs: Path) -> None:
    """The files hold the same bytes as those of the same names in another folder."""
    for path in ours:
        assert path.read_bytes() == (theirs / path.name).read_bytes(), path.name
