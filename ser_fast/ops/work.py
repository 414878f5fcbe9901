"""What the operators cost, from the shapes of their arguments alone: floating-point operations and memory besides.

Importing this module registers the formulas with torch.utils.flop_counter, whose FlopCounterMode then counts the
operators too. What is counted is what the algorithm does (see `ser_fast.ops.gpu_losses` and csrc/cpu): nt_xent with n
rows in all takes U = n^2 D operations forward and 3 U backward, 2 U where similarities were kept.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import (
    flop_registry,
    register_flop_formula,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

import ser_fast.ops.group_action
import ser_fast.ops.nt_xent  # noqa: F401  the two register the operators
from ser_fast.ops.gpu_losses import PANEL

_TAPS = {"nearest": 1, "bilinear": 2, "bicubic": 4, "catmull_rom": 4, "mitchell": 4, "lanczos3": 6, "area": 2}
_WIDEST_STATIONARY = 256  # columns; wider gradients go by panels
_TABLE = 64  # bytes a row: image, validity, scale, sums and weights

Shape = Sequence[int]


def _nt_xent(z0: Shape, *arguments: Any, **rest: Any) -> int:
    rows, dim = z0
    return (2 * rows) ** 2 * dim


def _nt_xent_backward(z0: Shape, *arguments: Any, **rest: Any) -> int:
    similarities = arguments[7]  # z1, image, valid, temperature, normalize, weight, loss, similarities, backend
    return (2 if similarities[0] else 3) * _nt_xent(z0)


def _info_nce(query: Shape, key: Shape, *arguments: Any, **rest: Any) -> int:
    return 2 * query[0] * key[0] * query[1]


def _info_nce_backward(query: Shape, key: Shape, *arguments: Any, **rest: Any) -> int:
    need_query, need_key = arguments[9:11]  # image ... normalize (7), weight, loss, need_query, need_key, backend
    return (1 + need_query + need_key) * _info_nce(query, key)


def _info_nce_detached(query: Shape, key: Shape, *arguments: Any, **rest: Any) -> int:
    return 2 * _info_nce(query, key)


def _group_action(x: Shape, linear: Shape, offset: Shape, *arguments: Any, **rest: Any) -> int:
    """Of a map that is no element of D4, without antialiasing; a tap is a multiplication and an addition."""
    _, size_out, interpolation = arguments[:3]
    return 2 * x[0] * size_out[0] * size_out[1] * x[2] * _TAPS[interpolation] ** 2


def _attention(query: Shape, key: Shape, value: Shape, *arguments: Any, **rest: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(gradient: Shape, query: Shape, key: Shape, value: Shape, *arguments: Any, **rest: Any) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


_ops, _aten = torch.ops.ser_fast, torch.ops.aten
_FORMULAS: dict[Any, Callable[..., int]] = {
    _ops.nt_xent: _nt_xent,
    _ops.nt_xent_backward: _nt_xent_backward,
    _ops.info_nce: _info_nce,
    _ops.info_nce_backward: _info_nce_backward,
    _ops.info_nce_detached: _info_nce_detached,
    _ops.group_action: _group_action,
    _ops.group_action_transpose: _group_action,
    # Torch has the formulas of CUDA's attention; the CPU's is the same.
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
for _packet, _formula in _FORMULAS.items():
    if _packet not in flop_registry:
        register_flop_formula(_packet)(_formula)


def scratch_bytes(packet: Any, arguments: Sequence[Any], kind: str, threads: int = 1) -> int:
    """Bytes that an operator takes while it runs, besides its inputs and outputs.

    Args:
        packet: of torch.ops.ser_fast; any other takes none.
        arguments: its own, flat.
        kind: of the backend: "cpu", "gpu" (Triton and CUDA) or "reference", which stores the similarity matrix.
        threads: of the CPU.
    """
    if packet not in (
        _ops.nt_xent,
        _ops.nt_xent_backward,
        _ops.info_nce,
        _ops.info_nce_backward,
        _ops.info_nce_detached,
    ):
        return 0
    first, second = arguments[:2]
    views = packet in (_ops.nt_xent, _ops.nt_xent_backward)
    rows = first.shape[0] + second.shape[0]
    queries, keys = (rows, rows) if views else (first.shape[0], second.shape[0])
    gradients = {
        _ops.nt_xent_backward: rows,
        _ops.info_nce_backward: queries * bool(arguments[11]) + keys * bool(arguments[12])
        if not views and len(arguments) > 12
        else 0,
        _ops.info_nce_detached: queries,
    }.get(packet, 0)
    return _SCRATCH[kind](first, rows, queries, keys, gradients, threads)


def _cpu_scratch(x: Tensor, rows: int, queries: int, keys: int, gradients: int, threads: int) -> int:
    dim, size = x.shape[1], torch.promote_types(x.dtype, torch.float32).itemsize
    block = 256 if max(queries, keys) <= 4096 else 512
    sums = -(-keys // block) * queries * size if gradients == 0 else 0
    return (rows + gradients) * dim * size + rows * _TABLE + sums + threads * block**2 * size


def _gpu_scratch(x: Tensor, rows: int, queries: int, keys: int, gradients: int, threads: int) -> int:
    dim, half = x.shape[1], x.dtype.itemsize == 2
    size = torch.promote_types(x.dtype, torch.float32).itemsize
    operand = 2 if half else size
    panels = not half or (gradients and dim > _WIDEST_STATIONARY)  # the library multiplies panels of the matrix
    panel = min(PANEL**2, queries * keys) * operand if panels else 0
    return rows * dim * operand + rows * _TABLE + gradients * dim * size + panel


def _reference_scratch(x: Tensor, rows: int, queries: int, keys: int, gradients: int, threads: int) -> int:
    size = torch.promote_types(x.dtype, torch.float32).itemsize
    return (rows + gradients) * x.shape[1] * size + 4 * queries * keys * size


_SCRATCH = {"cpu": _cpu_scratch, "gpu": _gpu_scratch, "reference": _reference_scratch}
