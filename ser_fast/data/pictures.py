"""Pictures of any size: how their bytes are decoded, and the squares they become.

What is read from a source is bounded: a picture's pixels before they are decoded, and every intermediate after that.
"""

import os
import stat
import warnings
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from ser_fast.data import MAX_PIXELS

# PostScript and other formats that run programs are not among them.
_FORMATS = ["BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "SGI", "TGA", "TIFF", "WEBP"]
_PNG = b"\x89PNG\r\n\x1a\n"
_ORIENTATION = 0x0112  # of EXIF
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_LONG = 8  # a picture this many times as long as it is wide is cut or shrunk before anything grows


class UnreadableImageError(Exception):
    """An image that cannot be decoded.

    Attributes:
        path: of the file, or what else names the image.
        reason: what the decoder said.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason


@dataclass(frozen=True)
class Picture:
    """One picture of a source.

    Attributes:
        pixels: (3, H, W) uint8, upright, of its own size.
        label: its class; -1 for none.
        index: in the source.
    """

    pixels: Tensor
    label: int
    index: int

    @property
    def aspect(self) -> float:
        """Width over height."""
        return self.pixels.shape[2] / self.pixels.shape[1]


def read_image(path: str | Path, *, max_pixels: int = MAX_PIXELS, upright: bool = True) -> Tensor:
    """The picture in a regular file: uint8 (3, H, W); the rest is as `decode` has it.

    Raises:
        UnreadableImageError: there is no such file, it is none, or `decode` can't read it.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise OSError("not a regular file")
            if status.st_size > most_bytes(max_pixels):
                raise OSError(f"{status.st_size} bytes for {max_pixels} pixels at most")
            data = file.read()
    except OSError as error:
        raise UnreadableImageError(str(path), f"{type(error).__name__}: {error}") from error
    return decode(data, str(path), max_pixels=max_pixels, upright=upright)


def most_bytes(max_pixels: int) -> int:
    """Of a picture's file: no format needs more."""
    return 16 * max_pixels + 2**20


def decode(data: bytes, name: str, *, max_pixels: int = MAX_PIXELS, upright: bool = True) -> Tensor:
    """Decode an image file's bytes to upright 8-bit RGB.

    Gray, palette, CMYK, 16-bit and transparent images become RGB. Damage in what stands beside the pixels (EXIF, texts,
    profiles) is passed over. JPEG and 8-bit PNG are decoded by torchvision, the
    others, and what it refuses, by PIL.

    Args:
        data: of the file.
        name: for errors: its path, or what else tells where it came from.
        max_pixels: of one picture, up to MAX_PIXELS.
        upright: turned as its EXIF says; False for what was annotated as it lies in the file.

    Returns:
        (3, H, W) uint8.

    Raises:
        UnreadableImageError: no image, a damaged one, or one of more pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about damage beside the pixels, and sizes: the bound is ours
            image = _open(data)  # reads the header alone
        with image:
            if image.width * image.height > max_pixels:
                raise ValueError(f"{image.width} x {image.height} pixels, more than max_pixels = {max_pixels}")
            # Byte 24 of a PNG is its bit depth: PIL calls 16-bit RGB "RGB" too.
            plain = image.format in ("JPEG", "MPO") or (image.format == "PNG" and data[24] == 8)
            if plain and image.mode in ("RGB", "L"):
                try:
                    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore", DeprecationWarning)  # torchvision 0.29 announces an end of it
                        return decode_image(encoded, ImageReadMode.RGB, apply_exif_orientation=upright)
                except RuntimeError:
                    pass  # PIL reads it, or says why not
            return to_rgb(image, upright=upright)
    except UnidentifiedImageError as error:  # its own words name a place in memory
        raise UnreadableImageError(name, "UnidentifiedImageError: no image, or none of the formats read") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error and more
        raise UnreadableImageError(name, f"{type(error).__name__}: {error}") from error


def _open(data: bytes) -> Image.Image:
    try:
        return Image.open(BytesIO(data), formats=_FORMATS)
    except Exception:
        if not data.startswith(_PNG):
            raise
        return Image.open(BytesIO(_without_extras(data)), formats=["PNG"])


def _without_extras(data: bytes) -> bytes:
    """A PNG file of the chunks that the pixels take: PIL refuses a file for damage in any other."""
    kept, place = [_PNG], len(_PNG)
    while place + 8 <= len(data):
        end = place + 12 + int.from_bytes(data[place : place + 4], "big")
        name = data[place + 4 : place + 8]
        if name[:1].isupper() or name == b"tRNS":
            kept.append(data[place:end])
        place = end
    return b"".join(kept)


def _upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF says, if that can be read."""
    image.load()  # damage of the pixels shows here
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            orientation: Any = image.getexif().get(_ORIENTATION)
            turn = _TURNS.get(orientation)
    except Exception:  # SyntaxError, struct.error and others: whatever was written there
        return image
    return image if turn is None else image.transpose(turn)


def to_rgb(image: Image.Image, *, upright: bool = True) -> Tensor:
    """A PIL image, turned as its EXIF says where `upright`, as uint8 (3, H, W)."""
    image = _upright(image) if upright else image
    if image.mode.startswith("I"):  # 16-bit gray, which convert() would clip at 255; PIL's 16-bit RGB is 8-bit already
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    if image.mode == "F":  # floating point TIFF: in [0, 1] as a rule, else gray levels
        values = np.nan_to_num(np.asarray(image))
        scale = 255 if values.size and values.max() <= 1 else 1
        image = Image.fromarray((values * scale).round().clip(0, 255).astype(np.uint8))
    if image.mode == "P":
        image = image.convert("RGBA")  # PIL warns where a palette with transparency becomes RGB directly
    return transforms.pil_to_tensor(image.convert("RGB"))


def to_canvas(pixels: Tensor, side: int) -> Tensor:
    """Stretch a whole picture (3, H, W) on a square canvas: (3, side, side), bicubic and antialiased."""
    height, width = pixels.shape[1:]
    if max(height, width) > _LONG * min(height, width):
        pixels = transforms.resize(pixels, [min(height, side), min(width, side)], antialias=True)
    return transforms.resize(pixels, [side, side], InterpolationMode.BICUBIC, antialias=True)


def to_square(pixels: Tensor, side: int, *, crop_pct: float = 1.0) -> Tensor:
    """Resize a picture (3, H, W) so that its center crop is crop_pct of its shorter side: (3, side, side)."""
    height, width = pixels.shape[1:]
    if (height, width) == (side, side) and crop_pct == 1:
        return pixels
    if max(height, width) > _LONG * min(height, width):
        longest = _LONG * min(height, width)
        pixels = transforms.center_crop(pixels, [min(height, longest), min(width, longest)])
    resized = transforms.resize(pixels, [max(side, round(side / crop_pct))], antialias=True)
    return transforms.center_crop(resized, [side, side])
