"""The Triton kernels of nt_xent and info_nce, as `ser_fast.ops.tiled.Kernels` describes them, and their launches."""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ser_fast.kernels.configs import (
    CAPABILITIES,
    LARGEST_OWNED,
    Build,
    Config,
    capability_of,
    owner_config,
    prepare_config,
    row_config,
    running_config,
    similarity_config,
)
from ser_fast.ops.reference import EPS
from ser_fast.ops.tiled import LIFT, SPAN, TOP, Side, Source, TiledLosses, base2_scale

_EPS = tl.constexpr(EPS)
_SPAN = tl.constexpr(SPAN)
_LN2 = tl.constexpr(math.log(2))
_LOG2E = tl.constexpr(1 / math.log(2))
_LIFT = tl.constexpr(LIFT)
_TOP = tl.constexpr(TOP)


# ---------------------------------------------------------------- rows


@triton.jit
def _load_rows(x0, x1, r, take, split, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """(R, BLOCK_D) rows r of [x0; x1] in at least float32: NaN for Inf, 0 where not taken and beyond D."""
    d = tl.arange(0, BLOCK_D)[None, :]
    first, second = take & (r < split), take & (r >= split)
    x = tl.load(x0 + r[:, None] * D + d, mask=first[:, None] & (d < D), other=0)
    y = tl.load(x1 + (r - split)[:, None] * D + d, mask=second[:, None] & (d < D), other=0)
    if x0.dtype.element_ty != tl.float64:
        x, y = x.to(tl.float32), y.to(tl.float32)
    x += y
    return tl.where(tl.abs(x) < float("inf"), x, float("nan"))


@triton.jit
def _embed(x, NORMALIZE: tl.constexpr):
    """x / max(|x|, EPS), and |x| as scale and length (R,), factors that are safe to square."""
    scale = tl.maximum(tl.max(tl.abs(x), 1), tl.full((1,), _EPS, x.dtype))
    y = x / scale[:, None]
    length = tl.sqrt(tl.sum(y * y, 1))
    if NORMALIZE:
        x = y / tl.where(length < 1, 1.0, length)[:, None]
    return x, scale, length


@triton.jit(do_not_specialize=["split", "count", "padded"])
def _prepare(
    x0,
    x1,
    image,
    valid,
    u,
    table,
    split,
    count,
    padded,
    D: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPANS: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    """Rows as operands u (padded, DIM), and `table`: image, valid (padded,), and of each 32 rows the lowest image, the
    highest, and whether all are valid (padded / 32,).
    """
    program = tl.program_id(0).to(tl.int64)
    r = program * SPANS * _SPAN + tl.arange(0, SPANS * _SPAN)
    t = tl.where(r < split, r, r - split)
    take = tl.load(valid + t, mask=r < count, other=0) != 0
    of = tl.load(image + t, mask=r < count, other=0)
    tl.store(table + r, of)
    tl.store(table + padded + r, take.to(tl.int64))
    spans = padded // _SPAN
    at = table + 2 * padded + program * SPANS + tl.arange(0, SPANS)
    of = tl.reshape(of, (SPANS, _SPAN))
    tl.store(at, tl.min(of, 1))
    tl.store(at + spans, tl.max(of, 1))
    tl.store(at + 2 * spans, tl.min(tl.reshape(take.to(tl.int64), (SPANS, _SPAN)), 1))
    x, _, _ = _embed(_load_rows(x0, x1, r, take, split, D, BLOCK_D), NORMALIZE)
    d = tl.arange(0, BLOCK_D)[None, :]
    tl.store(u + r[:, None] * DIM + d, x.to(u.dtype.element_ty), mask=d < DIM)


@triton.jit
def _tile(table, padded, start, BLOCK: tl.constexpr):
    """The lowest and the highest image of the rows [start, start + BLOCK), and whether all are valid (1 or 0)."""
    at = table + 2 * padded + start // _SPAN + tl.arange(0, BLOCK // _SPAN)
    spans = padded // _SPAN
    return tl.min(tl.load(at)), tl.max(tl.load(at + spans)), tl.min(tl.load(at + 2 * spans))


@triton.jit
def _one_image(a, b):
    """Whether all rows of two tiles, as `_tile` describes them, are of one image."""
    return (a[0] == a[1]) & (b[0] == b[1]) & (a[0] == b[0])


@triton.jit
def _only_negatives(s, q_tile, q_table, q_padded, i, k_tile, k_table, k_padded, j):
    """s (M, N) where row j (N,) of the keys is a negative of row i (M,) of the queries, else -inf.

    In two steps, since images and valid bits of both sides together would not fit the registers.
    """
    if (q_tile[0] <= k_tile[1]) & (k_tile[0] <= q_tile[1]):
        s = tl.where(tl.load(q_table + i)[:, None] != tl.load(k_table + j)[None, :], s, -float("inf"))
    if (q_tile[2] & k_tile[2]) == 0:
        q_valid, k_valid = tl.load(q_table + q_padded + i) != 0, tl.load(k_table + k_padded + j) != 0
        s = tl.where(q_valid[:, None] & k_valid[None, :], s, -float("inf"))
    return s


# ---------------------------------------------------------------- arithmetic of one row, in float64


@triton.jit
def _double(high, low):
    """(1,) float64 from its two parts in float32, which is how a kernel takes a float."""
    return tl.full((1,), high, tl.float64) + low


@triton.jit
def _log1p(x):
    """log(1 + x) for x >= 0, to the last bits of x (Kahan)."""
    y = 1 + x
    return tl.where(y == 1, x, tl.log(y) * (x / tl.where(y == 1, 1, y - 1)))


@triton.jit
def _expm1(x):
    """e^x - 1 for x <= 0, to the last bits of x (Kahan)."""
    y = tl.exp(x)
    between = (y != 1) & (y > 0)
    return tl.where(y == 1, x, tl.where(y == 0, -1.0, (y - 1) * (x / tl.where(between | (y != y), tl.log(y), 1))))


@triton.jit
def _softplus(x):
    """log(1 + e^x), 0 at -inf."""
    return tl.where(x != x, x, tl.maximum(x, 0.0) + _log1p(tl.exp(-tl.abs(x))))


@triton.jit
def _positives(
    q0, q1, q_split, k0, k1, k_split, positive, r, take, D: tl.constexpr, BLOCK_D: tl.constexpr,
    VIEWS: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """(R, BLOCK_D) the unit rows of the positives, and (R,) <u, v> of the rows r with them, in float64."""
    u, _, _ = _embed(_load_rows(q0, q1, r, take, q_split, D, BLOCK_D), NORMALIZE)
    p = tl.where(r < q_split, r + q_split, r - q_split) if VIEWS else tl.load(positive + r, mask=take, other=0)
    v, _, _ = _embed(_load_rows(k0, k1, p, take, k_split, D, BLOCK_D), NORMALIZE)
    return v, tl.sum(u.to(tl.float64) * v.to(tl.float64), 1)


# ---------------------------------------------------------------- sums of rows


@triton.jit
def _product(a, i, b, j, DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """(M, N) float32 products of the rows [i, i + M) of a with the rows [j, j + N) of b, (rows, DIM) float16."""
    m, n, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    a += i * DIM + m[:, None] * DIM + d[None, :]
    b += j * DIM + n[None, :] * DIM + d[:, None]
    s = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(0, DIM, BLOCK_K):
        s = tl.dot(tl.load(a), tl.load(b), s)
        a += BLOCK_K
        b += BLOCK_K
    return s


@triton.jit
def _add(sums, at, value, padded):
    """sums[k, at] += value, 0 <= value <= 256, in the integers of the k that holds all bits of a float32.

    Integer sums have no order, so they repeat. sums (4, padded): units of 2^-42, 2^-70 and 2^-98, and a count of NaN.
    """
    kind = tl.where(value >= 2.0**-20, 0, tl.where(value >= 2.0**-48, 1, 2))
    unit = tl.where(kind == 0, 2.0**42, tl.where(kind == 1, 2.0**70, 2.0**98))
    number = value == value
    whole = (tl.where(number, value, 0.0) * unit).to(tl.int64)
    tl.atomic_add(sums + kind * padded + at, whole, mask=whole != 0, sem="relaxed")
    tl.atomic_add(sums + 3 * padded + at, 1, mask=~number, sem="relaxed")


@triton.jit
def _triangle(t):
    """(i, j), i >= j, of number t in the order (0, 0), (1, 0), (1, 1), (2, 0), ..."""
    i = ((tl.sqrt(8 * t.to(tl.float64) + 1) - 1) / 2).to(tl.int64)
    i += ((i + 1) * (i + 2) // 2 <= t).to(tl.int64) - (i * (i + 1) // 2 > t).to(tl.int64)
    return i, t - i * (i + 1) // 2


@triton.jit
def _kept_from(r, c, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where the tile with row r and column c < r begins, of those on and below the diagonal, row by row."""
    i, j = r // BLOCK_M, c // BLOCK_N
    tile = BLOCK_M // BLOCK_N * (i * (i + 1) // 2) + j
    return tile * (BLOCK_M * BLOCK_N)


@triton.jit
def _kept_at(r, c, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where the similarity of row r with row c < r is kept."""
    return _kept_from(r, c, BLOCK_M, BLOCK_N) + (r % BLOCK_M) * BLOCK_N + c % BLOCK_N


@triton.jit(do_not_specialize=["padded", "count"])
def _symmetric_sums(
    u,
    table,
    sums,
    kept,
    scale,
    count,
    padded,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    KEEP: tl.constexpr,
):
    """L of the rows of one set with themselves, from the pairs i > j alone; with KEEP, 2^15 P for the backward pass.

    Programs go through squares of GROUP tile rows, so that a square's rows stay in the second-level cache.
    """
    RATIO: tl.constexpr = BLOCK_M // BLOCK_N
    SQUARE: tl.constexpr = GROUP * GROUP * RATIO
    t = tl.program_id(0).to(tl.int64)
    square_i, square_j = _triangle(t // SQUARE)
    i = (square_i * GROUP + t % SQUARE % GROUP) * BLOCK_M
    j = (square_j * GROUP * RATIO + t % SQUARE // GROUP) * BLOCK_N
    if (i < count) & (j < i + BLOCK_M):
        m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
        s = _product(u, i, u, j, DIM, BLOCK_M, BLOCK_N, BLOCK_K)
        tile_i, tile_j = _tile(table, padded, i, BLOCK_M), _tile(table, padded, j, BLOCK_N)
        s = _only_negatives(s, tile_i, table, padded, i + m, tile_j, table, padded, j + n)
        if j + BLOCK_N > i:
            s = tl.where((i + m)[:, None] > (j + n)[None, :], s, -float("inf"))
        p = tl.exp2(s * scale - scale)
        if KEEP:
            at = kept + _kept_from(i, j, BLOCK_M, BLOCK_N)
            tl.store(at + m[:, None] * BLOCK_N + n[None, :], (p * 2.0**_LIFT).to(tl.float16))
        # A gather spreads the sums over all threads: as they come, each thread has all those of its part of the tile.
        _add(sums, i + m, tl.gather(tl.sum(p, 1), m, 0), padded)
        _add(sums, j + n, tl.gather(tl.sum(p, 0), n, 0), padded)


@triton.jit(do_not_specialize=["q_padded", "k_padded", "first_row", "first_key", "tiles", "splits", "width"])
def _row_sums(
    q,
    q_table,
    k,
    k_table,
    panel,
    state,
    scale,
    q_padded,
    k_padded,
    first_row,
    first_key,
    tiles,
    splits,
    width,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LIBRARY: tl.constexpr,
):
    """Takes the negatives in `tiles` tiles of keys into `state` (2, splits, q_padded): top, the sums of 2^(cs - top).

    With LIBRARY the similarities are read from `panel` (rows, width), whose corner is (first_row, first_key).
    """
    split = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0).to(tl.int64) * BLOCK_M
    i = first_row + start
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    at = state + split * q_padded + i + m
    top, total = tl.load(at), tl.load(at + splits * q_padded)
    tile_i = _tile(q_table, q_padded, i, BLOCK_M)
    for tile in range(split * tiles // splits, (split + 1) * tiles // splits):
        j = first_key + tile * BLOCK_N
        if LIBRARY:
            s = tl.load(panel + (start + m)[:, None] * width + tile * BLOCK_N + n[None, :])
        else:
            s = _product(q, i, k, j, DIM, BLOCK_M, BLOCK_N, BLOCK_K) * scale
        tile_j = _tile(k_table, k_padded, j, BLOCK_N)
        s = _only_negatives(s, tile_i, q_table, q_padded, i + m, tile_j, k_table, k_padded, j + n)
        higher = tl.maximum(top, tl.max(s, 1))
        shift = tl.where(higher == -float("inf"), 0.0, higher)  # no negative so far
        total = total * tl.exp2(top - shift) + tl.sum(tl.exp2(s - shift[:, None]), 1)
        top = higher
    tl.store(at, top)
    tl.store(at + splits * q_padded, total)


@triton.jit
def _log2_sums(state, r, take, splits, padded, scale, SUMMED: tl.constexpr):
    """(R,) float64 log2 of the sums over the negatives, from the integers of `_add` or from maxima and sums."""
    if SUMMED:
        total = tl.load(state + r, mask=take, other=0).to(tl.float64) * 2.0**-42
        total += tl.load(state + padded + r, mask=take, other=0).to(tl.float64) * 2.0**-70
        total += tl.load(state + 2 * padded + r, mask=take, other=0).to(tl.float64) * 2.0**-98
        broken = tl.load(state + 3 * padded + r, mask=take, other=0) != 0
        total = tl.where(broken, float("nan"), total)
        top = scale + tl.zeros_like(total)
    else:
        top = tl.full(r.shape, -float("inf"), tl.float64)
        total = tl.zeros_like(top)
        for split in range(splits):
            at = state + split * padded + r
            part = tl.load(at, mask=take, other=-float("inf")).to(tl.float64)
            sums = tl.load(at + splits * padded, mask=take, other=0).to(tl.float64)
            higher = tl.maximum(top, part)
            shift = tl.where(higher == -float("inf"), 0.0, higher)
            total = total * tl.exp2(top - shift) + sums * tl.exp2(part - shift)
            top = higher
    some = total != 0
    return tl.where(some, tl.log(tl.where(some, total, 1.0)) * _LOG2E + top, -float("inf"))


@triton.jit(do_not_specialize=["q_split", "k_split", "count", "padded", "splits"])
def _losses(
    q0,
    q1,
    k0,
    k1,
    positive,
    table,
    state,
    loss,
    scale,
    inverse_high,
    inverse_low,
    q_split,
    k_split,
    count,
    padded,
    splits,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    VIEWS: tl.constexpr,
    SUMMED: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    """loss = log(1 + e^(log-sum of the negatives - s of the positive)); 1 / temperature comes in two float32 parts."""
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    take = tl.load(table + padded + r, mask=r < count, other=0) != 0
    _, s = _positives(q0, q1, q_split, k0, k1, k_split, positive, r, take, D, BLOCK_D, VIEWS, NORMALIZE)
    negatives = _log2_sums(state, r, take, splits, padded, scale, SUMMED) * _LN2
    result = _softplus(negatives - s * _double(inverse_high, inverse_low))
    tl.store(loss + r, tl.where(take, result, 0.0).to(loss.dtype.element_ty), mask=r < count)


# ---------------------------------------------------------------- gradients


@triton.jit(do_not_specialize=["q_split", "k_split", "count", "padded"])
def _coefficients(
    q0,
    q1,
    k0,
    k1,
    positive,
    table,
    weight,
    largest,
    loss,
    out,
    scale,
    inverse_high,
    inverse_low,
    q_split,
    k_split,
    count,
    padded,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    VIEWS: tl.constexpr,
    BOUNDED: tl.constexpr,
    LIBRARY: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    """out (3, padded): a and its shift, G_ij = a_i 2^(c s_ij - shift_i), and the weight of the positive.

    For float16 tiles a is in units that make `largest`, the most that a row of G sums to, 2^14.
    """
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    take = tl.load(table + padded + r, mask=r < padded, other=0) != 0
    _, s = _positives(q0, q1, q_split, k0, k1, k_split, positive, r, take, D, BLOCK_D, VIEWS, NORMALIZE)
    inverse = _double(inverse_high, inverse_low)
    w = tl.load(weight + r, mask=take, other=0).to(tl.float64)
    value = tl.load(loss + r, mask=take, other=0).to(tl.float64)
    pull = w * _expm1(-value) * inverse
    if not LIBRARY:
        most = tl.load(largest).to(tl.float64)
        w = w / tl.where(most == 0, 1.0, most) * _TOP
    exact = (s * inverse + value) * _LOG2E
    kind: tl.constexpr = out.dtype.element_ty
    shift = scale + tl.zeros_like(exact) if BOUNDED else exact.to(kind).to(tl.float64)
    a = w * tl.exp2(shift - exact)  # what rounding took from the shift goes into the factor
    inside = r < padded
    tl.store(out + r, tl.where(take, a, 0.0).to(kind), mask=inside)
    tl.store(out + padded + r, tl.where(take, shift, 0.0).to(kind), mask=inside)
    tl.store(out + 2 * padded + r, tl.where(take, pull, 0.0).to(kind), mask=inside)


@triton.jit
def _shares(coefficients, padded, at, NEEDED: tl.constexpr):
    """a and its shift of the rows `at`, or nothing."""
    if NEEDED:
        return tl.load(coefficients + at), tl.load(coefficients + padded + at)
    else:
        return None, None


@triton.jit
def _weigh(s, scale, a_i, shift_i, a_j, shift_j, BOUNDED: tl.constexpr, BY_ROW: tl.constexpr, BY_KEY: tl.constexpr):
    """G of a tile from its products s: the rows' part, the columns' part, or both."""
    if BOUNDED:
        p = tl.exp2(s * scale - scale)
        if BY_ROW and BY_KEY:
            g = p * (a_i[:, None] + a_j[None, :])
        elif BY_ROW:
            g = p * a_i[:, None]
        else:
            g = p * a_j[None, :]
    else:
        if BY_ROW:
            g = tl.exp2(s * scale - shift_i[:, None]) * a_i[:, None]
        if BY_ROW and BY_KEY:
            g += tl.exp2(s * scale - shift_j[None, :]) * a_j[None, :]
        elif BY_KEY:
            g = tl.exp2(s * scale - shift_j[None, :]) * a_j[None, :]
    return g


@triton.jit(do_not_specialize=["q_padded", "k_padded", "tiles", "splits"])
def _owner(
    q,
    q_table,
    q_coefficients,
    k,
    k_table,
    k_coefficients,
    out,
    scale,
    q_padded,
    k_padded,
    tiles,
    splits,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BOUNDED: tl.constexpr,
    BY_ROW: tl.constexpr,
    BY_KEY: tl.constexpr,
):
    """out (splits, q_padded, DIM) float32 = G k, a strip of rows a program, over one of `splits` shares of the keys."""
    split = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0).to(tl.int64) * BLOCK_M
    m, n, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, DIM)
    rows = tl.load(q + i * DIM + m[:, None] * DIM + d[None, :])
    a_i, shift_i = _shares(q_coefficients, q_padded, i + m, BY_ROW)
    tile_i = _tile(q_table, q_padded, i, BLOCK_M)
    result = tl.zeros((BLOCK_M, DIM), tl.float32)
    for tile in range(split * tiles // splits, (split + 1) * tiles // splits):
        j = tile * BLOCK_N
        keys = tl.load(k + j * DIM + n[:, None] * DIM + d[None, :])
        s = tl.dot(rows, tl.trans(keys))
        tile_j = _tile(k_table, k_padded, j, BLOCK_N)
        s = _only_negatives(s, tile_i, q_table, q_padded, i + m, tile_j, k_table, k_padded, j + n)
        a_j, shift_j = _shares(k_coefficients, k_padded, j + n, BY_KEY)
        g = _weigh(s, scale, a_i, shift_i, a_j, shift_j, BOUNDED, BY_ROW, BY_KEY)
        result = tl.dot(g.to(tl.float16), keys, result)
    tl.store(out + (split * q_padded + i) * DIM + m[:, None] * DIM + d[None, :], result)


@triton.jit(do_not_specialize=["q_padded", "k_padded", "first_row", "first_key", "row_tiles", "key_tiles"])
def _panel(
    q,
    q_table,
    q_coefficients,
    k,
    k_table,
    k_coefficients,
    kept,
    panel,
    scale,
    q_padded,
    k_padded,
    first_row,
    first_key,
    row_tiles,
    key_tiles,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    SOURCE: tl.constexpr,
    BOUNDED: tl.constexpr,
    BY_ROW: tl.constexpr,
    BY_KEY: tl.constexpr,
):
    """panel = G of row_tiles x key_tiles tiles from the corner (first_row, first_key); SOURCE names a `Source`."""
    t = tl.program_id(0).to(tl.int64)
    row_tile, key_tile = tl.swizzle2d(t // key_tiles, t % key_tiles, row_tiles, key_tiles, GROUP)
    i, j = first_row + row_tile * BLOCK_M, first_key + key_tile * BLOCK_N
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    width = key_tiles.to(tl.int64) * BLOCK_N
    out = panel + (row_tile * BLOCK_M + m)[:, None] * width + (key_tile * BLOCK_N + n)[None, :]
    tile_i = _tile(q_table, q_padded, i, BLOCK_M)
    tile_j = _tile(k_table, k_padded, j, BLOCK_N)
    if _one_image(tile_i, tile_j):
        tl.store(out, tl.zeros((BLOCK_M, BLOCK_N), panel.dtype.element_ty))
    else:
        if SOURCE == "KEPT" or SOURCE == "KEPT_DIAGONAL":
            if SOURCE == "KEPT":
                at = _kept_from(i, j, BLOCK_M, BLOCK_N) + m[:, None] * BLOCK_N + n[None, :]
            else:
                row, column = (i + m)[:, None], (j + n)[None, :]
                at = _kept_at(tl.maximum(row, column), tl.minimum(row, column), BLOCK_M, BLOCK_N)
            a_i, a_j = tl.load(q_coefficients + i + m), tl.load(k_coefficients + j + n)
            g = tl.load(kept + at).to(tl.float32) * 2.0**-_LIFT * (a_i[:, None] + a_j[None, :])
        else:
            s = tl.load(out) if SOURCE == "LIBRARY" else _product(q, i, k, j, DIM, BLOCK_M, BLOCK_N, BLOCK_K)
            s = _only_negatives(s, tile_i, q_table, q_padded, i + m, tile_j, k_table, k_padded, j + n)
            a_i, shift_i = _shares(q_coefficients, q_padded, i + m, BY_ROW)
            a_j, shift_j = _shares(k_coefficients, k_padded, j + n, BY_KEY)
            g = _weigh(s, scale, a_i, shift_i, a_j, shift_j, BOUNDED, BY_ROW, BY_KEY)
        tl.store(out, g.to(panel.dtype.element_ty))


@triton.jit
def _embed_backward(g, u, scale, length, NORMALIZE: tl.constexpr):
    """The gradient of x from that of its unit row u, (R, BLOCK_D): what points along u is lost, unless |x| < EPS."""
    if NORMALIZE:
        radial = tl.where(length < 1, 0.0, tl.sum(u * g, 1))
        g = (g - u * radial[:, None]) / scale[:, None] / tl.where(length < 1, 1.0, length)[:, None]
    return g


@triton.jit(do_not_specialize=["x_split", "y_split", "count", "padded", "y_padded", "splits"])
def _finish(
    x0,
    x1,
    y0,
    y1,
    table,
    coefficients,
    positive,
    order,
    first,
    accumulated,
    largest,
    d_x0,
    d_x1,
    inverse_high,
    inverse_low,
    x_split,
    y_split,
    count,
    padded,
    y_padded,
    splits,
    D: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    SIDE: tl.constexpr,
    LIBRARY: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    """The gradient of the rows x, from the accumulated G k and the positives, whose rows are y.

    SIDE names a `Side`. The positive of query r is key positive[r]; key r is that of the queries order[first[r]] to
    order[first[r + 1] - 1].
    """
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)[None, :]
    inside = (r < count)[:, None] & (d < D)
    take = tl.load(table + padded + r, mask=r < count, other=0) != 0
    x = _load_rows(x0, x1, r, take, x_split, D, BLOCK_D)
    u, scale, length = _embed(x, NORMALIZE)

    g = tl.zeros_like(x)
    for split in range(splits):
        g += tl.load(accumulated + (split * padded + r)[:, None] * DIM + d, mask=inside, other=0)
    unit = _double(inverse_high, inverse_low)
    if not LIBRARY:
        unit *= tl.load(largest).to(tl.float64) / _TOP
    g *= unit.to(g.dtype)

    if SIDE == "KEY":
        begin = tl.load(first + r, mask=r < count, other=0)
        end = tl.load(first + r + 1, mask=r < count, other=0)
        for k in range(tl.max(end - begin)):
            more = begin + k < end
            t = tl.load(order + begin + k, mask=more, other=0)
            y, _, _ = _embed(_load_rows(y0, y1, t, more, y_split, D, BLOCK_D), NORMALIZE)
            g += tl.load(coefficients + 2 * y_padded + t, mask=more, other=0)[:, None] * y
    else:
        pull = tl.load(coefficients + 2 * padded + r, mask=take, other=0)
        if SIDE == "VIEWS":
            p = tl.where(r < x_split, r + x_split, r - x_split)
            pull += tl.load(coefficients + 2 * padded + p, mask=take, other=0)
        else:
            p = tl.load(positive + r, mask=take, other=0)
        y, _, _ = _embed(_load_rows(y0, y1, p, take, y_split, D, BLOCK_D), NORMALIZE)
        g += pull[:, None] * y

    g = tl.where(take[:, None], _embed_backward(g, u, scale, length, NORMALIZE), 0.0).to(d_x0.dtype.element_ty)
    tl.store(d_x0 + r[:, None] * D + d, g, mask=inside & (r < x_split)[:, None])
    tl.store(d_x1 + (r - x_split)[:, None] * D + d, g, mask=inside & (r >= x_split)[:, None])


# ---------------------------------------------------------------- loss and gradient together


@triton.jit(do_not_specialize=["q_padded", "k_padded", "tiles", "splits"])
def _detached(
    q,
    q_table,
    k,
    k_table,
    state,
    out,
    scale,
    q_padded,
    k_padded,
    tiles,
    splits,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BOUNDED: tl.constexpr,
):
    """out (splits, q_padded, DIM) = sum_j 2^(cs_ij - top_i) k_j, and `state` (2, splits, q_padded): top, and the sums.

    The largest term is about 2^14, so that float16 holds terms 2^-28 of it. BOUNDED takes that from the bound of s,
    else it is the running maximum's.
    """
    split = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0).to(tl.int64) * BLOCK_M
    m, n, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, DIM)
    rows = tl.load(q + i * DIM + m[:, None] * DIM + d[None, :])
    tile_i = _tile(q_table, q_padded, i, BLOCK_M)
    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    if BOUNDED:
        top = scale - _LIFT + tl.zeros((BLOCK_M,), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    result = tl.zeros((BLOCK_M, DIM), tl.float32)
    for tile in range(split * tiles // splits, (split + 1) * tiles // splits):
        j = tile * BLOCK_N
        keys = tl.load(k + j * DIM + n[:, None] * DIM + d[None, :])
        s = tl.dot(rows, tl.trans(keys)) * scale
        tile_j = _tile(k_table, k_padded, j, BLOCK_N)
        s = _only_negatives(s, tile_i, q_table, q_padded, i + m, tile_j, k_table, k_padded, j + n)
        if not BOUNDED:
            higher = tl.maximum(top, tl.max(s, 1) - 14)
            shrink = tl.exp2(top - tl.where(higher == -float("inf"), 0.0, higher))
            total *= shrink
            result *= shrink[:, None]
            top = higher
        p = tl.exp2(s - tl.where(top == -float("inf"), 0.0, top)[:, None])
        total += tl.sum(p, 1)
        result = tl.dot(p.to(tl.float16), keys, result)
    at = state + split * q_padded + i + m
    tl.store(at, top)
    tl.store(at + splits * q_padded, total)
    tl.store(out + (split * q_padded + i) * DIM + m[:, None] * DIM + d[None, :], result)


@triton.jit(do_not_specialize=["count", "keys", "padded", "splits"])
def _detached_finish(
    query,
    key,
    positive,
    table,
    state,
    accumulated,
    loss,
    gradient,
    inverse_high,
    inverse_low,
    count,
    keys,
    padded,
    splits,
    D: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    """loss_t, and its gradient in query t: (1 - e^-loss_t) (mean of the negatives - positive) / temperature."""
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)[None, :]
    take = tl.load(table + padded + r, mask=r < count, other=0) != 0
    positives, s = _positives(
        query, query, count, key, key, keys, positive, r, take, D, BLOCK_D, VIEWS=False, NORMALIZE=NORMALIZE
    )
    inverse = _double(inverse_high, inverse_low)
    log2_sum = _log2_sums(state, r, take, splits, padded, 0.0, SUMMED=False)
    value = _softplus(log2_sum * _LN2 - s * inverse)
    tl.store(loss + r, tl.where(take, value, 0.0).to(tl.float32), mask=r < count)

    mean = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for split in range(splits):
        part = tl.load(state + split * padded + r, mask=take, other=0).to(tl.float64)
        share = tl.where(log2_sum == -float("inf"), 0.0, tl.exp2(part - log2_sum)).to(tl.float32)
        at = accumulated + (split * padded + r)[:, None] * DIM + d
        mean += share[:, None] * tl.load(at, mask=take[:, None] & (d < D), other=0)
    u, scale, length = _embed(_load_rows(query, query, r, take, count, D, BLOCK_D), NORMALIZE)
    g = (-_expm1(-value) * inverse).to(tl.float32)[:, None] * (mean - positives)
    g = tl.where(take[:, None], _embed_backward(g, u, scale, length, NORMALIZE), 0.0)
    tl.store(gradient + r[:, None] * D + d, g, mask=(r < count)[:, None] & (d < D))


# ---------------------------------------------------------------- launches


def _inverse(temperature: float) -> tuple[float, float]:
    """1 / temperature, as `_double` takes it."""
    high = torch.tensor(1 / temperature, dtype=torch.float32).item()
    return high, 1 / temperature - high


def _padded(table: Tensor) -> int:
    """How many rows a table is of."""
    return len(table) * SPAN // (2 * SPAN + 3)


def _by_row(rows: int, columns: int) -> tuple[tuple[int], dict[str, int]]:
    """The grid of a kernel that goes through `rows` rows, and its constants."""
    config = row_config(columns)
    block = triton.next_power_of_2(columns)
    options = {"D": columns, "BLOCK_D": block, **config.tiles, "num_warps": config.num_warps}
    return (triton.cdiv(rows, config.tiles["ROWS"]),), options


def _options(config: Config) -> dict[str, int]:
    return {**config.tiles, "num_warps": config.num_warps, "num_stages": config.num_stages}


class _Kernels:
    """Documented in `ser_fast.ops.tiled.Kernels`."""

    def row_block(self, device: torch.device) -> int:
        return similarity_config(capability_of(device)).tiles["BLOCK_M"]

    def largest_row_block(self) -> int:
        return max(similarity_config(capability).tiles["BLOCK_M"] for capability in CAPABILITIES)

    def running_blocks(self, device: torch.device) -> tuple[int, int]:
        tiles = running_config(capability_of(device)).tiles
        return tiles["BLOCK_M"], tiles["BLOCK_N"]

    def owner_blocks(self, device: torch.device, columns: int) -> tuple[int, int]:
        tiles = owner_config(capability_of(device), columns).tiles
        return tiles["BLOCK_M"], tiles["BLOCK_N"]

    def largest_owned(self, device: torch.device) -> int:
        return LARGEST_OWNED[capability_of(device)]

    def largest_detached(self, device: torch.device) -> int:
        return 512

    def prepare(
        self, x0: Tensor, x1: Tensor, image: Tensor, valid: Tensor, u: Tensor, table: Tensor, normalize: bool
    ) -> None:
        padded, columns = u.shape
        block = triton.next_power_of_2(columns)
        config = prepare_config(block)
        _prepare[(padded // (config.tiles["SPANS"] * SPAN),)](
            x0, x1, image, valid, u, table, len(x0), len(x0) + len(x1), padded, D=x0.shape[1], DIM=columns,
            BLOCK_D=block, NORMALIZE=normalize, **config.tiles, num_warps=config.num_warps,
        )  # fmt: skip

    def symmetric_sums(self, u: Tensor, table: Tensor, sums: Tensor, kept: Tensor, scale: float, count: int) -> None:
        padded, columns = u.shape
        config = similarity_config(capability_of(u.device))
        block, group = config.tiles["BLOCK_M"], config.tiles["GROUP"]
        squares = triton.cdiv(padded, block * group)
        programs = squares * (squares + 1) // 2 * group * group * (block // config.tiles["BLOCK_N"])
        _symmetric_sums[(programs,)](
            u, table, sums, kept, scale, count, padded, DIM=columns, KEEP=kept.numel() > 0, **_options(config)
        )

    def row_sums(
        self, q: Tensor, q_table: Tensor, k: Tensor, k_table: Tensor, state: Tensor, scale: float, keys: int
    ) -> None:
        config = running_config(capability_of(q.device))
        tiles, splits, (padded, columns) = triton.cdiv(keys, config.tiles["BLOCK_N"]), state.shape[1], q.shape
        no_panel, no_width = state, 0
        _row_sums[(padded // config.tiles["BLOCK_M"], splits)](
            q, q_table, k, k_table, no_panel, state, scale, padded, len(k), 0, 0, tiles, splits, no_width,
            DIM=columns, LIBRARY=False, **_options(config),
        )  # fmt: skip

    def panel_row_sums(
        self, panel: Tensor, q_table: Tensor, k_table: Tensor, state: Tensor, first_row: int, first_key: int
    ) -> None:
        config = running_config(capability_of(panel.device))
        height, width = panel.shape
        tiles, splits, q_padded = width // config.tiles["BLOCK_N"], 1, state.shape[2]
        no_q, no_k, no_scale, no_columns = panel, panel, 1.0, 0
        _row_sums[(height // config.tiles["BLOCK_M"], splits)](
            no_q, q_table, no_k, k_table, panel, state, no_scale, q_padded, _padded(k_table), first_row, first_key,
            tiles, splits, width, DIM=no_columns, LIBRARY=True, **_options(config),
        )  # fmt: skip

    def losses(
        self, q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor, positive: Tensor, table: Tensor, state: Tensor,
        loss: Tensor, temperature: float, views: bool, summed: bool, normalize: bool,
    ) -> None:  # fmt: skip
        grid, constants = _by_row(len(loss), q0.shape[1])
        _losses[grid](
            q0, q1, k0, k1, positive, table, state, loss, base2_scale(temperature), *_inverse(temperature),
            len(q0), len(k0), len(loss), state.shape[-1], 1 if summed else state.shape[1], **constants,
            VIEWS=views, SUMMED=summed, NORMALIZE=normalize,
        )  # fmt: skip

    def coefficients(
        self, q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor, positive: Tensor, table: Tensor, weight: Tensor,
        largest: Tensor, loss: Tensor, out: Tensor, temperature: float, views: bool, bounded: bool, library: bool,
        normalize: bool,
    ) -> None:  # fmt: skip
        padded = out.shape[1]
        grid, constants = _by_row(padded, q0.shape[1])
        _coefficients[grid](
            q0, q1, k0, k1, positive, table, weight, largest, loss, out, base2_scale(temperature),
            *_inverse(temperature), len(q0), len(k0), len(loss), padded, **constants, VIEWS=views, BOUNDED=bounded,
            LIBRARY=library, NORMALIZE=normalize,
        )  # fmt: skip

    def owner(
        self, q: Tensor, q_table: Tensor, q_coefficients: Tensor, k: Tensor, k_table: Tensor,
        k_coefficients: Tensor, out: Tensor, scale: float, keys: int, bounded: bool, by_row: bool, by_key: bool,
    ) -> None:  # fmt: skip
        splits, padded, columns = out.shape
        config = owner_config(capability_of(q.device), columns)
        _owner[(padded // config.tiles["BLOCK_M"], splits)](
            q, q_table, q_coefficients, k, k_table, k_coefficients, out, scale, padded, len(k),
            triton.cdiv(keys, config.tiles["BLOCK_N"]), splits, DIM=columns, BOUNDED=bounded, BY_ROW=by_row,
            BY_KEY=by_key, **_options(config),
        )  # fmt: skip

    def panel(
        self, q: Tensor, q_table: Tensor, q_coefficients: Tensor, k: Tensor, k_table: Tensor,
        k_coefficients: Tensor, kept: Tensor, panel: Tensor, scale: float, first_row: int, first_key: int,
        source: Source, bounded: bool, by_row: bool, by_key: bool,
    ) -> None:  # fmt: skip
        config = similarity_config(capability_of(q.device))
        row_tiles, key_tiles = panel.shape[0] // config.tiles["BLOCK_M"], panel.shape[1] // config.tiles["BLOCK_N"]
        _panel[(row_tiles * key_tiles,)](
            q, q_table, q_coefficients, k, k_table, k_coefficients, kept, panel, scale, len(q), len(k), first_row,
            first_key, row_tiles, key_tiles, DIM=q.shape[1], SOURCE=source.name, BOUNDED=bounded, BY_ROW=by_row,
            BY_KEY=by_key, **_options(config),
        )  # fmt: skip

    def finish(
        self, x0: Tensor, x1: Tensor, y0: Tensor, y1: Tensor, table: Tensor, coefficients: Tensor,
        positive: Tensor, order: Tensor, first: Tensor, accumulated: Tensor, largest: Tensor, d_x0: Tensor,
        d_x1: Tensor, temperature: float, side: Side, library: bool, normalize: bool,
    ) -> None:  # fmt: skip
        splits, padded, columns = accumulated.shape
        count = len(x0) + len(x1)
        grid, constants = _by_row(count, x0.shape[1])
        _finish[grid](
            x0, x1, y0, y1, table, coefficients, positive, order, first, accumulated, largest, d_x0, d_x1,
            *_inverse(temperature), len(x0), len(y0), count, padded, coefficients.shape[1], splits, DIM=columns,
            **constants, SIDE=side.name, LIBRARY=library, NORMALIZE=normalize,
        )  # fmt: skip

    def detached(
        self, q: Tensor, q_table: Tensor, k: Tensor, k_table: Tensor, state: Tensor, out: Tensor, scale: float,
        keys: int, bounded: bool,
    ) -> None:  # fmt: skip
        splits, padded, columns = out.shape
        config = owner_config(capability_of(q.device), columns)
        _detached[(padded // config.tiles["BLOCK_M"], splits)](
            q, q_table, k, k_table, state, out, scale, padded, len(k), triton.cdiv(keys, config.tiles["BLOCK_N"]),
            splits, DIM=columns, BOUNDED=bounded, **_options(config),
        )  # fmt: skip

    def detached_finish(
        self, query: Tensor, key: Tensor, positive: Tensor, table: Tensor, state: Tensor, accumulated: Tensor,
        loss: Tensor, gradient: Tensor, temperature: float, normalize: bool,
    ) -> None:  # fmt: skip
        splits, padded, columns = accumulated.shape
        grid, constants = _by_row(len(query), query.shape[1])
        _detached_finish[grid](
            query, key, positive, table, state, accumulated, loss, gradient, *_inverse(temperature), len(query),
            len(key), padded, splits, DIM=columns, **constants, NORMALIZE=normalize,
        )  # fmt: skip


_operations = TiledLosses(_Kernels())
kept_bytes = _operations.kept_bytes
nt_xent = _operations.nt_xent
nt_xent_backward = _operations.nt_xent_backward
info_nce = _operations.info_nce
info_nce_backward = _operations.info_nce_backward
info_nce_detached = _operations.info_nce_detached


# ---------------------------------------------------------------- builds

_POINTERS = {
    **dict.fromkeys(("x0", "x1", "y0", "y1", "q0", "q1", "k0", "k1", "query", "key", "d_x0", "d_x1"), "*bf16"),
    **dict.fromkeys(("u", "q", "k", "kept", "panel"), "*fp16"),
    **dict.fromkeys(("image", "table", "q_table", "k_table", "positive", "order", "first", "sums"), "*i64"),
    **dict.fromkeys(("state", "loss", "weight", "largest", "out", "accumulated", "gradient"), "*fp32"),
    **dict.fromkeys(("coefficients", "q_coefficients", "k_coefficients"), "*fp32"),
    "valid": "*i1",
}


def shipped(capability: int) -> list[Build]:
    """The builds for bfloat16 rows at the column counts in use; float16 rows differ in a conversion."""

    def build(name: str, kernel: Any, config: Config, columns: int, **constants: Any) -> Build:
        constants = {"D": columns, "DIM": columns, "BLOCK_D": columns, "NORMALIZE": True, **constants, **config.tiles}
        constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
        floats = ("scale", "inverse_high", "inverse_low")
        arguments = {
            argument: _POINTERS.get(argument, "fp32" if argument in floats else "i32")
            for argument in kernel.arg_names
            if argument not in constants
        }
        product = "BLOCK_M" in constants and constants.get("SOURCE", "PRODUCT") == "PRODUCT"
        return Build(f"{name} {columns}", kernel, arguments, constants, config, product=product)

    tile, summed = similarity_config(capability), {"VIEWS": True, "SUMMED": True}
    both = {"BOUNDED": True, "BY_ROW": True, "BY_KEY": True}
    running = running_config(capability)
    builds = []
    for columns in (64, 128, 256, 512, 1024):
        builds.append(build("nt_xent sums", _symmetric_sums, tile, columns, KEEP=False))
        builds.append(build("info_nce sums", _row_sums, running, columns, LIBRARY=False))
        if columns > LARGEST_OWNED[capability]:
            builds.append(build("nt_xent panel", _panel, tile, columns, SOURCE="PRODUCT", **both))
        if columns <= 512:
            owner = owner_config(capability, columns)
            builds.append(build("nt_xent owner", _owner, owner, columns, **both))
            builds.append(build("info_nce detached", _detached, owner, columns, BOUNDED=True))
    builds.append(build("nt_xent sums, kept", _symmetric_sums, tile, 512, KEEP=True))
    builds.append(build("nt_xent panel, kept", _panel, tile, 512, SOURCE="KEPT", **both))
    row = row_config(512)
    builds.append(build("nt_xent prepare", _prepare, prepare_config(512), 512))
    builds.append(build("nt_xent losses", _losses, row, 512, **summed))
    builds.append(build("nt_xent coefficients", _coefficients, row, 512, VIEWS=True, BOUNDED=True, LIBRARY=False))
    builds.append(build("nt_xent finish", _finish, row, 512, SIDE="VIEWS", LIBRARY=False))
    builds.append(build("info_nce detached finish", _detached_finish, row, 512))
    return builds
