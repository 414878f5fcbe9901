"""Files that are whole or absent, written beside their place and then moved there; and how their names are shown."""

import os
import re
import secrets
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

_IDLE = 24 * 3600.0  # seconds after which nobody writes a partial file any more


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` make a file under another name, flush it to disk, and give it its name.

    The other name can't be foreseen, so that no two processes share it and nobody has put a link there; the file gets
    the mode that the umask says, whatever `write` gave it.

    Raises:
        OSError: it can't be written; one line with its name, which torch and safetensors do not give.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_partial_files(path.parent, idle=_IDLE)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        write(partial)
        os.chmod(partial, 0o666 & ~_umask())
        flush_to_disk(partial)
        partial.replace(path)
    except (OSError, RuntimeError, SafetensorError) as error:
        of_torch = isinstance(error, RuntimeError) and re.search("inline_container|iostream", str(error))
        ours = isinstance(error, OSError) and error.filename in (None, str(partial))
        if not (of_torch or ours or isinstance(error, SafetensorError)):
            raise  # what `write` computes went wrong
        reason, free = " ".join(str(error).split()), shutil.disk_usage(path.parent).free / 2**20
        raise OSError(f"{path} can't be written: {reason} ({free:.0f} MiB are free there)") from error
    finally:
        partial.unlink(missing_ok=True)
    flush_to_disk(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8, whatever the locale, whole or not at all; its line ends stay as they are.

    Names of files that are no UTF-8, which Python holds as surrogates, are written with backslashes.
    """
    data = text.encode("utf-8", "backslashreplace")
    write_atomically(path, lambda partial: partial.write_bytes(data))


def printable(name: object) -> str:
    """A name as it can be shown: control characters, such as those that steer a terminal, and surrogates escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(name))


def remove_partial_files(folder: Path, *, idle: float = 0) -> None:
    """Delete what `write_atomically` left behind in a folder where the process was killed.

    Args:
        folder: not what lies below it.
        idle: seconds that nothing was written to them; 0 only while no other process writes there.
    """
    for partial in folder.glob(".*.partial"):
        with suppress(FileNotFoundError):
            if partial.lstat().st_mtime <= time.time() - idle:
                partial.unlink()


def _umask() -> int:
    mask = os.umask(0o022)  # it can only be read by setting it
    os.umask(mask)
    return mask


def flush_to_disk(path: Path) -> None:
    """Return when a file's content, or a folder's list of names, is on the disk itself."""
    if path.is_dir() and os.name != "posix":  # where a folder can't be opened
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
