"""LatticeMap: group laws, definitions by hand, and one map that acts on pixels as on tokens."""

import math
from collections.abc import Callable, Sequence
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ser_fast.lattice import LatticeMap, positions
from ser_fast.ops.group_action import group_action

SIZES = [(5, 7), (6, 4), (5, 5), (4, 4), (1, 3)]  # odd, even, square and not, a single row
SQUARES = [(5, 5), (4, 4)]
CODES = torch.arange(8)


def d4_product(a: int, b: int) -> int:
    """The code of "b, then a":  r^ka h^fa r^kb h^fb, with  h r = r^-1 h."""
    turns = a % 4 + (b % 4 if a < 4 else -(b % 4))
    return turns % 4 + 4 * (a // 4 != b // 4)


def d4_image(x: Tensor, code: int) -> Tensor:
    """The element of D4 on (B, H, W, C), by torch's own flip and rot90."""
    return torch.rot90(x.flip(2) if code >= 4 else x, code % 4, dims=(1, 2))


def turned(size: Sequence[int], code: int) -> tuple[int, int]:
    return (size[1], size[0]) if code % 2 else (size[0], size[1])


def points(g: LatticeMap) -> tuple[Tensor, Tensor]:
    """The centres of g's output lattice and where g takes them from: both (B, h*w, 2), as (y, x)."""
    h, w = g.size_out
    grid = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
    centres = torch.stack(grid, -1).double().reshape(1, h * w, 2).expand(len(g), -1, -1)
    return centres, torch.stack(positions(g.linear, g.offset, g.size_in, g.size_out), -1)


def preimage(g: LatticeMap, u: Tensor) -> Tensor:
    """The definition of g on any points u (B, N, 2) of its output, in lattice coordinates."""
    half_in, half_out = (torch.tensor(size, dtype=torch.float64) / 2 for size in (g.size_in, g.size_out))
    return (u - half_out) @ g.linear.mT + g.offset[:, None] + half_in


def some_map(size: tuple[int, int], size_out: tuple[int, int], batch: int = 3) -> LatticeMap:
    """Random, general and well conditioned."""
    linear = torch.eye(2) + 0.4 * torch.rand(batch, 2, 2) - 0.2
    return LatticeMap.affine(size, linear, torch.randn(batch, 2), size_out)


def assert_same_map(actual: LatticeMap, expected: LatticeMap, tolerance: float = 0.0) -> None:
    assert (actual.size_in, actual.size_out, len(actual)) == (expected.size_in, expected.size_out, len(expected))
    torch.testing.assert_close(actual.linear, expected.linear, rtol=0, atol=tolerance)
    torch.testing.assert_close(actual.offset, expected.offset, rtol=0, atol=tolerance)


# ---------------------------------------------------------------- the group D4


@pytest.mark.parametrize(("a", "b"), list(product(range(8), repeat=2)))
def test_d4_products(a, b):
    for size in SIZES:
        second, first = LatticeMap.d4(turned(size, b), a), LatticeMap.d4(size, b)
        composed = second @ first
        assert composed.d4_code.tolist() == [d4_product(a, b)]
        assert_same_map(composed, LatticeMap.d4(size, d4_product(a, b)))


def test_the_product_table_is_that_of_torch():
    x = torch.arange(4 * 5).reshape(1, 4, 5, 1)
    for a, b in product(range(8), repeat=2):
        assert torch.equal(d4_image(d4_image(x, b), a), d4_image(x, d4_product(a, b)))


def test_d4_is_associative():
    for a, b, c in product(range(8), repeat=3):
        x, y, z = (LatticeMap.d4((5, 5), code) for code in (a, b, c))
        assert_same_map((x @ y) @ z, x @ (y @ z))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("code", range(8))
def test_d4_inverse_and_identity(size, code):
    g = LatticeMap.d4(size, code)
    assert g.size_out == turned(size, code)
    assert g.d4_code.tolist() == [code]
    inverse = code if code >= 4 else -code % 4  # reflections undo themselves
    assert_same_map(g.inverse(), LatticeMap.d4(g.size_out, inverse))
    assert_same_map(g.inverse() @ g, LatticeMap.identity(size))
    assert_same_map(g @ g.inverse(), LatticeMap.identity(g.size_out))
    assert_same_map(g @ LatticeMap.identity(size), g)
    assert not torch.signbit(g.inverse().linear[g.inverse().linear == 0]).any()


@pytest.mark.parametrize("size", SIZES)
def test_d4_code_survives_long_chains(size):
    samples = 1 if size[0] != size[1] else 16  # where odd and even turns differ in size, one chain for all
    g, code = LatticeMap.identity(size, batch=samples), [0] * samples
    for _ in range(50):
        step = torch.randint(8, (samples,))
        g = LatticeMap.d4(g.size_out, step) @ g
        code = [d4_product(s, c) for s, c in zip(step.tolist(), code, strict=True)]
        assert g.d4_code.tolist() == code
    assert_same_map(g, LatticeMap.d4(size, torch.tensor(code)))


def test_d4_batches_mix_turns_of_a_square():
    a, b = (code.flatten() for code in torch.meshgrid(CODES, CODES, indexing="ij"))
    expected = [d4_product(i, j) for i, j in zip(a.tolist(), b.tolist(), strict=True)]
    assert (LatticeMap.d4((6, 6), a) @ LatticeMap.d4((6, 6), b)).d4_code.tolist() == expected


def test_d4_code_tells_what_is_no_element():
    eye = torch.eye(2)
    shift = torch.tensor([[0, 0], [0, 1], [0, 0], [0, 0]])
    mixed = LatticeMap.affine((4, 4), torch.stack([eye, eye, 2 * eye, -eye]), shift)
    assert mixed.d4_code.tolist() == [0, -1, -1, 2]
    assert LatticeMap.resize((4, 4), (5, 5)).d4_code.tolist() == [-1]
    assert LatticeMap.affine((4, 6), torch.eye(2), size_out=(6, 4)).d4_code.tolist() == [-1]  # the wrong frame
    assert LatticeMap.rotate((4, 4), torch.tensor([90.0, 45.0, -90.0])).d4_code.tolist() == [1, -1, 3]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("code", range(8))
def test_d4_moves_tokens_as_torch_does_bit_for_bit(size, code):
    x = torch.randn(2, *size, 3)
    x.view(-1)[:6] = torch.tensor([-0.0, 0.0, math.inf, -math.inf, math.nan, 1e-45])
    out = group_action(x, LatticeMap.d4(size, code))
    assert torch.equal(out.view(torch.int32), d4_image(x, code).contiguous().view(torch.int32))


@pytest.mark.parametrize("size", SIZES)
def test_named_elements(size):
    x = torch.randn(2, *size, 3)
    named = [
        (LatticeMap.identity(size), x),
        (LatticeMap.hflip(size), x.flip(2)),
        (LatticeMap.vflip(size), x.flip(1)),
        *((LatticeMap.rot90(size, k), torch.rot90(x, k, dims=(1, 2))) for k in range(-5, 6)),
        (LatticeMap.rot90(size, torch.tensor([2, -4])), torch.stack([torch.rot90(x[0], 2), x[1]])),
    ]
    for g, expected in named:
        assert torch.equal(group_action(x, g), expected)


# ---------------------------------------------------------------- the other constructors, by hand


def test_resize_takes_centres_by_the_half_pixel_convention():
    g = LatticeMap.resize((4, 6), (2, 9), batch=2)
    y, x = positions(g.linear, g.offset, g.size_in, g.size_out)
    expected_y = torch.tensor([1.0, 3.0], dtype=torch.float64).repeat_interleave(9).expand(2, -1)
    expected_x = ((torch.arange(9, dtype=torch.float64) + 0.5) * 6 / 9).repeat(2).expand(2, -1)
    torch.testing.assert_close(y, expected_y, rtol=0, atol=1e-14)
    torch.testing.assert_close(x, expected_x, rtol=0, atol=1e-14)


def test_crop_takes_centres_from_its_boxes():
    boxes = torch.tensor([[1.0, 2.0, 2.0, 3.0], [-1.5, 0.25, 6.0, 9.5]])
    g = LatticeMap.crop((4, 6), boxes, (3, 5))
    centres, found = points(g)
    expected = boxes[:, None, :2] + centres * boxes[:, None, 2:] / torch.tensor([3.0, 5.0])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
    assert_same_map(LatticeMap.crop((4, 6), (0.0, 0.0, 4.0, 6.0), (3, 5)), LatticeMap.resize((4, 6), (3, 5)), 1e-15)
    assert LatticeMap.crop((4, 6), (0, 0, 4, 6), (4, 6)).d4_code.tolist() == [0]


def test_rotate_is_counter_clockwise_about_the_centre():
    angles = torch.tensor([30.0, -100.0, 400.0], dtype=torch.float64)
    g = LatticeMap.rotate((5, 8), angles)
    centres, found = points(g)

    def plane(u: Tensor) -> Tensor:  # the complex plane has y up
        return torch.complex(u[..., 1] - 4, -(u[..., 0] - 2.5))

    turn = torch.polar(torch.ones(3, dtype=torch.float64), torch.deg2rad(angles))[:, None]
    torch.testing.assert_close(plane(found) * turn, plane(centres), rtol=0, atol=1e-14)
    assert g.size_out == (5, 8)
    assert_same_map(LatticeMap.rotate((5, 8), 30.0, batch=2)[1:], g[:1])


@pytest.mark.parametrize("size", SQUARES)
@pytest.mark.parametrize("k", range(-4, 5))
def test_rotate_by_quarter_turns_is_exactly_rot90(size, k):
    assert_same_map(LatticeMap.rotate(size, 90.0 * k), LatticeMap.rot90(size, k))
    assert LatticeMap.rotate(size, 90.0 * k).d4_code.tolist() == [k % 4]


def test_affine_is_its_definition():
    linear, offset = torch.randn(3, 2, 2), torch.randn(3, 2)
    g = LatticeMap.affine((4, 6), linear, offset, (3, 5))
    for y, x in product(range(3), range(5)):
        about_centre = torch.tensor([y + 0.5 - 1.5, x + 0.5 - 2.5], dtype=torch.float64)
        expected = linear.double() @ about_centre + offset.double() + torch.tensor([2.0, 3.0])
        torch.testing.assert_close(points(g)[1][:, y * 5 + x], expected, rtol=0, atol=1e-13)
    assert_same_map(LatticeMap.affine((4, 6), linear[0]), LatticeMap.affine((4, 6), linear[:1], torch.zeros(1, 2)))


def test_affine_broadcasts_one_linear_over_offsets() -> None:
    offset = torch.tensor([[0.0, 1.0], [1.0, 0.0], [2.0, -1.0]])
    g = LatticeMap.affine((4, 6), torch.eye(2), offset)
    assert torch.equal(g.linear, torch.eye(2, dtype=torch.float64).expand(3, 2, 2))
    assert torch.equal(g.offset, offset.double())


def test_maps_are_kept_in_float64_whatever_they_are_made_of():
    for g in (LatticeMap.rotate((3, 3), torch.tensor([10.0])), some_map((3, 3), (2, 2)), LatticeMap.rot90((3, 3), 1)):
        assert g.linear.dtype == g.offset.dtype == torch.float64


# ---------------------------------------------------------------- algebra


def test_compose_is_one_map_after_the_other():
    first, second = some_map((4, 6), (5, 3)), some_map((5, 3), (2, 7))
    both = second @ first
    assert (both.size_in, both.size_out) == ((4, 6), (2, 7))
    centres, found = points(both)
    torch.testing.assert_close(found, preimage(first, preimage(second, centres)), rtol=0, atol=1e-13)
    assert_same_map(second.compose(first), both)


def test_inverse_round_trips():
    for g in (
        some_map((4, 6), (5, 3)),
        LatticeMap.rotate((5, 5), 33.0),
        LatticeMap.crop((4, 6), (1, -2, 2, 9), (3, 3)),
    ):
        assert_same_map(g.inverse() @ g, LatticeMap.identity(g.size_in, batch=len(g)), 1e-13)
        assert_same_map(g @ g.inverse(), LatticeMap.identity(g.size_out, batch=len(g)), 1e-13)
        assert_same_map(g.inverse().inverse(), g, 1e-13)


def test_inverse_of_a_product_is_the_product_of_inverses():
    a, b = some_map((5, 3), (2, 7)), some_map((4, 6), (5, 3))
    assert_same_map((a @ b).inverse(), b.inverse() @ a.inverse(), 1e-13)


def test_relative_takes_view_0_to_view_1():
    g0, g1 = some_map((6, 8), (5, 3)), some_map((6, 8), (4, 7))
    relative = LatticeMap.relative(g0, g1)
    assert (relative.size_in, relative.size_out) == ((5, 3), (4, 7))
    assert_same_map(relative @ g0, g1, 1e-13)
    assert_same_map(LatticeMap.relative(g0, g0), LatticeMap.identity((5, 3), batch=3), 1e-13)


def test_relative_of_d4_views_is_d4():
    g0, g1 = LatticeMap.d4((6, 6), CODES), LatticeMap.d4((6, 6), CODES.flip(0))
    undo = [code if code >= 4 else -code % 4 for code in range(8)]
    expected = [d4_product(7 - code, undo[code]) for code in range(8)]
    assert LatticeMap.relative(g0, g1).d4_code.tolist() == expected


@pytest.mark.parametrize("swapped", [False, True])
def test_one_map_meets_a_batch(swapped):
    one, many = some_map((4, 6), (5, 3), batch=1), some_map((5, 3), (2, 7), batch=4)
    a, b = (many, one) if not swapped else (one.inverse(), many.inverse())
    composed = a @ b
    assert len(composed) == 4
    for sample in range(4):
        here = slice(sample, sample + 1)
        expected = a[here] @ b if not swapped else a @ b[here]
        assert_same_map(composed[here], expected, 1e-15)


def test_axis_aligned_is_claimed_only_where_it_holds():
    d4, scale, general = LatticeMap.rot90((4, 6), 1), LatticeMap.resize((6, 4), (3, 5)), some_map((6, 4), (3, 5))
    assert (scale @ d4).axis_aligned
    assert (scale @ d4).inverse().axis_aligned
    assert LatticeMap.relative(d4, LatticeMap.crop((4, 6), (0, 1, 2, 2), (3, 3))).axis_aligned
    assert not (general @ d4).axis_aligned
    assert not (LatticeMap.hflip((3, 5)) @ general).axis_aligned
    assert not general.inverse().on((3, 3), (4, 4)).axis_aligned


# ---------------------------------------------------------------- pixels and tokens, and torch's theta


def test_on_is_the_same_map_of_the_plane():
    pixels = some_map((24, 32), (16, 40))
    tokens = pixels.on((3, 4), (2, 5))  # patches of 8 x 8
    assert (tokens.size_in, tokens.size_out) == ((3, 4), (2, 5))
    u = 6 * torch.rand(3, 10, 2, dtype=torch.float64)
    torch.testing.assert_close(preimage(tokens, u), preimage(pixels, u * 8) / 8, rtol=0, atol=1e-13)
    assert_same_map(tokens.on((24, 32), (16, 40)), pixels, 1e-13)
    assert_same_map(pixels.on((24, 32), (16, 40)), pixels)


def test_on_other_lattices_stretches_each_axis():
    g = some_map((6, 10), (4, 9)).on((3, 20), (8, 3))
    identity = LatticeMap.identity((6, 10)).on((3, 20), (8, 3))
    assert_same_map(identity, LatticeMap.resize((3, 20), (8, 3)), 1e-15)
    assert_same_map(g.on((6, 10), (4, 9)).on((3, 20), (8, 3)), g, 1e-13)


@pytest.mark.parametrize("size", [(3, 4), (5, 5), (14, 13)])
@pytest.mark.parametrize("code", range(8))
def test_d4_of_pixels_is_exactly_d4_of_tokens(size, code):
    pixels = LatticeMap.d4((size[0] * 16, size[1] * 16), code)
    assert_same_map(pixels.on(size, turned(size, code)), LatticeMap.d4(size, code))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_theta_is_that_of_affine_grid(dtype):
    g = some_map((4, 6), (5, 3))
    theta = g.theta(dtype)
    assert theta.dtype == dtype
    grid = F.affine_grid(theta, [3, 1, 5, 3], align_corners=False).reshape(3, 15, 2)  # (x, y) in [-1, 1]
    found = (grid.flip(-1) + 1) * torch.tensor([2.0, 3.0], dtype=dtype)
    tolerance = 10 * torch.finfo(dtype).eps
    torch.testing.assert_close(found, points(g)[1].to(dtype), rtol=tolerance, atol=tolerance)


def test_theta_moves_an_image_as_group_action_does():
    g = some_map((7, 9), (6, 8))
    image = torch.randn(3, 7, 9, 2, dtype=torch.float64)
    grid = F.affine_grid(g.theta(torch.float64), [3, 2, 6, 8], align_corners=False)
    expected = F.grid_sample(image.movedim(-1, 1), grid, "bilinear", "border", align_corners=False).movedim(1, -1)
    actual = group_action(image, g, interpolation="bilinear", backend="reference")
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def encode(image: Tensor, patch: int) -> Tensor:
    """The simplest equivariant encoder: the mean of each patch, (B, p*H, p*W, C) to (B, H, W, C)."""
    return F.avg_pool2d(image.movedim(-1, 1), patch).movedim(1, -1)


def pixels_of(size: Sequence[int], patch: int) -> tuple[int, int]:
    return size[0] * patch, size[1] * patch


SHIFTS = [(0, 0), (1, 0), (-2, 1), (0, -3)]  # in whole tokens


@pytest.mark.parametrize("size", SIZES[:-1])
@pytest.mark.parametrize("patch", [2, 3])
def test_an_encoder_of_patch_means_commutes_with_d4(size, patch):
    image = torch.randn(2, *pixels_of(size, patch), 3)
    for code in range(8):
        pixels = LatticeMap.d4(pixels_of(size, patch), code)
        tokens = pixels.on(size, turned(size, code))
        actual = group_action(encode(image, patch), tokens)
        torch.testing.assert_close(actual, encode(group_action(image, pixels), patch), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", SIZES[:-1])
@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("interpolation", ["nearest", "bicubic", "mitchell"])
def test_an_encoder_of_patch_means_commutes_with_whole_shifts(size, shift, interpolation):
    patch = 4
    image = torch.randn(2, *pixels_of(size, patch), 3)
    offset = torch.tensor(shift, dtype=torch.float64)
    pixels = LatticeMap.affine(pixels_of(size, patch), torch.eye(2), patch * offset)
    tokens = pixels.on(size, size)
    options = {"interpolation": interpolation, "padding": "zeros"}
    actual = group_action(encode(image, patch), tokens, **options)
    torch.testing.assert_close(actual, encode(group_action(image, pixels, **options), patch), rtol=0, atol=1e-6)


@pytest.mark.parametrize("interpolation", ["bilinear", "catmull_rom", "mitchell"])
def test_an_encoder_of_patch_means_commutes_with_any_map_of_a_ramp(interpolation):
    """These kernels reproduce a linear field, and so does the mean of a patch: no error away from the edges."""
    size, patch = (12, 10), 4
    y, x = (torch.arange(n, dtype=torch.float64) / patch for n in pixels_of(size, patch))
    image = (0.3 * y[:, None] - 0.7 * x)[None, :, :, None]
    linear = torch.tensor([[[0.4, 0.2], [-0.1, 0.4]], [[0.5, 0.0], [0.0, 0.3]]])
    pixels = LatticeMap.affine(pixels_of(size, patch), linear, torch.tensor([[1.2, -1.6], [4.0, 6.0]]))
    tokens = pixels.on(size, size)
    assert (points(tokens)[1] > 2).all()  # every tap lies in the lattice
    assert (points(tokens)[1] < torch.tensor(size) - 2).all()
    options = {"interpolation": interpolation, "backend": "reference"}
    actual = group_action(encode(image, patch).expand(2, -1, -1, -1), tokens, **options)
    expected = encode(group_action(image.expand(2, -1, -1, -1), pixels, **options), patch)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size_out", [(12, 20), (20, 12), (16, 24), (11, 14)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_an_encoder_of_patch_means_nearly_commutes_with_resizes(size_out, interpolation):
    """On cos(pi y/H) cos(pi x/W), flat at the edges, the two sides differ by terms of second order alone.

    The budget, a sum over the axes of max |f''| = (pi/n)^2 times, in tokens: 1/8 for interpolating tokens linearly (and
    for the edge, held constant over half a token); |1 - s^2|/24 for a patch mean over s tokens in place of 1; 1/8/p^2
    for interpolating pixels. The cubic kernel errs less.
    """
    size, patch = (16, 18), 3
    height, width = pixels_of(size, patch)
    y, x = ((torch.arange(n, dtype=torch.float64) + 0.5) * math.pi / n for n in (height, width))
    image = (y.cos()[:, None] * x.cos())[None, :, :, None]
    pixels = LatticeMap.resize((height, width), pixels_of(size_out, patch))
    tokens = pixels.on(size, size_out)
    options = {"interpolation": interpolation, "backend": "reference"}
    actual = group_action(encode(image, patch), tokens, **options)
    expected = encode(group_action(image, pixels, **options), patch)
    budget = sum(
        (math.pi / n) ** 2 * (1 / 8 + abs(1 - (n / n_out) ** 2) / 24 + 1 / 8 / patch**2)
        for n, n_out in zip(size, size_out, strict=True)
    )
    assert (actual - expected).abs().max() <= budget


# ---------------------------------------------------------------- valid


def test_valid_by_hand():
    offset = torch.tensor([[1.0, 0.0], [0.0, -1.5], [-2.6, 3.0]])
    shift = LatticeMap.affine((3, 4), torch.eye(2).expand(3, 2, 2), offset)
    expected = torch.zeros(3, 3, 4, dtype=torch.bool)
    expected[0, :2] = True  # the last row would come from below
    expected[1, :, 1:] = True  # x = -1, 0 (the edge itself), 1, 2
    # Of the third, every row comes from above: y = -2.1, -1.1 and -0.1.
    assert torch.equal(shift.valid(), expected.flatten(1))


def test_valid_of_a_zoom_out_is_the_image_in_its_frame():
    zoom_out = LatticeMap.crop((4, 4), (-4.0, -4.0, 12.0, 12.0), (6, 6))  # centres at -3, -1, 1, 3, 5, 7
    expected = torch.zeros(6, 6, dtype=torch.bool)
    expected[2:4, 2:4] = True
    assert torch.equal(zoom_out.valid(), expected.flatten()[None])


@pytest.mark.parametrize(("outside", "expected"), [(0.0, True), (5e-5, True), (2e-4, False)])
@pytest.mark.parametrize("side", [(-1.0, 0.0), (1.0, 0.0), (0.0, -1.0), (0.0, 1.0)])
def test_valid_includes_the_edges(outside, expected, side):
    offset = torch.tensor(side, dtype=torch.float64) * (0.5 + outside)  # of a lattice of a single token
    assert LatticeMap.affine((1, 1), torch.eye(2), offset).valid().item() is expected


@pytest.mark.parametrize(
    "g",
    [
        *(LatticeMap.d4((5, 7), code) for code in range(8)),
        LatticeMap.resize((5, 7), (9, 3)),
        LatticeMap.crop((5, 7), (0.0, 1.0, 5.0, 6.0), (8, 8)),
    ],
)
def test_everything_is_valid_inside(g):
    assert g.valid().all()
    assert g.valid().shape == (1, g.size_out[0] * g.size_out[1])


def test_a_rotated_frame_loses_its_corners():
    valid = LatticeMap.rotate((8, 8), 45.0).valid().reshape(8, 8)
    assert not (valid[0, 0] | valid[0, -1] | valid[-1, 0] | valid[-1, -1])
    assert valid[2:6, 2:6].all()


# ---------------------------------------------------------------- reading


def test_indexing():
    g = some_map((4, 6), (5, 3), batch=5)
    for index in (slice(1, 4), torch.tensor([4, 0, 0]), torch.tensor([True, False, False, True, True])):
        part = g[index]
        assert torch.equal(part.linear, g.linear[index])
        assert torch.equal(part.offset, g.offset[index])
        assert (part.size_in, part.size_out, len(part)) == (g.size_in, g.size_out, 3)
    assert LatticeMap.hflip((4, 6), batch=3)[1:].axis_aligned


@pytest.mark.parametrize(
    ("g", "length"),
    [
        (LatticeMap.identity((3, 3)), 1),
        (LatticeMap.hflip((3, 3), batch=4), 4),
        (LatticeMap.vflip((3, 3), batch=0), 0),
        (LatticeMap.rot90((3, 3), torch.tensor([1, 2, 3])), 3),
        (LatticeMap.resize((3, 3), (2, 2), batch=2), 2),
        (LatticeMap.rotate((3, 3), 5.0, batch=6), 6),
        (LatticeMap.crop((3, 3), torch.ones(5, 4), (2, 2)), 5),
        (LatticeMap.affine((3, 3), torch.eye(2).expand(7, 2, 2), torch.zeros(2)), 7),
    ],
)
def test_len_is_the_batch(g, length):
    assert len(g) == length
    assert g.linear.shape == (length, 2, 2)
    assert g.offset.shape == (length, 2)


def test_to_moves_every_tensor():
    g = LatticeMap.resize((4, 6), (3, 3), batch=2)
    assert g.device == torch.device("cpu")
    moved = g.to("meta", non_blocking=True)
    assert moved.device == moved.linear.device == moved.offset.device == torch.device("meta")
    assert (moved.size_in, moved.size_out, moved.axis_aligned) == ((4, 6), (3, 3), True)
    assert_same_map(g.to("cpu"), g)


# ---------------------------------------------------------------- errors

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("build", "argument", "got"),
    [
        (lambda: LatticeMap.identity((3,)), "size", r"\(3,\)"),
        (lambda: LatticeMap.identity((3, -1)), "size", r"\(3, -1\)"),
        (lambda: LatticeMap.rotate((3, 2.5), 10.0), "size", r"\(3, 2.5\)"),
        (lambda: LatticeMap.resize((0, 3), (3, 3)), "size", r"\(0, 3\)"),
        (lambda: LatticeMap.resize((3, 3), (0, 3)), "size_out", r"\(0, 3\)"),
        (lambda: LatticeMap.crop((3, 3), (0, 0, 1, 1), (2, 0)), "size_out", r"\(2, 0\)"),
        (lambda: LatticeMap.affine((3, 3), torch.eye(2), size_out=(2, 2, 2)), "size_out", r"\(2, 2, 2\)"),
        (lambda: LatticeMap.rot90((3, 3), torch.tensor([0.5])), "k", r"tensor\(\[0.5"),
        (lambda: LatticeMap.rot90((3, 3), 1.0), "k", "1.0"),
        (lambda: LatticeMap.rot90((3, 3), torch.tensor(1)), "k", r"tensor\(1\)"),
        (lambda: LatticeMap.rot90((3, 3), torch.tensor([True])), "k", "True"),
        (lambda: LatticeMap.d4((3, 3), 8), "code", "8"),
        (lambda: LatticeMap.d4((3, 3), torch.tensor([3, -1])), "code", "-1 to 3"),
        (lambda: LatticeMap.rot90((3, 4), torch.tensor([0, 1])), "code", "3x4"),
        (lambda: LatticeMap.rotate((3, 3), torch.zeros(2, 1)), "angle", "takes finite degrees"),
        (lambda: LatticeMap.rotate((3, 3), NAN), "angle", "nan"),
        (lambda: LatticeMap.crop((3, 3), (0, 0, 1), (2, 2)), "box", r"\(3,\)"),
        (lambda: LatticeMap.crop((3, 3), torch.ones(1, 1, 4), (2, 2)), "box", r"\(1, 1, 4\)"),
        (lambda: LatticeMap.crop((3, 3), (0, 0, 1, 0), (2, 2)), "box", "positive"),
        (lambda: LatticeMap.crop((3, 3), (0, 0, -1, 1), (2, 2)), "box", "positive"),
        (lambda: LatticeMap.crop((3, 3), (0, 0, INF, 1), (2, 2)), "box", "finite"),
        (lambda: LatticeMap.crop((3, 3), (NAN, 0, 1, 1), (2, 2)), "box", "finite"),
        (lambda: LatticeMap.crop((300, 300), (350, 0, 10, 10), (2, 2)), "box", "shows nothing"),
        (lambda: LatticeMap.crop((3, 3), ((0, 0, 1, 1), (0, -2, 1, 2)), (2, 2)), "box", "shows nothing"),
        (lambda: LatticeMap.affine((3, 3), torch.eye(3)), "linear", r"\(3, 3\)"),
        (lambda: LatticeMap.affine((3, 3), torch.eye(2), torch.zeros(3)), "offset", r"\(3,\)"),
        (
            lambda: LatticeMap.affine((3, 3), torch.eye(2).expand(3, 2, 2), torch.zeros(4, 2)),
            "offset",
            "4 of them for 3",
        ),
        (lambda: LatticeMap.rot90((3, 3), torch.tensor([1, 2]), batch=5), "batch", "5"),
        (lambda: LatticeMap.identity((3, 3), batch=-1), "batch", "-1"),
        (lambda: LatticeMap.identity(3), "size", "3"),  # type: ignore[arg-type]
        (lambda: LatticeMap.d4((3, 3), 2**70), "code", str(2**70)),
        (lambda: LatticeMap.identity((3, 3), batch=2**70), "batch", str(2**70)),
        (lambda: LatticeMap.rotate((3, 3), 1.0, batch=2.5), "batch", "2.5"),  # type: ignore[arg-type]
        (lambda: LatticeMap.identity((2**31, 3)), "size", r"\(2147483648, 3\), takes .* to 2\^31 - 1"),
        (lambda: LatticeMap.identity((3, 3)).on((3, 3), (3, 2**70)), "size_out", str(2**70)),
        (lambda: LatticeMap.resize((3, 3), (2**16, 2**16)).valid(), "size_out", "fewer than 2"),
        (lambda: LatticeMap.identity((0, 3)).on((2, 2), (2, 2)), "size_out", "empty"),
        (lambda: LatticeMap.affine((3, 3), torch.eye(2) * INF), "linear", "finite"),
        (lambda: LatticeMap.affine((3, 3), torch.eye(2), torch.tensor([0, NAN])), "offset", "finite"),
        (lambda: LatticeMap.affine((3, 3), torch.ones(2, 2)), "linear", "invertible"),
    ],
)
def test_constructors_name_the_argument(build: Callable[[], LatticeMap], argument, got):
    with pytest.raises(ValueError, match=rf"(?s){argument}\b.*: .*{got}"):
        build()


@pytest.mark.parametrize(
    ("name", "build"),
    [
        ("k", lambda x: LatticeMap.rot90((3, 3), x.long())),
        ("angle", lambda x: LatticeMap.rotate((3, 3), x)),
        ("box", lambda x: LatticeMap.crop((3, 3), x, (3, 3))),
    ],
)
def test_sparse_arguments_are_refused(name: str, build: Callable[[Tensor], LatticeMap]) -> None:
    with pytest.raises(TypeError, match=f"^{name}: got a tensor of the layout sparse_coo, takes a dense one"):
        build(torch.ones(4).to_sparse())


@pytest.mark.parametrize("turns", [2**70 + 1, -(2**70) + 1])
def test_turns_of_any_number_are_taken(turns: int) -> None:
    assert LatticeMap.rot90((3, 3), turns).d4_code.tolist() == [1]


@pytest.mark.parametrize("index", [0, -1, torch.tensor(0), (slice(None), 0)])
def test_an_index_that_is_no_batch(index):
    with pytest.raises(TypeError, match="samples: got"):
        LatticeMap.identity((3, 3), batch=2)[index]


@pytest.mark.parametrize(
    ("a", "b", "match"),
    [
        (LatticeMap.identity((3, 3)), LatticeMap.identity((3, 4)), r"b gives a \(3, 4\) lattice, a takes \(3, 3\)"),
        (LatticeMap.identity((3, 3), batch=2), LatticeMap.identity((3, 3), batch=3), "batches of 2 and 3"),
    ],
)
def test_maps_that_do_not_meet(a, b, match):
    with pytest.raises(ValueError, match=match):
        a @ b


# ---------------------------------------------------------------- torch.compile


@pytest.mark.parametrize(
    "algebra",
    [
        lambda a, b: a.compose(b.inverse()),
        LatticeMap.relative,
        lambda a, b: b.inverse().on((2, 2), (6, 8)),
    ],
    ids=["compose", "relative", "inverse"],
)
def test_algebra_compiles_without_a_graph_break(algebra):
    compiled = torch.compile(
        lambda g0, g1: (algebra(g0, g1).linear, algebra(g0, g1).offset), fullgraph=True, backend="aot_eager"
    )
    g0, g1 = some_map((6, 8), (5, 3)), some_map((6, 8), (5, 3))
    expected = algebra(g0, g1)
    for actual, value in zip(compiled(g0, g1), (expected.linear, expected.offset), strict=True):
        torch.testing.assert_close(actual, value, rtol=0, atol=1e-14)


# ---------------------------------------------------------------- by hand, and in batches

LINEAR, OFFSET = torch.eye(2, dtype=torch.float64).repeat(3, 1, 1), torch.zeros(3, 2, dtype=torch.float64)


@pytest.mark.parametrize(
    ("error", "match", "changed"),
    [
        (TypeError, "linear: got torch.float32, takes a float64 tensor", {"linear": LINEAR.float()}),
        (TypeError, "linear: got list, takes", {"linear": LINEAR.tolist()}),
        (TypeError, "linear: got a tensor of the layout sparse_coo, takes a dense", {"linear": LINEAR.to_sparse()}),
        (ValueError, r"size_in: got \(2, 2147483648\), takes", {"size_in": (2, 2**31)}),
        (TypeError, "offset: got torch.int64, takes", {"offset": OFFSET.long()}),
        (ValueError, r"linear: got shape \(2, 2\), takes \(B, 2, 2\)", {"linear": LINEAR[0]}),
        (ValueError, r"linear: got shape \(3, 2, 3\), takes", {"linear": LINEAR.new_zeros(3, 2, 3)}),
        (ValueError, r"offset: got shape \(2, 2\), takes \(3, 2\)", {"offset": OFFSET[:2]}),
        (ValueError, r"offset: got shape \(3, 3\), takes \(3, 2\)", {"offset": OFFSET.new_zeros(3, 3)}),
        (ValueError, "offset: got device meta, takes that of linear, cpu", {"offset": OFFSET.to("meta")}),
        (TypeError, "frames: got torch.float32, takes a tensor like linear", {"frames": torch.zeros(3, 2, 3)}),
        (TypeError, "frames: got list, takes", {"frames": []}),
        (ValueError, r"frames: got shape \(3, 3\), takes \(3, K, 3\)", {"frames": OFFSET.new_zeros(3, 3)}),
        (ValueError, r"frames: got shape \(1, 2, 3\), takes \(3, K, 3\)", {"frames": OFFSET.new_zeros(1, 2, 3)}),
        (ValueError, r"size_in: got \(-1, 2\), takes", {"size_in": (-1, 2)}),
        (ValueError, r"size_out: got \(2.0, 2\), takes", {"size_out": (2.0, 2)}),
        (ValueError, r"size_out: got \(1,\), takes", {"size_out": (1,)}),
    ],
)
def test_a_map_made_by_hand_is_checked(error, match, changed):
    with pytest.raises(error, match="^" + match):
        LatticeMap(**{"linear": LINEAR, "offset": OFFSET, "size_in": (2, 3), "size_out": (2, 3), **changed})


def test_cat_and_stack_are_batches():
    rotated, cropped = LatticeMap.rotate((5, 5), torch.tensor([10.0, 20.0])), LatticeMap.d4((5, 5), 3)
    joined = LatticeMap.cat([rotated, cropped])
    assert torch.equal(joined.linear, torch.cat([rotated.linear, cropped.linear]))
    assert (len(joined), joined.axis_aligned) == (3, False)
    codes = LatticeMap.stack([LatticeMap.d4((5, 5), code) for code in range(8)])
    assert torch.equal(codes.d4_code, CODES)
    assert codes.axis_aligned
    with pytest.raises(ValueError, match=r"^maps: got batches of \[2, 1\], takes maps of one sample each"):
        LatticeMap.stack([rotated, cropped])
    with pytest.raises(ValueError, match=r"^maps: got sizes .*takes maps of one size_in and one size_out"):
        LatticeMap.cat([rotated, LatticeMap.identity((5, 6))])
    for nothing in ([], [torch.eye(2)]):
        with pytest.raises(TypeError, match=r"^maps: got .*, takes a list of LatticeMaps"):
            LatticeMap.cat(nothing)


class Maps(torch.utils.data.Dataset):
    """A picture and its map."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[Tensor, LatticeMap]:
        return torch.full((3,), float(index)), LatticeMap.d4((4, 4), index)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_data_loader_joins_maps(workers, monkeypatch):
    pinned = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda x: pinned.append(x) or x)
    pictures, g = next(iter(torch.utils.data.DataLoader(Maps(), batch_size=4, num_workers=workers)))
    assert torch.equal(g.d4_code, pictures[:, 0].long())
    assert torch.equal(torch.utils.data._utils.pin_memory.pin_memory([g])[0].d4_code, g.d4_code)
    assert len(pinned) == 2
