"""The Triton kernels of nt_xent and info_nce that go through rows: operands, losses, weights and finished gradients.

They have the names of the methods of `ser_fast.ops.gpu_kernels.Kernels`, which say what each does. A table is the
`Table.packed` of that module.
"""

import math

import triton
import triton.language as tl

from ser_fast.ops.gpu_kernels import LARGEST_WEIGHT, SPAN
from ser_fast.ops.reference import EPS

_EPS = tl.constexpr(EPS)
_SPAN = tl.constexpr(SPAN)
_LN2 = tl.constexpr(math.log(2))
_LOG2E = tl.constexpr(1 / math.log(2))
_LARGEST_WEIGHT = tl.constexpr(LARGEST_WEIGHT)


# ---------------------------------------------------------------- rows


@triton.jit
def _load_rows(x0, x1, r, valid_row, split, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """(R, BLOCK_D) rows r of [x0; x1] in at least float32: NaN for Inf, 0 where not valid and beyond D."""
    d = tl.arange(0, BLOCK_D)[None, :]
    first, second = valid_row & (r < split), valid_row & (r >= split)
    x = tl.load(x0 + r[:, None] * D + d, mask=first[:, None] & (d < D), other=0)
    y = tl.load(x1 + (r - split)[:, None] * D + d, mask=second[:, None] & (d < D), other=0)
    if x0.dtype.element_ty != tl.float64:
        x, y = x.to(tl.float32), y.to(tl.float32)
    x += y
    return tl.where(tl.abs(x) < float("inf"), x, float("nan"))


@triton.jit
def _normalized(x, NORMALIZE: tl.constexpr):
    """x / max(|x|, EPS), and |x| as scale and length (R,), factors that are safe to square."""
    scale = tl.maximum(tl.max(tl.abs(x), 1), tl.full((1,), _EPS, x.dtype))
    y = x / scale[:, None]
    length = tl.sqrt(tl.sum(y * y, 1))
    if NORMALIZE:
        x = y / tl.where(length < 1, 1.0, length)[:, None]
    return x, scale, length


@triton.jit(do_not_specialize=["split", "count", "padded"])
def _prepare(
    x0,  # (split, D)
    x1,  # (count - split, D)
    image,  # (split,) int64, of x0 and of x1
    valid,  # (split,) bool, of x0 and of x1
    u,  # (padded, DIM), written
    table,  # (2 padded + 3 padded / 32,) int64, written
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
    valid_row = tl.load(valid + t, mask=r < count, other=0) != 0
    images = tl.load(image + t, mask=r < count, other=0)
    tl.store(table + r, images)
    tl.store(table + padded + r, valid_row.to(tl.int64))
    spans = padded // _SPAN
    at = table + 2 * padded + program * SPANS + tl.arange(0, SPANS)
    images = tl.reshape(images, (SPANS, _SPAN))
    tl.store(at, tl.min(images, 1))
    tl.store(at + spans, tl.max(images, 1))
    tl.store(at + 2 * spans, tl.min(tl.reshape(valid_row.to(tl.int64), (SPANS, _SPAN)), 1))
    x, _, _ = _normalized(_load_rows(x0, x1, r, valid_row, split, D, BLOCK_D), NORMALIZE)
    d = tl.arange(0, BLOCK_D)[None, :]
    tl.store(u + r[:, None] * DIM + d, x.to(u.dtype.element_ty), mask=d < DIM)


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
def _inside(r, count):
    """Rows r of `count`: indices are data, which nothing looks at before they are used."""
    return tl.minimum(tl.maximum(r, 0), count - 1)


@triton.jit
def _positives(
    q0, q1, q_split, k0, k1, k_split, positive, r, valid_row, D: tl.constexpr, BLOCK_D: tl.constexpr,
    VIEWS: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """(R, BLOCK_D) the unit rows of the positives, and (R,) <u, v> of the rows r with them, in float64."""
    u, _, _ = _normalized(_load_rows(q0, q1, r, valid_row, q_split, D, BLOCK_D), NORMALIZE)
    if VIEWS:
        p = tl.where(r < q_split, r + q_split, r - q_split)
    else:
        p = _inside(tl.load(positive + r, mask=valid_row, other=0), k_split)
    v, _, _ = _normalized(_load_rows(k0, k1, p, valid_row, k_split, D, BLOCK_D), NORMALIZE)
    return v, tl.sum(u.to(tl.float64) * v.to(tl.float64), 1)


# ---------------------------------------------------------------- losses


@triton.jit
def _log2_sums(state, r, valid_row, splits, padded, scale, SUMMED: tl.constexpr):
    """(R,) float64 log2 of the sums over the negatives, from the integers of `_add` or from maxima and sums."""
    if SUMMED:
        total = tl.load(state + r, mask=valid_row, other=0).to(tl.float64) * 2.0**-42
        total += tl.load(state + padded + r, mask=valid_row, other=0).to(tl.float64) * 2.0**-70
        total += tl.load(state + 2 * padded + r, mask=valid_row, other=0).to(tl.float64) * 2.0**-98
        broken = tl.load(state + 3 * padded + r, mask=valid_row, other=0) != 0
        total = tl.where(broken, float("nan"), total)
        row_max = scale + tl.zeros_like(total)
    else:
        row_max = tl.full(r.shape, -float("inf"), tl.float64)
        total = tl.zeros_like(row_max)
        for split in range(splits):
            at = state + split * padded + r
            part = tl.load(at, mask=valid_row, other=-float("inf")).to(tl.float64)
            sums = tl.load(at + splits * padded, mask=valid_row, other=0).to(tl.float64)
            higher = tl.maximum(row_max, part)
            shift = tl.where(higher == -float("inf"), 0.0, higher)
            total = total * tl.exp2(row_max - shift) + sums * tl.exp2(part - shift)
            row_max = higher
    some = total != 0
    return tl.where(some, tl.log(tl.where(some, total, 1.0)) * _LOG2E + row_max, -float("inf"))


@triton.jit(do_not_specialize=["q_split", "k_split", "count", "padded", "splits"])
def _losses(
    q0,  # (q_split, D)
    q1,  # (count - q_split, D)
    k0,  # (k_split, D)
    k1,  # (keys - k_split, D)
    positive,  # (count,) int64, rows of the keys; not read with VIEWS
    table,  # of the queries
    state,  # (4, padded) int64 with SUMMED, else (2, splits, padded)
    loss,  # (count,), written
    scale,  # c
    inverse_high,  # 1 / temperature, in two parts
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
    valid_row = tl.load(table + padded + r, mask=r < count, other=0) != 0
    _, s = _positives(q0, q1, q_split, k0, k1, k_split, positive, r, valid_row, D, BLOCK_D, VIEWS, NORMALIZE)
    negatives = _log2_sums(state, r, valid_row, splits, padded, scale, SUMMED) * _LN2
    result = _softplus(negatives - s * _double(inverse_high, inverse_low))
    tl.store(loss + r, tl.where(valid_row, result, 0.0).to(loss.dtype.element_ty), mask=r < count)


# ---------------------------------------------------------------- gradients


@triton.jit(do_not_specialize=["q_split", "k_split", "count", "padded"])
def _gradient_weights(
    q0,  # (q_split, D)
    q1,  # (count - q_split, D)
    k0,  # (k_split, D)
    k1,  # (keys - k_split, D)
    positive,  # (count,) int64, rows of the keys; not read with VIEWS
    table,  # of the queries
    weight,  # (count,), d / d loss
    largest,  # (1,), the most that a row of G sums to
    loss,  # (count,)
    out,  # (3, padded), written
    scale,  # c
    inverse_high,  # 1 / temperature, in two parts
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
    valid_row = tl.load(table + padded + r, mask=r < padded, other=0) != 0
    _, s = _positives(q0, q1, q_split, k0, k1, k_split, positive, r, valid_row, D, BLOCK_D, VIEWS, NORMALIZE)
    inverse = _double(inverse_high, inverse_low)
    w = tl.load(weight + r, mask=valid_row, other=0).to(tl.float64)
    value = tl.load(loss + r, mask=valid_row, other=0).to(tl.float64)
    of_positive = w * _expm1(-value) * inverse
    if not LIBRARY:
        most = tl.load(largest).to(tl.float64)
        w = w / tl.where(most == 0, 1.0, most) * _LARGEST_WEIGHT
    exact = (s * inverse + value) * _LOG2E
    kind: tl.constexpr = out.dtype.element_ty
    shift = scale + tl.zeros_like(exact) if BOUNDED else exact.to(kind).to(tl.float64)
    a = w * tl.exp2(shift - exact)  # what rounding took from the shift goes into the factor
    inside = r < padded
    tl.store(out + r, tl.where(valid_row, a, 0.0).to(kind), mask=inside)
    tl.store(out + padded + r, tl.where(valid_row, shift, 0.0).to(kind), mask=inside)
    tl.store(out + 2 * padded + r, tl.where(valid_row, of_positive, 0.0).to(kind), mask=inside)


@triton.jit
def _normalized_backward(g, u, scale, length, NORMALIZE: tl.constexpr):
    """The gradient of x from that of its unit row u, (R, BLOCK_D): not what points along u, and 0 if |x| < EPS."""
    if NORMALIZE:
        radial = tl.sum(u * g, 1)
        g = (g - u * radial[:, None]) / scale[:, None] / tl.where(length < 1, 1.0, length)[:, None]
        g = tl.where(length[:, None] < 1, 0.0, g)
    return g


@triton.jit(do_not_specialize=["x_split", "y_split", "count", "padded", "y_padded", "splits"])
def _finish_gradient(
    x0,  # (x_split, D)
    x1,  # (count - x_split, D)
    y0,  # (y_split, D), rows that hold the positives
    y1,  # (others - y_split, D)
    table,  # of x
    weights,  # (3, y_padded), of the queries
    positive,  # (count,) int64, rows of y; read if SIDE is QUERY
    order,  # (queries,) int64, read if SIDE is KEY
    first,  # (count + 1,) int64, read if SIDE is KEY
    accumulated,  # (splits, padded, DIM)
    largest,  # (1,), the unit of accumulated; not read with LIBRARY
    d_x0,  # (x_split, D), written
    d_x1,  # (count - x_split, D), written
    inverse_high,  # 1 / temperature, in two parts
    inverse_low,
    x_split,
    y_split,
    count,
    padded,
    y_padded,  # of the queries
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
    valid_row = tl.load(table + padded + r, mask=r < count, other=0) != 0
    x = _load_rows(x0, x1, r, valid_row, x_split, D, BLOCK_D)
    u, scale, length = _normalized(x, NORMALIZE)

    g = tl.zeros_like(x)
    for split in range(splits):
        g += tl.load(accumulated + (split * padded + r)[:, None] * DIM + d, mask=inside, other=0)
    unit = _double(inverse_high, inverse_low)
    if not LIBRARY:
        unit *= tl.load(largest).to(tl.float64) / _LARGEST_WEIGHT
    g *= unit.to(g.dtype)

    if SIDE == "KEY":
        begin = tl.maximum(tl.load(first + r, mask=r < count, other=0), 0)
        end = tl.minimum(tl.load(first + r + 1, mask=r < count, other=0), y_split)
        for k in range(tl.max(end - begin)):
            more = begin + k < end
            t = _inside(tl.load(order + begin + k, mask=more, other=0), y_split)
            y, _, _ = _normalized(_load_rows(y0, y1, t, more, y_split, D, BLOCK_D), NORMALIZE)
            g += tl.load(weights + 2 * y_padded + t, mask=more, other=0)[:, None] * y
    else:
        of_positive = tl.load(weights + 2 * padded + r, mask=valid_row, other=0)
        if SIDE == "VIEWS":
            p = tl.where(r < x_split, r + x_split, r - x_split)
            of_positive += tl.load(weights + 2 * padded + p, mask=valid_row, other=0)
        else:
            p = _inside(tl.load(positive + r, mask=valid_row, other=0), y_split)
        y, _, _ = _normalized(_load_rows(y0, y1, p, valid_row, y_split, D, BLOCK_D), NORMALIZE)
        g += of_positive[:, None] * y

    g = tl.where(valid_row[:, None], _normalized_backward(g, u, scale, length, NORMALIZE), 0.0).to(
        d_x0.dtype.element_ty
    )
    tl.store(d_x0 + r[:, None] * D + d, g, mask=inside & (r < x_split)[:, None])
    tl.store(d_x1 + (r - x_split)[:, None] * D + d, g, mask=inside & (r >= x_split)[:, None])


@triton.jit(do_not_specialize=["count", "keys", "padded", "splits"])
def _finish_detached(
    query,  # (count, D)
    key,  # (keys, D)
    positive,  # (count,) int64, rows of key
    table,  # of the queries
    state,  # (2, splits, padded) float32
    accumulated,  # (splits, padded, DIM) float32
    loss,  # (count,) float32, written
    gradient,  # (count, D) float32, written
    inverse_high,  # 1 / temperature, in two parts
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
    valid_row = tl.load(table + padded + r, mask=r < count, other=0) != 0
    positives, s = _positives(
        query, query, count, key, key, keys, positive, r, valid_row, D, BLOCK_D, VIEWS=False, NORMALIZE=NORMALIZE
    )
    inverse = _double(inverse_high, inverse_low)
    log2_sum = _log2_sums(state, r, valid_row, splits, padded, 0.0, SUMMED=False)
    value = _softplus(log2_sum * _LN2 - s * inverse)
    tl.store(loss + r, tl.where(valid_row, value, 0.0).to(tl.float32), mask=r < count)

    mean = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for split in range(splits):
        part = tl.load(state + split * padded + r, mask=valid_row, other=0).to(tl.float64)
        share = tl.where(log2_sum == -float("inf"), 0.0, tl.exp2(part - log2_sum)).to(tl.float32)
        at = accumulated + (split * padded + r)[:, None] * DIM + d
        mean += share[:, None] * tl.load(at, mask=valid_row[:, None] & (d < D), other=0)
    u, scale, length = _normalized(_load_rows(query, query, r, valid_row, count, D, BLOCK_D), NORMALIZE)
    g = (-_expm1(-value) * inverse).to(tl.float32)[:, None] * (mean - positives)
    g = tl.where(valid_row[:, None], _normalized_backward(g, u, scale, length, NORMALIZE), 0.0)
    tl.store(gradient + r[:, None] * D + d, g, mask=(r < count)[:, None] & (d < D))
