"""The oracle: every operation in plain PyTorch, written like its formula, on any device.

It stores what the kernels never store (resampling matrices, similarity matrices) and is what they are tested against.
"""

import torch
from torch import Tensor

from ser_fast.interpolation import axis_weights
from ser_fast.lattice import positions, usable
from ser_fast.ops.contract import GroupAction, InfoNCE, LossGradient, NTXent

# ---------------------------------------------------------------- group_action


def resampling_matrix(action: GroupAction) -> Tensor:
    """W_g: (B, h*w, H*W) float64. W[o, (i, j)] = W_y[o, i] W_x[o, j], each row of the two from one axis.

    On each axis the kernel's step is the length of that row of `linear`: how far the preimage of a token reaches along
    the axis.
    """
    linear, offset = action.linear, action.offset
    taken = usable(linear, offset)  # (B,); the others take nothing
    linear, offset = linear.where(taken[:, None, None], 0), offset.where(taken[:, None], 0)
    y, x = positions(linear, offset, action.size_in, action.size_out)  # (B, h*w)
    step = linear.norm(dim=-1)  # (B, 2)
    exact = ((linear == 0) | (linear.abs() == 1)).flatten(1).all(-1) & (step == 1).all(-1)
    rows, columns = (
        axis_weights(
            position,
            step[:, axis],
            exact,
            action.size_in[axis],
            interpolation=action.interpolation,
            padding=action.padding,
            antialias=action.antialias,
        )
        for axis, position in enumerate((y, x))
    )
    return (rows[:, :, :, None] * columns[:, :, None, :]).flatten(2).where(taken[:, None, None], 0)


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


def group_action(x: Tensor, action: GroupAction) -> Tensor:
    """(B, H*W, C) to (B, h*w, C):  out = W_g x."""
    return _apply(resampling_matrix(action), x)


def group_action_transpose(x: Tensor, action: GroupAction) -> Tensor:
    """(B, h*w, C) to (B, H*W, C):  out = W_g^T x."""
    return _apply(resampling_matrix(action).mT, x)


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


def info_nce(inputs: InfoNCE) -> Tensor:  # (T,)
    q = _normalized(_participants(inputs.query, inputs.valid), inputs.normalize)
    k = _normalized(_participants(inputs.key, inputs.key_valid), inputs.normalize)
    s = q @ k.T / inputs.temperature  # (T, M)
    s_positive = (q * k.index_select(0, inputs.positive)).sum(1) / inputs.temperature  # (T,)
    s_negative = s.masked_fill(~_negatives(inputs), -torch.inf).logsumexp(1)  # (T,)
    return torch.logaddexp(s_negative - s_positive, torch.zeros_like(s_positive))


def info_nce_backward(
    inputs: InfoNCE, gradient: LossGradient, need_query: bool, need_key: bool
) -> tuple[Tensor, Tensor]:  # (T, D) and (M, D)
    query, key, _, _, valid, key_valid, positive, temperature, normalize = inputs
    x, y = _participants(query, valid), _participants(key, key_valid)
    q, k = _normalized(x, normalize), _normalized(y, normalize)
    s = q @ k.T / temperature  # (T, M)
    s_positive = (q * k.index_select(0, positive)).sum(1) / temperature  # (T,)

    weight, loss, s_positive = gradient.weight[:, None], gradient.loss[:, None], s_positive[:, None]  # (T, 1)
    is_positive = positive[:, None] == torch.arange(len(key), device=key.device)  # (T, M)
    g = torch.where(_negatives(inputs), weight * torch.exp(s - s_positive - loss), 0)  # (T, M)
    g = g + torch.where(is_positive, weight * torch.expm1(-loss), 0)

    d_query, d_key = query.new_empty(0), key.new_empty(0)
    if need_query:
        d_x = _normalized_backward(g @ k / temperature, q, x, normalize)
        d_query = torch.where(valid[:, None], d_x, 0).to(query.dtype)
    if need_key:
        d_y = _normalized_backward(g.T @ q / temperature, k, y, normalize)
        d_key = torch.where(key_valid[:, None], d_y, 0).to(key.dtype)
    return d_query, d_key


def info_nce_detached(inputs: InfoNCE) -> tuple[Tensor, Tensor]:  # (T,) and (T, D)
    inputs = inputs._replace(query=_upcast(inputs.query), key=_upcast(inputs.key))
    loss = info_nce(inputs)
    gradient, _ = info_nce_backward(inputs, LossGradient(torch.ones_like(loss), loss), True, False)
    return loss, gradient


def kept_bytes(rows: int, dtype: torch.dtype, temperature: float, normalize: bool) -> int:
    return 0


def nt_xent(inputs: NTXent, similarities: Tensor) -> Tensor:  # (2T,)
    return info_nce(_both_views(inputs))


def nt_xent_backward(
    inputs: NTXent, gradient: LossGradient, similarities: Tensor
) -> tuple[Tensor, Tensor]:  # (T, D) twice
    as_query, as_key = info_nce_backward(_both_views(inputs), gradient, need_query=True, need_key=True)
    d_z0, d_z1 = (as_query + as_key).to(inputs.z0.dtype).tensor_split(2)
    return d_z0.clone(), d_z1.clone()  # an op's outputs share no memory


def _both_views(inputs: NTXent) -> InfoNCE:
    """nt_xent is info_nce with Z = [z0; z1] as the queries and as the keys, row t and row t + T positives."""
    z = _upcast(torch.cat([inputs.z0, inputs.z1]))  # (2T, D); a row's gradients are summed before they are rounded
    image, valid = inputs.image.repeat(2), inputs.valid.repeat(2)  # (2T,)
    positive = torch.arange(len(z), device=z.device).roll(len(inputs.z0))  # (2T,)
    return InfoNCE(z, z, image, image, valid, valid, positive, inputs.temperature, inputs.normalize)


def _negatives(inputs: InfoNCE) -> Tensor:  # (T, M)
    return (inputs.image[:, None] != inputs.key_image) & inputs.valid[:, None] & inputs.key_valid


def _upcast(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _participants(x: Tensor, valid: Tensor) -> Tensor:  # (T, D)
    """The rows in at least float32: 0 where they are masked out, NaN where they hold an Inf (an Inf could vanish)."""
    x = _upcast(x)
    x = torch.where(x.isfinite(), x, torch.nan)
    return torch.where(valid[:, None], x, 0)


def _lengths(x: Tensor) -> tuple[Tensor, Tensor]:  # (T, 1) twice
    """|x| = scale * length, by factors that are safe to square: length >= 1 unless |x| < EPS, where scale is EPS."""
    scale = x.abs().amax(1, keepdim=True).clamp(min=EPS)
    return scale, torch.linalg.vector_norm(x / scale, dim=1, keepdim=True)


def _normalized(x: Tensor, normalize: bool) -> Tensor:  # (T, D)
    """u = x / max(|x|, EPS)."""
    if not normalize:
        return x
    scale, length = _lengths(x)
    return x / scale / length.clamp(min=1)


def _normalized_backward(d_u: Tensor, u: Tensor, x: Tensor, normalize: bool) -> Tensor:  # (T, D)
    """dx = (du - u <u, du>) / |x|, and 0 where |x| < EPS: a row without a direction has no gradient."""
    if normalize:
        scale, length = _lengths(x)
        radial = (u * d_u).sum(1, keepdim=True)  # (T, 1)
        d_u = torch.where(length < 1, 0, (d_u - u * radial) / scale / length.clamp(min=1))
    return d_u
