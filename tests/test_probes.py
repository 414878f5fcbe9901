"""Grading, kNN's ranking, cached features, linear and MLP probes, and the prediction of g."""

import csv
import os
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.text import Text
from PIL import Image
from scipy.stats import binom
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ser_fast.data.loader import make_loader
from ser_fast.data.sources import ImageDataset, open_dataset
from ser_fast.evaluation import figures, knn, linear_probe, transformations
from ser_fast.evaluation.classification import grade, rank, share_of
from ser_fast.evaluation.features import embed, embed_cached, embedder, spread_items
from ser_fast.evaluation.figures import plot_confusion
from ser_fast.evaluation.knn import knn_predictions
from ser_fast.evaluation.linear_probe import probe_scores, train_probe
from ser_fast.evaluation.tables import write_confusion, write_rows
from ser_fast.evaluation.transformations import Prediction, predict_transformations
from ser_fast.vit import SplitViT

VIT, TINY = "vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}

# ---------------------------------------------------------------- grading


def test_top_1_and_top_5_of_known_scores() -> None:
    # Image i: class c has score -|c - i|, ties to the lower class. Left out is class 5 of images 0 to 2, 0 of 3 to 5.
    scores = -(torch.arange(6.0) - torch.arange(6.0)[:, None]).abs() - 0.1 * torch.arange(6.0)
    labels = torch.tensor([0, 1, 4, 0, 5, 0])
    assert rank(scores)[0].tolist() == [0, 1, 2, 3, 4]
    graded = grade(rank(scores), labels, 6)
    assert graded.top1.value == pytest.approx(2 / 6)
    assert graded.top5.value == pytest.approx(4 / 6)
    assert graded.images == 6


def test_the_confusion_matrix_counts_truth_by_prediction() -> None:
    ranked = torch.tensor([[0], [1], [1], [2], [-1], [0]])
    labels = torch.tensor([0, 0, 0, 2, 1, 3])  # the fifth image has no prediction, class 3 was never seen
    graded = grade(ranked, labels, 3)
    assert graded.confusion.to_dense().tolist() == [[1, 2, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0]]
    assert graded.top1.value == graded.top5.value == pytest.approx(2 / 6)


@pytest.mark.parametrize("classes", [20, 21, 10_000])
def test_a_confusion_is_drawn_so_that_its_names_can_be_read(classes: int, tmp_path: Path) -> None:
    labels = torch.arange(classes)
    predicted = labels.clone()
    predicted[:3] = torch.tensor([1, 2, 2])
    labels = torch.cat([labels, torch.tensor([0, 0, 1])])
    predicted = torch.cat([predicted, torch.tensor([1, 2, 2])])
    rows = [({"model": "a", "k": k}, grade(torch.roll(predicted, k - 1)[:, None], labels, classes)) for k in (1, 2)]
    names = [f"class {number} with a name that is long" for number in range(classes)]
    texts: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "save", lambda figure, path: texts.extend(t.get_text() for t in figure.findobj(Text)))
        plot_confusion(rows, names, tmp_path / "confusion.png")
    if classes == 20:
        assert "model a, k 1" in texts
        assert "model a, k 2" in texts
        assert "class 0 with a name tha…" in texts
    else:
        assert "most confused, model a, k 1" in texts  # k 2 is right less often
        pairs = {re.sub(r"\D+", " ", text).strip() for text in texts if " as class" in text}
        assert pairs == {"0 1", "0 2", "1 2"}


def test_ten_thousand_classes_take_memory_for_the_pairs_that_occur(tmp_path: Path) -> None:
    # K^2 numbers would be 100 million, images x classes 20 million.
    classes, images, largest = 10_000, 2000, [0]

    class Watch(TorchDispatchMode):
        """The largest tensor that an operation makes, in entries."""

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            for made in tree_leaves(result):
                if isinstance(made, Tensor) and made.layout == torch.strided:
                    largest[0] = max(largest[0], made.numel())
            return result

    bound = 2**21
    with pytest.MonkeyPatch.context() as patch, Watch():
        patch.setattr(knn, "ENTRIES", bound)
        patch.setattr(linear_probe, "ENTRIES", bound)
        labels = torch.arange(images) % classes
        train = torch.randn(1000, 8)
        ranked = knn_predictions(train, labels[-1000:], torch.randn(images, 8), k=[1, 5])
        head = nn.Linear(8, classes)
        probed = probe_scores(head, torch.randn(images, 8), "cpu", rows=linear_probe._rows(classes), read=rank)
        rows = [({"model": "a", "k": k}, grade(found, labels, classes)) for k, found in {**ranked, 0: probed}.items()]
        tracemalloc.start()
        plot_confusion(rows, list(map(str, range(classes))), tmp_path / "confusion.png")
        write_confusion(rows, list(map(str, range(classes))), tmp_path / "confusion.csv")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert largest[0] <= bound
    assert peak < 64 * 2**20
    assert len((tmp_path / "confusion.csv").read_text().splitlines()) == 1 + sum(len(r.pairs()) for _, r in rows)


def test_a_class_without_a_score_is_no_prediction() -> None:
    scores = torch.tensor([[0.0, -torch.inf, 1.0]])
    assert rank(scores).tolist() == [[2, 0, -1]]


@pytest.mark.parametrize(("hits", "low", "high"), [(5, 0.2366, 0.7634), (10, 0.7225, 1.0), (0, 0.0, 0.2775)])
def test_the_interval_is_wilsons(hits: int, low: float, high: float) -> None:
    # z = 1.96, n = 10: (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)
    share = share_of(torch.arange(10) < hits)
    assert (share.value, share.low, share.high) == pytest.approx((hits / 10, low, high), abs=1e-4)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_interval_contains_the_truth_in_about_95_of_100_samples(p: float) -> None:
    count = 200
    shares = [share_of(torch.arange(count) < hits) for hits in range(count + 1)]
    covered = sum(binom.pmf(h, count, p) for h, share in enumerate(shares) if share.low <= p <= share.high)
    assert 0.93 < covered < 0.97


def test_rows_and_confusions_are_written_in_full(tmp_path: Path) -> None:
    ranked = torch.tensor([[0, 1], [1, 0], [1, 0]])
    rows = [({"model": "a", "k": k}, grade(ranked[:n], torch.tensor([0, 0, 1])[:n], 2)) for k, n in ((1, 3), (5, 2))]
    write_rows(rows, tmp_path / "rows.csv")
    write_confusion(rows, ["cat", "dog"], tmp_path / "confusion.csv")
    plot_confusion(rows, ["cat", "dog"], tmp_path / "confusion.png")
    first, second = csv.DictReader((tmp_path / "rows.csv").open())
    assert list(first) == ["model", "k", "top1", "top1_low", "top1_high", "top5", "top5_low", "top5_high", "images"]
    assert (first["k"], float(first["top1"]), float(first["top5"]), first["images"]) == ("1", 2 / 3, 1, "3")
    assert float(second["top1_low"]) == rows[1][1].top1.low
    assert (tmp_path / "confusion.csv").read_text().splitlines() == [
        "model,k,truth,predicted,images",
        *("a,1,cat,cat,1", "a,1,cat,dog,1", "a,1,dog,dog,1", "a,5,cat,cat,1", "a,5,cat,dog,1"),
    ]
    assert (tmp_path / "confusion.png").read_bytes().startswith(b"\x89PNG")


def test_knn_ranks_classes_by_votes_and_names_none_that_has_no_vote() -> None:
    # Nearest to furthest: classes 3, 1, 1, 0. At T = 10 votes are nearly equal.
    train = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.8, 0.2], [0.0, 1.0]])
    labels = torch.tensor([3, 1, 1, 0])
    ranked = knn_predictions(train, labels, torch.tensor([[1.0, 0.0]]), k=[1, 3, 4], temperature=10.0)
    assert {k: classes.tolist() for k, classes in ranked.items()} == {
        1: [[3, -1, -1, -1]],
        3: [[1, 3, -1, -1]],
        4: [[1, 3, 0, -1]],
    }


# ---------------------------------------------------------------- features in files


@pytest.fixture(scope="module")
def tiles() -> ImageDataset:
    dataset = open_dataset("photos", train=False, image_size=32)
    dataset.source.tiles = dataset.source.tiles[::40]
    return dataset


def tiny(seed: int = 0, **other: int) -> SplitViT:
    torch.manual_seed(seed)
    return SplitViT(VIT, 1, **{**TINY, **other})


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one entry for each time that a model sees a batch."""
    calls: list[int] = []
    encode = SplitViT.encode

    def counted(*args: object, **options: object) -> object:
        calls.append(1)
        return encode(*args, **options)

    monkeypatch.setattr(SplitViT, "encode", counted)
    return calls


@pytest.mark.parametrize("blocks", [None, 2])
def test_cached_features_are_those_of_the_model_and_are_not_computed_again(
    tmp_path: Path, tiles: ImageDataset, embedded: list[int], blocks: int | None
) -> None:
    model, cache = tiny(), tmp_path / "features"
    made = embed_cached(model, tiles, "cpu", cache=cache, blocks=blocks, batch_size=7)
    expected, labels = embed(model, make_loader(tiles, batch_size=100, train=False), "cpu")
    torch.testing.assert_close(made[0][:, -48:], expected)
    assert made[0].shape == (len(tiles), 48 * (blocks or 1))
    assert torch.equal(made[1], labels)
    embedded.clear()
    again = embed_cached(model, tiles, "cpu", cache=cache, blocks=blocks)
    assert not embedded
    assert all(torch.equal(a, b) for a, b in zip(made, again, strict=True))


def test_other_weights_settings_and_data_are_other_features(
    tmp_path: Path, tiles: ImageDataset, embedded: list[int]
) -> None:
    def trained(model: SplitViT) -> SplitViT:
        with torch.no_grad():
            model.state_dict()["blocks.2.mlp.fc2.bias"][7] += 1e-3
        return model

    def moved(model: SplitViT) -> SplitViT:
        model.split = 0
        return model

    fewer = open_dataset("photos", train=True, image_size=32)
    fewer.source.tiles = fewer.source.tiles[: len(tiles)]
    for number, (model, dataset, blocks) in enumerate(
        [
            (tiny(), tiles, None),
            (tiny(1), tiles, None),
            (trained(tiny()), tiles, None),
            (moved(tiny()), tiles, None),
            (tiny(num_heads=2), tiles, None),
            (tiny(), tiles, 1),
            (tiny(), fewer, None),
        ],
        start=1,
    ):
        embed_cached(model, dataset, "cpu", cache=tmp_path, blocks=blocks)
        assert len(embedded) == number
    embed_cached(tiny(), tiles, "cpu", cache=tmp_path)
    assert len(embedded) == number


def test_a_changed_file_of_a_folder_is_embedded_again(tmp_path: Path, embedded: list[int]) -> None:
    images, cache = tmp_path / "images" / "class", tmp_path / "cache"
    images.mkdir(parents=True)

    def times_embedded() -> int:
        dataset = open_dataset(f"folder:{images.parent}", train=True, image_size=32)
        embed_cached(tiny(), dataset, "cpu", cache=cache)
        return len(embedded)

    for i in range(40):
        Image.new("RGB", (32, 32), (5 * i, 0, 0)).save(images / f"{i:02}.png")
    assert [times_embedded(), times_embedded()] == [1, 1]
    Image.new("RGB", (32, 32), (0, 200, 0)).save(images / "07.png")
    assert times_embedded() == 2


def replace_keeping_times(path: Path, color: tuple[int, int, int]) -> None:
    """Another picture of the same size in bytes, with the old one's times."""
    status = path.stat()
    Image.new("RGB", (32, 32), color).save(path)
    assert path.stat().st_size == status.st_size
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("source", ["folder:{}", "python:{}:birds"])
def test_any_other_picture_is_other_features(
    source: str, tmp_path: Path, embedded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one of the same size and time, and one of a data set that is no folder: none of 40 is taken for another."""
    images = tmp_path / "images" / "class"
    images.mkdir(parents=True)
    for i in range(40):
        Image.new("RGB", (32, 32), (i, 100, 200)).save(images / f"{i:02}.bmp")
    module = f"birds_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{module}.py").write_text(
        "from torchvision.datasets import ImageFolder\n"
        f"def birds(train):\n    return ImageFolder({str(images.parent)!r}, target_transform=lambda label: label)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    location = source.format(images.parent if source.startswith("folder") else module)

    def times_embedded() -> int:
        embed_cached(tiny(), open_dataset(location, train=True, image_size=32), "cpu", cache=tmp_path / "cache")
        return len(embedded)

    assert [times_embedded(), times_embedded()] == [1, 1]
    replace_keeping_times(images / "07.bmp", (0, 0, 0))
    assert [times_embedded(), times_embedded()] == [2, 2]


def test_other_labels_are_other_features(tmp_path: Path, embedded: list[int]) -> None:
    class Named:
        def __init__(self, labels: list[int]) -> None:
            self.image_size, self.classes, self.labels = 32, ["a", "b"], labels
            self.skipped: list[tuple[str, str]] = []

        def __len__(self) -> int:
            return 20

        def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
            return torch.full((3, 32, 32), index, dtype=torch.uint8), self.labels[index], index

        def digest(self) -> str:
            return ""

    one = embed_cached(tiny(), Named([0] * 20), "cpu", cache=tmp_path / "cache")
    other = embed_cached(tiny(), Named([0] * 19 + [1]), "cpu", cache=tmp_path / "cache")
    assert len(embedded) == 2
    assert (one[1].sum(), other[1].sum()) == (0, 1)


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path, Path], object]] = {
    "half of the features": lambda features, labels: features.write_bytes(
        features.read_bytes()[: features.stat().st_size // 2]
    ),
    "no features": lambda features, labels: features.unlink(),
    "empty features": lambda features, labels: features.write_bytes(b""),
    "a bit of the features": lambda features, labels: flip(features, 1001),
    "a bit of the labels": lambda features, labels: flip(labels, 200),
    "empty labels": lambda features, labels: labels.write_bytes(b""),
    "fewer labels": lambda features, labels: np.savez(labels, labels=np.zeros(3, np.int64)),
    "labels of another type": lambda features, labels: np.savez(labels, **{**np.load(labels), "labels": np.zeros(23)}),
    "labels of another key": lambda features, labels: np.savez(labels, **{**np.load(labels), "key": "other"}),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_features_are_computed_again(
    damage: str, tmp_path: Path, tiles: ImageDataset, embedded: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    made = [part.clone() for part in embed_cached(tiny(), tiles, "cpu", cache=tmp_path)]
    (features,), (labels,) = tmp_path.glob("*.f32"), tmp_path.glob("*.npz")
    DAMAGE[damage](features, labels)
    again = embed_cached(tiny(), tiles, "cpu", cache=tmp_path)
    assert len(embedded) == 2
    assert all(torch.equal(a, b) for a, b in zip(made, again, strict=True))
    (line,) = caplog.messages
    assert line.startswith(f"cache: {features} is damaged (")
    assert line.endswith("); its features are computed again")
    embed_cached(tiny(), tiles, "cpu", cache=tmp_path)
    assert len(embedded) == 2


def test_what_could_not_be_read_is_known_of_kept_features(tmp_path: Path, embedded: list[int]) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for i in range(3):
        write = Image.new("RGB", (8, 8)).save if i else lambda path: path.write_bytes(b"no image")
        write(images / f"{i}.png")
    for _ in range(2):
        dataset = open_dataset(f"folder:{images}", train=True, image_size=32)
        features, _ = embed_cached(tiny(), dataset, "cpu", cache=tmp_path / "cache")
        assert len(features) == 2
        ((path, reason),) = dataset.skipped
        assert path == str(images / "0.png")
        assert reason.startswith("UnidentifiedImageError")
    assert len(embedded) == 1


def test_class_tokens_are_those_after_each_block() -> None:
    model, images = tiny().eval(), torch.randn(2, 3, 32, 32)
    first, last = model.class_tokens(images, 2)
    torch.testing.assert_close(last, model.late(model.early(images))[:, 0])
    kept: list[Tensor] = []
    model.blocks[1].register_forward_hook(lambda block, given, tokens: kept.append(tokens))
    both = embedder(model, 2)(images)
    torch.testing.assert_close(first, model.norm(kept[0])[:, 0])
    assert torch.equal(both, torch.cat([first, last], 1))


@pytest.mark.parametrize(
    ("model", "blocks", "message"),
    [
        (tiny, 3, "blocks: got 3, takes 1 to 2"),
        (tiny, 0, "blocks: got 0"),
        (lambda: SplitViT(VIT, 1, **TINY, class_token=False, global_pool="avg"), 1, "model: has no class token"),
    ],
)
def test_class_tokens_that_are_none_are_refused(model: Callable[[], SplitViT], blocks: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model().class_tokens(torch.randn(1, 3, 32, 32), blocks)


def test_spread_items_keeps_images_and_labels_together(tiles: ImageDataset) -> None:
    images, labels = spread_items(tiles, 5)
    rows = torch.linspace(0, len(tiles) - 1, 5).long().tolist()
    assert labels.tolist() == [tiles[row][1] for row in rows]
    assert torch.equal(images, torch.stack([tiles[row][0] for row in rows]))


# ---------------------------------------------------------------- probes


def separable(count: int, *, noise: float = 0.1) -> tuple[Tensor, Tensor]:
    """Three classes on three axes, far from the origin and of unlike scales."""
    labels = torch.arange(count) % 3
    points = torch.eye(3)[labels] + noise * torch.randn(count, 3)
    return 50 + points * torch.tensor([1.0, 100.0, 0.01]), labels


def ring(count: int) -> tuple[Tensor, Tensor]:
    """A disc inside a ring: no line separates them."""
    labels = torch.arange(count) % 2
    angle, radius = 6.2832 * torch.rand(count), 1 + 2.0 * labels
    return radius[:, None] * torch.stack([angle.cos(), angle.sin()], 1), labels


def accuracy(probe_head: nn.Module, points: Tensor, labels: Tensor) -> float:
    return (probe_scores(probe_head, points, "cpu", rows=17).argmax(1) == labels).float().mean().item()


def test_a_linear_probe_separates_what_a_plane_separates() -> None:
    probe = train_probe(*separable(90), classes=3, epochs=40, batch_size=16)
    assert accuracy(probe.head, *separable(60)) == 1
    assert probe.held_out[probe.rate] == 1


def test_two_layers_separate_what_no_plane_does() -> None:
    train, test = ring(200), ring(100)
    linear, mlp = (train_probe(*train, classes=2, hidden=hidden, epochs=40, batch_size=32) for hidden in (None, 32))
    assert accuracy(linear.head, *test) < 0.8
    assert accuracy(mlp.head, *test) == 1


def test_the_rate_is_the_best_on_held_out_training_images() -> None:
    points, labels = separable(200, noise=0.15)
    probe = train_probe(points, labels, classes=3, rates=(1e-9, 0.1, 1e-8), epochs=10, batch_size=32, held_out=0.25)
    assert probe.rate == 0.1
    assert probe.held_out[0.1] > 0.9 > max(probe.held_out[rate] for rate in (1e-9, 1e-8))
    assert all(share * 50 == pytest.approx(round(share * 50)) for share in probe.held_out.values())  # of 50 images


def test_the_choice_is_made_on_the_held_out_part_alone() -> None:
    # All held-out images have the label that the others never have. A rate that learns never predicts it.
    points, labels = torch.randn(40, 2), torch.zeros(40).long()
    held_out = torch.randperm(40, generator=torch.Generator().manual_seed(0))[:10]
    labels[held_out] = 1
    probe = train_probe(points, labels, classes=2, rates=(1.0, 1e-9), epochs=20, batch_size=10, held_out=0.25)
    assert probe.held_out[1.0] == 0


def test_rates_trained_side_by_side_are_as_if_trained_alone() -> None:
    data = ring(60)
    options = {"classes": 2, "hidden": 8, "epochs": 3, "batch_size": 16}
    together = train_probe(*data, rates=(0.1, 1e8, 0.02), **options)  # one of them diverges
    for rate in (0.1, 0.02):
        assert train_probe(*data, rates=(rate,), **options).held_out[rate] == together.held_out[rate]


def test_a_probe_depends_on_its_seed_alone() -> None:
    data = ring(40)
    state = torch.get_rng_state()
    heads = [train_probe(*data, classes=2, epochs=2, seed=seed).head for seed in (3, 3, 4)]
    assert torch.equal(torch.get_rng_state(), state)
    weights = [head[1].weight for head in heads]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": 2}, "train_labels: got 2, takes 0 to 1"),
        ({"rates": ()}, r"rates: got \(\)"),
        ({"rates": (0.1, 0.0)}, r"rates: got \(0.1, 0.0\)"),
        ({"epochs": 0}, "epochs: got 0"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"hidden": 0}, "hidden: got 0"),
        ({"held_out": 0.0}, "held_out: got 0.0, which holds out 0 of 9"),
        ({"held_out": 1.0}, "held_out: got 1.0, which holds out 9 of 9"),
    ],
)
def test_a_probe_names_what_it_refuses(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_probe(*separable(9), **{"classes": 3, "epochs": 1, **change})


# ---------------------------------------------------------------- prediction of g


class Encoder(nn.Module):
    """One layer: a function of the mean pixels of each 4 x 4 patch, (B, H, W, 3)."""

    patch_size = (4, 4)

    def __init__(self, layer: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer = layer

    def layer_maps(self, images: Tensor) -> list[Tensor]:
        return [self.layer(nn.functional.avg_pool2d(images, 4).permute(0, 2, 3, 1))]


def constant(patches: Tensor) -> Tensor:
    return torch.full_like(patches, 0.3)


def position(patches: Tensor) -> Tensor:
    return torch.linspace(0, 5, patches[0].numel()).sin().view_as(patches[0]).expand_as(patches)


def image_mean(patches: Tensor) -> Tensor:
    return patches.mean((1, 2), keepdim=True).expand_as(patches)


def smooth(count: int, height: int = 32, width: int = 32) -> Tensor:
    coarse = torch.rand(count, 3, height // 4, width // 4)
    return (nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1) * 255).byte()


def scores(predictions: list[Prediction]) -> dict[tuple[str, str], float]:
    return {(row.target, row.regressor): row.score for row in predictions}


@pytest.mark.parametrize("size", [(32, 32), (32, 40)])
def test_a_permuting_encoder_predicts_d4_perfectly(size: tuple[int, int]) -> None:
    images = smooth(60, *size)
    predictions = predict_transformations(Encoder(lambda patches: patches), images, pairs=4, batch_size=25)
    assert [(row.layer, row.target, row.regressor) for row in predictions] == [
        (1, target, regressor) for target in ("D4", "scale", "angle") for regressor in ("linear", "MLP")
    ]
    found = scores(predictions)
    assert found["D4", "linear"] == 1
    assert found["D4", "MLP"] > 0.9
    assert found["angle", "linear"] > 0.6
    assert found["scale", "linear"] > 0.2  # the zooms of 15 images: chance is within 0.1
    assert {(row.target, row.train_pairs, row.test_pairs) for row in predictions} == {
        ("D4", 45 * 8, 15 * 8),
        ("scale", 45 * 4, 15 * 4),
        ("angle", 45 * 4, 15 * 4),
    }


@pytest.mark.parametrize("layer", [constant, position, image_mean])
def test_an_encoder_that_says_nothing_of_g_is_at_chance(layer: Callable[[Tensor], Tensor]) -> None:
    for row in predict_transformations(Encoder(layer), smooth(24)):
        assert row.chance == (1 / 8 if row.target == "D4" else 0)
        assert row.score == pytest.approx(row.chance, abs=1e-6 if row.target == "D4" else 0.1)


def test_predictions_are_repeatable_and_leave_the_model_as_it_was() -> None:
    model, images = tiny(), smooth(4)
    state = torch.get_rng_state()
    first, again, other = (predict_transformations(model, images, pairs=1, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert [row.layer for row in first[::2]] == [1, 2, 3] * 3
    assert first == again != other


def test_the_table_shows_every_score(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        Prediction(layer, target, regressor, layer / 10 + 0.01 * i, 0.0, 6, 2)
        for target in transformations.TARGETS
        for i, regressor in enumerate(transformations.REGRESSORS)
        for layer in (1, 2)
    ]
    transformations.print_predictions({"checkpoint": rows, "random": rows})
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert sum(line == "checkpoint linear 0.10 0.20" for line in lines) == 3
    assert sum(line == "random MLP 0.11 0.21" for line in lines) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pairs": 0}, "pairs: got 0"),
        ({"test_share": 0.0}, "test_share: got 0.0, which holds out 0 of 8"),
        ({"test_share": 1.0}, "test_share: got 1.0"),
        ({"images": smooth(2), "test_share": 0.5}, "images: got 2, which leaves 1"),
        ({"images": smooth(1, 30, 32)}, "images: .* multiples of the patch size"),
    ],
)
def test_prediction_names_what_it_refuses(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        predict_transformations(Encoder(constant), **{"images": smooth(8), **change})
