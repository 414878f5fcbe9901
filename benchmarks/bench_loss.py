"""nt_xent, info_nce and SERLoss against the matrix products they can't do without, and against dense losses."""

import copy
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ser_fast import LatticeMap, SERLoss, group_action, info_nce, nt_xent
from ser_fast.ops.backends import implementation

try:
    from lightly.loss import NTXentLoss as LightlyLoss
except ImportError:
    LightlyLoss = None
try:
    from pytorch_metric_learning.losses import NTXentLoss as MetricLearningLoss
except ImportError:
    MetricLearningLoss = None
try:
    from cut_cross_entropy import linear_cross_entropy
except ImportError:
    linear_cross_entropy = None
try:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
except ImportError:
    liger_fused_linear_cross_entropy = None
try:
    from memeff import MemoryEfficientCLIPLoss
except ImportError:
    MemoryEfficientCLIPLoss = None

# torch 2.12 and later: logits of a part of the rows at a time.
torch_linear_cross_entropy = getattr(F, "linear_cross_entropy", None)

Rival = Callable[[Tensor], Tensor]
TEMPERATURE, TOKENS = 0.3, 64  # tokens of an image
DENSE, CUBIC = 20_000, 256  # rows up to which an n x n matrix, and pairs of pairs, are affordable
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def _oracle(z: Tensor, image: Tensor) -> Tensor:
    """The reference a panel of anchors at a time, recomputed for the gradient: any n fits. z (n, D), image (n/2,)."""
    if len(z) > DENSE and z.device.type == "cpu":
        z = z.float()
    images, partner = image.repeat(2), torch.arange(len(z), device=z.device).roll(len(z) // 2)

    def panel(z: Tensor, rows: Tensor) -> Tensor:
        return info_nce(
            z[rows],
            z,
            temperature=TEMPERATURE,
            image=images[rows],
            key_image=images,
            positive=partner[rows],
            reduction="sum",
            backend="reference",
        )

    panels = torch.arange(len(z), device=z.device).split(1024)
    return sum(checkpoint(panel, z, rows, use_reentrant=False) for rows in panels) / len(z)


def _eager(z: Tensor, image: Tensor) -> Tensor:
    """The n x n matrix, masked, and cross_entropy."""
    u = F.normalize(z, dim=1)
    rows, images = torch.arange(len(z), device=z.device), image.repeat(2)
    positive = rows.roll(len(z) // 2)
    kept = (images[:, None] != images) | (rows == positive[:, None])
    return F.cross_entropy((u @ u.mT / TEMPERATURE).masked_fill(~kept, -math.inf), positive)


def _with_itself(z: Tensor) -> Tensor:
    """What losses without a mask compute: every row is a negative, the anchor's own too."""
    u = F.normalize(z, dim=1)
    return F.cross_entropy(u @ u.mT / TEMPERATURE, torch.arange(len(z), device=z.device).roll(len(z) // 2))


def _cut_cross_entropy(z: Tensor) -> Tensor:
    u = F.normalize(z, dim=1)
    return linear_cross_entropy(
        u / TEMPERATURE, u, torch.arange(len(z), device=z.device).roll(len(z) // 2), filter_eps=None
    )


def _liger(z: Tensor) -> Tensor:
    u = F.normalize(z, dim=1)
    return liger_fused_linear_cross_entropy(u / TEMPERATURE, u, torch.arange(len(z), device=z.device).roll(len(z) // 2))


def _torch_chunked(z: Tensor) -> Tensor:
    u = F.normalize(z, dim=1)
    target = torch.arange(len(z), device=z.device).roll(len(z) // 2)
    options = torch.nn.LinearCrossEntropyOptions()
    return torch_linear_cross_entropy(u / TEMPERATURE, u, target, options=options)


class _Chunked(torch.autograd.Function):
    """The mean loss and its gradient in the forward pass, a panel of queries at a time: no matrix is kept.

    Two products where the keys get no gradient, three where they do.
    """

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, image: Tensor, key_image: Tensor, positive: Tensor) -> Tensor:
        d_query = torch.empty_like(query)
        d_key = torch.zeros_like(key) if ctx.needs_input_grad[1] else None
        total = query.new_zeros((), dtype=torch.float32)
        for rows in torch.arange(len(query), device=query.device).split(1024):
            own = torch.arange(len(rows), device=query.device), positive[rows]
            s = (query[rows] @ key.mT).float().div_(TEMPERATURE)
            matched = s[own]
            s.masked_fill_(image[rows, None] == key_image, -math.inf)
            s[own] = matched
            largest = torch.logsumexp(s, 1, keepdim=True)
            total += (largest[:, 0] - matched).sum()
            g = s.sub_(largest).exp_()
            g[own] -= 1
            g = g.div_(TEMPERATURE * len(query)).to(key.dtype)
            d_query[rows] = g @ key
            if d_key is not None:
                d_key.addmm_(g.mT, query[rows])
        ctx.gradients = d_query, d_key
        return (total / len(query)).to(query.dtype)

    @staticmethod
    def backward(ctx, cotangent: Tensor):
        d_query, d_key = ctx.gradients
        return d_query * cotangent, None if d_key is None else d_key * cotangent, None, None, None


def _chunked(z: Tensor, image: Tensor) -> Tensor:
    u, images = F.normalize(z, dim=1), image.repeat(2)
    return _Chunked.apply(u, u, images, images, torch.arange(len(z), device=z.device).roll(len(z) // 2))


def _compare_nt_xent(compare, backends, device, rows: int, dim: int, dtype: torch.dtype, **sizes: str) -> None:
    image = torch.arange(rows // 2, device=device) // TOKENS
    single = torch.arange(rows // 2, device=device)  # SimCLR: every row is its own image
    dense = rows <= DENSE
    rivals: dict[str, Rival] = {
        backend: lambda z, backend=backend: nt_xent(*z.chunk(2), temperature=TEMPERATURE, image=image, backend=backend)
        for backend in backends
        if dense or backend != "reference"
    }
    for backend in backends:
        if dense and implementation(backend).kept_bytes(rows // 2, dtype, TEMPERATURE, True):
            rivals[f"{backend}, kept"] = lambda z, backend=backend: nt_xent(
                *z.chunk(2), temperature=TEMPERATURE, image=image, memory_budget=2**40, backend=backend
            )
    other: dict[str, Rival] = {}
    if dense:
        torch.compiler.reset()  # else it stops compiling after some shapes
        rivals["eager"] = partial(_eager, image=image)
        rivals["torch.compile"] = partial(torch.compile(_eager, dynamic=False), image=image)
    rivals["chunked"] = partial(_chunked, image=image)
    if dense and torch_linear_cross_entropy is not None:
        rivals["torch linear_cross_entropy"] = _torch_chunked
        other["torch linear_cross_entropy"] = _with_itself
    if dense and LightlyLoss is not None:
        lightly = LightlyLoss(TEMPERATURE)
        rivals["lightly"] = lambda z: lightly(*z.chunk(2))
        other["lightly"] = partial(_oracle, image=single)
    if rows <= CUBIC and MetricLearningLoss is not None:
        metric_learning = MetricLearningLoss(TEMPERATURE)
        rivals["pytorch-metric-learning"] = lambda z: metric_learning(z, single.repeat(2))
        other["pytorch-metric-learning"] = partial(_oracle, image=single)
    if dense and linear_cross_entropy is not None:
        rivals["cut-cross-entropy exact"] = _cut_cross_entropy
        other["cut-cross-entropy exact"] = _with_itself
    if dense and liger_fused_linear_cross_entropy is not None:
        rivals["liger-kernel"] = _liger
        other["liger-kernel"] = _with_itself
    if dense and MemoryEfficientCLIPLoss is not None:
        memeff = MemoryEfficientCLIPLoss(temperature=TEMPERATURE)
        rivals["memeff"] = lambda z: memeff(z, z.roll(rows // 2, 0))  # both directions of one symmetric matrix
        other["memeff"] = _with_itself
    compare(
        "nt_xent",
        rivals,
        torch.randn(rows, dim, dtype=dtype, device=device),
        oracle=partial(_oracle, image=image),
        way="fwd+bwd",
        products=(rows, rows, dim),
        other=other,
        n=rows,
        D=dim,
        **sizes,
    )


@pytest.mark.parametrize(
    "rows", [1024, 2048, 4096, *(pytest.param(rows, marks=pytest.mark.large) for rows in (8192, 16384))]
)
def bench_nt_xent_rows(compare, backends, device, rows: int) -> None:
    _compare_nt_xent(compare, backends, device, rows, 512, torch.float32, scaling="rows")


@pytest.mark.parametrize(
    ("rows", "dim", "dtype"),
    [
        (256, 512, "fp32"),
        (2048, 128, "fp32"),
        (2048, 512, "bf16"),
        pytest.param(8192, 128, "fp32", marks=pytest.mark.large),
        pytest.param(8192, 512, "bf16", marks=pytest.mark.large),
        pytest.param(100_000, 512, "fp32", marks=pytest.mark.large),
    ],
)
def bench_nt_xent(compare, backends, device, rows: int, dim: int, dtype: str) -> None:
    _compare_nt_xent(compare, backends, device, rows, dim, DTYPES[dtype])


@pytest.mark.large
@pytest.mark.parametrize("threads", [n for n in (1, 2, 4, 8, 16) if n <= torch.get_num_threads()])
def bench_nt_xent_threads(compare, backends, device, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        _compare_nt_xent(compare, backends, device, 4096, 512, torch.float32, scaling="threads")
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [2048, *(pytest.param(rows, marks=pytest.mark.large) for rows in (4096, 8192))])
def bench_info_nce_detached_keys(compare, backends, device, rows: int, dtype: str) -> None:
    """The gradient of the queries; the keys get none."""
    dim, image = 512, torch.arange(rows, device=device) // TOKENS
    key = torch.randn(rows, dim, dtype=DTYPES[dtype], device=device)

    def eager(query: Tensor) -> Tensor:
        s = F.normalize(query, dim=1) @ F.normalize(key.to(query.dtype), dim=1).mT / TEMPERATURE
        positive = torch.arange(rows, device=device)
        kept = (image[:, None] != image) | (positive == positive[:, None])
        return F.cross_entropy(s.masked_fill(~kept, -math.inf), positive)

    def ours(query: Tensor, backend: str) -> Tensor:
        return info_nce(query, key.to(query.dtype), temperature=TEMPERATURE, image=image, backend=backend)

    def chunked(query: Tensor) -> Tensor:
        q, k = (F.normalize(x, dim=1) for x in (query, key.to(query.dtype)))
        return _Chunked.apply(q, k, image, image, torch.arange(rows, device=device))

    torch.compiler.reset()
    peers = {"eager": eager, "torch.compile": torch.compile(eager, dynamic=False), "chunked": chunked}
    compare(
        "info_nce",
        {backend: partial(ours, backend=backend) for backend in backends} | peers,
        torch.randn(rows, dim, dtype=DTYPES[dtype], device=device),
        oracle=partial(ours, backend="reference"),
        way="fwd+bwd",
        products=(rows, rows, dim),
        T=rows,
        M=rows,
        D=dim,
        keys="detached",
    )


@pytest.mark.parametrize("percent", [1, *(pytest.param(share, marks=pytest.mark.large) for share in (10, 50))])
def bench_ser_loss(compare, backends, device, percent: int) -> None:
    """That share of a batch of 256, on 14 x 14 and 12 x 16 tokens; the gradient of both views' tokens."""
    images, size0, size1, channels, dim = round(256 * percent / 100), (14, 14), (12, 16), 384, 512
    codes = torch.arange(images) % 8
    g0 = LatticeMap.d4(size0, codes).to(device)
    g1 = (LatticeMap.resize(size0, size1, batch=images) @ LatticeMap.d4(size0, codes.flip(0))).to(device)
    g = LatticeMap.relative(g0, g1)
    count0, count1 = size0[0] * size0[1], size1[0] * size1[1]
    image = torch.arange(images, device=device).repeat_interleave(count1)  # (T,)
    rows = 2 * len(image)
    losses = {
        backend: SERLoss(channels, temperature=TEMPERATURE, out_dim=dim, backend=backend).to(device)
        for backend in ("auto", *backends)
    }
    for loss in losses.values():
        loss.load_state_dict(losses["auto"].state_dict())
    exact = copy.deepcopy(losses.pop("auto")).double()

    def grid_sample(z: Tensor) -> Tensor:
        planes = z.unflatten(1, size0).permute(0, 3, 1, 2)
        grid = F.affine_grid(g.theta(), [*planes.shape[:2], *size1], align_corners=False)
        moved = F.grid_sample(planes, grid, mode="bicubic", padding_mode="border", align_corners=False)
        return moved.permute(0, 2, 3, 1).flatten(1, 2)

    def composed(x: Tensor, ser: SERLoss, move: Rival, contrast: Rival) -> Tensor:
        z0, z1 = (ser.projector(ser.norm(tokens)) for tokens in x.split([count0, count1], 1))
        return contrast(torch.cat([move(z0).flatten(0, 1), z1.flatten(0, 1)]))

    rivals: dict[str, Rival] = {
        backend: lambda x, ser=ser: ser(*x.split([count0, count1], 1), g0, g1)
        for backend, ser in losses.items()
        if rows <= DENSE or backend != "reference"
    }
    if rows <= DENSE:
        contrast = partial(_eager, image=image)
        rivals["eager"] = partial(composed, ser=losses["reference"], move=grid_sample, contrast=contrast)
    compare(
        "SERLoss",
        rivals,
        torch.randn(images, count0 + count1, channels, device=device),
        oracle=partial(
            composed,
            ser=exact,
            move=partial(group_action, g=g, backend="reference"),
            contrast=partial(_oracle, image=image),
        ),
        way="fwd+bwd",
        products=(rows, rows, dim),
        share=f"{percent}%",
        B=images,
        n=rows,
        C=channels,
        D=dim,
    )
