"""Sources that are no folders: shards, Hugging Face data sets, a function of the user's; and how files are listed."""

import io
import json
import os
import pickle
import shutil
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from ser_fast.data import shard_index
from ser_fast.data import shards as shard_module
from ser_fast.data.hugging_face import HuggingFace
from ser_fast.data.listing import expand_pattern, list_files, split_options
from ser_fast.data.loader import make_loader
from ser_fast.data.pictures import UnreadableImageError
from ser_fast.data.python_function import PythonFunction
from ser_fast.data.shards import Sample, TarShards
from ser_fast.data.sources import open_dataset, open_source


def png(value: int, size: tuple[int, int] = (9, 6)) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", size, (value, value, value)).save(data, "png")
    return data.getvalue()


def gray_of(source, index: int) -> int:
    """The value of a picture of one color."""
    (value,) = source.read(index).pixels.unique().tolist()
    return value


def read_all(source) -> list[tuple[int, int]]:
    """(value, label) of each picture."""
    return [(gray_of(source, i), source.read(i).label) for i in range(len(source))]


# Listing


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_files_are_listed_folder_by_folder(tmp_path):
    touch(
        *(
            tmp_path / name
            for name in ("b/2.PNG", "b/1.png", "a-x/1.png", "a/z.png", "a/deep/0.png", "0.png", "a/x.txt")
        )
    )
    listed = [str(Path(path).relative_to(tmp_path)) for path in list_files(tmp_path, [".png"])]
    assert listed == ["0.png", "a/z.png", "a-x/1.png", "a/deep/0.png", "b/1.png", "b/2.PNG"]


def test_links_are_followed_once_and_never_in_a_circle(tmp_path):
    touch(tmp_path / "set/a/0.png", tmp_path / "set/b/1.png", tmp_path / "pool/2.png")
    for link, target in (("set/a/up", "set"), ("set/a/pool", "pool"), ("set/b/again", "pool"), ("set/b/self", "set/b")):
        (tmp_path / link).symlink_to(tmp_path / target)
    listed = [str(Path(path).relative_to(tmp_path / "set")) for path in list_files(tmp_path / "set", [".png"])]
    assert listed == ["a/0.png", "a/pool/2.png", "b/1.png"]
    (tmp_path / "whole").symlink_to(tmp_path / "set")
    assert len(list_files(tmp_path / "whole", [".png"])) == 3
    known = [tmp_path / "set", tmp_path / "set/b"]
    assert len(list_files(tmp_path / "set/a", [".png"], known=known)) == 2


def test_hidden_files_and_folders_are_left_out(tmp_path):
    touch(*(tmp_path / name for name in ("a/0.png", "a/.thumbnails/0.png", "a/._0.png", ".trash/a/1.png", "a/b/2.png")))
    listed = [str(Path(path).relative_to(tmp_path)) for path in list_files(tmp_path, [".png"])]
    assert listed == ["a/0.png", "a/b/2.png"]


def test_what_is_no_file_is_listed_but_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "lost.png").symlink_to(tmp_path / "nowhere")
    assert list_files(tmp_path, [".png"]) == [str(tmp_path / "lost.png"), str(tmp_path / "pipe.png")]


def test_listing_decodes_and_opens_nothing(tmp_path, monkeypatch):
    touch(*(tmp_path / f"{part}/{i % 3}/{i}.jpg" for i in range(60) for part in ("train", "val")))

    def refuse(*args, **kwargs):
        raise AssertionError("opened a picture")

    monkeypatch.setattr("ser_fast.data.sources.read_image", refuse)
    for train in (True, False):
        assert len(open_source(f"folder:{tmp_path}", train=train, image_size=8)) == 60


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("s-{0..2}.tar", ["s-0.tar", "s-1.tar", "s-2.tar"]),
        ("s-{08..11}.tar", ["s-08.tar", "s-09.tar", "s-10.tar", "s-11.tar"]),
        ("{b,a}-{0..1}.tar", ["b-0.tar", "b-1.tar", "a-0.tar", "a-1.tar"]),
        ("plain.tar", ["plain.tar"]),
        ("there-*.tar", ["there-1.tar", "there-2.tar"]),
        ("there-?.tar", ["there-1.tar", "there-2.tar"]),
        ("{there-1,there-*}.tar", ["there-1.tar", "there-2.tar"]),
        ("none-*.tar", []),
    ],
)
def test_patterns(tmp_path, pattern, names):
    touch(tmp_path / "there-2.tar", tmp_path / "there-1.tar")
    assert expand_pattern(str(tmp_path / pattern)) == [str(tmp_path / name) for name in names]


def test_options_behind_a_location():
    assert split_options("", "a/b", ["x"]) == ("a/b", {})
    assert split_options("", "a/b-?.tar", ["x"]) == ("a/b-?.tar", {})
    assert split_options("", "a/b-?.tar?x=c-?.tar", ["x"]) == ("a/b-?.tar", {"x": "c-?.tar"})
    assert split_options("", "a?x=1&y=2", ["x", "y"]) == ("a", {"x": "1", "y": "2"})
    for location, wrong in (("a?z=1", "z=1"), ("a?x=", "x=")):
        with pytest.raises(ValueError, match=rf"data: got '{wrong}' in 'hf:a', takes x, y with a value"):
            split_options("hf:a", location, ["x", "y"])


# Shards


def write_tar(path: Path, members: dict[str, bytes | str], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, data in members.items():
            data = data.encode() if isinstance(data, str) else data
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def samples(numbers, label=lambda number: {"cls": str(number % 3)}) -> dict[str, bytes | str]:
    return {
        f"part.0/{number:04}.{extension}": data
        for number in numbers
        for extension, data in {"png": png(number), **label(number)}.items()
    }


@pytest.fixture
def shards(tmp_path):
    """Two training shards of three pictures each, and one held-out of two."""
    write_tar(tmp_path / "birds-train-00.tar", samples(range(3)))
    write_tar(tmp_path / "birds-train-01.tar", samples(range(3, 6)))
    write_tar(tmp_path / "birds-val-0.tar", samples(range(10, 12)))
    return tmp_path


@pytest.mark.parametrize(
    "location",
    ["{}/birds-train-{{00..01}}.tar?val={}/birds-val-0.tar", "{}/birds-train-*.tar?val={}/birds-val-?.tar", "{}"],
)
def test_shards(shards, location):
    source = "tar:" + location.format(shards, shards)
    train, held_out = (open_source(source, train=part, image_size=8) for part in (True, False))
    assert read_all(train) == [(n, n % 3) for n in range(6)]
    assert read_all(held_out) == [(n, n % 3) for n in range(10, 12)]
    assert train.classes == held_out.classes == ["0", "1", "2"]
    assert train.read(4).pixels.shape == (3, 6, 9)
    assert open_dataset(source, train=True, image_size=8)[4][0].shape == (3, 8, 8)
    assert train.digest() == open_source(source, train=True, image_size=8).digest() != held_out.digest()


def test_a_shards_index_is_used_while_it_fits(tmp_path, monkeypatch):
    monkeypatch.setenv("SER_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(shard_index, "_LEAST", 1)
    scanned, scan = [], shard_module._scan
    monkeypatch.setattr(shard_module, "_scan", lambda path: scanned.append(path) or scan(path))

    def listed(path):
        shard_module._list.cache_clear()  # as in another process
        return shard_module._list(*shard_module._check(str(path)))

    shard = tmp_path / "a.tar"
    write_tar(shard, {"0.png": png(1), "0.cls": b"ant", "1.png": png(2)})
    first = listed(shard)
    assert listed(shard) == first == [Sample("0.png", 512, len(png(1)), "ant"), first[1]]
    assert len(scanned) == 1
    (index,) = (tmp_path / "cache" / "shards").iterdir()
    whole = index.read_text()
    for damaged in ("", "[1]", whole[:-9], whole.replace("512", "513"), whole.replace('"samples"', '"sample"')):
        index.write_text(damaged)
        before = len(scanned)
        assert listed(shard) == first
        assert len(scanned) == before + 1
        assert index.read_text() == whole, "made anew"
    write_tar(shard, {"1.png": png(3), "1.cls": b"bee"})
    assert [sample.label for sample in listed(shard)] == ["bee"]
    (tmp_path / "cache2").write_text("no folder")
    monkeypatch.setenv("SER_FAST_CACHE", str(tmp_path / "cache2"))
    assert [sample.label for sample in listed(shard)] == ["bee"], "where nothing can be kept"


def test_shards_in_folders_of_their_part(shards):
    for name in ("train-00", "train-01", "val-0"):
        part = name.partition("-")[0]
        (shards / "set" / part).mkdir(parents=True, exist_ok=True)
        (shards / f"birds-{name}.tar").rename(shards / "set" / part / f"{name[-1]}.tar")
    train, held_out = (TarShards("", str(shards / "set"), train=part) for part in (True, False))
    assert (len(train), len(held_out)) == (6, 2)


@pytest.mark.parametrize(
    ("label", "classes", "labels"),
    [
        (lambda n: {"json": json.dumps({"caption": "x", "label": n})}, ["0", "1", "2"], [0, 1, 2]),
        (lambda n: {"json": json.dumps({"class": "cab"[n]})}, ["a", "b", "c"], [2, 0, 1]),
        (lambda n: {"cls": "cab"[n], "json": "{"}, ["a", "b", "c"], [2, 0, 1]),
        (lambda n: {"txt": "a bird", "json": "[1]"}, [], [-1, -1, -1]),
        (lambda n: {"seg.png": png(200 + n), "CLS": f"{n}\n"}, ["0", "1", "2"], [0, 1, 2]),
    ],
)
def test_labels_of_shards(tmp_path, label, classes, labels):
    members = {"__info__.json": "{}", **samples(range(3), label), "extra.txt": "no picture"}
    train = TarShards("", str(write_tar(tmp_path / "0.tar", members)), train=True)
    assert (train.classes, read_all(train)) == (classes, list(enumerate(labels)))


def test_names_of_numbered_classes(shards):
    (shards / "classnames.txt").write_text("ant\nbee\ncat\ndog\n")
    assert TarShards("", str(shards), train=False).classes == ["ant", "bee", "cat", "dog"]
    (shards / "classnames.txt").write_text("ant\nbee\n")
    with pytest.raises(ValueError, match=r"data: got 2 lines in .*classnames.txt, takes one for each of the 3 classes"):
        TarShards("", str(shards), train=True)


def test_every_format_of_tar(tmp_path):
    """Long names (GNU and PAX), folders and links among the members."""
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT):
        path = tmp_path / f"{form}.tar"
        with tarfile.open(path, "w", format=form) as archive:
            folder = tarfile.TarInfo("d" * 60)
            folder.type = tarfile.DIRTYPE
            archive.addfile(folder)
            for n in range(3):
                info = tarfile.TarInfo(f"{'d' * 60}/{'n' * (90 if form == tarfile.USTAR_FORMAT else 200)}{n}.png")
                info.size = len(png(n))
                archive.addfile(info, io.BytesIO(png(n)))
            link = tarfile.TarInfo("link.png")
            link.type, link.linkname = tarfile.SYMTYPE, "x"
            archive.addfile(link)
        assert read_all(TarShards("", str(path), train=True)) == [(0, -1), (1, -1), (2, -1)]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1400])


def overwrite(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:1024] + b"?" * 512 + data[1536:])


def compress(path: Path) -> None:
    members = samples(range(3))
    path.unlink()
    write_tar(path, members, "w:gz")


@pytest.mark.parametrize("damage", [cut, overwrite, compress])
def test_damaged_shards_are_named(shards, damage):
    damage(shards / "birds-train-01.tar")
    with pytest.raises(ValueError, match=r"^data: got the shard .*train-01\.tar, compressed or damaged, takes[^\n]*$"):
        TarShards("", str(shards), train=True)


@pytest.mark.parametrize(
    ("location", "train", "message"),
    [
        ("{}/none-*.tar", True, "got 'tar:here', and there is no such shard"),
        ("{}/none-{{0..1}}.tar", True, "got the shard .*none-0.tar, which can't be opened: No such file"),
        ("{}/birds-train-00.tar", False, r"without held-out shards, takes tar:PATTERN\?val=PATTERN, or another source"),
        ("{}/empty.tar", True, "without a picture in 1 shards, takes .jpg"),
        ("{}/partly.tar", True, "got no label for picture 1 of 'tar:here', takes one of its 1 training classes"),
        ("{}/birds-train-00.tar?val={}/odd.tar", False, "got label 7 for picture 0 of 'tar:here'"),
        ("{}/birds-train-{{3..1}}.tar", True, "takes a range from the lower number to the higher"),
    ],
)
def test_bad_shards(shards, location, train, message):
    write_tar(shards / "empty.tar", {"a.txt": "x"})
    write_tar(shards / "partly.tar", samples(range(2), lambda n: {"cls": "0"} if n == 0 else {}))
    write_tar(shards / "odd.tar", samples([1], lambda n: {"cls": "7"}))
    with pytest.raises(ValueError, match=message):
        TarShards("tar:here", location.format(shards, shards), train=train)


def test_a_pipe_is_no_shard(tmp_path):
    os.mkfifo(tmp_path / "train.tar")
    with pytest.raises(ValueError, match=r"data: got the shard .*train\.tar, which is no regular file"):
        TarShards("", str(tmp_path), train=True)


def sparse_tar(path, name, size):
    """One member of `size` zeros, that take no room on the disk."""
    member = tarfile.TarInfo(name)
    member.size = size
    with path.open("wb") as file:
        file.write(member.tobuf(tarfile.GNU_FORMAT))
        file.truncate(tarfile.BLOCKSIZE + -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE + 2 * tarfile.BLOCKSIZE)


def test_members_that_are_too_large_are_not_read(tmp_path):
    sparse_tar(tmp_path / "train.tar", "0.png", 2**36)
    with pytest.raises(UnreadableImageError, match="68719476736 bytes for 100 pixels at most"):
        TarShards("", str(tmp_path), train=True, max_pixels=100).read(0)
    sparse_tar(tmp_path / "train.tar", "0.cls", 2**36)
    with (tmp_path / "train.tar").open("r+b") as file, tarfile.open(fileobj=file, mode="a:") as archive:
        archive.addfile(tarfile.TarInfo("0.png"))
    with pytest.raises(ValueError, match=r"train\.tar, .*: 0\.cls, which holds a label, has 68719476736 bytes"):
        TarShards("", str(tmp_path), train=True)


# Hugging Face


@pytest.fixture
def hugging_face(tmp_path, monkeypatch):
    """The library, which reaches nothing and keeps its files in tmp_path, and a maker of data sets."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()

    def make(values, columns=("img", "label"), pictures=None):
        features = {columns[0]: datasets.Image(), "text": datasets.Value("string")}
        rows = {columns[0]: pictures or [{"bytes": png(v), "path": None} for v in values], "text": ["x"] * len(values)}
        for column in columns[1:]:
            features[column] = datasets.ClassLabel(names=["ant", "bee", "cat"])
            rows[column] = [v % 3 for v in values]
        return datasets.Dataset.from_dict(rows, features=datasets.Features(features))

    make.splits = datasets.DatasetDict
    return make


@pytest.mark.parametrize("form", ["disk", "parquet", "one split", "file"])
def test_hugging_face(tmp_path, hugging_face, form):
    train, held_out = hugging_face(range(6)), hugging_face(range(10, 12))
    source = f"hf:{tmp_path}/set"
    if form == "disk":
        hugging_face.splits(train=train, test=held_out).save_to_disk(tmp_path / "set")
    elif form == "parquet":
        (tmp_path / "set").mkdir()
        train.to_parquet(tmp_path / "set/train-00000-of-00001.parquet")
        held_out.to_parquet(tmp_path / "set/test-00000-of-00001.parquet")
    elif form == "one split":
        train.save_to_disk(tmp_path / "set")
    else:
        train.to_parquet(tmp_path / "set.parquet")
        source += ".parquet"
    opened = open_source(source, train=True, image_size=8)
    assert opened.classes == ["ant", "bee", "cat"]
    assert read_all(opened) == [(n, n % 3) for n in range(6)]
    assert opened.read(0).pixels.shape == (3, 6, 9)
    digests = {opened.digest(), open_source(source, train=True, image_size=8).digest()}
    assert len(digests) == 1
    if form in ("disk", "parquet"):
        other = open_source(source, train=False, image_size=8)
        assert read_all(other) == [(10, 1), (11, 2)]
        assert other.digest() not in digests
        assert read_all(open_source(source + "?val=train", train=False, image_size=8)) == read_all(opened)
    else:
        with pytest.raises(ValueError, match=r"with the splits train, takes val or validation or test, or \?val=SPLIT"):
            open_source(source, train=False, image_size=8)


def test_columns_of_hugging_face_are_chosen_by_type_or_name(tmp_path, hugging_face):
    hugging_face(range(3), ("img", "fine", "coarse")).save_to_disk(tmp_path / "two")
    with pytest.raises(ValueError, match=r"with the label columns fine, coarse, takes one of them: \?label=fine"):
        HuggingFace("hf:two", str(tmp_path / "two"), train=True)
    assert HuggingFace("", f"{tmp_path}/two?label=coarse&image=img", train=True).label == "coarse"
    with pytest.raises(ValueError, match="got image=text in 'hf:two', takes a column of the type Image: img"):
        HuggingFace("hf:two", f"{tmp_path}/two?image=text", train=True)
    hugging_face(range(3), ("img",)).save_to_disk(tmp_path / "none")
    unlabelled = HuggingFace("", str(tmp_path / "none"), train=True)
    assert (unlabelled.classes, unlabelled.read(2).label) == ([], -1)
    type(unlabelled.rows).from_dict({"n": [1, 2, 3]}).save_to_disk(tmp_path / "bare")
    with pytest.raises(ValueError, match="with the columns n, takes one of the type Image among them"):
        HuggingFace("hf:bare", str(tmp_path / "bare"), train=True)


def test_pictures_that_hugging_face_has_the_paths_of(tmp_path, hugging_face):
    for number in range(3):
        touch(path := tmp_path / f"set/train/{'ab'[number % 2]}/{number}.png")
        path.write_bytes(png(number))
    source = HuggingFace("", str(tmp_path / "set"), train=True)
    assert (sorted(read_all(source)), source.classes) == ([(0, 0), (1, 1), (2, 0)], ["a", "b"])
    digest = source.digest()
    shutil.rmtree(tmp_path / "set/train/b")
    assert source.digest() == digest
    with pytest.raises(UnreadableImageError, match=r"1\.png.*No such file"):
        read_all(source)


@pytest.mark.parametrize("location", ["nobody/no-such-set", "{}/missing", "{}/broken", "{}/broken/0.parquet"])
def test_what_hugging_face_cannot_open_is_said_in_a_line(tmp_path, hugging_face, location):
    touch(tmp_path / "broken/0.parquet")
    with pytest.raises(
        ValueError, match=r"^data: got 'hf:x', takes a folder of save_to_disk, Parquet files, or [^\n]*$"
    ):
        HuggingFace("hf:x", location.format(tmp_path), train=True)


@pytest.mark.parametrize("asked", [True, False])
def test_a_hub_that_is_not_reached_is_asked_once(hugging_face, monkeypatch, asked):
    requests = []

    class Session:
        def head(self, url, timeout):
            requests.append(url)
            raise OSError("no route")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", not asked)
    monkeypatch.setattr("huggingface_hub.utils.get_session", Session)
    monkeypatch.setattr("socket.getaddrinfo", None)  # nothing else asks
    reason = r"https://huggingface\.co can't be reached \(no route\)" if asked else "HF_HUB_OFFLINE is set"
    with pytest.raises(ValueError, match=rf"^data: got 'hf:x', [^\n]*: {reason}, and it is not in the cache$"):
        HuggingFace("hf:x", "nobody/no-such-set", train=True)
    assert requests == ["https://huggingface.co"] * asked
    import datasets
    import huggingface_hub

    assert (False, not asked) == (datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE)


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"got 'hf:x', takes pip install 'ser-fast\[hf\]'"):
        HuggingFace("hf:x", "x", train=True)


# A function of the user's

MODULE = """
import torch
from PIL import Image

class Set:
    classes = ["ant", "bee", "cat"]
    def __init__(self, train):
        self.numbers = range(6) if train else range(10, 12)
    def __len__(self):
        return len(self.numbers)
    def __getitem__(self, index):
        n = self.numbers[index]
        forms = [
            Image.new("RGB", (9, 6), (n, n, n)),
            torch.full((3, 6, 9), n, dtype=torch.uint8),
            torch.full((1, 6, 9), n / 255),
        ]
        return forms[n % 3], torch.tensor(n % 3) if n % 2 else n % 3

class Targets(Set):
    classes = None
    targets = [0, 1, 2, 0, 1, 2]

def birds(train):
    return Set(train)

def targets(train):
    return Targets(train)

def stream(train):
    return (x for x in range(3))

def wrong(train):
    return [{"image": 1}]

def normalized(train):
    return [(torch.randn(3, 4, 4) - 5, 0)]

def channels(train):
    return [(torch.zeros(4, 4, 3, dtype=torch.uint8), 0)]

def outside(train):
    items = Set(train)
    items.classes = ["ant"]
    return items

def fails(train):
    raise KeyError("no disk")
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "module_of_mine.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    yield "python:module_of_mine:"
    sys.modules.pop("module_of_mine", None)


def test_function(module):
    train, held_out = (open_source(module + "birds", train=part, image_size=8) for part in (True, False))
    assert train.classes == held_out.classes == ["ant", "bee", "cat"]
    assert read_all(train) == [(n, n % 3) for n in range(6)]
    assert read_all(held_out) == [(10, 1), (11, 2)]
    assert train.digest() == open_source(module + "birds", train=True, image_size=8).digest() != held_out.digest()
    numbered = open_source(module + "targets", train=True, image_size=8)
    assert numbered.classes == ["0", "1", "2"]
    assert open_dataset(module + "birds", train=True, image_size=8)[1][0].shape == (3, 8, 8)


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("module_of_mine", "takes python:MODULE:FUNCTION"),
        ("no_such_module:f", "which fails: ModuleNotFoundError: No module named 'no_such_module'"),
        ("module_of_mine:none", "which fails: AttributeError"),
        ("module_of_mine:fails", "which fails: KeyError: 'no disk'"),
        ("module_of_mine:stream", "which returns generator, takes a data set with a length above 0"),
    ],
)
def test_bad_function(module, location, message):
    with pytest.raises(ValueError, match=message):
        PythonFunction(f"python:{location}", location, train=True)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("wrong", r"got dict for python:module_of_mine:wrong\[0\], takes \(picture, label\)"),
        ("normalized", r"got values from -.* takes uint8, or floating numbers in \[0, 1\]"),
        ("channels", r"got a tensor \(4, 4, 3\) for .*, takes a PIL image or a tensor \(3, H, W\)"),
        ("outside", r"got label 1 for .*\[1\], takes -1 to 0"),
    ],
)
def test_bad_items_of_a_function(module, function, message):
    source = open_source(module + function, train=True, image_size=8)
    with pytest.raises(ValueError, match=message):
        [source.read(index) for index in range(len(source))]


# What can't be read, in every source


class _Broken(torch.utils.data.Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, index):
        if index in (2, 3):
            raise OSError("no such row")
        return Image.new("RGB", (9, 6), (index,) * 3), 0


def broken(train):
    return _Broken()


def broken_bytes(number: int) -> bytes:
    return {2: png(2)[:50], 3: b""}.get(number, png(number))


@pytest.fixture(params=["folder", "tar", "hf", "python"])
def broken_source(request, tmp_path, monkeypatch):
    """Six pictures of values 0 to 5, of which 2 and 3 can't be read."""
    if request.param == "tar":
        write_tar(tmp_path / "0.tar", {f"{n}.png": broken_bytes(n) for n in range(6)})
        return f"tar:{tmp_path}/0.tar"
    if request.param == "hf":
        make = request.getfixturevalue("hugging_face")
        pictures = [{"bytes": broken_bytes(n), "path": None} for n in range(6)]
        pictures[3] = None
        make(range(6), ("img",), pictures).save_to_disk(tmp_path / "set")
        return f"hf:{tmp_path}/set"
    if request.param == "python":
        monkeypatch.setitem(sys.modules, "broken_module", sys.modules[__name__])
        return "python:broken_module:broken"
    for n in range(6):
        (tmp_path / f"{n}.png").write_bytes(broken_bytes(n))
    return f"folder:{tmp_path}"


def test_a_data_set_reaches_workers_that_do_not_fork(broken_source):
    """As none does by default from Python 3.14 on."""
    dataset = open_dataset(broken_source, train=True, image_size=4)
    sent = pickle.loads(pickle.dumps(dataset))
    assert len(sent) == 6
    assert torch.equal(sent[4][0], dataset[4][0])
    assert sent[4][1:] == dataset[4][1:]
    with pytest.raises(UnreadableImageError):
        sent[2]


@pytest.mark.parametrize("workers", [0, 2])
def test_what_cannot_be_read_is_skipped_counted_and_named(broken_source, workers):
    dataset = open_dataset(broken_source, train=True, image_size=4)
    with pytest.raises(UnreadableImageError):
        dataset[2]
    loader = make_loader(dataset, batch_size=3, train=True, workers=workers)
    for _ in range(2):
        seen = [int(i) for batch in loader for i in batch.images[:, 0, 0, 0]]
        assert len(seen) == 6
        assert set(seen) == {0, 1, 4, 5}, "the next readable picture takes the place"
    assert len(dataset.skipped) == 2
    for name, reason in dataset.skipped:
        assert any(mark in name for mark in ("[2]", "[3]", "2.png", "3.png")), name
        assert reason


# What changes with the pictures


def bmp(value: int) -> bytes:
    """Every picture has as many bytes."""
    data = io.BytesIO()
    Image.new("RGB", (9, 6), (value, value, value)).save(data, "bmp")
    return data.getvalue()


@pytest.mark.parametrize("kind", ["hf", "tar", "folder", "python"])
def test_fingerprints_change_with_any_picture(kind, tmp_path, request, monkeypatch):
    """Also where digests, of names and sizes, do not."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    make = request.getfixturevalue("hugging_face") if kind == "hf" else None

    def opened(value):
        if kind == "hf":
            shutil.rmtree(tmp_path / "set", ignore_errors=True)
            make([0, 1], pictures=[{"bytes": bmp(v), "path": None} for v in (7, value)]).save_to_disk(tmp_path / "set")
            source = f"hf:{tmp_path}/set"
        elif kind == "tar":
            write_tar(tmp_path / "a.tar", {"0.bmp": bmp(7), "0.cls": "0", "1.bmp": bmp(value), "1.cls": "1"})
            source = f"tar:{tmp_path}/a.tar"
        else:
            for number, of in enumerate((7, value)):
                path = tmp_path / "pictures" / "ant" / f"{number}.bmp"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(bmp(of))
                os.utime(path, ns=(10**18, 10**18))
            (tmp_path / "changing.py").write_text(
                "from torchvision.datasets import ImageFolder\ndef make(train):\n    return ImageFolder('pictures')\n"
            )
            source = f"folder:{tmp_path}/pictures" if kind == "folder" else "python:changing:make"
        dataset = open_dataset(source, train=True, image_size=8)
        assert len(dataset.labels) == len(dataset) == 2
        assert dataset.fingerprint() == dataset.fingerprint()
        return dataset.digest(), dataset.fingerprint()

    (digest, first), (same_digest, second) = opened(8), opened(9)
    assert digest == same_digest
    assert first != second
    sys.modules.pop("changing", None)


def test_fingerprints_change_with_what_is_made_of_the_pictures(tmp_path):
    (tmp_path / "0.bmp").write_bytes(bmp(1))
    options = ({}, {"crop_pct": 0.5}, {"image_size": 16}, {"max_pixels": 100})
    source = f"folder:{tmp_path}"
    found = {open_dataset(source, **{"train": True, "image_size": 8, **other}).fingerprint() for other in options}
    assert len(found) == 4
