import os
import pickle
import shutil
import socket
from importlib.resources import files
from io import BytesIO
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from torchvision.datasets import CIFAR10

from ser_fast.data import loader, pictures
from ser_fast.data.loader import make_loader
from ser_fast.data.pictures import UnreadableImageError, decode
from ser_fast.data.sources import open_canvases, open_dataset

RED, GREEN, BLUE = (250, 10, 10), (10, 250, 10), (10, 10, 250)


def write_image(path: Path, color: tuple[int, int, int], size: tuple[int, int] = (20, 12)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


@pytest.fixture
def class_folder(tmp_path):
    """train/ with ant (red), bee (green), val/ with bee alone."""
    for number in range(5):
        write_image(tmp_path / f"train/ant/{number}.png", RED)
        write_image(tmp_path / f"train/bee/deep/{number}.png", GREEN)
    write_image(tmp_path / "val/bee/0.png", GREEN)
    (tmp_path / "train/ant/notes.txt").write_text("not an image, and not named as one")
    return tmp_path


@pytest.fixture
def broken_folder(tmp_path):
    """train/ and val/ with the same 12 files: 2 and 3 (adjacent) and 11 (the last) are unreadable."""
    train = tmp_path / "train"
    for number in range(12):
        write_image(train / f"{number:02}.png", (number, number, number))
    (train / "02.png").write_bytes((train / "02.png").read_bytes()[:60])
    (train / "03.png").write_bytes(b"")
    (train / "11.png").write_text("not an image")
    shutil.copytree(train, tmp_path / "val")
    return tmp_path


class Numbers:
    """A dataset of n items; item i is an image of value i."""

    def __init__(self, length):
        self.length, self.image_size, self.classes, self.skipped = length, 2, [], []

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return torch.full((3, 2, 2), index, dtype=torch.uint8), -index, index


class Watched(Numbers):
    """Its label is the process that loaded it; `loaded` are the items that this process loaded."""

    def __init__(self, length):
        super().__init__(length)
        self.loaded = []

    def __getitem__(self, index):
        self.loaded.append(index)
        return super().__getitem__(index)[0], os.getpid(), index


def epoch_indices(loader, epoch=0, start=0):
    loader.sampler.set_epoch(epoch)
    loader.sampler.set_start(start)
    return [batch.indices.tolist() for batch in loader]


# Photographs


def pixels_covered(dataset):
    covered = [torch.zeros(photograph.shape[1:], dtype=torch.bool) for photograph in dataset.source.photographs]
    for label, top, left, size in dataset.source.tiles:
        covered[label][top : top + size, left : left + size] = True
    return covered


@pytest.mark.parametrize("size", [32, 64, 100, 128, 224, 600])
def test_photos_share_no_pixel_between_train_and_held_out(size):
    train, held_out = (open_dataset("photos", train=part, image_size=size) for part in (True, False))
    assert train.classes == held_out.classes
    assert len(train.classes) == len(set(train.classes)) == 16
    for name, seen, unseen in zip(train.classes, pixels_covered(train), pixels_covered(held_out), strict=True):
        assert not (seen & unseen).any(), name
        assert seen.any(), name
        assert unseen.any(), name


def test_photos_counts_at_64():
    assert len(open_dataset("photos", train=True, image_size=64)) == 3752
    assert len(open_dataset("photos", train=False, image_size=64)) == 361


def test_photos_hold_out_is_spread_over_the_photograph():
    held_out = open_dataset("photos", train=False, image_size=64)
    corners = torch.tensor(
        [(top, left) for label, top, left, _ in held_out.source.tiles if held_out.classes[label] == "brick"]
    )
    assert (corners.amin(0) < 128).all()
    assert (corners.amax(0) > 512 - 2 * 102).all()


def test_photos_items_are_their_tiles():
    dataset = open_dataset("photos", train=True, image_size=64)
    for index in (0, 1000, len(dataset) - 1):
        image, label, item = dataset[index]
        tile = dataset.source.tiles[index]
        expected = dataset.source.photographs[tile.label][:, tile.top : tile.top + 64, tile.left : tile.left + 64]
        assert image.dtype == torch.uint8
        assert torch.equal(image, expected)
        assert (label, item) == (tile.label, index)
    dataset[0][0].zero_()
    assert dataset[0][0].any(), "an item must not be a view of the photograph"


def test_photos_are_the_files_in_the_wheel_and_need_no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("tried to download")

    import skimage.data._fetchers as fetchers

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(fetchers, "_fetch", refuse)
    dataset = open_dataset("photos", train=True, image_size=64)
    folder = Path(fetchers.__file__).parent
    for name in ("astronaut", "camera"):  # colour and grey
        pixels = np.asarray(Image.open(folder / f"{name}.png").convert("RGB"))
        assert torch.equal(
            dataset.source.photographs[dataset.classes.index(name)], torch.tensor(pixels).permute(2, 0, 1)
        )


def test_photos_beyond_128_are_as_large_as_a_photograph_allows():
    dataset = open_dataset("photos", train=True, image_size=224)
    sides = {dataset.classes[tile.label]: tile.size for tile in dataset.source.tiles}
    assert (sides["retina"], sides["rocket"], sides["page"]) == (224, 213, 128)
    assert dataset.source.longest == 224
    assert len(dataset) >= 256  # a batch
    assert dataset[0][0].shape == (3, 224, 224)
    assert dataset.source.read(0).pixels.shape == (3, 170, 170)


# Image folders


def test_folder_labels_follow_train(class_folder):
    train = open_dataset(f"folder:{class_folder}", train=True, image_size=8)
    assert train.classes == ["ant", "bee"]
    assert [train[i][1] for i in range(len(train))] == [0] * 5 + [1] * 5
    assert train[7][0].tolist() == torch.tensor(GREEN)[:, None, None].expand(3, 8, 8).tolist()
    held_out = open_dataset(f"folder:{class_folder}", train=False, image_size=8)
    assert held_out.classes == ["ant", "bee"]
    assert [held_out[i][1:] for i in range(len(held_out))] == [(1, 0)]


def test_folder_layouts(class_folder):
    classes_alone = open_dataset(f"folder:{class_folder}/train", train=True, image_size=8)
    assert (classes_alone.classes, len(classes_alone)) == (["ant", "bee"], 10)
    flat = open_dataset(f"folder:{class_folder}/train/ant", train=True, image_size=8)
    assert (flat.classes, len(flat), flat[3][1]) == ([], 5, -1)
    assert len(open_dataset(f"folder:{class_folder}/train/ant", train=False, image_size=8)) == 5, "held out: all of it"
    (class_folder / "val").rename(class_folder / "test")
    assert len(open_dataset(f"folder:{class_folder}", train=False, image_size=8)) == 1


def test_folders_of_classes_may_be_links(class_folder, tmp_path_factory):
    linked = tmp_path_factory.mktemp("linked")
    (linked / "train").mkdir()
    for name in ("ant", "bee"):
        (linked / "train" / name).symlink_to(class_folder / "train" / name)
    dataset, whole = (open_dataset(f"folder:{path}", train=True, image_size=8) for path in (linked, class_folder))
    assert [dataset[i][1] for i in range(10)] == [0] * 5 + [1] * 5
    (linked / "train/ant").unlink()
    (linked / "train/ant").symlink_to(linked / "train")
    (class_folder / "train/ant/0.png").unlink()
    with pytest.raises(UnreadableImageError, match="No such file"):
        whole[0]
    assert len(open_dataset(f"folder:{linked}", train=True, image_size=8)) == 5, "a circle ends"


def test_folder_resizes_the_shorter_side_and_crops_the_centre(tmp_path):
    image = np.zeros((32, 64, 3), np.uint8)
    image[:, 16:48] = RED  # the centre square
    Image.fromarray(image).save(tmp_path / "wide.png")
    Image.fromarray(image.transpose(1, 0, 2)).save(tmp_path / "tall.png")
    stripes = np.zeros((32, 32, 3), np.uint8)
    stripes[:, ::4] = 200
    Image.fromarray(stripes).save(tmp_path / "zebra.png")
    dataset = open_dataset(f"folder:{tmp_path}", train=True, image_size=8)
    tall, wide, zebra = (dataset[i][0] for i in range(3))
    assert torch.equal(tall, wide.transpose(1, 2))
    assert (wide[0, :, 1:-1] == RED[0]).all()
    # A quarter of the pixels are 200, and none of those a resize without antialiasing would look at.
    assert ((zebra[:, :, 1:-1].int() - 50).abs() <= 10).all()
    native = open_dataset(f"folder:{tmp_path}", train=True, image_size=32)
    assert torch.equal(native[2][0], torch.tensor(stripes).permute(2, 0, 1))


def save_grey(path):
    Image.new("L", (9, 9), 77).save(path)


def save_grey_16_bit(path):
    Image.fromarray(np.full((9, 9), 77 * 257, np.uint16)).save(path)


def save_rgba(path):
    Image.new("RGBA", (9, 9), (*RED, 128)).save(path)


def save_palette(path):
    image = Image.new("P", (9, 9), 1)
    image.putpalette([0, 0, 0, *RED])
    image.save(path, transparency=b"\x80\x40")


def save_cmyk(path):
    Image.new("RGB", (9, 9), RED).convert("CMYK").save(path)


def save_sideways(path):
    """Red above green once it is turned as EXIF orientation 6 says, clockwise by 90 degrees."""
    image = Image.new("RGB", (32, 32), RED)
    image.paste(GREEN, (16, 0, 32, 32))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(path, exif=exif, quality=95)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("save", "name", "top", "bottom"),
    [
        (save_grey, "grey.png", (77, 77, 77), (77, 77, 77)),
        (save_grey_16_bit, "grey16.png", (77, 77, 77), (77, 77, 77)),
        (save_grey_16_bit, "grey16.TIFF", (77, 77, 77), (77, 77, 77)),
        (save_rgba, "rgba.png", RED, RED),
        (save_palette, "palette.png", RED, RED),
        (save_cmyk, "cmyk.jpg", RED, RED),
        (save_sideways, "sideways.jpeg", RED, GREEN),
    ],
)
def test_folder_makes_every_format_8_bit_rgb(tmp_path, save, name, top, bottom):
    save(tmp_path / name)
    image, _, _ = open_dataset(f"folder:{tmp_path}", train=True, image_size=8)[0]
    assert (image.dtype, tuple(image.shape)) == (torch.uint8, (3, 8, 8))
    for row, color in ((1, top), (6, bottom)):
        # Lossless files are exact; JPEG is allowed 6 of 255 grey values, far from any mix-up of channels or rows.
        tolerance = 0 if Path(name).suffix in (".png", ".TIFF") else 6
        assert ((image[:, row].int() - torch.tensor(color)[:, None]).abs() <= tolerance).all()


def save_with_exif(image_format, exif):
    file = BytesIO()
    Image.new("RGB", (30, 20), RED).save(file, image_format, exif=exif)
    return file.getvalue()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_broken_exif_leaves_the_picture_readable(image_format):
    exif = Image.Exif()
    exif[0x0112], exif[0x8769] = 6, {0x9003: "2020:01:01"}
    whole = exif.tobytes()
    assert decode(save_with_exif(image_format, whole), "0").shape == (3, 30, 20)
    rng = np.random.default_rng(0)
    for _ in range(60):
        broken = bytearray(whole)
        for place in rng.integers(6, len(whole), size=rng.choice([1, 3, 20])):
            broken[place] = rng.integers(256)
        assert decode(save_with_exif(image_format, bytes(broken)), "0").shape in ((3, 30, 20), (3, 20, 30))


def test_damage_beside_the_pixels_of_a_png_is_passed_over():
    """A wrong checksum of a text, and one that unpacks to a gigabyte; but not one of the pixels."""
    file, texts = BytesIO(), PngImagePlugin.PngInfo()
    texts.add_text("comment", "x" * 2**21, zip=True)
    Image.new("P", (30, 20)).save(file, "PNG", pnginfo=texts, transparency=0)
    data = file.getvalue()
    with pytest.raises(ValueError, match=r"(?i)too large"):
        Image.open(BytesIO(data))
    assert decode(data, "0").shape == (3, 20, 30)
    at = data.index(b"zTXt") + 20
    assert decode(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :], "0").shape == (3, 20, 30)
    at = data.index(b"IDAT") + 6
    with pytest.raises(UnreadableImageError):
        decode(data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :], "0")


@pytest.mark.parametrize(
    ("source", "train", "message"),
    [
        ("folder:{}/missing", True, "got 'folder:.*and there is no folder .*missing"),
        ("folder:{}/empty", True, "got .*empty without a readable image among 0 files"),
        ("folder:{}/unreadable", True, "got .*unreadable without a readable image among 1 file"),
        ("folder:{}/train", False, "got .*train, takes a folder that holds one named val or test, or .* folder:OTHER"),
        (
            "folder:{}/loose",
            True,
            "got 2 images in .*loose beside the folder thumbs, takes images in class folders, or",
        ),
        ("folder:{}/many", True, "got .*many without a readable image among 3 files"),
        ("folder:{}/alone", True, "got .*alone, takes a folder that holds one named train"),
        ("folder:{}/strange", False, "wasp"),
        ("cifar10:{}/train", True, "takes a folder with cifar-10-batches-py/, or train/ and test/"),
        ("folder:", True, "'photos', 'folder:PATH', 'cifar10:PATH', 'tar:PATTERN'"),
        ("photos:{}", True, "'photos', 'folder:PATH', 'cifar10:PATH', 'tar:PATTERN'"),
        ("imagenet", True, "data: got 'imagenet', takes 'photos', 'folder:PATH', 'cifar10:PATH', 'tar:PATTERN'"),
    ],
)
def test_bad_source(class_folder, source, train, message):
    (class_folder / "empty").mkdir()
    (class_folder / "unreadable").mkdir()
    (class_folder / "unreadable/0.png").write_bytes(b"")
    write_image(class_folder / "alone/val/ant/0.png", RED)
    for name in ("loose/0.png", "loose/1.png", "loose/thumbs/0.png"):
        write_image(class_folder / name, RED)
    for number in range(3):
        (class_folder / "many").mkdir(exist_ok=True)
        (class_folder / f"many/{number}.png").write_text("not an image")
    write_image(class_folder / "strange/train/ant/0.png", RED)
    write_image(class_folder / "strange/val/wasp/0.png", RED)
    with pytest.raises(ValueError, match=message):
        open_dataset(source.format(class_folder), train=train, image_size=8)


def test_bad_image_size():
    with pytest.raises(ValueError, match="image_size: got 0, takes a positive number"):
        open_dataset("photos", train=True, image_size=0)


# Unreadable files


def test_reading_an_unreadable_file_names_it(broken_folder):
    dataset = open_dataset(f"folder:{broken_folder}", train=True, image_size=8)
    with pytest.raises(UnreadableImageError, match=r"03\.png.*UnidentifiedImageError"):
        dataset[3]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("train", [True, False])
def test_unreadable_files_are_skipped_counted_and_named(broken_folder, workers, train):
    dataset = open_dataset(f"folder:{broken_folder}", train=train, image_size=8)
    loader = make_loader(dataset, batch_size=4, train=train, workers=workers)
    for _ in range(2):  # a second epoch meets the same files: counted once
        batches = list(loader)
    for batch in batches:
        assert (batch.images == batch.indices.view(-1, 1, 1, 1)).all(), "an index is that of the image it comes with"
    named = {Path(path).name for batch in batches for path, _ in batch.skipped}
    assert named == {"02.png", "03.png", "11.png"}
    assert sorted((Path(path).name, reason.split(":")[0]) for path, reason in dataset.skipped) == [
        ("02.png", "OSError"),
        ("03.png", "UnidentifiedImageError"),
        ("11.png", "UnidentifiedImageError"),
    ]
    seen = [index for batch in batches for index in batch.indices.tolist()]
    if train:
        assert [len(batch.images) for batch in batches] == [4, 4, 4]
        assert sorted(seen) == [0, 0, 1, 4, 4, 4, 5, 6, 7, 8, 9, 10], "the next readable file takes the place"
    else:
        assert seen == [0, 1, 4, 5, 6, 7, 8, 9, 10], "in evaluation nothing counts twice"


def test_nothing_left_to_read(broken_folder):
    dataset = open_dataset(f"folder:{broken_folder}", train=True, image_size=8)
    shutil.rmtree(broken_folder / "train")
    with pytest.raises(ValueError, match="got 12 images, none of which can be read any more"):
        next(iter(make_loader(dataset, batch_size=4, train=True)))
    batch = next(iter(make_loader(dataset, batch_size=4, train=False)))
    assert batch.images.shape == (0, 3, 8, 8)
    assert len(batch.skipped) == 4


# CIFAR-10


@pytest.fixture
def cifar_batches(tmp_path, monkeypatch):
    """torchvision's layout with 6 training and 2 test images, whose pixels count up from 0."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = np.arange(8 * 3072, dtype=np.int64).astype(np.uint8).reshape(8, 3072)
    for name, rows in (("data_batch_1", slice(0, 3)), ("data_batch_2", slice(3, 6)), ("test_batch", slice(6, 8))):
        labels = list(range(8))[rows]
        (folder / name).write_bytes(pickle.dumps({"data": pixels[rows], "labels": labels}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class {i}" for i in range(10)]}))
    # A checksum of None asks torchvision for the file alone.
    monkeypatch.setattr(CIFAR10, "train_list", [["data_batch_1", None], ["data_batch_2", None]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", None]])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": None})
    return tmp_path


def test_cifar10_batches(cifar_batches):
    pixels = torch.arange(8 * 3072).to(torch.uint8).view(8, 3, 32, 32)
    train, held_out = (open_dataset(f"cifar10:{cifar_batches}", train=part, image_size=32) for part in (True, False))
    assert (len(train), len(held_out)) == (6, 2)
    assert train.classes == [f"class {i}" for i in range(10)]
    for dataset, index, number in ((train, 4, 4), (held_out, 1, 7)):
        image, label, item = dataset[index]
        assert torch.equal(image, pixels[number])
        assert (label, item) == (number, index)
    assert open_dataset(f"cifar10:{cifar_batches}", train=True, image_size=48)[0][0].shape == (3, 48, 48)


def test_cifar10_batches_damaged(cifar_batches):
    (cifar_batches / "cifar-10-batches-py/data_batch_2").unlink()
    with pytest.raises(ValueError, match="cifar-10-batches-py, incomplete or damaged"):
        open_dataset(f"cifar10:{cifar_batches}", train=True, image_size=32)


def test_cifar10_image_folder(class_folder):
    (class_folder / "val").rename(class_folder / "test")
    train, held_out = (open_dataset(f"cifar10:{class_folder}", train=part, image_size=32) for part in (True, False))
    assert (len(train), len(held_out), held_out[0][1]) == (10, 1, 1)


# Canvases


def test_a_canvas_is_the_whole_picture_with_its_aspect(tmp_path):
    image = np.zeros((30, 90, 3), np.uint8)
    image[:, :30], image[:, 60:] = RED, BLUE
    Image.fromarray(image).save(tmp_path / "wide.png")
    dataset = open_canvases(f"folder:{tmp_path}", train=True, image_size=14, canvas=24)
    canvas, label, index, aspect = dataset[0]
    assert (tuple(canvas.shape), canvas.dtype, label, index, aspect) == ((3, 24, 24), torch.uint8, -1, 0, 3.0)
    assert canvas[:, 12, 2].tolist() == list(RED)
    assert canvas[:, 12, 12].tolist() == [0, 0, 0]
    assert canvas[:, 12, 22].tolist() == list(BLUE)
    batch = next(iter(make_loader(dataset, batch_size=1, train=True)))
    assert batch.images.shape == (1, 3, 24, 24)
    assert batch.aspects.tolist() == [3.0]
    assert next(iter(make_loader(Numbers(2), batch_size=2, train=True))).aspects.tolist() == [1.0, 1.0]


def test_sides_of_canvases(class_folder, cifar_batches):
    def side(source, image_size, canvas=None):
        return open_canvases(source, train=True, image_size=image_size, canvas=canvas).image_size

    assert side(f"folder:{class_folder}", 224) == 512
    assert side(f"folder:{class_folder}", 224, 384) == 384
    assert side(f"cifar10:{cifar_batches}", 32) == 32  # no picture has more pixels
    assert side(f"cifar10:{cifar_batches}", 224) == 32
    assert side("photos", 64) == 64
    assert side("photos", 224) == 224
    with pytest.raises(ValueError, match="canvas: got 0, takes a positive number"):
        side("photos", 64, 0)


def test_the_crop_of_evaluations_is_a_share_of_the_picture(tmp_path):
    image = np.zeros((64, 128, 3), np.uint8)
    image[4:60, 36:92] = RED  # .875 of the shorter side, about the center
    Image.fromarray(image).save(tmp_path / "0.png")
    cropped = open_dataset(f"folder:{tmp_path}", train=True, image_size=56, crop_pct=0.875)[0][0]
    assert (cropped[0] == RED[0]).all()
    assert (open_dataset(f"folder:{tmp_path}", train=True, image_size=64)[0][0][0] == 0).any()
    with pytest.raises(ValueError, match=r"crop_pct: got 1\.5, takes a number in"):
        open_dataset("photos", train=True, image_size=64, crop_pct=1.5)


# Hostile files


@pytest.mark.parametrize("size", [(1, 65000), (65000, 1), (3, 9000)])
def test_long_pictures_are_cheap(tmp_path, monkeypatch, size):
    Image.new("RGB", size, GREEN).save(tmp_path / "0.png")
    largest, resize = [], pictures.transforms.resize

    def measured(*args, **options):
        out = resize(*args, **options)
        largest.append(out.numel())
        return out

    monkeypatch.setattr(pictures.transforms, "resize", measured)
    square = open_dataset(f"folder:{tmp_path}", train=True, image_size=224)[0][0]
    canvas, _, _, aspect = open_canvases(f"folder:{tmp_path}", train=True, image_size=224)[0]
    assert (square == torch.tensor(GREEN)[:, None, None]).all()
    assert (canvas == torch.tensor(GREEN)[:, None, None]).all()
    assert aspect == size[0] / size[1]
    assert max(largest) <= 8 * 3 * 512**2


def test_a_picture_of_too_many_pixels_is_unreadable(tmp_path):
    Image.new("RGB", (100, 100)).save(tmp_path / "0.png")
    Image.new("RGB", (101, 100)).save(tmp_path / "1.png")
    dataset = open_canvases(f"folder:{tmp_path}", train=True, image_size=8, max_pixels=10_000)
    dataset[0]
    with pytest.raises(UnreadableImageError, match="101 x 100 pixels, more than max_pixels = 10000"):
        dataset[1]
    with pytest.raises(ValueError, match="max_pixels: got 0, takes 1 to"):
        open_canvases("photos", train=True, image_size=8, max_pixels=0)


def test_only_regular_image_files_are_read(tmp_path):
    write_image(tmp_path / "0.png", RED)
    os.mkfifo(tmp_path / "1.jpg")
    (tmp_path / "2.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    (tmp_path / "3.jpg").symlink_to("/dev/zero")
    dataset = open_dataset(f"folder:{tmp_path}", train=True, image_size=8)
    assert len(dataset) == 4
    batch = next(iter(make_loader(dataset, batch_size=4, train=True)))
    assert batch.indices.tolist() == [0, 0, 0, 0]
    reasons = {Path(path).name: reason for path, reason in batch.skipped}
    assert reasons["1.jpg"] == "OSError: not a regular file"
    assert reasons["2.jpg"].startswith("UnidentifiedImageError")
    assert reasons["3.jpg"] == "OSError: not a regular file"


def test_linked_folders_are_followed_once(tmp_path):
    write_image(tmp_path / "elsewhere/deep/0.png", RED)
    write_image(tmp_path / "data/ant/1.png", RED)
    (tmp_path / "data/ant/circle").symlink_to(tmp_path / "data/ant")
    (tmp_path / "data/ant/one").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/ant/two").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/bee").symlink_to(tmp_path / "elsewhere")
    dataset = open_dataset(f"folder:{tmp_path / 'data'}", train=True, image_size=8)
    found = [(str(Path(path).relative_to(tmp_path / "data")), label) for path, label in dataset.source.files]
    assert found == [("ant/1.png", 0), ("bee/deep/0.png", 1)], "a class folder is followed as that class alone"


def test_both_decoders_give_the_same_picture(tmp_path):
    """Torchvision's and PIL's, of a photograph as JPEG and as PNG, turned by EXIF and in grey."""
    with files("skimage").joinpath("data", "coffee.png").open("rb") as file:
        photograph = Image.open(file).convert("RGB").resize((201, 133))
    exif = Image.Exif()
    exif[0x0112] = 6
    photograph.save(tmp_path / "0.jpg", quality=90, exif=exif)
    photograph.save(tmp_path / "1.png")
    photograph.convert("L").save(tmp_path / "2.jpg")
    for name in ("0.jpg", "1.png", "2.jpg"):
        ours = pictures.read_image(tmp_path / name)
        with Image.open(tmp_path / name) as image:
            theirs = pictures.to_rgb(image)
        assert ours.shape == theirs.shape
        assert (ours.int() - theirs.int()).abs().max() <= 2, name


# Order


def test_order_depends_on_seed_and_epoch_alone():
    def orders(seed, workers=0):
        loader = make_loader(Numbers(23), batch_size=4, train=True, seed=seed, workers=workers)
        return [epoch_indices(loader, epoch) for epoch in (0, 1, 2, 1)]

    first, second, third, second_again = orders(0)
    assert second == second_again
    assert len({str(order) for order in (first, second, third, *orders(1)[:3])}) == 6
    assert orders(0, workers=2) == [first, second, third, second]
    for order in (first, second):
        flat = list(chain(*order))
        assert len(flat) == len(set(flat)) == 20, "whole batches of different items"


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("world_size", [2, 4])
def test_batches_are_the_same_for_any_number_of_ranks(train, world_size):
    options = {"batch_size": 8, "train": train, "seed": 3}
    whole = epoch_indices(make_loader(Numbers(29), **options), epoch=5)
    ranks = [
        epoch_indices(make_loader(Numbers(29), **options, rank=rank, world_size=world_size), epoch=5)
        for rank in range(world_size)
    ]
    assert whole == [list(chain(*parts)) for parts in zip(*ranks, strict=True)]
    if not train:
        assert list(chain(*whole)) == list(range(29))


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_in_the_middle_of_an_epoch(workers):
    dataset = Watched(40)
    loader = make_loader(dataset, batch_size=4, train=True, seed=1, workers=workers)
    whole = epoch_indices(loader, epoch=2)
    dataset.loaded.clear()
    assert epoch_indices(loader, epoch=2, start=7) == whole[7:]
    assert len(loader) == 3
    if workers == 0:
        assert dataset.loaded == list(chain(*whole[7:])), "images before the start are not loaded"
    assert epoch_indices(loader, epoch=2, start=10) == []
    loader.sampler.set_epoch(3)
    assert len(loader) == len(list(loader)) == 10, "a new epoch begins at its beginning"
    with pytest.raises(ValueError, match="got 11"):
        loader.sampler.set_start(11)


def test_workers_are_kept_between_epochs():
    loader = make_loader(Watched(8), batch_size=4, train=True, workers=1)
    (worker,) = {label for _ in range(2) for batch in loader for label in batch.labels.tolist()}
    assert worker != os.getpid()


def test_loading_leaves_the_global_random_state_alone():
    state = torch.get_rng_state()
    list(make_loader(Numbers(8), batch_size=4, train=True))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 11}, "batch_size: got 11, takes the 10 images"),
        ({"batch_size": 0}, "batch_size: got 0, takes a positive multiple of world_size=1"),
        ({"batch_size": 4, "world_size": 3}, "batch_size: got 4, takes a positive multiple of world_size=3"),
        ({"batch_size": 4, "world_size": 2, "rank": 2}, "rank: got 2 of world_size=2"),
        ({"batch_size": 4, "seed": -1}, "seed: got -1"),
        ({"batch_size": 4, "workers": -1}, "workers: got -1"),
    ],
)
def test_bad_loader_options(options, message):
    with pytest.raises(ValueError, match=message):
        make_loader(Numbers(10), train=True, **options)


# Batches


def test_batch_holds_stacked_items():
    (batch,) = make_loader(Numbers(5), batch_size=8, train=False)
    assert batch.images.dtype == torch.uint8
    assert torch.equal(batch.images[:, 2, 1, 1], torch.arange(5, dtype=torch.uint8))
    assert torch.equal(batch.labels, -torch.arange(5))
    assert torch.equal(batch.indices, torch.arange(5))
    assert batch.skipped == []
    moved = batch.to("meta", non_blocking=True)
    assert [t.device.type for t in (moved.images, moved.labels, moved.indices)] == ["meta"] * 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory needs CUDA")
@pytest.mark.parametrize("workers", [0, 1])
def test_batches_are_pinned_and_reach_the_device(workers):
    (batch,) = make_loader(Numbers(5), batch_size=8, train=False, workers=workers)
    assert all(t.is_pinned() for t in (batch.images, batch.labels, batch.indices))
    assert torch.equal(batch.to("cuda", non_blocking=True).indices.cpu(), torch.arange(5))


@pytest.mark.slow
def test_datasets_reach_workers_that_do_not_fork(broken_folder):
    dataset = open_dataset(f"folder:{broken_folder}", train=True, image_size=8)
    loader = make_loader(dataset, batch_size=12, train=True, workers=1)
    loader.multiprocessing_context = "spawn"
    (batch,) = loader
    assert len(batch.images) == 12
    assert len(dataset.skipped) == 3


@pytest.mark.parametrize("scale", [1.0, 255.0])
def test_floating_point_tiff_is_read_by_its_range(scale: float, tmp_path: Path) -> None:
    values = np.linspace(0, scale, 64, dtype=np.float32).reshape(8, 8)
    Image.fromarray(values, mode="F").save(tmp_path / "a.tiff")
    pixels = decode((tmp_path / "a.tiff").read_bytes(), "a.tiff", max_pixels=100)
    expected = torch.from_numpy((values / scale * 255).round()).to(torch.uint8)
    assert torch.equal(pixels, expected.expand(3, 8, 8))


def test_a_worker_stacks_its_batch_in_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = open_dataset("photos", train=True, image_size=32)
    reader = make_loader(dataset, batch_size=4, train=True).dataset
    here = reader[[0, 1, 2, 3]]
    monkeypatch.setattr(loader, "get_worker_info", lambda: SimpleNamespace(id=0))
    monkeypatch.setattr(reader, "places", torch.full((1,), -1))
    there = reader[[0, 1, 2, 3]]
    assert (here.images.is_shared(), there.images.is_shared()) == (False, True)
    assert torch.equal(here.images, there.images)
