"""The maps that evaluations move images by, and their names."""

import math
from collections.abc import Callable, Iterable

import torch

from ser_fast.lattice import LatticeMap, Size

D4_NAMES = ("identity", "rot90", "rot180", "rot270", "hflip", "transpose", "vflip", "antitranspose")  # by d4_code
AREAS = (0.7, 1.3)
ASPECTS = (3 / 4, 4 / 3)  # width / height


def default_elements(size: Size) -> dict[str, LatticeMap]:
    """The eight elements of D4 and four changes of scale in whole tokens.

    The scales are the corners of SER's recipe: areas 0.7 and 1.3, and aspects 3/4 and 4/3 at the same area, each
    rounded to h x w whole tokens and named so. Those that a small lattice rounds to itself are left out.

    Args:
        size: (H, W) of the lattice, in tokens.

    Returns:
        Name: one map of that lattice.
    """
    return _d4(size) | _scales(size)


def parse_elements(names: Iterable[str], size: Size) -> dict[str, LatticeMap]:
    """The maps that names say.

    Args:
        names: "d4", the eight elements; "scales", the four of `default_elements`; one of D4_NAMES; "angle:DEGREES",
            counter-clockwise; "scale:AREA", to another lattice; "shift:DY,DX", in tokens; "crop:TOP,LEFT,HEIGHT,WIDTH",
            in shares of the sides; "affine:A,B,C,D" or "affine:A,B,C,D,DY,DX", the matrix from output to input in
            the order (y, x) about the centers, and the offset in tokens.
        size: (H, W) of the lattice, in tokens.

    Returns:
        Name: one map of that lattice.

    Raises:
        ValueError: a name that is none of these, or a map that can't be.

    Example:
        >>> parse_elements(["d4", "angle:15", "crop:0,0,0.5,0.5"], (14, 14)).keys()
    """
    elements: dict[str, LatticeMap] = {}
    for name in names:
        if name in _GROUPS:
            elements |= _GROUPS[name](size)
        else:
            elements[name] = _parse(name, size)
    if not elements:
        raise ValueError("elements: got none, takes one or more")
    return elements


def _d4(size: Size) -> dict[str, LatticeMap]:
    return {name: LatticeMap.d4(size, code) for code, name in enumerate(D4_NAMES)}


def _scales(size: Size) -> dict[str, LatticeMap]:
    scaled = [
        _scaled(size, area, aspect) for area, aspect in [*((a, 1.0) for a in AREAS), *((1.0, a) for a in ASPECTS)]
    ]
    return {f"{h}x{w}": LatticeMap.resize(size, (h, w)) for h, w in scaled if (h, w) != size}


def _scaled(size: Size, area: float, aspect: float = 1.0) -> Size:
    return round(size[0] * math.sqrt(area / aspect)), round(size[1] * math.sqrt(area * aspect))


_GROUPS: dict[str, Callable[[Size], dict[str, LatticeMap]]] = {"d4": _d4, "scales": _scales}


def _parse(name: str, size: Size) -> LatticeMap:
    if name in D4_NAMES:
        return LatticeMap.d4(size, D4_NAMES.index(name))
    kind, _, text = name.partition(":")
    try:
        numbers = [float(number) for number in text.split(",")]
    except ValueError:
        numbers = []
    if not all(map(math.isfinite, numbers)):
        numbers = []
    height, width = size
    try:
        if kind == "angle" and len(numbers) == 1:
            return LatticeMap.rotate(size, numbers[0])
        if kind == "scale" and len(numbers) == 1 and numbers[0] > 0:
            return LatticeMap.resize(size, _scaled(size, numbers[0]))
        if kind == "shift" and len(numbers) == 2:
            return LatticeMap.affine(size, torch.eye(2), torch.tensor(numbers))
        if kind == "crop" and len(numbers) == 4:
            top, left, h, w = numbers
            return LatticeMap.crop(size, (top * height, left * width, h * height, w * width), size)
        if kind == "affine" and len(numbers) in (4, 6):
            offset = torch.tensor(numbers[4:]) if numbers[4:] else None
            return LatticeMap.affine(size, torch.tensor(numbers[:4]).view(2, 2), offset)
    except ValueError as error:
        raise ValueError(f"elements: {name}: {error}") from error
    raise ValueError(
        f"elements: got {name!r}, takes d4, scales, {', '.join(D4_NAMES)}, angle:DEGREES, scale:AREA, shift:DY,DX, "
        "crop:TOP,LEFT,HEIGHT,WIDTH or affine:A,B,C,D[,DY,DX]"
    )
