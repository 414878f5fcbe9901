"""The samplers of g, the same g on pixels, and the views of a batch."""

import itertools
import math
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp
from torch import Tensor
from torchvision.transforms import RandomResizedCrop, v2

from ser_fast.data.pictures import to_canvas, to_rgb
from ser_fast.data.sources import open_canvases
from ser_fast.interpolation import INTERPOLATIONS, PADDINGS
from ser_fast.lattice import LatticeMap, Size
from ser_fast.ops.group_action import group_action
from ser_fast.training.config import ViewsConfig
from ser_fast.views.color import LAYOUT, Color
from ser_fast.views.pixels import IMAGENET_MEAN, IMAGENET_STD, normalize, transform_images
from ser_fast.views.recipe import MakeViews, SmallCrop, Views
from ser_fast.views.samplers import SAMPLERS, Affine, Crop, D4Scale, Reflections, Sampler, draws

PATCH = 4
OBLONG = 24, 16
ON_A_LATTICE = [Reflections(), D4Scale()]  # the samplers of D4 and scales


def sample(sampler: Sampler, size: Size, count: int, *, view: int = 0, seed: int = 0, patch: int = PATCH) -> LatticeMap:
    return sampler(size, patch, draws(seed, 0, torch.arange(count), view), view)


def uint8(*shape: int) -> Tensor:
    return torch.randint(256, shape, dtype=torch.uint8)


def d4_codes(g: LatticeMap) -> Tensor:
    """The nearest element of D4, on the unit square: there a stretch of the lattice is no part of the map."""
    on_square = g.on((1, 1), (1, 1)).linear
    distance = (on_square[:, None] - LatticeMap.d4((1, 1), torch.arange(8)).linear).abs().amax((-1, -2))  # (B, 8)
    nearest = distance.min(1)
    assert nearest.values.max() < 1e-12
    return nearest.indices


def chi_square(counts: Tensor) -> float:
    expected = counts.sum() / len(counts)
    return float(((counts - expected) ** 2 / expected).sum())


# ---------------------------------------------------------------- draws


def test_draws_depend_on_seed_epoch_sample_and_view() -> None:
    grid = [draws(seed, epoch, torch.arange(40), view) for seed in (0, 1, 2) for epoch in (0, 1, 2) for view in (0, 1)]
    numbers = torch.cat(grid)
    assert len(numbers.unique(dim=0)) == len(numbers) == 3 * 3 * 2 * 40
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert numbers.mean().sub(0.5).abs() < 0.02  # its deviation is .004
    assert numbers.T.corrcoef().fill_diagonal_(0).abs().max() < 0.15  # of 720 rows each; .037


def test_draws_depend_on_nothing_else() -> None:
    samples = torch.tensor([7, 3, 50_000_000, 0])
    expected = draws(5, 2, samples, 1)
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    for order in itertools.permutations(range(4)):
        torch.testing.assert_close(draws(5, 2, samples[list(order)], 1), expected[list(order)], rtol=0, atol=0)
    assert torch.equal(draws(5, 2, samples[2:3], 1), expected[2:3])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002
    assert draws(5, 2, samples[:0], 1).shape == (0, expected.shape[1])


# ---------------------------------------------------------------- samplers


@pytest.mark.parametrize("size", [(32, 32), OBLONG], ids=str)
@pytest.mark.parametrize("view", [0, 1])
def test_d4_scale_reaches_all_eight_elements_equally(view: int, size: Size) -> None:
    counts = d4_codes(sample(D4Scale(), size, 4000, view=view)).bincount(minlength=8)
    assert chi_square(counts) < 24.3  # exceeded by one fair draw in 1000, at 7 degrees of freedom


def test_the_two_views_elements_are_independent() -> None:
    codes = [d4_codes(sample(D4Scale(), (32, 32), 6400, view=view)) for view in (0, 1)]
    counts = (8 * codes[0] + codes[1]).bincount(minlength=64)
    assert chi_square(counts) < 103.4  # one in 1000, at 63 degrees of freedom


def test_reflections_relate_views_by_the_four_reflections_alone() -> None:
    g0, g1 = (sample(Reflections(), (32, 32), 2000, view=view) for view in (0, 1))
    assert (torch.linalg.det(g0.linear) > 0).all()
    relative = LatticeMap.relative(g0, g1)
    assert (torch.linalg.det(relative.linear) < 0).all()
    codes = d4_codes(relative)
    assert set(codes.tolist()) == {4, 5, 6, 7}
    assert chi_square(codes.bincount(minlength=8)[4:]) < 16.3  # one in 1000, at 3 degrees of freedom


@pytest.mark.parametrize("sampler", ON_A_LATTICE, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("size", [(2400, 2400), (3200, 1920)], ids=str)
def test_lattices_are_whole_tokens_within_the_ranges(sampler: D4Scale, size: Size) -> None:
    patch, sizes = 16, []
    tokens = size[0] // patch, size[1] // patch
    for seed in range(300):
        g = sample(sampler, size, 3, seed=seed, patch=patch)
        assert g.size_in == size
        assert g.axis_aligned
        assert all(n % patch == 0 for n in g.size_out)
        sizes.append((g.size_out[0] // patch / tokens[0], g.size_out[1] // patch / tokens[1]))
    height, width = np.array(sizes).T
    slack = 1.01  # half a token of a hundred
    area, aspect = height * width, width / height
    assert 0.7 / slack < area.min() < 0.75
    assert 1.25 < area.max() < 1.3 * slack
    assert 0.75 / slack < aspect.min() < 0.79
    assert 1.27 < aspect.max() < 4 / 3 * slack
    assert abs(np.log(aspect).mean()) < 0.03  # as often wide as tall
    assert abs(area.mean() - 1) < 0.03


@pytest.mark.parametrize("sampler", [D4Scale(aspect=(1.2, 1.3)), Crop(area=(0.2, 0.5), aspect=(1.2, 1.3))], ids=repr)
def test_aspect_is_width_over_height(sampler: Sampler) -> None:
    g = sample(sampler, (400, 400), 1, patch=1)
    height, width = g.size_out if isinstance(sampler, D4Scale) else g.linear[0].abs().sum(1).tolist()
    assert 1.19 < width / height < 1.31


def test_the_lattice_and_the_first_samples_element_are_independent() -> None:
    maps = [sample(D4Scale(), (400, 400), 1, seed=seed) for seed in range(300)]
    numbers = [(*g.size_out, int(d4_codes(g))) for g in maps]
    height, width, code = np.array(numbers, dtype=float).T
    related = np.corrcoef([height * width, width / height, code]) - np.eye(3)
    assert abs(related).max() < 0.2  # 3.5 deviations


def test_a_lattice_has_at_least_one_token() -> None:
    assert {sample(D4Scale(area=(0.01, 0.02)), (8, 8), 1, seed=seed).size_out for seed in range(5)} == {(PATCH, PATCH)}


def test_the_lattice_of_d4_scale_is_drawn_with_the_first_sample() -> None:
    u = draws(0, 0, torch.arange(12), 0)
    sizes = [D4Scale()((64, 64), PATCH, u[start:], 0).size_out for start in range(8)]
    assert sizes == [D4Scale()((64, 64), PATCH, u[start : start + 1], 0).size_out for start in range(8)]
    assert len(set(sizes)) > 2


def test_affine_stays_within_its_ranges_and_fills_them() -> None:
    size = OBLONG
    g = sample(Affine(degrees=120, shear=20, area=(0.5, 1.5), aspect=(0.6, 1.5), shift=0.2), size, 4000)
    assert (g.size_in, g.size_out, g.axis_aligned) == (size, size, False)
    # Output to input it is diag(sy, sx) [[1, 0], [tan, 1]] R: lower triangular times a rotation.
    (a, b), (c, d) = g.linear.permute(1, 2, 0)
    sy = (a**2 + b**2).sqrt()
    cos, sin = a / sy, b / sy  # of R = [[cos, sin], [-sin, cos]]
    sx, tangent = cos * d - sin * c, (cos * c + sin * d)
    angle, shear = torch.atan2(sin, cos).rad2deg(), torch.atan(tangent / sx).rad2deg()
    measured = {
        "angle": (angle, -120, 120),
        "shear": (shear, -20, 20),
        "area": (1 / (sy * sx), 0.5, 1.5),
        "log aspect": ((sy / sx).log(), math.log(0.6), math.log(1.5)),
        "shift y": (g.offset[:, 0] / size[0], -0.2, 0.2),
        "shift x": (g.offset[:, 1] / size[1], -0.2, 0.2),
    }
    for name, (values, low, high) in measured.items():
        fraction = (values - low) / (high - low)
        assert 0 - 1e-9 <= fraction.min() < 0.01, name
        assert 0.99 < fraction.max() <= 1 + 1e-9, name
        assert fraction.histc(8, 0, 1).sub(500).abs().max() < 90, name  # uniform; 90 is 4.3 deviations
    independent = torch.stack([values for values, _, _ in measured.values()]).corrcoef().fill_diagonal_(0)
    assert independent.abs().max() < 0.07


def test_affine_draws_what_it_says() -> None:
    """A picture's edge, turned counter-clockwise on the screen, for a map that only turns."""
    only_turned = Affine(degrees=0, shear=0, area=(1, 1), aspect=(1, 1), shift=0)
    torch.testing.assert_close(sample(only_turned, OBLONG, 3).linear, torch.eye(2).double().expand(3, 2, 2))
    larger = sample(Affine(degrees=0, shear=0, area=(1.44, 1.44), aspect=(1, 1), shift=0), (40, 40), 1)
    image = torch.zeros(1, 1, 40, 40)
    image[..., 10:30, 10:30] = 1
    assert transform_images(image, larger, interpolation="bilinear", padding="zeros").sum() == pytest.approx(
        1.44 * 400, rel=1e-3
    )


def test_crops_are_boxes_inside_the_image() -> None:
    size, area, aspect = (60, 90), (0.3, 0.8), (0.7, 1.4)
    g = sample(Crop(area, aspect), size, 4000)
    assert (g.size_in, g.size_out, g.axis_aligned) == (size, size, True)
    corners = torch.tensor([[-30, -45], [30, 45]]).double()  # of the view, about its centre
    ends = corners @ g.linear.mT + g.offset[:, None] + torch.tensor([30, 45])  # (B, 2, 2) in the image
    mirrored = ends[:, 0, 1] > ends[:, 1, 1]
    assert 0.47 < mirrored.double().mean() < 0.53
    assert (ends[:, 0, 0] < ends[:, 1, 0]).all()  # never upside down
    low, high = ends.amin(1), ends.amax(1)
    assert low.min() >= -1e-9
    assert (high <= torch.tensor(size) + 1e-9).all()
    share = (high - low) / torch.tensor(size)  # (B, 2)
    # A box that would be longer than the image is cut to it, and its area with it.
    whole = (share < 1 - 1e-9).all(1)
    shares, aspects = share[whole].prod(1), share[whole, 1] / share[whole, 0]
    assert whole.double().mean() > 0.9
    assert 0.3 - 1e-9 <= shares.min() < 0.31
    assert 0.75 < shares.max() <= 0.8 + 1e-9
    assert 0.7 - 1e-9 <= aspects.min() < 0.71
    assert 1.38 < aspects.max() <= 1.4 + 1e-9
    # The corner is anywhere the box fits.
    place = (low / (torch.tensor(size) - (high - low)))[whole]
    assert place.histc(8, 0, 1).sub(whole.sum() / 4).abs().max() < 150


def inside_polygon(points: np.ndarray, polygon: np.ndarray) -> np.ndarray:
    """Which of the points (N, 2) lie in a convex polygon (K, 2): on the same side of all its edges."""
    edges = np.roll(polygon, -1, 0) - polygon  # (K, 2)
    to_point = points[:, None] - polygon  # (N, K, 2)
    side = edges[:, 0] * to_point[..., 1] - edges[:, 1] * to_point[..., 0]  # (N, K)
    return (side > -1e-6).all(1) | (side < 1e-6).all(1)


def in_image(g: LatticeMap, points: np.ndarray) -> np.ndarray:
    """(B, N, 2) where points of the view, in its pixels (y, x), lie in the image."""
    about_centre = points - np.array(g.size_out) / 2
    return np.einsum("bij,nj->bni", g.linear, about_centre) + g.offset.numpy()[:, None] + np.array(g.size_in) / 2


def test_turned_crops_reach_all_of_d4() -> None:
    size = (8, 12)
    turned, plain = sample(Crop(turns=True), size, 800), sample(Crop(), size, 800)
    signs = LatticeMap.d4((1, 1), torch.arange(8)).linear.flatten(1)  # (8, 4)
    found = ((turned.linear.flatten(1)[:, None].sign() == signs).all(-1)).int()  # (800, 8)
    assert (found.sum(1) == 1).all()
    assert (found.sum(0) > 60).all()
    torch.testing.assert_close(turned.offset, plain.offset, rtol=0, atol=1e-12)  # a turn is about the centre


@pytest.mark.parametrize("sampler", [Crop(), Crop(area=(0.05, 0.2)), Affine(shift=0.5)], ids=repr)
def test_tokens_take_part_where_the_other_view_shows_them(sampler: Sampler) -> None:
    size, patch = (48, 64), 8
    g0, g1 = (sample(sampler, size, 50, view=view, patch=patch) for view in (0, 1))
    valid = LatticeMap.relative(g0, g1).on((6, 8), (6, 8)).valid().numpy()  # (B, 48)
    y, x = np.meshgrid(np.arange(6) + 0.5, np.arange(8) + 0.5, indexing="ij")
    centres = in_image(g1, patch * np.stack([y, x], -1).reshape(-1, 2))
    view0 = in_image(g0, np.array([(0, 0), (0, 64), (48, 64), (48, 0)]))
    for sample_valid, sample_centres, corners in zip(valid, centres, view0, strict=True):
        assert sample_valid.tolist() == inside_polygon(sample_centres, corners).tolist()
    assert 0.05 < valid.mean() < 0.95


# ---------------------------------------------------------------- pixels


def on_tokens(images: Tensor, g: LatticeMap, **options: str) -> Tensor:
    """`group_action` on the pixels as tokens of 3 channels."""
    moved = group_action(images.permute(0, 2, 3, 1), g, backend="reference", **options)
    assert isinstance(moved, Tensor)
    return moved.permute(0, 3, 1, 2)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_pixels_move_as_tokens_do(name: str, interpolation: str, padding: str) -> None:
    g = sample(SAMPLERS[name](), OBLONG, 6)
    images = torch.rand(6, 3, *OBLONG)
    if name == "affine" and interpolation not in ("nearest", "bilinear", "bicubic"):
        with pytest.raises(ValueError, match=f"interpolation: got '{interpolation}'"):
            transform_images(images, g, interpolation=interpolation, padding=padding)
        return
    moved = transform_images(images, g, interpolation=interpolation, padding=padding)
    expected = on_tokens(images, g, interpolation=interpolation, padding=padding)
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("size", "codes"), [((12, 12), range(8)), ((12, 20), (0, 2, 4, 6)), ((12, 20), (1, 3, 5, 7))])
def test_d4_copies_pixels_bit_for_bit(dtype: torch.dtype, size: Size, codes: range) -> None:
    images = torch.rand(len(codes), 3, *size, dtype=dtype)
    moved = transform_images(images, LatticeMap.d4(size, torch.tensor(codes)))
    for image, code, out in zip(images, codes, moved, strict=True):
        assert torch.equal(out, torch.rot90(image.flip(-1) if code >= 4 else image, code % 4, (1, 2)))


@pytest.mark.parametrize("name", SAMPLERS)
def test_one_map_for_all_images(name: str) -> None:
    images = torch.rand(3, 3, *OBLONG)
    g = sample(SAMPLERS[name](), OBLONG, 1)
    separately = torch.cat([transform_images(image[None], g) for image in images])
    torch.testing.assert_close(transform_images(images, g), separately, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("images", "count"),
    [((3, 24, 16), 1), ((2, 3, 16, 24), 2), ((3, 3, 24, 16), 2)],
    ids=["no batch", "size", "number of maps"],
)
def test_images_that_do_not_fit_the_maps_are_named(images: tuple[int, ...], count: int) -> None:
    with pytest.raises(ValueError, match=r"images: got shape .* maps of \(24, 16\)"):
        transform_images(torch.rand(images), LatticeMap.identity(OBLONG, batch=count))


@pytest.mark.parametrize(("tokens", "codes"), [((5, 5), range(8)), ((4, 7), (0, 2, 4, 6)), ((4, 7), (1, 3, 5, 7))])
def test_averaging_patches_commutes_with_d4(tokens: Size, codes: range) -> None:
    def encode(images: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(images, PATCH)

    g = LatticeMap.d4(tokens, torch.tensor(codes))
    size, size_out = ((h * PATCH, w * PATCH) for h, w in (g.size_in, g.size_out))
    images = torch.rand(len(codes), 3, *size)
    moved_then_encoded = encode(transform_images(images, g.on(size, size_out)))
    torch.testing.assert_close(moved_then_encoded, on_tokens(encode(images), g), rtol=0, atol=1e-6)


def test_normalize_takes_off_mean_and_deviation() -> None:
    pixels = torch.rand(2, 3, 4, 5)
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    torch.testing.assert_close(normalize(pixels), (pixels - mean) / std)


# ---------------------------------------------------------------- the views of a batch


def make_views(sampler: Sampler, share: float, **color: float) -> MakeViews:
    colors = Color(**{"strength": 0.0, **color}), Color(**{"strength": 0.0, "blur": 0.1, "solarize": 0.2, **color})
    return MakeViews(sampler, Crop(), share, PATCH, colors, seed=3)


@pytest.mark.parametrize(
    ("name", "share", "sizes", "chosen"),
    [
        ("d4_scale", 0.0, [10], 0),
        ("d4_scale", 0.3, [3, 7], 3),
        ("d4_scale", 1.0, [10], 10),
        ("affine", 0.3, [3, 7], 3),
        ("crop", 0.0, [10], 0),
        ("crop", 0.3, [10], 3),
        ("crop", 1.0, [10], 10),
    ],
)
def test_a_batch_is_partitioned_by_share(name: str, share: float, sizes: list[int], chosen: int) -> None:
    samples = torch.arange(10) * 11
    images = uint8(10, 3, 32, 32)
    sampler = SAMPLERS[name]()
    make = make_views(sampler, share, strength=1.0)
    views = make(images, samples, epoch=4)
    assert views.equivariant == chosen
    for view, viewed in enumerate(views.views):
        g = viewed.g
        assert [len(part) for part in viewed.images] == sizes
        assert len(g) == chosen
        # Each part is its sampler's map of its own samples, and g0 and g1 are the maps that made the pixels.
        u, start = draws(3, 4, samples, view), 0
        for part, made in enumerate(viewed.images):
            own = slice(start, start + len(made))
            by = sampler if part == 0 and share > 0 else Crop()
            expected_g = by((32, 32), PATCH, u[own], view)
            expected = transform_images(images[own].float() / 255, expected_g, antialias=expected_g.axis_aligned).clamp(
                0, 1
            )
            expected, color = make.colors[view](expected, samples[own], seed=3, epoch=4, view=view)
            torch.testing.assert_close(made, normalize(expected), rtol=0, atol=1e-5)
            if part == 0:
                assert torch.equal(viewed.color, color[:chosen])
                assert torch.equal(g.linear, expected_g.linear[:chosen])
                assert torch.equal(g.offset, expected_g.offset[:chosen])
                assert g.size_out == tuple(made.shape[2:])
            start += len(made)


def test_views_show_no_pixel_beyond_black_and_white() -> None:
    """Bicubic interpolation overshoots at the edges of this image."""
    images = (uint8(8, 3, 32, 32) > 127).byte() * 255
    views = make_views(D4Scale(), 0.5, strength=1.0)(images, torch.arange(8), epoch=0)
    black, white = (
        (torch.tensor(value) - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD) for value in (0, 1)
    )
    for part in itertools.chain(*(view.images for view in views.views)):
        assert part.dtype == torch.float32
        assert (part >= black[:, None, None] - 1e-5).all()
        assert (part <= white[:, None, None] + 1e-5).all()


def test_views_have_colors_of_their_own() -> None:
    images = uint8(1, 3, 32, 32).expand(8, -1, -1, -1)
    still = Affine(degrees=0, shear=0, area=(1, 1), aspect=(1, 1), shift=0)
    views = make_views(still, 1.0, strength=1.0)(images, torch.arange(8), epoch=0)
    first, second = (view.images[0] for view in views.views)
    assert len(first.flatten(1).unique(dim=0)) == 8
    assert (first != second).flatten(1).any(1).all()


def halves(make: MakeViews, images: Tensor, samples: Tensor) -> list[Views]:
    return [make(images[half], samples[half], epoch=1) for half in (slice(8), slice(8, 16))]


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_crops_do_not_depend_on_the_number_of_ranks(share: float) -> None:
    make = make_views(Crop(), share, strength=1.0)
    images, samples = uint8(16, 3, 32, 32), torch.randperm(1000)[:16]
    together, ranks = make(images, samples, epoch=1), halves(make, images, samples)
    for view in (0, 1):
        separately = torch.cat([rank.views[view].images[0] for rank in ranks])
        torch.testing.assert_close(together.views[view].images[0], separately, rtol=0, atol=1e-6)
    if share == 1:
        assert torch.equal(together.views[1].g.linear, torch.cat([rank.views[1].g.linear for rank in ranks]))


def test_elements_of_d4_do_not_depend_on_the_number_of_ranks() -> None:
    make = make_views(D4Scale(), 1.0)
    images, samples = uint8(16, 3, 32, 32), torch.randperm(1000)[:16]
    together, ranks = make(images, samples, epoch=1), halves(make, images, samples)
    for view in (0, 1):
        codes = [d4_codes(rank.views[view].g) for rank in ranks]
        assert torch.equal(d4_codes(together.views[view].g), torch.cat(codes))
    assert (
        ranks[0].views[0].g.size_out != ranks[1].views[0].g.size_out
    )  # each rank's own lattice, for SERLoss's ragged gather


def test_global_random_state_changes_no_view() -> None:
    images, samples = uint8(8, 3, 32, 32), torch.arange(8)
    make = make_views(D4Scale(), 0.5, strength=1.0)
    first = make(images, samples, epoch=0)
    torch.manual_seed(99)
    second = make(images, samples, epoch=0)
    for one, other in zip(first.views, second.views, strict=True):
        assert all(torch.equal(*parts) for parts in zip(one.images, other.images, strict=True))
    third = make(images, samples, epoch=1)
    assert not torch.equal(first.views[0].g.linear, third.views[0].g.linear)


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
def test_a_share_outside_0_to_1_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="share: got"):
        make_views(D4Scale(), share)


# ---------------------------------------------------------------- local views, and views for add-ons


def many_views(share: float = 0.5, *, needs: tuple[str, ...] = ("plain", "turns"), locals: int = 2) -> MakeViews:
    options = {"locals": locals, "local_area": (0.1, 0.3), "turn_area": (0.1, 0.3), "color_strength": 1.0}
    return ViewsConfig(sampler="crop", share=share, **options).build(PATCH, 5, frozenset(needs))


def test_views_come_in_the_order_of_their_roles() -> None:
    made = many_views()(uint8(6, 3, 28, 28), torch.arange(6), epoch=0)
    assert [view.role for view in made.views] == ["global"] * 2 + ["local"] * 2 + ["plain"] + ["turn"] * 4
    sizes = {view.role: [tuple(part.shape) for part in view.images] for view in made.views}
    assert sizes == {"global": [(6, 3, 28, 28)], "local": [(6, 3, 12, 12)], "plain": [(3, 3, 28, 28)],
                     "turn": [(3, 3, 12, 12)]}  # fmt: skip
    for view in made.views:
        assert len(view.g) == 3
        assert view.g.size_out == tuple(view.images[0].shape[2:])
        assert (view.color is None) == (view.role == "plain")
        assert view.color is None or view.color.shape == (3, len(LAYOUT))


def test_only_what_is_needed_is_made() -> None:
    images, samples = uint8(6, 3, 28, 28), torch.arange(6)
    for needs, roles in (((), set()), (("plain",), {"plain"}), (("turns", "color"), {"turn"}), (("pairs",), set())):
        made = many_views(needs=needs, locals=0)(images, samples, epoch=0)
        assert {view.role for view in made.views} == {"global"} | roles
    assert len(many_views(share=0.0)(images, samples, epoch=0).views) == 4  # nobody sees the others


@pytest.mark.parametrize("role", ["local", "plain", "turn"])
def test_maps_of_small_views_are_those_of_their_pixels(role: str) -> None:
    """Without colors, g on the image gives the view."""
    make = replace(many_views(), turns=SmallCrop(Crop((0.1, 0.3)), Color(0.0)))
    make = replace(make, locals=(SmallCrop(Crop((0.1, 0.3)), Color(0.0)),) * 2)
    images = uint8(6, 3, 28, 28)
    for view in make(images, torch.arange(6) + 9, epoch=1).views:
        if view.role == role:
            expected = normalize(transform_images(images[:3].float() / 255, view.g, antialias=True).clamp(0, 1))
            torch.testing.assert_close(view.images[0][:3], expected, rtol=0, atol=2e-5)


def test_turns_are_those_of_one_crop_with_colors_of_their_own() -> None:
    make, images = many_views(), uint8(6, 3, 28, 28)
    still = replace(make, turns=SmallCrop(Crop((0.1, 0.3)), Color(0.0)))
    turned = [view for view in still(images, torch.arange(6), epoch=0).views if view.role == "turn"]
    for k, view in enumerate(turned):
        assert torch.equal(view.images[0], torch.rot90(turned[0].images[0], k, (2, 3)))
        relative = LatticeMap.relative(turned[0].g, view.g)
        torch.testing.assert_close(relative.linear, LatticeMap.rot90((12, 12), k).linear.expand(3, 2, 2))
    colored = [view for view in make(images, torch.arange(6), epoch=0).views if view.role == "turn"]
    assert all(not torch.equal(one.color, other.color) for one, other in itertools.combinations(colored, 2))
    mirrored = torch.cat([torch.linalg.det(many_views()(images, torch.arange(6) + 6 * i, 0).views[-1].g.linear) < 0
                          for i in range(20)])  # fmt: skip
    assert 0.2 < mirrored.double().mean() < 0.8


def test_a_views_draws_do_not_depend_on_the_other_views() -> None:
    images, samples = uint8(6, 3, 28, 28), torch.arange(6)
    every = many_views(locals=3)(images, samples, epoch=0).views
    fewer = many_views(locals=1, needs=("turns",))(images, samples, epoch=0).views
    kept = [*every[:3], *every[-4:]]
    for one, other in zip(kept, fewer, strict=True):
        assert all(torch.equal(*parts) for parts in zip(one.images, other.images, strict=True))
    assert not torch.equal(every[2].g.linear, every[3].g.linear)


@pytest.mark.parametrize("sampler", ["crop", "d4_scale", "affine"])
@pytest.mark.parametrize(("share", "pairs"), [(1.0, 4), (5 / 9, 2)])
def test_neighbors_in_pairs_share_their_draws(sampler: str, share: float, pairs: int) -> None:
    """In each view; a last one without a neighbor, and those outside the share, have their own."""
    config, images = ViewsConfig(sampler=sampler, share=share), uint8(9, 3, 28, 28)
    samples = torch.tensor([5, 80, 2, 31, 7, 12, 44, 90, 3])
    alone = config.build(PATCH, 5)(images, samples, epoch=0)
    made = config.build(PATCH, 5, {"pairs"})(images, samples, epoch=0)
    for view, own in zip(made.views, alone.views, strict=True):
        even, odd = slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)
        for values, separate in ((view.g.linear, own.g.linear), (view.g.offset, own.g.offset), (view.color, own.color)):
            assert torch.equal(values[even], values[odd])
            assert torch.equal(values[even], separate[even])
            assert torch.equal(values[2 * pairs :], separate[2 * pairs :])
        assert not torch.equal(own.color[even], own.color[odd])
        for part, separate in zip(view.images[1:], own.images[1:], strict=True):
            assert torch.equal(part, separate)
    assert not torch.equal(made.views[0].color, made.views[1].color)


def test_local_views_have_the_colors_of_their_rule() -> None:
    make = many_views(1.0, locals=1)
    color = make.locals[0].color
    assert (color.gray, color.blur, color.solarize, color.jitter) == (0.0, 0.5, 0.0, (0.4, 0.4, 0.2, 0.1))
    assert make.turns is not None
    assert (make.turns.color.blur, make.turns.color.solarize) == (0.1, 0.0)
    assert [(c.blur, c.solarize) for c in make.colors] == [(1.0, 0.0), (0.1, 0.2)]
    view = make(uint8(40, 3, 28, 28), torch.arange(40), epoch=0).views[2]
    share = LatticeMap.on(view.g, (1, 1), (1, 1)).linear.abs().sum(-1).prod(-1)
    assert 0.1 - 1e-9 <= share.min() < 0.15
    assert 0.25 < share.max() <= 0.3 + 1e-9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"locals": -1}, "locals: got -1"),
        ({"locals": 1, "local_size": 10}, "local_size: got 10, takes a multiple of the patch size 4"),
        ({"turn_size": 6}, "turn_size: got 6"),
        ({"color_jitter": (0.1, 0.1, 0.1, -0.1)}, "color jitter: got"),
    ],
    ids=str,
)
def test_options_of_views_that_do_not_fit_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ViewsConfig(**options).build(PATCH, 0)


def test_small_views_are_three_sevenths_of_the_image_in_whole_patches() -> None:
    small = SmallCrop(Crop(), Color())
    u = draws(0, 0, torch.arange(1), 0)
    assert [small.draw((side, side), 16, u, 0).size_out[0] for side in (224, 32, 384)] == [96, 16, 160]
    assert replace(small, size=48).draw((224, 224), 16, u, 0).size_out == (48, 48)


# ---------------------------------------------------------------- pictures on a canvas


def boxes_of_torchvision(size: Size, count: int) -> Tensor:
    """(count, 4) top, left, height, width on the unit square."""
    picture = torch.empty(3, *size, device="meta")
    found = [RandomResizedCrop.get_params(picture, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(count)]
    return torch.tensor(found).double() / torch.tensor([*size, *size])


@pytest.mark.parametrize("size", [(3750, 5000), (4000, 4000), (6000, 2000), (2000, 9000)], ids=str)
def test_boxes_are_those_of_torchvision(size: Size) -> None:
    """In area, true aspect and place; the long pictures take several tries, and the longest the box after the last."""
    aspect, count = size[1] / size[0], 2000
    theirs = boxes_of_torchvision(size, count)
    ours = Crop().boxes(draws(7, 0, torch.arange(count), 0), torch.full((count,), aspect))
    assert (ours >= 0).all()
    assert (ours[:, :2] + ours[:, 2:] <= 1 + 1e-12).all()

    def measures(boxes: Tensor) -> Tensor:
        height, width = boxes[:, 2], boxes[:, 3]
        centers = boxes[:, :2] + boxes[:, 2:] / 2
        return torch.stack([height * width, width / height * aspect, centers[:, 0], centers[:, 1]])

    for name, one, other in zip(("area", "aspect", "y", "x"), measures(ours), measures(theirs), strict=True):
        # Whole pixels there: rounded to a hundredth, the box after the last try is the same number in both.
        assert ks_2samp(one.round(decimals=2), other.round(decimals=2)).pvalue > 1e-3, name


def test_a_picture_too_long_for_any_box_gives_the_largest_centered_one() -> None:
    u = draws(0, 0, torch.arange(5), 0)
    for aspect, box in ((100.0, [0, 0.5 - 1 / 150, 1, 1 / 75]), (0.01, [0.5 - 1 / 150, 0, 1 / 75, 1])):
        boxes = Crop(area=(0.9, 1.0)).boxes(u, torch.full((5,), aspect))
        torch.testing.assert_close(boxes, torch.tensor(box).double().expand(5, 4), rtol=0, atol=1e-7)


def photograph(name: str, height: int, width: int) -> Tensor:
    """(3, height, width) uint8, the center of one of scikit-image's, enlarged where it is smaller."""
    with files("skimage").joinpath("data", name).open("rb") as file:
        pixels = to_rgb(Image.open(file))
    share = min(1, pixels.shape[1] / height, pixels.shape[2] / width)
    cut = v2.functional.center_crop(pixels, [int(height * share), int(width * share)])
    return v2.functional.resize(cut, [height, width], v2.InterpolationMode.BICUBIC, antialias=True)


def view_of(canvas: Tensor, box: list[float], side: int, *, antialias: bool = True) -> Tensor:
    """Grey levels of a view (3, side, side) of a box on the unit square."""
    g = LatticeMap.crop((1, 1), torch.tensor([box]), (1, 1)).on((canvas.shape[1], canvas.shape[2]), (side, side))
    return transform_images(canvas[None].float() / 255, g, antialias=antialias).clamp(0, 1)[0] * 255


def difference_from_torchvision(
    picture: Tensor, canvas: Tensor, area: float, at: tuple[float, float] = (1 / 3, 1 / 3)
) -> float:
    """In grey levels: a view of 224 pixels cut from the canvas, against the same crop of the picture itself."""
    height, width = picture.shape[1:]
    h = height if area == 1 else round(math.sqrt(area * height * width / 1.2))
    w = width if area == 1 else round(1.2 * h)
    top, left = int((height - h) * at[0]), int((width - w) * at[1])
    expected = v2.functional.resized_crop(
        picture, top, left, h, w, [224, 224], v2.InterpolationMode.BICUBIC, antialias=True
    ).float()
    box = [top / height, left / width, h / height, w / width]
    return float((view_of(canvas, box, 224) - expected).abs().mean())


@pytest.mark.parametrize("area", [0.08, 0.2, 0.5, 1.0])
@pytest.mark.parametrize(
    ("name", "size", "side"),
    [
        ("astronaut.png", (375, 500), 512),
        ("coffee.png", (375, 500), 512),
        ("motorcycle_left.png", (375, 500), 512),
        ("retina.jpg", (1200, 1600), 768),
        ("motorcycle_left.png", (1200, 1600), 768),
        ("hubble_deep_field.jpg", (1200, 1600), 768),
    ],
)
def test_a_view_is_the_crop_that_torchvision_cuts_from_the_file(name: str, size: Size, side: int, area: float) -> None:
    """To 1.5 grey levels where the canvas has the pixels; a square of the view's side is several times as far."""
    picture = photograph(name, *size)
    difference = difference_from_torchvision(picture, to_canvas(picture, side), area)
    coarse = difference_from_torchvision(picture, to_canvas(picture, 224), area)
    assert difference <= 1.5
    assert area == 1 or difference < coarse / 1.3


@pytest.mark.parametrize("size", [(375, 500), (1200, 1600)], ids=str)
def test_the_default_canvas_has_the_pixels_of_crops(size: Size, tmp_path: Path) -> None:
    """To 1.5 grey levels on average over photographs, at every area that is drawn."""
    names = ("astronaut.png", "brick.png", "coffee.png", "hubble_deep_field.jpg", "motorcycle_left.png", "text.png")
    pictures = [photograph(name, *size) for name in names]
    for number, picture in enumerate(pictures):
        v2.functional.to_pil_image(picture).save(tmp_path / f"{number}.png", compress_level=1)
    canvases = [item[0] for item in open_canvases(f"folder:{tmp_path}", train=True, image_size=224)]
    for area in (0.08, 0.2, 0.5, 1.0):
        differences = [
            difference_from_torchvision(picture, canvas, area, at)
            for picture, canvas in zip(pictures, canvases, strict=True)
            for at in ((1 / 3, 1 / 3), (0.6, 0.2), (0.5, 0.9))
        ]
        assert sum(differences) / len(differences) <= 1.5, f"area {area}"


@pytest.mark.parametrize("sampler", ["crop", "d4_scale", "reflections", "affine"])
def test_views_of_wide_pictures_show_the_boxes_of_their_maps(sampler: str) -> None:
    """An encoder that averages patches is equivariant to the maps between two views, wherever both see."""
    wide, tall = photograph("coffee.png", 200, 400), photograph("astronaut.png", 450, 300)
    canvases = torch.stack([to_canvas(picture, 96) for picture in (wide, tall)] * 4)
    blurred = torch.nn.functional.avg_pool2d(canvases.float(), 9, 1, 4, count_include_pad=False).byte()
    aspects = torch.tensor([2.0, 2 / 3] * 4)
    config = ViewsConfig(sampler=sampler, share=1.0, color_strength=0.0, crop_area=(0.4, 1.0))  # type: ignore[arg-type]
    make = config.build(PATCH, 2, image_size=64)
    first, second = make(blurred, torch.arange(8), epoch=0, aspects=aspects).views

    def encode(images: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(images, PATCH).permute(0, 2, 3, 1)

    tokens = [tuple(n // PATCH for n in view.g.size_out) for view in (first, second)]
    relative = LatticeMap.relative(first.g, second.g).on(*tokens)  # type: ignore[arg-type]
    moved = group_action(encode(first.images[0]), relative, interpolation="bilinear", backend="reference")
    assert isinstance(moved, Tensor)
    valid = relative.valid().view(8, *tokens[1])
    encoded = encode(second.images[0])
    error = (moved - encoded).abs().mean(-1)[valid]
    chance = (encoded - encoded.flip(0)).abs().mean(-1)[valid]
    assert valid.double().mean() > 0.2
    assert error.mean() < 0.15 * chance.mean()


def test_both_views_of_the_share_come_from_one_frame() -> None:
    """A random resized crop of their own picture, that both have in common; the rest is as without it."""
    canvases = uint8(6, 3, 48, 48)
    aspects = torch.tensor([0.5, 0.8, 1.0, 1.3, 2.0, 3.0])
    still = replace(D4Scale(), area=(1, 1), aspect=(1, 1))
    color = Color(0.0)
    make = MakeViews(still, Crop(), 0.5, PATCH, (color, color), 3, needs=frozenset({"plain"}), size=32, frame=Crop())
    views = make(canvases, torch.arange(6), 0, aspects).views
    frames = views[2].images[0]
    for view in views[:2]:
        for frame, shown, code in zip(frames, view.images[0], d4_codes(view.g).tolist(), strict=True):
            expected = torch.rot90(frame.flip(-1) if code >= 4 else frame, code % 4, (1, 2))
            torch.testing.assert_close(shown, expected, rtol=0, atol=1e-4)
    whole = replace(make, frame=None)(canvases, torch.arange(6), 0, aspects).views
    assert not torch.equal(whole[2].images[0], frames)
    assert torch.equal(whole[0].images[1], views[0].images[1])
    assert torch.equal(whole[0].g.linear, views[0].g.linear)
    assert not torch.equal(make(canvases, torch.arange(6), 1, aspects).views[2].images[0], frames)


def test_small_views_are_related_to_the_frame() -> None:
    """The maps of a local view and of a framed one agree on what both show."""
    yy, xx = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    canvases = torch.stack([4 * yy, 4 * xx, 127 + 0 * xx]).byte()[None].expand(8, -1, -1, -1)
    color = Color(0.0)
    local = SmallCrop(Crop((0.1, 0.3)), color)
    make = MakeViews(D4Scale(), Crop(), 1.0, PATCH, (color, color), 3, locals=(local,), size=32, frame=Crop())
    views = make(canvases, torch.arange(8), 0, torch.full((8,), 1.5)).views
    shown, small = views[0], views[2]
    relative = LatticeMap.relative(shown.g, small.g)
    moved = transform_images(shown.images[0], relative, interpolation="bilinear", antialias=True)
    valid = relative.valid().view(8, 1, *small.g.size_out).expand_as(moved)
    assert valid.double().mean() > 0.1
    assert (moved - small.images[0])[valid].abs().mean() < 0.05


@pytest.mark.parametrize("side", [32, 56, 224])
def test_the_size_of_views_is_not_the_canvas(side: int) -> None:
    views = ViewsConfig(share=0.5).build(8, 0, image_size=side)(uint8(4, 3, 40, 40), torch.arange(4), epoch=0).views
    for view in views:
        assert view.images[1].shape == (2, 3, side, side)
        assert view.g.size_in == (side, side)
        assert view.images[0].shape[2:] == view.g.size_out


def test_the_share_can_keep_its_colors() -> None:
    images, samples = uint8(6, 3, 32, 32), torch.arange(6)
    make = make_views(Reflections(), 0.5, strength=1.0)
    plain = replace(make, share_color=False)
    views, kept = make(images, samples, 0), plain(images, samples, 0)
    for view, same in zip(views.views, kept.views, strict=True):
        pixels = v2.functional.to_dtype(images[:3], torch.float32, scale=True)
        pixels = normalize(transform_images(pixels, same.g, antialias=True).clamp(0, 1))
        torch.testing.assert_close(same.images[0], pixels, rtol=0, atol=1e-5)
        assert not torch.equal(view.images[0], same.images[0])
        assert torch.equal(view.images[1], same.images[1])  # the rest's are as they were


def test_crops_refuse_a_share_that_keeps_its_colors() -> None:
    with pytest.raises(ValueError, match="share_color: got False with crops"):
        replace(make_views(Crop(), 0.5), share_color=False)
