"""What a shard holds, kept in the user's cache: listing a million pictures reads no header twice."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ser_fast.data.listing import stamp
from ser_fast.io import write_text

_LEAST = 1000  # samples; fewer are listed as fast as an index is read
_FORMAT = 1


def index_file(shard: str) -> Path:
    """Where a shard's index is: in $SER_FAST_CACHE, or ~/.cache/ser_fast, in shards/.

    Its name is made of the shard's path, size and times: that of a shard that was written anew is another file.
    """
    key = hashlib.sha256(repr((_FORMAT, *stamp(os.path.abspath(shard)))).encode(errors="surrogateescape")).hexdigest()
    folder = os.environ.get("SER_FAST_CACHE") or os.path.join(os.path.expanduser("~"), ".cache", "ser_fast")
    return Path(folder) / "shards" / f"{key}.json"


def list_samples(shard: str, scan: Callable[[str], list[Sequence[Any]]]) -> list[Sequence[Any]]:
    """A shard's samples, from its index where there is a whole one, else from the shard itself.

    A folder that can't be written to costs the next start its time, and nothing else.

    Args:
        shard: its path.
        scan: lists the samples of a path, each (name, offset, size, label) with a label of JSON's types.
    """
    file = index_file(shard)
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        kept = json.loads(file.read_text(encoding="utf-8"))
        if kept["checksum"] == _checksum(kept["samples"]):
            return kept["samples"]
    samples = scan(shard)
    if len(samples) >= _LEAST:
        with suppress(OSError):
            content = {"shard": os.path.abspath(shard), "samples": samples, "checksum": _checksum(samples)}
            write_text(file, json.dumps(content))
    return samples


def _checksum(samples: list[Sequence[Any]]) -> str:
    return hashlib.sha256(json.dumps(samples).encode()).hexdigest()
