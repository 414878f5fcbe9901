"""NT-Xent and InfoNCE, without ever storing the similarity matrix: what the GPU backends share.

Similarities are made and used up in tiles. Rows have unit length, so s = <u, v> / temperature is at most
1 / temperature, and in base 2, with c = log2(e) / temperature, a fixed shift serves all:

    P_ij = 2^(c <u_i, v_j> - c)    for the negatives, else 0
    L_i  = sum_j P_ij,  log2 sum_j e^(s_ij) = log2 L_i + c

The gradient of sum_i w_i loss_i is one product with G_ij = P_ij a_i, a_i = w_i 2^(c - log2(e) (s_i+ + loss_i)); where
queries and keys are the same rows (nt_xent), with the symmetric G_ij = P_ij (a_i + a_j). At a low temperature P leaves
the range of float32: sums then carry a running maximum, and G takes two exps with the shift of each row.

Half-precision rows take part in products as float16, normalised in float32 and rounded once. Positives stay out of the
tiles, in float64. Of these rows, in units of U = n^2 D flops (n rows in all, nt_xent):

    forward     tiles on and above the diagonal, sums of both sides of a tile                                  U
    backward    "owner": a program owns a strip of rows, walks over all others, and keeps its gradient       4 U
                "panel": a kernel writes panels of G in float16, the library multiplies both ways            3 U
                the same from similarities that the forward pass kept                                        2 U

Rows in float32 or float64, and rows that are not normalised (no bound: float16 can't hold them), are exact: the
library forms panels of products in their dtype, at float32 with the precision that torch.set_float32_matmul_precision
says, and the same kernels use them up.

Images are int64 numbers, in any order. Of each 32 rows their range is known, and whether all are valid: two tiles with
disjoint ranges of valid rows need no mask, two of a single image hold nothing, and others are masked.

Sums are taken in an order that depends on shapes alone, or as integers: the same input gives the same bits.
Nothing waits for the device. Memory, besides the outputs: the rows in float16, 16 bytes a row, and in the backward pass
the gradient in float32 (times the splits of the walk) and one panel.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import torch
from torch import Tensor

SPAN = 32  # rows that share a range of images
LIFT = 15  # kept similarities are 2^15 P: down to a temperature of 0.1 none is subnormal in float16
TOP = 2.0**14  # the largest weight, as float16 sees it in G, and the largest term of a mean
PANEL = 8192  # rows and columns: 128 MB in float16, and one wave of 128 x 256 tiles of a gradient

_LOWEST_BOUNDED_TEMPERATURE = 0.03  # below, e^(2 / temperature) leaves the range of float32
_LOWEST_LIFTED_TEMPERATURE = 0.1  # below, 2^15 P leaves the normal range of float16
_MOST_SUMMED_ROWS = 1 << 20  # more could overflow the integers of `symmetric_sums`


class Source(IntEnum):
    """Where `panel` takes the similarities from."""

    PRODUCT = 0
    LIBRARY = 1  # from the panel, which G overwrites
    KEPT = 2  # from what the forward pass kept
    KEPT_DIAGONAL = 3  # the same, for a panel that reaches above the diagonal


class Side(IntEnum):
    """Whose gradient `finish` writes."""

    VIEWS = 0  # of the rows of nt_xent, both gradients of a row
    QUERY = 1
    KEY = 2


class Kernels(Protocol):
    """One set of kernels.

    They write the arguments that are said to be written, all contiguous and allocated. Of a set of rows [x0; x1], x0
    (split, D) and x1 (count - split, D) are what the user gave, and `prepare` makes u (padded, columns), operands of
    unit length in float16, or for the library in float32 or float64, and a table (2 padded + 3 padded / SPAN,) int64.
    q and k are the u of queries and of keys; where both are the same rows ("views": row t and row t + split are each
    other's positive) the arguments of both are alike. `scale` is c, and similarities are in base 2. A kernel that takes
    `bounded` may rely on |s| <= 1 / temperature and on a temperature at which a fixed shift serves.
    """

    def row_block(self, device: torch.device) -> int:
        """What the rows of a set are padded to a multiple of, and panels with them: a multiple of every tile's side."""

    def largest_row_block(self) -> int:
        """The largest `row_block` of any device."""

    def running_blocks(self, device: torch.device) -> tuple[int, int]:
        """The rows that a program of `row_sums` owns, and the keys of one step."""

    def owner_blocks(self, device: torch.device, columns: int) -> tuple[int, int]:
        """The rows that a program of `owner` and of `detached` owns, and the keys of one step."""

    def largest_owned(self, device: torch.device) -> int:
        """Up to how many columns `owner` does better than panels."""

    def largest_detached(self, device: torch.device) -> int:
        """Up to how many columns there is a `detached`."""

    def prepare(
        self, x0: Tensor, x1: Tensor, image: Tensor, valid: Tensor, u: Tensor, table: Tensor, normalize: bool
    ) -> None:
        """Writes u and table: image, valid (padded,), and of each SPAN rows the lowest image, the highest, and whether
        all are valid (padded / SPAN,). image (split,) int64 and valid (split,) bool are those of x0 and of x1, too.

        A row that takes no part is 0 and never read, as the rows and columns that pad; an Inf becomes NaN.
        """

    def symmetric_sums(self, u: Tensor, table: Tensor, sums: Tensor, kept: Tensor, scale: float, count: int) -> None:
        """Adds L to sums (4, padded) int64, from the pairs i > j alone, and writes kept float16, or (0,) for not.

        The sums count units of 2^-42, 2^-70 and 2^-98, a term in the one that holds all bits of a float32, and NaN.
        Kept is 2^LIFT P, in the backend's own layout of the tiles on and below the diagonal.
        """

    def row_sums(
        self, q: Tensor, q_table: Tensor, k: Tensor, k_table: Tensor, state: Tensor, scale: float, keys: int
    ) -> None:
        """Takes the negatives among the first `keys` keys, in `splits` shares, into state (2, splits, padded): the
        running maximum, and the sums of 2^(c s - maximum).
        """

    def panel_row_sums(
        self, panel: Tensor, q_table: Tensor, k_table: Tensor, state: Tensor, first_row: int, first_key: int
    ) -> None:
        """The same from a panel (rows, width) of c s, float32 or float64, whose corner is (first_row, first_key)."""

    def losses(
        self, q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor, positive: Tensor, table: Tensor, state: Tensor,
        loss: Tensor, temperature: float, views: bool, summed: bool, normalize: bool,
    ) -> None:  # fmt: skip
        """Writes loss (count,) = log(1 + e^(log-sum of the negatives - s of the positive)), 0 where not valid.

        positive (count,) int64, rows of the keys, not read for views; table is the queries'; state is what
        `symmetric_sums` added up (summed) or `row_sums`.
        """

    def coefficients(
        self, q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor, positive: Tensor, table: Tensor, weight: Tensor,
        largest: Tensor, loss: Tensor, out: Tensor, temperature: float, views: bool, bounded: bool, library: bool,
        normalize: bool,
    ) -> None:  # fmt: skip
        """Writes out (3, padded): a and its shift, G_ij = a_i 2^(c s_ij - shift_i), and the weight of the positive.

        weight and loss (count,) are those of the queries. Unless for the library, a is in units that make largest (1,),
        the most that a row of G sums to, TOP.
        """

    def owner(
        self, q: Tensor, q_table: Tensor, q_coefficients: Tensor, k: Tensor, k_table: Tensor,
        k_coefficients: Tensor, out: Tensor, scale: float, keys: int, bounded: bool, by_row: bool, by_key: bool,
    ) -> None:  # fmt: skip
        """Writes out (splits, padded, columns) float32 = G k of the queries, in `splits` shares of the keys.

        G sums the parts that the coefficients (3, padded) of the queries (by_row) and of the keys (by_key) give;
        those of a side that gives none are not read.
        """

    def panel(
        self, q: Tensor, q_table: Tensor, q_coefficients: Tensor, k: Tensor, k_table: Tensor,
        k_coefficients: Tensor, kept: Tensor, panel: Tensor, scale: float, first_row: int, first_key: int,
        source: Source, bounded: bool, by_row: bool, by_key: bool,
    ) -> None:  # fmt: skip
        """Writes G (rows, width), in the dtype of q, whose corner is (first_row, first_key), to `panel`."""

    def finish(
        self, x0: Tensor, x1: Tensor, y0: Tensor, y1: Tensor, table: Tensor, coefficients: Tensor,
        positive: Tensor, order: Tensor, first: Tensor, accumulated: Tensor, largest: Tensor, d_x0: Tensor,
        d_x1: Tensor, temperature: float, side: Side, library: bool, normalize: bool,
    ) -> None:  # fmt: skip
        """Writes d_x0 and d_x1, the gradients of the rows x, from accumulated (splits, padded, columns) and from the
        positives, whose rows are y. 0 where not valid.

        table is that of x, and coefficients (3, padded) are those of the queries: for Side.KEY they are y. There key r
        is the positive of the queries order[first[r]] to order[first[r + 1] - 1], else row r's is positive[r].
        """

    def detached(
        self, q: Tensor, q_table: Tensor, k: Tensor, k_table: Tensor, state: Tensor, out: Tensor, scale: float,
        keys: int, bounded: bool,
    ) -> None:  # fmt: skip
        """Writes out (splits, padded, columns) float32 = sum_j 2^(c s_ij - top_i) k_j, and state (2, splits, padded):
        top, and the sums without k. The largest term is about TOP, so that float16 holds terms 2^-28 of it.
        """

    def detached_finish(
        self, query: Tensor, key: Tensor, positive: Tensor, table: Tensor, state: Tensor, accumulated: Tensor,
        loss: Tensor, gradient: Tensor, temperature: float, normalize: bool,
    ) -> None:  # fmt: skip
        """Writes loss (count,), and its gradient (count, D) in the query, (1 - e^-loss) (mean of the negatives -
        positive) / temperature, from what `detached` wrote; float32, 0 where not valid.
        """


@dataclass(frozen=True)
class _Rows:
    """Rows [x0; x1] (info_nce has no x1), and what `prepare` makes of them."""

    x0: Tensor  # (split, D)
    x1: Tensor  # (count - split, D)
    count: int
    normalize: bool
    u: Tensor  # (padded, columns), of unit length: float16, or x's dtype for the library
    table: Tensor  # (2 padded + 3 padded / SPAN,) int64

    @property
    def padded(self) -> int:
        return len(self.u)

    @property
    def library(self) -> bool:
        """Products are left to the library, in the precision of the rows."""
        return self.u.dtype != torch.float16

    def bounded(self, temperature: float) -> bool:
        return not self.library and temperature >= _LOWEST_BOUNDED_TEMPERATURE


def base2_scale(temperature: float) -> float:
    """c, which takes a product of unit rows to the base-2 logarithm of e^s."""
    return 1 / (temperature * math.log(2))


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


def _splits(strips: int, tiles: int, device: torch.device) -> int:
    """In how many shares to walk over the keys, so that the last wave of programs leaves few processors idle."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    most = min(8, tiles)
    for splits in range(1, most):
        waves = _blocks(strips * splits, processors)
        if strips * splits >= 0.85 * waves * processors:
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


class TiledLosses:
    """The operations nt_xent and info_nce by one set of kernels, with the signatures of `ser_fast.ops.reference`."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels

    # ---------------------------------------------------------------- the operations

    def kept_bytes(self, rows: int, dtype: torch.dtype, temperature: float, normalize: bool) -> int:
        """The bytes that nt_xent on `rows` rows a view can keep for its backward pass: of `similarities`, or none."""
        low = temperature < _LOWEST_LIFTED_TEMPERATURE
        if dtype.itemsize > 2 or not normalize or low or 2 * rows > _MOST_SUMMED_ROWS:
            return 0
        block = self._kernels.largest_row_block()
        strips = _blocks(2 * rows, block)
        return torch.float16.itemsize * strips * (strips + 1) // 2 * block**2

    def nt_xent(
        self,
        z0: Tensor,  # (T, D)
        z1: Tensor,  # (T, D)
        image: Tensor,  # (T,) int64
        valid: Tensor,  # (T,) bool
        temperature: float,
        normalize: bool,
        similarities: Tensor,  # (K,) uint8, written if not empty
    ) -> Tensor:  # (2T,)
        if len(z0) == 0:
            return z0.new_empty(0, dtype=torch.promote_types(z0.dtype, torch.float32))
        rows = self._rows(z0, z1, image, valid, normalize)
        if rows.bounded(temperature) and rows.count <= _MOST_SUMMED_ROWS:
            state = self._sums_of_pairs(rows, temperature, similarities)
        else:
            state = self._running_sums(rows, rows, temperature)
        return self._losses(rows, rows, image, state, temperature)

    def nt_xent_backward(
        self,
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
        if len(z0) == 0:
            return z0.new_empty(z0.shape), z1.new_empty(z1.shape)
        rows = self._rows(z0, z1, image, valid, normalize)
        d_z0, d_z1, _, _ = self._gradients(
            weight, loss, rows, rows, image, similarities, temperature, need_query=True, need_key=False, dtype=z0.dtype
        )
        return d_z0, d_z1

    def info_nce(
        self,
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
        if len(query) == 0:
            return query.new_empty(0, dtype=torch.promote_types(query.dtype, torch.float32))
        queries = self._rows(query, query[:0], image, valid, normalize)
        keys = self._rows(key, key[:0], key_image, key_valid, normalize)
        state = self._running_sums(queries, keys, temperature)
        return self._losses(queries, keys, positive, state, temperature)

    def info_nce_backward(
        self,
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
        if len(query) == 0:
            return query.new_empty(query.shape if need_query else 0), key.new_zeros(key.shape if need_key else 0)
        queries = self._rows(query, query[:0], image, valid, normalize)
        keys = self._rows(key, key[:0], key_image, key_valid, normalize)
        kept = query.new_empty(0, dtype=torch.uint8)
        d_query, _, d_key, _ = self._gradients(
            weight, loss, queries, keys, positive, kept, temperature, need_query, need_key, query.dtype
        )
        return d_query, d_key

    def info_nce_detached(
        self,
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
        dtype = torch.promote_types(query.dtype, torch.float32)
        if len(query) == 0:
            return query.new_empty(0, dtype=dtype), query.new_empty(query.shape, dtype=dtype)
        queries = self._rows(query, query[:0], image, valid, normalize)
        keys = self._rows(key, key[:0], key_image, key_valid, normalize)
        columns = queries.u.shape[1]
        if queries.library or not _held_whole(columns, self._kernels.largest_detached(query.device)):
            state = self._running_sums(queries, keys, temperature)
            loss = self._losses(queries, keys, positive, state, temperature)
            kept = query.new_empty(0, dtype=torch.uint8)
            gradient, _, _, _ = self._gradients(
                torch.ones_like(loss), loss, queries, keys, positive, kept, temperature, True, False, dtype
            )
            return loss, gradient

        splits = self._owner_splits(queries, keys)
        state = query.new_empty(2, splits, queries.padded, dtype=dtype)
        accumulated = query.new_empty(splits, queries.padded, columns, dtype=dtype)
        self._kernels.detached(
            queries.u, queries.table, keys.u, keys.table, state, accumulated, base2_scale(temperature), keys.count,
            temperature >= _LOWEST_LIFTED_TEMPERATURE,
        )  # fmt: skip
        loss, gradient = query.new_empty(len(query), dtype=dtype), query.new_empty(query.shape, dtype=dtype)
        self._kernels.detached_finish(
            queries.x0, keys.x0, positive, queries.table, state, accumulated, loss, gradient, temperature,
            normalize,
        )  # fmt: skip
        return loss, gradient

    # ---------------------------------------------------------------- losses

    def _rows(self, x0: Tensor, x1: Tensor, image: Tensor, valid: Tensor, normalize: bool) -> _Rows:
        x0, x1 = x0.contiguous(), x1.contiguous()
        count = len(x0) + len(x1)
        padded = _up(count, self._kernels.row_block(x0.device))
        half = x0.dtype.itemsize == 2 and normalize
        dtype = torch.float16 if half else torch.promote_types(x0.dtype, torch.float32)
        u = x0.new_empty(padded, _operand_columns(x0.shape[1]), dtype=dtype)
        table = x0.new_empty(2 * padded + 3 * padded // SPAN, dtype=torch.int64)
        self._kernels.prepare(x0, x1, image.contiguous(), valid.contiguous(), u, table, normalize)
        return _Rows(x0, x1, count, normalize, u, table)

    def _panels(self, queries: _Rows, keys: _Rows) -> Iterator[tuple[slice, slice, Tensor]]:
        """Which rows and keys a panel has, and the panel: the same memory for all."""
        block = self._kernels.row_block(queries.u.device)
        buffer = queries.u.new_empty(min(PANEL * PANEL, queries.padded * keys.padded))
        for rows in _shares(queries.padded, block):
            for columns in _shares(keys.padded, block):
                height, width = rows.stop - rows.start, columns.stop - columns.start
                yield rows, columns, buffer[: height * width].view(height, width)

    def _sums_of_pairs(self, rows: _Rows, temperature: float, similarities: Tensor) -> Tensor:
        """(4, padded) int64, what `symmetric_sums` adds up."""
        sums = torch.zeros(4, rows.padded, dtype=torch.int64, device=rows.u.device)
        kept = similarities.view(torch.float16)
        self._kernels.symmetric_sums(rows.u, rows.table, sums, kept, base2_scale(temperature), rows.count)
        return sums

    def _running_sums(self, queries: _Rows, keys: _Rows, temperature: float) -> Tensor:
        """(2, splits, padded), what `row_sums` makes of all keys."""
        splits, dtype = 1, queries.u.dtype
        if not queries.library:
            height, width = self._kernels.running_blocks(queries.u.device)
            splits = _splits(queries.padded // height, _blocks(keys.count, width), queries.u.device)
            dtype = torch.float32
        state = torch.zeros(2, splits, queries.padded, dtype=dtype, device=queries.u.device)
        state[0].fill_(-torch.inf)
        if queries.library:
            for rows, columns, panel in self._panels(queries, keys):
                _multiply(panel, queries.u[rows], keys.u[columns], temperature)
                self._kernels.panel_row_sums(panel, queries.table, keys.table, state, rows.start, columns.start)
        else:
            self._kernels.row_sums(
                queries.u, queries.table, keys.u, keys.table, state, base2_scale(temperature), keys.count
            )
        return state

    def _losses(self, queries: _Rows, keys: _Rows, positive: Tensor, state: Tensor, temperature: float) -> Tensor:
        """(count,) from the sums over the negatives."""
        dtype = torch.promote_types(queries.x0.dtype, torch.float32)
        loss = queries.x0.new_empty(queries.count, dtype=dtype)
        self._kernels.losses(
            queries.x0, queries.x1, keys.x0, keys.x1, positive, queries.table, state, loss, temperature,
            queries is keys, state.dtype == torch.int64, queries.normalize,
        )  # fmt: skip
        return loss

    # ---------------------------------------------------------------- gradients

    def _gradients(
        self, weight: Tensor, loss: Tensor, queries: _Rows, keys: _Rows, positive: Tensor, kept: Tensor,
        temperature: float, need_query: bool, need_key: bool, dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """The gradients of the queries' x0 and x1, and of the keys'; (0,) where not needed.

        Where keys and queries are the same rows (`queries is keys`) both gradients of a row are in the first two.
        """
        views = queries is keys
        weight = weight.contiguous()
        # The most that a row of G sums to, in float16's units: entries of G may be as small as 2^-38 of it.
        largest = torch.linalg.vector_norm(weight * torch.expm1(-loss), torch.inf).view(1)
        coefficients = queries.u.new_empty(3, queries.padded, dtype=loss.dtype)
        self._kernels.coefficients(
            queries.x0, queries.x1, keys.x0, keys.x1, positive, queries.table, weight, largest, loss, coefficients,
            temperature, views, queries.bounded(temperature), queries.library, queries.normalize,
        )  # fmt: skip
        columns, device = queries.u.shape[1], queries.u.device
        owned = _held_whole(columns, self._kernels.largest_owned(device))
        if owned and not queries.library and kept.numel() == 0:
            nothing = kept
            d_query = self._owned(queries, keys, coefficients, temperature, True, views) if need_query else nothing
            d_key = self._owned(keys, queries, coefficients, temperature, False, True) if need_key else nothing
        else:
            d_query, d_key = self._by_panels(queries, keys, coefficients, kept, temperature, need_query, need_key)

        def finish(
            x: _Rows, y: _Rows, accumulated: Tensor, side: Side, order: Tensor, first: Tensor
        ) -> tuple[Tensor, Tensor]:
            d_x0, d_x1 = x.x0.new_empty(x.x0.shape, dtype=dtype), x.x1.new_empty(x.x1.shape, dtype=dtype)
            self._kernels.finish(
                x.x0, x.x1, y.x0, y.x1, x.table, coefficients, positive, order, first, accumulated, largest, d_x0,
                d_x1, temperature, side, x.library, x.normalize,
            )  # fmt: skip
            return d_x0, d_x1

        none = weight.new_empty(0, dtype=dtype)
        of_query, of_key = (none, none), (none, none)
        if need_query:
            of_query = finish(queries, keys, d_query, Side.VIEWS if views else Side.QUERY, positive, positive)
        if need_key:
            valid = queries.table[queries.padded : queries.padded + queries.count] != 0
            sorted_positive, order = positive.masked_fill(~valid, keys.count).sort(stable=True)
            first = torch.searchsorted(sorted_positive, torch.arange(keys.count + 1, device=positive.device))
            of_key = finish(keys, queries, d_key, Side.KEY, order, first)
        return *of_query, *of_key

    def _owner_splits(self, a: _Rows, b: _Rows) -> int:
        height, width = self._kernels.owner_blocks(a.u.device, a.u.shape[1])
        return _splits(a.padded // height, _blocks(b.count, width), a.u.device)

    def _owned(
        self, a: _Rows, b: _Rows, coefficients: Tensor, temperature: float, by_row: bool, by_key: bool
    ) -> Tensor:
        """`owner` with the rows a and the keys b: (splits, padded, columns)."""
        out = a.u.new_empty(self._owner_splits(a, b), *a.u.shape, dtype=torch.float32)
        self._kernels.owner(
            a.u, a.table, coefficients, b.u, b.table, coefficients, out, base2_scale(temperature), b.count,
            a.bounded(temperature), by_row, by_key,
        )  # fmt: skip
        return out

    def _by_panels(
        self, queries: _Rows, keys: _Rows, coefficients: Tensor, kept: Tensor, temperature: float,
        need_query: bool, need_key: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """G by panels, multiplied by the library: (1, padded, columns) of queries and keys, (0,) where not needed."""
        views = queries is keys
        dtype = queries.u.dtype if queries.library else torch.float32
        nothing = kept.new_empty(0)
        d_query = queries.u.new_zeros(1, *queries.u.shape, dtype=dtype) if need_query else nothing
        d_key = keys.u.new_zeros(1, *keys.u.shape, dtype=dtype) if need_key else nothing
        for rows, columns, panel in self._panels(queries, keys):
            if views and columns.start > rows.start:  # the mirror image of one below the diagonal
                continue
            source, scale = Source.PRODUCT, base2_scale(temperature)
            if queries.library:
                _multiply(panel, queries.u[rows], keys.u[columns], temperature)
                source, scale = Source.LIBRARY, 1.0
            elif kept.numel() > 0:
                source = Source.KEPT_DIAGONAL if rows == columns else Source.KEPT
            self._kernels.panel(
                queries.u, queries.table, coefficients, keys.u, keys.table, coefficients, kept.view(torch.float16),
                panel, scale, rows.start, columns.start, source, queries.bounded(temperature), True, views,
            )  # fmt: skip
            if need_query:
                _accumulate(d_query[0, rows], panel, keys.u[columns])
            if views and rows != columns:
                _accumulate(d_query[0, columns], panel.T, queries.u[rows])
            if need_key:
                _accumulate(d_key[0, columns], panel.T, queries.u[rows])
        return d_query, d_key
