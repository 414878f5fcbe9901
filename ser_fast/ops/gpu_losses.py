"""NT-Xent and InfoNCE without ever storing the similarity matrix: the algorithm that the GPU backends share.

Similarities are computed and consumed tile by tile, by the kernels of `ser_fast.ops.gpu_kernels`. Rows have unit
length, so s = <u, v> / temperature is at most 1 / temperature, and in base 2, with c = log2(e) / temperature, a fixed
shift serves all:

    P_ij = 2^(c <u_i, v_j> - c)    for the negatives, else 0
    L_i  = sum_j P_ij,  log2 sum_j e^(s_ij) = log2 L_i + c

The gradient of sum_i w_i loss_i is one product with G_ij = P_ij a_i, a_i = w_i 2^(c - log2(e) (s_i+ + loss_i)); where
queries and keys are the same rows (nt_xent), with the symmetric G_ij = P_ij (a_i + a_j). At a low temperature P leaves
the range of float32: sums then carry a running maximum, and G takes two exps with the shift of each row.

Half-precision rows are operands of products as float16, normalized in float32 and rounded once. Positives stay out of
the tiles, in float64. Of these rows, in units of U = n^2 D flops (n rows in all, nt_xent):

    forward     tiles on and above the diagonal, sums of both sides of a tile                                  U
    backward    output-stationary: a program keeps the gradient of a row block, walks over all other rows    4 U
                by panels: a kernel writes panels of G in float16, the library multiplies both ways          3 U
                the same from similarities that the forward pass kept                                        2 U

Rows in float32 or float64, and rows that are not normalized (no bound: float16 can't hold them), are exact: the
library forms panels of products in their dtype, at float32 with the precision that torch.set_float32_matmul_precision
says, and the same kernels consume them.

Images are int64 numbers, in any order. Of each 32 rows their range is known, and whether all are valid: two tiles with
disjoint ranges of valid rows need no mask, two of a single image have no negatives, and others are masked.

Sums are taken in an order that depends on shapes alone, or as integers: the same input gives the same bits.
Nothing waits for the device. Memory, besides the outputs: the rows in float16, 16 bytes a row, and in the backward pass
the gradient in float32 (times the splits of the walk) and one panel.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ser_fast.ops.contract import InfoNCE, LossGradient, NTXent
from ser_fast.ops.gpu_kernels import (
    GradientWeights,
    Kernels,
    Operand,
    Panel,
    Positives,
    QueriesByKey,
    Rows,
    Side,
    SideGradient,
    Source,
    Table,
)

PANEL = 8192  # rows and columns: 128 MB in float16, and one wave of 128 x 256 tiles of a gradient

_LOWEST_BOUNDED_TEMPERATURE = 0.03  # below, e^(2 / temperature) leaves the range of float32
_LOWEST_KEPT_TEMPERATURE = 0.1  # below, 2^15 P leaves the normal range of float16
_MOST_SUMMED_ROWS = 1 << 20  # more could overflow the integers of `symmetric_sums`


def base2_scale(temperature: float) -> float:
    """c, which takes a product of unit rows to the base-2 logarithm of e^s."""
    return 1 / (temperature * math.log(2))


def _bounded(rows: Rows, temperature: float) -> bool:
    """Whether |s| <= 1 / temperature, and a fixed shift serves."""
    return not rows.library and temperature >= _LOWEST_BOUNDED_TEMPERATURE


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def _up(size: int, block: int) -> int:
    return _blocks(size, block) * block


def _operand_columns(d: int) -> int:
    """Columns of the operands: a power of two where one program holds whole rows, else a multiple of 64."""
    return max(64, 1 << (d - 1).bit_length()) if d <= 256 else _up(d, 64)


def _held_whole(columns: int, largest: int) -> bool:
    """Whether one program holds whole rows: of so many columns at most, and a power of two."""
    return columns <= largest and columns.bit_count() == 1


def _splits(row_blocks: int, tiles: int, device: torch.device) -> int:
    """In how many shares to walk over the keys, so that the last wave of programs leaves few processors idle."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    most = min(8, tiles)
    for splits in range(1, most):
        waves = _blocks(row_blocks * splits, processors)
        if row_blocks * splits >= 0.85 * waves * processors:
            return splits
    return most


def _shares(padded: int, block: int) -> list[slice]:
    """Equal shares of the rows, no larger than a panel, in whole blocks."""
    step = _up(_blocks(padded, _blocks(padded, PANEL)), block)
    return [slice(start, min(start + step, padded)) for start in range(0, padded, step)]


def _multiply(panel: Tensor, queries: Tensor, keys: Tensor, temperature: float) -> None:
    """panel = c s, by the library."""
    torch.addmm(panel, queries, keys.T, beta=0, alpha=base2_scale(temperature), out=panel)


def _accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, in the precision of total."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:  # kernels that are tested on the CPU: no product there has another dtype than its operands
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


class GPULosses:
    """The operations nt_xent and info_nce of `ser_fast.ops.contract.Backend`, by one set of kernels."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels

    # ---------------------------------------------------------------- the operations

    def kept_bytes(self, rows: int, dtype: torch.dtype, temperature: float, normalize: bool) -> int:
        low = temperature < _LOWEST_KEPT_TEMPERATURE
        if dtype.itemsize > 2 or not normalize or low or 2 * rows > _MOST_SUMMED_ROWS:
            return 0
        block = self._kernels.largest_row_block()
        row_blocks = _blocks(2 * rows, block)
        return torch.float16.itemsize * row_blocks * (row_blocks + 1) // 2 * block**2

    def nt_xent(self, inputs: NTXent, similarities: Tensor) -> Tensor:
        z0, temperature = inputs.z0, inputs.temperature
        if len(z0) == 0:
            return z0.new_empty(0, dtype=torch.promote_types(z0.dtype, torch.float32))
        positives = self._both_views(inputs)
        rows = positives.queries
        if _bounded(rows, temperature) and rows.count <= _MOST_SUMMED_ROWS:
            state = self._symmetric_sums(rows, temperature, similarities)
        else:
            state = self._row_sums(rows, rows, temperature)
        return self._losses(positives, state)

    def nt_xent_backward(self, inputs: NTXent, gradient: LossGradient, similarities: Tensor) -> tuple[Tensor, Tensor]:
        z0, z1 = inputs.z0, inputs.z1
        if len(z0) == 0:
            return z0.new_empty(z0.shape), z1.new_empty(z1.shape)
        positives = self._both_views(inputs)
        (d_z0, d_z1), _ = self._gradients(positives, gradient, similarities, True, False, dtype=z0.dtype)
        return d_z0, d_z1

    def info_nce(self, inputs: InfoNCE) -> Tensor:
        query = inputs.query
        if len(query) == 0:
            return query.new_empty(0, dtype=torch.promote_types(query.dtype, torch.float32))
        positives = self._queries_and_keys(inputs)
        state = self._row_sums(positives.queries, positives.keys, inputs.temperature)
        return self._losses(positives, state)

    def info_nce_backward(
        self, inputs: InfoNCE, gradient: LossGradient, need_query: bool, need_key: bool
    ) -> tuple[Tensor, Tensor]:
        query, key = inputs.query, inputs.key
        if len(query) == 0:
            return query.new_empty(query.shape if need_query else 0), key.new_zeros(key.shape if need_key else 0)
        positives = self._queries_and_keys(inputs)
        kept = query.new_empty(0, dtype=torch.uint8)
        (d_query, _), (d_key, _) = self._gradients(positives, gradient, kept, need_query, need_key, query.dtype)
        return d_query, d_key

    def info_nce_detached(self, inputs: InfoNCE) -> tuple[Tensor, Tensor]:
        query, temperature = inputs.query, inputs.temperature
        dtype = torch.promote_types(query.dtype, torch.float32)
        if len(query) == 0:
            return query.new_empty(0, dtype=dtype), query.new_empty(query.shape, dtype=dtype)
        positives = self._queries_and_keys(inputs)
        queries, keys = positives.queries, positives.keys
        if queries.library or not _held_whole(queries.columns, self._kernels.largest_detached(query.device)):
            loss = self._losses(positives, self._row_sums(queries, keys, temperature))
            ones, kept = LossGradient(torch.ones_like(loss), loss), query.new_empty(0, dtype=torch.uint8)
            (gradient, _), _ = self._gradients(positives, ones, kept, True, False, dtype)
            return loss, gradient

        splits = self._stationary_splits(queries, keys)
        state = query.new_empty(2, splits, queries.padded, dtype=dtype)
        accumulated = query.new_empty(splits, queries.padded, queries.columns, dtype=dtype)
        bounded = temperature >= _LOWEST_KEPT_TEMPERATURE
        self._kernels.detached_sums(queries, keys, state, accumulated, base2_scale(temperature), bounded)
        loss, gradient = query.new_empty(len(query), dtype=dtype), query.new_empty(query.shape, dtype=dtype)
        self._kernels.finish_detached(positives, state, accumulated, loss, gradient)
        return loss, gradient

    # ---------------------------------------------------------------- losses

    def _both_views(self, inputs: NTXent) -> Positives:
        rows = self._rows(inputs.z0, inputs.z1, inputs.image, inputs.valid, inputs.normalize)
        return Positives(rows, rows, inputs.image, inputs.temperature)

    def _queries_and_keys(self, inputs: InfoNCE) -> Positives:
        query, key = inputs.query, inputs.key
        queries = self._rows(query, query[:0], inputs.image, inputs.valid, inputs.normalize)
        keys = self._rows(key, key[:0], inputs.key_image, inputs.key_valid, inputs.normalize)
        return Positives(queries, keys, inputs.positive, inputs.temperature)

    def _rows(self, x0: Tensor, x1: Tensor, image: Tensor, valid: Tensor, normalize: bool) -> Rows:
        x0, x1 = x0.contiguous(), x1.contiguous()
        padded = _up(len(x0) + len(x1), self._kernels.row_block(x0.device))
        half = x0.dtype.itemsize == 2 and normalize
        dtype = torch.float16 if half else torch.promote_types(x0.dtype, torch.float32)
        u = x0.new_empty(padded, _operand_columns(x0.shape[1]), dtype=dtype)
        rows = Rows(x0, x1, normalize, u, Table.empty(x0, padded))
        self._kernels.prepare(rows, image.contiguous(), valid.contiguous())
        return rows

    def _panels(self, queries: Rows, keys: Rows) -> Iterator[tuple[slice, slice, Panel]]:
        """Which rows and keys a panel has, and the panel: the same memory for all."""
        block = self._kernels.row_block(queries.u.device)
        buffer = queries.u.new_empty(min(PANEL * PANEL, queries.padded * keys.padded))
        for rows in _shares(queries.padded, block):
            for columns in _shares(keys.padded, block):
                height, width = rows.stop - rows.start, columns.stop - columns.start
                yield rows, columns, Panel(buffer[: height * width].view(height, width), rows.start, columns.start)

    def _symmetric_sums(self, rows: Rows, temperature: float, similarities: Tensor) -> Tensor:
        """(4, padded) int64, what `symmetric_sums` adds up."""
        sums = torch.zeros(4, rows.padded, dtype=torch.int64, device=rows.u.device)
        self._kernels.symmetric_sums(rows, sums, similarities.view(torch.float16), base2_scale(temperature))
        return sums

    def _row_sums(self, queries: Rows, keys: Rows, temperature: float) -> Tensor:
        """(2, splits, padded), what `row_sums` makes of all keys."""
        splits, dtype = 1, queries.u.dtype
        if not queries.library:
            height, width = self._kernels.row_sums_tile(queries.u.device)
            splits = _splits(queries.padded // height, _blocks(keys.count, width), queries.u.device)
            dtype = torch.float32
        state = torch.zeros(2, splits, queries.padded, dtype=dtype, device=queries.u.device)
        state[0].fill_(-torch.inf)
        if queries.library:
            for rows, columns, panel in self._panels(queries, keys):
                _multiply(panel.values, queries.u[rows], keys.u[columns], temperature)
                self._kernels.panel_row_sums(panel, queries, keys, state)
        else:
            self._kernels.row_sums(queries, keys, state, base2_scale(temperature))
        return state

    def _losses(self, positives: Positives, state: Tensor) -> Tensor:
        """(count,) from the sums over the negatives."""
        queries = positives.queries
        dtype = torch.promote_types(queries.x0.dtype, torch.float32)
        loss = queries.x0.new_empty(queries.count, dtype=dtype)
        self._kernels.losses(positives, state, loss)
        return loss

    # ---------------------------------------------------------------- gradients

    def _gradients(
        self,
        positives: Positives,
        gradient: LossGradient,
        kept: Tensor,
        need_query: bool,
        need_key: bool,
        dtype: torch.dtype,
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """The gradients of the queries' x0 and x1, and of the keys'; (0,) where not needed.

        Of views both gradients of a row are in the first two.

        Args:
            positives: queries and keys.
            gradient: of the queries.
            kept: (K,) uint8, the similarities, or empty.
            need_query, need_key: whose gradients.
            dtype: of the gradients.
        """
        queries, keys, positive, temperature = positives
        weight, loss = gradient.weight.contiguous(), gradient.loss
        weights = GradientWeights(
            values=queries.u.new_empty(3, queries.padded, dtype=loss.dtype),
            # The most that a row of G sums to, in float16's units: entries of G may be as small as 2^-38 of it.
            largest=torch.linalg.vector_norm(weight * torch.expm1(-loss), torch.inf).view(1),
            bounded=_bounded(queries, temperature),
        )
        self._kernels.gradient_weights(positives, weight, loss, weights)
        whole = _held_whole(queries.columns, self._kernels.largest_stationary(queries.u.device))
        if whole and not queries.library and kept.numel() == 0:
            as_query = Operand(queries, weights.values)
            as_key = Operand(keys, weights.values if positives.views else None)
            d_query = self._stationary(as_query, as_key, temperature) if need_query else kept
            d_key = self._stationary(Operand(keys, None), as_query, temperature) if need_key else kept
        else:
            d_query, d_key = self._by_panels(positives, weights, kept, need_query, need_key)

        def finished(unfinished: SideGradient) -> tuple[Tensor, Tensor]:
            d_x0, d_x1 = (x.new_empty(x.shape, dtype=dtype) for x in (unfinished.rows.x0, unfinished.rows.x1))
            self._kernels.finish_gradient(unfinished, d_x0, d_x1)
            return d_x0, d_x1

        none = weight.new_empty(0, dtype=dtype)
        of_query, of_key = (none, none), (none, none)
        if need_query:
            side = Side.VIEWS if positives.views else Side.QUERY
            of_query = finished(SideGradient(side, positives, weights, d_query))
        if need_key:
            valid = queries.table.valid[: queries.count] != 0
            sorted_positive, order = positive.masked_fill(~valid, keys.count).sort(stable=True)
            first = torch.searchsorted(sorted_positive, torch.arange(keys.count + 1, device=positive.device))
            of_key = finished(SideGradient(Side.KEY, positives, weights, d_key, QueriesByKey(order, first)))
        return of_query, of_key

    def _stationary_splits(self, queries: Rows, keys: Rows) -> int:
        height, width = self._kernels.stationary_tile(queries.u.device, queries.columns)
        return _splits(queries.padded // height, _blocks(keys.count, width), queries.u.device)

    def _stationary(self, queries: Operand, keys: Operand, temperature: float) -> Tensor:
        """(splits, padded, columns), what `stationary_gradient` writes."""
        rows = queries.rows
        out = rows.u.new_empty(self._stationary_splits(rows, keys.rows), *rows.u.shape, dtype=torch.float32)
        bounded = _bounded(rows, temperature)
        self._kernels.stationary_gradient(queries, keys, out, base2_scale(temperature), bounded)
        return out

    def _by_panels(
        self, positives: Positives, weights: GradientWeights, kept: Tensor, need_query: bool, need_key: bool
    ) -> tuple[Tensor, Tensor]:
        """G by panels, multiplied by the library: (1, padded, columns) of queries and keys, (0,) where not needed."""
        queries, keys, _, temperature = positives
        dtype = queries.u.dtype if queries.library else torch.float32
        nothing = kept.new_empty(0)
        d_query = queries.u.new_zeros(1, *queries.u.shape, dtype=dtype) if need_query else nothing
        d_key = keys.u.new_zeros(1, *keys.u.shape, dtype=dtype) if need_key else nothing
        as_query = Operand(queries, weights.values)
        as_key = Operand(keys, weights.values if positives.views else None)
        similarities = kept.view(torch.float16)
        for rows, columns, panel in self._panels(queries, keys):
            if positives.views and columns.start > rows.start:  # the mirror image of one below the diagonal
                continue
            source, scale = Source.PRODUCT, base2_scale(temperature)
            if queries.library:
                _multiply(panel.values, queries.u[rows], keys.u[columns], temperature)
                source, scale = Source.LIBRARY, 1.0
            elif kept.numel() > 0:
                source = Source.KEPT_DIAGONAL if rows == columns else Source.KEPT
            self._kernels.gradient_panel(as_query, as_key, similarities, panel, source, scale, weights.bounded)
            if need_query:
                _accumulate(d_query[0, rows], panel.values, keys.u[columns])
            if positives.views and rows != columns:
                _accumulate(d_query[0, columns], panel.values.T, queries.u[rows])
            if need_key:
                _accumulate(d_key[0, columns], panel.values.T, queries.u[rows])
        return d_query, d_key
