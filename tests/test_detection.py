"""Detection transfer: the generated set, the folder, the detector on a frozen encoder, and COCO's measures."""

import io
import json
import math
import pickle
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases.command_line import PNG, assert_same_files, rows, run_cli
from PIL import Image
from pycocotools import mask as run_lengths
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn

from ser_fast.evaluation import detection, synthetic_coco
from ser_fast.evaluation.coco import CocoFolder, score
from ser_fast.evaluation.detector import FeaturePyramid, build_detector, predict, train_head
from ser_fast.evaluation.protocol import open_encoder
from ser_fast.vit import SplitViT, save_split_vit

SIZE = 64


def make_encoder(patch_size: int = 8) -> SplitViT:
    torch.manual_seed(1)
    options = {"img_size": SIZE, "patch_size": patch_size, "embed_dim": 48, "depth": 2, "num_heads": 3}
    return SplitViT("vit_tiny_patch16_224", 1, **options)


class Flat:
    """Images of one grey, in place of the photographs; those from number 3 on are striped."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        side = synthetic_coco.IMAGE_SIZE
        image = torch.full((3, side, side), 100, dtype=torch.uint8)
        if index >= 3:
            image[:, ::2] = 0
        return image, 0, index


def write_coco(folder: Path, images: dict[int, tuple[int, int]], annotations: list[dict[str, Any]]) -> Path:
    """A folder in COCO's layout, train and val alike; images: id: (height, width). Categories 3 and 90."""
    categories = [{"id": 90, "name": "late"}, {"id": 3, "name": "early"}]
    for part in ("train2017", "val2017"):
        (folder / part).mkdir(parents=True, exist_ok=True)
        (folder / "annotations").mkdir(exist_ok=True)
        entries = []
        for number, (height, width) in images.items():
            pixels = np.random.default_rng(number).integers(256, size=(height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / part / f"{number}.png")
            entries.append({"id": number, "file_name": f"{number}.png", "height": height, "width": width})
        content = {"images": entries, "annotations": annotations, "categories": categories}
        (folder / "annotations" / f"instances_{part}.json").write_text(json.dumps(content))
    return folder


def annotation(number: int, image: int, category: int, box: list[float], **other: Any) -> dict[str, Any]:
    fields = {"id": number, "image_id": image, "category_id": category, "bbox": box, "iscrowd": 0}
    return {**fields, "area": box[2] * box[3], **other}


@pytest.fixture
def hand_made(tmp_path: Path) -> CocoFolder:
    """Two images with boxes, one without, ids with gaps."""
    annotations = [
        annotation(1, 12, 90, [10, 5, 20, 30]),
        annotation(2, 12, 3, [0, 0, 16, 16]),
        annotation(3, 7, 3, [8.5, 10, 100, 100]),
    ]
    return CocoFolder(
        write_coco(tmp_path / "coco", {12: (48, 64), 5: (32, 32), 7: (200, 120)}, annotations), train=False
    )


# ---------------------------------------------------------------- the generated set


@pytest.mark.parametrize("seed", range(8))
def test_boxes_are_those_of_the_pasted_pixels(seed: int) -> None:
    flat = Flat()
    image, objects = synthetic_coco.paste_shapes(flat[0][0], flat, [np.arange(3)] * 2, np.random.default_rng(seed))
    colours = image.flatten(1).unique(dim=1).T  # each object has one, and so has the background
    found = []
    for colour in colours:
        rows, columns = (image == colour[:, None, None]).all(0).nonzero().T.tolist()
        left, top = min(columns), min(rows)
        found.append(([left, top, max(columns) + 1 - left, max(rows) + 1 - top], len(rows)))
    boxes = [(pasted["bbox"], pasted["area"]) for pasted in objects]
    assert 1 <= len(boxes) <= 4
    assert len(found) == len(boxes) + 1
    assert all(pasted in found for pasted in boxes)
    for pasted in objects:
        mask = run_lengths.decode(pasted["segmentation"])
        left, top, width, height = pasted["bbox"]
        assert mask.sum() == mask[top : top + height, left : left + width].sum() == pasted["area"]


def test_each_material_has_its_category() -> None:
    rng, flat = np.random.default_rng(0), Flat()
    categories = set()
    for _ in range(10):
        image, objects = synthetic_coco.paste_shapes(flat[0][0], flat, [np.arange(3), np.arange(3, 6)], rng)
        for pasted in objects:
            mask = torch.from_numpy(run_lengths.decode(pasted["segmentation"])).bool()
            colours = image[:, mask].unique(dim=1).shape[1]
            assert colours == pasted["category_id"]  # one color, or two stripes
            categories.add(pasted["category_id"])
    assert categories == {1, 2}


def test_shapes_are_what_they_are_called() -> None:
    rng = np.random.default_rng(0)
    shares: dict[str, list[float]] = {name: [] for name in synthetic_coco.SHAPES}
    for name in 25 * list(shares):
        mask = synthetic_coco.draw_shape(name, 128, rng)
        if mask[[0, -1]].any() or mask[:, [0, -1]].any():
            continue  # cut off by the image's border
        rows, columns = mask.nonzero().T.tolist()
        area = (max(rows) + 1 - min(rows)) * (max(columns) + 1 - min(columns))
        shares[name].append(float(mask.sum()) / area)
    means = {name: float(np.mean(of)) for name, of in shares.items()}
    assert means["disc"] == pytest.approx(math.pi / 4, abs=0.01)  # at any angle
    assert means["square"] == pytest.approx(0.64, abs=0.1)  # .5 to 1, by the angle
    assert means["triangle"] == pytest.approx(0.49, abs=0.05)  # at most a half


def test_mean_colors_do_not_say_what_an_object_is() -> None:
    """Over many pieces each material has the same mean color, within what chance leaves."""
    rng, flat = np.random.default_rng(0), Flat()
    means = torch.stack(
        [
            torch.stack([synthetic_coco.recolor(flat[i][0], rng).double().mean((1, 2)) for _ in range(400)])
            for i in (0, 4)
        ]
    )
    low, high = synthetic_coco._BASE
    deviation = (high - low) / math.sqrt(12 * 400)
    assert (means.mean(1) - (low + high) / 2).abs().max() < 4 * deviation


def test_the_set_is_seeded_and_its_parts_are_not_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic_coco, "IMAGES", {"train": 3, "val": 2})
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        synthetic_coco.write_shapes(tmp_path / name, seed=seed)
    a, b, c = (
        {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.*")}
        for name in "abc"
    )
    assert a == b
    assert len({*a.values(), *c.values()}) == 2 * (3 + 2 + 2)
    parts = [CocoFolder(tmp_path / "a", train=train) for train in (True, False)]
    assert [len(part) for part in parts] == [3, 2]
    image, target = parts[0][0]
    assert image.shape == (3, synthetic_coco.IMAGE_SIZE, synthetic_coco.IMAGE_SIZE)
    assert len(target["boxes"]) == len(target["labels"]) >= 1


# ---------------------------------------------------------------- a folder in COCO's layout


def test_examples_have_corners_and_labels_from_one(tmp_path: Path) -> None:
    annotations = [
        annotation(1, 12, 90, [10, 5, 20, 30]),
        annotation(2, 12, 3, [50, 40, 100, 100]),  # reaches out of the image
        annotation(3, 12, 3, [1, 1, 9, 9], iscrowd=1),
        annotation(4, 12, 3, [1, 1, 0, 9]),
    ]
    dataset = CocoFolder(write_coco(tmp_path, {12: (48, 64), 5: (32, 32)}, annotations), train=True)
    assert dataset.examples.ids == [5, 12]
    image, target = dataset[1]
    assert (image.shape, image.dtype) == ((3, 48, 64), torch.float32)
    pixels = np.array(Image.open(tmp_path / "train2017" / "12.png"))
    torch.testing.assert_close(torch.as_tensor(image), torch.from_numpy(pixels).permute(2, 0, 1) / 255)
    assert target["boxes"].tolist() == [[10, 5, 30, 35], [50, 40, 64, 48]]
    assert target["labels"].tolist() == [2, 1]
    assert dataset[0][1]["boxes"].shape == (0, 4)
    sent = pickle.loads(pickle.dumps(dataset))[1][1]  # as to workers that do not fork
    assert [sent[key].tolist() for key in ("boxes", "labels")] == [[[10, 5, 30, 35], [50, 40, 64, 48]], [2, 1]]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "got 0 files annotations/instances_val"),
        ({"instances_val1": "{}", "instances_val2": "{}"}, "got 2 files"),
        ({"instances_valid": "{}"}, "no folder .*valid"),
        ({"instances_val": "[1]"}, "takes COCO's format"),
        ({"instances_val": "{}"}, "got 0 images, 0 categories and 0 annotations"),
        (
            {
                "instances_val": '{"images": [{"id": 1}], "categories": [{"id": 1}], "annotations": [{"id": 1, '
                '"image_id": 1, "category_id": 1, "bbox": [0, 0, 1, 1]}]}'
            },
            "takes .* bbox, area and iscrowd",
        ),
    ],
    ids=str,
)
def test_other_folders_are_refused(tmp_path: Path, files: dict[str, str], message: str) -> None:
    (tmp_path / "annotations").mkdir()
    (tmp_path / "val").mkdir()
    for name, text in files.items():
        (tmp_path / "annotations" / f"{name}.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        CocoFolder(tmp_path, train=False)


def write_categories(folder: Path, part: str, categories: list[dict[str, Any]], labels: list[int]) -> None:
    path = folder / "annotations" / f"instances_{part}2017.json"
    content = json.loads(path.read_text()) | {"categories": categories}
    for entry, label in zip(content["annotations"], labels, strict=True):
        entry["category_id"] = label
    path.write_text(json.dumps(content))


def two_boxes(folder: Path) -> Path:
    return write_coco(folder, {1: (32, 32)}, [annotation(1, 1, 3, [1, 1, 9, 9]), annotation(2, 1, 90, [5, 5, 9, 9])])


def test_both_parts_have_the_labels_of_training(tmp_path: Path) -> None:
    """A category that one file lacks moves no label: what is predicted is read with the list it was learned from."""
    folder = two_boxes(tmp_path)
    ant, bee, cat = ({"id": number, "name": name} for number, name in ((3, "ant"), (7, "bee"), (90, "cat")))
    write_categories(folder, "train", [cat, ant, bee], [3, 90])
    write_categories(folder, "val", [cat, ant], [3, 90])
    train = CocoFolder(folder, train=True)
    held_out = CocoFolder(folder, train=False, labels_of=train)
    assert held_out.categories == train.categories == [3, 7, 90]
    assert held_out[0][1]["labels"].tolist() == train[0][1]["labels"].tolist() == [1, 3]
    results = predict(KnowsAll(held_out), held_out)  # type: ignore[arg-type]
    assert [box["category_id"] for box in results] == [3, 90]
    assert [record.ap for record in score(held_out.coco, results)] == pytest.approx([1, 1, 1])


@pytest.mark.parametrize(
    ("categories", "labels", "message"),
    [
        ([(3, "ant"), (8, "dog")], [3, 8], r"categories 8 \(dog\) in .*val2017\.json, takes 8 \(none\)"),
        ([(3, "bee"), (90, "cat")], [3, 90], r"categories 3 \(bee\) in .*, takes 3 \(ant\)"),
        ([(3, "ant")], [3, 90], r"categories 90 \(none\) in .*, takes 90 \(cat\)"),
    ],
)
def test_other_categories_than_those_of_training_are_refused(
    tmp_path: Path, categories: list[tuple[int, str]], labels: list[int], message: str
) -> None:
    folder = two_boxes(tmp_path)
    write_categories(folder, "train", [{"id": 3, "name": "ant"}, {"id": 90, "name": "cat"}], [3, 90])
    write_categories(folder, "val", [{"id": number, "name": name} for number, name in categories], labels)
    with pytest.raises(ValueError, match=message):
        detection.evaluate(make_encoder(), folder)


def test_an_image_that_can_not_be_read_is_named(tmp_path: Path) -> None:
    folder = two_boxes(tmp_path)
    with pytest.raises(ValueError, match=r"1\.png can't be read, .* 32 x 32 pixels, more than max_pixels = 100"):
        CocoFolder(folder, train=False, max_pixels=100)[0]
    (folder / "val2017" / "1.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"data: .*1\.png can't be read, and all images are taken: Unid"):
        CocoFolder(folder, train=False)[0]


def test_an_image_lies_as_it_was_annotated(tmp_path: Path) -> None:
    folder = write_coco(tmp_path, {1: (48, 64)}, [annotation(1, 1, 3, [1, 1, 9, 9])])
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 48)).save(folder / "val2017" / "1.png", exif=exif)
    assert CocoFolder(folder, train=False)[0][0].shape == (3, 48, 64)


# ---------------------------------------------------------------- COCO's measures


def truth(dataset: CocoFolder, **changed: Any) -> list[dict[str, Any]]:
    keys = ("image_id", "category_id", "bbox")
    return [{**{key: of[key] for key in keys}, "score": 0.9, **changed} for of in dataset.coco.anns.values()]


def test_perfect_boxes_score_one_and_none_score_zero(hand_made: CocoFolder) -> None:
    perfect, nothing = score(hand_made.coco, truth(hand_made)), score(hand_made.coco, [])
    assert [record.category for record in perfect] == ["all", "early", "late"]
    for record in perfect:
        assert (record.ap, record.ap50, record.ap75, record.ar, record.images) == pytest.approx((1, 1, 1, 1, 3))
    assert [(record.ap, record.ar) for record in nothing] == [(0, 0)] * 3
    assert math.isnan(perfect[2].ap_large)  # the only large object is of the other category
    assert perfect[1].ap_large == pytest.approx(1)


def test_half_right_scores_a_half(hand_made: CocoFolder) -> None:
    one_category = [box for box in truth(hand_made) if box["category_id"] == 3]
    assert [record.ap for record in score(hand_made.coco, one_category)] == pytest.approx([0.5, 1, 0])
    # An overlap of .72 passes the five thresholds .5 to .7 of ten.
    off = truth(hand_made)
    for box in off:
        left, top, width, height = box["bbox"]
        box["bbox"] = [left + width * 0.28 / 1.72, top, width, height]
    record = score(hand_made.coco, off)[0]
    assert (record.ap, record.ap50, record.ap75) == pytest.approx((0.5, 1, 0))


def test_measures_are_those_that_pycocotools_prints(hand_made: CocoFolder) -> None:
    rng = np.random.default_rng(0)
    boxes = [{**box, "score": rng.random()} for box in truth(hand_made) for _ in range(4)]
    for box in boxes:
        box["bbox"] = (np.array(box["bbox"]) * rng.uniform(0.8, 1.2, 4)).tolist()
    with redirect_stdout(io.StringIO()):
        evaluation = COCOeval(hand_made.coco, hand_made.coco.loadRes(boxes), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    ours = score(hand_made.coco, boxes)[0]
    measures = [ours.ap, ours.ap50, ours.ap75, ours.ap_small, ours.ap_medium, ours.ap_large, ours.ar]
    assert 0 < ours.ap < 1
    theirs = np.array([*evaluation.stats[:6], evaluation.stats[8]])
    assert measures == pytest.approx(np.where(theirs == -1, np.nan, theirs), nan_ok=True)


class KnowsAll(nn.Module):
    """A detector that finds the true boxes of a dataset, image after image."""

    def __init__(self, dataset: CocoFolder) -> None:
        super().__init__()
        self.examples = [dataset[index] for index in range(len(dataset))]
        self.seen = nn.Parameter(torch.zeros(()))

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        start = int(self.seen)
        self.seen += len(images)
        found = []
        for image, (expected, target) in zip(images, self.examples[start : start + len(images)], strict=True):
            assert torch.equal(image, expected)
            found.append({**target, "scores": torch.ones(len(target["labels"]))})
        return found


def test_predictions_are_in_the_terms_of_the_file(hand_made: CocoFolder) -> None:
    results = predict(KnowsAll(hand_made), hand_made, batch_size=2)  # type: ignore[arg-type]
    assert score(hand_made.coco, results)[0].ap50 == pytest.approx(1)
    assert {(found["image_id"], found["category_id"]) for found in results} == {(7, 3), (12, 3), (12, 90)}
    assert [10, 5, 20, 30] in [found["bbox"] for found in results]


# ---------------------------------------------------------------- the detector


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> CocoFolder:
    """Two images of the generated set."""
    folder = tmp_path_factory.mktemp("pair")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic_coco, "IMAGES", {"train": 2, "val": 1})
        synthetic_coco.write_shapes(folder, seed=3)
    return CocoFolder(folder, train=True)


def test_the_pyramid_has_four_scales_of_the_last_tokens() -> None:
    encoder = make_encoder()
    maps = FeaturePyramid(encoder, 16)(torch.rand(2, 3, 64, 96))
    assert {name: tuple(level.shape) for name, level in maps.items()} == {
        "0": (2, 16, 16, 24),
        "1": (2, 16, 8, 12),
        "2": (2, 16, 4, 6),
        "3": (2, 16, 2, 3),
    }
    pyramid = FeaturePyramid(encoder, encoder.embed_dim)
    pyramid.levels[1] = nn.Identity()
    images = torch.rand(2, 3, 64, 96)
    last = encoder.eval().late(encoder.early(images))[:, encoder.num_prefix_tokens :]  # (B, H*W, C)
    torch.testing.assert_close(pyramid(images)["1"].flatten(2).mT, last)


def test_patches_that_are_no_squares_are_refused() -> None:
    oblong: Any = (8, 16)
    with pytest.raises(ValueError, match="checkpoint: got patches of 8 x 16 pixels, takes squares"):
        build_detector(make_encoder(oblong), categories=2, image_size=64)


def test_patches_of_any_side_have_a_pyramid_of_powers_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    pyramid: Any = build_detector(make_encoder(7), categories=2, image_size=64).backbone
    assert pyramid.stride == 8
    seen = []
    early = pyramid.encoder.early
    monkeypatch.setattr(pyramid.encoder, "early", lambda images: (seen.append(images), early(images))[1])
    images = torch.rand(1, 3, 64, 32)
    sizes = [tuple(level.shape[2:]) for level in pyramid(images).values()]
    assert sizes == [(16, 8), (8, 4), (4, 2), (2, 1)]
    expected = F.interpolate(images, (56, 28), mode="bilinear", antialias=True)
    torch.testing.assert_close(seen[0], expected)


def train(dataset: CocoFolder, path: Path, **options: Any) -> tuple[Any, SplitViT]:
    encoder = make_encoder().train()
    detector = build_detector(encoder, categories=len(dataset.categories), image_size=SIZE)
    train_head(detector, dataset, path, **{"steps": 4, "batch_size": 1, "save_every": 2, **options})
    return detector, encoder


def test_training_leaves_the_encoder_as_it_was(pair: CocoFolder, tmp_path: Path) -> None:
    detector, encoder = train(pair, tmp_path / "head.pt")
    before = make_encoder().state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())
    assert all(parameter.grad is None for parameter in encoder.parameters())
    untrained = build_detector(encoder, categories=len(pair.categories), image_size=SIZE).state_dict()
    saved = torch.load(tmp_path / "head.pt", weights_only=True)["head"]
    assert saved.keys() == {name for name in untrained if not name.startswith("backbone.encoder.")}
    for name, tensor in saved.items():
        assert torch.equal(tensor, detector.state_dict()[name])
        assert not torch.equal(tensor, untrained[name]), name


def test_interrupted_training_goes_on_to_the_same_head(
    pair: CocoFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = train(pair, tmp_path / "whole.pt")
    with monkeypatch.context() as patch:
        read, reads = CocoFolder.__getitem__, []

        def read_three(self: CocoFolder, index: int) -> Any:
            reads.append(index)
            if len(reads) > 3:
                raise KeyboardInterrupt
            return read(self, index)

        patch.setattr(CocoFolder, "__getitem__", read_three)
        with pytest.raises(KeyboardInterrupt):
            train(pair, tmp_path / "parts.pt")
    assert torch.load(tmp_path / "parts.pt", weights_only=True)["step"] == 2
    resumed, _ = train(pair, tmp_path / "parts.pt")
    expected = whole.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.state_dict().items())
    with pytest.raises(ValueError, match=r"out: got .*parts.pt, trained with another lr, seed; delete"):
        train(pair, tmp_path / "parts.pt", lr=1e-2, seed=5)
    content = bytearray((tmp_path / "parts.pt").read_bytes())
    content[len(content) // 2] ^= 4
    for damaged in (bytes(content), bytes(content[:1000]), b""):
        (tmp_path / "parts.pt").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"^out: got .*parts.pt, damaged or no detector's head; delete it: "):
            train(pair, tmp_path / "parts.pt")


@pytest.mark.parametrize("name", ["steps", "batch_size", "save_every"])
def test_counts_are_positive(pair: CocoFolder, tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: got 0, takes a positive number"):
        train(pair, tmp_path / "head.pt", **{name: 0})


@pytest.mark.slow
def test_two_images_are_learned_by_heart(pair: CocoFolder, tmp_path: Path) -> None:
    encoder = make_encoder()
    detector = build_detector(encoder, categories=len(pair.categories), image_size=synthetic_coco.IMAGE_SIZE)
    train_head(detector, pair, tmp_path / "head.pt", steps=100, batch_size=2)
    assert score(pair.coco, predict(detector, pair))[0].ap > 0.5


# ---------------------------------------------------------------- the command


@pytest.mark.slow
def test_the_command_compares_with_a_random_initialisation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(synthetic_coco, "IMAGES", {"train": 4, "val": 2})
    checkpoint = tmp_path / "encoder.safetensors"
    save_split_vit(checkpoint, make_encoder())
    argv = [checkpoint, "--steps=2", "--batch-size=2", "--image-size=64", "--device=cpu"]
    run_cli("detection", *argv)
    table = rows(tmp_path / "detection.csv")
    assert [(row["model"], row["category"]) for row in table] == [
        (model, category) for model in ("checkpoint", "random") for category in ("all", *synthetic_coco.MATERIALS)
    ]
    held_out = CocoFolder(tmp_path / "detection" / "materials_0", train=False)
    for model in ("checkpoint", "random"):
        results = json.loads((tmp_path / "detection" / f"{model}.json").read_text())
        expected = score(held_out.coco, results)
        assert [float(row["ar"]) for row in table if row["model"] == model] == pytest.approx(
            [record.ar for record in expected], nan_ok=True
        )
        assert torch.load(tmp_path / "detection" / f"{model}.pt", weights_only=True)["step"] == 2
    assert (tmp_path / "detection.png").read_bytes().startswith(PNG)
    shown = "".join(capsys.readouterr().out.split())  # a path may be broken over lines
    assert all(word in shown for word in ("checkpoint", "random", "ap_small", "detection.csv"))

    # Python gives the same files, from heads that go on and from heads of its own.
    encoder, _, _ = open_encoder(checkpoint, device="cpu")
    result = detection.evaluate(encoder, steps=2, batch_size=2, image_size=64)
    written = result.write(tmp_path / "python")
    assert_same_files(written[:2], tmp_path)
    assert_same_files(written[2:], tmp_path / "detection")


def test_options_are_checked_before_the_set_is_made(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="steps: got 0, takes a positive number"):
        detection.evaluate(make_encoder(), steps=0, heads=tmp_path)
    with pytest.raises(ValueError, match="data: got 0 files"):
        detection.evaluate(make_encoder(), tmp_path)
    assert not any(tmp_path.iterdir())
