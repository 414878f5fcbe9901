"""SERLoss: golden values, a composition written out by hand, what its gradient reaches, and the contract."""

import copy
import importlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from ser_fast import LatticeMap, SERLoss, group_action
from ser_fast.loss import _warn_of_one_image
from ser_fast.ops.backends import BACKENDS, implementation, reason_not
from ser_fast.vit import SplitViT

GOLDEN = Path(__file__).parent / "golden"
DIM = 3

f32, f64, bf16 = torch.float32, torch.float64, torch.bfloat16


def small_ser(dtype: torch.dtype = f64, **options: Any) -> SERLoss:
    """A narrow SERLoss whose every parameter matters (LayerNorm starts at 1 and 0)."""
    ser = SERLoss(DIM, **{"hidden_dim": 5, "out_dim": 4, **options})
    with torch.no_grad():
        for parameter in ser.norm.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return ser.to(dtype)


def without_projector(dim: int, **options: Any) -> SERLoss:
    """The action and the contrast on the tokens as they are."""
    ser = SERLoss(dim, **options)
    ser.norm, ser.projector = nn.Identity(), nn.Identity()
    return ser


# Maps of two 8 x 8 images to their views: all tokens have a partner, or some do.
def d4_scale() -> tuple[LatticeMap, LatticeMap]:
    codes = torch.tensor([[1, 6], [4, 3]])
    return LatticeMap.d4((1, 1), codes[0]).on((8, 8), (3, 2)), LatticeMap.d4((1, 1), codes[1]).on((8, 8), (2, 4))


def crops() -> tuple[LatticeMap, LatticeMap]:
    boxes = torch.tensor([[[0.0, 1, 6, 5], [2, 2, 6, 6]], [[1.5, 0, 6, 4], [0, 0, 7, 5]]])
    return LatticeMap.crop((8, 8), boxes[0], (3, 2)), LatticeMap.hflip((2, 3)) @ LatticeMap.crop(
        (8, 8), boxes[1], (2, 3)
    )


MAPS = {"d4_scale": d4_scale, "crops": crops}


@pytest.fixture(params=MAPS.values(), ids=MAPS)
def maps(request: pytest.FixtureRequest) -> tuple[LatticeMap, LatticeMap]:
    return request.param()


def tokens_for(*maps: LatticeMap, batch: int = 2, dtype: torch.dtype = f64) -> list[Tensor]:
    """A random leaf (B, H, W, C) for each map, on the lattice it gives."""
    return [torch.randn(batch, *g.size_out, DIM, dtype=dtype, requires_grad=True) for g in maps]


def gradients(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    """The loss and its gradients, 0 for an input that it does not depend on."""
    return [loss.detach(), *torch.autograd.grad(loss, inputs, materialize_grads=True)]


def worst(actual: Tensor, expected: Tensor) -> float:
    """The largest error, relative to the largest expected value."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def test_crops_have_tokens_with_and_without_partner() -> None:
    g0, g1 = crops()
    for g in (LatticeMap.relative(g0, g1), LatticeMap.relative(g1, g0)):
        assert g.valid().any(1).all()
        assert not g.valid().all(1).any()


# ---------------------------------------------------------------- golden cases


class Golden:
    """golden/e2e_1rank.npz: feature maps of two images from query and momentum encoder, and the maps to their views."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.file = np.load(GOLDEN / "e2e_1rank.npz")
        self.features = {
            name: torch.tensor(self.file[f"feat_{name}"]).to(dtype).requires_grad_()
            for name in ("q0", "q1", "k0", "k1")
        }
        image, sizes = (5, 7), [tuple(self.file[name].tolist()) for name in ("w0h0", "w1h1")]
        self.g0 = LatticeMap.rot90(sizes[0], int(self.file["k0"])) @ LatticeMap.resize(image, sizes[0])
        mirrored = LatticeMap.resize(image, sizes[1]) @ LatticeMap.vflip(image)
        self.g1 = LatticeMap.rot90(sizes[1], int(self.file["k1"])) @ mirrored

    def direction(self, index: int, **options: Any) -> Tensor:
        """Direction 0: queries q1 and keys from k0, moved to view 1; direction 1 the other way round. No detaching."""
        ser = without_projector(512, both_directions=False, **options)
        q0, q1, k0, k1 = self.features.values()
        return ser(k1, q0, self.g1, self.g0) if index else ser(k0, q1, self.g0, self.g1)


LOSS_TOLERANCE = {f32: 1e-6, f64: 1e-12}
# The stored gradients are rounded to float32.
GRADIENT_TOLERANCE = {f32: 1e-6, f64: 1e-7}


@pytest.mark.parametrize("dtype", [f32, f64], ids=str)
@pytest.mark.parametrize(
    ("name", "index", "options"),
    [
        ("loss_dir0", 0, {"preset": "released"}),
        ("loss_dir1", 1, {"preset": "released"}),
        ("loss_dir0_tau04", 0, {"preset": "released", "objective": "dino"}),
        ("paper_sym_dir0", 0, {"preset": "paper", "temperature": 0.5}),
        ("paper_sym_dir1", 1, {"preset": "paper", "temperature": 0.5}),
    ],
)
def test_golden_directions(name: str, index: int, options: dict[str, Any], dtype: torch.dtype, backend: str) -> None:
    golden = Golden(dtype)
    loss = golden.direction(index, **options, backend=backend)
    assert loss.item() == pytest.approx(golden.file[name].item(), rel=0, abs=LOSS_TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [f32, f64], ids=str)
def test_golden_gradients(dtype: torch.dtype, backend: str) -> None:
    golden = Golden(dtype)
    loss = sum(golden.direction(index, preset="released", backend=backend) for index in (0, 1)) / 2
    loss.backward()
    assert loss.item() == pytest.approx(golden.file["loss"].item(), rel=0, abs=LOSS_TOLERANCE[dtype])
    for name, features in golden.features.items():
        expected = torch.tensor(golden.file[f"grad_{name}"]).to(dtype)
        assert worst(features.grad, expected) <= GRADIENT_TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [f32, f64], ids=str)
def test_golden_with_momentum_keys(dtype: torch.dtype, backend: str) -> None:
    golden = Golden(dtype)
    q0, q1, k0, k1 = golden.features.values()
    loss = without_projector(512, preset="released", backend=backend)(q0, q1, golden.g0, golden.g1, k0, k1)
    loss.backward()
    assert loss.item() == pytest.approx(golden.file["loss"].item(), rel=0, abs=LOSS_TOLERANCE[dtype])
    for name in ("q0", "q1"):
        expected = torch.tensor(golden.file[f"grad_{name}"]).to(dtype)
        assert worst(golden.features[name].grad, expected) <= GRADIENT_TOLERANCE[dtype]
    assert k0.grad is None
    assert k1.grad is None


@pytest.mark.parametrize("preset", ["paper", "released"])
@pytest.mark.parametrize("given", [True, False])
def test_keys_of_one_view_make_one_direction(preset: str, given: bool) -> None:
    """The queries are the other view's tokens. Those of the keys' own view say nothing, and need not be given."""
    golden = Golden(f64)
    q0, q1, k0, k1 = golden.features.values()
    ser = without_projector(512, preset=preset, temperature=0.5)
    losses = [
        ser(q0 if given else None, q1, golden.g0, golden.g1, keys0=k0),
        ser(q0, q1 if given else None, golden.g0, golden.g1, keys1=k1),
    ]
    for index, (loss, queries) in enumerate(zip(losses, (q1, q0), strict=True)):
        assert loss.item() == pytest.approx(golden.file[f"loss_dir{index}"].item(), rel=0, abs=LOSS_TOLERANCE[f64])
        (gradient,) = torch.autograd.grad(loss, queries)
        assert gradient.any()


# ---------------------------------------------------------------- the composition, by hand


def project_by_hand(ser: SERLoss, tokens: Tensor) -> Tensor:  # (B, H, W, C) -> (B, H*W, D)
    deviation = tokens - tokens.mean(-1, keepdim=True)
    x = deviation / (deviation.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    first, _, last = ser.projector
    hidden = (x * ser.norm.weight + ser.norm.bias) @ first.weight.T
    hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
    return (hidden @ last.weight.T).flatten(1, 2)


def contrast_by_hand(moved: Tensor, target: Tensor, valid: Tensor, temperature: float, symmetric: bool) -> Tensor:
    """The mean over the anchors, one by one; rows are (image, token) pairs."""
    rows = valid.nonzero().tolist()
    losses = []
    for view in (0, 1) if symmetric else (0,):
        anchors, partners = (moved, target) if view else (target, moved)
        for image, token in rows:

            def score(other: Tensor, anchor: Tensor = anchors[image, token]) -> Tensor:
                return F.cosine_similarity(anchor, other, dim=0) / temperature

            positive = score(partners[image, token]).exp()
            negatives = [
                score(view_rows[i, t]).exp()
                for view_rows in ((partners, anchors) if symmetric else (partners,))
                for i, t in rows
                if i != image
            ]
            losses.append(-(positive / (positive + sum(negatives))).log())
    return torch.stack(losses).mean()


PRESETS = {"paper": (True, False), "released": (False, True)}  # symmetric, both directions


@pytest.mark.parametrize("with_keys", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"max_tokens": 100}, {"interpolation": "lanczos3", "padding": "reflection", "antialias": True}],
    ids=str,
)
@pytest.mark.parametrize("preset", PRESETS)
def test_is_the_composition_of_its_parts(
    preset: str, options: dict[str, Any], with_keys: bool, maps: tuple[LatticeMap, LatticeMap]
) -> None:
    symmetric, both_directions = PRESETS[preset]
    ser = small_ser(preset=preset, temperature=0.3, **options)
    g0, g1 = maps
    tokens, keys = tokens_for(g0, g1), tokens_for(g0, g1) if with_keys else []

    z = [project_by_hand(ser, view) for view in tokens]
    sources = [project_by_hand(ser, view).detach() for view in keys] or z
    directions = [(sources[0], z[1], g1 @ g0.inverse()), (sources[1], z[0], g0 @ g1.inverse())]
    losses = []
    for source, target, g in directions[: 1 + both_directions]:
        resampling = {name: options[name] for name in ("interpolation", "padding", "antialias") if name in options}
        moved = group_action(source, g, **resampling)
        losses.append(contrast_by_hand(moved, target, g.valid(), 0.3, symmetric and not with_keys))
    expected = sum(losses) / len(losses)

    inputs = [*tokens, *ser.parameters()]
    torch.testing.assert_close(gradients(ser(*tokens, *maps, *keys), *inputs), gradients(expected, *inputs))


@pytest.mark.parametrize("with_keys", [False, True])
@pytest.mark.parametrize("preset", PRESETS)
def test_gradcheck(preset: str, with_keys: bool, maps: tuple[LatticeMap, LatticeMap], backend: str) -> None:
    ser = small_ser(preset=preset, backend=backend)
    names = [name for name, _ in ser.named_parameters()]
    tokens = tokens_for(*maps)
    keys = [view.detach() for view in tokens_for(*maps)] if with_keys else []

    def function(tokens0: Tensor, tokens1: Tensor, *parameters: Tensor) -> Tensor:
        return functional_call(ser, dict(zip(names, parameters, strict=True)), (tokens0, tokens1, *maps, *keys))

    if with_keys:  # the parameters move the keys, too, but get their gradient from the queries alone
        assert torch.autograd.gradcheck(lambda *views: function(*views, *ser.parameters()), tokens)
    else:
        assert torch.autograd.gradcheck(function, (*tokens, *ser.parameters()))


# ---------------------------------------------------------------- presets


@pytest.mark.parametrize(
    ("preset", "objective", "temperature"),
    [
        ("paper", "moco_v3", 0.3),
        ("paper", "barlow_twins", 0.3),
        ("paper", "dino", 0.5),
        ("released", "moco_v3", 0.5),
        ("released", "barlow_twins", 0.4),
        ("released", "dino", 0.4),
    ],
)
def test_presets(preset: str, objective: str, temperature: float) -> None:
    g0, g1 = d4_scale()
    tokens = tokens_for(g0, g1)
    given = small_ser(preset=preset, objective=objective)
    negatives, both_directions = {"paper": ("both", False), "released": ("other", True)}[preset]
    explicit = {"temperature": temperature, "negatives": negatives, "both_directions": both_directions}
    assert {name: getattr(given, name) for name in explicit} == explicit

    # The arguments win over the other preset, and each of them matters.
    other = small_ser(preset={"paper": "released", "released": "paper"}[preset], **explicit)
    other.load_state_dict(given.state_dict())
    loss = given(*tokens, g0, g1)
    assert torch.equal(other(*tokens, g0, g1), loss)
    opposite = {
        "temperature": 0.2,
        "negatives": {"both": "other", "other": "both"}[negatives],
        "both_directions": not both_directions,
    }
    for name, value in opposite.items():
        changed = small_ser(preset=preset, objective=objective, **{name: value})
        changed.load_state_dict(given.state_dict())
        assert abs(changed(*tokens, g0, g1) - loss) > 1e-4


def test_defaults_are_the_papers() -> None:
    ser = SERLoss(dim=8)
    assert (ser.temperature, ser.negatives, ser.both_directions) == (0.3, "both", False)
    assert [tuple(parameter.shape) for parameter in ser.parameters()] == [(8,), (8,), (512, 8), (512, 512)]
    assert "temperature=0.3, negatives='both', both_directions=False" in repr(ser)


# ---------------------------------------------------------------- what lambda reaches

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}


class TinyRun:
    """Two views of three images through a tiny SplitViT: a stand-in for an invariance loss, and SER."""

    def __init__(self, **options: Any) -> None:
        self.vit = SplitViT("vit_tiny_patch16_224", split=2, **TINY)
        self.ser = SERLoss(TINY["embed_dim"], hidden_dim=16, out_dim=8, **options)
        self.images = torch.randn(3, 3, 32, 32), torch.randn(3, 3, 24, 40)
        # In pixels, as the trainer's.
        self.g0 = LatticeMap.d4((32, 32), torch.tensor([1, 4, 7]))
        self.g1 = LatticeMap.resize((32, 32), (24, 40))

    def losses(self) -> tuple[Tensor, Tensor]:
        tokens = [self.vit.early(view) for view in self.images]
        z0, z1 = (self.vit.pool(self.vit.late(view)) for view in tokens)
        return 1 - F.cosine_similarity(z0, z1).mean(), self.ser(*tokens, self.g0, self.g1)

    def gradients(self, loss: Tensor) -> dict[str, Tensor | None]:
        """By name, for the encoder's parameters."""
        return dict(
            zip(
                dict(self.vit.named_parameters()),
                torch.autograd.grad(loss, list(self.vit.parameters()), allow_unused=True),
                strict=True,
            )
        )


def is_early(name: str) -> bool:
    return name.startswith(("patch_embed.", "pos_embed", "blocks.0.", "blocks.1."))


@pytest.mark.parametrize("preset", PRESETS)
def test_reaches_the_blocks_before_the_split_alone(preset: str) -> None:
    run = TinyRun(preset=preset)
    gradient = run.gradients(run.losses()[1])
    assert {name.split(".")[1] for name in gradient if name.startswith("blocks.")} == {"0", "1", "2"}
    for name, value in gradient.items():
        if is_early(name):
            assert value is not None, name
            assert value.any(), name
        else:
            assert value is None, name


@pytest.mark.parametrize("weight", [0, 0.5, 1])
def test_lambda_scales_its_share_of_the_gradient(weight: float) -> None:
    run = TinyRun()
    invariance, ser = (run.gradients(run.losses()[i]) for i in (0, 1))
    losses = run.losses()
    total = run.gradients(losses[0] + weight * losses[1])
    for name, value in total.items():
        if is_early(name):
            assert worst(value, invariance[name] + weight * ser[name]) <= 1e-6
            assert weight == 0 or worst(value, invariance[name]) > 1e-2, name
        else:
            assert torch.equal(value, invariance[name])


# ---------------------------------------------------------------- geometry


def d4_of(images: Tensor, code: int) -> Tensor:
    """hflip code // 4 times, then rot90 code % 4 times, of images (B, C, H, W)."""
    return torch.rot90(images.flip(-1) if code >= 4 else images, code % 4, dims=(-2, -1))


def tokens_of(images: Tensor, patch: int = 2) -> Tensor:
    """Tokens (B, H, W, C) that move exactly as the image does under D4: the means of its patches."""
    return F.avg_pool2d(images, patch).permute(0, 2, 3, 1)


@pytest.mark.parametrize("code1", range(8))
@pytest.mark.parametrize("code0", [0, 3, 5])
def test_equivariant_tokens_know_their_map(code0: int, code1: int) -> None:
    images = torch.randn(2, DIM + 5, 8, 8, dtype=f64)
    tokens = [tokens_of(d4_of(images, code)) for code in (code0, code1)]
    ser = SERLoss(DIM + 5, temperature=0.01, preset="released").double()
    g0 = LatticeMap.d4((8, 8), code0)
    losses = [ser(*tokens, g0, LatticeMap.d4((8, 8), code)).item() for code in range(8)]
    assert 0 <= losses[code1] < 1e-2  # no negative is as close as the match: e^-large
    assert min(losses[:code1] + losses[code1 + 1 :]) > 1


@pytest.mark.parametrize("preset", PRESETS)
def test_loss_ignores_how_the_same_thing_is_said(preset: str, maps: tuple[LatticeMap, LatticeMap]) -> None:
    """Maps on pixels or tokens, tokens as maps or rows, contiguous or not."""
    ser = small_ser(preset=preset)
    g0, g1 = maps
    tokens = tokens_for(g0, g1)
    expected = gradients(ser(*tokens, g0, g1), *tokens)
    patch = 4
    pixels = [g.on((8 * patch, 8 * patch), (g.size_out[0] * patch, g.size_out[1] * patch)) for g in maps]
    torch.testing.assert_close(gradients(ser(*tokens, *pixels), *tokens), expected)

    flat = [view.flatten(1, 2) for view in tokens]
    assert all(map(torch.equal, gradients(ser(*flat, g0, g1), *tokens), expected))
    strided = [view.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0) for view in tokens]
    assert not strided[0].is_contiguous()
    torch.testing.assert_close(gradients(ser(*strided, g0, g1), *tokens), expected)


@pytest.mark.parametrize("single", [(0,), (1,), (0, 1)])
def test_one_map_for_all_samples(single: tuple[int, ...]) -> None:
    ser = small_ser(preset="released")
    repeated = [g[torch.tensor([1, 1])] for g in d4_scale()]
    once = [g[:1] if i in single else g for i, g in enumerate(repeated)]
    tokens = tokens_for(*repeated)
    assert torch.equal(ser(*tokens, *once), ser(*tokens, *repeated))


def test_resamples_once() -> None:
    """Two views of another size than the image: one relative map that is exact, not there and back again."""
    ser = small_ser()
    resize = LatticeMap.resize((8, 8), (3, 5))
    g0, g1 = resize, LatticeMap.rot90((3, 5), 1) @ resize
    tokens = tokens_for(g0, g1)
    direct = LatticeMap.identity((3, 5)), LatticeMap.rot90((3, 5), 1)
    torch.testing.assert_close(ser(*tokens, g0, g1), ser(*tokens, *direct), rtol=0, atol=1e-12)


class OpCalls(TorchDispatchMode):
    """Records the name and the backend of each call of an op of this library."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "ser_fast":
            self.calls.append((func.__name__.split(".")[0], args[-1]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("preset", "ops"), [("paper", ["nt_xent"]), ("released", ["info_nce", "info_nce"])])
def test_one_action_and_one_contrast_a_direction(preset: str, ops: list[str], backend: str) -> None:
    g0, g1 = d4_scale()
    with OpCalls() as recorded:
        small_ser(preset=preset, backend=backend)(*tokens_for(g0, g1), g0, g1)
    assert recorded.calls == [call for op in ops for call in (("group_action", backend), (op, backend))]


class Storages(TorchDispatchMode):
    """Records which ops return new memory of `size` elements or more."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.ops = size, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        for x in out if isinstance(out, tuple) else (out,):
            if isinstance(x, Tensor) and x.numel() >= self.size and x.untyped_storage().data_ptr() not in given:
                self.ops.append(func.__name__.split(".")[0])
        return out


def test_copies_nothing_between_projector_action_and_contrast() -> None:
    g0, g1 = LatticeMap.identity((8, 8), batch=4), LatticeMap.resize((8, 8), (8, 8), batch=4)
    ser = SERLoss(32, hidden_dim=32, out_dim=32, backend="auto")
    tokens = [torch.randn(4, 64, 32, requires_grad=True) for _ in range(2)]
    with Storages(4 * 64 * 32) as recorded:
        ser(*tokens, g0, g1)
    assert recorded.ops == ["native_layer_norm", "mm", "gelu", "mm"] * 2 + ["group_action"]


@pytest.mark.parametrize("budget", [0, 2**40])
def test_memory_budget_reaches_the_contrast(budget: int, backend: str) -> None:
    ser, (g0, g1) = small_ser(memory_budget=budget, backend=backend), d4_scale()
    recorded: list[int] = []

    class Kept(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.__name__.startswith("nt_xent."):
                recorded.append(args[-2])
            return func(*args, **(kwargs or {}))

    with Kept():
        ser(*tokens_for(g0, g1), g0, g1)
    wanted = implementation(backend).kept_bytes(2 * 8, f64, ser.temperature, True)
    assert recorded == [wanted if budget else 0]


def test_both_directions_is_the_mean_of_the_two() -> None:
    one, both = (small_ser(both_directions=both_directions) for both_directions in (False, True))
    both.load_state_dict(one.state_dict())
    g0, g1 = crops()
    tokens0, tokens1 = tokens_for(g0, g1)
    expected = (one(tokens0, tokens1, g0, g1) + one(tokens1, tokens0, g1, g0)) / 2
    torch.testing.assert_close(both(tokens0, tokens1, g0, g1), expected)


# ---------------------------------------------------------------- which rows take part


@pytest.mark.parametrize("preset", PRESETS)
def test_keys_get_no_gradient(preset: str) -> None:
    ser = small_ser(preset=preset)
    g0, g1 = d4_scale()
    tokens, keys = tokens_for(g0, g1), tokens_for(g0, g1)
    ser(*tokens, g0, g1, *keys).backward()
    assert all(key.grad is None for key in keys)
    assert tokens[1].grad.any(-1).all()
    if preset == "released":
        assert tokens[0].grad.any(-1).all()
    assert all(parameter.grad.any() for parameter in ser.parameters())


def rows_with_gradient(ser: SERLoss, *maps: LatticeMap) -> list[Tensor]:
    """(B, H*W) bool of each view: which tokens take part."""
    tokens = tokens_for(*maps)
    ser(*tokens, *maps).backward()
    return [view.grad.any(-1).flatten(1) for view in tokens]


@pytest.mark.parametrize("count", [1, 7, 31, 32, 40, None])
def test_max_tokens_counts_pairs(count: int | None) -> None:
    g = LatticeMap.d4((4, 4), torch.tensor([2, 5]))
    taking_part = rows_with_gradient(small_ser(max_tokens=count), g, LatticeMap.identity((4, 4)))
    # A single pair has no negatives.
    expected = 0 if count == 1 else min(count or 32, 32)
    assert [int(rows.sum()) for rows in taking_part] == [expected, expected]
    partners = group_action(taking_part[0][..., None].double(), g.inverse())[..., 0].bool()
    assert torch.equal(partners, taking_part[1])


def test_max_tokens_leaves_out_tokens_without_partner() -> None:
    g0, g1 = crops()
    valid = LatticeMap.relative(g0, g1).valid()
    _, taking_part = rows_with_gradient(small_ser(), g0, g1)
    assert torch.equal(taking_part, valid)
    _, drawn = rows_with_gradient(small_ser(max_tokens=8), g0, g1)
    assert drawn.any()
    assert not (drawn & ~valid).any()
    assert drawn.sum() < valid.sum()


def test_max_tokens_draws_anew_and_by_seed() -> None:
    ser = small_ser(max_tokens=5)
    g = LatticeMap.identity((4, 4))
    tokens = tokens_for(g, g)
    losses = []
    for _ in range(2):
        torch.manual_seed(1)
        losses.append([ser(*tokens, g, g).item() for _ in range(4)])
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 4


def no_partners() -> tuple[LatticeMap, LatticeMap, int]:
    return LatticeMap.crop((8, 8), [0, 0, 3, 3], (3, 2)), LatticeMap.crop((8, 8), [5, 5, 3, 3], (2, 2)), 2


def one_image() -> tuple[LatticeMap, LatticeMap, int]:
    return *(LatticeMap.resize((4, 4), size) for size in ((3, 2), (2, 2))), 1


def empty_batch() -> tuple[LatticeMap, LatticeMap, int]:
    return *(LatticeMap.resize((4, 4), size, batch=0) for size in ((3, 2), (2, 2))), 0


@pytest.mark.parametrize("with_keys", [False, True])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("case", [no_partners, one_image, empty_batch])
def test_nothing_to_tell_apart(
    case: Callable[[], tuple[LatticeMap, LatticeMap, int]], preset: str, with_keys: bool, backend: str
) -> None:
    g0, g1, batch = case()
    ser = small_ser(dtype=f32, preset=preset, backend=backend)
    tokens = tokens_for(g0, g1, batch=batch, dtype=f32)
    keys = tokens_for(g0, g1, batch=batch, dtype=f32) if with_keys else []
    loss = ser(*tokens, g0, g1, *keys)
    assert loss == 0
    loss.backward()
    for tensor in (tokens[1], *ser.parameters()):
        assert tensor.grad is not None
        assert not tensor.grad.any()  # NaN counts as any


# ---------------------------------------------------------------- as a module


def test_state_dict_is_plain(maps: tuple[LatticeMap, LatticeMap]) -> None:
    ser, fresh = small_ser(), small_ser()
    assert list(ser.state_dict()) == ["norm.weight", "norm.bias", "projector.0.weight", "projector.2.weight"]
    tokens = tokens_for(*maps)
    expected = ser(*tokens, *maps)
    assert fresh(*tokens, *maps) != expected
    fresh.load_state_dict(ser.state_dict())
    twin = copy.deepcopy(ser)
    assert torch.equal(fresh(*tokens, *maps), expected)
    assert torch.equal(twin(*tokens, *maps), expected)
    with torch.no_grad():
        twin.projector[0].weight.add_(1)
    assert torch.equal(ser(*tokens, *maps), expected)


@pytest.mark.parametrize("preset", PRESETS)
def test_precisions(preset: str, maps: tuple[LatticeMap, LatticeMap], backend: str) -> None:
    exact = small_ser(preset=preset, backend=backend)
    tokens = tokens_for(*maps)
    expected = gradients(exact(*tokens, *maps), *tokens)
    assert expected[0].dtype == f64
    for dtype, autocast, loss_error, gradient_error in (
        (f32, False, 2e-6, 1e-5),
        (f32, True, 2e-2, 1e-1),
        (bf16, False, 5e-2, 2e-1),
    ):
        ser, rounded = copy.deepcopy(exact).to(dtype), [view.detach().to(dtype).requires_grad_() for view in tokens]
        with torch.autocast("cpu", dtype=bf16, enabled=autocast):
            loss = ser(*rounded, *maps)
        actual = gradients(loss, *rounded)
        assert actual[0].dtype == f32
        assert actual[0].item() == pytest.approx(expected[0].item(), rel=0, abs=loss_error)
        for value, reference in zip(actual[1:], expected[1:], strict=True):
            assert value.dtype == dtype
            assert worst(value.double(), reference) <= gradient_error


@pytest.mark.parametrize(("preset", "with_keys"), [("paper", False), ("released", True)])
def test_compiles_in_one_graph(preset: str, with_keys: bool) -> None:
    """The lattices, and so the number of tokens, change from step to step."""
    torch.compiler.reset()
    ser = small_ser(dtype=f32, preset=preset)
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ser, fullgraph=True, backend=graphs)
    for size0, size1 in [((3, 2), (2, 4)), ((4, 3), (3, 3)), ((2, 5), (5, 2)), ((6, 4), (4, 5))]:
        g0 = LatticeMap.d4((1, 1), torch.tensor([1, 6])).on((8, 8), size0)
        g1 = LatticeMap.crop((8, 8), [[0, 1, 6, 6], [2, 1, 6, 7]], size1)
        tokens = tokens_for(g0, g1, dtype=f32)
        keys = tokens_for(g0, g1, dtype=f32) if with_keys else []
        inputs = [*tokens, *ser.parameters()]
        actual = gradients(compiled(*tokens, g0, g1, *keys), *inputs)
        torch.testing.assert_close(actual, gradients(ser(*tokens, g0, g1, *keys), *inputs))
    assert graphs.frame_count <= 2  # one for the first lattices, one for all others


def test_under_gradient_checkpointing() -> None:
    plain, recomputed = TinyRun(), TinyRun()
    recomputed.images = plain.images
    recomputed.vit.load_state_dict(plain.vit.state_dict())
    recomputed.ser.load_state_dict(plain.ser.state_dict())
    recomputed.vit.set_grad_checkpointing()
    (_, expected), (_, actual) = plain.losses(), recomputed.losses()
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(recomputed.gradients(actual), plain.gradients(expected))


def test_recomputed_with_the_same_draw(maps: tuple[LatticeMap, LatticeMap]) -> None:
    ser = small_ser(max_tokens=8, preset="released")
    tokens = tokens_for(*maps)
    torch.manual_seed(1)
    expected = gradients(ser(*tokens, *maps), *tokens)
    torch.manual_seed(1)
    loss = checkpoint(ser, *tokens, *maps, use_reentrant=False)
    torch.rand(3)
    torch.testing.assert_close(gradients(loss, *tokens), expected)


def test_gather_needs_no_process_group(maps: tuple[LatticeMap, LatticeMap]) -> None:
    ser, gathering = small_ser(), small_ser(gather=True)
    gathering.load_state_dict(ser.state_dict())
    tokens = tokens_for(*maps)
    assert torch.equal(gathering(*tokens, *maps), ser(*tokens, *maps))


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "Paper"}, "preset: got 'Paper', takes one of 'paper', 'released'"),
        ({"objective": "moco"}, "objective: got 'moco', takes one of 'moco_v3', 'barlow_twins', 'dino'"),
        ({"negatives": "all"}, "negatives: got 'all', takes one of 'both', 'other'"),
        ({"interpolation": "cubic"}, "interpolation: got 'cubic', takes one of 'nearest', 'bilinear', 'bicubic'"),
        ({"padding": "edge"}, "padding: got 'edge', takes one of 'zeros', 'border', 'reflection'"),
        ({"temperature": 1e-300}, "temperature: got 1e-300, takes a number from 1e-30 to 1e30"),
        ({"temperature": -0.5}, "temperature: got -0.5, takes a number from 1e-30 to 1e30"),
        ({"temperature": math.nan}, "temperature: got nan, takes a number from 1e-30 to 1e30"),
        ({"temperature": math.inf}, "temperature: got inf, takes a number from 1e-30 to 1e30"),
        ({"memory_budget": -1}, "memory_budget: got -1, takes 0 or a number of bytes"),
        ({"max_tokens": 0}, "max_tokens: got 0, takes None or a positive number"),
        ({"objective": "simclr"}, "objective: got 'simclr', .* for another method leave it out, or give a temperature"),
        ({"hidden_dim": 0}, "hidden_dim: got 0, takes a positive number"),
        ({"out_dim": -3}, "out_dim: got -3, takes a positive number"),
        ({"out_dim": 1.5}, "out_dim: got 1.5, takes a positive number"),
        ({"max_tokens": 1.5}, "max_tokens: got 1.5, takes None or a positive number"),
        ({"backend": "gpu"}, "backend: got 'gpu', takes 'auto' or one of 'reference', 'cpu', 'triton', 'cuda'"),
        ({"gather": "ring"}, "gather: got 'ring', takes True or False"),
        ({"antialias": "yes"}, "antialias: got 'yes', takes True or False"),
    ],
)
def test_option_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^" + message):
        SERLoss(DIM, **options)


def test_width_of_tokens_is_positive() -> None:
    with pytest.raises(ValueError, match=r"^dim: got -1, takes a positive number"):
        SERLoss(-1)


def test_temperature_is_a_number() -> None:
    with pytest.raises(TypeError, match=r"^temperature: got Parameter, takes a number; it is not learned"):
        SERLoss(DIM, temperature=nn.Parameter(torch.tensor(0.3)))
    assert type(SERLoss(DIM, temperature=np.float32(0.25)).temperature) is float


G0, G1 = LatticeMap.resize((8, 8), (4, 4)), LatticeMap.resize((8, 8), (2, 6))
X0, X1 = torch.zeros(2, 4, 4, DIM), torch.zeros(2, 2, 6, DIM)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X0.numpy(), X1, G0, G1), TypeError, "tokens0: got ndarray, takes a tensor"),
        ((X0, X1.to_sparse(), G0, G1), TypeError, "tokens1: got a tensor of the layout sparse_coo, takes a dense one"),
        ((X0, None, G0, G1), TypeError, "tokens1: got NoneType, takes a tensor"),
        ((X0, X1, G0.linear, G1), TypeError, "g0: got Tensor, takes a LatticeMap"),
        ((X0, X1, G0, None), TypeError, "g1: got NoneType, takes a LatticeMap"),
        ((X0[..., :2], X1, G0, G1), ValueError, r"tokens0: got shape \(2, 4, 4, 2\), takes \(B, H, W, 3\) or"),
        ((X0, X1[0, 0], G0, G1), ValueError, r"tokens1: got shape \(6, 3\), takes \(B, H, W, 3\) or"),
        ((X0, X1, G0[torch.tensor([0, 0, 0])], G1), ValueError, "g0: got 3 maps for 2 samples, takes one for each or"),
        ((X0, X1, G0, G1[torch.tensor([0, 0, 0])]), ValueError, "g1: got 3 maps for 2 samples, takes one for each or"),
        ((X0.flatten(1, 2)[:, 1:], X1, G0, G1), ValueError, "tokens0: got 15 tokens a sample, g0 gives a 4x4 lattice"),
        ((X0[:, 1:], X1, G0, G1), ValueError, "tokens0: its 3x4 lattice is neither the 4x4 that g0 gives nor"),
        ((X0, X1[:, :0], G0, G1), ValueError, "tokens1: its 0x6 lattice is neither the 2x6 that g1 gives nor"),
        ((X0, X1[:1], G0, G1), ValueError, "tokens1: got 1 samples, tokens0 has 2"),
        ((X0, X1, G0, LatticeMap.resize((8, 9), (2, 6))), ValueError, r"g1: got a map of images of \(8, 9\), takes"),
        ((None, X1, G0, G1, X0, X1), TypeError, "tokens0: got NoneType, takes a tensor"),
        ((X0, None, G0, G1, X0), TypeError, "tokens1: got NoneType, takes a tensor"),
        ((None, X1, G0, G1, None, X1), TypeError, "tokens0: got NoneType, takes a tensor"),
        ((None, X1, G0, G1, X0[:1]), ValueError, "tokens1: got 2 samples, keys0 has 1"),
        ((None, X1, G0, G1, X0[..., :2]), ValueError, r"keys0: got shape \(2, 4, 4, 2\), takes \(B, H, W, 3\) or"),
        ((X0, X1, G0, G1, X1, X0), ValueError, r"keys0: got shape \(2, 2, 6, 3\), its view's tokens \(2, 4, 4, 3\)"),
        (
            (X0, X1, G0, G1, X0, X1[:1]),
            ValueError,
            r"keys1: got shape \(1, 2, 6, 3\), its view's tokens \(2, 2, 6, 3\)",
        ),
    ],
)
def test_input_errors(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^" + message):
        SERLoss(DIM)(*arguments)


@pytest.mark.parametrize(
    ("tokens", "advice"),
    [
        (64, "; unflatten them to (B, H, W, C), or take the map to their lattice by g0.on"),
        (65, "; drop the first 1 if they are prefix tokens ([CLS], registers)"),
        (69, "; drop the first 5 if they are prefix tokens ([CLS], registers)"),
        (63, ""),
    ],
)
def test_number_of_tokens_comes_with_advice(tokens: int, advice: str) -> None:
    pixels = LatticeMap.resize((64, 64), (64, 64))
    with pytest.raises(ValueError, match=r"^tokens0") as refused:
        SERLoss(DIM)(torch.zeros(2, tokens, DIM), torch.zeros(2, 8, 8, DIM), pixels, pixels)
    assert str(refused.value) == f"tokens0: got {tokens} tokens a sample, g0 gives a 64x64 lattice{advice}"


@pytest.mark.parametrize("name", ["tokens0", "tokens1", "keys0", "keys1"])
def test_tokens_have_the_dtype_of_the_parameters_outside_autocast(name: str) -> None:
    inputs = {"tokens0": X0, "tokens1": X1, "keys0": X0, "keys1": X1}
    for dtype, way_out in ((torch.float16, "cast it, or call this under torch.autocast"), (f64, "cast it")):
        given = inputs | {name: inputs[name].to(dtype)}
        message = f"^{name}: got {dtype}, takes that of the parameters, torch.float32; {way_out}$"
        with pytest.raises(TypeError, match=message):
            SERLoss(DIM)(**given, g0=G0, g1=G1)
    with torch.autocast("cpu", dtype=bf16):
        assert SERLoss(DIM)(**(inputs | {name: inputs[name].to(bf16)}), g0=G0, g1=G1).isfinite()
        with pytest.raises(TypeError, match=f"^{name}: got torch.float64"):
            SERLoss(DIM)(**(inputs | {name: inputs[name].to(f64)}), g0=G0, g1=G1)


def test_one_image_warns_once() -> None:
    _warn_of_one_image.cache_clear()
    ser = SERLoss(DIM)
    with pytest.warns(UserWarning, match="^SERLoss: got one image, whose tokens have no negatives: the loss is 0") as w:
        assert [ser(X0[:1], X1[:1], G0, G1).item() for _ in range(2)] == [0, 0]
    assert [warning.filename for warning in w] == [__file__]


@pytest.mark.parametrize("make", [lambda: SERLoss(DIM), lambda: TinyRun().vit], ids=["SERLoss", "SplitViT"])
def test_data_parallel_is_refused(make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    """As nn.DataParallel replicates, without its devices."""
    replicate = importlib.import_module("torch.nn.parallel.replicate")
    monkeypatch.setattr(replicate, "_broadcast_coalesced_reshape", lambda tensors, *_, **__: [tensors, tensors])
    monkeypatch.setattr(replicate, "_get_device_index", lambda device, _: device)
    assert len(replicate.replicate(nn.Sequential(nn.Linear(2, 2)), [0, 1])) == 2
    with pytest.raises(RuntimeError, match=r"got nn\.DataParallel, takes DistributedDataParallel"):
        replicate.replicate(nn.Sequential(make()), [0, 1])


def test_refuses_a_backend_that_can_not_run() -> None:
    with pytest.raises(ValueError, match=r"^backend: got 'numpy', takes 'auto' or one of"):
        SERLoss(DIM, backend="numpy")(X0, X1, G0, G1)
    for name in BACKENDS:
        if reason_not(name, "cpu") is not None:
            with pytest.raises(RuntimeError, match=name):
                SERLoss(DIM, backend=name)(X0, X1, G0, G1)
