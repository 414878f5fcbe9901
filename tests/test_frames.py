"""Which part of a map's output shows its picture: point by point through every step, and against filled pixels."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ser_fast.addons.base import LayerView
from ser_fast.addons.ser import SER
from ser_fast.lattice import LatticeMap, positions
from ser_fast.loss import SERLoss
from ser_fast.ops.group_action import group_action
from ser_fast.views.pixels import transform_images
from ser_fast.views.samplers import Affine, Crop

TOKENS, PATCH = 9, 5  # odd patches have a pixel at their center
SIDE = TOKENS * PATCH


def boxes(batch: int) -> Tensor:
    """Of a SIDE x SIDE picture; some leave it."""
    return torch.cat([20 * torch.rand(batch, 2) - 5, 15 + 25 * torch.rand(batch, 2)], 1)


def angles(batch: int) -> Tensor:
    return 80 * torch.rand(batch) - 40


def some_steps(batch: int, size: tuple[int, int] = (SIDE, SIDE)) -> list[LatticeMap]:
    """A pipeline, first step first: it rotates, crops, mirrors, stretches, rotates and shifts."""
    shift = torch.eye(2).expand(batch, 2, 2), 10 * torch.rand(batch, 2) - 5
    return [
        LatticeMap.rotate(size, angles(batch)),
        LatticeMap.crop(size, boxes(batch), size),
        LatticeMap.d4(size, torch.randint(8, (batch,))),
        LatticeMap.resize(size, (40, 50), batch=batch),
        LatticeMap.rotate((40, 50), angles(batch)),
        LatticeMap.affine((40, 50), *shift, (SIDE, SIDE)),
    ]


def compose(steps: Sequence[LatticeMap]) -> LatticeMap:
    composed = steps[0]
    for step in steps[1:]:
        composed = step @ composed
    return composed


def depth(size: tuple[int, int], y: Tensor, x: Tensor) -> Tensor:
    """How far points lie within a lattice, in tokens; below 0 outside."""
    return torch.stack([y, size[0] - y, x, size[1] - x]).amin(0)


def depth_in_all(steps: Sequence[LatticeMap], y: Tensor, x: Tensor) -> Tensor:
    """(B, N) the least depth of points (B, N) of the last lattice in the lattices on the way back, step by step."""
    depths = []
    for step in reversed(steps):
        u = torch.stack([y - step.size_out[0] / 2, x - step.size_out[1] / 2], -1)
        y, x = ((u @ step.linear.mT + step.offset[:, None])[..., i] + step.size_in[i] / 2 for i in (0, 1))
        depths.append(depth(step.size_in, y, x))
    return torch.stack(depths).amin(0)


def assert_seen(valid: Tensor, depth: Tensor) -> None:
    clear = depth.abs() > 1e-3  # on an edge, tolerances decide
    assert clear.float().mean() > 0.995
    assert torch.equal(valid[clear], depth[clear] > 0)


def centers(size: tuple[int, int], batch: int) -> tuple[Tensor, Tensor]:
    identity = LatticeMap.identity(size, batch=batch)
    return positions(identity.linear, identity.offset, size, size)


# ---------------------------------------------------------------- the sets of points


def test_a_composed_map_knows_every_frame_on_its_way() -> None:
    steps = some_steps(50)
    composed = compose(steps)
    assert_seen(composed.valid(), depth_in_all(steps, *centers(composed.size_out, 50)))
    assert composed.valid().float().mean() < replace(composed, frames=None).valid().float().mean() - 0.05
    for first, last in ((0, 2), (1, 4), (3, 6)):
        part = steps[first:last]
        assert_seen(compose(part).valid(), depth_in_all(part, *centers(part[-1].size_out, 50)))


def test_composition_is_associative_with_its_frames() -> None:
    a, b, c = (LatticeMap.cat(some_steps(20)[:3]) for _ in range(3))
    left, right = (a @ b) @ c, a @ (b @ c)
    for of, expected in ((left.linear, right.linear), (left.offset, right.offset), (left.frames, right.frames)):
        assert of is not None
        torch.testing.assert_close(of, expected, rtol=0, atol=1e-12)
    assert torch.equal(left.valid(), right.valid())


def test_a_token_is_valid_where_it_is_seen_in_both_views() -> None:
    steps0, steps1 = some_steps(50), some_steps(50)
    relative = LatticeMap.relative(compose(steps0), compose(steps1))
    y, x = centers(relative.size_out, 50)
    place = positions(relative.linear, relative.offset, relative.size_in, relative.size_out)
    in_view0 = depth(relative.size_in, *place)
    expected = torch.stack([depth_in_all(steps1, y, x), in_view0, depth_in_all(steps0, *place)]).amin(0)
    assert_seen(relative.valid(), expected)
    assert 0.02 < relative.valid().float().mean() < 0.9


def test_pictures_that_were_rotated_whole_have_a_frame_in_both_views() -> None:
    """Their corners are filled in each, and after one more turn they may lie within the other's frame."""
    g0, g1 = (LatticeMap.rotate((SIDE, SIDE), angle) for angle in (40.0, -50.0))
    relative = LatticeMap.relative(g0, g1)  # a quarter turn
    assert replace(relative, frames=None).valid().all()
    assert torch.equal(relative.valid(), g1.valid())


@pytest.mark.parametrize("size", [(4, 6), (5, 5)])
def test_what_fills_nothing_has_no_frame(size: tuple[int, int]) -> None:
    inside = torch.tensor([[0.0, 0.0, *size], [1, 0.5, 3, size[1] - 0.5]])
    thirds = torch.tensor([[1 / 3, 0, 2 / 3, 1]]) * torch.tensor([*size, *size])  # rounded past the edge in float32
    maps = [
        *(LatticeMap.d4(size, code) for code in range(8)),
        LatticeMap.resize(size, (3, 7)),
        LatticeMap.crop(size, inside, (3, 3)),
        LatticeMap.crop(size, thirds.double(), (3, 3)),
        LatticeMap.rotate(size, torch.tensor([0.0, 180.0])),
        LatticeMap.affine(size, torch.eye(2) / 2),
        LatticeMap.from_views(size, (8, 8), box=inside, hflip=torch.tensor([True, False])),
        Crop(turns=True)(size, 2, torch.rand(4, 23, dtype=torch.float64), 0),
    ]
    assert [g.frames for g in maps] == [None] * len(maps)
    both = maps[9].compose(maps[8].inverse()), maps[-2].on((9, 9), (4, 4))[1:], LatticeMap.cat([maps[0], maps[0]])
    assert [g.frames for g in both] == [None] * 3


@pytest.mark.parametrize(
    "g",
    [
        LatticeMap.rotate((5, 5), torch.tensor([0.0, 45.0])),
        LatticeMap.crop((5, 5), (-1.0, 0, 5, 5), (5, 5)),
        LatticeMap.affine((5, 5), torch.eye(2), torch.tensor([0.0, 0.5])),
    ],
)
def test_what_fills_keeps_the_frame_of_its_lattice(g: LatticeMap) -> None:
    assert g.frames is not None
    assert g.frames.shape == (len(g), 2, 3)
    assert torch.equal(g.valid(), replace(g, frames=None).valid())  # of one map, valid is what it was
    assert torch.equal(g.inverse().valid(), replace(g, frames=None).inverse().valid())
    mirrored = LatticeMap.hflip((5, 5)) @ g
    assert torch.equal(mirrored.valid().unflatten(1, (5, 5)), g.valid().unflatten(1, (5, 5)).flip(2))


@pytest.mark.parametrize(("outside", "expected"), [(0.0, True), (5e-5, True), (2e-4, False)])
def test_edges_of_frames_are_included(outside: float, expected: bool) -> None:
    shift = LatticeMap.affine((1, 1), torch.eye(2), torch.tensor([0.5 + outside, 0.0], dtype=torch.float64))
    back = LatticeMap.affine((1, 1), torch.eye(2), -shift.offset)  # as far the other way: within size_in again
    assert (shift @ back).offset.tolist() == [[0, 0]]
    assert (shift @ back).valid().item() is expected


# ---------------------------------------------------------------- carried along


def test_an_inverse_carries_frames_to_the_other_side() -> None:
    steps = some_steps(20)
    g = compose(steps)
    back = g.inverse()
    y, x = positions(back.linear, back.offset, back.size_in, back.size_out)  # where the picture is in the view
    assert_seen(back.valid(), torch.minimum(depth(g.size_out, y, x), depth_in_all(steps, y, x)))
    assert torch.equal(back.inverse().valid(), g.valid())


def test_frames_go_wherever_maps_go() -> None:
    g = compose(some_steps(6))
    seen = g.valid()
    assert torch.equal(g[2:5].valid(), seen[2:5])
    assert torch.equal(g[torch.tensor([5, 0])].valid(), seen[[5, 0]])
    assert torch.equal(g.to("cpu", non_blocking=True).valid(), seen)
    assert g.to("meta").frames.device.type == "meta"  # type: ignore[union-attr]
    plain, turned = LatticeMap.hflip((SIDE, SIDE)), LatticeMap.rotate((SIDE, SIDE), 30.0)  # none, and fewer
    joined = LatticeMap.stack([plain, *(g[i : i + 1] for i in range(6)), turned])
    assert torch.equal(joined.valid(), torch.cat([plain.valid(), seen, turned.valid()]))
    loaded = torch.utils.data.default_collate([g[0:1], plain])
    assert torch.equal(loaded.valid(), torch.cat([seen[:1], plain.valid()]))
    one, many = LatticeMap.rotate((SIDE, SIDE), 20.0), LatticeMap.d4((SIDE, SIDE), torch.arange(4))
    assert torch.equal((many @ one)[3:].valid(), (many[3:] @ one).valid())
    assert torch.equal((one @ many)[1:2].valid(), (one @ many[1:2]).valid())


def test_pixels_and_tokens_have_the_same_frames() -> None:
    pixels = compose(some_steps(20))
    tokens = pixels.on((3, 3), (TOKENS, TOKENS))
    middle = torch.zeros(PATCH, PATCH, dtype=torch.bool)
    middle[PATCH // 2, PATCH // 2] = True
    assert torch.equal(tokens.valid(), pixels.valid()[:, middle.repeat(TOKENS, TOKENS).flatten()])


def test_pinned_maps_pin_their_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[Tensor] = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda x: pinned.append(x) or x)
    g = LatticeMap.rotate((5, 5), 10.0)
    assert torch.equal(g.pin_memory().valid(), g.valid())
    assert len(pinned) == 3


def test_frames_compile_without_a_graph_break() -> None:
    def seen(g0: LatticeMap, g1: LatticeMap, plain: LatticeMap) -> Tensor:
        both = LatticeMap.cat([LatticeMap.relative(g0, g1), plain])
        return both.on((TOKENS, TOKENS), (TOKENS, TOKENS)).valid()

    g0, g1 = compose(some_steps(3)), compose(some_steps(3))
    plain = LatticeMap.resize(g0.size_out, g1.size_out)
    assert plain.frames is None
    assert torch.equal(torch.compile(seen, fullgraph=True, backend="aot_eager")(g0, g1, plain), seen(g0, g1, plain))


# ---------------------------------------------------------------- pixels


def filled(steps: Sequence[LatticeMap]) -> Tensor:
    """(B, h, w) what is left of a white picture, step by step, where each fills with black."""
    images = torch.ones(len(steps[0]), 1, *steps[0].size_in, dtype=torch.float64)
    for step in steps:
        images = transform_images(images, step, interpolation="bilinear", padding="zeros")
    return images[:, 0]


def pipeline(batch: int) -> list[LatticeMap]:
    """RandomResizedCrop(scale=(0.2, 1)), RandomHorizontalFlip and RandomRotation(30), as torchvision's."""
    crop = Crop()((60, 80), 1, torch.rand(batch, 23, dtype=torch.float64), 0)  # crops within the picture, and mirrors
    return [
        crop,
        LatticeMap.resize((60, 80), (SIDE, SIDE)),
        LatticeMap.rotate((SIDE, SIDE), 60 * torch.rand(batch) - 30),
    ]


def test_a_token_is_seen_where_its_middle_is_not_black() -> None:
    steps = some_steps(60)
    middle = filled(steps)[:, PATCH // 2 :: PATCH, PATCH // 2 :: PATCH].flatten(1)
    valid = compose(steps).on((1, 1), (TOKENS, TOKENS)).valid()
    assert valid.float().mean() > 0.1
    clear = (middle < 0.01) | (middle > 0.99)  # the others lie on the edge of a frame, which resampling blurs
    assert clear.float().mean() > 0.85
    assert (valid == (middle > 0.5))[clear].float().mean() > 0.999


def test_hardly_any_pair_is_half_black() -> None:
    views = [pipeline(300) for _ in range(2)]
    g0, g1 = (compose(steps) for steps in views)
    relative = LatticeMap.relative(g0, g1).on((TOKENS, TOKENS), (TOKENS, TOKENS))
    shown0, shown1 = (F.avg_pool2d(filled(steps)[:, None], PATCH)[:, 0] for steps in views)  # (B, 9, 9) shares
    moved = group_action(shown0[..., None], relative, interpolation="bilinear", backend="reference")
    least = torch.minimum(moved[..., 0], shown1).flatten(1)
    before, now = replace(relative, frames=None).valid(), relative.valid()
    half_black = [(least[valid] < 0.5 - 1e-3).float().mean() for valid in (before, now)]
    assert half_black[0] > 0.05
    assert half_black[1] < 0.003  # where two edges of a frame cross
    assert now.sum() > 0.85 * before.sum()


# ---------------------------------------------------------------- in the loss


def tokens_and_maps(batch: int = 3) -> tuple[Tensor, Tensor, LatticeMap, LatticeMap]:
    views = [pipeline(batch) for _ in range(2)]
    tokens = torch.randn(2, batch, TOKENS, TOKENS, 4, dtype=torch.float64)
    return tokens[0], tokens[1], compose(views[0]), compose(views[1])


@pytest.mark.parametrize("preset", ["paper", "released"])
def test_filled_tokens_take_no_part_in_the_loss(preset: str) -> None:
    ser = SERLoss(4, preset=preset, hidden_dim=8, out_dim=8, backend="reference").double()
    x0, x1, g0, g1 = tokens_and_maps()
    loss = ser(x0, x1, g0, g1)
    bare0, bare1 = (replace(g, frames=None) for g in (g0, g1))
    assert loss != ser(x0, x1, bare0, bare1)
    filled1 = ~g1.on((1, 1), (TOKENS, TOKENS)).valid().unflatten(1, (TOKENS, TOKENS))
    assert filled1.any()
    x1 = x1.clone().requires_grad_()
    ser(x0, x1, g0, g1).backward()
    if preset == "paper":  # one direction: view 1 stays as it is
        assert (x1.grad[filled1] == 0).all()
        assert (x1.grad[~filled1] != 0).any()
    valid = LatticeMap.relative(g0, g1).on((TOKENS, TOKENS), (TOKENS, TOKENS)).valid()
    if preset == "paper":
        torch.testing.assert_close(ser(x0, x1, bare0, bare1, mask1=valid), loss, rtol=1e-12, atol=0)


def test_an_error_of_the_map_and_a_border_that_goes_on_fill_nothing() -> None:
    u = torch.rand(3, 23, dtype=torch.float64)
    assert Affine()((SIDE, SIDE), PATCH, u, 0).frames is None
    told: list[LatticeMap] = []

    class Loss(nn.Module):
        def forward(self, tokens0: Tensor, tokens1: Tensor, *maps: LatticeMap, **masks: object) -> Tensor:
            told.extend(maps[:2])
            return tokens0.sum()

    x0, x1, g0, g1 = tokens_and_maps()
    ser = SER({1: SERLoss(4)}, noise=(0.05, 1.0))
    ser.losses["1"] = Loss()
    maps = replace(g0, frames=None), g1
    ser([LayerView({1: x}, None, g, None, "global") for x, g in zip((x0, x1), maps, strict=True)])
    assert told[0].frames is None
    assert told[1].frames is g1.frames
    assert not math.isclose(told[1].offset[0, 0].item(), g1.offset[0, 0].item(), abs_tol=1e-6)
