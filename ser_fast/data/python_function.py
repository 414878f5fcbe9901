"""Pictures of a torch data set that a function of the user's makes."""

import hashlib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ser_fast.data import MAX_PIXELS
from ser_fast.data.listing import hash_entries
from ser_fast.data.pictures import Picture, UnreadableImageError, to_rgb


class PythonFunction:
    """A map-style torch data set of (picture, label).

    A picture is a PIL image, or a tensor (3, H, W) or (1, H, W), uint8 or floating in [0, 1]; a label is an integer, -1
    or None where there is none. What raises in the data set is an unreadable picture. The function runs here and the
    data set in the loaders' processes, with all that they may do.

    Args:
        source: as it was given, for messages.
        location: "module:function"; the module is also looked for in the working folder. The function is called with
            train=True or train=False. The data set's `classes`, if it has them, name the labels, else its `targets`
            number them.
        train: what the function is called with.
        max_pixels: of one picture; one of more is unreadable.

    Raises:
        ValueError: there is no such module or function, it fails, or returns no such data set.
    """

    longest: int | None = None

    def __init__(self, source: str, location: str, *, train: bool, max_pixels: int = MAX_PIXELS) -> None:
        self.source, self.max_pixels = source, max_pixels
        module, _, function = location.partition(":")
        if not module or not function:
            raise ValueError(f"data: got {source!r}, takes python:MODULE:FUNCTION")
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())  # last: it must not hide what is installed
        try:
            self.dataset = getattr(importlib.import_module(module), function)(train=train)
        except Exception as error:  # whatever the user's code raises
            raise ValueError(f"data: got {source!r}, which fails: {type(error).__name__}: {error}") from error
        try:
            self.length = len(self.dataset)
        except TypeError:
            self.length = 0
        if not self.length or not hasattr(self.dataset, "__getitem__"):
            raise ValueError(
                f"data: got {source!r}, which returns {type(self.dataset).__name__}, takes a data set with a length "
                "above 0 and items by index"
            )
        self.targets = _numbers(getattr(self.dataset, "targets", ()))
        numbered = range(1 + max(self.targets, default=-1))
        self.classes = [str(name) for name in getattr(self.dataset, "classes", None) or numbered]

    def __len__(self) -> int:
        return self.length

    def read(self, index: int) -> Picture:
        """Picture number `index`.

        Raises:
            ValueError: the item is no picture and label.
        """
        name = f"{self.source}[{index}]"
        try:
            item = self.dataset[index]
        except Exception as error:  # whatever the user's code raises
            raise UnreadableImageError(name, f"{type(error).__name__}: {error}") from error
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise ValueError(f"data: got {type(item).__name__} for {name}, takes (picture, label)")
        pixels, label = _to_pixels(item[0], name), -1 if item[1] is None else int(item[1])
        if pixels.shape[1] * pixels.shape[2] > self.max_pixels:
            raise UnreadableImageError(name, f"{tuple(pixels.shape)}, more than max_pixels = {self.max_pixels}")
        if label < -1 or (self.classes and label >= len(self.classes)):
            raise ValueError(f"data: got label {label} for {name}, takes -1 to {len(self.classes) - 1}")
        return Picture(pixels, label, index)

    @property
    def labels(self) -> Sequence[int] | None:
        """The data set's `targets`; None where it has none for all."""
        return self.targets if len(self.targets) == self.length else None

    def fingerprint(self) -> str:
        """A hash of all pictures and labels, which are read for it: what the function does can't be known otherwise."""
        return hash_entries([self.digest()], map(self._hash, range(self.length)))

    def _hash(self, index: int) -> tuple[Any, ...]:
        try:
            picture = self.read(index)
        except UnreadableImageError as error:
            return (error.reason,)
        pixels = picture.pixels.contiguous().numpy()
        return picture.label, pixels.shape, hashlib.sha256(pixels.tobytes()).hexdigest()

    def digest(self) -> str:
        """A hash of the source's name, its length and its targets: the pictures themselves are not looked at."""
        return hash_entries(self.classes, [self.source, self.length, self.targets])


def _numbers(targets: Any) -> list[int]:
    """torchvision's `targets` as integers; none where they are something else."""
    try:
        return [int(target) for target in targets]
    except (TypeError, ValueError):
        return []


def _to_pixels(picture: Any, name: str) -> Tensor:
    """uint8 (3, H, W)"""
    if isinstance(picture, Image.Image):
        try:
            return to_rgb(picture)
        except Exception as error:  # PIL decodes when pixels are asked for
            raise UnreadableImageError(name, f"{type(error).__name__}: {error}") from error
    if not isinstance(picture, Tensor) or picture.ndim != 3 or picture.shape[0] not in (1, 3) or not picture.numel():
        got = f"a tensor {tuple(picture.shape)}" if isinstance(picture, Tensor) else type(picture).__name__
        raise ValueError(f"data: got {got} for {name}, takes a PIL image or a tensor (3, H, W)")
    if picture.is_floating_point():
        if not 0 <= picture.min() <= picture.max() <= 1:  # normalized pixels, or NaN
            raise ValueError(
                f"data: got values from {picture.min():.3g} to {picture.max():.3g} for {name}, takes uint8, or "
                "floating numbers in [0, 1]"
            )
        picture = (picture * 255).round()
    elif picture.dtype != torch.uint8:
        raise ValueError(
            f"data: got a tensor of {picture.dtype} for {name}, takes uint8, or floating numbers in [0, 1]"
        )
    return picture.to(torch.uint8).expand(3, -1, -1)
