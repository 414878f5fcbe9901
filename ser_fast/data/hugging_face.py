"""Pictures of a Hugging Face data set: on disk, in Parquet files, or by its name on the Hub."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ser_fast.data import MAX_PIXELS
from ser_fast.data.listing import HELD_OUT, hash_entries, split_options, stamp
from ser_fast.data.pictures import Picture, UnreadableImageError, decode, read_image

_OPTIONS = ("split", "val", "image", "label", "config")
_SECONDS = 5  # that the Hub has to answer


class HuggingFace:
    """A split of a data set that the `datasets` library opens; pip install 'ser-fast[hf]' brings it.

    Parquet files are converted once to Arrow files in that library's cache (HF_HOME), of the same size.

    Args:
        source: as it was given, for messages.
        location: a folder of `save_to_disk`, a Parquet file, a folder of them or of another layout that
            `datasets.load_dataset` takes, or a name on the Hub, which is fetched unless it is in the cache. Options
            follow behind a question mark, joined by "&": split and val (the training and the held-out split; default
            train, and the first there is of val, validation and test), image and label (columns; default those of the
            types Image and ClassLabel, of several the one of that name), config.
        train: the training split, else the held-out one.
        max_pixels: of one picture; one of more is unreadable.

    Raises:
        ValueError: `datasets` is not installed, there is no such data set, split or column, or no way to the Hub.

    Example:
        >>> HuggingFace("hf:cifar100?image=img&label=fine_label", "cifar100?image=img&label=fine_label", train=True)
    """

    longest: int | None = None

    def __init__(self, source: str, location: str, *, train: bool, max_pixels: int = MAX_PIXELS) -> None:
        try:
            import datasets
        except ImportError as error:
            raise ValueError(f"data: got {source!r}, takes pip install 'ser-fast[hf]', which reads it") from error
        name, options = split_options(source, location, _OPTIONS)
        self.name, self.max_pixels = name, max_pixels
        part = _choose_split(source, _load(datasets, source, name, options.get("config")), options, train=train)
        features = part.features
        self.image = _choose_column(source, features, datasets.Image, "image", options.get("image"))
        if self.image is None:
            raise ValueError(
                f"data: got {source!r} with the columns {', '.join(features)}, takes one of the type Image among them"
            )
        self.label = _choose_column(source, features, datasets.ClassLabel, "label", options.get("label"))
        self.classes: list[str] = [] if self.label is None else list(features[self.label].names)
        columns = [column for column in (self.image, self.label) if column]
        # Undecoded, so that a picture is decoded as those of every other source are.
        self.rows = part.select_columns(columns).cast_column(self.image, datasets.Image(decode=False))

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int) -> Picture:
        """Picture number `index`."""
        row = self.rows[index]
        image, label = row[self.image], -1 if self.label is None else row[self.label]
        name = f"{self.name}[{index}]"
        if image is None or (image["bytes"] is None and image["path"] is None):
            raise UnreadableImageError(name, "no picture")
        if image["bytes"] is None:
            pixels = read_image(image["path"], max_pixels=self.max_pixels)
        else:
            pixels = decode(image["bytes"], name, max_pixels=self.max_pixels)
        return Picture(pixels, -1 if label is None else label, index)

    @property
    def labels(self) -> Sequence[int]:
        """Of all pictures, -1 for none."""
        given = [] if self.label is None else self.rows[self.label]
        return [-1 if label is None else label for label in given] or [-1] * len(self)

    def fingerprint(self) -> str:
        """A hash of the labels and of each picture's bytes, or of its file's size and times where it is a path."""
        digest = hashlib.sha256(self.digest().encode())
        table = self.rows.with_format("arrow")
        for start in range(0, len(self.rows), 256):
            for image in table[start : start + 256][self.image].to_pylist():
                path = None if image is None else image["path"]
                whole = None if image is None else image["bytes"]
                digest.update(whole if whole is not None else repr(path and stamp(path)).encode())
        return digest.hexdigest()

    def digest(self) -> str:
        """A hash of the labels and of each picture's name and size in bytes."""
        import pyarrow.compute as compute

        entries: list[Any] = [] if self.label is None else [list(self.rows[self.label])]
        table = self.rows.with_format("arrow")
        for start in range(0, len(self.rows), 4096):  # mapped into memory: the bytes themselves are not read
            images = table[start : start + 4096][self.image]
            entries.append(compute.binary_length(compute.struct_field(images, "bytes")).to_pylist())
            entries.append(compute.struct_field(images, "path").to_pylist())
        return hash_entries(self.classes, entries)


def _load(datasets: Any, source: str, name: str, config: str | None) -> Any:
    """The data set or its splits."""
    path = Path(name).expanduser()
    try:
        if any((path / mark).is_file() for mark in ("state.json", "dataset_dict.json")):
            return datasets.load_from_disk(str(path))
        if path.is_file():
            return datasets.load_dataset("parquet", data_files=str(path))
        if path.exists():
            return datasets.load_dataset(str(path), config)
        with _without_retries(datasets):
            return datasets.load_dataset(name, config)
    except Exception as error:  # of the library, of the Hub, of Arrow and of the network
        reason = " ".join(str(error).split())
        raise ValueError(
            f"data: got {source!r}, takes a folder of save_to_disk, Parquet files, or a name that is in the cache or "
            f"on the Hub, where that can be reached: {reason}"
        ) from error


@contextmanager
def _without_retries(datasets: Any) -> Iterator[None]:
    """Take the Hub for offline, as HF_HUB_OFFLINE=1 does, where one quick request doesn't reach it.

    The library asks six times, for 25 seconds, before it looks for a data set in its cache.

    Raises:
        ConnectionError: the data set isn't in the cache, either.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        reason = "HF_HUB_OFFLINE is set"
    else:
        try:
            get_session().head(constants.ENDPOINT, timeout=_SECONDS)
        except Exception as error:  # of its HTTP library, another one in each version
            reason = f"{constants.ENDPOINT} can't be reached ({error})"
        else:
            yield
            return
    switches = [(datasets.config, datasets.config.HF_HUB_OFFLINE), (constants, constants.HF_HUB_OFFLINE)]
    try:
        for module, _ in switches:
            module.HF_HUB_OFFLINE = True
        yield
    except ConnectionError as error:
        raise ConnectionError(f"{reason}, and it is not in the cache") from error
    finally:
        for module, before in switches:
            module.HF_HUB_OFFLINE = before


def _choose_split(source: str, loaded: Any, options: dict[str, str], *, train: bool) -> Any:
    key, usual = ("split", ("train",)) if train else ("val", HELD_OUT)
    # A data set that was saved without splits is one for training.
    splits = dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
    wanted = [options[key]] if key in options else list(usual)
    if train and key not in options and len(splits) == 1:
        wanted = list(splits)
    for split in wanted:
        if split in splits:
            return splits[split]
    raise ValueError(
        f"data: got {source!r} with the splits {', '.join(splits)}, takes {' or '.join(wanted)}, "
        f"or {'?' if '?' not in source else '&'}{key}=SPLIT behind it"
    )


def _choose_column(source: str, features: Any, kind: type, usual: str, wanted: str | None) -> str | None:
    """The column of a type: the one named, the only one, or that of the usual name; None where there is none."""
    columns = [name for name, feature in features.items() if isinstance(feature, kind)]
    if wanted is not None:
        if wanted not in columns:
            raise ValueError(
                f"data: got {usual}={wanted} in {source!r}, takes a column of the type {kind.__name__}: "
                f"{', '.join(columns) or 'there is none'}"
            )
        return wanted
    if len(columns) < 2 or usual in columns:
        return usual if usual in columns else next(iter(columns), None)
    raise ValueError(
        f"data: got {source!r} with the {usual} columns {', '.join(columns)}, "
        f"takes one of them: {'?' if '?' not in source else '&'}{usual}={columns[0]}"
    )
