"""Contrastive losses over tokens: `nt_xent` between two views, `info_nce` from queries to keys.

Each loss is an op that returns one value per anchor, and an op for its gradient that takes one weight per anchor:
reductions are plain PyTorch around them. Optional arguments are made explicit before the op, so that every backend
follows one rule: key b is a negative of anchor t where both take part and their images differ.
"""

from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ser_fast.device import require_dense
from ser_fast.ops.backends import choose, implementation
from ser_fast.ops.contract import (
    FLOATS,
    InfoNCE,
    LossGradient,
    NTXent,
    check_info_nce,
    check_loss_gradient,
    check_nt_xent,
    check_temperature,
)
from ser_fast.ops.operator import Operator, differentiable_once, save_arguments, saved_arguments

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_REDUCTIONS = ("mean", "sum", "none")


# ---------------------------------------------------------------- the operators


def _nt_xent(inputs: NTXent, kept: int, backend: str) -> tuple[Tensor, Tensor]:
    """The losses, and `kept` bytes of similarities for the backward pass: a backend's own layout, or none."""
    check_nt_xent(inputs)
    _check_kept(inputs, kept, backend)
    similarities = torch.empty(kept, dtype=torch.uint8, device=inputs.z0.device)
    return implementation(backend).nt_xent(inputs, similarities), similarities


def _nt_xent_backward(
    inputs: NTXent, gradient: LossGradient, similarities: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    _check_nt_xent_backward(inputs, gradient, similarities)
    _check_kept(inputs, similarities.numel(), backend)
    return implementation(backend).nt_xent_backward(inputs, gradient, similarities)


def _info_nce(inputs: InfoNCE, backend: str) -> Tensor:
    check_info_nce(inputs)
    return implementation(backend).info_nce(inputs)


def _info_nce_backward(
    inputs: InfoNCE, gradient: LossGradient, need_query: bool, need_key: bool, backend: str
) -> tuple[Tensor, Tensor]:
    _check_info_nce_backward(inputs, gradient)
    return implementation(backend).info_nce_backward(inputs, gradient, need_query, need_key)


def _info_nce_detached(inputs: InfoNCE, backend: str) -> tuple[Tensor, Tensor]:
    """The losses (T,), and (T, D) the gradient of each in its own query, the only one it has."""
    check_info_nce(inputs)
    return implementation(backend).info_nce_detached(inputs)


def _check_nt_xent_backward(inputs: NTXent, gradient: LossGradient, similarities: Tensor) -> None:
    check_nt_xent(inputs)
    check_loss_gradient(gradient, 2 * inputs.z0.shape[0], inputs.z0)
    if similarities.dtype != torch.uint8 or similarities.ndim != 1 or similarities.device != inputs.z0.device:
        raise TypeError(f"similarities: got {similarities.dtype}, takes the uint8 that the forward pass wrote")


def _check_info_nce_backward(inputs: InfoNCE, gradient: LossGradient) -> None:
    check_info_nce(inputs)
    check_loss_gradient(gradient, inputs.query.shape[0], inputs.query)


def _check_kept(inputs: NTXent, kept: int, backend: str) -> None:
    if kept == 0:
        return
    z0 = inputs.z0
    wanted = implementation(backend).kept_bytes(z0.shape[0], z0.dtype, inputs.temperature, inputs.normalize)
    if kept != wanted:
        raise ValueError(f"kept: got {kept} bytes, takes 0 or {wanted}")


def _like_losses(x: Tensor, anchors: int) -> Tensor:
    return x.new_empty(anchors, dtype=torch.promote_types(x.dtype, torch.float32))


def _like_nt_xent(inputs: NTXent, kept: int, backend: str) -> tuple[Tensor, Tensor]:
    check_nt_xent(inputs)
    z0 = inputs.z0
    return _like_losses(z0, 2 * z0.shape[0]), z0.new_empty(kept, dtype=torch.uint8)


def _like_nt_xent_backward(
    inputs: NTXent, gradient: LossGradient, similarities: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    _check_nt_xent_backward(inputs, gradient, similarities)
    return inputs.z0.new_empty(inputs.z0.shape), inputs.z1.new_empty(inputs.z1.shape)


def _like_info_nce(inputs: InfoNCE, backend: str) -> Tensor:
    check_info_nce(inputs)
    return _like_losses(inputs.query, inputs.query.shape[0])


def _like_info_nce_backward(
    inputs: InfoNCE, gradient: LossGradient, need_query: bool, need_key: bool, backend: str
) -> tuple[Tensor, Tensor]:
    _check_info_nce_backward(inputs, gradient)
    query, key = inputs.query, inputs.key
    return query.new_empty(query.shape if need_query else 0), key.new_empty(key.shape if need_key else 0)


def _like_info_nce_detached(inputs: InfoNCE, backend: str) -> tuple[Tensor, Tensor]:
    check_info_nce(inputs)
    loss = _like_losses(inputs.query, inputs.query.shape[0])
    return loss, loss.new_empty(inputs.query.shape)


_nt_xent_op = Operator(_nt_xent, _like_nt_xent)
_nt_xent_backward_op = Operator(_nt_xent_backward, _like_nt_xent_backward)
_info_nce_op = Operator(_info_nce, _like_info_nce)
_info_nce_backward_op = Operator(_info_nce_backward, _like_info_nce_backward)
_info_nce_detached_op = Operator(_info_nce_detached, _like_info_nce_detached)


# ---------------------------------------------------------------- their gradients


def _save_nt_xent(ctx: Any, output: tuple[Tensor, Tensor], inputs: NTXent, kept: int, backend: str) -> None:
    ctx.backend = backend
    save_arguments(ctx, inputs, *output)


def _nt_xent_gradient(ctx: Any, weight: Tensor, _: None) -> tuple[Tensor, Tensor]:
    inputs, loss, similarities = saved_arguments(ctx)
    return _nt_xent_backward_op(inputs, LossGradient(weight, loss), similarities, ctx.backend)


def _save_info_nce(ctx: Any, output: Tensor, inputs: InfoNCE, backend: str) -> None:
    ctx.backend = backend
    save_arguments(ctx, inputs, output)


def _info_nce_gradient(ctx: Any, weight: Tensor) -> tuple[Tensor | None, Tensor | None]:
    inputs, loss = saved_arguments(ctx)
    need_query, need_key, *_ = ctx.needs_input_grad
    gradient = LossGradient(weight, loss)
    d_query, d_key = _info_nce_backward_op(inputs, gradient, need_query, need_key, ctx.backend)
    return d_query if need_query else None, d_key if need_key else None


def _save_detached_gradient(ctx: Any, output: tuple[Tensor, Tensor], inputs: InfoNCE, backend: str) -> None:
    ctx.dtype = inputs.query.dtype
    ctx.save_for_backward(output[1])


def _detached_gradient(ctx: Any, weight: Tensor, _: None) -> tuple[Tensor]:
    (gradient,) = ctx.saved_tensors
    return (differentiable_once("info_nce", (weight[:, None] * gradient).to(ctx.dtype)),)


_nt_xent_op.differentiable(_save_nt_xent, _nt_xent_gradient)
_info_nce_op.differentiable(_save_info_nce, _info_nce_gradient)
_info_nce_detached_op.differentiable(_save_detached_gradient, _detached_gradient)


# ---------------------------------------------------------------- the functions


def nt_xent(
    z0: Tensor,  # (T, D)
    z1: Tensor,  # (T, D)
    *,
    temperature: float,
    image: Tensor | None = None,  # (T,)
    valid: Tensor | None = None,  # (T,)
    reduction: str = "mean",
    normalize: bool = True,
    memory_budget: int = 0,
    backend: str = "auto",
) -> Tensor:
    """The symmetric contrastive loss between two views, with negatives from other images only.

    With Z = [z0; z1], s(a, b) = <a, b> / (|a| |b| temperature) and p(a) the same row of the other view, anchor a has

        loss(a) = -log e^s(a,p(a)) / ( e^s(a,p(a)) + sum over rows b of both views, image(b) != image(a), of e^s(a,b) )

    A row without negatives has loss 0 and no gradient. A row shorter than 1e-12 has no direction: it is
    as unlike every row as one at right angles, and has no gradient. NaN or Inf in a row that takes part makes NaN of
    its own loss and of that of every anchor whose positive or negative it is, and may of any row's gradient.
    Differentiable once, in z0 and z1, in reverse mode. Never synchronizes with the device.

    Args:
        z0, z1: (T, D) float32, bfloat16, float16 or float64, both alike; row t of each is a positive pair.
        temperature: finite and positive, a number; no gradient is taken in it.
        image: (T,) integers, the source image of each row, in any order. None: every row is its own image, which
            makes all other rows negatives (classic SimCLR).
        valid: (T,) bool; a False row takes no part in either view, as anchor, positive or negative, whatever it holds:
            its gradient is exactly 0. None: all take part.
        reduction: "mean" over the anchors that take part (0 if none does), "sum", or "none".
        normalize: divide each row by max(|row|, 1e-12). False: the rows are taken as they are.
        memory_budget: bytes that the similarities may take from the forward to the backward pass. Where they fit (about
            8 T^2 bytes in float32), the backward pass doesn't compute them again: 3 units of work in all, not 4.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        A scalar, or (2T,) with the anchors of z0 first for "none"; float32, or float64 for float64 inputs.

    Raises:
        TypeError: an argument is not a tensor or a number, or has another dtype than it takes.
        ValueError: a shape, device, temperature, reduction or backend that is not taken.
        RuntimeError: the backend asked for can't run here.

    Source: NT-Xent of SimCLR (arXiv 2002.05709, eq. 1), patch-wise as in SER (arXiv 2603.06693).

    Example:
        >>> tokens0, tokens1 = torch.randn(2, 6, 32, requires_grad=True)
        >>> loss = nt_xent(tokens0, tokens1, temperature=0.3, image=torch.tensor([0, 0, 0, 1, 1, 1]))
        >>> loss.backward()
    """
    _check_rows("z0", z0)
    _check_rows("z1", z1)
    _check_alike("z1", z1, "z0", z0)
    if z1.shape != z0.shape:
        raise ValueError(f"z1: got shape {tuple(z1.shape)}, takes that of z0, {tuple(z0.shape)}")
    _check_options(temperature, reduction)
    if not isinstance(memory_budget, int):
        raise TypeError(f"memory_budget: got {type(memory_budget).__name__}, takes a whole number of bytes")
    if memory_budget < 0:
        raise ValueError(f"memory_budget: got {memory_budget}, takes 0 or a number of bytes")
    _check_vector("image", image, _INTEGERS, z0)
    _check_vector("valid", valid, (torch.bool,), z0)
    name = choose("nt_xent", backend, z0)

    if image is None:
        image = torch.arange(z0.shape[0], device=z0.device)
    if valid is None:
        valid = torch.ones(z0.shape[0], dtype=torch.bool, device=z0.device)
    kept = 0
    if memory_budget and torch.is_grad_enabled() and (z0.requires_grad or z1.requires_grad):
        wanted = implementation(name).kept_bytes(z0.shape[0], z0.dtype, float(temperature), normalize)
        kept = wanted if wanted <= memory_budget else 0
    loss, _ = _nt_xent_op(NTXent(z0, z1, image.long(), valid, float(temperature), normalize), kept, name)
    return _reduce(loss, 2 * valid.sum(), reduction)


def info_nce(
    query: Tensor,  # (T, D)
    key: Tensor,  # (M, D)
    *,
    temperature: float,
    image: Tensor | None = None,  # (T,)
    key_image: Tensor | None = None,  # (M,)
    valid: Tensor | None = None,  # (T,)
    positive: Tensor | None = None,  # (T,)
    key_valid: Tensor | None = None,  # (M,)
    reduction: str = "mean",
    normalize: bool = True,
    backend: str = "auto",
) -> Tensor:
    """The one-directional contrastive loss from queries to keys, with negatives among the keys of other images only.

    With s(a, b) = <a, b> / (|a| |b| temperature) and k+ = key[positive[t]], query t has

        loss(t) = -log e^s(q_t,k+) / ( e^s(q_t,k+) + sum over keys b, key_image(b) != image(t), of e^s(q_t,k_b) )

    A query without negatives has loss 0 and no gradient. A row shorter than 1e-12 has no direction: it is
    as unlike every row as one at right angles, and has no gradient. NaN or Inf in a row that takes part makes NaN of
    its own loss and of that of every query whose positive or negative it is, and may of any row's gradient.
    Differentiable once, in query and key, in reverse mode; where either needs no gradient, none is computed. Never
    synchronizes with the device.

    Args:
        query: (T, D) float32, bfloat16, float16 or float64.
        key: (M, D), dtype and device of query.
        temperature: finite and positive, a number; no gradient is taken in it.
        image: (T,) integers, the source image of each query. None: every query is its own image, whose one key is its
            positive; all other keys are negatives.
        key_image: (M,) integers, the source image of each key. None: that of the queries, which then needs M = T.
            A positive is meant to be of its query's image: one of another image counts as a negative, too.
        valid: (T,) bool; a False query takes no part, whatever it holds: its gradient is 0. None: all take part.
        positive: (T,) integers, the row of key that is each query's positive; read only where valid. None: the same
            row, which needs M >= T. Its range is checked on the CPU only (elsewhere that would wait for the device) and
            not under torch.compile.
        key_valid: (M,) bool; a False key takes no part, nor does a query whose positive it is. None: `valid` if
            positive is None and M = T, otherwise all take part.
        reduction: "mean" over the queries that take part (0 if none does), "sum", or "none".
        normalize: divide each row by max(|row|, 1e-12). False: the rows are taken as they are.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        A scalar, or (T,) for "none"; float32, or float64 for float64 inputs.

    Raises:
        TypeError: an argument is not a tensor or a number, or has another dtype than it takes.
        ValueError: a shape, device, temperature, reduction, positive or backend that is not taken.
        RuntimeError: the backend asked for can't run here.

    Source: InfoNCE (arXiv 1807.03748, eq. 4), patch-wise as in SER (arXiv 2603.06693).

    Example:
        >>> tokens, momentum_tokens = torch.randn(6, 32, requires_grad=True), torch.randn(6, 32)
        >>> loss = info_nce(tokens, momentum_tokens, temperature=0.5, image=torch.tensor([0, 0, 0, 1, 1, 1]))
        >>> loss.backward()
    """
    _check_rows("query", query)
    _check_rows("key", key)
    _check_alike("key", key, "query", query)
    rows, keys = query.shape[0], key.shape[0]
    if key.shape[1] != query.shape[1]:
        raise ValueError(f"key: got {key.shape[1]} columns, takes those of query, {query.shape[1]}")
    if positive is None and keys < rows:
        raise ValueError(f"key: got {keys} rows for {rows} of query, takes at least as many unless positive is given")
    if keys == 0 and rows > 0:
        raise ValueError(f"key: got no rows for {rows} of query, takes at least one")
    _check_options(temperature, reduction)
    _check_vector("image", image, _INTEGERS, query)
    _check_vector("key_image", key_image, _INTEGERS, key)
    if image is None and key_image is not None:
        raise ValueError("key_image: got a tensor without image, takes both or neither")
    if image is not None and key_image is None and keys != rows:
        raise ValueError(f"key_image: got None with image and {keys} keys for {rows} queries, takes a ({keys},) tensor")
    _check_vector("valid", valid, (torch.bool,), query)
    _check_vector("key_valid", key_valid, (torch.bool,), key)
    _check_vector("positive", positive, _INTEGERS, query)
    name = choose("info_nce", backend, query)

    if key_valid is None:
        if valid is not None and positive is None and keys == rows:
            key_valid = valid
        else:
            key_valid = torch.ones(keys, dtype=torch.bool, device=key.device)
    if valid is None:
        valid = torch.ones(rows, dtype=torch.bool, device=query.device)
    if positive is None:
        positive = torch.arange(rows, device=query.device)
    else:
        positive = positive.long().masked_fill(~valid, 0)
        # Values are looked at where that waits for no device, and where there are some: not in fake tensors.
        known = positive.device.type == "cpu" and type(positive) is Tensor and not torch.compiler.is_compiling()
        if known and ((positive < 0) | (positive >= keys)).any():
            raise ValueError(f"positive: got rows {positive.min()} to {positive.max()}, takes 0 to {keys - 1}")
    if image is None:
        # One key is of query t's image, its positive; queries that share a positive are of one image.
        image, key_image = positive, torch.arange(keys, device=key.device)
    elif key_image is None:
        key_image = image
    anchors = valid & key_valid[positive]
    inputs = InfoNCE(
        query, key, image.long(), key_image.long(), anchors, key_valid, positive, float(temperature), normalize
    )
    if torch.is_grad_enabled() and query.requires_grad and not key.requires_grad:
        loss, _ = _info_nce_detached_op(inputs, name)
    else:
        loss = _info_nce_op(inputs, name)
    return _reduce(loss, anchors.sum(), reduction)


def _check_rows(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}, takes a tensor")
    if x.dtype not in FLOATS:
        raise TypeError(f"{name}: got {x.dtype}, takes float32, bfloat16, float16 or float64")
    require_dense(name, x)
    if x.dim() != 2 or x.shape[1] == 0:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, takes rows and at least one column")


def _check_alike(name: str, x: Tensor, other: str, y: Tensor) -> None:
    if x.dtype != y.dtype:
        raise TypeError(f"{name}: got {x.dtype}, takes that of {other}, {y.dtype}")
    if x.device != y.device:
        raise ValueError(f"{name}: got device {x.device}, takes that of {other}, {y.device}")


def _check_options(temperature: float, reduction: str) -> None:
    if not isinstance(temperature, (int, float)) and not isinstance(temperature, Real):  # numpy's scalars are Real
        learned = ", which has no gradient here" if isinstance(temperature, Tensor) else ""
        raise TypeError(f"temperature: got {type(temperature).__name__}, takes a number{learned}")
    check_temperature(temperature)
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction: got {reduction!r}, takes one of {', '.join(map(repr, _REDUCTIONS))}")


def _check_vector(name: str, x: Tensor | None, dtypes: tuple[torch.dtype, ...], rows: Tensor) -> None:
    if x is None:
        return
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}, takes a tensor or None")
    if x.dtype not in dtypes:
        raise TypeError(f"{name}: got {x.dtype}, takes one of {', '.join(map(str, dtypes))}")
    require_dense(name, x)
    if x.dim() != 1 or x.shape[0] != rows.shape[0]:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, takes ({rows.shape[0]},)")
    if x.device != rows.device:
        raise ValueError(f"{name}: got device {x.device}, takes that of the rows, {rows.device}")


def _reduce(loss: Tensor, anchors: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return loss
    total = loss.sum()
    return total if reduction == "sum" else total / anchors.clamp(min=1)
