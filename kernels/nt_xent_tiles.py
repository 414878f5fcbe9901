"""The Triton kernels of nt_xent and info_nce that go through tiles of the similarity matrix.

They have the names of the methods of `ser_fast.ops.gpu_kernels.Kernels`, which say what each does. A table is the
`Table.packed` of that module.
"""

import triton
import triton.language as tl

from ser_fast.ops.gpu_kernels import KEPT_EXPONENT, SPAN

_SPAN = tl.constexpr(SPAN)
_KEPT_EXPONENT = tl.constexpr(KEPT_EXPONENT)


# ---------------------------------------------------------------- masks


@triton.jit
def _images_of(table, padded, start, BLOCK: tl.constexpr):
    """The lowest and the highest image of the rows [start, start + BLOCK), and whether all are valid (1 or 0)."""
    at = table + 2 * padded + start // _SPAN + tl.arange(0, BLOCK // _SPAN)
    spans = padded // _SPAN
    return tl.min(tl.load(at)), tl.max(tl.load(at + spans)), tl.min(tl.load(at + 2 * spans))


@triton.jit
def _of_one_image(a, b):
    """Whether all rows of two tiles, as `_images_of` describes them, are of one image."""
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
    u,  # (padded, DIM) float16
    table,  # of u
    sums,  # (4, padded) int64, added to
    kept,  # (K,) float16, written with KEEP
    scale,  # c
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
        tile_i, tile_j = _images_of(table, padded, i, BLOCK_M), _images_of(table, padded, j, BLOCK_N)
        s = _only_negatives(s, tile_i, table, padded, i + m, tile_j, table, padded, j + n)
        if j + BLOCK_N > i:
            s = tl.where((i + m)[:, None] > (j + n)[None, :], s, -float("inf"))
        p = tl.exp2(s * scale - scale)
        if KEEP:
            at = kept + _kept_from(i, j, BLOCK_M, BLOCK_N)
            tl.store(at + m[:, None] * BLOCK_N + n[None, :], (p * 2.0**_KEPT_EXPONENT).to(tl.float16))
        # A gather spreads the sums over all threads: as they come, each thread has all those of its part of the tile.
        _add(sums, i + m, tl.gather(tl.sum(p, 1), m, 0), padded)
        _add(sums, j + n, tl.gather(tl.sum(p, 0), n, 0), padded)


@triton.jit(do_not_specialize=["q_padded", "k_padded", "first_row", "first_key", "tiles", "splits", "width"])
def _row_sums(
    q,  # (q_padded, DIM) float16
    q_table,  # of q
    k,  # (k_padded, DIM) float16
    k_table,  # of k
    panel,  # (rows, width), read with LIBRARY in place of q and k
    state,  # (2, splits, q_padded), read and written
    scale,  # c
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
    """Takes the negatives in `tiles` tiles of keys into `state`: the row max, and the sums of 2^(cs - row_max).

    With LIBRARY the similarities are read from `panel` (rows, width), whose corner is (first_row, first_key).
    """
    split = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0).to(tl.int64) * BLOCK_M
    i = first_row + start
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    at = state + split * q_padded + i + m
    row_max, total = tl.load(at), tl.load(at + splits * q_padded)
    tile_i = _images_of(q_table, q_padded, i, BLOCK_M)
    for tile in range(split * tiles // splits, (split + 1) * tiles // splits):
        j = first_key + tile * BLOCK_N
        if LIBRARY:
            s = tl.load(panel + (start + m)[:, None] * width + tile * BLOCK_N + n[None, :])
        else:
            s = _product(q, i, k, j, DIM, BLOCK_M, BLOCK_N, BLOCK_K) * scale
        tile_j = _images_of(k_table, k_padded, j, BLOCK_N)
        s = _only_negatives(s, tile_i, q_table, q_padded, i + m, tile_j, k_table, k_padded, j + n)
        higher = tl.maximum(row_max, tl.max(s, 1))
        shift = tl.where(higher == -float("inf"), 0.0, higher)  # no negative so far
        total = total * tl.exp2(row_max - shift) + tl.sum(tl.exp2(s - shift[:, None]), 1)
        row_max = higher
    tl.store(at, row_max)
    tl.store(at + splits * q_padded, total)


# ---------------------------------------------------------------- gradients


@triton.jit
def _weights_of(weights, padded, at, NEEDED: tl.constexpr):
    """a and its shift of the rows `at`, or nothing."""
    if NEEDED:
        return tl.load(weights + at), tl.load(weights + padded + at)
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
def _stationary_gradient(
    q,  # (q_padded, DIM) float16
    q_table,  # of q
    q_weights,  # (3, q_padded), read with BY_ROW
    k,  # (k_padded, DIM) float16
    k_table,  # of k
    k_weights,  # (3, k_padded), read with BY_KEY
    out,  # (splits, q_padded, DIM) float32, written
    scale,  # c
    q_padded,
    k_padded,
    tiles,  # of keys
    splits,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BOUNDED: tl.constexpr,
    BY_ROW: tl.constexpr,
    BY_KEY: tl.constexpr,
):
    """out (splits, q_padded, DIM) float32 = G k, a row block a program, over one of `splits` shares of the keys."""
    split = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0).to(tl.int64) * BLOCK_M
    m, n, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, DIM)
    rows = tl.load(q + i * DIM + m[:, None] * DIM + d[None, :])
    a_i, shift_i = _weights_of(q_weights, q_padded, i + m, BY_ROW)
    tile_i = _images_of(q_table, q_padded, i, BLOCK_M)
    result = tl.zeros((BLOCK_M, DIM), tl.float32)
    for tile in range(split * tiles // splits, (split + 1) * tiles // splits):
        j = tile * BLOCK_N
        keys = tl.load(k + j * DIM + n[:, None] * DIM + d[None, :])
        s = tl.dot(rows, tl.trans(keys))
        tile_j = _images_of(k_table, k_padded, j, BLOCK_N)
        s = _only_negatives(s, tile_i, q_table, q_padded, i + m, tile_j, k_table, k_padded, j + n)
        a_j, shift_j = _weights_of(k_weights, k_padded, j + n, BY_KEY)
        g = _weigh(s, scale, a_i, shift_i, a_j, shift_j, BOUNDED, BY_ROW, BY_KEY)
        result = tl.dot(g.to(tl.float16), keys, result)
    tl.store(out + (split * q_padded + i) * DIM + m[:, None] * DIM + d[None, :], result)


@triton.jit(do_not_specialize=["q_padded", "k_padded", "first_row", "first_key", "row_tiles", "key_tiles"])
def _gradient_panel(
    q,  # (q_padded, DIM) float16
    q_table,  # of q
    q_weights,  # (3, q_padded), read with BY_ROW
    k,  # (k_padded, DIM) float16
    k_table,  # of k
    k_weights,  # (3, k_padded), read with BY_KEY
    kept,  # (K,) float16, read where SOURCE says so
    panel,  # (row_tiles * BLOCK_M, key_tiles * BLOCK_N), written; read if SOURCE is LIBRARY
    scale,  # c
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
    tile_i = _images_of(q_table, q_padded, i, BLOCK_M)
    tile_j = _images_of(k_table, k_padded, j, BLOCK_N)
    if _of_one_image(tile_i, tile_j):
        tl.store(out, tl.zeros((BLOCK_M, BLOCK_N), panel.dtype.element_ty))
    else:
        if SOURCE == "KEPT" or SOURCE == "KEPT_DIAGONAL":
            if SOURCE == "KEPT":
                at = _kept_from(i, j, BLOCK_M, BLOCK_N) + m[:, None] * BLOCK_N + n[None, :]
            else:
                row, column = (i + m)[:, None], (j + n)[None, :]
                at = _kept_at(tl.maximum(row, column), tl.minimum(row, column), BLOCK_M, BLOCK_N)
            a_i, a_j = tl.load(q_weights + i + m), tl.load(k_weights + j + n)
            g = tl.load(kept + at).to(tl.float32) * 2.0**-_KEPT_EXPONENT * (a_i[:, None] + a_j[None, :])
        else:
            s = tl.load(out) if SOURCE == "LIBRARY" else _product(q, i, k, j, DIM, BLOCK_M, BLOCK_N, BLOCK_K)
            s = _only_negatives(s, tile_i, q_table, q_padded, i + m, tile_j, k_table, k_padded, j + n)
            a_i, shift_i = _weights_of(q_weights, q_padded, i + m, BY_ROW)
            a_j, shift_j = _weights_of(k_weights, k_padded, j + n, BY_KEY)
            g = _weigh(s, scale, a_i, shift_i, a_j, shift_j, BOUNDED, BY_ROW, BY_KEY)
        tl.store(out, g.to(panel.dtype.element_ty))


@triton.jit(do_not_specialize=["q_padded", "k_padded", "tiles", "splits"])
def _detached_sums(
    q,  # (q_padded, DIM) float16
    q_table,  # of q
    k,  # (k_padded, DIM) float16
    k_table,  # of k
    state,  # (2, splits, q_padded) float32, written
    out,  # (splits, q_padded, DIM) float32, written
    scale,  # c
    q_padded,
    k_padded,
    tiles,  # of keys
    splits,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BOUNDED: tl.constexpr,
):
    """out = sum_j 2^(cs_ij - row_max_i) k_j, and `state`: the row max, and the sums.

    The largest term is about 2^14, so that float16 holds terms 2^-28 of it. BOUNDED takes that from the bound of s,
    else it is the running maximum's.
    """
    split = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0).to(tl.int64) * BLOCK_M
    m, n, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, DIM)
    rows = tl.load(q + i * DIM + m[:, None] * DIM + d[None, :])
    tile_i = _images_of(q_table, q_padded, i, BLOCK_M)
    row_max = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    if BOUNDED:
        row_max = scale - _KEPT_EXPONENT + tl.zeros((BLOCK_M,), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    result = tl.zeros((BLOCK_M, DIM), tl.float32)
    for tile in range(split * tiles // splits, (split + 1) * tiles // splits):
        j = tile * BLOCK_N
        keys = tl.load(k + j * DIM + n[:, None] * DIM + d[None, :])
        s = tl.dot(rows, tl.trans(keys)) * scale
        tile_j = _images_of(k_table, k_padded, j, BLOCK_N)
        s = _only_negatives(s, tile_i, q_table, q_padded, i + m, tile_j, k_table, k_padded, j + n)
        if not BOUNDED:
            higher = tl.maximum(row_max, tl.max(s, 1) - 14)
            shrink = tl.exp2(row_max - tl.where(higher == -float("inf"), 0.0, higher))
            total *= shrink
            result *= shrink[:, None]
            row_max = higher
        p = tl.exp2(s - tl.where(row_max == -float("inf"), 0.0, row_max)[:, None])
        total += tl.sum(p, 1)
        result = tl.dot(p.to(tl.float16), keys, result)
    at = state + split * q_padded + i + m
    tl.store(at, row_max)
    tl.store(at + splits * q_padded, total)
    tl.store(out + (split * q_padded + i) * DIM + m[:, None] * DIM + d[None, :], result)
