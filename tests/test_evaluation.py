import csv
import io
import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from torch import Tensor, nn

from ser_fast.data.loader import Batch, make_loader
from ser_fast.data.sources import open_dataset
from ser_fast.evaluation import equivariance, knn
from ser_fast.evaluation.controls import AveragedOverD4
from ser_fast.evaluation.elements import D4_NAMES, default_elements, parse_elements
from ser_fast.evaluation.equivariance import plot, print_table
from ser_fast.evaluation.features import embed, evaluating, spread_images
from ser_fast.evaluation.knn import knn_accuracy
from ser_fast.evaluation.protocol import open_encoder, open_encoders, random_control, with_controls
from ser_fast.evaluation.tables import write_table
from ser_fast.evaluation.token_errors import EmbeddingRecord, LayerRecord, embedding_errors, equivariance_errors
from ser_fast.lattice import LatticeMap
from ser_fast.ops.group_action import group_action
from ser_fast.training.config import TrainConfig, to_json
from ser_fast.views.pixels import IMAGENET_MEAN, IMAGENET_STD
from ser_fast.vit import Encoded, SplitViT, save_split_vit

VIT, TINY = "vit_tiny_patch16_224", {"img_size": 64, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 2}

# ---------------------------------------------------------------- features


def batches(*sizes: int) -> list[Batch]:
    return [
        Batch(
            torch.randint(256, (n, 3, 8, 8), dtype=torch.uint8),
            aspects=torch.ones(n),
            labels=torch.arange(n) + 100 * i,
            indices=torch.arange(n),
            skipped=[],
        )
        for i, n in enumerate(sizes)
    ]


class DropoutMean(nn.Module):
    """The mean colour, if dropout is off."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout, self.frozen = nn.Dropout(0.9), nn.BatchNorm1d(3).eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.dropout(images).mean((2, 3)).double()


def test_embed_gives_all_images_in_order_without_dropout() -> None:
    loader = batches(5, 0, 2)
    embeddings, labels = embed(DropoutMean(), loader, "cpu")
    pixels = torch.cat([batch.images for batch in loader]).double() / 255
    expected = (pixels.mean((2, 3)) - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    torch.testing.assert_close(embeddings, expected.float(), rtol=0, atol=1e-5)
    assert embeddings.dtype == torch.float32
    assert labels.tolist() == [0, 1, 2, 3, 4, 200, 201]


def test_spread_images_covers_the_dataset_and_leaves_unreadable_files_out(tmp_path: Path) -> None:
    for i in range(7):
        Image.new("RGB", (8, 8), (10 * i, 0, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / "3.png").write_bytes(b"no image")
    dataset = open_dataset(f"folder:{tmp_path}", train=True, image_size=8)
    assert spread_images(dataset, 3)[:, 0, 0, 0].tolist() == [0, 60]  # the middle one is unreadable
    assert spread_images(dataset, 100)[:, 0, 0, 0].tolist() == [0, 10, 20, 40, 50, 60]
    with pytest.raises(ValueError, match="images: got 0"):
        spread_images(dataset, 0)


def test_evaluating_restores_the_mode_of_every_submodule_and_leaves_features_to_train_on() -> None:
    model = DropoutMean().train()
    model.frozen.eval()
    with evaluating(model):
        features = model(torch.rand(2, 3, 8, 8))
    assert (model.training, model.dropout.training, model.frozen.training) == (True, True, False)
    probe = nn.Linear(3, 1).double()
    probe(features).sum().backward()  # tensors of inference mode would raise here
    assert probe.weight.grad is not None


def test_modes_are_restored_after_an_error() -> None:
    model = DropoutMean()
    with pytest.raises(KeyError), evaluating(model):
        raise KeyError
    assert model.dropout.training


@pytest.mark.parametrize("loader", [[], batches(0)])
def test_embed_needs_images(loader: list[Batch]) -> None:
    with pytest.raises(ValueError, match="loader"):
        embed(DropoutMean(), loader, "cpu")


# ---------------------------------------------------------------- kNN


def brute_force_knn(train: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor, k: int, t: float) -> float:
    correct = 0
    for query, label in zip(test, test_labels.tolist(), strict=True):
        cosines = sorted(
            ((float(F.cosine_similarity(query, row, dim=0)), y) for row, y in zip(train, labels.tolist(), strict=True)),
            reverse=True,
        )
        votes: dict[int, float] = {}
        for cosine, y in cosines[:k]:
            votes[y] = votes.get(y, 0) + math.exp(cosine / t)
        correct += max(votes, key=lambda y: votes[y]) == label
    return correct / len(test)


@pytest.mark.parametrize("similarities", [knn.ENTRIES, 100, 1])  # one chunk; 3 rows each; 1 row each
def test_knn_is_the_brute_force_vote(similarities: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knn, "ENTRIES", similarities)
    centres = torch.randn(4, 6)
    labels, test_labels = torch.randint(4, (33,)), torch.randint(4, (20,))
    train = centres[labels] + 1.5 * torch.randn(33, 6)
    test = 7 * centres[test_labels] + 10 * torch.randn(20, 6)
    ks = [1, 5, 33]
    expected = {k: brute_force_knn(train, labels, test, test_labels, k, 0.07) for k in ks}
    assert knn_accuracy(train, labels, test, test_labels, k=ks) == pytest.approx(expected)
    assert len(set(expected.values())) > 1
    assert all(0.3 < accuracy < 1 for accuracy in expected.values())


@pytest.mark.parametrize(("temperature", "winner"), [(0.001, 1), (0.07, 1), (10.0, 0)])
def test_temperature_weighs_one_near_neighbour_against_two_far_ones(temperature: float, winner: int) -> None:
    # Cosines 1, 1/2, 1/2: exp(1 / T) against 2 exp(1 / 2T), even at T = 1 / (2 ln 2) = 0.72.
    train, labels = torch.tensor([[2.0, 0.0], [0.5, 3**0.5 / 2], [0.5, -(3**0.5) / 2]]), torch.tensor([1, 0, 0])
    query = torch.tensor([[5.0, 0.0]])
    accuracy = knn_accuracy(train, labels, query, torch.tensor([winner]), k=3, temperature=temperature)
    assert accuracy == {3: 1.0}


def test_knn_counts_a_class_it_never_saw_as_wrong() -> None:
    train, test = torch.eye(2), torch.eye(2)
    assert knn_accuracy(train, torch.tensor([0, 1]), test, torch.tensor([0, 7]), k=1) == {1: 0.5}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 6}, "k: got 6, takes 1 to 5"),
        ({"k": [1, 0]}, r"k: got \[1, 0\]"),
        ({"k": []}, "k: got"),
        ({"temperature": 0.0}, "temperature"),
        ({"train_features": torch.full((5, 2), math.nan)}, "train_features: got NaN or Inf"),
        ({"train_features": torch.zeros(5, 2).long()}, "train_features: got torch.int64"),
        ({"test_features": torch.zeros(3, 4)}, "test_features: got 4 channels"),
        ({"test_features": torch.zeros(0, 2), "test_labels": torch.zeros(0).long()}, "test_features"),
        ({"train_labels": torch.zeros(4).long()}, "train_labels"),
        ({"test_labels": torch.zeros(3)}, "test_labels: got torch.float32"),
        ({"test_labels": torch.full((3,), -1)}, "test_labels: got -1"),
    ],
)
def test_knn_rejects(change: dict[str, object], message: str) -> None:
    arguments = {
        "train_features": torch.randn(5, 2),
        "train_labels": torch.zeros(5).long(),
        "test_features": torch.randn(3, 2),
        "test_labels": torch.zeros(3).long(),
        "k": 2,
    }
    with pytest.raises(ValueError, match=message):
        knn_accuracy(**{**arguments, **change})


# ---------------------------------------------------------------- equivariance


class Encoder(nn.Module):
    """Layers made of functions of the mean pixels of each 4 x 4 patch, (B, H, W, 3)."""

    patch_size = (4, 4)

    def __init__(self, *layers: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layers = layers

    def layer_maps(self, images: Tensor) -> list[Tensor]:
        patches = F.avg_pool2d(images, 4).permute(0, 2, 3, 1)
        return [layer(patches) for layer in self.layers]


class Scripted(nn.Module):
    """Gives these maps in turn, whatever the images."""

    patch_size = (4, 4)

    def __init__(self, *maps: list) -> None:
        super().__init__()
        self.maps = cycle([torch.tensor(tokens, dtype=torch.float32) for tokens in maps])

    def layer_maps(self, images: Tensor) -> list[Tensor]:
        return [next(self.maps)]


def patch_mean(patches: Tensor) -> Tensor:
    return patches


def image_mean(patches: Tensor) -> Tensor:
    return patches.mean((1, 2), keepdim=True).expand_as(patches)


def constant(patches: Tensor) -> Tensor:
    return torch.full_like(patches, 0.1)


def position(patches: Tensor) -> Tensor:
    """A fixed random token for each place, plus a trace of the image."""
    shape = patches.shape[1:3]
    fixed = torch.randn(*shape, 64, generator=torch.Generator().manual_seed(shape[0] * 100 + shape[1]))
    return fixed + 1e-3 * patches.mean(-1, keepdim=True)


def shuffled(patches: Tensor) -> Tensor:
    """Tokens in another random order for each image."""
    order = torch.rand(patches.shape[0], patches.shape[1] * patches.shape[2]).argsort(-1)
    return torch.stack([x.flatten(0, 1)[i].view_as(x) for x, i in zip(patches, order, strict=True)])


BEYOND = LatticeMap.affine((8, 8), torch.eye(2), torch.tensor([9.0, 9.0]))  # shows nothing of the image


def noise(n: int, height: int = 32, width: int = 32) -> Tensor:
    return torch.randint(256, (n, 3, height, width), dtype=torch.uint8)


def smooth(n: int) -> Tensor:
    """Images of low frequencies only, 32 x 32."""
    return (F.interpolate(torch.rand(n, 3, 4, 4), (32, 32), mode="bicubic").clamp(0, 1) * 255).byte()


def of_group(records: list[LayerRecord], group: str) -> list[LayerRecord]:
    chosen = [record for record in records if record.group == group]
    assert chosen
    return chosen


def test_default_elements_are_d4_and_scales_in_whole_tokens() -> None:
    elements = default_elements((14, 14))
    assert list(elements)[8:] == ["12x12", "16x16", "16x12", "12x16"]
    x = torch.arange(6).view(2, 3)
    turned = {name: g for name, g in default_elements((2, 3)).items() if len(name) > 3}
    expected = {
        "identity": x,
        "rot90": x.rot90(1),
        "rot180": x.rot90(2),
        "rot270": x.rot90(3),
        "hflip": x.flip(1),
        "transpose": x.T,
        "vflip": x.flip(0),
        "antitranspose": x.rot90(2).T,
    }
    assert list(turned) == list(expected)
    for name, g in turned.items():
        assert torch.equal(group_action(x.view(1, 2, 3, 1).float(), g)[0, :, :, 0].long(), expected[name]), name


@pytest.mark.parametrize("images", [noise(3), noise(3, 24, 40)], ids=["square", "non-square"])
def test_an_equivariant_model_has_no_error_under_d4(images: Tensor) -> None:
    records = equivariance_errors(Encoder(patch_mean), images, batch_size=2)
    for record in of_group(records, "D4"):
        assert record.relative_error < 1e-6
        assert record.aligned_cosine == pytest.approx(1, abs=1e-9)
        assert record.retrieval == 1


def test_an_equivariant_model_has_a_small_error_under_scales() -> None:
    for record in of_group(equivariance_errors(Encoder(patch_mean), smooth(6)), "resampled"):
        assert 0 < record.relative_error < 0.1
        assert 0.99 < record.aligned_cosine < 1
        assert record.retrieval > 0.9


def test_the_identity_has_exactly_no_error() -> None:
    # Two tokens and many layers: the mean of more tokens would hide a rounded cosine.
    layers = [partial(torch.mul, other=math.sqrt(i)) for i in range(1, 20)]
    records = equivariance_errors(Encoder(*layers), noise(1, 4, 8))
    for record in of_group(records, "identity"):
        assert (record.relative_error, record.aligned_cosine, record.retrieval) == (0, 1, 1)


FLIP = (LatticeMap.hflip((1, 2)), [[3, 0], [1, 2]], [])
SHIFT = (LatticeMap.crop((1, 3), (0, 1, 1, 3), (1, 3)), [[9, 9], [1, 2], [3, 0]], [[50, -7]])


@pytest.mark.parametrize(("g", "before", "invalid"), [FLIP, SHIFT], ids=["flip", "shift"])
@pytest.mark.parametrize(
    ("after", "error", "cosine", "retrieval"),
    [
        ([[1, 0], [3, 0]], 2**0.5, 0.5**0.5, 1),
        ([[3, 0], [1, 0]], 6**0.5, -(0.5**0.5), 0),
        ([[1, 2], [3, 0]], 0, 1, 1),
    ],
)
def test_by_hand(
    g: LatticeMap, before: list, invalid: list, after: list, error: float, cosine: float, retrieval: float
) -> None:
    # The valid tokens of rho(g) f(x) are (1, 2), (3, 0): less their mean (-1, 1), (1, -1).
    # Those of f(gx) are, in the first case, (1, 0), (3, 0): less their mean (-1, 0), (1, 0), of variance 2.
    # Their difference is (0, 2), (0, 0): error^2 is 4 / 2, each cosine 1 / sqrt 2.
    model = Scripted([[before]], [[after + invalid]])
    (record,) = equivariance_errors(model, noise(1, 4, 4 * len(before)), elements={"g": g})
    assert record.relative_error == pytest.approx(error, abs=1e-12)
    assert record.aligned_cosine == pytest.approx(cosine, abs=1e-12)
    assert (record.layer, record.element, record.images) == (1, "g", 1)
    assert (record.retrieval, record.chance) == (retrieval, 0.5)


def test_ranks_by_hand() -> None:
    # Tokens on a half circle, at 0, 20, ... 120 degrees, none moved; f(gx) has them at other angles. Centring is undone
    # by a mirrored copy of each token, 180 degrees away and so last in rank.
    def on_circle(*degrees: float) -> list:
        angles = torch.deg2rad(torch.tensor([*degrees, *(angle + 180 for angle in degrees)]))
        return torch.stack([angles.cos(), angles.sin()], -1)[None].tolist()

    before = on_circle(0, 20, 40, 60, 80, 100, 120)
    after = on_circle(1, 41, 40, 60, 80, 100, 1)
    # Ranks: 1; of 20 degrees, of which 40 and 60 are nearer to 41, by 2 degrees: 3; 1, 1, 1, 1; of 120 degrees, nearer
    # to 1 are all six others, and -60, -80 and -100 (the copies of 120, 100 and 80), as 1 + 119 > 101: 10.
    model = Scripted([before], [after])
    (record,) = equivariance_errors(model, noise(1, 4, 56), elements={"g": LatticeMap.identity((1, 14))})
    assert record.retrieval == pytest.approx(5 / 7)
    assert record.hit5 == pytest.approx(6 / 7)
    assert record.mrr == pytest.approx((5 + 1 / 3 + 1 / 10) / 7)
    assert record.chance_hit5 == pytest.approx(5 / 14)
    assert record.chance_mrr == pytest.approx(sum(1 / rank for rank in range(1, 15)) / 14)


def test_tokens_alike_share_their_ranks() -> None:
    # Two tokens of each kind: the ranks 1 and 2 are shared, hit@1 is a half and 1 / rank 3/4 on average.
    maps = [[[[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]]]]
    (record,) = equivariance_errors(Scripted(maps), noise(1, 4, 16), elements={"g": LatticeMap.identity((1, 4))})
    assert (record.retrieval, record.hit5) == (0.5, 1)
    assert record.mrr == pytest.approx(0.75)
    assert record.chance_hit5 == 1


def test_the_mean_token_is_that_of_all_batches() -> None:
    images, model = noise(7), Encoder(patch_mean, image_mean, position)
    images[:4] //= 4  # batches of unlike means
    at_once = equivariance_errors(model, images)
    for whole, parts in zip(at_once, equivariance_errors(model, images, batch_size=3), strict=True):
        assert parts.relative_error == pytest.approx(whole.relative_error, rel=1e-6, abs=1e-6)
        assert parts.aligned_cosine == pytest.approx(whole.aligned_cosine, rel=1e-6)
        assert (parts.element, parts.layer, parts.images) == (whole.element, whole.layer, 7)


@pytest.mark.parametrize("layer", [position, shuffled])
def test_a_model_that_ignores_where_things_are_is_no_better_than_the_mean_token(layer: Callable) -> None:
    for record in equivariance_errors(Encoder(layer), noise(8)):
        if record.element != "identity":
            assert record.relative_error > 0.95
            assert abs(record.aligned_cosine) < 0.3


def test_shuffled_tokens_are_retrieved_by_chance() -> None:
    records = of_group(equivariance_errors(Encoder(shuffled), noise(32)), "D4")
    tokens = len(records) * 32 * 64
    assert all(record.chance == 1 / 64 for record in records)
    deviation = math.sqrt(1 / 64 * tokens) / tokens
    assert sum(r.retrieval for r in records) / len(records) == pytest.approx(1 / 64, abs=4 * deviation)


def test_a_map_without_places_fools_error_and_cosine_but_not_retrieval() -> None:
    for record in of_group(equivariance_errors(Encoder(image_mean), noise(4)), "D4"):
        assert record.relative_error < 1e-4
        assert record.aligned_cosine > 0.999
        assert record.retrieval == pytest.approx(record.chance) == pytest.approx(1 / 64)
        assert record.hit5 == pytest.approx(record.chance_hit5) == pytest.approx(5 / 64)
        assert record.mrr == pytest.approx(record.chance_mrr) == pytest.approx(sum(1 / r for r in range(1, 65)) / 64)


def test_a_constant_map_has_no_measures() -> None:
    for record in equivariance_errors(Encoder(constant, torch.zeros_like), noise(3)):
        assert math.isnan(record.relative_error)
        assert math.isnan(record.aligned_cosine)
        assert math.isnan(record.retrieval)
        assert math.isnan(record.hit5)
        assert math.isnan(record.mrr)


def test_tokens_from_outside_the_image_are_left_out() -> None:
    # Up by half the image: the lower half of the result comes from outside, where zero pixels aren't zero tokens.
    shift = LatticeMap.crop((8, 8), (4, 0, 8, 8), (8, 8))
    (record,) = equivariance_errors(Encoder(patch_mean), noise(2), elements={"shift": shift}, padding="zeros")
    assert record.relative_error < 1e-6
    assert (record.group, record.valid_share, record.chance) == ("resampled", 0.5, 1 / 32)


def test_interpolation_reaches_pixels_and_tokens() -> None:
    # Images of one colour a patch: nearest neighbours copy pixels and tokens alike, bicubic blurs them differently.
    images = noise(2, 8, 8).repeat_interleave(4, 2).repeat_interleave(4, 3)
    elements = {"16x16": LatticeMap.resize((8, 8), (16, 16))}
    nearest, bicubic = (
        equivariance_errors(Encoder(patch_mean), images, elements=elements, interpolation=name)[0].relative_error
        for name in ("nearest", "bicubic")
    )
    assert nearest < 1e-6
    assert bicubic > 0.01


@pytest.mark.parametrize(
    ("images", "elements", "error", "message"),
    [
        (noise(1).float(), None, TypeError, "images: got torch.float32"),
        (noise(1)[0], None, ValueError, r"images: got \(3, 32, 32\)"),
        (noise(0), None, ValueError, r"images: got \(0, 3"),
        (noise(1, 30, 32), None, ValueError, r"multiples of the patch size \(4, 4\)"),
        (noise(1), {"a": LatticeMap.hflip((4, 4))}, ValueError, "elements: 'a' is 1 maps of a"),
        (noise(1), {"a": LatticeMap.hflip((8, 8), batch=2)}, ValueError, "elements: 'a' is 2 maps"),
        (noise(1), {"a": BEYOND}, ValueError, "'a' leaves no valid token"),
    ],
)
def test_equivariance_rejects(images: Tensor, elements: dict | None, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        equivariance_errors(Encoder(patch_mean), images, elements=elements)


# ---------------------------------------------------------------- the control, and a whole SplitViT


@pytest.mark.parametrize("sincos", [True, False])
def test_random_control_is_the_architecture_with_other_weights(sincos: bool) -> None:
    torch.manual_seed(7)  # not the control's
    model = SplitViT(VIT, 1, **TINY)
    if sincos:
        model.fix_sincos_positions()
    state = torch.get_rng_state()
    control, again, other = random_control(model), random_control(model), random_control(model, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert (control.split, list(control.state_dict())) == (1, list(model.state_dict()))
    for name in ("patch_embed.proj.weight", "blocks.1.attn.qkv.weight", "pos_embed"):
        weights = [m.state_dict()[name] for m in (model, control, again, other)]
        assert weights[0].shape == weights[1].shape
        assert torch.equal(weights[1], weights[2])
        fixed = sincos and name == "pos_embed"
        assert torch.equal(weights[0], weights[1]) == torch.equal(weights[1], weights[3]) == fixed


def test_random_control_needs_a_recipe() -> None:
    with pytest.raises(ValueError, match="model: wraps a timm instance"):
        random_control(SplitViT(timm.create_model(VIT, num_classes=0, dynamic_img_size=True, **TINY), 1))


def test_a_split_vit_on_photographs() -> None:
    images = next(
        iter(make_loader(open_dataset("photos", train=False, image_size=64), batch_size=8, train=True))
    ).images
    torch.manual_seed(7)
    model = SplitViT(VIT, 1, **TINY)
    records = {name: equivariance_errors(m, images) for name, m in [("a", model), ("b", random_control(model))]}
    assert model.training
    for of_model in records.values():
        assert [r.layer for r in of_model] == [1, 2] * 12
        assert all(0 < r.relative_error < 2 and 0 < r.aligned_cosine < 1 for r in of_model if r.group != "identity")
        assert {(r.relative_error, r.aligned_cosine) for r in of_group(of_model, "identity")} == {(0, 1)}
    assert records["a"] != records["b"]


# ---------------------------------------------------------------- what is written and shown


def some_records(layers: int) -> dict[str, list[LayerRecord]]:
    elements = {"identity": "identity", "rot90": "D4", "hflip": "D4", "7x9": "resampled"}
    return {
        name: [
            LayerRecord(
                layer,
                element,
                group,
                0.1 * layer + 0.02 * i + offset,
                0.5,
                math.nan,
                1 / 64,
                1.0,
                10,
                0.75,
                0.25,
                5 / 64,
                0.07,
                0.5,
            )
            for i, (element, group) in enumerate(elements.items())
            for layer in range(1, layers + 1)
        ]
        for name, offset in [("checkpoint", 0.0), ("random", 0.4)]
    }


def test_the_csv_holds_every_record_in_full(tmp_path: Path) -> None:
    records = some_records(3)
    write_table(records, tmp_path / "table.csv")
    with open(tmp_path / "table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    expected = [(name, record) for name, of_model in records.items() for record in of_model]
    for row, (name, record) in zip(rows, expected, strict=True):
        assert (row["model"], row["element"], row["group"]) == (name, record.element, record.group)
        assert (int(row["layer"]), int(row["images"]), float(row["chance"])) == (record.layer, 10, 1 / 64)
        assert float(row["relative_error"]) == record.relative_error
        assert math.isnan(float(row["retrieval"]))
        assert [float(row[name]) for name in ("hit5", "mrr", "chance_hit5", "chance_mrr")] == [0.75, 0.25, 5 / 64, 0.07]


def test_the_figure_shows_the_split_and_every_model(tmp_path: Path) -> None:
    records = some_records(3)
    figures = []
    for i, (shown, split) in enumerate([(records, 2), (records, None), ({"checkpoint": records["checkpoint"]}, 2)]):
        plot(shown, tmp_path / f"{i}.png", split=split)
        figures.append((tmp_path / f"{i}.png").read_bytes())
        assert figures[-1].startswith(b"\x89PNG")
    assert len(set(figures)) == 3


def printed(records: dict[str, list[LayerRecord]]) -> list[str]:
    out = io.StringIO()
    print_table(records, Console(file=out, width=80))
    return [line.rstrip() for line in out.getvalue().splitlines()]


def test_the_table_shows_elements_by_layer_and_their_means() -> None:
    lines = [" ".join(line.split()) for line in printed(some_records(3))]
    error = lines[: lines.index("Aligned cosine (1: equivariant)")]
    assert "1 2 3" in error
    checkpoint, random = error.index("checkpoint"), error.index("random")
    assert checkpoint < error.index("rot90 0.12 0.22 0.32") < random < error.index("rot90 0.52 0.62 0.72")
    assert "mean D4 0.13 0.23 0.33" in error  # of rot90 0.12 and hflip 0.14
    assert "mean resampled 0.16 0.26 0.36" in error
    assert "7x9 nan nan nan" in lines
    assert "Token retrieval, hit@5 (1: equivariant)" in lines
    assert lines.count("a guess, mean 0.02 0.02 0.02") == 2  # hit@1 of both models: 1 / 64
    assert lines.count("a guess, mean 0.08 0.08 0.08") == 2
    assert lines.count("a guess, mean 0.07 0.07 0.07") == 2
    assert lines.count("7x9 0.75 0.75 0.75") == 2


def test_the_table_of_a_deep_model_stays_within_80_columns() -> None:
    lines = printed(some_records(24))
    assert not any("…" in line for line in lines)
    assert sum(line.split() == [str(layer) for layer in range(13, 25)] for line in lines) == 6


@pytest.mark.parametrize("source", ["python:os:getcwd", "hf:somebody/pictures"])
def test_a_runs_folder_does_not_choose_code_to_run(source: str, tmp_path: Path) -> None:
    save_split_vit(tmp_path / "encoder.safetensors", SplitViT(VIT, 1, **TINY))
    (tmp_path / "config.json").write_text(json.dumps(to_json(replace(TrainConfig(), data=source))))
    with pytest.raises(ValueError, match=rf"data: .*config\.json names '{source}'"):
        open_encoder(tmp_path, device="cpu")
    assert open_encoder(tmp_path, source, device="cpu").data == source


# ---------------------------------------------------------------- any map, any encoder, controls that are known


def tiny_vit(seed: int = 0, **changes: int) -> SplitViT:
    torch.manual_seed(seed)
    return SplitViT(VIT, 1, **(TINY | changes)).eval()


def noise_images(count: int = 6, side: int = 64) -> Tensor:
    return torch.randint(256, (count, 3, side, side), dtype=torch.uint8)


def test_elements_by_name() -> None:
    size = (6, 8)
    found = parse_elements(
        ["d4", "scales", "angle:90", "shift:1,-2", "crop:0,0.25,0.5,0.5", "affine:1,0,0,1,0.5,0", "scale:0.7"], size
    )
    assert list(found)[:8] == list(D4_NAMES)
    assert found["angle:90"].linear.tolist() == LatticeMap.rotate(size, 90).linear.tolist()
    assert found["shift:1,-2"].offset.tolist() == [[1, -2]]
    crop = LatticeMap.crop(size, (0, 2, 3, 4), size)
    torch.testing.assert_close(found["crop:0,0.25,0.5,0.5"].offset, crop.offset)
    torch.testing.assert_close(found["crop:0,0.25,0.5,0.5"].linear, crop.linear)
    assert found["affine:1,0,0,1,0.5,0"].offset.tolist() == [[0.5, 0]]
    assert found["scale:0.7"].size_out == (5, 7)


@pytest.mark.parametrize(
    "name", ["rot45", "angle:", "angle:x", "angle:1,2", "scale:-1", "crop:0,0,1", "affine:1,2,2,4", "shift:nan,0", ""]
)
def test_elements_that_are_none_are_named(name: str) -> None:
    with pytest.raises(ValueError, match="elements: "):
        parse_elements([name], (4, 4))


def test_an_encoder_averaged_over_d4_has_no_error_there_and_some_on_scales() -> None:
    model = AveragedOverD4(tiny_vit())
    records = equivariance_errors(model, noise_images())
    d4 = [record for record in records if record.group == "D4"]
    assert len(d4) == 7 * 2
    assert max(max(record.relative_error, record.inverse_error) for record in d4) < 1e-4
    assert min(record.retrieval for record in d4) == 1
    assert min(record.relative_error for record in records if record.group == "resampled") > 0.05
    # The encoder itself has an error: the average is what takes it away.
    plain = equivariance_errors(model.model, noise_images())
    assert min(record.relative_error for record in plain if record.group == "D4") > 0.1


def test_the_other_way_by_hand() -> None:
    before, after = [[[0.0], [1.0]], [[2.0], [5.0]]], [[[1.0], [5.0]], [[0.0], [4.0]]]  # (2, 2, 1)
    model = Scripted([before], [after])
    images = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    (record,) = equivariance_errors(model, images, elements={"rot90": LatticeMap.rot90((2, 2), 1)})
    back = torch.rot90(torch.tensor(after), -1)
    expected = torch.tensor(before)
    error = ((back - expected).square().sum() / (expected - expected.mean()).square().sum()).sqrt()
    assert record.inverse_error == pytest.approx(error.item(), rel=1e-6)
    assert record.inverse_error != pytest.approx(record.relative_error, rel=1e-3)


def test_a_map_that_cannot_go_back_has_no_error_that_way() -> None:
    zoom = {"zoom": LatticeMap.affine((2, 2), 0.1 * torch.eye(2))}  # gx shows a fifth of a token
    images = torch.randint(256, (3, 3, 8, 8), dtype=torch.uint8)
    (record,) = equivariance_errors(Encoder(patch_mean), images, elements=zoom)
    assert math.isnan(record.inverse_error)
    assert record.relative_error > 0


class Colors(nn.Module):
    """[CLS] is the mean color, patch tokens those of the patches plus where they are."""

    patch_size, depth = (4, 4), 1

    def __init__(self, cls: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.cls, self.norm_final = cls, nn.Identity()

    def encode(self, images: Tensor, layers: tuple[int, ...]) -> Encoded:
        tokens = F.avg_pool2d(images, 4).permute(0, 2, 3, 1)
        return Encoded(None, {1: tokens}, {1: self.cls(images)})


def test_embeddings_of_known_encoders() -> None:
    elements = {"rot90": LatticeMap.rot90((4, 4), 1), "angle": LatticeMap.rotate((4, 4), 30)}

    def found(cls: Callable[[Tensor], Tensor]) -> dict[tuple[str, str], EmbeddingRecord]:
        model: Any = Colors(cls)
        records = embedding_errors(model, noise_images(9, 16), elements=elements)
        return {(record.embedding, record.element): record for record in records}

    invariant = found(lambda images: images.mean((2, 3)))
    for embedding in ("cls", "mean"):
        exact = invariant[embedding, "rot90"]
        assert (exact.relative_error, exact.retrieval) == (pytest.approx(0, abs=1e-5), 1)
        assert invariant[embedding, "angle"].relative_error > 0.05
        assert exact.chance == 1 / 9
    constant = found(lambda images: torch.ones(len(images), 3))["cls", "rot90"]
    assert math.isnan(constant.relative_error)
    corner = found(lambda images: images[:, :, 0, 0])["cls", "rot90"]
    assert corner.relative_error > 0.5
    assert corner.retrieval < 0.8


def test_several_checkpoints_stand_side_by_side(tmp_path: Path) -> None:
    for part in ("train", "val"):
        for number, name in enumerate("ab"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(4):
                color = (200 * number, 40 * i, 90)
                Image.new("RGB", (64, 64), color).save(tmp_path / part / name / f"{i}.png")
    models = {"one": tiny_vit(1), "two": tiny_vit(2), "deep": tiny_vit(3, depth=3, patch_size=16)}
    result = equivariance.evaluate(models, f"folder:{tmp_path}", images=8, elements=["rot90", "angle:20"], pairs=1)
    assert list(result.records) == [
        *models, "random", "random (deep)", "patch means (8 x 8)", "patch means (4 x 4)"
    ]  # fmt: skip
    assert set(result.accuracy) == {*models, "random", "random (deep)"}
    assert all(0 <= accuracy <= 1 for accuracy in result.accuracy.values())
    written = {path.name for path in result.write(tmp_path / "out")}
    assert written == {
        *("equivariance.csv", "embedding.csv", "prediction.csv", "equivariance.png"),
        *("error_accuracy.csv", "error_accuracy.png"),
    }
    text = io.StringIO()
    result.print(Console(file=text, width=100))
    assert "deep: kNN top-1" in text.getvalue()
    ranked = knn.evaluate(models, f"folder:{tmp_path}", k=(1,))
    assert [labels["model"] for labels, _ in ranked.rows] == [*models, "random", "random (deep)"]


def test_models_need_names_of_their_own() -> None:
    with pytest.raises(ValueError, match="models: got none"):
        with_controls({})
    with pytest.raises(ValueError, match="models: got the name 'random', which is that of a random control"):
        with_controls({"random": tiny_vit()})


def test_checkpoints_are_named_after_their_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_vit()
    paths = [tmp_path / "x" / "run" / "encoder.safetensors", tmp_path / "y" / "run" / "encoder.safetensors"]
    for path in [*paths, tmp_path / "other.safetensors"]:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_split_vit(path, model)
    models, data, folder = open_encoders([str(paths[0].parent), str(tmp_path / "other.safetensors")], device="cpu")
    assert isinstance(models, dict)
    assert list(models) == ["run", "other"]
    assert (data, folder) == ("photos", Path("runs/comparison"))
    models, _, _ = open_encoders([str(path.parent) for path in paths], device="cpu")
    assert isinstance(models, dict)
    assert list(models) == [str(path.parent) for path in paths]
    with pytest.raises(ValueError, match="takes each once"):
        open_encoders([str(paths[0]), str(paths[0])], device="cpu")
    single, _, folder = open_encoders([paths[0]], device="cpu")
    assert isinstance(single, SplitViT)
    assert folder == paths[0].parent

    create = timm.create_model

    def offline(name: str, pretrained: bool = False, **options: Any) -> nn.Module:
        if pretrained:
            raise OSError("no route to the hub")
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ValueError, match=r"pretrained: the weights of vit_tiny_patch16_224 can't be had: .*no route"):
        open_encoder("timm:vit_tiny_patch16_224", device="cpu")


def test_checkpoints_of_other_data_need_a_source(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        save_split_vit(tmp_path / name / "encoder.safetensors", tiny_vit())
        config = to_json(TrainConfig(out=tmp_path / name, data=f"folder:{name}"))
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    paths = [tmp_path / "one", tmp_path / "two"]
    with pytest.raises(ValueError, match="data: the checkpoints were trained on folder:one, folder:two; name one"):
        open_encoders(paths, device="cpu")
    assert open_encoders(paths, "photos", device="cpu")[1] == "photos"
