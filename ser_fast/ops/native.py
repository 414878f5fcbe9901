"""The native CPU kernels (csrc/cpu) behind the same signatures as the oracle in `ser_fast.ops.reference`.

The kernels do what is quadratic, or touches every number of a row; what has one number a row (sorting by image, the
loss from its logarithms) is plain PyTorch here.
"""

import importlib
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ser_fast.interpolation import INTERPOLATIONS, PADDINGS

importlib.import_module("ser_fast._C")  # registers the operators
_native = torch.ops.ser_fast_native

# The kernels' enumerations have the order of these tuples.
_INTERPOLATION = {name: number for number, name in enumerate(INTERPOLATIONS)}
_PADDING = {name: number for number, name in enumerate(PADDINGS)}

# ---------------------------------------------------------------- group_action


def group_action(
    x: Tensor,
    linear: Tensor,
    offset: Tensor,
    size_in: Sequence[int],
    size_out: Sequence[int],
    interpolation: str,
    padding: str,
    antialias: bool,
    *,
    transpose: bool = False,
) -> Tensor:
    """(B, H*W, C) to (B, h*w, C):  out = W_g x; with `transpose` its W_g^T x, the other way."""
    tokens = size_in if transpose else size_out
    out = x.new_empty(x.shape[0], tokens[0] * tokens[1], x.shape[2])
    _native.group_action(
        x.contiguous(),
        linear.contiguous(),
        offset.contiguous(),
        out,
        [*size_in, *size_out],
        _INTERPOLATION[interpolation],
        _PADDING[padding],
        antialias,
        transpose,
    )
    return out


# (B, h*w, C) to (B, H*W, C):  out = W_g^T x.
group_action_transpose = partial(group_action, transpose=True)


# ---------------------------------------------------------------- nt_xent and info_nce


class _Rows:
    """The rows that take part, of unit length and sorted by image, as the kernels take them.

    `second` follows `first`; it is empty for one set of rows.
    """

    def __init__(self, first: Tensor, second: Tensor, image: Tensor, valid: Tensor, normalize: bool) -> None:
        rows = valid.nonzero()[:, 0]
        self.image, order = image[rows].sort(stable=True)  # (n,)
        self.index = rows[order]  # (n,), of image
        self.place = torch.empty_like(image).index_put_((self.index,), torch.arange(len(rows)))  # (N,), where valid
        self.u = torch.empty(len(rows), first.shape[1], dtype=torch.promote_types(first.dtype, torch.float32))  # (n, D)
        self.scales = self.u.new_empty(len(rows), 2)
        _native.normalize_rows(first.contiguous(), second.contiguous(), self.index, normalize, self.u, self.scales)

    def gradient(
        self, first: Tensor, second: Tensor, d_u: Tensor, pull: Tensor, other: Tensor, partner: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The gradients of first and second, shaped like them, from that of u, d_u (n, D) + pull (n,) other[partner].

        0 where a row takes no part. `pull` may be empty.
        """
        create = torch.empty_like if len(self.u) == len(first) + len(second) else torch.zeros_like
        d_x = [create(x, memory_format=torch.contiguous_format) for x in (first, second)]
        _native.normalize_rows_backward(*d_x, self.index, d_u, self.u, self.scales, pull, other, partner)
        return d_x[0], d_x[1]


# Below, e^(2 / temperature) would leave the range of float32, and a running maximum takes the place of the bound.
_LOWEST_BOUNDED_TEMPERATURE = 0.03


def _bounded(temperature: float, normalize: bool) -> bool:
    return normalize and temperature >= _LOWEST_BOUNDED_TEMPERATURE


def _positives(query: _Rows, key: _Rows, partner: Tensor, temperature: float) -> Tensor:
    """(n,) float64, s of the rows of query with their positives, rows `partner` (n,) of key."""
    s = query.u.new_empty(len(query.u), dtype=torch.float64)
    _native.dot_rows(query.u, key.u, partner, s)
    return s.div_(temperature)


def _losses(log_negatives: Tensor, query: _Rows, key: _Rows, partner: Tensor, temperature: float) -> Tensor:
    """(n,) from log sum e^s over the negatives, (n,) float64."""
    x = log_negatives - _positives(query, key, partner, temperature)
    return torch.logaddexp(x, torch.zeros_like(x)).to(query.u.dtype)


def _pull(weight: Tensor, loss: Tensor, temperature: float) -> Tensor:
    """The gradient of s with the positive, over temperature: minus the sum of those with the negatives."""
    return (weight * torch.expm1(-loss) / temperature).to(weight.dtype)


def _spread(values: Tensor, rows: _Rows) -> Tensor:
    """(n,) of the rows that take part to (N,) of all, 0 for the others."""
    return values.new_zeros(len(rows.place)).index_put_((rows.index,), values)


def info_nce(
    query: Tensor,  # (T, D)
    key: Tensor,  # (M, D)
    image: Tensor,  # (T,) int64
    key_image: Tensor,  # (M,) int64
    valid: Tensor,  # (T,) bool
    key_valid: Tensor,  # (M,) bool
    positive: Tensor,  # (T,) int64, rows of key
    temperature: float,
    normalize: bool,
) -> Tensor:  # (T,)
    queries, keys, partner = _queries_and_keys(query, key, image, key_image, valid, key_valid, positive, normalize)
    negatives = queries.u.new_empty(len(queries.u), dtype=torch.float64)
    _native.log_negatives(
        *(queries.u, queries.image, keys.u, keys.image, negatives, _NOTHING_KEPT),
        *(temperature, _bounded(temperature, normalize)),
    )
    return _spread(_losses(negatives, queries, keys, partner, temperature), queries)


def info_nce_backward(
    weight: Tensor,  # (T,), d / d loss_t
    query: Tensor,  # (T, D)
    key: Tensor,  # (M, D)
    image: Tensor,  # (T,) int64
    key_image: Tensor,  # (M,) int64
    valid: Tensor,  # (T,) bool
    key_valid: Tensor,  # (M,) bool
    positive: Tensor,  # (T,) int64
    loss: Tensor,  # (T,), what info_nce returned
    temperature: float,
    normalize: bool,
    need_query: bool,
    need_key: bool,
) -> tuple[Tensor, Tensor]:  # (T, D) and (M, D); empty, (0,), where not needed
    queries, keys, partner = _queries_and_keys(query, key, image, key_image, valid, key_valid, positive, normalize)
    weight, loss = weight[queries.index], loss[queries.index].double()
    d_u = torch.zeros_like(queries.u) if need_query else queries.u.new_empty(0)
    d_v = torch.zeros_like(keys.u) if need_key else keys.u.new_empty(0)
    _native.negatives_gradient(
        *(queries.u, queries.image, keys.u, keys.image, weight),
        *(_positives(queries, keys, partner, temperature) + loss, _NOTHING_KEPT, d_u, d_v),
        *(temperature, _bounded(temperature, normalize)),
    )
    pull = _pull(weight, loss, temperature)
    d_query, d_key = query.new_empty(0), key.new_empty(0)
    if need_query:
        d_query, _ = queries.gradient(query, query[:0], d_u, pull, keys.u, partner)
    if need_key:
        d_v.index_add_(0, partner, pull[:, None] * queries.u)  # queries may share a key
        d_key, _ = keys.gradient(key, key[:0], d_v, pull[:0], queries.u, partner)
    return d_query, d_key


def info_nce_detached(
    query: Tensor,  # (T, D)
    key: Tensor,  # (M, D)
    image: Tensor,  # (T,) int64
    key_image: Tensor,  # (M,) int64
    valid: Tensor,  # (T,) bool
    key_valid: Tensor,  # (M,) bool
    positive: Tensor,  # (T,) int64, rows of key
    temperature: float,
    normalize: bool,
) -> tuple[Tensor, Tensor]:  # (T,) and (T, D), the gradient of loss_t in query t, in at least float32
    queries, keys, partner = _queries_and_keys(query, key, image, key_image, valid, key_valid, positive, normalize)
    negatives, mean = queries.u.new_empty(len(queries.u), dtype=torch.float64), torch.empty_like(queries.u)
    _native.log_and_mean_negatives(
        *(queries.u, queries.image, keys.u, keys.image, negatives, mean),
        *(temperature, _bounded(temperature, normalize)),
    )
    loss = _losses(negatives, queries, keys, partner, temperature)
    # The softmax gives the negatives 1 - e^-loss in all, and takes as much from the positive.
    pull = _pull(torch.ones_like(loss), loss.double(), temperature)
    accumulate = query.to(queries.u.dtype)
    gradient, _ = queries.gradient(accumulate, accumulate[:0], mean.mul_(-pull[:, None]), pull, keys.u, partner)
    return _spread(loss, queries), gradient


def kept_bytes(rows: int, dtype: torch.dtype, temperature: float, normalize: bool) -> int:
    """How much nt_xent on `rows` rows a view keeps for its backward pass: `similarities` has this size, or is empty."""
    size = torch.promote_types(dtype, torch.float32).itemsize
    return size * _native.kept_similarities(2 * rows) if _bounded(temperature, normalize) else 0


def nt_xent(
    z0: Tensor,  # (T, D)
    z1: Tensor,  # (T, D)
    image: Tensor,  # (T,) int64
    valid: Tensor,  # (T,) bool
    temperature: float,
    normalize: bool,
    similarities: Tensor,  # (K,) uint8, written if not empty
) -> Tensor:  # (2T,)
    rows, partner = _both_views(z0, z1, image, valid, normalize)
    negatives = rows.u.new_empty(len(rows.u), dtype=torch.float64)
    _native.log_negatives(
        *(rows.u, rows.image, rows.u, rows.image, negatives, similarities),
        *(temperature, _bounded(temperature, normalize)),
    )
    return _spread(_losses(negatives, rows, rows, partner, temperature), rows)


def nt_xent_backward(
    weight: Tensor,  # (2T,), d / d loss_a
    z0: Tensor,  # (T, D)
    z1: Tensor,  # (T, D)
    image: Tensor,  # (T,) int64
    valid: Tensor,  # (T,) bool
    loss: Tensor,  # (2T,), what nt_xent returned
    similarities: Tensor,  # (K,) uint8, what nt_xent wrote
    temperature: float,
    normalize: bool,
) -> tuple[Tensor, Tensor]:  # (T, D) twice
    rows, partner = _both_views(z0, z1, image, valid, normalize)
    weight, loss = weight[rows.index], loss[rows.index].double()
    d_u = torch.zeros_like(rows.u)
    _native.negatives_gradient(
        *(rows.u, rows.image, rows.u, rows.image, weight),
        *(_positives(rows, rows, partner, temperature) + loss, similarities, d_u, d_u.new_empty(0)),
        *(temperature, _bounded(temperature, normalize)),
    )
    pull = _pull(weight, loss, temperature)
    return rows.gradient(z0, z1, d_u, pull + pull[partner], rows.u, partner)  # each is its positive's positive


_NOTHING_KEPT = torch.empty(0, dtype=torch.uint8)


def _queries_and_keys(
    query: Tensor,
    key: Tensor,
    image: Tensor,
    key_image: Tensor,
    valid: Tensor,
    key_valid: Tensor,
    positive: Tensor,
    normalize: bool,
) -> tuple[_Rows, _Rows, Tensor]:
    """Both sets of rows, and the place (n,) of each query's positive among the keys."""
    queries = _Rows(query, query[:0], image, valid, normalize)
    keys = _Rows(key, key[:0], key_image, key_valid, normalize)
    return queries, keys, keys.place[positive[queries.index]]


def _both_views(z0: Tensor, z1: Tensor, image: Tensor, valid: Tensor, normalize: bool) -> tuple[_Rows, Tensor]:
    """Z = [z0; z1] as one set of rows, and the place (n,) of each one's positive in it."""
    rows = _Rows(z0, z1, image.repeat(2), valid.repeat(2), normalize)
    return rows, rows.place[(rows.index + len(z0)) % max(1, 2 * len(z0))]
