"""The oracle: every operation in plain PyTorch, written like its formula, on any device.

It stores what the kernels never store (resampling matrices, similarity matrices) and is what they are tested against.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ser_fast.interpolation import axis_weights
from ser_fast.lattice import positions

# ---------------------------------------------------------------- group_action


def resampling_matrix(
    linear: Tensor,
    offset: Tensor,
    size_in: Sequence[int],
    size_out: Sequence[int],
    interpolation: str,
    padding: str,
    antialias: bool,
) -> Tensor:
    """W_g: (B, h*w, H*W) float64. W[o, (i, j)] = W_y[o, i] W_x[o, j], each row of the two from one axis.

    linear (B, 2, 2) and offset (B, 2) are a LatticeMap's. On each axis the kernel's step is the length of that row of
    `linear`: how far the preimage of a token reaches along the axis.
    """
    y, x = positions(linear, offset, size_in, size_out)  # (B, h*w)
    step = linear.norm(dim=-1)  # (B, 2)
    exact = ((linear == 0) | (linear.abs() == 1)).flatten(1).all(-1) & (step == 1).all(-1)
    rows, columns = (
        axis_weights(
            position,
            step[:, axis],
            exact,
            size_in[axis],
            interpolation=interpolation,
            padding=padding,
            antialias=antialias,
        )
        for axis, position in enumerate((y, x))
    )
    return (rows[:, :, :, None] * columns[:, :, None, :]).flatten(2)


def _apply(weights: Tensor, x: Tensor) -> Tensor:
    """W x per sample, (B, R, N) and (B, N, C) to (B, R, C); a row with a single weight of 1 copies bit for bit."""
    if x.shape[1] == 0:
        return x.new_zeros(weights.shape[0], weights.shape[1], x.shape[2])
    accumulate = torch.promote_types(x.dtype, torch.float32)
    blended = (weights.to(accumulate) @ x.to(accumulate)).to(x.dtype)
    used = weights != 0
    copied = (used.sum(-1) == 1) & (weights.sum(-1) == 1)  # (B, R)
    sample, source = torch.arange(x.shape[0], device=x.device)[:, None], used.int().argmax(-1)
    # A product would turn -0 into 0, and 0 x Inf into NaN; `gather` on CPU rewrites the bits of a bfloat16 NaN.
    out = torch.where(copied[..., None], x[sample, source], blended)
    return torch.where(used.any(-1)[..., None], out, torch.zeros_like(out))


def group_action(
    x: Tensor,
    linear: Tensor,
    offset: Tensor,
    size_in: Sequence[int],
    size_out: Sequence[int],
    interpolation: str,
    padding: str,
    antialias: bool,
) -> Tensor:
    """(B, H*W, C) to (B, h*w, C):  out = W_g x."""
    return _apply(resampling_matrix(linear, offset, size_in, size_out, interpolation, padding, antialias), x)


def group_action_transpose(
    x: Tensor,
    linear: Tensor,
    offset: Tensor,
    size_in: Sequence[int],
    size_out: Sequence[int],
    interpolation: str,
    padding: str,
    antialias: bool,
) -> Tensor:
    """(B, h*w, C) to (B, H*W, C):  out = W_g^T x."""
    weights = resampling_matrix(linear, offset, size_in, size_out, interpolation, padding, antialias)
    return _apply(weights.mT, x)


# ---------------------------------------------------------------- nt_xent and info_nce
#
# Dense, and exact in the precision it accumulates in.
#
# With unit rows q_t, k_b, the positive p(t) of anchor t and its negatives N(t), the keys of other images:
#
#     s_tb   = <q_t, k_b> / temperature
#     loss_t = -log( e^s_tp / (e^s_tp + sum_{b in N(t)} e^s_tb) ) = log(1 + e^x),  x = logsumexp_{b in N(t)} s_tb - s_tp
#
# An anchor without negatives has x = -inf: its loss and every derivative below are exactly 0. The gradient of
# sum_t weight_t loss_t follows from
#
#     G_tb = d / d s_tb = weight_t e^(s_tb - s_tp - loss_t)   for b in N(t)        (the softmax)
#     G_tp              = weight_t (e^-loss_t - 1)                                 (minus the sum of the row's others)
#     dq = G k / temperature,   dk = G^T q / temperature

EPS = 1e-12  # the least length that a row is divided by, as in torch.nn.functional.normalize


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
    q = embed(participants(query, valid), normalize)
    k = embed(participants(key, key_valid), normalize)
    s = q @ k.T / temperature  # (T, M)
    s_positive = (q * k[positive]).sum(1) / temperature  # (T,)
    s_negative = s.masked_fill(~_negatives(image, key_image, valid, key_valid), -torch.inf).logsumexp(1)  # (T,)
    return torch.logaddexp(s_negative - s_positive, torch.zeros_like(s_positive))


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
    x, y = participants(query, valid), participants(key, key_valid)
    q, k = embed(x, normalize), embed(y, normalize)
    s = q @ k.T / temperature  # (T, M)
    s_positive = (q * k[positive]).sum(1) / temperature  # (T,)

    weight, loss, s_positive = weight[:, None], loss[:, None], s_positive[:, None]  # (T, 1)
    negative = _negatives(image, key_image, valid, key_valid)  # (T, M)
    is_positive = positive[:, None] == torch.arange(len(key), device=key.device)  # (T, M)
    g = torch.where(negative, weight * torch.exp(s - s_positive - loss), 0)  # (T, M)
    g = g + torch.where(is_positive, weight * torch.expm1(-loss), 0)

    d_query, d_key = query.new_empty(0), key.new_empty(0)
    if need_query:
        d_query = torch.where(valid[:, None], embed_backward(g @ k / temperature, q, x, normalize), 0).to(query.dtype)
    if need_key:
        d_key = torch.where(key_valid[:, None], embed_backward(g.T @ q / temperature, k, y, normalize), 0).to(key.dtype)
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
    inputs = (_upcast(query), _upcast(key), image, key_image, valid, key_valid, positive)
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
    return info_nce(*_both_views(z0, z1, image, valid), temperature, normalize)


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
    as_query, as_key = info_nce_backward(
        weight, *_both_views(z0, z1, image, valid), loss, temperature, normalize, need_query=True, need_key=True
    )
    d_z0, d_z1 = (as_query + as_key).to(z0.dtype).tensor_split(2)
    return d_z0.clone(), d_z1.clone()  # an op's outputs share no memory


def _both_views(
    z0: Tensor, z1: Tensor, image: Tensor, valid: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """nt_xent is info_nce with Z = [z0; z1] as the queries and as the keys, row t and row t + T positives."""
    z = _upcast(torch.cat([z0, z1]))  # (2T, D); both gradients of a row are summed before they are rounded
    images, valids = image.repeat(2), valid.repeat(2)  # (2T,)
    partner = torch.arange(len(z), device=z.device).roll(len(z0))  # (2T,)
    return z, z, images, images, valids, valids, partner


def _negatives(image: Tensor, key_image: Tensor, valid: Tensor, key_valid: Tensor) -> Tensor:  # (T, M)
    return (image[:, None] != key_image) & valid[:, None] & key_valid


def _upcast(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def participants(x: Tensor, valid: Tensor | None = None) -> Tensor:  # (T, D)
    """The rows in at least float32: 0 where they take no part, NaN where they hold an Inf (an Inf could vanish)."""
    x = _upcast(x)
    x = torch.where(x.isfinite(), x, torch.nan)
    return x if valid is None else torch.where(valid[:, None], x, 0)


def _lengths(x: Tensor) -> tuple[Tensor, Tensor]:  # (T, 1) twice
    """|x| = scale * length, by factors that are safe to square: length >= 1 unless |x| < EPS, where scale is EPS."""
    scale = x.abs().amax(1, keepdim=True).clamp(min=EPS)
    return scale, torch.linalg.vector_norm(x / scale, dim=1, keepdim=True)


def embed(x: Tensor, normalize: bool) -> Tensor:  # (T, D)
    """u = x / max(|x|, EPS)."""
    if not normalize:
        return x
    scale, length = _lengths(x)
    return x / scale / length.clamp(min=1)


def embed_backward(d_u: Tensor, u: Tensor, x: Tensor, normalize: bool) -> Tensor:  # (T, D)
    """dx = (du - u <u, du>) / |x|, and du / EPS where |x| < EPS."""
    if normalize:
        scale, length = _lengths(x)
        radial = torch.where(length < 1, 0, (u * d_u).sum(1, keepdim=True))  # (T, 1)
        d_u = (d_u - u * radial) / scale / length.clamp(min=1)
    return d_u
