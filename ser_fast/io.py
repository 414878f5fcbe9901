"""Files that are whole or absent: written beside their place, then moved there."""

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` make a file under another name, flush it to disk, and give it its name.

    The other name can't be foreseen, so that no two processes share it and nobody has put a link there; the file gets
    the mode that the umask says, whatever `write` gave it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        write(partial)
        os.chmod(partial, 0o666 & ~_umask())
        _flush(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    if os.name == "posix":  # elsewhere a folder can't be opened
        _flush(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8, whatever the locale, whole or not at all; its line ends stay as they are.

    Names of files that are no UTF-8, which Python holds as surrogates, are written with backslashes.
    """
    data = text.encode("utf-8", "backslashreplace")
    write_atomically(path, lambda partial: partial.write_bytes(data))


def printable(name: object) -> str:
    """A name as it can be shown: control characters, such as those that steer a terminal, and surrogates escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(name))


def remove_partial_files(folder: Path) -> None:
    """Delete what `write_atomically` left behind where the process was killed; only while no other process writes."""
    for partial in folder.glob(".*.partial"):
        partial.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0o022)  # it can only be read by setting it
    os.umask(mask)
    return mask


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
