"""The color augmentation: torchvision's transforms, each sample's own and known."""

import itertools
import math

import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from ser_fast.views.color import LAYOUT, Color, columns

DRAW = {"seed": 0, "epoch": 0, "view": 0}
VIEWS = Color(), Color(blur=0.1, solarize=0.2)


def drawn(color: Color, count: int, **where: int) -> dict[str, Tensor]:
    return dict(zip(LAYOUT, color.draw(torch.arange(count), **(DRAW | where)).T, strict=True))


def by_torchvision(image: Tensor, draws: Tensor, color: Color) -> Tensor:
    """One image (3, H, W), changed by torchvision's functions as its row of draws says."""
    named, factors = dict(zip(LAYOUT, draws.tolist(), strict=True)), color.factors(draws[None])[0].tolist()
    jitter = F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue
    if named["jittered"]:
        for place in ("first", "second", "third", "fourth"):
            operation = int(named[place])
            image = jitter[operation](image, factors[operation])
    if named["gray"]:
        image = F.rgb_to_grayscale(image, num_output_channels=3)
    if named["blurred"]:
        kernel = max(3, image.shape[-1] // 10 | 1)
        image = F.gaussian_blur(image, [kernel, kernel], [named["sigma"]] * 2)
    return F.solarize(image, named["threshold"]) if named["threshold"] < 1 else image


@pytest.mark.parametrize("color", [*VIEWS, Color(1.5, (0.8, 0.8, 0.8, 0.2), solarize=0.5)], ids=str)
def test_a_sample_changes_as_torchvision_changes_it(color: Color) -> None:
    smooth = torch.nn.functional.interpolate(torch.rand(80, 3, 5, 5), 48, mode="bilinear")
    changed, draws = color(smooth, torch.arange(80), **DRAW)
    assert draws.shape == (80, len(LAYOUT))
    assert columns(draws, "jittered", "gray", "sigma", "threshold").amin(0).tolist()[:2] == [0, 0]
    for image, row, actual in zip(smooth, draws, changed, strict=True):
        expected = by_torchvision(image, row, color)
        # The weights of its gray, .2989 and .114, add up to .9999; solarization is where that can turn a pixel over.
        near = (actual - expected).abs() < 2e-3
        assert near.all() if row[-1] == 1 else near.double().mean() > 0.98
    assert (changed != smooth).flatten(1).any(1).double().mean() > 0.7


def test_factors_are_distributed_as_torchvisions() -> None:
    """Mean, deviation and range of each factor, and the frequency of each order."""
    color, count = Color(), 6000
    draws = color.draw(torch.arange(count), **DRAW)
    jittered = columns(draws, "jittered")[:, 0] > 0
    ours = color.factors(draws)[jittered]
    transform = v2.ColorJitter(0.4, 0.4, 0.2, 0.1)
    parameters = [transform.make_params([]) for _ in range(3000)]
    names = "brightness_factor", "contrast_factor", "saturation_factor", "hue_factor"
    theirs = torch.tensor([[made[name] for name in names] for made in parameters], dtype=torch.float64)
    reach = (theirs.amax(0) - theirs.amin(0)) / 2
    for moment in (Tensor.mean, Tensor.std, Tensor.amin, Tensor.amax):
        assert ((moment(ours, 0) - moment(theirs, 0)) / reach).abs().max() < 0.04, moment
    assert ours.T.corrcoef().fill_diagonal_(0).abs().max() < 0.06
    orders = [tuple(row) for row in columns(draws, "first", "second", "third", "fourth")[jittered].int().tolist()]
    frequencies = torch.tensor([orders.count(order) for order in itertools.permutations(range(4))]).double()
    expected = int(jittered.sum()) / 24
    assert ((frequencies - expected) ** 2 / expected).sum() < 49.7  # one fair draw in 1000, at 23 degrees of freedom
    sigmas = torch.tensor([v2.GaussianBlur(23, (0.1, 2.0)).make_params([])["sigma"][0] for _ in range(3000)])
    sigma = columns(draws, "sigma")[:, 0]
    assert sigma.mean() == pytest.approx(float(sigmas.mean()), abs=0.04)
    assert sigma.std() == pytest.approx(float(sigmas.std()), abs=0.03)


@pytest.mark.parametrize(("color", "blurred", "solarized"), [(VIEWS[0], 1.0, 0.0), (VIEWS[1], 0.1, 0.2)], ids=str)
def test_rates_are_those_asked_for(color: Color, blurred: float, solarized: float) -> None:
    named = drawn(color, 6000)
    rates = {name: float(named[name].mean()) for name in ("jittered", "gray", "blurred")}
    expected = {"jittered": 0.8, "gray": 0.2, "blurred": blurred}
    assert rates == pytest.approx(expected, abs=0.02)
    assert set(named["threshold"].tolist()) <= {0.5, 1.0}
    assert (named["threshold"] < 1).double().mean() == pytest.approx(solarized, abs=0.02)
    decisions = torch.stack([named["jittered"], named["gray"], named["threshold"], named["brightness"], named["sigma"]])
    related = decisions[decisions.std(1) > 0].corrcoef().fill_diagonal_(0)
    assert related.abs().max() < 0.05


def test_what_is_not_applied_is_neutral() -> None:
    named = drawn(Color(jittered=0.0, gray=0.0, blur=0.0), 50)
    neutral = {"second": 1, "third": 2, "fourth": 3, "threshold": 1}
    assert all((values == neutral.get(name, 0)).all() for name, values in named.items())
    images = torch.rand(50, 3, 16, 16)
    assert torch.equal(Color(jittered=0.0, gray=0.0, blur=0.0)(images, torch.arange(50), **DRAW)[0], images)


@pytest.mark.parametrize("strength", [1.0, 0.5, 4.0])
def test_positions_lie_in_their_ranges(strength: float) -> None:
    """A factor at an end of its range is half the range away from no change, whatever the strength."""
    color = Color(strength)
    draws = color.draw(torch.arange(3000), **DRAW)
    positions = columns(draws, "brightness", "contrast", "saturation", "hue")
    if strength <= 2.5:  # there 1 - 0.4 strength would be negative, and the range is cut
        assert positions.amin() >= -0.5
        assert positions.amax() <= 0.5
        assert positions.amax(0).min() > 0.49
    torch.testing.assert_close(color.positions(color.factors(draws)), positions)
    low, high = color.ranges.unbind(-1)
    assert (color.factors(draws) >= low - 1e-9).all()
    assert (color.factors(draws) <= high + 1e-9).all()
    assert low.tolist() == pytest.approx([max(0, 1 - 0.4 * strength)] * 2 + [1 - 0.2 * strength, -0.1 * strength])


def test_colors_of_a_sample_do_not_depend_on_the_batch_around_it() -> None:
    color, images, samples = VIEWS[1], torch.rand(12, 3, 32, 32), torch.arange(12) + 100
    changed, draws = color(images, samples, **DRAW)
    order = torch.randperm(12)
    for rows in (order, slice(4, 6), slice(7, 8)):
        again, same_draws = color(images[rows], samples[rows], **DRAW)
        torch.testing.assert_close(again, changed[rows], rtol=0, atol=1e-6)
        assert torch.equal(same_draws, draws[rows])
    assert not torch.equal(color(images, samples + 1, **DRAW)[0], changed)


@pytest.mark.parametrize("changed", [{"seed": 1}, {"epoch": 1}, {"view": 1}], ids=str)
def test_colors_change_with_seed_epoch_and_view(changed: dict[str, int]) -> None:
    image, samples = torch.rand(1, 3, 16, 16).expand(20, -1, -1, -1), torch.arange(20)
    one, other = (Color()(image, samples, **where)[0] for where in (DRAW, DRAW | changed))
    assert (one != other).flatten(1).any(1).all()


def test_colors_stay_in_range_and_leave_random_state_alone() -> None:
    images = torch.rand(16, 3, 16, 16)
    before, given = torch.get_rng_state(), images.clone()
    changed, _ = VIEWS[1](images, torch.arange(16), **DRAW)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(images, given)
    assert 0 <= changed.min() < changed.max() <= 1
    assert changed.dtype == torch.float32


def test_strength_0_leaves_colors_as_they_are() -> None:
    images = torch.rand(4, 3, 16, 16)
    changed, draws = Color(strength=0)(images, torch.arange(4), **DRAW)
    assert torch.equal(changed, images)
    assert torch.equal(draws, Color(jittered=0.0, gray=0.0, blur=0.0).draw(torch.arange(4), **DRAW))


@pytest.mark.parametrize(("strength", "rest"), [(1.0, 0.4), (0.5, 0.2)])
def test_strength_scales_the_jitter(strength: float, rest: float) -> None:
    """Of a gray image without structure only the brightness changes: by a factor in 1 +- 0.4 strength."""
    gray = torch.full((300, 3, 8, 8), 0.5)
    factors = Color(strength)(gray, torch.arange(300), **DRAW)[0][:, 0, 0, 0] / 0.5
    assert 1 - rest - 1e-5 <= factors.min() < 1 - 0.9 * rest
    assert 1 + 0.9 * rest < factors.max() <= 1 + rest + 1e-5
    assert 0.14 < factors.sub(1).abs().lt(1e-5).double().mean() < 0.27  # a fifth is not jittered at all


def test_an_empty_batch_stays_empty() -> None:
    changed, draws = Color()(torch.rand(0, 3, 8, 8), torch.arange(0), **DRAW)
    assert changed.shape == (0, 3, 8, 8)
    assert draws.shape == (0, len(LAYOUT))


@pytest.mark.parametrize(
    "options",
    [{"strength": -1.0}, {"strength": 5.1}, {"gray": 1.1}, {"blur": math.nan}, {"jitter": (0.1, 0.1, 0.1, -0.1)}],
    ids=str,
)
def test_color_names_the_option_it_refuses(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))}: got"):
        Color(**options)
