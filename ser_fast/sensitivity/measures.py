"""The measures, each for one element g and several resamplings at once, with bootstrapped intervals over images.

relative_error   sqrt( sum |rho(g) f(x) - f(gx)|^2 / sum |f(gx) - m|^2 ),  m the mean token of f(gx)
difference       relative_error less that of the default resampling, on the same resampled images
aligned_cosine   the mean cosine of rho(g) f(x) and f(gx), each less its mean token
retrieval        how often a token of f(gx) finds its own among rho(g) f(x), by cosine; default resampling only,
                 beside `chance`, for it is a control of the features and not of the kernel
composition      |rho(g) rho(g) x - rho(gg) x|, relative as above: the element applied twice, and once
round_trip       |rho(g^-1) rho(g) x - x|, relative as above
adjoint_defect   mean |<rho x, y> - <x, rho^T y>| / mean |rho x| |y|,  y white noise
dc_gain          the mean row sum of rho(g): what becomes of a constant
noise_gain       the mean row energy of rho(g): the variance that unit white noise keeps
response         Re of the gain of a wave along x at its true place, cycles a token, far from the borders
time             that of rho(g), over that of a copy of the same tokens
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ser_fast.evaluation.token_errors import NO_VARIANCE, retrieval_sums, token_sums
from ser_fast.lattice import LatticeMap, Size, positions
from ser_fast.sensitivity.factors import DEFAULT, ELEMENTS, Resampling, common_valid

FREQUENCIES = tuple(step / 40 for step in range(21))  # cycles a token, up to Nyquist's 1/2
RESPONSE_LATTICE = (36, 36)  # the reach of every kernel, stretched twice, leaves an interior
_REACH = 3 * 2 + 1  # tokens: that of lanczos3, stretched by the smallest scale
_TIMED = (32, 192)  # images and channels of the tokens that are timed
_REPEATS = 40
_LEVEL = 0.95


class Estimate(NamedTuple):
    """One measured number: of a resampling, at a layer (from 1; 0: no tokens), and for the response at a frequency."""

    resampling: Resampling
    layer: int
    measure: str
    value: float
    low: float
    high: float
    images: int
    frequency: float | None = None


# ---------------------------------------------------------------- bootstrap


def bootstrap_counts(images: int, *, resamples: int = 1000, seed: int = 0) -> Tensor:
    """(1 + R, N) float64: how often each image is drawn, in the sample itself (once each) and in R resamples of it."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(images, (resamples, images), generator=generator)
    counts = torch.zeros(resamples, images, dtype=torch.float64)
    counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
    return torch.cat([torch.ones(1, images, dtype=torch.float64), counts])


def ratios(numerator: Tensor, denominator: Tensor, counts: Tensor) -> Tensor:
    """(..., 1 + R) the ratio of two sums over images (..., N), in the sample and in each resample; 0 / 0 is nan."""
    return (numerator @ counts.mT) / (denominator @ counts.mT)


def interval(resampled: Tensor) -> Tensor:
    """(..., 3) the value of statistics (..., 1 + R) and the bounds of their central 95 %.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, the percentile interval.
    """
    tails = resampled.new_tensor([(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    bounds = torch.quantile(resampled[..., 1:], tails, dim=-1)  # (2, ...)
    return torch.stack([resampled[..., 0], *bounds], -1)


def _relative_error(sums: Tensor, counts: Tensor) -> Tensor:
    """(1 + R,) from the `token_sums` (N, 4); nan where the target hardly varies."""
    error, variance, energy = sums.cpu().mT[:3]
    if variance.sum() <= NO_VARIANCE * energy.sum():
        variance = torch.full_like(variance, math.nan)
    return ratios(error, variance, counts).sqrt()


def _sums(moved: Tensor, target: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """token_sums (N, 4) of tokens (N, n, C), and what they and retrieval_sums are computed from."""
    moved, target = moved.double(), target.double()
    tokens = moved, target, moved.mean((0, 1)), target.mean((0, 1))
    return token_sums(*tokens), tokens


# ---------------------------------------------------------------- on signals


def equivariance(
    before: Sequence[Tensor], after: Sequence[Tensor], g: LatticeMap, resamplings: Sequence[Resampling], *, seed: int
) -> list[Estimate]:
    """rho(g) f(x) against f(g x): relative_error, difference, aligned_cosine, retrieval and chance, for each layer.

    Args:
        before, after: f(x) (N, H, W, C) and f(g x) (N, h, w, C) of each layer.
        g: one map.
        resamplings: of rho.
        seed: of the bootstrap; the same one draws the same images, whatever is measured.
    """
    g = g.to(before[0].device)
    valid = common_valid(g).unflatten(0, g.size_out)  # (h, w)
    images, tokens = len(before[0]), int(valid.sum())
    counts = bootstrap_counts(images, seed=seed)
    estimates = []
    for layer, (x, y) in enumerate(zip(before, after, strict=True), start=1):
        error: dict[Resampling, Tensor] = {}
        for resampling in dict.fromkeys((DEFAULT.resampling, *resamplings)):
            sums, pair = _sums(resampling(x, g)[:, valid], y[:, valid])
            error[resampling] = _relative_error(sums, counts)
            if resampling not in resamplings:
                continue
            undefined = error[resampling][0].isnan()
            share = torch.full((images,), math.nan if undefined else tokens, dtype=torch.float64)
            measured = {
                "relative_error": error[resampling],
                "difference": error[resampling] - error[DEFAULT.resampling],
                "aligned_cosine": ratios(sums[:, 3].cpu(), share, counts),
            }
            if resampling == DEFAULT.resampling:
                moved, target, *means = pair
                hits = [retrieval_sums(moved[i : i + 1], target[i : i + 1], *means)[:, 0] for i in range(images)]
                measured["retrieval"] = ratios(torch.cat(hits).cpu(), share, counts)
                measured["chance"] = torch.full_like(measured["retrieval"], 1 / tokens)
            estimates += _estimates(resampling, layer, measured, images)
    return estimates


def algebra(before: Sequence[Tensor], element: str, resamplings: Sequence[Resampling], *, seed: int) -> list[Estimate]:
    """What rho owes to being a representation, on tokens f(x): composition, round_trip and adjoint_defect.

    Args:
        before: f(x) (N, H, W, C) of each layer.
        element: the name of g; it is built on the lattice of f(x), and on that of g x.
        resamplings: of rho.
        seed: of the noise and of the bootstrap.
    """
    device, size = before[0].device, (before[0].shape[1], before[0].shape[2])
    first = ELEMENTS[element].build(size).to(device)
    second = ELEMENTS[element].build(first.size_out).to(device)
    both, back = second @ first, first.inverse()
    valid_both = common_valid(both, second).unflatten(0, both.size_out)
    valid_back = common_valid(back).unflatten(0, size)
    generator = torch.Generator().manual_seed(seed)
    counts = bootstrap_counts(len(before[0]), seed=seed)
    estimates = []
    for layer, x in enumerate(before, start=1):
        noise = torch.randn(len(x), *first.size_out, x.shape[-1], generator=generator).to(x)
        for resampling in resamplings:
            moved = resampling(x, first)
            twice, once = resampling(moved, second), resampling(x, both)
            measured = {
                "composition": _relative_error(_sums(twice[:, valid_both], once[:, valid_both])[0], counts),
                "round_trip": _relative_error(
                    _sums(resampling(moved, back)[:, valid_back], x[:, valid_back])[0], counts
                ),
                "adjoint_defect": ratios(*_adjoint_defect(x, noise, first, resampling), counts),
            }
            estimates += _estimates(resampling, layer, measured, len(x))
    return estimates


def _adjoint_defect(x: Tensor, y: Tensor, g: LatticeMap, resampling: Resampling) -> tuple[Tensor, Tensor]:
    """|<rho x, y> - <x, rho^T y>| and |rho x| |y| of each sample, (N,) float64; rho^T is what backward computes."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        moved = resampling(leaf, g)
        (transposed,) = torch.autograd.grad(moved, leaf, y)
    x, y, moved, transposed = (t.detach().flatten(1).double().cpu() for t in (x, y, moved, transposed))
    return ((moved * y).sum(1) - (x * transposed).sum(1)).abs(), moved.norm(dim=1) * y.norm(dim=1)


def _estimates(resampling: Resampling, layer: int, measured: Mapping[str, Tensor], images: int) -> list[Estimate]:
    estimates = []
    for name, resampled in measured.items():
        value, low, high = interval(resampled).tolist()
        estimates.append(Estimate(resampling, layer, name, value, low, high, images))
    return estimates


# ---------------------------------------------------------------- on the operator itself


def operator(lattice: Size, element: str, resamplings: Sequence[Resampling]) -> list[Estimate]:
    """dc_gain and noise_gain, means over the tokens whose preimage lies in the lattice (H, W)."""
    g = ELEMENTS[element].build(lattice)
    valid = common_valid(g)
    estimates = []
    for resampling in resamplings:
        rows = _matrix(g, resampling)[valid]
        gains = {"dc_gain": rows.sum(1).mean(), "noise_gain": rows.square().sum(1).mean()}
        estimates += [_exact(resampling, name, float(gain)) for name, gain in gains.items()]
    return estimates


def response(element: str, resamplings: Sequence[Resampling]) -> list[Estimate]:
    """Re mean_o sum_i W_oi e^{2 pi i f (x_i - p_o)} at each frequency f, p_o where token o truly comes from.

    1 is a wave kept, less is one damped or displaced; the mean is over the tokens far from the borders of a lattice
    that is large enough, so that neither padding nor lattice counts.
    """
    g = ELEMENTS[element].build(RESPONSE_LATTICE)
    y, x = (p[0] for p in positions(g.linear, g.offset, g.size_in, g.size_out))
    height, width = g.size_in
    inner = (y > _REACH) & (y < height - _REACH) & (x > _REACH) & (x < width - _REACH)  # (h*w,)
    # The wave does not change along y: each row of rho(g) is summed over it.
    distance = torch.arange(width, dtype=torch.float64) + 0.5 - x[inner, None]  # (n, W)
    waves = [(2 * math.pi * frequency * distance).cos() for frequency in FREQUENCIES]
    estimates = []
    for resampling in resamplings:
        rows = _matrix(g, resampling)[inner].unflatten(1, g.size_in).sum(1)  # (n, W)
        for frequency, wave in zip(FREQUENCIES, waves, strict=True):
            gain = float((rows * wave).sum(1).mean())
            estimates.append(_exact(resampling, "response", gain, frequency))
    return estimates


def _matrix(g: LatticeMap, resampling: Resampling) -> Tensor:
    """(h*w, H*W) float64, rho(g) as it acts on the unit vectors."""
    height, width = g.size_in
    unit = torch.eye(height * width, dtype=torch.float64).reshape(1, height, width, -1)
    return resampling(unit, g)[0].flatten(0, 1)


def _exact(resampling: Resampling, measure: str, value: float, frequency: float | None = None) -> Estimate:
    return Estimate(resampling, 0, measure, value, value, value, 0, frequency)


# ---------------------------------------------------------------- time


def cost(lattice: Size, element: str, resamplings: Sequence[Resampling], device: torch.device) -> list[Estimate]:
    """time: the fastest of some repeats, over the fastest copy; its upper bound is the slowest repeat."""
    images, channels = _TIMED
    g = ELEMENTS[element].build(lattice).to(device)
    x = torch.randn(images, *lattice, channels, device=device)
    estimates = []
    for resampling in resamplings:
        resampling(x, g)  # the first call compiles, loads or allocates
        # In turns, so that whatever else the machine does slows both.
        turns = [(time_once(resampling, x, g), time_once(copy_tokens, x, g)) for _ in range(_REPEATS)]
        copy = min(seconds for _, seconds in turns)
        taken = [seconds / copy for seconds, _ in turns]
        estimates.append(Estimate(resampling, 0, "time", min(taken), min(taken), max(taken), images))
    return estimates


def copy_tokens(x: Tensor, g: LatticeMap) -> Tensor:
    """What the time of rho(g) x is relative to."""
    return x.clone()


def time_once(run: Callable[[Tensor, LatticeMap], Tensor], x: Tensor, g: LatticeMap) -> float:
    """The seconds that one run takes, on the device that x is on."""
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    begin = time.perf_counter()
    run(x, g)
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter() - begin
