"""Segmentation: pixels that are counted, heads on tokens, folders of masks, and the command."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases.command_line import PNG, refusal, rows, run_cli
from PIL import Image
from pycocotools import mask as run_lengths
from torch import Tensor

from ser_fast.evaluation import segmentation, synthetic_coco
from ser_fast.evaluation.segmentation_heads import (
    Retrieval,
    class_shares,
    classes_of,
    count_pixels,
    overlap,
    predict,
    train_head,
    upsample,
)
from ser_fast.evaluation.segmentation_sets import IGNORED, CocoMasks, VocFolder, open_segmentation
from ser_fast.vit import SplitViT, save_split_vit

SIZE = 32


def make_encoder() -> SplitViT:
    torch.manual_seed(1)
    options = {"img_size": SIZE, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    return SplitViT("vit_tiny_patch16_224", 1, **options)


# ---------------------------------------------------------------- scores


def test_a_hand_made_mask_is_scored_as_computed_by_hand() -> None:
    mask = torch.tensor([[0, 0, 1], [1, 1, IGNORED]], dtype=torch.uint8)
    predicted = torch.tensor([[0, 1, 1], [1, 0, 2]])
    counts = count_pixels(predicted, mask, 3)
    assert counts.tolist() == [[1, 2, 0], [2, 3, 0], [2, 3, 0]]  # right, in the mask, predicted
    graded = overlap(counts[None])
    assert [iou.value for iou in graded.iou[:2]] == pytest.approx([1 / 3, 2 / 4])
    assert math.isnan(graded.iou[2].value)  # the ignored pixel counts nowhere, and no mean has its class
    assert graded.miou.value == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert graded.accuracy.value == pytest.approx(3 / 5)
    assert graded.pixels.tolist() == [2, 3, 0]


def test_a_perfect_and_a_constant_prediction() -> None:
    masks = torch.randint(4, (6, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
    perfect = overlap(torch.stack([count_pixels(mask.long(), mask, 4) for mask in masks]))
    assert (perfect.miou.value, perfect.miou.low, perfect.miou.high, perfect.accuracy.value) == (1, 1, 1, 1)
    constant = overlap(torch.stack([count_pixels(torch.full((8, 8), 2), mask, 4) for mask in masks]))
    share = (masks == 2).double().mean().item()
    assert constant.miou.value == pytest.approx(share / 4)  # of four classes one is predicted, over all pixels
    assert constant.accuracy.value == pytest.approx(share)


def test_a_random_prediction_has_the_overlap_of_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    masks = torch.randint(3, (40, 50, 50), generator=generator).byte()
    guesses = torch.randint(3, masks.shape, generator=generator)
    graded = overlap(torch.stack([count_pixels(*pair, 3) for pair in zip(guesses, masks, strict=True)]))
    assert graded.miou.value == pytest.approx(1 / 5, abs=0.005)  # right 1/9, either 1/3 + 1/3 - 1/9
    assert graded.miou.low < 1 / 5 < graded.miou.high


def test_intervals_are_those_of_images_drawn_again() -> None:
    """Half of the images right, half wrong: the accuracy of a draw is a binomial share."""
    mask = torch.zeros(2, 2, dtype=torch.uint8)
    counts = torch.stack([count_pixels(torch.full((2, 2), number % 2), mask, 2) for number in range(100)])
    graded = overlap(counts, seed=3)
    assert graded.accuracy.value == 0.5
    assert graded.accuracy.low == pytest.approx(0.4, abs=0.025)  # .5 +- 1.96 * .05
    assert graded.accuracy.high == pytest.approx(0.6, abs=0.025)
    assert overlap(counts, seed=3).miou == graded.miou


# ---------------------------------------------------------------- heads


def make_tokens(images: int, seed: int) -> tuple[Tensor, Tensor]:
    """Tokens (N, 4, 4, 5) whose channels say the class of their 8 x 8 pixels, and the masks (N, 32, 32)."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(3, (images, 4, 4), generator=generator)
    noise = 0.1 * torch.randn(images, 4, 4, 5, generator=generator)
    tokens = noise + torch.eye(5)[classes]
    return tokens, classes.repeat_interleave(8, 1).repeat_interleave(8, 2).byte()


@pytest.mark.parametrize("method", ["linear", "retrieval"])
def test_heads_find_the_class_that_tokens_say(method: str) -> None:
    tokens, masks = make_tokens(20, 0)
    masks[:, 0] = IGNORED
    if method == "linear":
        options: dict[str, Any] = {"rates": (1e-6, 0.1), "epochs": 20, "batch_size": 5, "held_out": 0.2}
        trained = train_head(tokens, masks, classes=3, **options)
        again = train_head(tokens, masks, classes=3, **options)
        assert trained.rate == 0.1  # the other one does nothing
        assert trained.held_out[0.1] > trained.held_out[1e-6]
        assert trained.held_out == again.held_out
        head = trained.head
    else:
        head = Retrieval(tokens, masks, classes=3, k=5, temperature=0.1, bank=200)
    test_tokens, test_masks = make_tokens(4, 1)
    found = head(test_tokens).argmax(-1)
    assert torch.equal(found, test_masks[:, ::8, ::8].long())
    counts = predict(head, test_tokens[:1], test_masks[0])
    assert counts[1].sum() == SIZE * SIZE
    # Scores between the tokens are interpolated: of such small regions some pixels go to a neighbor.
    assert 0.8 < overlap(counts[None]).accuracy.value < 1


def test_ignored_pixels_do_not_teach_a_head() -> None:
    tokens, masks = make_tokens(10, 0)
    wrong = masks.clone()
    wrong[:, :16] = 0
    wrong[:, :16] = torch.where(torch.arange(SIZE) % 2 == 0, IGNORED, wrong[:, :16]).byte()
    other = torch.where(wrong == IGNORED, 2, wrong).byte()
    options: dict[str, Any] = {"classes": 3, "rates": (0.05,), "epochs": 3, "batch_size": 5, "held_out": 0.2}
    weights = [train_head(tokens, each, **options).head.state_dict()["1.weight"] for each in (wrong, other)]
    assert not torch.equal(*weights)  # they count where they have a class
    nothing = torch.full_like(masks, IGNORED)
    assert not train_head(tokens, nothing, **options).head.state_dict()["1.weight"].any()


def test_the_bank_is_bounded_and_has_no_token_without_a_class() -> None:
    tokens, masks = make_tokens(20, 0)
    masks[:, :8] = IGNORED  # the first row of tokens
    bank = Retrieval(tokens, masks, classes=3, k=3, temperature=0.1, bank=100)
    assert 0 < len(bank.keys) <= 100
    assert torch.equal(bank.shares.sum(1), torch.ones(len(bank.keys)))
    same = Retrieval(tokens, masks, classes=3, k=3, temperature=0.1, bank=100)
    assert torch.equal(bank.keys, same.keys)
    assert len(Retrieval(tokens, masks, classes=3, k=3, temperature=0.1, bank=7).keys) <= 7


def test_shares_of_classes_are_those_of_each_tokens_pixels() -> None:
    mask = torch.tensor([[0, 1, 2, 2], [1, 1, IGNORED, 2], [IGNORED] * 4, [IGNORED] * 3 + [0]], dtype=torch.uint8)
    assert class_shares(mask, (2, 2), 3).tolist() == [[0.25, 0.75, 0], [0, 0, 1], [0, 0, 0], [1, 0, 0]]


def test_scores_are_interpolated_between_the_tokens_centers() -> None:
    scores = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]])  # (1, 1, 2, 2): two tokens, one class each
    assert upsample(scores, (1, 4)).tolist() == [[[[1.0, 0.75, 0.25, 0.0]], [[0.0, 0.25, 0.75, 1.0]]]]  # half pixels
    assert classes_of(scores, (1, 4)).tolist() == [[0, 0, 1, 1]]
    assert classes_of(scores, (3, 8)).tolist() == [[0, 0, 0, 0, 1, 1, 1, 1]] * 3


# ---------------------------------------------------------------- folders


def write_voc(folder: Path, masks: dict[str, Tensor], *, train: int) -> Path:
    """A folder as VOC has it, the first `train` pictures to train on, each as large as its mask and in its grey."""
    for part in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / part).mkdir(parents=True)
    for name, mask in masks.items():
        Image.fromarray((mask * 40).numpy()).convert("RGB").save(folder / "JPEGImages" / f"{name}.jpg", quality=95)
        indexed = Image.fromarray(mask.numpy()).convert("P")
        indexed.putpalette([(number * 7) % 256 for number in range(768)])
        indexed.putdata(mask.flatten().tolist())
        indexed.save(folder / "SegmentationClass" / f"{name}.png")
    for part, names in (("train", list(masks)[:train]), ("val", list(masks)[train:])):
        (folder / "ImageSets" / "Segmentation" / f"{part}.txt").write_text("".join(f"{name}\n" for name in names))
    return folder


def blobs(count: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for number in range(count):
        mask = torch.zeros(40, 48, dtype=torch.uint8)
        mask[8:24, 10 + number % 5 : 40] = torch.randint(1, 3, (), generator=generator).byte()
        mask[30:32] = IGNORED
        found[f"2007_{number:06}"] = mask
    return found


def test_voc_folders_are_read(tmp_path: Path) -> None:
    masks = blobs(3, 0)
    folder = write_voc(tmp_path / "voc", masks, train=2)
    train, val = open_segmentation(folder)
    assert isinstance(train, VocFolder)
    assert (len(train), len(val)) == (2, 1)
    assert (train.classes[0], train.classes[15], len(train.classes)) == ("background", "person", 21)
    picture = val[0]
    assert torch.equal(picture.mask, masks["2007_000002"])
    assert picture.image.shape == (3, 40, 48)
    (folder / "classes.txt").write_text("ground\nblob\nother\n")
    assert VocFolder(folder, train=True).classes == ["ground", "blob", "other"]


def test_voc_folders_that_lack_something_are_refused(tmp_path: Path) -> None:
    folder = write_voc(tmp_path / "voc", blobs(3, 0), train=2)
    with pytest.raises(ValueError, match=r"data: got .*takes a folder with ImageSets/Segmentation"):
        open_segmentation(tmp_path)
    (folder / "classes.txt").write_text("ground\nblob\n")
    number = next(number for number, mask in enumerate(blobs(3, 0).values()) if 2 in mask)
    with pytest.raises(ValueError, match=r"class 2 in .*2007_.*, takes 0 to 1"):
        VocFolder(folder, train=number < 2)[number % 2]
    (folder / "classes.txt").unlink()
    mask_file = folder / "SegmentationClass" / "2007_000000.png"
    Image.new("RGB", (48, 40)).save(mask_file)
    with pytest.raises(ValueError, match="of mode RGB, takes a palette"):
        VocFolder(folder, train=True)[0]
    Image.new("L", (40, 40)).save(mask_file)
    with pytest.raises(ValueError, match=r"of \(40, 40\) pixels, takes \(40, 48\)"):
        VocFolder(folder, train=True)[0]
    mask_file.write_bytes(PNG)
    with pytest.raises(ValueError, match="which can't be read"):
        VocFolder(folder, train=True)[0]
    mask_file.unlink()
    with pytest.raises(ValueError, match=r"1 missing files .*2007_000000\.png"):
        VocFolder(folder, train=True)
    (folder / "ImageSets" / "Segmentation" / "val.txt").write_text("")
    with pytest.raises(ValueError, match="lists no images"):
        VocFolder(folder, train=False)


def write_coco(folder: Path, segmentations: list[dict[str, Any]]) -> Path:
    """One picture of 20 x 24 pixels in each part, with categories 3 and 90."""
    for part in ("train", "val"):
        (folder / part).mkdir(parents=True)
        (folder / "annotations").mkdir(exist_ok=True)
        Image.new("RGB", (24, 20), (90, 30, 10)).save(folder / part / "a.png")
        content = {
            "images": [{"id": 5, "file_name": "a.png", "height": 20, "width": 24}],
            "categories": [{"id": 90, "name": "late"}, {"id": 3, "name": "early"}],
            "annotations": [
                {"id": number, "image_id": 5, "bbox": [0, 0, 4, 4], "area": 16, "iscrowd": 0, **each}
                for number, each in enumerate(segmentations, start=1)
            ],
        }
        (folder / "annotations" / f"instances_{part}.json").write_text(json.dumps(content))
    return folder


def rectangle(left: int, top: int, right: int, bottom: int) -> list[list[int]]:
    return [[left, top, right, top, right, bottom, left, bottom]]


def test_coco_masks_are_painted_and_overlaps_ignored(tmp_path: Path) -> None:
    crowd = np.zeros((20, 24), dtype=np.uint8, order="F")
    crowd[15:, :] = 1
    encoded = run_lengths.encode(crowd)
    folder = write_coco(
        tmp_path,
        [
            {"category_id": 90, "segmentation": rectangle(2, 2, 10, 10)},
            {"category_id": 3, "segmentation": rectangle(8, 2, 16, 10)},
            {"category_id": 3, "segmentation": rectangle(12, 2, 20, 17)},
            {
                "category_id": 3,
                "iscrowd": 1,
                "segmentation": {"size": [20, 24], "counts": encoded["counts"].decode()},
            },
        ],
    )
    dataset, held_out = open_segmentation(folder)
    assert held_out.classes == dataset.classes
    assert isinstance(dataset, CocoMasks)
    assert dataset.classes == ["background", "early", "late"]
    image, mask = dataset[0]
    assert image[:, 0, 0].tolist() == [90, 30, 10]
    expected = torch.zeros(20, 24, dtype=torch.uint8)
    expected[15:] = IGNORED
    expected[2:10, 2:10] = 2
    expected[2:10, 8:16] = 1
    expected[2:17, 12:20] = 1  # objects are seen before crowds
    expected[2:10, 8:10] = IGNORED
    assert torch.equal(mask, expected)


def test_coco_folders_without_masks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="takes a segmentation in each annotation"):
        CocoMasks(write_coco(tmp_path, [{"category_id": 3}]), train=True)


# ---------------------------------------------------------------- the command


def test_the_command_on_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_voc(tmp_path / "voc", blobs(8, 0), train=6)
    (data / "classes.txt").write_text("ground\nblob\nother\n")
    save_split_vit(tmp_path / "encoder.safetensors", make_encoder())
    options: list[object] = ["--data", data, "--image-size", 2 * SIZE, "--epochs", 2, "--layers", 1, 2]
    options += ["--device", "cpu", "--rates", 0.01]
    run_cli("segmentation", tmp_path / "encoder.safetensors", *options, "--out", tmp_path / "a")
    assert "mean IoU" in capsys.readouterr().out
    table = rows(tmp_path / "a" / "segmentation.csv")
    names = ("checkpoint", "random")
    expected = [(name, method, layer) for name in names for layer in "12" for method in segmentation.METHODS]
    expected += [(segmentation.COLORS, method, "0") for method in segmentation.METHODS]
    expected += [(segmentation.GUESS, "largest class", "0")]
    assert [(row["model"], row["method"], row["layer"]) for row in table] == expected
    for row in table:
        assert 0 <= float(row["miou_low"]) <= float(row["miou"]) <= float(row["miou_high"]) <= 1
        assert int(row["images"]) == 2
    # The pictures' grey is their class.
    by_name = {(row["model"], row["method"]): float(row["accuracy"]) for row in table}
    assert by_name[segmentation.COLORS, "retrieval"] > 0.1 + by_name[segmentation.GUESS, "largest class"]
    masks = [mask for mask in list(blobs(8, 0).values())[6:]]
    pixels = torch.cat([mask[mask != IGNORED] for mask in masks])
    assert by_name[segmentation.GUESS, "largest class"] == pytest.approx((pixels == 0).double().mean().item())
    of_classes = rows(tmp_path / "a" / "segmentation_classes.csv")
    assert [row["name"] for row in of_classes[:3]] == ["ground", "blob", "other"]
    assert len(of_classes) == 3 * len(table)
    assert (tmp_path / "a" / "segmentation.png").read_bytes().startswith(PNG)
    run_cli("segmentation", tmp_path / "encoder.safetensors", *options, "--out", tmp_path / "b")
    for name in ("segmentation.csv", "segmentation_classes.csv"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_generated_set_has_masks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic_coco, "IMAGES", {"train": 4, "val": 2})
    result = segmentation.evaluate(
        {"a": make_encoder()}, image_size=SIZE, epochs=1, held_out=0.25, rates=(0.01,), folder=tmp_path
    )
    assert list(result.records) == ["a", "random", segmentation.COLORS, segmentation.GUESS]
    assert result.names[0] == "background"
    dataset = CocoMasks(tmp_path / "materials_0", train=True)
    for index in range(len(dataset)):
        boxes, labels = dataset.boxes[index][1].values()
        mask = dataset[index].mask
        assert not (mask == IGNORED).any()
        for box, label in zip(boxes.long().tolist(), labels.tolist(), strict=True):
            inside = mask[box[1] : box[3], box[0] : box[2]] == label
            assert bool(inside.any(0).all())  # the box is tight: the object is in every row and column of it
            assert bool(inside.any(1).all())
        assert set(mask.unique().tolist()) == {0, *labels.tolist()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layers", 3], "layers: got 3, checkpoint takes 1 to 2"),
        (["--epochs", 0], "epochs: got 0"),
        (["--rates", -1], "rates: got"),
        (["--bank", 0], "bank: got 0"),
        (["--image-size", 20], "images: got"),
        (["--held-out", 0.01], "held_out: got 0.01"),
    ],
    ids=str,
)
def test_options_out_of_range_are_one_line(tmp_path: Path, options: list[Any], message: str) -> None:
    data = write_voc(tmp_path / "voc", blobs(4, 0), train=3)
    save_split_vit(tmp_path / "encoder.safetensors", make_encoder())
    said = refusal("segmentation", tmp_path / "encoder.safetensors", "--data", data, "--device", "cpu", *options)
    assert said.startswith(message)
