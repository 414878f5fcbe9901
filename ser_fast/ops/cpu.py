"""The backend `cpu`: the C++ kernels of csrc/cpu.

The kernels do what is quadratic, or touches every number of a row; what has one number a row (sorting by image, the
loss from its logarithms) is plain PyTorch here.
"""

import importlib

import torch
from torch import Tensor

from ser_fast.ops.contract import InfoNCE, LossGradient, NTXent
from ser_fast.ops.native_action import group_action, group_action_transpose

__all__ = [
    "group_action",
    "group_action_transpose",
    "info_nce",
    "info_nce_backward",
    "info_nce_detached",
    "kept_bytes",
    "nt_xent",
    "nt_xent_backward",
]

importlib.import_module("ser_fast._C")  # registers the operators
_native = torch.ops.ser_fast_native


class _SortedRows:
    """The rows that are not masked out, normalized and sorted by image, as the kernels take them.

    Args:
        first: (M, D).
        second: (N - M, D), the rows after those of first; none for one set of rows.
        image: (N,) int64.
        valid: (N,) bool; n rows are valid.
        normalize: whether the rows are divided by their lengths.
    """

    def __init__(self, first: Tensor, second: Tensor, image: Tensor, valid: Tensor, normalize: bool) -> None:
        rows = valid.nonzero()[:, 0]
        count = rows.shape[0]
        self.image, order = image[rows].sort(stable=True)  # (n,)
        self.index = rows[order]  # (n,), of image
        # (N,), -1 where not valid, which no kernel takes for a row
        self.place = torch.full_like(image, -1).index_put_((self.index,), torch.arange(count))
        self.u = torch.empty(count, first.shape[1], dtype=torch.promote_types(first.dtype, torch.float32))  # (n, D)
        self.scales = self.u.new_empty(count, 2)
        _native.normalize_rows(first.contiguous(), second.contiguous(), self.index, normalize, self.u, self.scales)

    def gradient(
        self, first: Tensor, second: Tensor, d_u: Tensor, weight: Tensor, other: Tensor, positive: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The gradients of first and second, shaped like them: 0 where a row is masked out.

        Args:
            first, second: the rows that this was made from.
            d_u: (n, D), part of the gradient of u; the rest is weight (n,) times other[positive], unless weight is
                empty.
            weight: (n,) or (0,).
            other: (m, D), the rows that hold the positives.
            positive: (n,) int64, rows of other.
        """
        create = torch.empty_like if len(self.u) == len(first) + len(second) else torch.zeros_like
        d_x = [create(x, memory_format=torch.contiguous_format) for x in (first, second)]
        _native.normalize_rows_backward(*d_x, self.index, d_u, self.u, self.scales, weight, other, positive)
        return d_x[0], d_x[1]

    def scatter(self, values: Tensor) -> Tensor:
        """(n,) of the rows here to (N,) of all, 0 for those that are masked out."""
        return values.new_zeros(self.place.shape[0]).index_put_((self.index,), values)


class _Pairs:
    """Queries and keys, which may be the same rows, and the key that is each query's positive."""

    def __init__(self, inputs: NTXent | InfoNCE) -> None:
        self.temperature = inputs.temperature
        self.bounded = _bounded(inputs.temperature, inputs.normalize)
        if isinstance(inputs, NTXent):
            z0, z1, image, valid = inputs.z0, inputs.z1, inputs.image, inputs.valid
            self.queries = self.keys = _SortedRows(
                z0, z1, torch.cat([image, image]), torch.cat([valid, valid]), inputs.normalize
            )
            positive = (self.queries.index + len(z0)) % max(1, 2 * len(z0))
        else:
            query, key = inputs.query, inputs.key
            self.queries = _SortedRows(query, query[:0], inputs.image, inputs.valid, inputs.normalize)
            self.keys = _SortedRows(key, key[:0], inputs.key_image, inputs.key_valid, inputs.normalize)
            positive = inputs.positive[self.queries.index]
        self.positive = self.keys.place.index_select(0, positive)  # (n,), rows of keys

    def similarities(self) -> Tensor:
        """(n,) float64, s of the queries with their positives."""
        s = self.queries.u.new_empty(len(self.queries.u), dtype=torch.float64)
        _native.dot_rows(self.queries.u, self.keys.u, self.positive, s)
        return s.div_(self.temperature)

    def losses(self, kept: Tensor) -> Tensor:
        """(n,) losses. kept: (K,) uint8, where the similarities are written unless K is 0."""
        negatives = self.queries.u.new_empty(len(self.queries.u), dtype=torch.float64)
        _native.log_negatives(*self._rows(), negatives, kept, self.temperature, self.bounded)
        return self._losses(negatives)

    def losses_and_means(self) -> tuple[Tensor, Tensor]:
        """(n,) losses, and (n, D) the means of the negatives under the softmax."""
        negatives, mean = (
            self.queries.u.new_empty(len(self.queries.u), dtype=torch.float64),
            torch.empty_like(self.queries.u),
        )
        _native.log_and_mean_negatives(*self._rows(), negatives, mean, self.temperature, self.bounded)
        return self._losses(negatives), mean

    def add_gradients(self, weight: Tensor, loss: Tensor, kept: Tensor, d_queries: Tensor, d_keys: Tensor) -> None:
        """Add the gradients through the negatives to d_queries (n, D) and d_keys (m, D), unless they are empty.

        Args:
            weight: (n,), d / d loss.
            loss: (n,) float64.
            kept: (K,) uint8, what `losses` wrote, or empty.
            d_queries, d_keys: written.
        """
        lse = self.similarities() + loss
        _native.negatives_gradient(*self._rows(), weight, lse, kept, d_queries, d_keys, self.temperature, self.bounded)

    def positive_gradient(self, weight: Tensor, loss: Tensor) -> Tensor:
        """(n,) the gradient of s with the positive, over temperature: minus the sum of those with the negatives."""
        return (weight * torch.expm1(-loss) / self.temperature).to(weight.dtype)

    def _rows(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.queries.u, self.queries.image, self.keys.u, self.keys.image

    def _losses(self, log_negatives: Tensor) -> Tensor:
        """(n,) from log sum e^s over the negatives, (n,) float64."""
        x = log_negatives - self.similarities()
        return torch.logaddexp(x, torch.zeros_like(x)).to(self.queries.u.dtype)


# Below, e^(2 / temperature) would leave the range of float32, and a running maximum takes the place of the bound.
_LOWEST_BOUNDED_TEMPERATURE = 0.03
_NOTHING_KEPT = torch.empty(0, dtype=torch.uint8)


def _bounded(temperature: float, normalize: bool) -> bool:
    return normalize and temperature >= _LOWEST_BOUNDED_TEMPERATURE


def info_nce(inputs: InfoNCE) -> Tensor:
    pairs = _Pairs(inputs)
    return pairs.queries.scatter(pairs.losses(_NOTHING_KEPT))


def info_nce_backward(
    inputs: InfoNCE, gradient: LossGradient, need_query: bool, need_key: bool
) -> tuple[Tensor, Tensor]:
    query, key, pairs = inputs.query, inputs.key, _Pairs(inputs)
    queries, keys = pairs.queries, pairs.keys
    weight, loss = gradient.weight[queries.index], gradient.loss[queries.index].double()
    d_u = torch.zeros_like(queries.u) if need_query else queries.u.new_empty(0)
    d_v = torch.zeros_like(keys.u) if need_key else keys.u.new_empty(0)
    pairs.add_gradients(weight, loss, _NOTHING_KEPT, d_u, d_v)
    of_positive = pairs.positive_gradient(weight, loss)
    d_query, d_key = query.new_empty(0), key.new_empty(0)
    if need_query:
        d_query, _ = queries.gradient(query, query[:0], d_u, of_positive, keys.u, pairs.positive)
    if need_key:
        d_v.index_add_(0, pairs.positive, of_positive[:, None] * queries.u)  # queries may share a key
        d_key, _ = keys.gradient(key, key[:0], d_v, of_positive[:0], queries.u, pairs.positive)
    return d_query, d_key


def info_nce_detached(inputs: InfoNCE) -> tuple[Tensor, Tensor]:
    pairs = _Pairs(inputs)
    queries = pairs.queries
    loss, mean = pairs.losses_and_means()
    # The softmax gives the negatives 1 - e^-loss in all, and takes as much from the positive.
    of_positive = pairs.positive_gradient(torch.ones_like(loss), loss.double())
    query = inputs.query.to(queries.u.dtype)
    d_u = mean.mul_(-of_positive[:, None])
    gradient, _ = queries.gradient(query, query[:0], d_u, of_positive, pairs.keys.u, pairs.positive)
    return queries.scatter(loss), gradient


def kept_bytes(rows: int, dtype: torch.dtype, temperature: float, normalize: bool) -> int:
    size = torch.promote_types(dtype, torch.float32).itemsize
    return size * _native.kept_similarities(2 * rows) if _bounded(temperature, normalize) else 0


def nt_xent(inputs: NTXent, similarities: Tensor) -> Tensor:
    pairs = _Pairs(inputs)
    return pairs.queries.scatter(pairs.losses(similarities))


def nt_xent_backward(inputs: NTXent, gradient: LossGradient, similarities: Tensor) -> tuple[Tensor, Tensor]:
    pairs = _Pairs(inputs)
    rows = pairs.queries
    weight, loss = gradient.weight[rows.index], gradient.loss[rows.index].double()
    d_u = torch.zeros_like(rows.u)
    pairs.add_gradients(weight, loss, similarities, d_u, d_u.new_empty(0))
    of_positive = pairs.positive_gradient(weight, loss)
    both = of_positive + of_positive[pairs.positive]  # each is its positive's positive
    return rows.gradient(inputs.z0, inputs.z1, d_u, both, rows.u, pairs.positive)
