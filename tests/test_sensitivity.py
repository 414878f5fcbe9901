"""The sensitivity study: its numbers against hand-computed ones, what it keeps between calls, and what it writes."""

import base64
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from cases.command_line import assert_same_files, run_cli
from scipy.stats import ttest_1samp
from torch import Tensor, nn

from ser_fast.evaluation.protocol import random_control, random_controls
from ser_fast.interpolation import INTERPOLATIONS, PADDINGS
from ser_fast.lattice import LatticeMap, Size, positions
from ser_fast.ops.group_action import group_action
from ser_fast.sensitivity import measures, retraining, study
from ser_fast.sensitivity.analysis import combine, mean, recommend, trusted
from ser_fast.sensitivity.evaluation import SensitivityResult, evaluate
from ser_fast.sensitivity.factors import (
    DEFAULT,
    ELEMENTS,
    LATTICES,
    POSITION_KERNELS,
    Resampling,
    Setting,
    common_valid,
    corners,
    one_at_a_time,
    whole_grid,
)
from ser_fast.sensitivity.figures import draw
from ser_fast.sensitivity.page import REPORT, SUMMARY, write_report
from ser_fast.sensitivity.sources import (
    CONTROL,
    Features,
    Fields,
    Photographs,
    open_model,
    resized_positions,
)
from ser_fast.sensitivity.table import COLUMNS, TABLE, Row, StudyTable, read_rows
from ser_fast.sensitivity.words import summarize
from ser_fast.training.run_folder import RunFolder
from ser_fast.views.pixels import normalize, transform_images
from ser_fast.vit import SplitViT, save_split_vit

TINY = {"img_size": 32, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
CPU = torch.device("cpu")
D4 = [name for name, element in ELEMENTS.items() if element.group == "D4"]
EVERY_KERNEL = [Resampling(name, antialias) for name in INTERPOLATIONS for antialias in (False, True)]


def tiny_vit(**options: Any) -> SplitViT:
    return SplitViT("vit_tiny_patch16_224", split=1, **{**TINY, **options})


def smooth_images(count: int, side: int) -> Tensor:
    return F.interpolate(torch.rand(count, 3, 6, 6), size=(side, side), mode="bicubic").clamp(0, 1)


def values(estimates: Sequence[measures.Estimate], measure: str) -> list[float]:
    found = [estimate.value for estimate in estimates if estimate.measure == measure]
    assert found
    return found


# ---------------------------------------------------------------- factors


@pytest.mark.parametrize("size", [(5, 5), (4, 6)], ids=str)
@pytest.mark.parametrize("name", D4)
def test_aligned_corners_leave_d4_as_it_is(name: str, size: Size) -> None:
    g = ELEMENTS[name].build(size)
    assert torch.equal(corners(g).linear, g.linear)
    assert torch.equal(corners(g).d4_code, g.d4_code)


def test_aligned_corners_are_torchs() -> None:
    x = torch.randn(2, 5, 7, 3)
    planes = x.permute(0, 3, 1, 2)
    resized = group_action(x, corners(LatticeMap.resize((5, 7), (8, 4))), interpolation="bilinear")
    expected = F.interpolate(planes, size=(8, 4), mode="bilinear", align_corners=True)
    torch.testing.assert_close(resized, expected.permute(0, 2, 3, 1), rtol=0, atol=1e-5)

    g = LatticeMap.rotate((5, 7), 20.0)
    grid = F.affine_grid(g.theta().expand(2, 2, 3), [2, 3, 5, 7], align_corners=True)
    expected = F.grid_sample(planes, grid, mode="bilinear", padding_mode="border", align_corners=True)
    rotated = group_action(x, corners(g), interpolation="bilinear")
    torch.testing.assert_close(rotated, expected.permute(0, 2, 3, 1), rtol=0, atol=1e-5)


def test_aligned_corners_carry_over_to_products_and_inverses() -> None:
    a, b = LatticeMap.resize((6, 8), (5, 9)), LatticeMap.rotate((5, 9), 30.0)
    torch.testing.assert_close(corners(b @ a).linear, (corners(b) @ corners(a)).linear)
    torch.testing.assert_close(corners(a.inverse()).linear, corners(a).inverse().linear)
    with pytest.raises(ValueError, match=r"g: got a map of \(6, 8\) to \(1, 8\)"):
        corners(LatticeMap.resize((6, 8), (1, 8)))


@pytest.mark.parametrize("name", ELEMENTS)
def test_the_mask_is_common_to_the_conventions(name: str) -> None:
    g = ELEMENTS[name].build((7, 9))
    assert torch.equal(common_valid(g), g.valid()[0] & corners(g).valid()[0])
    assert common_valid(g, LatticeMap.affine(g.size_out, torch.eye(2), torch.tensor([0.0, 50.0]))).sum() == 0


def test_the_presets() -> None:
    few, whole = one_at_a_time(), whole_grid()
    assert len(set(few)) == len(few) == 1 + (7 - 1) + 1 + (3 - 1) + 1 + (5 - 1) + (3 - 1) + (3 - 1)
    assert len(set(whole)) == len(whole) == 7 * 2 * 3 * 2 * 5 * 3 * 3
    assert DEFAULT in few
    assert set(few) <= set(whole)
    for name, element in ELEMENTS.items():
        for size in LATTICES:
            g = element.build(size)
            assert (int(g.d4_code) >= 0) == (element.group == "D4"), name
            assert common_valid(g).any()


# ---------------------------------------------------------------- sources


def test_a_field_is_the_mean_of_its_waves_over_each_cell() -> None:
    fields = Fields(2, seed=3)
    g = LatticeMap.rotate((5, 6), 25.0) @ LatticeMap.resize((4, 7), (5, 6))
    fine = 20
    points = g.on(g.size_in, (5 * fine, 6 * fine))  # the same map, on points a 20th of a token apart
    y, x = positions(points.linear, points.offset, points.size_in, points.size_out)
    angle = 2 * math.pi * (fields.frequency[..., :1] * y + fields.frequency[..., 1:] * x)  # (N, K, points)
    waves = (angle[..., None] + fields.phase[:, :, None, :]).cos().sum(1) / math.sqrt(fields.phase.shape[1] / 2)
    expected = F.avg_pool2d(waves.mT.unflatten(2, points.size_out), fine).permute(0, 2, 3, 1)
    (tokens,) = fields.maps(g)
    torch.testing.assert_close(tokens.double(), expected, rtol=0, atol=2e-3)


def test_fields_nest_and_turn_with_the_lattice() -> None:
    fields = Fields(2, seed=0)
    (tokens,) = fields.maps(LatticeMap.identity((6, 8)))
    (halved,) = fields.maps(LatticeMap.resize((6, 8), (3, 4)))
    (turned,) = fields.maps(LatticeMap.rot90((6, 8), 1))
    torch.testing.assert_close(halved, tokens.unflatten(1, (3, 2)).unflatten(3, (4, 2)).mean((2, 4)))
    torch.testing.assert_close(turned, torch.rot90(tokens, 1, (1, 2)), rtol=0, atol=1e-5)
    assert not torch.equal(tokens, Fields(2, seed=1).maps(LatticeMap.identity((6, 8)))[0])


def test_photographs_are_pooled_and_moved_in_pixels() -> None:
    images = smooth_images(2, 30)
    photographs = Photographs(images)
    (tokens,) = photographs.maps(LatticeMap.identity((7, 4)))  # patches of 4: 28 x 16 pixels from the middle
    torch.testing.assert_close(tokens, F.avg_pool2d(images[:, :, 1:29, 7:23], 4).permute(0, 2, 3, 1))
    (turned,) = photographs.maps(LatticeMap.rot90((7, 4), 1))
    torch.testing.assert_close(turned, torch.rot90(tokens, 1, (1, 2)))
    smaller = LatticeMap.resize((7, 7), (4, 4))
    kernels = [photographs.maps(smaller, pixels=name)[0] for name in ("bicubic", "bilinear", "bicubic_antialias")]
    pixels = F.interpolate(images[:, :, 1:29, 1:29], size=(16, 16), mode="bicubic", antialias=True).clamp(0, 1)
    torch.testing.assert_close(kernels[2], F.avg_pool2d(pixels, 4).permute(0, 2, 3, 1), rtol=0, atol=1e-5)
    assert not torch.allclose(kernels[0], kernels[1], atol=1e-4)
    assert not torch.allclose(kernels[0], kernels[2], atol=1e-4)


def test_small_images_are_enlarged_to_the_model() -> None:
    images = smooth_images(2, 20)
    (tokens, _) = Features("tiny", tiny_vit(), images).maps(LatticeMap.identity((6, 10)))  # 24 x 40 pixels
    assert tokens.shape == (2, 6, 10, 16)


@pytest.mark.parametrize("grid", [(8, 8), (5, 5), (5, 7)], ids=str)
def test_timms_own_kernel_changes_nothing(grid: Size) -> None:
    vit = tiny_vit().eval()
    images = torch.rand(2, 3, 4 * grid[0], 4 * grid[1])
    features = Features("tiny", vit, images if grid[0] == grid[1] else F.pad(images, (0, 0, 0, 8)))
    if grid[0] != grid[1]:
        features.images = F.interpolate(images, size=(28, 28))
        images = features.images[:, :, 4:24]
    with torch.no_grad():
        expected = vit.layer_maps(normalize(images))
    for layer, tokens in zip(expected, features.maps(LatticeMap.identity(grid)), strict=True):
        torch.testing.assert_close(tokens, layer, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kernel", POSITION_KERNELS)
def test_positions_follow_the_moved_lattice(kernel: str) -> None:
    vit, images = tiny_vit().eval(), smooth_images(2, 32)
    torch.nn.init.normal_(vit.pos_embed)
    moved = transform_images(images, LatticeMap.resize((32, 32), (20, 24))).clamp(0, 1)
    with torch.no_grad(), resized_positions(vit, (5, 6), kernel):
        expected = vit.layer_maps(normalize(moved))
    found = Features("tiny", vit, images).maps(LatticeMap.resize((8, 8), (5, 6)), positions=kernel)
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-5)


def test_position_kernels_act_inside_the_block_alone() -> None:
    vit = tiny_vit(class_token=True)
    torch.nn.init.normal_(vit.pos_embed)
    own, grid = vit.pos_embed, vit.patch_embed.grid_size
    resized = {}
    for kernel in POSITION_KERNELS:
        with resized_positions(vit, (5, 5), kernel):
            resized[kernel] = vit.pos_embed.detach()
    assert vit.pos_embed is own
    assert vit.patch_embed.grid_size == grid
    planes = own[:, 1:].unflatten(1, grid).permute(0, 3, 1, 2)
    expected = F.interpolate(planes, size=(5, 5), mode="bilinear").flatten(2).mT
    torch.testing.assert_close(resized["bilinear"][:, 1:], expected)
    assert torch.equal(resized["bilinear"][:, :1], own[:, :1])
    assert len({float(positions.sum()) for positions in resized.values()}) == 3


def test_models_are_opened_beside_random_controls(tmp_path: Path) -> None:
    vit = tiny_vit()
    save_split_vit(tmp_path / "encoder.safetensors", vit)
    models = {name: open_model(name) for name in (str(tmp_path), f"{tmp_path}/encoder.safetensors")}
    assert all(torch.equal(model.patch_embed.proj.weight, vit.patch_embed.proj.weight) for model in models.values())
    controls = random_controls(models, seed=0, prefix=CONTROL)
    assert list(controls) == [CONTROL]  # one control for one architecture
    assert torch.equal(controls[CONTROL].patch_embed.proj.weight, random_control(vit).patch_embed.proj.weight)
    both = random_controls({"a": vit, "b": tiny_vit(depth=1)}, seed=0, prefix=CONTROL)
    assert list(both) == [CONTROL, f"{CONTROL} (b)"]
    with pytest.raises(ValueError, match="checkpoint: got nowhere, takes a run's folder"):
        open_model("nowhere")


def test_weights_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    create_model = timm.create_model

    def offline(name: str, pretrained: bool = False, **options: object) -> nn.Module:
        if pretrained:
            raise FileNotFoundError("no network\nhere")
        return create_model(name, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ValueError, match="the weights of vit_tiny_patch16_224 can't be had: no network here"):
        open_model("vit_tiny_patch16_224")


# ---------------------------------------------------------------- bootstrap


def test_the_interval_of_a_mean_is_that_of_theory() -> None:
    x = torch.randn(400, dtype=torch.float64)
    counts = measures.bootstrap_counts(400, resamples=4000)
    value, low, high = measures.interval(measures.ratios(x, torch.ones_like(x), counts)).tolist()
    error = float(x.std()) / math.sqrt(400)
    assert value == pytest.approx(float(x.mean()))
    assert (value - low) / error == pytest.approx(1.96, rel=0.1)
    assert (high - value) / error == pytest.approx(1.96, rel=0.1)


def test_resamples_are_whole_and_seeded() -> None:
    counts = measures.bootstrap_counts(5, resamples=50, seed=7)
    assert counts[0].tolist() == [1.0] * 5
    assert counts.sum(1).tolist() == [5.0] * 51
    assert torch.equal(counts, measures.bootstrap_counts(5, resamples=50, seed=7))
    assert not torch.equal(counts, measures.bootstrap_counts(5, resamples=50, seed=8))


def test_ratios_are_of_sums() -> None:
    counts = torch.tensor([[1.0, 1.0], [2.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    a, b = torch.tensor([[1.0, 3.0], [0.0, 0.0]]).double(), torch.tensor([2.0, 2.0]).double()
    assert measures.ratios(a, b, counts).tolist() == [[1.0, 0.5, 1.5], [0.0, 0.0, 0.0]]
    statistics = torch.tensor([0.3, *range(41)], dtype=torch.float64)
    assert measures.interval(statistics).tolist() == pytest.approx([0.3, 1.0, 39.0])


# ---------------------------------------------------------------- measures


class Encoder:
    """An encoder of one-pixel patches: `layer` makes tokens (N, H, W, C) of pixels (N, 3, H, W)."""

    patch_size = (1, 1)
    training = False

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def modules(self) -> list[Any]:
        return []

    def eval(self) -> None: ...

    def layer_maps(self, images: Tensor) -> list[Tensor]:
        return [self.layer(images).contiguous()]


def errors(encoder: Encoder, element: str, resamplings: Sequence[Resampling]) -> list[measures.Estimate]:
    source = Features("stub", encoder, torch.rand(6, 3, 8, 8))  # type: ignore[arg-type]
    g = ELEMENTS[element].build((8, 8))
    before, after = source.maps(LatticeMap.identity((8, 8))), source.maps(g)
    return measures.equivariance(before, after, g, resamplings, seed=0)


@pytest.mark.parametrize("name", D4)
def test_a_permuting_encoder_is_exactly_equivariant(name: str) -> None:
    estimates = errors(Encoder(lambda x: x.permute(0, 2, 3, 1)[..., [2, 0, 1]]), name, EVERY_KERNEL)
    assert {e.value for e in estimates if e.measure in ("relative_error", "difference")} == {0.0}
    assert values(estimates, "aligned_cosine") == pytest.approx([1.0] * len(EVERY_KERNEL), abs=1e-12)
    assert values(estimates, "retrieval") == [1.0]
    assert {(e.low, e.high) for e in estimates if e.measure == "relative_error"} == {(0.0, 0.0)}


def test_all_settings_share_one_mask() -> None:
    g = ELEMENTS["angle 10"].build((12, 16))
    tokens = int(common_valid(g).sum())
    assert tokens < int(g.valid().sum())
    x = [torch.randn(2, 12, 16, 3)]
    assert values(measures.equivariance(x, x, g, [DEFAULT.resampling], seed=0), "chance") == [1 / tokens]


def test_a_positional_encoder_is_not() -> None:
    ramp = torch.arange(8.0)
    estimates = errors(Encoder(lambda x: x.permute(0, 2, 3, 1) * 0 + ramp[:, None]), "hflip", [DEFAULT.resampling])
    assert values(estimates, "relative_error") == pytest.approx([2.0])  # the mirrored ramp, less its mean, is minus it


def test_a_constant_encoder_is_exposed_by_retrieval() -> None:
    """Tokens alike within an image: perfectly equivariant, and no better than chance at telling places apart."""
    estimates = errors(
        Encoder(lambda x: x.mean((2, 3), keepdim=True).expand_as(x).permute(0, 2, 3, 1)), "rot90", [DEFAULT.resampling]
    )
    assert values(estimates, "relative_error")[0] < 1e-5
    assert values(estimates, "retrieval") == pytest.approx(values(estimates, "chance"))
    assert values(estimates, "chance") == [1 / 64]


def test_tokens_that_never_vary_have_no_error() -> None:
    """But for the last bit of float32, that is, which is no signal."""
    estimates = errors(Encoder(lambda x: 1 + 1e-7 * x.permute(0, 2, 3, 1)), "rot90", [DEFAULT.resampling])
    assert all(math.isnan(value) for value in values(estimates, "relative_error"))
    assert all(math.isnan(value) for value in values(estimates, "retrieval"))


def test_differences_are_paired() -> None:
    """A resampling that errs by the same factor in each image differs surely, however the images differ."""
    x = torch.randn(8, 6, 6, 2) * torch.logspace(-2, 2, 8)[:, None, None, None]
    g = ELEMENTS["shift 0.5"].build((6, 6))
    kernels = [DEFAULT.resampling, Resampling("nearest")]
    truth = Resampling("bilinear")(x, g)
    found = {e.measure + e.resampling.interpolation: e for e in measures.equivariance([x], [truth], g, kernels, seed=0)}
    worse, base, change = (
        found[name] for name in ("relative_errornearest", "relative_errorbicubic", "differencenearest")
    )
    assert change.value == pytest.approx(worse.value - base.value)
    assert change.low > 0
    assert found["differencebicubic"][3:6] == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("name", D4)
def test_d4_is_a_representation_exactly(name: str) -> None:
    every = [Resampling(r.interpolation, r.antialias, p) for r in EVERY_KERNEL for p in PADDINGS]
    every += [replace(r, convention="corners") for r in every]
    for shape in ((2, 6, 6, 3), (2, 4, 6, 3)):
        estimates = measures.algebra([torch.randn(shape)], name, every, seed=0)
        assert {e.value for e in estimates if e.measure in ("composition", "round_trip")} == {0.0}


def test_half_a_token_twice_by_hand() -> None:
    x = torch.randn(3, 4, 14, 2)

    def half(x: Tensor, step: int) -> Tensor:  # bilinear, the border repeated; step +1 looks right, -1 left
        shifted = torch.cat([x[:, :, 1:], x[:, :, -1:]] if step > 0 else [x[:, :, :1], x[:, :, :-1]], 2)
        return (x + shifted) / 2

    def relative(a: Tensor, b: Tensor) -> float:
        return float(((a - b).square().sum() / (b - b.mean((0, 1, 2))).square().sum()).sqrt())

    estimates = measures.algebra([x], "shift 0.5", [Resampling("bilinear")], seed=0)
    twice, once = half(half(x, 1), 1), torch.cat([x[:, :, 1:], x[:, :, -1:]], 2)
    # A whole token further, the last column has no preimage.
    assert values(estimates, "composition") == pytest.approx([relative(twice[:, :, :-1], once[:, :, :-1])], rel=1e-5)
    assert values(estimates, "round_trip") == pytest.approx([relative(half(half(x, 1), -1), x)], rel=1e-5)


@pytest.mark.parametrize("name", ["scale 0.75", "angle 15", "crop 0.7"])
def test_the_backward_is_the_adjoint(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = [torch.randn(4, 8, 8, 16)]
    defects = values(measures.algebra(x, name, EVERY_KERNEL, seed=0), "adjoint_defect")
    assert max(defects) < 1e-7
    assert max(defects) > 0  # float32 was used
    honest = Resampling.__call__
    monkeypatch.setattr(
        Resampling, "__call__", lambda self, x, g: honest(self, x, g) + 1e-3 * (honest(self, x.detach(), g))
    )
    assert max(values(measures.algebra(x, name, EVERY_KERNEL, seed=0), "adjoint_defect")) > 1e-6


def test_gains_of_half_a_token_by_hand() -> None:
    """Along x alone; the last of 14 columns lies on the edge, and sees its border twice, or once and a zero."""
    kernels = [Resampling("bilinear", padding=padding) for padding in PADDINGS]
    estimates = measures.operator((5, 14), "shift 0.5", [*kernels, Resampling("nearest")])
    by_padding = dict(zip([*PADDINGS, "nearest"], values(estimates, "noise_gain"), strict=True))
    assert by_padding == pytest.approx(
        {"zeros": (13 / 2 + 1 / 4) / 14, "border": (13 / 2 + 1) / 14, "reflection": (13 / 2 + 1) / 14, "nearest": 1.0}
    )
    by_padding = dict(zip([*PADDINGS, "nearest"], values(estimates, "dc_gain"), strict=True))
    assert by_padding == pytest.approx({"zeros": 13.5 / 14, "border": 1.0, "reflection": 1.0, "nearest": 1.0})


@pytest.mark.parametrize("name", ["scale 0.6", "angle 30", "crop 0.7", "shift 0.25"])
def test_a_constant_stays_under_border_and_reflection(name: str) -> None:
    kept = [replace(r, padding=padding) for r in EVERY_KERNEL for padding in ("border", "reflection")]
    assert values(measures.operator((9, 9), name, kept), "dc_gain") == pytest.approx([1.0] * len(kept))


@pytest.mark.parametrize(
    ("element", "interpolation", "gain"),
    [
        ("shift 0.5", "bilinear", lambda f: math.cos(math.pi * f)),
        ("shift 0.5", "area", lambda f: math.cos(math.pi * f)),
        ("shift 0.5", "nearest", lambda f: math.cos(math.pi * f)),  # whole, but half a token beside its place
        ("shift 0.25", "bilinear", lambda f: 0.75 * math.cos(math.pi * f / 2) + 0.25 * math.cos(3 * math.pi * f / 2)),
        ("shift 0.25", "nearest", lambda f: math.cos(math.pi * f / 2)),
        # Keys' kernel with a = -0.75 at a half: -3/32, 19/32, 19/32, -3/32
        ("shift 0.5", "bicubic", lambda f: 19 / 16 * math.cos(math.pi * f) - 3 / 16 * math.cos(3 * math.pi * f)),
        ("rot180", "mitchell", lambda f: 1.0),
    ],
)
def test_frequency_response_by_hand(element: str, interpolation: str, gain: Any) -> None:
    estimates = measures.response(element, [Resampling(interpolation)])
    assert [e.frequency for e in estimates] == list(measures.FREQUENCIES)
    assert [e.value for e in estimates] == pytest.approx([gain(e.frequency) for e in estimates], abs=1e-6)


def test_antialias_takes_what_would_alias() -> None:
    """Halving the lattice folds waves above a quarter of a cycle a token back onto the lower ones."""
    plain, smooth = (
        [e.value for e in measures.response("scale 0.5", [Resampling("lanczos3", antialias)])]
        for antialias in (False, True)
    )
    above = measures.FREQUENCIES.index(0.4)
    assert plain[above] > 0.5
    assert abs(smooth[above]) < 0.05
    assert smooth[0] == pytest.approx(1.0)


def test_the_time_is_relative_to_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {measures.copy_tokens: 2.0}
    monkeypatch.setattr(measures, "time_once", lambda run, x, g: seconds.get(run, 6.0))
    assert [e[3:6] for e in measures.cost((4, 4), "scale 0.75", [DEFAULT.resampling], CPU)] == [(3.0, 3.0, 3.0)]


# ---------------------------------------------------------------- rows and resuming

PROTOCOL = {"data": "none", "images": 5}
FEW = ("rot90", "scale 0.5", "scale 0.75", "shift 0.5")


def small_sources() -> list[Any]:
    torch.manual_seed(1)
    images = smooth_images(5, 28)
    return [Fields(5, seed=0), Photographs(images), Features(f"{CONTROL} <b>&", tiny_vit(depth=1), images)]


def small_study(out: Path, *, elements: Sequence[str] = FEW, settings: Sequence[Setting] | None = None) -> StudyTable:
    results = StudyTable(out, PROTOCOL)
    settings = one_at_a_time() if settings is None else settings
    study.measure(results, small_sources(), settings, elements, seed=0, device=CPU)
    return results


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small study, of one lattice."""
    out = tmp_path_factory.mktemp("study")
    small_study(out, settings=[setting for setting in one_at_a_time() if setting.lattice == (14, 14)])
    return out


FAST = [DEFAULT, Setting(Resampling("bilinear")), Setting(pixels="bilinear")]


def test_the_table_has_one_row_a_measurement(finished: Path) -> None:
    table = read_rows(finished / TABLE)
    keys = [
        tuple(value for name, value in asdict(row).items() if name not in ("value", "low", "high")) for row in table
    ]
    assert len(set(keys)) == len(keys)
    assert {row.signal for row in table} == {"", "fields", "photos", "features"}
    errors = [row for row in table if row.measure == "relative_error"]
    # fields: resamplings; photographs: and two pixel kernels; features: and two kernels of positions
    assert len(errors) == len(FEW) * ((7 + 1 + 2 + 1) * 3 + 2 + 4)
    assert all(row.value < 1e-6 for row in errors if row.group == "D4" and row.signal == "photos")
    assert all(row.low <= row.value <= row.high for row in errors)


def test_a_finished_study_keeps_its_rows(tmp_path: Path) -> None:
    small_study(tmp_path, settings=FAST, elements=FEW[:2])
    text = (tmp_path / TABLE).read_text()
    first = next(line for line in text.splitlines() if ",relative_error," in line)
    marked = first.rsplit(",", 4)[0] + ",123.0,123.0,123.0,5"
    (tmp_path / TABLE).write_text(text.replace(first, marked))
    before = read_rows(tmp_path / TABLE)
    again = small_study(tmp_path, settings=FAST, elements=FEW[:2])
    assert sorted(map(repr, again.rows)) == sorted(map(repr, before))
    assert read_rows(tmp_path / TABLE) == again.rows
    assert sum(row.value == 123 for row in again.rows) == 1


@pytest.mark.parametrize("cut", [1, 40, 700])
def test_a_study_that_was_cut_short_goes_on(tmp_path: Path, cut: int, monkeypatch: pytest.MonkeyPatch) -> None:
    small_study(tmp_path, settings=FAST, elements=FEW[:2])
    whole = read_rows(tmp_path / TABLE)
    content = (tmp_path / TABLE).read_bytes()
    (tmp_path / TABLE).write_bytes(content[:-cut])
    measured: list[str] = []
    real = measures.equivariance
    monkeypatch.setattr(measures, "equivariance", lambda *a, **k: measured.append("") or real(*a, **k))
    monkeypatch.setattr(measures, "cost", lambda *a: pytest.fail("measured again"))
    resumed = small_study(tmp_path, settings=FAST, elements=FEW[:2])
    assert sorted(map(repr, resumed.rows)) == sorted(map(repr, whole))
    assert len(measured) <= 4


def test_a_study_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_study(tmp_path, settings=FAST, elements=FEW[:1])
    rows_before = len(read_rows(tmp_path / TABLE))
    larger = small_study(tmp_path, settings=[*FAST, Setting(Resampling("mitchell"))], elements=FEW[:1])
    assert {row.interpolation for row in larger.rows} == {"bicubic", "bilinear", "mitchell"}
    assert len(larger.rows) > rows_before


def test_another_protocol_and_other_files_are_refused(tmp_path: Path) -> None:
    StudyTable(tmp_path, PROTOCOL)
    with pytest.raises(ValueError, match=r"out: got .* with a study of .*'images': 5.*takes one of .*'images': 6"):
        StudyTable(tmp_path, {**PROTOCOL, "images": 6})
    (tmp_path / TABLE).write_text("a,b\r\n1,2\r\n")
    with pytest.raises(ValueError, match="with columns"):
        StudyTable(tmp_path, PROTOCOL)
    columns = ",".join(COLUMNS)
    (tmp_path / TABLE).write_text(f"{columns}\r\nequivariance,fields\r\n")
    with pytest.raises(ValueError, match="whose line 2 can't be read"):
        read_rows(tmp_path / TABLE)


# ---------------------------------------------------------------- report


def row(**options: Any) -> Row:
    base = Row(
        kind="equivariance", signal="fields", model="", layer=0, lattice="14x14", element="scale 0.75", group="scale",
        **asdict(DEFAULT.resampling), pixels="", positions="", measure="relative_error", frequency=None,
        value=0.4, low=0.3, high=0.5, images=4,
    )  # fmt: skip
    return replace(base, **options)


def difference(value: float, low: float, high: float, **options: Any) -> Row:
    return row(measure="difference", value=value, low=low, high=high, **options)


def test_recommendation_follows_the_numbers() -> None:
    control = {"signal": "features", "model": CONTROL}
    table = [
        row(),
        difference(0, 0, 0),
        difference(-0.1, -0.2, -0.05, interpolation="mitchell"),
        difference(-0.3, -0.7, 0.1, interpolation="lanczos3"),  # lower, but not surely
        difference(-0.2, -0.3, -0.1, padding="zeros"),
        difference(-0.003, -0.004, -0.002, convention="corners"),  # surely, but not worth it
        difference(-0.9, -0.9, -0.9, interpolation="area", group="D4"),  # copies: no evidence
        difference(-0.9, -0.9, -0.9, **control, interpolation="area"),  # a control is no evidence ...
        row(**control),
        difference(0.02, -0.01, 0.05, **control, padding="zeros"),
        difference(-0.9, -0.9, -0.9, interpolation="area", lattice="7x7"),  # another lattice than the default's
    ]
    assert combine(table) == Resampling("mitchell", padding="zeros")
    best, change = recommend(table)
    assert best == Resampling(padding="zeros")
    assert change == pytest.approx((-0.5, -0.75, -0.25))
    both = {"interpolation": "mitchell", "padding": "zeros"}
    together = [difference(-0.25, -0.3, -0.2, **both), difference(0.02, -0.01, 0.05, **control, **both)]
    assert recommend([*table, *together])[0] == Resampling("mitchell", padding="zeros")
    assert recommend(table[:2]) == (DEFAULT.resampling, (0.0, 0.0, 0.0))
    # Better on average is not enough where it is surely worse on one source.
    photos = [row(signal="photos"), difference(0.02, 0.01, 0.03, signal="photos", padding="zeros")]
    assert recommend([*table, *photos])[0] == DEFAULT.resampling
    photos[1] = difference(0.02, -0.01, 0.03, signal="photos", padding="zeros")
    assert recommend([*table, *photos])[0] == Resampling(padding="zeros")
    table.append(difference(0.04, 0.03, 0.05, **control, padding="zeros"))  # ... but it has a veto
    assert recommend([*table, *photos])[0] == DEFAULT.resampling


def test_means_weigh_sources_alike_and_leave_nan_out() -> None:
    table = [
        row(value=1.0),
        *(row(value=3.0, signal="features", model="m", layer=layer) for layer in range(1, 9)),
        row(value=math.nan),
    ]
    assert mean(table) == (2.0, pytest.approx(0.3), 0.5)
    assert all(math.isnan(number) for number in mean([]))


def test_the_summary_is_ten_lines_of_the_rows(finished: Path) -> None:
    table = read_rows(finished / TABLE)
    summary = summarize(table)
    assert len(summary) == 10
    assert str(recommend(table)[0]) in summary[1]
    zeros = [r.value for r in table if r.measure == "dc_gain" and r.padding == "zeros" and r.group != "D4"]
    assert f"zeros {sum(zeros) / len(zeros):.3f}" in summary[5]
    assert "composition and round trip are exact" in summary[8]

    # Were nearest the best of all and the corners convention fatal, it would say so.
    told = summarize([_bent(r) for r in table])
    assert "Recommended: nearest" in told[1]
    assert re.search(r"corners \+[1-9]\d{3,}", told[6])
    with pytest.raises(ValueError, match="rows: got no relative_error"):
        summarize([r for r in table if r not in trusted(table)])


def _bent(row: Row) -> Row:
    if row.measure == "difference" and row.resampling == Resampling("nearest"):
        return replace(row, value=-0.05, low=-0.06, high=-0.04)
    if row.measure == "difference" and row.convention == "corners":
        return replace(row, value=50.0, low=49.0, high=51.0)
    return replace(row, value=0.1, low=0.1, high=0.1) if row.measure == "difference" and row.value < 0 else row


def test_the_main_figure_shows_shares_of_the_errors_of_the_default(finished: Path) -> None:
    table = read_rows(finished / TABLE)
    (axes,) = draw(table)["changes"][1].axes
    (points,) = (drawn for drawn in axes.containers if drawn.get_label() == "photos")
    shown = dict(zip((label.get_text() for label in axes.get_yticklabels()), points.lines[0].get_xdata(), strict=True))
    errors: dict[Resampling, list[float]] = {}
    for r in table:
        if (r.signal, r.measure) == ("photos", "relative_error") and r.group != "D4" and r.is_default:
            errors.setdefault(r.resampling, []).append(r.value)
    for label, resampling in (
        ("interpolation: nearest", Resampling("nearest")),
        ("padding: zeros", Resampling(padding="zeros")),
    ):
        expected = sum(errors[resampling]) / sum(errors[DEFAULT.resampling]) - 1
        assert shown[label] == pytest.approx(100 * expected)
    assert "interpolation: bicubic" not in shown


@pytest.mark.slow
def test_the_report_stands_alone(finished: Path, tmp_path: Path) -> None:
    table = read_rows(finished / TABLE)
    write_report(table, made_up_scores(), tmp_path)
    page = (tmp_path / REPORT).read_text()
    assert not re.search(r"https?:|//", re.sub(r'src="data:[^"]*"', "", page))
    embedded = re.findall(r'src="([^"]*)"', page)
    assert len(embedded) == 8
    figures = {path.read_bytes() for path in tmp_path.glob("*.png")}
    prefix = "data:image/png;base64,"
    assert {base64.b64decode(source.removeprefix(prefix)) for source in embedded} == figures
    assert all(figure.startswith(b"\x89PNG") for figure in figures)
    assert f"{CONTROL} &lt;b&gt;&amp;" in page
    assert "<b>" not in page
    assert (tmp_path / SUMMARY).read_text().splitlines() == summarize(table)
    assert "After training" in page
    assert "After training" not in _page_without_training(finished, tmp_path)


def _page_without_training(finished: Path, out: Path) -> str:
    write_report(read_rows(finished / TABLE), [], out)
    return (out / REPORT).read_text()


# ---------------------------------------------------------------- after training


def made_up_scores() -> list[retraining.Score]:
    """Nearest is worse by .1 on scales whatever the seed; the rest is noise of about .01."""
    noise = (0.0, 0.01, -0.01)
    return [
        retraining.Score(variant, seed, 0.3 + n, 0.4 + n + worse * (variant == "nearest"), 0.5 + n, 0.6 + n)
        for variant in ("random", "bicubic", "nearest", "bilinear")
        for seed, (n, worse) in enumerate(zip(noise, (0.1, 0.11, 0.09), strict=True))
    ]


def test_differences_are_judged_against_chance() -> None:
    scores = made_up_scores()
    difference, error = retraining.paired_difference(scores, "nearest", "resampled_error")
    assert difference == pytest.approx(0.1)
    assert error == pytest.approx(0.01 / math.sqrt(3))
    p = retraining.chance(difference, error, 3)
    assert p == pytest.approx(ttest_1samp([0.1, 0.11, 0.09], 0).pvalue)
    d4, scales, retrieval, last = retraining.judge(scores)
    assert "error on scales: the choice matters after training" in scales
    assert f"more than chance: nearest +0.1000 (standard error 0.0058, p {8 * p:.2g})" in scales  # of 2 settings x 4
    assert "bilinear +0.0000" in scales.split("; more than chance")[0]
    assert all("the choice does not show after training" in line for line in (d4, retrieval, last))


def test_one_of_many_comparisons_is_no_finding() -> None:
    """Beyond twice its standard error, and yet what some of many settings show by chance."""
    noisy = [
        replace(s, d4_error=s.d4_error + 0.1 * (1 + s.seed)) if s.variant == "nearest" else s for s in made_up_scores()
    ]
    difference, error = retraining.paired_difference(noisy, "nearest", "d4_error")
    assert difference > 2 * error
    assert "the choice does not show" in retraining.judge(noisy)[0]


def test_the_figure_shows_differences_at_the_same_seed() -> None:
    scales = retraining.draw_scores(made_up_scores()).axes[1]
    assert [label.get_text() for label in scales.get_xticklabels()] == ["nearest", "bilinear"]
    nearest, bilinear = (drawn.get_offsets()[:, 1].tolist() for drawn in scales.collections[::2])
    assert nearest == pytest.approx([0.1, 0.11, 0.09])
    assert bilinear == pytest.approx([0, 0, 0])


def test_scores_are_kept(tmp_path: Path) -> None:
    assert retraining.read_scores(tmp_path) == []
    retraining.RetrainingResult(made_up_scores()).write(tmp_path)
    assert retraining.read_scores(tmp_path) == made_up_scores()
    assert (tmp_path / retraining.FIGURE).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("variants", "seeds", "message"),
    [(["nearest"], 2, "variants"), (["bicubic", "cubic"], 2, "variants"), (["bicubic"], 1, "seeds: got 1")],
)
def test_training_studies_that_cannot_be_judged(variants: list[str], seeds: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        retraining.study_runs(tmp_path, variants, seeds, data="photos", steps=1)


@pytest.mark.slow
def test_runs_differ_in_the_setting_alone_and_are_trained_once(tmp_path: Path) -> None:
    runs = retraining.study_runs(tmp_path, ["bicubic", "zeros"], 2, data="photos", steps=1, image_size=32, patch_size=8)
    small = {"embed_dim": 24, "depth": 2, "num_heads": 2}
    runs = {
        key: replace(run, model=replace(run.model, **small), optim=replace(run.optim, batch_size=8))
        for key, run in runs.items()
    }
    assert [(name, seed, run.seed, run.addons["ser"].padding) for (name, seed), run in runs.items()] == [
        ("bicubic", 0, 0, "border"),
        ("zeros", 0, 0, "zeros"),
        ("bicubic", 1, 1, "border"),
        ("zeros", 1, 1, "zeros"),
    ]
    assert all(run.addons["ser"].weight == 1 for run in runs.values())
    scores = retraining.train_and_score(runs, images=4, device="cpu")
    assert [(score.variant, score.seed) for score in scores] == [("random", 0), ("random", 1), *runs]
    assert len({score.resampled_error for score in scores}) == 6
    saved = [path.stat().st_mtime_ns for run in runs.values() for path in RunFolder(run.out).list_checkpoints()]
    assert len(saved) == 4
    assert retraining.train_and_score(runs, images=4, device="cpu") == scores
    assert saved == [path.stat().st_mtime_ns for run in runs.values() for path in RunFolder(run.out).list_checkpoints()]


# ---------------------------------------------------------------- the command


@pytest.mark.slow
def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(study, "FEW_ELEMENTS", ("rot90", "scale 0.75"))
    save_split_vit(tmp_path / "encoder.safetensors", tiny_vit())
    out = tmp_path / "out"
    options = (tmp_path, "--images=3", "--image-size=56", "--device=cpu", f"--out={out}")
    settings = [DEFAULT, Setting(Resampling("nearest")), Setting(Resampling(padding="zeros"))]
    monkeypatch.setattr(study, "one_at_a_time", lambda: settings)
    run_cli("sensitivity", *options)
    printed = capsys.readouterr().out
    assert [f"{n}. " in printed for n in range(1, 11)] == [True] * 10
    assert {row.model for row in read_rows(out / TABLE)} == {"", str(tmp_path), CONTROL}
    assert (out / REPORT).exists()
    with pytest.raises(SystemExit, match=r"ser-fast: out: got .* with a study of .*'seed': 0"):
        run_cli("sensitivity", *options, "--seed=1")
    with pytest.raises(SystemExit, match="ser-fast: checkpoint: got nowhere, takes"):
        run_cli("sensitivity", "nowhere", f"--out={tmp_path / 'other'}")
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_python_gives_what_the_command_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "FEW_ELEMENTS", ("rot90", "scale 0.75"))
    monkeypatch.setattr(measures, "time_once", lambda run, x, g: 1.0 if run is measures.copy_tokens else 2.0)
    settings = [DEFAULT, Setting(Resampling("nearest")), Setting(Resampling(padding="zeros"))]
    monkeypatch.setattr(study, "one_at_a_time", lambda: settings)
    save_split_vit(tmp_path / "encoder.safetensors", tiny_vit())
    run_cli("sensitivity", tmp_path, "--images=2", "--image-size=56", "--device=cpu", f"--out={tmp_path / 'command'}")
    models = {str(tmp_path): open_model(str(tmp_path))}
    result = evaluate(models, images=2, image_size=56)  # in memory
    assert len(result.summary()) == 10
    written = result.write(tmp_path / "python")
    assert_same_files(written, tmp_path / "command")
    assert SensitivityResult.read(tmp_path / "python") == result
    # The folder can be gone on from.
    monkeypatch.setattr(measures, "equivariance", lambda *a, **k: pytest.fail("measured again"))
    again = evaluate(models, images=2, image_size=56, folder=tmp_path / "python")
    assert sorted(map(repr, again.rows)) == sorted(map(repr, result.rows))
    with pytest.raises(ValueError, match="preset: got 'slow'"):
        evaluate(models, preset="slow")  # type: ignore[arg-type]
