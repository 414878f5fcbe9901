"""The backend `cuda`: the C++ kernels of csrc/cuda."""

import importlib
from typing import NamedTuple

import torch
from torch import Tensor

from ser_fast.ops import native_action
from ser_fast.ops.contract import GroupAction
from ser_fast.ops.gpu_kernels import GradientWeights, Operand, Panel, Positives, Rows, SideGradient, Source
from ser_fast.ops.gpu_losses import GPULosses

_native = torch.ops.ser_fast_native
_extension = importlib.import_module("ser_fast._C")  # registers the operators, and has csrc/cuda's own numbers
_TILE: int = _extension.TILE


class _StationaryBlock(NamedTuple):
    """A build of the output-stationary kernels: for rows of up to `columns` columns, and what a block of it takes."""

    columns: int
    rows: int
    keys: int
    shared_memory: int


def _stationary_blocks(device: torch.device) -> list[_StationaryBlock]:
    """Those that fit the device, the first one of the same columns preferred."""
    blocks = (_StationaryBlock(*block) for block in _extension.STATIONARY_BLOCKS)
    return [block for block in blocks if block.shared_memory <= _shared_memory(device)]


class CUDABackend(GPULosses):
    """Every operation by the CUDA kernels."""

    def __init__(self) -> None:
        super().__init__(CUDAKernels())

    def group_action(self, x: Tensor, action: GroupAction) -> Tensor:
        return native_action.group_action(x, action)

    def group_action_transpose(self, x: Tensor, action: GroupAction) -> Tensor:
        return native_action.group_action_transpose(x, action)


class CUDAKernels:
    """`ser_fast.ops.gpu_kernels.Kernels`; tensors on the CPU are those of the kernels compiled for the host."""

    def row_block(self, device: torch.device) -> int:
        return _TILE

    def largest_row_block(self) -> int:
        return _TILE

    def row_sums_tile(self, device: torch.device) -> tuple[int, int]:
        return _TILE, _TILE

    def stationary_tile(self, device: torch.device, columns: int) -> tuple[int, int]:
        block = next(block for block in _stationary_blocks(device) if columns <= block.columns)
        return block.rows, block.keys

    def largest_stationary(self, device: torch.device) -> int:
        return min(256, self.largest_detached(device))

    def largest_detached(self, device: torch.device) -> int:
        return max(block.columns for block in _stationary_blocks(device))

    def prepare(self, rows: Rows, image: Tensor, valid: Tensor) -> None:
        _native.nt_xent_prepare(rows.x0, rows.x1, image, valid, rows.u, rows.table.packed, rows.normalize)

    def symmetric_sums(self, rows: Rows, sums: Tensor, kept: Tensor, scale: float) -> None:
        _native.nt_xent_symmetric_sums(*_operand(rows), sums, kept, scale, rows.count)

    def row_sums(self, queries: Rows, keys: Rows, state: Tensor, scale: float) -> None:
        _native.nt_xent_row_sums(*_operand(queries), *_operand(keys), state, scale, keys.count)

    def panel_row_sums(self, panel: Panel, queries: Rows, keys: Rows, state: Tensor) -> None:
        tables = queries.table.packed, keys.table.packed
        _native.nt_xent_panel_row_sums(panel.values, *tables, state, panel.first_row, panel.first_key)

    def losses(self, positives: Positives, state: Tensor, loss: Tensor) -> None:
        summed, normalize = state.dtype == torch.int64, positives.queries.normalize
        _native.nt_xent_losses(
            *_positives(positives), state, loss, positives.temperature, positives.views, summed, normalize
        )

    def gradient_weights(self, positives: Positives, weight: Tensor, loss: Tensor, out: GradientWeights) -> None:
        queries = positives.queries
        tensors = (*_positives(positives), weight, out.largest, loss, out.values)
        flags = positives.views, out.bounded, queries.library, queries.normalize
        _native.nt_xent_gradient_weights(*tensors, positives.temperature, *flags)

    def stationary_gradient(self, queries: Operand, keys: Operand, out: Tensor, scale: float, bounded: bool) -> None:
        _native.nt_xent_stationary_gradient(
            *_sides(queries, keys), out, scale, keys.rows.count, bounded, *_given(queries, keys)
        )

    def gradient_panel(
        self, queries: Operand, keys: Operand, kept: Tensor, panel: Panel, source: Source, scale: float, bounded: bool
    ) -> None:
        corner = panel.first_row, panel.first_key
        tensors = (*_sides(queries, keys), kept, panel.values)
        _native.nt_xent_gradient_panel(*tensors, scale, *corner, source, bounded, *_given(queries, keys))

    def finish_gradient(self, gradient: SideGradient, d_x0: Tensor, d_x1: Tensor) -> None:
        side, positives, weights, accumulated, by_key = gradient
        x, y, positive = gradient.rows, gradient.others, positives.positive
        order, first = by_key or (positive, positive)  # not read
        rows = (x.x0, x.x1, y.x0, y.x1, x.table.packed)
        tensors = (*rows, weights.values, positive, order, first, accumulated, weights.largest, d_x0, d_x1)
        _native.nt_xent_finish_gradient(*tensors, positives.temperature, side, x.library, x.normalize)

    def detached_sums(self, queries: Rows, keys: Rows, state: Tensor, out: Tensor, scale: float, bounded: bool) -> None:
        _native.nt_xent_detached_sums(*_operand(queries), *_operand(keys), state, out, scale, keys.count, bounded)

    def finish_detached(
        self, positives: Positives, state: Tensor, accumulated: Tensor, loss: Tensor, gradient: Tensor
    ) -> None:
        queries, keys, positive, temperature = positives
        rows = (queries.x0, keys.x0, positive, queries.table.packed)
        _native.nt_xent_finish_detached(*rows, state, accumulated, loss, gradient, temperature, queries.normalize)


# ---------------------------------------------------------------- arguments, as the operators take them


def _operand(rows: Rows) -> tuple[Tensor, Tensor]:
    return rows.u, rows.table.packed


def _sides(queries: Operand, keys: Operand) -> tuple[Tensor, ...]:
    """Operand, table and weights of both; a side that gives none has a tensor that is not read."""
    return tuple(
        tensor
        for side in (queries, keys)
        for tensor in (*_operand(side.rows), side.rows.u if side.weights is None else side.weights)
    )


def _given(queries: Operand, keys: Operand) -> tuple[bool, bool]:
    return queries.weights is not None, keys.weights is not None


def _positives(positives: Positives) -> tuple[Tensor, ...]:
    queries, keys = positives.queries, positives.keys
    return queries.x0, queries.x1, keys.x0, keys.x1, positives.positive, queries.table.packed


def _shared_memory(device: torch.device) -> int:
    """The bytes that a block can have."""
    if device.type == "cpu":
        return 163 << 10
    # torch's own stub lacks the attribute
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]
