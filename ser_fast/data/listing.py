"""Which files a folder or a pattern names: listed, never opened."""

import hashlib
import os
import re
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from glob import glob, has_magic
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

HELD_OUT = ("val", "validation", "test")
"""What held-out parts are called: the first that is there."""


def list_files(folder: Path, extensions: Collection[str], *, known: Collection[Path] = ()) -> list[str]:
    """The files below a folder whose names end in one of the extensions, in the order of their folders' names.

    Hidden files and folders, whose names begin with a dot, are left out: thumbnails, trash, what another system keeps
    beside its files. Links to folders are followed. A folder is listed once, however many links lead to it: a link to a
    folder above itself ends there.

    Args:
        folder: itself and all folders below it are listed.
        extensions: in lower case, with their dots.
        known: folders that are listed elsewhere: links to them are not followed.

    Returns:
        The paths, sorted by folder, then by name.

    Raises:
        ValueError: a folder that can't be listed.
    """
    endings = tuple(extensions)
    seen = {_identity(path) for path in known} - {_identity(folder)}
    # Links wait until all folders are listed: a folder that lies here keeps its own name.
    folders, links, found = deque([str(folder)]), deque[str](), []
    while folders or links:
        parent = (folders or links).popleft()
        if (identity := _identity(parent)) in seen:
            continue
        seen.add(identity)
        names = []
        try:
            with os.scandir(parent) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    if entry.name.startswith("."):
                        continue
                    if os.path.isdir(entry):  # a link to itself is none; entry.is_dir would raise
                        (links if entry.is_symlink() else folders).append(entry.path)
                    elif entry.name.lower().endswith(endings):
                        names.append(entry.name)  # also a pipe or a link to nowhere: they are named where they are read
        except OSError as error:
            raise ValueError(f"data: got {parent}, which can't be listed: {error.strerror}") from error
        found.append((parent, names))
    return [os.path.join(parent, name) for parent, names in sorted(found) for name in names]


def _identity(path: Path | str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def split_options(source: str, location: str, accepted: Collection[str]) -> tuple[str, dict[str, str]]:
    """Split "PATH?key=value&key=value" into its path and options.

    Args:
        source: the whole, for the message.
        location: what stands behind "kind:".
        accepted: the keys.

    Raises:
        ValueError: another key, or one without a value.

    Example:
        >>> split_options("hf:birds?image=img", "birds?image=img", ["image"])
        ('birds', {'image': 'img'})
    """
    # A question mark that no option follows is the pattern's, for any character.
    match = re.fullmatch(r"(.*?)\?(\w+=.*)", location)
    if not match:
        return location, {}
    path, options = match[1], dict(parse_qsl(match[2], keep_blank_values=True))
    for key, value in options.items():
        if key not in accepted or not value:
            raise ValueError(f"data: got {f'{key}={value}'!r} in {source!r}, takes {', '.join(accepted)} with a value")
    return path, options


def expand_pattern(pattern: str) -> list[str]:
    """The files that a pattern of shards names.

    Args:
        pattern: of paths, with braces ("train-{0000..0063}.tar", "{a,b}.tar") and the shell's *, ? and [].

    Returns:
        The paths in the order of the braces, then of names. Without a star they are named, whether they exist or not.

    Raises:
        ValueError: a range that ends before it begins.
    """
    paths = []
    for name in _expand_braces(os.path.expanduser(pattern)):
        paths += sorted(glob(name, recursive=True)) if has_magic(name) else [name]
    return list(dict.fromkeys(paths))


def _expand_braces(pattern: str) -> list[str]:
    match = re.search(r"\{([^{}]*)\}", pattern)
    if not match:
        return [pattern]
    if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", match[1]):
        first, last = numbers.groups()
        if int(last) < int(first):
            raise ValueError(f"data: got {match[0]} in {pattern!r}, takes a range from the lower number to the higher")
        parts = [f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1)]
    else:
        parts = match[1].split(",")
    return [name for part in parts for name in _expand_braces(pattern[: match.start()] + part + pattern[match.end() :])]


def stamp(path: str) -> tuple[str, int, int, int] | tuple[str]:
    """A file's path and what changes when it is written or replaced: size, and times of its content and of its entry.

    Of a link to nothing, the path alone.
    """
    try:
        status = os.stat(path)
    except OSError:
        return (path,)
    return path, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def hash_entries(classes: Sequence[str], entries: Iterable[Any]) -> str:
    """The digest of a source: a hash of its classes and of what it lists, in that order."""
    digest = hashlib.sha256(repr(classes).encode())
    for entry in entries:
        digest.update(repr(entry).encode())
    return digest.hexdigest()
