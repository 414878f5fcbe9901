"""The native CPU kernels (csrc/cpu) behind the same signatures as the oracle in `ser_fast.ops.reference`.

The kernels do what is quadratic, or touches every token; the rest (sorting the rows, lengths, positives) is linear, and
plain PyTorch here.
"""

import importlib
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ser_fast.interpolation import INTERPOLATIONS, PADDINGS
from ser_fast.ops.reference import embed, embed_backward, participants

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
    """The rows that take part, of unit length and sorted by image, as the kernels take them."""

    def __init__(self, x: Tensor, image: Tensor, valid: Tensor, normalize: bool) -> None:
        rows = valid.nonzero()[:, 0]
        image, order = image[rows].sort(stable=True)
        self.index, self.image = rows[order], image  # (n,) rows of x, (n,)
        self.x, self.normalize = participants(x[self.index]), normalize  # (n, D)
        self.u = embed(self.x, normalize)  # (n, D)
        self.place = torch.zeros(len(x), dtype=torch.long).index_put_((self.index,), torch.arange(len(rows)))
        self.shape, self.dtype = x.shape, x.dtype

    def gradient(self, d_u: Tensor) -> Tensor:
        """The gradient of x (N, D) from that of u (n, D); 0 where a row takes no part."""
        d_x = embed_backward(d_u, self.u, self.x, self.normalize).to(self.dtype)
        return d_x.new_zeros(self.shape).index_put_((self.index,), d_x)


# Below, e^(2 / temperature) would leave the range of float32, and a running maximum takes the place of the bound.
_LOWEST_BOUNDED_TEMPERATURE = 0.03


def _bounded(temperature: float, normalize: bool) -> bool:
    return normalize and temperature >= _LOWEST_BOUNDED_TEMPERATURE


def _positives(query: _Rows, key: _Rows, partner: Tensor, temperature: float) -> Tensor:
    """(n,) float64, s of the rows of query with their positives, rows `partner` (n,) of key."""
    return (query.u.double() * key.u[partner].double()).sum(1) / temperature


def _losses(query: _Rows, key: _Rows, partner: Tensor, temperature: float) -> Tensor:  # (T,)
    negatives = query.u.new_empty(len(query.u), dtype=torch.float64)
    _native.log_negatives(
        query.u, query.image, key.u, key.image, negatives, temperature, _bounded(temperature, query.normalize)
    )
    x = negatives - _positives(query, key, partner, temperature)
    loss = torch.logaddexp(x, torch.zeros_like(x)).to(query.u.dtype)
    return loss.new_zeros(query.shape[0]).index_put_((query.index,), loss)


def _gradients(
    weight: Tensor,
    loss: Tensor,
    query: _Rows,
    key: _Rows,
    partner: Tensor,
    temperature: float,
    need_query: bool,
    need_key: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of the rows of query and of key, (n, D) and (m, D), or (0,) where not needed.

    weight and loss are (T,). For one set of rows, both of a row's gradients are in the first, whatever is needed.
    """
    weight, loss = weight[query.index].contiguous(), loss[query.index].double()
    same = query is key
    d_query = torch.zeros_like(query.u) if need_query else query.u.new_empty(0)
    d_key = torch.zeros_like(key.u) if need_key and not same else key.u.new_empty(0)
    _native.negatives_gradient(
        query.u,
        query.image,
        key.u,
        key.image,
        weight,
        _positives(query, key, partner, temperature) + loss,
        d_query,
        d_key,
        temperature,
        _bounded(temperature, query.normalize),
    )
    pull = (weight * torch.expm1(-loss) / temperature).to(query.u.dtype)[:, None]  # (n, 1)
    if need_query:
        d_query += pull * key.u[partner]
    if need_key:
        (d_query if same else d_key).index_add_(0, partner, pull * query.u)
    return d_query, d_key


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
    queries, keys = _Rows(query, image, valid, normalize), _Rows(key, key_image, key_valid, normalize)
    return _losses(queries, keys, keys.place[positive[queries.index]], temperature)


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
    queries, keys = _Rows(query, image, valid, normalize), _Rows(key, key_image, key_valid, normalize)
    partner = keys.place[positive[queries.index]]
    d_query, d_key = _gradients(weight, loss, queries, keys, partner, temperature, need_query, need_key)
    return (
        queries.gradient(d_query) if need_query else query.new_empty(0),
        keys.gradient(d_key) if need_key else key.new_empty(0),
    )


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
    accumulate = torch.promote_types(query.dtype, torch.float32)
    inputs = (query.to(accumulate), key.to(accumulate), image, key_image, valid, key_valid, positive)
    loss = info_nce(*inputs, temperature, normalize)
    gradient, _ = info_nce_backward(torch.ones_like(loss), *inputs, loss, temperature, normalize, True, False)
    return loss, gradient


def kept_bytes(rows: int, dtype: torch.dtype, temperature: float, normalize: bool) -> int:
    """How much nt_xent on `rows` rows a view keeps for its backward pass: `similarities` has this size, or is empty."""
    return 0


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
    return _losses(rows, rows, partner, temperature)


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
    d_u, _ = _gradients(weight, loss, rows, rows, partner, temperature, need_query=True, need_key=True)
    d_z0, d_z1 = rows.gradient(d_u).tensor_split(2)
    return d_z0.clone(), d_z1.clone()  # an op's outputs share no memory


def _both_views(z0: Tensor, z1: Tensor, image: Tensor, valid: Tensor, normalize: bool) -> tuple[_Rows, Tensor]:
    """Z = [z0; z1] as one set of rows, and the place (n,) of each one's positive in it."""
    rows = _Rows(torch.cat([z0, z1]), image.repeat(2), valid.repeat(2), normalize)
    return rows, rows.place[(rows.index + len(z0)) % max(1, 2 * len(z0))]
