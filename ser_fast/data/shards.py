"""Pictures in WebDataset shards, read by index: tar files that are never unpacked.

The webdataset package reads shards as a stream, whose shuffled order can't be had again from a seed and a step. Here
the headers are walked once, by the standard library's tarfile, and an item is then one read at its offset. What a shard
holds is kept in an index (`shard_index`), from which the next start reads it.
"""

import json
import re
import stat
import tarfile
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from torchvision.datasets.folder import IMG_EXTENSIONS

from ser_fast.data import MAX_PIXELS
from ser_fast.data.listing import HELD_OUT, expand_pattern, hash_entries, list_files, split_options, stamp
from ser_fast.data.pictures import Picture, UnreadableImageError, decode, most_bytes
from ser_fast.data.shard_index import list_samples

_FIELDS = ("label", "cls", "class")  # of a .json, the first that is there
_LONGEST_LABEL = 2**24  # bytes of a .cls or a .json: what a shard says of its members is not to take all memory


class Sample(NamedTuple):
    """A picture's bytes, [offset, offset + size) of its shard, and its label as it stands there."""

    name: str
    offset: int
    size: int
    label: int | str | None


class TarShards:
    """Pictures in tar files, in the order of the shards and of their members.

    Members in a row whose paths agree up to the first dot of the file name are one sample. Its picture is the member
    that ends like an image file, its label the number in its .cls, or what its .json holds as "label", "cls" or
    "class". Labels that are no numbers are names, numbered in the order of the alphabet; classnames.txt beside the
    first shard, one a line, names numbers. Samples without a picture are passed over. Reading at random places, shards
    are no faster than files.

    Args:
        source: as it was given, for messages.
        location: a pattern of paths (`expand_pattern`) that names the training shards, with "?val=PATTERN" for the
            held-out ones; or a folder, whose shards are told apart by train, val, validation or test: folders of that
            name, or a word in the shard's.
        train: the training pictures, else the held-out ones. Their labels are numbered as in training.
        max_pixels: of one picture; one of more is unreadable.

    Raises:
        ValueError: no shard, a shard that is missing, compressed or damaged, one without pictures, or labels of some
            pictures alone.

    Source: https://github.com/webdataset/webdataset, for the format.
    """

    longest: int | None = None

    def __init__(self, source: str, location: str, *, train: bool, max_pixels: int = MAX_PIXELS) -> None:
        self.max_pixels = max_pixels
        training, held_out = _find_shards(source, location)
        if not training:
            raise ValueError(f"data: got {source!r}, and there is no such shard, takes tar files")
        if not train and not held_out:
            raise ValueError(
                f"data: got {source!r} without held-out shards, takes tar:PATTERN?val=PATTERN, or another source"
            )
        self.shards = training if train else held_out
        scanned = [_list(*_check(path)) for path in self.shards]
        self.samples = [(number, sample) for number, samples in enumerate(scanned) for sample in samples]
        if not self.samples:
            accepted = ", ".join(IMG_EXTENSIONS)
            raise ValueError(f"data: got {source!r} without a picture in {len(self.shards)} shards, takes {accepted}")
        given = [sample.label for _, sample in self.samples]
        numbering = given if train else [sample.label for path in training for sample in _list(*_check(path))]
        names = Path(training[0]).with_name("classnames.txt")
        self.classes = _class_names(source, numbering, names)
        self.labels = _number(source, given, self.classes)

    def __len__(self) -> int:
        return len(self.samples)

    def locate(self, index: int) -> str:
        """The shard, and the picture's name in it."""
        number, sample = self.samples[index]
        return f"{self.shards[number]}:{sample.name}"

    def read(self, index: int) -> Picture:
        """Picture number `index`: one read at its offset."""
        number, sample = self.samples[index]
        name = self.locate(index)
        if sample.size > most_bytes(self.max_pixels):
            raise UnreadableImageError(name, f"{sample.size} bytes for {self.max_pixels} pixels at most")
        try:
            with open(self.shards[number], "rb") as file:
                file.seek(sample.offset)
                data = file.read(sample.size)
        except OSError as error:
            raise UnreadableImageError(name, f"{type(error).__name__}: {error}") from error
        return Picture(decode(data, name, max_pixels=self.max_pixels), self.labels[index], index)

    def digest(self) -> str:
        """A hash of the shards' names, and of their members' names, places and labels."""
        entries = ((Path(self.shards[number]).name, *sample) for number, sample in self.samples)
        return hash_entries(self.classes, entries)

    def fingerprint(self) -> str:
        """A hash that changes with what is listed and with the shards' files."""
        return hash_entries([self.digest()], map(stamp, self.shards))


def _find_shards(source: str, location: str) -> tuple[list[str], list[str]]:
    """The training shards and the held-out ones."""
    path, options = split_options(source, location, ["val"])
    folder = Path(path).expanduser()
    if not folder.is_dir():
        training, held_out = expand_pattern(path), []
    else:
        shards = list_files(folder, [".tar"])
        words = [set(re.findall("[a-z]+", str(Path(shard).relative_to(folder)).lower())) for shard in shards]
        parts = {
            part: [shard for shard, its in zip(shards, words, strict=True) if part in its]
            for part in ("train", *HELD_OUT)
        }
        marked = {shard for named in parts.values() for shard in named}
        training = parts["train"] or [shard for shard in shards if shard not in marked]
        held_out = next((parts[part] for part in HELD_OUT if parts[part]), [])
    if "val" in options:
        held_out = expand_pattern(options["val"])
    return training, held_out


def _check(path: str) -> tuple[Any, ...]:
    """What `_list` is remembered by: a shard that was written anew is listed anew."""
    try:
        regular = stat.S_ISREG(Path(path).stat().st_mode)
    except OSError as error:
        raise ValueError(f"data: got the shard {path}, which can't be opened: {error.strerror}") from error
    if not regular:  # a pipe would be waited for
        raise ValueError(f"data: got the shard {path}, which is no regular file, takes a tar file")
    return stamp(path)


@cache  # training and held-out pictures are opened one after the other, and both need the labels
def _list(path: str, *_stamp: int) -> list[Sample]:
    """The samples of a shard."""
    return [Sample(*sample) for sample in list_samples(path, _scan)]


def _scan(path: str) -> list[Any]:
    """The samples of a shard: its headers are read, and the small members that hold labels.

    Raises:
        ValueError: the shard is compressed or damaged.
    """
    try:
        with tarfile.open(path, "r:") as archive:
            return [
                sample
                for _, members in groupby(_members(archive), key=lambda member: _split_name(member.name)[0])
                if (sample := _sample(archive, list(members)))
            ]
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ValueError(
            f"data: got the shard {path}, compressed or damaged, takes a whole, uncompressed tar file: "
            f"{str(error).splitlines()[0]}"
        ) from error


def _members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while member := archive.next():
        archive.members = []  # type: ignore[attr-defined]  # it keeps every header that it read
        if member.isreg():
            yield member
    # tarfile takes any header that makes no sense for the end, which is a block of zeros or of nothing.
    assert archive.fileobj is not None
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise tarfile.ReadError(f"no header at byte {archive.offset}")


def _split_name(path: str) -> tuple[str, str]:
    """("a/b.c/0001", "seg.png") of "a/b.c/0001.seg.png", as webdataset does."""
    folder, slash, name = path.rpartition("/")
    stem, _, extension = name.partition(".")
    return folder + slash + stem, extension.lower()


def _sample(archive: tarfile.TarFile, members: Sequence[tarfile.TarInfo]) -> Sample | None:
    named = {_split_name(member.name)[1]: member for member in reversed(members)}
    pictures = [m for m in members if m.name.lower().endswith(IMG_EXTENSIONS)]
    if not pictures:
        return None
    # Beside "0001.jpg", "0001.seg.png" is something else.
    picture = min(pictures, key=lambda m: _split_name(m.name)[1].count("."))
    label: int | str | None = None
    if "cls" in named:
        label = _read(archive, named["cls"]).decode(errors="replace").strip()
    elif "json" in named:
        try:
            fields = json.loads(_read(archive, named["json"]))
        except ValueError:
            fields = {}
        label = next((fields[f] for f in _FIELDS if isinstance(fields, dict) and f in fields), None)
    if label is not None and re.fullmatch(r"-?\d+", str(label)):
        label = int(label)
    elif label is not None:
        label = str(label)
    return Sample(picture.name, picture.offset_data, picture.size, label)


def _read(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    if member.size > _LONGEST_LABEL:
        raise tarfile.ReadError(f"{member.name}, which holds a label, has {member.size} bytes")
    assert archive.fileobj is not None
    archive.fileobj.seek(member.offset_data)  # next() goes back to where it was
    return archive.fileobj.read(member.size)


def _class_names(source: str, labels: Sequence[int | str | None], names: Path) -> list[str]:
    """The classes of labels: those of numbers are "0", "1" and so on, or the lines of a file."""
    if all(label is None or label == -1 for label in labels):
        return []
    if any(isinstance(label, str) for label in labels):
        return sorted({str(label) for label in labels if label is not None})
    count = 1 + max(int(label) for label in labels if label is not None)
    if not names.is_file():
        return [str(number) for number in range(count)]
    lines = names.read_text(encoding="utf-8").splitlines()
    if len(lines) < count:
        raise ValueError(
            f"data: got {len(lines)} lines in {names}, takes one for each of the {count} classes of {source!r}"
        )
    return lines


def _number(source: str, labels: Sequence[int | str | None], classes: Sequence[str]) -> list[int]:
    """The labels as numbers of classes; -1 where there are no classes.

    Raises:
        ValueError: a label that is no class, or a picture without one.
    """
    if not classes:
        return [-1] * len(labels)
    named = any(isinstance(label, str) for label in labels)
    numbers = {name: number for number, name in enumerate(classes)} if named else {}
    found = []
    for index, label in enumerate(labels):
        number = numbers.get(str(label), -1) if named else label
        if not isinstance(number, int) or not 0 <= number < len(classes):
            raise ValueError(
                f"data: got {'no label' if label is None else f'label {label}'} for picture {index} of {source!r}, "
                f"takes one of its {len(classes)} training classes for every picture, or none for all"
            )
        found.append(number)
    return found
