"""nt_xent and info_nce on one backend: golden values, a loop over the definition, and the contract. Test files import
all of these tests, with a fixture `backend` of their own."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ser_fast.ops.backends import implementation
from ser_fast.ops.nt_xent import info_nce, nt_xent

GOLDEN = Path(__file__).parents[1] / "golden"
LOSSES = {"nt_xent": nt_xent, "info_nce": info_nce}

f32, f64, bf16, f16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


@pytest.fixture(params=LOSSES.values(), ids=LOSSES)
def loss_function(request: pytest.FixtureRequest) -> Callable[..., Tensor]:
    return request.param


def rows(count: int, dim: int = 5, seed: int = 0, dtype: torch.dtype = f64) -> Tensor:  # (count, dim)
    return torch.randn(count, dim, dtype=f64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def pair(count: int, dim: int = 5, seed: int = 0, dtype: torch.dtype = f64) -> tuple[Tensor, Tensor]:
    return rows(count, dim, 2 * seed, dtype).requires_grad_(), rows(count, dim, 2 * seed + 1, dtype).requires_grad_()


def with_gradients(function: Callable[..., Tensor], x: Tensor, y: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """The loss and its gradients in x and y, detached."""
    x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
    loss = function(x, y, **options)
    return loss.detach(), *torch.autograd.grad(loss.sum(), (x, y))


def worst(actual: Tensor, expected: Tensor) -> float:
    """The largest error, relative to the largest expected value."""
    return ((actual.to(f64) - expected).abs().max() / expected.abs().max()).item()


# ---------------------------------------------------------------- golden cases


class Golden(NamedTuple):
    function: Callable[..., Tensor]
    x: np.ndarray  # (T, D)
    y: np.ndarray  # (T, D)
    image: np.ndarray  # (T,)
    temperature: float
    loss: float
    gradients: tuple[np.ndarray, np.ndarray]  # (T, D)
    per_row: np.ndarray | None = None


def one_way(z0: Tensor, z1: Tensor, **options: Any) -> Tensor:
    """The paper's one-way form: of nt_xent's anchors, those of view 0."""
    return nt_xent(z0, z1, reduction="none", **options)[: len(z0)].mean()


def golden_cases() -> dict[str, Golden]:
    paper, released, degenerate = (
        np.load(GOLDEN / f"{name}.npz") for name in ("nce_paper", "nce_released", "degenerate")
    )
    cases = {}
    for i in range(paper["n_cases"]):
        given = (*(paper[f"P{i}_{key}"] for key in ("z", "zp", "img")), paper[f"P{i}_tau"].item())
        for form, function, per_row in (
            ("sym", nt_xent, paper[f"P{i}_per_token_sym"]),
            ("oneway", one_way, None),
        ):
            gradients = (paper[f"P{i}_grad_z_{form}"], paper[f"P{i}_grad_zp_{form}"])
            cases[f"P{i}_{form}"] = Golden(function, *given, paper[f"P{i}_loss_{form}"].item(), gradients, per_row)
        gradients = (released[f"R{i}_grad_q"], released[f"R{i}_grad_k"])
        loss, per_row = released[f"R{i}_loss"].item(), released[f"R{i}_per_token"]
        cases[f"R{i}"] = Golden(info_nce, *given, loss, gradients, per_row)
    for name in degenerate["names"]:
        of = {key: degenerate[f"{name}_{key}"] for key in ("z", "zp", "img", "tau", "paper_sym", "released")}
        given = (of["z"], of["zp"], of["img"], of["tau"].item())
        gradients = (degenerate[f"{name}_paper_grad_z"], degenerate[f"{name}_paper_grad_zp"])
        cases[f"{name}-nt_xent"] = Golden(nt_xent, *given, of["paper_sym"].item(), gradients)
        gradients = (degenerate[f"{name}_released_grad_q"], degenerate[f"{name}_released_grad_k"])
        cases[f"{name}-info_nce"] = Golden(info_nce, *given, of["released"].item(), gradients)
    return cases


CASES = golden_cases()


def tolerances(dtype: torch.dtype, temperature: float) -> tuple[float, float]:
    """Absolute for the loss, relative to the largest entry for the gradients: those of golden/README.md."""
    if dtype == f64:
        return 1e-12, 1e-11
    if dtype == f32:
        return 2e-5 if temperature == 0.01 else 2e-6, 5e-5 if temperature <= 0.07 else 1e-5
    # Products of float16 operands, too: rounding one moves s by up to half an eps / temperature.
    return max(2e-2, torch.finfo(f16).eps / 2 / temperature), 2e-1 if temperature <= 0.07 else 1e-1


@pytest.mark.parametrize("dtype", [f64, f32, bf16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_golden(name: str, dtype: torch.dtype, backend: str) -> None:
    case = CASES[name]
    loss_tolerance, gradient_tolerance = tolerances(dtype, case.temperature)
    x, y, image = torch.tensor(case.x).to(dtype), torch.tensor(case.y).to(dtype), torch.tensor(case.image)
    options = {"temperature": case.temperature, "image": image, "backend": backend}
    loss, *gradients = with_gradients(case.function, x, y, **options)

    assert loss.item() == pytest.approx(case.loss, rel=0, abs=loss_tolerance)
    if name.startswith("separated") and dtype == f32:
        assert 0 <= loss.item() <= 1e-7
    if case.per_row is not None:
        per_row = case.function(x, y, reduction="none", **options)
        # A row does not average its errors, as the mean does.
        torch.testing.assert_close(per_row.to(f64), torch.tensor(case.per_row), rtol=0, atol=5 * loss_tolerance)

    for side, (actual, expected) in enumerate(zip(gradients, map(torch.tensor, case.gradients), strict=True)):
        assert actual.dtype == dtype
        if name.startswith("single_image"):
            assert loss == 0
            assert not actual.any()
        elif "identical" in name:  # the true gradient is 0, the stored one rounding
            # Or the rounding of half-precision operands, of terms that sum to 2 a row, in the mean.
            half = torch.finfo(f16).eps / (len(x) * case.temperature)
            assert actual.abs().max() <= (half if dtype == bf16 else 1e-6)
        elif name.startswith("row_scales"):
            assert max(map(worst, actual, expected)) <= gradient_tolerance
        elif name.startswith("zero_row") and side == 0:  # the gradient of |x| is a convention at 0
            assert worst(actual[1:], expected[1:]) <= gradient_tolerance
        else:
            assert worst(actual, expected) <= gradient_tolerance


# ---------------------------------------------------------------- the definition, row by row


def by_definition(
    query: Tensor,
    key: Tensor,
    *,
    temperature: float,
    image: Tensor | None = None,
    key_image: Tensor | None = None,
    valid: Tensor | None = None,
    positive: Tensor | None = None,
    key_valid: Tensor | None = None,
    normalize: bool = True,
) -> Tensor:  # (T,)
    if key_valid is None and positive is None and len(key) == len(query):
        key_valid = valid
    if key_image is None:
        key_image = image

    def e(q: Tensor, k: Tensor) -> Tensor:
        return torch.exp(q @ k / (q.norm() * k.norm() if normalize else 1) / temperature)

    losses = []
    for t, q in enumerate(query):
        p = t if positive is None else int(positive[t])
        if (valid is not None and not valid[t]) or (key_valid is not None and not key_valid[p]):
            losses.append(query.new_zeros(()))
            continue
        negatives = [
            k
            for b, k in enumerate(key)
            if (key_valid is None or key_valid[b]) and (b != p if image is None else key_image[b] != image[t])
        ]
        losses.append(-torch.log(e(q, key[p]) / (e(q, key[p]) + sum(e(q, k) for k in negatives))))
    return torch.stack(losses)


def by_definition_both_views(
    z0: Tensor, z1: Tensor, *, image: Tensor | None = None, valid: Tensor | None = None, **options: Any
) -> Tensor:  # (2T,)
    z, count = torch.cat([z0, z1]), len(z0)
    image = torch.arange(count) if image is None else image
    valid = None if valid is None else valid.repeat(2)
    partner = [*range(count, 2 * count), *range(count)]
    image = image.repeat(2)
    return by_definition(
        z, z, image=image, key_image=image, valid=valid, positive=torch.tensor(partner), key_valid=valid, **options
    )


IMAGE = torch.tensor([7, -3, 7, 2**62, 2**62 + 1, 2**32 + 7])  # unsorted, and alike in float64 or in 32 bits
KEY_IMAGE = torch.tensor([7, 7, -3, 2**62, 0, 0, 2**32 + 7, 2**62 + 1, 2**62])
VALID = torch.tensor([True, False, True, True, True, True])
KEY_VALID = torch.tensor([True, True, True, False, True, False, True, True, True])
POSITIVE = torch.tensor([1, -9, 0, 8, 7, 3])  # of IMAGE[t] but for the last; the invalid row's lies outside

# Options of 6 rows, and the number of keys.
SETTINGS: dict[str, tuple[Callable[..., Tensor], int, dict[str, Tensor]]] = {
    "views": (nt_xent, 6, {}),
    "views, image": (nt_xent, 6, {"image": IMAGE}),
    "views, int8": (nt_xent, 6, {"image": torch.tensor([1, 1, -1, -1, 2, 2], dtype=torch.int8)}),
    "views, one image": (nt_xent, 6, {"image": torch.ones(6, dtype=torch.int32)}),
    "views, valid": (nt_xent, 6, {"valid": VALID}),
    "views, image, valid": (nt_xent, 6, {"image": IMAGE, "valid": VALID}),
    "keys": (info_nce, 6, {}),
    "keys, image": (info_nce, 6, {"image": IMAGE}),
    "keys, one image": (info_nce, 6, {"image": torch.ones(6, dtype=torch.int64)}),
    "keys, valid": (info_nce, 6, {"valid": VALID}),
    "keys, image, valid": (info_nce, 6, {"image": IMAGE, "valid": VALID}),
    "keys, valid, key_valid": (info_nce, 6, {"valid": VALID, "key_valid": VALID.flip(0)}),
    "queue": (info_nce, 9, {}),
    "queue, valid": (info_nce, 9, {"valid": VALID}),
    "queue, image": (info_nce, 9, {"image": KEY_IMAGE[:6], "key_image": KEY_IMAGE}),
    "gathered": (info_nce, 9, {"positive": POSITIVE.clamp(min=0), "image": IMAGE, "key_image": KEY_IMAGE}),
    "gathered, no image": (info_nce, 9, {"positive": POSITIVE.clamp(min=0).int()}),
    "gathered, shared positive": (info_nce, 9, {"positive": torch.tensor([4, 4, 4, 0, 0, 8])}),
    "gathered, valid": (info_nce, 9, {"positive": POSITIVE, "valid": VALID}),
    "gathered, key_valid": (info_nce, 9, {"positive": POSITIVE.clamp(min=0), "key_valid": KEY_VALID}),
    "gathered, all": (
        info_nce,
        9,
        {"positive": POSITIVE, "image": IMAGE, "key_image": KEY_IMAGE, "valid": VALID, "key_valid": KEY_VALID},
    ),
    "fewer keys": (info_nce, 2, {"positive": torch.tensor([0, 1, 0, 1, 1, 1], dtype=torch.uint8)}),
    "permuted, valid": (info_nce, 6, {"positive": torch.tensor([1, 0, 2, 3, 4, 4]), "valid": VALID}),
    "permuted": (info_nce, 6, {"positive": torch.tensor([2, 4, 0, 3, 1, 5]), "image": IMAGE}),
}


@pytest.fixture(params=SETTINGS.values(), ids=SETTINGS)
def setting(request: pytest.FixtureRequest) -> tuple[Callable[..., Tensor], Tensor, Tensor, dict[str, Tensor]]:
    function, keys, options = request.param
    return function, rows(6), rows(keys, seed=1), options


@pytest.mark.parametrize("normalize", [True, False])
def test_follows_the_definition(setting: Any, normalize: bool, backend: str) -> None:
    function, x, y, options = setting
    options = {"temperature": 0.5, "normalize": normalize, **options}
    definition = by_definition_both_views if function is nt_xent else by_definition
    per_row = function(x, y, reduction="none", backend=backend, **options)
    torch.testing.assert_close(per_row, definition(x, y, **options), rtol=0, atol=1e-12)

    # Another weight for each row, so that the gradient of every one is seen.
    weight = torch.linspace(-1, 2, len(per_row), dtype=f64)
    actual = with_gradients(lambda *xy, **o: weight @ function(*xy, reduction="none", **o), x, y, **options)
    expected = with_gradients(lambda *xy, **o: weight @ definition(*xy, **o), x, y, **options)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_reductions(setting: Any, backend: str) -> None:
    function, x, y, options = setting
    mean, total, per_row = (
        with_gradients(function, x, y, temperature=0.2, reduction=reduction, backend=backend, **options)
        for reduction in ("mean", "sum", "none")
    )
    valid = options.get("valid", torch.ones(6, dtype=torch.bool))
    key_valid = options.get(
        "key_valid", valid if "positive" not in options and len(y) == 6 else torch.ones(len(y), dtype=torch.bool)
    )
    positive = options.get("positive", torch.arange(6)).long() * valid
    anchors = 2 * valid.sum() if function is nt_xent else (valid & key_valid[positive]).sum()
    torch.testing.assert_close(per_row[0].sum(), total[0])
    torch.testing.assert_close(per_row[1:], total[1:])
    torch.testing.assert_close(mean, tuple(x / anchors for x in total))


def test_simclr(backend: str) -> None:
    x, y = pair(16, 8)
    z = F.normalize(torch.cat([x, y]))
    similarity = (z @ z.T / 0.1).fill_diagonal_(-torch.inf)
    expected = F.cross_entropy(similarity, torch.arange(32).roll(16))
    torch.testing.assert_close(nt_xent(x, y, temperature=0.1, backend=backend), expected)


def test_infonce_is_cross_entropy(backend: str) -> None:
    x, y = pair(16, 8)
    expected = F.cross_entropy(F.normalize(x) @ F.normalize(y).T / 0.1, torch.arange(16))
    torch.testing.assert_close(info_nce(x, y, temperature=0.1, backend=backend), expected)


# ---------------------------------------------------------------- numbers at their limits


def dense(function: Callable[..., Tensor], x: Tensor, y: Tensor, temperature: float, image: Tensor) -> Tensor:
    """The formula as one would write it in a training script, in the dtype of its inputs."""
    x, y = F.normalize(x), F.normalize(y)
    if function is nt_xent:
        x, y, image = torch.cat([x, y]), torch.cat([y, x]), image.repeat(2)
    taken = (image[:, None] != image) | torch.eye(len(x), dtype=torch.bool)
    return F.cross_entropy((x @ y.T / temperature).masked_fill(~taken, -torch.inf), torch.arange(len(x)))


@pytest.mark.parametrize("dtype", [f32, bf16, f16], ids=str)
@pytest.mark.parametrize("temperature", [0.01, 0.1, 0.5])
@pytest.mark.parametrize(("images", "per_image", "dim"), [(2, 3, 4), (5, 13, 33), (3, 49, 128)])
def test_no_worse_than_dense(
    loss_function: Callable[..., Tensor],
    images: int,
    per_image: int,
    dim: int,
    temperature: float,
    dtype: torch.dtype,
    backend: str,
) -> None:
    image = torch.arange(images).repeat_interleave(per_image)
    x, y = rows(len(image), dim, dtype=dtype), rows(len(image), dim, seed=1, dtype=dtype)
    y = x + y / 2  # views that agree, as after training
    options = {"temperature": temperature, "image": image}
    exact = with_gradients(loss_function, x.to(f64), y.to(f64), backend="reference", **options)
    formula = with_gradients(partial(dense, loss_function), x, y, **options)
    actual = with_gradients(loss_function, x, y, backend=backend, **options)
    one_rounding = torch.finfo(f32).eps * (4 + 1 / temperature)  # of s, up to 1 / temperature, and of a loss of a few
    assert abs(actual[0] - exact[0]) <= abs(formula[0] - exact[0]) + one_rounding
    for found, plain, truth in zip(actual[1:], formula[1:], exact[1:], strict=True):
        assert worst(found, truth) <= worst(plain, truth) + one_rounding + torch.finfo(dtype).eps


@pytest.mark.parametrize("temperature", [0.02, 0.05, 0.1])
def test_small_losses(loss_function: Callable[..., Tensor], temperature: float, backend: str) -> None:
    """Where 1 - e^-loss is 0 in float32, the gradient is still right: relative to its own size."""
    x, y = (torch.eye(6, 8) + rows(6, 8, seed=seed, dtype=f32) / 10 for seed in (0, 1))
    exact = with_gradients(loss_function, x.to(f64), y.to(f64), temperature=temperature, backend="reference")
    actual = with_gradients(loss_function, x, y, temperature=temperature, backend=backend)
    assert 0 < exact[0] < 1e-2
    for found, truth in zip(actual, exact, strict=True):
        assert worst(found, truth) <= 10 * torch.finfo(f32).eps / temperature


@pytest.mark.parametrize("scale", [1e-10, 1e18, 1e30])
@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
def test_any_length(loss_function: Callable[..., Tensor], dtype: torch.dtype, scale: float, backend: str) -> None:
    """The loss does not see the lengths of the rows, and the gradient is inverse to them."""
    scale = 2.0 ** round(math.log2(scale))  # exact in every dtype
    x, y = rows(6, dtype=dtype), rows(6, seed=1, dtype=dtype)
    loss, *gradients = with_gradients(loss_function, x, y, temperature=0.2, backend=backend)
    scaled, *scaled_gradients = with_gradients(loss_function, x * scale, y * scale, temperature=0.2, backend=backend)
    assert loss > 0
    torch.testing.assert_close(scaled, loss)
    for actual, expected in zip(scaled_gradients, gradients, strict=True):
        torch.testing.assert_close(
            actual.to(f64) * scale, expected.to(f64), rtol=2e-2 if dtype == bf16 else 1e-5, atol=1e-6
        )


def test_short_rows_as_normalize(loss_function: Callable[..., Tensor], backend: str) -> None:
    x, y = rows(6), rows(6, seed=1)
    x[0], x[1], y[2] = 0, x[1] * 1e-14, y[2] * 1e-13
    image = torch.arange(6)
    actual = with_gradients(loss_function, x, y, temperature=0.2, backend=backend)
    expected = with_gradients(partial(dense, loss_function), x, y, temperature=0.2, image=image)
    expected[1][:2], expected[2][2] = 0, 0  # they have no direction to change
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("detached", [False, True])
@pytest.mark.parametrize("dtype", [f64, f32, bf16, f16], ids=str)
def test_a_row_without_a_direction_has_no_gradient(dtype: torch.dtype, detached: bool, backend: str) -> None:
    """A row of zeros, or one that is too short: exactly 0 in its own row, and what it would be elsewhere."""
    x, y = rows(6, dtype=dtype), rows(6, seed=1, dtype=dtype)
    x[0], x[3], y[2] = 0, x[3] * 1e-20, 0
    weight = torch.linspace(-1, 2, 6)
    options = {"temperature": 0.2, "reduction": "none"}

    def gradients(z0: Tensor, z1: Tensor, backend: str) -> tuple[Tensor, ...]:
        z0, z1 = z0.clone().requires_grad_(), z1.clone().requires_grad_(not detached)
        loss = info_nce(z0, z1, backend=backend, **options)
        return torch.autograd.grad((loss * weight).sum(), (z0,) if detached else (z0, z1))

    found, exact = gradients(x, y, backend), gradients(x.to(f64), y.to(f64), "reference")
    assert not found[0][[0, 3]].any()
    assert detached or not found[1][2].any()
    for actual, expected in zip(found, exact, strict=True):
        assert worst(actual, expected) <= {f64: 1e-12, f32: 1e-5, bf16: 1e-1, f16: 1e-1}[dtype]


def test_unnormalized_is_normalized_before(loss_function: Callable[..., Tensor], backend: str) -> None:
    x, y = rows(6), rows(6, seed=1)
    options = {"temperature": 0.2, "backend": backend}
    expected = loss_function(x, y, **options)
    torch.testing.assert_close(loss_function(F.normalize(x), F.normalize(y), normalize=False, **options), expected)
    assert loss_function(x, y, normalize=False, **options) != pytest.approx(expected.item())


@pytest.mark.parametrize("dtype", [f64, f32, bf16, f16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("count", [0, 1, 4])
def test_nothing_takes_part(
    loss_function: Callable[..., Tensor], count: int, reduction: str, dtype: torch.dtype, backend: str
) -> None:
    x, y = pair(count, dtype=dtype)
    valid = torch.zeros(count, dtype=torch.bool)
    loss = loss_function(x, y, temperature=0.1, valid=valid, reduction=reduction, backend=backend)
    expected_shape = (count * (1 + (loss_function is nt_xent)),) if reduction == "none" else ()
    assert loss.shape == expected_shape
    assert loss.dtype == (f64 if dtype == f64 else f32)
    assert not loss.any()
    loss.sum().backward()
    for z in (x, y):
        assert z.grad is not None
        assert z.grad.dtype == dtype
        assert not z.grad.any()


def test_lone_row(backend: str) -> None:
    """One row of two views has its partner and nothing to tell it from."""
    x, y = pair(1)
    for function in LOSSES.values():
        loss, *gradients = with_gradients(function, x, y, temperature=0.1, backend=backend)
        assert loss == 0
        assert not any(g.any() for g in gradients)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_nan_and_inf_give_nan(
    loss_function: Callable[..., Tensor], side: int, poison: float, normalize: bool, backend: str
) -> None:
    views = [rows(6, dtype=f32), rows(6, seed=1, dtype=f32)]
    views[side][2, 1] = poison
    options = {"valid": VALID, "normalize": normalize, "temperature": 0.1, "backend": backend}
    loss, *gradients = with_gradients(loss_function, *views, **options)
    assert loss.isnan()
    assert gradients[side][2].isnan().all()
    assert not any(g[~VALID].any() for g in gradients)  # 0, not NaN, where a row takes no part


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_invalid_rows_have_no_effect(setting: Any, poison: float, normalize: bool, backend: str) -> None:
    function, x, y, options = setting
    out = ~options.get("valid", torch.arange(6) != 4)
    key_out = ~options.get("key_valid", torch.arange(len(y)) != 4)
    options = {"valid": ~out, "temperature": 0.2, "normalize": normalize, "backend": backend, **options}
    if function is nt_xent:
        key_out = out
    else:
        options["key_valid"] = ~key_out
    clean = with_gradients(function, x, y, **options)
    x, y = x.clone(), y.clone()
    x[out], y[key_out] = poison, poison
    poisoned = with_gradients(function, x, y, **options)
    torch.testing.assert_close(poisoned, clean, rtol=0, atol=0)
    assert not poisoned[1][out].any()
    assert not poisoned[2][key_out].any()
    assert poisoned[0].isfinite()


def test_repeats_bit_for_bit(setting: Any, backend: str) -> None:
    function, x, y, options = setting
    first, second = (
        with_gradients(function, x.float(), y.float(), temperature=0.1, backend=backend, **options) for _ in range(2)
    )
    assert all(map(torch.equal, first, second))


# ---------------------------------------------------------------- memory layouts, autograd, compilation

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.T.contiguous().T,
    "every other row": lambda x: x.repeat_interleave(2, 0)[::2],
    "every other column": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "expanded": lambda x: x[:1].expand(len(x), -1),
    "offset": lambda x: torch.cat([x[:1], x])[1:],
}


@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(loss_function: Callable[..., Tensor], layout: Any, dtype: torch.dtype, backend: str) -> None:
    x, y = rows(6, dtype=dtype), rows(6, seed=1, dtype=dtype)
    image, valid = torch.stack([IMAGE, IMAGE], 1)[:, 0], torch.stack([VALID, VALID], 1)[:, 0]
    options = {"temperature": 0.2, "image": image, "valid": valid, "backend": backend}
    strided = with_gradients(loss_function, layout(x), y, **options)
    dense = with_gradients(loss_function, layout(x).contiguous(), y.clone(), **options)
    torch.testing.assert_close(strided, dense)


class OpCalls(TorchDispatchMode):
    """Records each call of an op of this library and what it returned."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "ser_fast":
            self.calls.append((func, args, out))
        return out


@pytest.mark.parametrize(("need_query", "need_key"), [(True, False), (False, True), (True, True)])
def test_computes_only_the_gradients_needed(need_query: bool, need_key: bool, backend: str) -> None:
    query, key = rows(6).requires_grad_(need_query), rows(6, seed=1).requires_grad_(need_key)
    with OpCalls() as recorded:
        info_nce(query, key, temperature=0.2, backend=backend).backward()
    assert (query.grad is not None, key.grad is not None) == (need_query, need_key)
    names = [func.name() for func, *_ in recorded.calls]
    if need_key:
        assert names == ["ser_fast::info_nce", "ser_fast::info_nce_backward"]
        d_query, d_key = recorded.calls[-1][2]
        assert (d_query.numel() > 0, d_key.numel() > 0) == (need_query, need_key)
    else:  # in one pass
        assert names == ["ser_fast::info_nce_detached"]
    expected = with_gradients(info_nce, query, key, temperature=0.2, backend=backend)[1:]
    for z, gradient in zip((query, key), expected, strict=True):
        if z.requires_grad:
            torch.testing.assert_close(z.grad, gradient, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("temperature", [0.01, 0.2])
@pytest.mark.parametrize("dtype", [f64, f32, bf16], ids=str)
@pytest.mark.parametrize("setting", [case for case in SETTINGS.values() if case[0] is info_nce], indirect=True)
def test_detached_keys(setting: Any, dtype: torch.dtype, temperature: float, normalize: bool, backend: str) -> None:
    """One pass gives what two give, for any weights of the rows."""
    _, x, y, options = setting
    query, key = x.to(dtype), y.to(dtype)
    options = {"temperature": temperature, "normalize": normalize, "reduction": "none", "backend": backend, **options}
    weight = rows(len(query), 1)[:, 0]
    results = []
    for detached in (True, False):
        q = query.clone().requires_grad_()
        loss = info_nce(q, key.clone().requires_grad_(not detached), **options)
        results.append((loss.detach(), *torch.autograd.grad((weight * loss).sum(), q)))
    for actual, expected in zip(*results, strict=True):
        assert actual.dtype == expected.dtype
        largest = expected.abs().max().item()  # 0 without negatives
        assert (actual - expected).abs().max() <= largest * {f64: 1e-12, f32: 2**-20 / temperature, bf16: 1e-2}[dtype]


@pytest.mark.parametrize("temperature", [0.01, 0.2])
@pytest.mark.parametrize("dtype", [f64, f32, bf16], ids=str)
@pytest.mark.parametrize("setting", [case for case in SETTINGS.values() if case[0] is nt_xent], indirect=True)
def test_kept_similarities_change_nothing(setting: Any, dtype: torch.dtype, temperature: float, backend: str) -> None:
    _, x, y, options = setting
    options = {"temperature": temperature, "reduction": "sum", "backend": backend, **options}
    computed, kept = (
        with_gradients(nt_xent, x.to(dtype), y.to(dtype), memory_budget=budget, **options) for budget in (0, 2**40)
    )
    for actual, expected in zip(kept, computed, strict=True):
        largest = expected.abs().max().item()
        assert (actual - expected).abs().max() <= largest * {f64: 1e-12, f32: 1e-6, bf16: 1e-2}[dtype]


def test_keeps_no_more_than_the_budget(backend: str) -> None:
    x, y = pair(6, dtype=f32)
    wanted = implementation(backend).kept_bytes(6, f32, 0.2, True)
    for budget in (0, wanted - 1, wanted, 2**40):
        with OpCalls() as recorded:
            nt_xent(x, y, temperature=0.2, memory_budget=max(budget, 0), backend=backend)
            nt_xent(x.detach(), y.detach(), temperature=0.2, memory_budget=max(budget, 0), backend=backend)
        kept, without_gradient = (call[2][1].numel() for call in recorded.calls)
        assert kept == (wanted if budget >= wanted else 0)
        assert without_gradient == 0


def test_never_keeps_what_has_no_bound(backend: str) -> None:
    kept_bytes = implementation(backend).kept_bytes
    assert kept_bytes(6, f32, 0.01, True) == kept_bytes(6, f32, 0.2, False) == 0


def test_autocast_changes_nothing(loss_function: Callable[..., Tensor], backend: str) -> None:
    x, y = rows(6, dtype=f32), rows(6, seed=1, dtype=f32)
    expected = with_gradients(loss_function, x, y, temperature=0.05, backend=backend)
    with torch.autocast("cpu", dtype=bf16):
        actual = with_gradients(loss_function, x, y, temperature=0.05, backend=backend)
    assert all(map(torch.equal, actual, expected))
