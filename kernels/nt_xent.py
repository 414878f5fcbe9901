"""The launches of the Triton kernels of nt_xent and info_nce."""

from typing import Any

import torch
import triton
from torch import Tensor

from ser_fast.kernels import nt_xent_rows, nt_xent_tiles
from ser_fast.kernels.configs import (
    CAPABILITIES,
    LARGEST_STATIONARY,
    Config,
    capability_of,
    prepare_config,
    row_config,
    row_sums_config,
    similarity_config,
    stationary_config,
)
from ser_fast.ops.gpu_kernels import SPAN, GradientWeights, Operand, Panel, Positives, Rows, SideGradient, Source
from ser_fast.ops.gpu_losses import base2_scale


class TritonKernels:
    """`ser_fast.ops.gpu_kernels.Kernels`: every step is the kernel of its name."""

    def row_block(self, device: torch.device) -> int:
        return similarity_config(capability_of(device)).tiles["BLOCK_M"]

    def largest_row_block(self) -> int:
        return max(similarity_config(capability).tiles["BLOCK_M"] for capability in CAPABILITIES)

    def row_sums_tile(self, device: torch.device) -> tuple[int, int]:
        tiles = row_sums_config(capability_of(device)).tiles
        return tiles["BLOCK_M"], tiles["BLOCK_N"]

    def stationary_tile(self, device: torch.device, columns: int) -> tuple[int, int]:
        tiles = stationary_config(capability_of(device), columns).tiles
        return tiles["BLOCK_M"], tiles["BLOCK_N"]

    def largest_stationary(self, device: torch.device) -> int:
        return LARGEST_STATIONARY[capability_of(device)]

    def largest_detached(self, device: torch.device) -> int:
        return 512

    def prepare(self, rows: Rows, image: Tensor, valid: Tensor) -> None:
        block = triton.next_power_of_2(rows.columns)
        config = prepare_config(block)
        _launch(
            nt_xent_rows._prepare,
            (rows.padded // (config.tiles["SPANS"] * SPAN),),
            *(rows.x0, rows.x1, image, valid, rows.u, rows.table.packed),
            *(len(rows.x0), rows.count, rows.padded),
            **{"D": rows.x0.shape[1], "DIM": rows.columns, "BLOCK_D": block, "NORMALIZE": rows.normalize},
            **config.tiles,
            num_warps=config.num_warps,
        )

    def symmetric_sums(self, rows: Rows, sums: Tensor, kept: Tensor, scale: float) -> None:
        config = similarity_config(capability_of(rows.u.device))
        block, group = config.tiles["BLOCK_M"], config.tiles["GROUP"]
        squares = triton.cdiv(rows.padded, block * group)
        programs = squares * (squares + 1) // 2 * group * group * (block // config.tiles["BLOCK_N"])
        _launch(
            nt_xent_tiles._symmetric_sums,
            (programs,),
            *(*_operand(rows), sums, kept, scale, rows.count, rows.padded),
            **{"DIM": rows.columns, "KEEP": kept.numel() > 0},
            **_options(config),
        )

    def row_sums(self, queries: Rows, keys: Rows, state: Tensor, scale: float) -> None:
        config = row_sums_config(capability_of(queries.u.device))
        tiles, splits = triton.cdiv(keys.count, config.tiles["BLOCK_N"]), state.shape[1]
        no_panel, no_corner, no_width = state, (0, 0), 0
        _launch(
            nt_xent_tiles._row_sums,
            (queries.padded // config.tiles["BLOCK_M"], splits),
            *(*_operand(queries), *_operand(keys), no_panel, state, scale),
            *(queries.padded, keys.padded, *no_corner, tiles, splits, no_width),
            **{"DIM": queries.columns, "LIBRARY": False},
            **_options(config),
        )

    def panel_row_sums(self, panel: Panel, queries: Rows, keys: Rows, state: Tensor) -> None:
        config = row_sums_config(capability_of(panel.values.device))
        height, width = panel.values.shape
        tiles, splits = width // config.tiles["BLOCK_N"], 1
        no_operand, no_scale, no_columns = panel.values, 1.0, 0
        _launch(
            nt_xent_tiles._row_sums,
            (height // config.tiles["BLOCK_M"], splits),
            *(no_operand, queries.table.packed, no_operand, keys.table.packed, panel.values, state, no_scale),
            *(queries.padded, keys.padded, panel.first_row, panel.first_key, tiles, splits, width),
            **{"DIM": no_columns, "LIBRARY": True},
            **_options(config),
        )

    def losses(self, positives: Positives, state: Tensor, loss: Tensor) -> None:
        queries, summed = positives.queries, state.dtype == torch.int64
        grid, constants = _by_row(queries.count, queries.x0.shape[1])
        _launch(
            nt_xent_rows._losses,
            grid,
            *(*_positives(positives), state, loss, base2_scale(positives.temperature)),
            *(*_inverse(positives.temperature), *_counts(positives), queries.padded, 1 if summed else state.shape[1]),
            **{"VIEWS": positives.views, "SUMMED": summed, "NORMALIZE": queries.normalize},
            **constants,
        )

    def gradient_weights(self, positives: Positives, weight: Tensor, loss: Tensor, out: GradientWeights) -> None:
        queries = positives.queries
        grid, constants = _by_row(queries.padded, queries.x0.shape[1])
        _launch(
            nt_xent_rows._gradient_weights,
            grid,
            *(*_positives(positives), weight, out.largest, loss, out.values, base2_scale(positives.temperature)),
            *(*_inverse(positives.temperature), *_counts(positives), queries.padded),
            **{"VIEWS": positives.views, "BOUNDED": out.bounded, "LIBRARY": queries.library},
            **{"NORMALIZE": queries.normalize},
            **constants,
        )

    def stationary_gradient(self, queries: Operand, keys: Operand, out: Tensor, scale: float, bounded: bool) -> None:
        splits, padded, columns = out.shape
        config = stationary_config(capability_of(out.device), columns)
        tiles = triton.cdiv(keys.rows.count, config.tiles["BLOCK_N"])
        _launch(
            nt_xent_tiles._stationary_gradient,
            (padded // config.tiles["BLOCK_M"], splits),
            *(*_sides(queries, keys), out, scale, padded, keys.rows.padded, tiles, splits),
            **{"DIM": columns, "BOUNDED": bounded},
            **_given(queries, keys),
            **_options(config),
        )

    def gradient_panel(
        self, queries: Operand, keys: Operand, kept: Tensor, panel: Panel, source: Source, scale: float, bounded: bool
    ) -> None:
        config = similarity_config(capability_of(panel.values.device))
        height, width = panel.values.shape
        row_tiles, key_tiles = height // config.tiles["BLOCK_M"], width // config.tiles["BLOCK_N"]
        _launch(
            nt_xent_tiles._gradient_panel,
            (row_tiles * key_tiles,),
            *(*_sides(queries, keys), kept, panel.values, scale, queries.rows.padded, keys.rows.padded),
            *(panel.first_row, panel.first_key, row_tiles, key_tiles),
            **{"DIM": queries.rows.columns, "SOURCE": source.name, "BOUNDED": bounded},
            **_given(queries, keys),
            **_options(config),
        )

    def finish_gradient(self, gradient: SideGradient, d_x0: Tensor, d_x1: Tensor) -> None:
        side, positives, weights, accumulated, by_key = gradient
        x, y, positive = gradient.rows, gradient.others, positives.positive
        splits, padded, columns = accumulated.shape
        order, first = by_key or (positive, positive)  # not read
        grid, constants = _by_row(x.count, x.x0.shape[1])
        _launch(
            nt_xent_rows._finish_gradient,
            grid,
            *(x.x0, x.x1, y.x0, y.x1, x.table.packed, weights.values),
            *(positive, order, first, accumulated, weights.largest, d_x0, d_x1, *_inverse(positives.temperature)),
            *(len(x.x0), len(y.x0), x.count, padded, positives.queries.padded, splits),
            **{"DIM": columns, "SIDE": side.name, "LIBRARY": x.library, "NORMALIZE": x.normalize},
            **constants,
        )

    def detached_sums(self, queries: Rows, keys: Rows, state: Tensor, out: Tensor, scale: float, bounded: bool) -> None:
        splits, padded, columns = out.shape
        config = stationary_config(capability_of(out.device), columns)
        tiles = triton.cdiv(keys.count, config.tiles["BLOCK_N"])
        _launch(
            nt_xent_tiles._detached_sums,
            (padded // config.tiles["BLOCK_M"], splits),
            *(*_operand(queries), *_operand(keys), state, out, scale, padded, keys.padded, tiles, splits),
            **{"DIM": columns, "BOUNDED": bounded},
            **_options(config),
        )

    def finish_detached(
        self, positives: Positives, state: Tensor, accumulated: Tensor, loss: Tensor, gradient: Tensor
    ) -> None:
        queries, keys, positive, temperature = positives
        splits, padded, columns = accumulated.shape
        grid, constants = _by_row(queries.count, queries.x0.shape[1])
        _launch(
            nt_xent_rows._finish_detached,
            grid,
            *(queries.x0, keys.x0, positive, queries.table.packed, state, accumulated, loss, gradient),
            *(*_inverse(temperature), queries.count, keys.count, padded, splits),
            **{"DIM": columns, "NORMALIZE": queries.normalize},
            **constants,
        )


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Launch on the device of the tensors, and on its current stream, whatever device is current."""
    with torch.cuda.device_of(next(x for x in arguments if isinstance(x, Tensor))):
        kernel[grid](*arguments, **options)


# ---------------------------------------------------------------- arguments, as the kernels take them


def _operand(rows: Rows) -> tuple[Tensor, Tensor]:
    return rows.u, rows.table.packed


def _sides(queries: Operand, keys: Operand) -> tuple[Tensor, ...]:
    """Operand, table and weights of both; a side that gives none has those of the other, which are not read."""
    q_weights = keys.weights if queries.weights is None else queries.weights
    k_weights = queries.weights if keys.weights is None else keys.weights
    assert q_weights is not None
    assert k_weights is not None
    return *_operand(queries.rows), q_weights, *_operand(keys.rows), k_weights


def _given(queries: Operand, keys: Operand) -> dict[str, bool]:
    return {"BY_ROW": queries.weights is not None, "BY_KEY": keys.weights is not None}


def _positives(positives: Positives) -> tuple[Tensor, ...]:
    queries, keys = positives.queries, positives.keys
    return queries.x0, queries.x1, keys.x0, keys.x1, positives.positive, queries.table.packed


def _counts(positives: Positives) -> tuple[int, int, int]:
    return len(positives.queries.x0), len(positives.keys.x0), positives.queries.count


def _inverse(temperature: float) -> tuple[float, float]:
    """1 / temperature in two parts: a kernel takes a float as float32."""
    high = torch.tensor(1 / temperature, dtype=torch.float32).item()
    return high, 1 / temperature - high


def _by_row(rows: int, columns: int) -> tuple[tuple[int], dict[str, int]]:
    """The grid of a kernel that goes through `rows` rows, and its constants."""
    config = row_config(columns)
    block = triton.next_power_of_2(columns)
    options = {"D": columns, "BLOCK_D": block, **config.tiles, "num_warps": config.num_warps}
    return (triton.cdiv(rows, config.tiles["ROWS"]),), options


def _options(config: Config) -> dict[str, int]:
    return {**config.tiles, "num_warps": config.num_warps, "num_stages": config.num_stages}
