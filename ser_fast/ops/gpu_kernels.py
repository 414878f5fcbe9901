"""The kernels of NT-Xent and InfoNCE for a GPU: what one set of them does, and what it takes.

`ser_fast.ops.gpu_losses` is the algorithm that calls them, and explains P, G, L, a and c. Triton's set is in
ser_fast.kernels, CUDA's in csrc/cuda; their steps carry the names of the methods of `Kernels`. The constants and the
order of the enumerations are those of csrc/cuda, too.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

SPAN = 32  # rows that share a range of images
KEPT_EXPONENT = 15  # kept similarities are 2^15 P: down to a temperature of 0.1 none is subnormal in float16
LARGEST_WEIGHT = 2.0**14  # as float16 sees it in G, and the largest term of a mean


class Source(IntEnum):
    """Where `gradient_panel` takes the similarities from."""

    PRODUCT = 0
    LIBRARY = 1  # from the panel, which G overwrites
    KEPT = 2  # from what the forward pass kept
    KEPT_DIAGONAL = 3  # the same, for a panel that reaches above the diagonal


class Side(IntEnum):
    """Whose gradient `finish_gradient` writes."""

    VIEWS = 0  # of the rows of nt_xent, both gradients of a row
    QUERY = 1
    KEY = 2


class Table(NamedTuple):
    """The images of a set of rows, and which are valid, of each row and of each SPAN rows."""

    packed: Tensor  # (2 padded + 3 padded / SPAN,) int64: the parts below, one after another
    padded: int

    @classmethod
    def empty(cls, like: Tensor, padded: int) -> "Table":
        return cls(like.new_empty(2 * padded + 3 * padded // SPAN, dtype=torch.int64), padded)

    @property
    def image(self) -> Tensor:  # (padded,)
        return self.packed[: self.padded]

    @property
    def valid(self) -> Tensor:  # (padded,), 1 or 0
        return self.packed[self.padded : 2 * self.padded]

    @property
    def lowest(self) -> Tensor:  # (padded / SPAN,), the lowest image of a span
        return self._spans(0)

    @property
    def highest(self) -> Tensor:  # (padded / SPAN,)
        return self._spans(1)

    @property
    def all_valid(self) -> Tensor:  # (padded / SPAN,), 1 or 0
        return self._spans(2)

    def _spans(self, part: int) -> Tensor:
        return self.packed[2 * self.padded :].view(3, -1)[part]


@dataclass(frozen=True, eq=False)
class Rows:
    """A set of rows [x0; x1] (info_nce has no x1), and what `prepare` makes of them."""

    x0: Tensor  # (split, D)
    x1: Tensor  # (count - split, D)
    normalize: bool
    u: Tensor  # (padded, columns), of unit length: float16, or for the library float32 or float64
    table: Table

    @property
    def count(self) -> int:
        return len(self.x0) + len(self.x1)

    @property
    def padded(self) -> int:
        return len(self.u)

    @property
    def columns(self) -> int:
        return self.u.shape[1]

    @property
    def library(self) -> bool:
        """Products are left to the library, in the precision of the rows."""
        return self.u.dtype != torch.float16


class Positives(NamedTuple):
    """Queries and keys, and the key that is each query's positive.

    Where both are the same rows ("views") row t and row t + split are each other's positive.
    """

    queries: Rows
    keys: Rows
    positive: Tensor  # (queries.count,) int64, rows of the keys; not read for views
    temperature: float

    @property
    def views(self) -> bool:
        return self.queries is self.keys


class GradientWeights(NamedTuple):
    """What the gradient takes of each query, in the dtype of the losses."""

    # a and its shift, G_ij = a_i 2^(c s_ij - shift_i), and the gradient of s with the positive, over the temperature
    values: Tensor  # (3, padded)
    largest: Tensor  # (1,), the most that a row of G sums to: unless for the library a is in units that make it 2^14
    bounded: bool  # shift is c for all: |s| <= 1 / temperature, and a fixed shift serves at that temperature


class Operand(NamedTuple):
    """One side of the similarity matrix in a product with G, and the part of G that it gives."""

    rows: Rows
    weights: Tensor | None  # (3, padded), `GradientWeights.values` of the rows; None: it gives none


class Panel(NamedTuple):
    """A rectangle of the similarity matrix, or of G."""

    values: Tensor  # (height, width), multiples of every tile's side
    first_row: int
    first_key: int


class QueriesByKey(NamedTuple):
    """The queries whose positive is key r: order[first[r]] to order[first[r + 1] - 1]."""

    order: Tensor  # (queries,) int64
    first: Tensor  # (keys + 1,) int64


class SideGradient(NamedTuple):
    """The gradient of the rows of one side, to which the positives' part is still to be added."""

    side: Side
    positives: Positives
    weights: GradientWeights  # of the queries
    accumulated: Tensor  # (splits, padded, columns), G times the other side
    by_key: QueriesByKey | None = None  # for Side.KEY

    @property
    def rows(self) -> Rows:
        """Whose gradient it is."""
        return self.positives.keys if self.side == Side.KEY else self.positives.queries

    @property
    def others(self) -> Rows:
        """The rows that hold the positives."""
        return self.positives.queries if self.side == Side.KEY else self.positives.keys


class Kernels(Protocol):
    """One set of kernels.

    They write the arguments that are said to be written, all contiguous and allocated. `scale` is c, similarities are
    in base 2, and `bounded` is as in GradientWeights.
    """

    def row_block(self, device: torch.device) -> int:
        """What the rows of a set are padded to a multiple of, and panels with them: a multiple of every tile's side."""

    def largest_row_block(self) -> int:
        """The largest `row_block` of any device."""

    def row_sums_tile(self, device: torch.device) -> tuple[int, int]:
        """The rows of a row block of `row_sums`, and the keys of one step."""

    def stationary_tile(self, device: torch.device, columns: int) -> tuple[int, int]:
        """The rows of a row block of `stationary_gradient` and `detached_sums`, and the keys of one step."""

    def largest_stationary(self, device: torch.device) -> int:
        """Up to how many columns `stationary_gradient` does better than panels."""

    def largest_detached(self, device: torch.device) -> int:
        """Up to how many columns there is a `detached_sums`."""

    def prepare(self, rows: Rows, image: Tensor, valid: Tensor) -> None:
        """Writes rows.u and rows.table. A masked row is 0 and never read, as padding is; an Inf becomes NaN.

        Args:
            rows: x0 and x1 are read.
            image: (split,) int64, of x0 and of x1.
            valid: (split,) bool, of x0 and of x1.
        """

    def symmetric_sums(self, rows: Rows, sums: Tensor, kept: Tensor, scale: float) -> None:
        """Adds L to sums, from the pairs i > j alone, and writes kept.

        Args:
            rows: the queries, and the keys.
            sums: (4, padded) int64, counts of 2^-42, 2^-70 and 2^-98, a term in the one that holds all bits of a
                float32, and of NaN.
            kept: (K,) float16, 2^KEPT_EXPONENT P in the backend's own layout of the tiles on and below the diagonal;
                (0,) for none.
            scale: c.
        """

    def row_sums(self, queries: Rows, keys: Rows, state: Tensor, scale: float) -> None:
        """Takes the negatives among the keys, in `splits` shares, into state.

        Args:
            queries, keys: in float16.
            state: (2, splits, queries.padded) float32, read and written: the row max, and the sums of 2^(c s - max).
            scale: c.
        """

    def panel_row_sums(self, panel: Panel, queries: Rows, keys: Rows, state: Tensor) -> None:
        """The same from a panel of c s, float32 or float64 as state (2, 1, queries.padded) is."""

    def losses(self, positives: Positives, state: Tensor, loss: Tensor) -> None:
        """Writes loss (queries.count,) = log(1 + e^(log-sum of the negatives - s of the positive)), 0 where not valid.

        state: what `symmetric_sums` (4, padded) int64 or `row_sums` (2, splits, padded) wrote.
        """

    def gradient_weights(self, positives: Positives, weight: Tensor, loss: Tensor, out: GradientWeights) -> None:
        """Writes out.values, from weight and loss (queries.count,); out.largest is read."""

    def stationary_gradient(self, queries: Operand, keys: Operand, out: Tensor, scale: float, bounded: bool) -> None:
        """Writes out (splits, queries.padded, columns) float32 = G k, in `splits` shares of the keys.

        A row block of the output stays with its program. G sums the parts of the two sides.
        """

    def gradient_panel(
        self, queries: Operand, keys: Operand, kept: Tensor, panel: Panel, source: Source, scale: float, bounded: bool
    ) -> None:
        """Writes G, in the dtype of u, to the panel. kept: (K,) float16, what `symmetric_sums` wrote."""

    def finish_gradient(self, gradient: SideGradient, d_x0: Tensor, d_x1: Tensor) -> None:
        """Writes d_x0 and d_x1, the gradients of x0 and x1 of gradient.rows, 0 where not valid."""

    def detached_sums(self, queries: Rows, keys: Rows, state: Tensor, out: Tensor, scale: float, bounded: bool) -> None:
        """Writes the sums of the negatives' keys, and of their terms, whose largest is about LARGEST_WEIGHT.

        Args:
            queries, keys: in float16, which holds terms 2^-28 of the largest.
            state: (2, splits, queries.padded) float32, written: a row max, and the sums of 2^(c s - max).
            out: (splits, queries.padded, columns) float32, written: sum_j 2^(c s_ij - max_i) k_j.
            scale: c.
            bounded: whether the row max may be taken from the bound of s.
        """

    def finish_detached(
        self, positives: Positives, state: Tensor, accumulated: Tensor, loss: Tensor, gradient: Tensor
    ) -> None:
        """Writes loss and its gradient in the query, (1 - e^-loss) (mean of the negatives - positive) / temperature.

        Args:
            positives: of info_nce.
            state, accumulated: what `detached_sums` wrote.
            loss: (queries.count,) float32, 0 where not valid.
            gradient: (queries.count, D) float32, 0 where not valid.
        """
