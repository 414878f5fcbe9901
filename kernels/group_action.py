"""The group action and its transpose, as products with tiles of W that are never stored.

A row of W is the product of its rows on the two axes (ser_fast/interpolation.py):

    W[o, (i, j)] = W_y[o, i] W_x[o, j]
    W_y[o, i] = sum over taps t that padding folds onto i of k(t + 1/2 - y_o) / sum_t k(t + 1/2 - y_o)

A program owns a square of the tokens it writes and a slab of channels, and walks over the squares of tokens that the
map can reach from it. For each it builds the 64 x 64 tile of W from the two factors, (64, 8) each, and multiplies it
with the tokens read. The transpose writes inputs, reads outputs, and multiplies with the same tile transposed: the
exact adjoint, without a gather or an atomic, so it repeats bit for bit. W goes into a half-precision product as a sum
of two roundings, high + low, which keeps 16 (bfloat16) or 22 (float16) bits of it; a float32 product is three of TF32.

Tokens with a single tap of weight 1 are copied instead: a product would turn -0 into 0, and 0 x Inf into NaN. Which
ones these are is found on the device, and where there are no others no product is formed.

Positions are float64 and, relative to their first tap, float32: good to 1e-7 of a token anywhere on the lattice.

The file is one kernel and the functions that are inlined into it, in the order in which they build on each other, so it
is longer than others.
"""

from dataclasses import dataclass
from math import factorial, pi

import torch
import triton
import triton.language as tl
from torch import Tensor

from ser_fast.interpolation import MOST_STRETCH
from ser_fast.kernels.configs import capability_of, group_action_config
from ser_fast.lattice import FARTHEST, LARGEST, TOLERANCE
from ser_fast.ops.contract import GroupAction

_TOLERANCE = tl.constexpr(TOLERANCE)
_FARTHEST, _LARGEST = tl.constexpr(FARTHEST), tl.constexpr(LARGEST)
_MOST_STRETCH = tl.constexpr(MOST_STRETCH)
_EDGE = tl.constexpr(8)  # of a square of tokens
_TAPS = tl.constexpr(8)  # that are looked at together; fewer make the compiler spread positions over threads worse
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_NOWHERE = tl.constexpr(-(2**30))  # stands for a token that isn't there

_REACH = {"nearest": 0.5 + TOLERANCE, "bilinear": 1.0, "lanczos3": 3.0, "area": 0.0}  # the cubic ones: 2


@dataclass(frozen=True)
class Resampling:
    """The options, as the kernel takes them (all known when it is compiled).

    `padding` is "zeros", "border", "reflection", or "cut": border with antialias or area, where the kernel ends at the
    edge. `reach` is how far a token of weight may be; with `stretch` it is a multiple of the step, and for area it
    follows from the step alone. `counted`: _TAPS taps are enough, whatever the map.
    """

    kernel: str
    padding: str
    stretch: bool
    reach: float
    counted: bool
    double: bool  # weights and sums in float64, or else in float32

    @classmethod
    def of(cls, interpolation: str, padding: str, antialias: bool, dtype: torch.dtype) -> "Resampling":
        area = interpolation == "area"
        kernel = "catmull_rom" if antialias and interpolation == "bicubic" else interpolation
        reach = _REACH.get(kernel, 2.0)
        if padding == "border" and (area or antialias):
            padding = "cut"
        counted = not (antialias or area)
        return cls(kernel, padding, antialias, reach, counted, dtype == torch.float64)


# ---------------------------------------------------------------- the kernels in one dimension


@triton.jit
def _cubic(t, B: tl.constexpr, C: tl.constexpr):
    """The (B, C) family of Mitchell and Netravali; (0, -a) is Keys' kernel with parameter a."""
    inner = ((12 - 9 * B - 6 * C) / 6 * t + (-18 + 12 * B + 6 * C) / 6) * t * t + (6 - 2 * B) / 6
    outer = (((-B - 6 * C) / 6 * t + (6 * B + 30 * C) / 6) * t + (-12 * B - 48 * C) / 6) * t + (8 * B + 24 * C) / 6
    return tl.where(t < 1, inner, tl.where(t < 2, outer, 0.0))


# sin(pi v) / v as a polynomial in v^2, good to 3e-16 on [0, 1/2].
_SINE = tl.constexpr(tuple((-1) ** n * pi ** (2 * n + 1) / factorial(2 * n + 1) for n in range(10)))


@triton.jit
def _lanczos3(t):
    # 3 sin(pi t) sin(pi t / 3) / (pi t)^2 by one sine, since sin 3a = (3 - 4 sin^2 a) sin a.
    v = tl.minimum(t / 3, 1 - t / 3)
    square, sine = v * v, v * 0
    for power in tl.static_range(10):
        sine = sine * square + _SINE[9 - power]
    sine *= v
    value = 3 * (3 - 4 * sine * sine) * sine * sine / (9.869604401089358 * t * t)
    return tl.where(t < 3, tl.where(t == 0, 1.0, value), 0.0)


@triton.jit
def _k(t, HOW: tl.constexpr):
    """k(t); "area" is not a function of t alone, see _weight."""
    if HOW.kernel == "nearest":
        # A tie goes to the higher index, as in F.interpolate(mode="nearest-exact").
        return ((t > -0.5 + _TOLERANCE) & (t <= 0.5 + _TOLERANCE)).to(t.dtype)
    t = tl.abs(t)
    if HOW.kernel == "bilinear":
        return tl.maximum(1 - t, 0.0)
    elif HOW.kernel == "bicubic":
        return _cubic(t, 0, 0.75)
    elif HOW.kernel == "catmull_rom":
        return _cubic(t, 0, 0.5)
    elif HOW.kernel == "mitchell":
        return _cubic(t, 1 / 3, 1 / 3)
    else:
        return _lanczos3(t)


# ---------------------------------------------------------------- taps: one axis of W
#
# `axis` is (step, size, centre) of one axis, scalars: the distance between neighbouring output tokens, in input tokens;
# how many of these there are; and 1/2 if positions on their centres are copied, as D4 and whole shifts have it, or
# else -1, where no position is. `taps` is what is kept of positions (O,) on it, rows (1, O) and scalars:
#   first       int32, the first tap before padding folds it
#   distance    from the position to that tap's centre
#   copied      bool, the position is on a centre and the map copies
#   size, reach, stretch
#   total       sum_t k;  before, after: its parts past the two edges of the lattice
#   source      int32, the token that is copied; -1 if several are blended, _NOWHERE if there is none


@triton.jit
def _reach(step, HOW: tl.constexpr):
    if HOW.kernel == "area":
        return (step + 1) / 2 - _TOLERANCE
    elif HOW.stretch:
        return HOW.reach * tl.maximum(step, 1.0)
    else:
        return step * 0 + HOW.reach


@triton.jit
def _weight(t, distance, copied, reach, stretch, HOW: tl.constexpr):
    """k of the t-th taps, counted from the first, (n, O)."""
    distance += t
    if HOW.kernel == "area":
        k = (tl.abs(distance) < reach).to(distance.dtype)
    elif HOW.stretch:
        k = _k(distance / stretch, HOW)
    else:
        k = _k(distance, HOW)
    return tl.where(copied, (distance == 0).to(distance.dtype), k)


@triton.jit
def _taps(position, axis, HOW: tl.constexpr):
    """The taps of positions (O,) float64."""
    step, size, centre = axis
    reach = _reach(step, HOW)
    if HOW.padding == "reflection":
        position = tl.minimum(tl.maximum(position, -_FARTHEST), _FARTHEST)
        position -= tl.floor(position / (2 * size)) * (2 * size)
    elif HOW.padding == "cut":
        # On the far edge "nearest" would want the token past it, and be left with none.
        end = size - 2 * _TOLERANCE if HOW.kernel == "nearest" else size
        position = tl.minimum(tl.maximum(position, 0.0), end)
    else:
        position = tl.minimum(tl.maximum(position, -1e6), 1e6)  # farther out nothing changes, and an int32 holds it
    position = position[None, :]
    copied = position - tl.floor(position) == centre
    first = tl.floor(position - reach + 0.5)
    distance = (first + 0.5 - position).to(tl.float64 if HOW.double else tl.float32)
    first = first.to(tl.int32)
    reach, stretch = reach.to(distance.dtype), tl.maximum(step, 1.0).to(distance.dtype)

    total = distance * 0
    kept, before, after, least, most = total, total, total, first * 0 - _NOWHERE, first * 0 + _NOWHERE
    for start in range(0, _TAPS if HOW.counted else tl.ceil(2 * reach).to(tl.int32), _TAPS):
        tap = first + start + tl.arange(0, _TAPS)[:, None]  # (T, O)
        k = _weight(tap - first, distance, copied, reach, stretch, HOW)
        if HOW.padding == "cut":
            k = tl.where((tap >= 0) & (tap < size), k, 0.0)
        total += tl.sum(k, 0, keep_dims=True)
        before += tl.sum(tl.where(tap < 0, k, 0.0), 0, keep_dims=True)
        after += tl.sum(tl.where(tap >= size, k, 0.0), 0, keep_dims=True)
        if HOW.padding == "reflection":
            tap = tap % (2 * size)
            tap = tl.where(tap < 0, tap + 2 * size, tap)
            tap = tl.minimum(tap, 2 * size - 1 - tap)
        elif HOW.padding == "border":
            tap = tl.minimum(tl.maximum(tap, 0), size - 1)
        used = (k != 0) & (tap >= 0) & (tap < size)
        kept += tl.sum(tl.where(used, k, 0.0), 0, keep_dims=True)
        least = tl.minimum(least, tl.min(tl.where(used, tap, -_NOWHERE), 0, keep_dims=True))
        most = tl.maximum(most, tl.max(tl.where(used, tap, _NOWHERE), 0, keep_dims=True))
    source = tl.where((least == most) & (kept == total) | (most == _NOWHERE), most, -1)
    return first, distance, copied, size, reach, stretch, total, before, after, source


@triton.jit
def _factor(taps, first_token, HOW: tl.constexpr):
    """The columns [first_token, first_token + _EDGE) of W_y or W_x, as rows: (_EDGE, O)."""
    first, distance, copied, size, reach, stretch, total, before, after, _ = taps
    token = first_token + tl.arange(0, _EDGE)[:, None]
    weights = _weight(token - first, distance, copied, reach, stretch, HOW)
    if HOW.padding == "border":
        weights += tl.where(token == 0, before, 0.0) + tl.where(token == size - 1, after, 0.0)
    elif HOW.padding == "reflection":
        # Positions are in the first period, and so are all taps but those within reach of its ends.
        for period in range(1, 2 + tl.ceil(reach / (2 * size)).to(tl.int32)):
            shift = 2 * size * period
            weights += _weight(token - shift - first, distance, copied, reach, stretch, HOW)
            weights += _weight(token + shift - first, distance, copied, reach, stretch, HOW)
            weights += _weight(shift - 1 - token - first, distance, copied, reach, stretch, HOW)
            weights += _weight(2 * size - shift - 1 - token - first, distance, copied, reach, stretch, HOW)
    weights = tl.where(token < size, weights, 0.0)
    if HOW.double:
        return weights / total
    else:
        return tl.div_rn(weights, total.broadcast_to(weights.shape))  # `/` is 2 ulp off, and 1 must be 1


# ---------------------------------------------------------------- both axes
#
# `g` is a sample's map: (yy, yx, xy, xx), its linear part; (y, x), where the centre of the output lattice comes from;
# (h, w), the size of that lattice; all scalars. The position of output token o is  y + yy o_y + yx o_x,
# x + xy o_y + xx o_x, with o measured from the centre.


@triton.jit
def _both_taps(o_y, o_x, g, axis_y, axis_x, HOW: tl.constexpr):
    """The taps on each axis of the output tokens (o_y, o_x), each (O,) int32."""
    yy, yx, xy, xx, y, x, h, w = g
    u, v = o_y + (0.5 - h / 2).to(tl.float64), o_x + (0.5 - w / 2).to(tl.float64)
    return _taps(yy * u + yx * v + y, axis_y, HOW), _taps(xy * u + xx * v + x, axis_x, HOW)


@triton.jit
def _tile_of_w(taps_y, taps_x, inside, i_y, i_x, HOW: tl.constexpr):
    """(I, O): the columns of the square of input tokens at (i_y, i_x), as rows; 0 for outputs that aren't `inside`.

    With O last the lanes of a warp are on outputs, and each knows the positions of two and not of all.
    """
    down = tl.where(inside[None, :], _factor(taps_y, i_y, HOW), 0.0)
    across = _factor(taps_x, i_x, HOW)
    return tl.reshape(down[:, None, :] * across[None, :, :], [_EDGE * _EDGE, inside.shape[0]])


@triton.jit
def _square(first_y, first_x, height, width):
    """The tokens of a square: y, x and whether they are on the lattice, each (_EDGE^2,)."""
    token = tl.arange(0, _EDGE * _EDGE)
    y, x = first_y + token // _EDGE, first_x + token % _EDGE
    return y, x, (y < height) & (x < width)


# ---------------------------------------------------------------- which squares to read


@triton.jit
def _squares(low, high, size):
    """The squares that hold the tokens [low, high], whole numbers in float64: the first token, and how many squares.

    A NaN, which a map that can't be inverted makes, stands for the end of the lattice.
    """
    low, high = tl.where(low == low, low, 0.0), tl.where(high == high, high, size - 1.0)
    first = tl.minimum(tl.maximum(low, 0.0), size).to(tl.int32) // _EDGE
    last = tl.maximum(tl.minimum(high, size - 1.0), -1.0).to(tl.int32)
    return first * _EDGE, tl.where(last >= first * _EDGE, last // _EDGE - first + 1, 0)


@triton.jit
def _squares_of(low, high, axis, HOW: tl.constexpr):
    """The squares of input tokens that positions in [low, high] take weight from (or a few more)."""
    step, size, _ = axis
    reach = _reach(step, HOW)
    if HOW.padding == "cut":
        low, high = tl.minimum(tl.maximum(low, 0.0), size), tl.minimum(tl.maximum(high, 0.0), size)
    low, high = low - reach, high + reach
    if HOW.padding == "reflection":
        mirrored = tl.where(high > size, tl.minimum(low, 2 * size - high), low)
        high = tl.where(low < 0, tl.maximum(high, -low), high)
        low = mirrored
    if HOW.padding != "zeros":
        low, high = tl.minimum(tl.maximum(low, 0.0), size - 1.0), tl.minimum(tl.maximum(high, 0.0), size - 1.0)
    return _squares(tl.floor(low), tl.floor(high), size)


@triton.jit
def _squares_read(row_y, row_x, g, axis_y, axis_x, HOW: tl.constexpr):
    """What the outputs of the square at (row_y, row_x) read: the box of their positions and its reach."""
    yy, yx, xy, xx, y, x, h, w = g
    half_y = (tl.minimum(row_y + _EDGE, h) - row_y - 1) / 2.0
    half_x = (tl.minimum(row_x + _EDGE, w) - row_x - 1) / 2.0
    u, v = row_y + half_y + (0.5 - h / 2), row_x + half_x + (0.5 - w / 2)
    centre_y, extent_y = y + yy * u + yx * v, tl.abs(yy) * half_y + tl.abs(yx) * half_x + _TOLERANCE
    centre_x, extent_x = x + xy * u + xx * v, tl.abs(xy) * half_y + tl.abs(xx) * half_x + _TOLERANCE
    first_y, down = _squares_of(centre_y - extent_y, centre_y + extent_y, axis_y, HOW)
    first_x, across = _squares_of(centre_x - extent_x, centre_x + extent_x, axis_x, HOW)
    return first_y, down, first_x, across


@triton.jit
def _positions_at(first, centre, extent, axis, HOW: tl.constexpr):
    """The positions, from low to high, that may take weight from the square of tokens at `first`.

    `centre` and `extent` are of the positions of all outputs: what folds onto the square lies among them.
    """
    step, size, _ = axis
    reach = _reach(step, HOW)
    least, most = centre - extent, centre + extent
    low, high = first + 0.5 - reach, tl.minimum(first + _EDGE, size) - 0.5 + reach
    if HOW.padding == "reflection":
        return tl.where(low < -least, tl.minimum(low, least), low), tl.where(
            high > 2 * size - most, tl.maximum(high, most), high
        )
    elif HOW.padding != "zeros":
        return tl.where(low < 0, tl.minimum(low, least), low), tl.where(high > size, tl.maximum(high, most), high)
    else:
        return low, high


@triton.jit
def _squares_reading(row_y, row_x, g, axis_y, axis_x, HOW: tl.constexpr):
    """The outputs that read the square of inputs at (row_y, row_x): the box around the parallelogram of them."""
    yy, yx, xy, xx, y, x, h, w = g
    low, high = _positions_at(row_y, y, (tl.abs(yy) * h + tl.abs(yx) * w) / 2, axis_y, HOW)
    centre_y, half_y = (low + high) / 2 - y, (high - low) / 2
    low, high = _positions_at(row_x, x, (tl.abs(xy) * h + tl.abs(xx) * w) / 2, axis_x, HOW)
    centre_x, half_x = (low + high) / 2 - x, (high - low) / 2
    determinant = yy * xx - yx * xy
    u = (xx * centre_y - yx * centre_x) / determinant + (h / 2 - 0.5)
    v = (yy * centre_x - xy * centre_y) / determinant + (w / 2 - 0.5)
    extent_u = (tl.abs(xx) * half_y + tl.abs(yx) * half_x) / tl.abs(determinant) + _TOLERANCE
    extent_v = (tl.abs(yy) * half_x + tl.abs(xy) * half_y) / tl.abs(determinant) + _TOLERANCE
    first_y, down = _squares(tl.ceil(u - extent_u), tl.floor(u + extent_u), h)
    first_x, across = _squares(tl.ceil(v - extent_v), tl.floor(v + extent_v), w)
    return first_y, down, first_x, across


# ---------------------------------------------------------------- the kernel


@triton.jit
def _accumulate(acc, weights, tokens):
    """acc (R, C) + weights (R, K) @ tokens (K, C), both but the tokens float32, or all float64."""
    if tokens.dtype == tl.float64:
        return tl.dot(weights, tokens, acc, input_precision="ieee", out_dtype=tl.float64)
    elif tokens.dtype == tl.float32:
        return tl.dot(weights, tokens, acc, input_precision="tf32x3")
    else:
        high = weights.to(tokens.dtype)
        low = (weights - high.to(tl.float32)).to(tokens.dtype)
        if _INTERPRETED:  # triton 3.6's interpreter multiplies the bit patterns of bfloat16
            high, low, tokens = high.to(tl.float32), low.to(tl.float32), tokens.to(tl.float32)
        return tl.dot(low, tokens, tl.dot(high, tokens, acc))


@triton.jit(do_not_specialize=["height", "width", "height_out", "width_out"])
def _resample(
    x,  # (B, H*W, C); the transpose: (B, h*w, C)
    linear,  # (B, 2, 2) float64
    offset,  # (B, 2) float64
    out,  # (B, h*w, C); the transpose: (B, H*W, C)
    height,
    width,
    height_out,
    width_out,
    channels,
    HOW: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    if TRANSPOSE:
        rows, row_width, reads, read_width = height, width, height_out, width_out
    else:
        rows, row_width, reads, read_width = height_out, width_out, height, width
    # The squares of one slab of channels are neighbours, so that they find its tokens in L2.
    squares_across = tl.cdiv(row_width, _EDGE)
    squares, slabs = tl.cdiv(rows, _EDGE) * squares_across, tl.cdiv(channels, CHANNELS)
    square, slab = tl.program_id(0) % squares, tl.program_id(0) // squares
    sample, slab = (slab // slabs).to(tl.int64), slab % slabs
    row_y, row_x = square // squares_across * _EDGE, square % squares_across * _EDGE

    yy, yx = tl.load(linear + 4 * sample), tl.load(linear + 4 * sample + 1)
    xy, xx = tl.load(linear + 4 * sample + 2), tl.load(linear + 4 * sample + 3)
    y, x_ = tl.load(offset + 2 * sample), tl.load(offset + 2 * sample + 1)
    # Every number is finite and not too large, or else the map takes nothing.
    usable = (tl.abs(yy) <= _LARGEST) & (tl.abs(yx) <= _LARGEST) & (tl.abs(xy) <= _LARGEST)
    usable = usable & (tl.abs(xx) <= _LARGEST) & (tl.abs(y) <= _LARGEST) & (tl.abs(x_) <= _LARGEST)
    yy, yx, y = tl.where(usable, yy, 0.0), tl.where(usable, yx, 0.0), tl.where(usable, y, 0.0) + height / 2
    xy, xx, x_ = tl.where(usable, xy, 0.0), tl.where(usable, xx, 0.0), tl.where(usable, x_, 0.0) + width / 2
    g = (yy, yx, xy, xx, y, x_, height_out, width_out)
    exact = (yy * yx == 0) & (xy * xx == 0) & (tl.abs(yy + yx) == 1) & (tl.abs(xy + xx) == 1)
    centre = tl.where(exact, 0.5, -1.0)
    axis_y = (tl.minimum(tl.sqrt(yy * yy + yx * yx), _MOST_STRETCH * height), height, centre)
    axis_x = (tl.minimum(tl.sqrt(xy * xy + xx * xx), _MOST_STRETCH * width), width, centre)
    if TRANSPOSE:
        first_y, down, first_x, across = _squares_reading(row_y, row_x, g, axis_y, axis_x, HOW)
    else:
        first_y, down, first_x, across = _squares_read(row_y, row_x, g, axis_y, axis_x, HOW)
    reached = tl.where(usable, down * across, 0)
    across = tl.maximum(across, 1)

    written_y, written_x, written = _square(row_y, row_x, rows, row_width)  # (R,)
    channel = slab * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    x += sample * reads * read_width * channels
    out += sample * rows * row_width * channels

    # What each row copies: a token, -1 for a blend, _NOWHERE for nothing.
    if TRANSPOSE:
        # Only these maps are made of copies. Elsewhere a row of one tap is a product with 1, as good as a copy.
        some = exact | (HOW.kernel == "nearest")
        source = tl.where(written, tl.where(some, _NOWHERE, -1), -1)
        for r in range(tl.where(some, reached, 0)):
            o_y, o_x, inside = _square(first_y + r // across * _EDGE, first_x + r % across * _EDGE, reads, read_width)
            taps_y, taps_x = _both_taps(o_y, o_x, g, axis_y, axis_x, HOW)
            weights = _tile_of_w(taps_y, taps_x, inside, row_y, row_x, HOW)  # (R, O)
            only = tl.max(tl.where(weights != 0, (o_y * read_width + o_x)[None, :], _NOWHERE), 1)  # (R,)
            single = (tl.sum((weights != 0).to(tl.int32), 1) == 1) & (tl.sum(weights, 1) == 1) & (source == _NOWHERE)
            source = tl.where(only == _NOWHERE, source, tl.where(single, only, -1))
    else:
        taps_y, taps_x = _both_taps(written_y, written_x, g, axis_y, axis_x, HOW)
        source_y, source_x = tl.reshape(taps_y[9], [_EDGE * _EDGE]), tl.reshape(taps_x[9], [_EDGE * _EDGE])
        source = tl.where((source_y < 0) | (source_x < 0), -1, source_y * read_width + source_x)
        source = tl.where((source_y == _NOWHERE) | (source_x == _NOWHERE), _NOWHERE, source)
    source = tl.where(usable, source, _NOWHERE)
    blends = tl.max((written & (source == -1)).to(tl.int32), 0)

    acc = tl.zeros([_EDGE * _EDGE, CHANNELS], tl.float64 if HOW.double else tl.float32)
    for r in range(blends * reached):
        read_y, read_x = first_y + r // across * _EDGE, first_x + r % across * _EDGE
        token_y, token_x, inside = _square(read_y, read_x, reads, read_width)  # (K,)
        if TRANSPOSE:
            taps_y, taps_x = _both_taps(token_y, token_x, g, axis_y, axis_x, HOW)
            weights = _tile_of_w(taps_y, taps_x, inside, row_y, row_x, HOW)  # (R, K)
        else:
            weights = tl.trans(_tile_of_w(taps_y, taps_x, written, read_y, read_x, HOW))  # (R, K)
        place = (token_y * read_width + token_x).to(tl.int64)[:, None] * channels + channel
        tokens = tl.load(x + place, mask=inside[:, None] & (channel < channels), other=0.0)
        acc = _accumulate(acc, weights, tokens)

    source, mask = source[:, None], written[:, None] & (channel < channels)
    copied = tl.load(x + source.to(tl.int64) * channels + channel, mask=mask & (source >= 0), other=0.0)
    place = (written_y * row_width + written_x).to(tl.int64)[:, None] * channels + channel
    tl.store(out + place, tl.where(source == -1, acc.to(out.dtype.element_ty), copied), mask=mask)


# ---------------------------------------------------------------- launch


def resample(x: Tensor, action: GroupAction, *, transpose: bool) -> Tensor:
    """(B, H*W, C) to (B, h*w, C):  out = W_g x; with `transpose` its W_g^T x, the other way."""
    height, width = action.size_in if transpose else action.size_out
    batch, tokens, channels = x.shape
    out = x.new_empty(batch, height * width, channels)
    if out.numel() == 0 or tokens == 0:
        return out.zero_()
    config = group_action_config(capability_of(x.device), channels, x.dtype)
    edge = _EDGE.value
    squares = triton.cdiv(height, edge) * triton.cdiv(width, edge)
    with torch.cuda.device_of(x):
        _resample[(batch * squares * triton.cdiv(channels, config.tiles["CHANNELS"]),)](
            x.contiguous(),
            action.linear.contiguous(),
            action.offset.contiguous(),
            out,
            *action.size_in,
            *action.size_out,
            channels,
            HOW=Resampling.of(action.interpolation, action.padding, action.antialias, x.dtype),
            TRANSPOSE=transpose,
            **config.tiles,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return out
