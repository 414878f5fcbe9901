"""Corruptions, perturbation sequences, what is measured on them, and the published layouts."""

import sys
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ser_fast.data.sources import open_dataset
from ser_fast.evaluation import robustness
from ser_fast.evaluation.corruptions import CORRUPTIONS, PERTURBATIONS, SEVERITIES, corrupt, perturb
from ser_fast.evaluation.features import spread_images
from ser_fast.evaluation.image_sets import (
    ClassFolder,
    clean_images,
    find_videos,
    generate_corruptions,
    generate_perturbations,
    read_corruptions,
    read_perturbations,
)
from ser_fast.evaluation.robustness import (
    CorruptionsResult,
    ErrorRate,
    FlipRate,
    error_rates,
    flip_probability,
    flip_rates,
    mean_corruption_error,
    read_errors,
)


@pytest.fixture(scope="module")
def photographs() -> Tensor:
    return spread_images(open_dataset("photos", train=False, image_size=64), 6)


def distance(a: Tensor, b: Tensor) -> float:
    return (a.float() - b.float()).abs().mean().item()


# ---------------------------------------------------------------- corruptions


def test_there_are_15_kinds_at_5_severities() -> None:
    assert len(CORRUPTIONS) == 15
    assert {len(parameters) for _, parameters in CORRUPTIONS.values()} == {len(SEVERITIES)} == {5}


@pytest.mark.parametrize("size", [32, 50, 64])
@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_a_corruption_changes_an_image_the_same_way_for_the_same_seed(kind: str, size: int) -> None:
    image = spread_images(open_dataset("photos", train=False, image_size=size), 5)[1]
    for severity in (1, 5):
        corrupted = corrupt(image, kind, severity, seed=3)
        assert (corrupted.shape, corrupted.dtype) == (image.shape, torch.uint8)
        assert 0 < distance(corrupted, image) < 100
        assert torch.equal(corrupted, corrupt(image, kind, severity, seed=3))
    drawn = kind not in ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression")
    assert torch.equal(corrupt(image, kind, 5, seed=3), corrupt(image, kind, 5, seed=4)) != drawn


@pytest.mark.parametrize("kind", sorted(set(CORRUPTIONS) - {"elastic_transform", "glass_blur"}))
def test_severity_5_is_farther_from_the_image_than_1(kind: str, photographs: Tensor) -> None:
    near, far = (
        sum(distance(corrupt(image, kind, severity, seed=0), image) for image in photographs) for severity in (1, 5)
    )
    assert far > 1.2 * near


def test_glass_is_blurred_more_at_severity_5(photographs: Tensor) -> None:
    # Its table has the same reach at all severities, and less blur at 1: grain is far from the image, pixel by pixel.
    def detail(image: Tensor) -> float:
        return image.float().diff(dim=-1).abs().mean().item()

    image = photographs[1]
    assert detail(corrupt(image, "glass_blur", 5, seed=0)) < 0.5 * detail(corrupt(image, "glass_blur", 1, seed=0))


def test_elastic_bends_more_at_severity_5() -> None:
    # Its table moves the whole image less from one severity to the next. An affine map leaves a ramp a ramp.
    ramp = torch.arange(64.0)[:, None].expand(64, 64) * 4
    image = torch.stack([ramp, ramp.T, ramp]).byte()

    def bend(severity: int) -> float:
        inner = corrupt(image, "elastic_transform", severity, seed=0)[0, 16:48, 16:48].double()
        y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
        plane = torch.stack([y, x, torch.ones(32, 32)], -1).flatten(0, 1).double()
        fit = plane @ torch.linalg.lstsq(plane, inner.flatten()[:, None]).solution
        return (fit[:, 0] - inner.flatten()).abs().mean().item()

    assert bend(1) < 0.5  # rounding to whole numbers
    assert bend(5) > 5 * bend(1)


def test_corruptions_by_hand() -> None:
    grey = torch.full((3, 32, 32), 100, dtype=torch.uint8)
    assert corrupt(grey, "brightness", 5, seed=0).unique().tolist() == [round(100 + 0.3 * 255)]
    halves = grey.clone()
    halves[:, :, 16:] = 220
    assert corrupt(halves, "contrast", 5, seed=0).unique().tolist() == [151, 169]  # 160 -+ 0.15 * 60
    noisy = corrupt(grey, "gaussian_noise", 5, seed=0).float()
    assert noisy.std().item() == pytest.approx(0.1 * 255, rel=0.05)
    shots = corrupt(grey, "shot_noise", 5, seed=0).float()
    assert shots.std().item() == pytest.approx((100 / 255 / 50) ** 0.5 * 255, rel=0.05)
    peppered = corrupt(grey, "impulse_noise", 5, seed=0)
    assert set(peppered.unique().tolist()) == {0, 100, 255}
    assert (peppered != 100).float().mean().item() == pytest.approx(0.07, abs=0.015)
    dot = torch.zeros(3, 64, 64).byte()
    dot[:, 32, 32] = 255
    disc = corrupt(dot, "defocus_blur", 5, seed=0)[0] > 4
    assert 20 <= int(disc.sum()) <= 29  # a radius of 1.5 * 64 / 32 pixels: an area of 28.3


@pytest.mark.parametrize("kind", ["defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "elastic_transform"])
def test_blurs_and_warps_leave_a_plain_image_alone(kind: str) -> None:
    plain = torch.full((3, 40, 40), 77, dtype=torch.uint8)
    assert corrupt(plain, kind, 5, seed=0).unique().tolist() == [77]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(3, 8, 8), "fog", 1), TypeError, "image: got torch.float32"),
        ((torch.zeros(3, 8, 9).byte(), "fog", 1), ValueError, r"image: got \(3, 8, 9\)"),
        ((torch.zeros(3, 8, 8).byte(), "rain", 1), ValueError, "kind: got 'rain', takes one of gaussian_noise"),
        ((torch.zeros(3, 8, 8).byte(), "fog", 0), ValueError, "severity: got 0"),
    ],
)
def test_corrupt_names_what_it_refuses(arguments: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        corrupt(*arguments, seed=0)


# ---------------------------------------------------------------- sequences


@pytest.mark.parametrize("kind", PERTURBATIONS)
def test_a_sequence_changes_a_little_from_frame_to_frame(kind: str, photographs: Tensor) -> None:
    frames = perturb(photographs[1], kind, seed=5)
    assert frames.dtype == torch.uint8
    assert frames.shape == ({"motion_blur": 21, "translate": 16}.get(kind, 31), 3, 64, 64)
    assert torch.equal(frames, perturb(photographs[1], kind, seed=5))
    steps = [distance(a, b) for a, b in pairwise(frames)]
    assert min(steps) > 0
    if "noise" in kind:
        assert torch.equal(frames[0], photographs[1])
        assert max(steps) < 15
    else:  # order matters: neighbours are nearer than ends
        assert sum(steps) / len(steps) < distance(frames[0], frames[len(frames) // 2])


def test_the_middle_of_a_movement_is_the_image_itself(photographs: Tensor) -> None:
    image = photographs[1]
    for kind, still in (("translate", 7), ("rotate", 15), ("tilt", 15), ("scale", 15), ("brightness", 15)):
        assert distance(perturb(image, kind, seed=0)[still], image) < 0.01, kind
    shifted = perturb(image, "translate", seed=0)[9]  # by 2 pixels of 32: 4 of 64
    assert torch.equal(shifted[..., 4:], image[..., :-4])


def test_perturb_names_what_it_refuses() -> None:
    with pytest.raises(ValueError, match="kind: got 'fog', takes one of gaussian_noise"):
        perturb(torch.zeros(3, 8, 8).byte(), "fog", seed=0)


# ---------------------------------------------------------------- measures


def rates(errors: dict[str, list[float]]) -> list[ErrorRate]:
    return [
        ErrorRate(kind, severity, error, 0.0, 1.0, 10)
        for kind, of_kind in errors.items()
        for severity, error in enumerate(of_kind, start=0 if kind == "clean" else 1)
    ]


def test_mean_corruption_error_by_hand() -> None:
    mine = rates({"clean": [0.05], "fog": [0.1, 0.3], "snow": [0.4, 0.4]})
    baseline = rates({"clean": [0.5], "fog": [0.2, 0.6], "snow": [0.4, 0.6]})
    assert mean_corruption_error(mine) == pytest.approx((0.2 + 0.4) / 2)
    assert mean_corruption_error(mine, baseline) == pytest.approx((0.4 / 0.8 + 0.8 / 1.0) / 2)
    assert mean_corruption_error(baseline, baseline) == 1


@pytest.mark.parametrize(
    ("mine", "baseline", "message"),
    [
        ({"clean": [0.1]}, None, "rates: got no corrupted set"),
        ({"fog": [0.1]}, {"snow": [0.1]}, "baseline: lacks fog at severity 1"),
        ({"fog": [0.1, 0.1, 0.1]}, {"fog": [0.1]}, "baseline: lacks fog at severity 2, 3"),
        ({"fog": [0.1]}, {"fog": [0.0]}, "baseline: never errs on fog"),
    ],
)
def test_mean_corruption_error_names_what_it_refuses(mine: dict, baseline: dict | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mean_corruption_error(rates(mine), None if baseline is None else rates(baseline))


def test_flip_probability_by_hand() -> None:
    predictions = torch.tensor([[1, 1, 2, 2, 1], [3, 4, 4, 4, 4]])
    # Between neighbours: 2 + 1 of 8. Against the first frame: 2 + 4 of 8.
    assert flip_probability(predictions, noise=False) == 3 / 8
    assert flip_probability(predictions, noise=True) == 6 / 8
    with pytest.raises(ValueError, match=r"predictions: got \(2, 1\)"):
        flip_probability(predictions[:, :1], noise=True)


def first_pixel(images: Tensor) -> Tensor:
    """Scores of 4 classes: the class is the red of the upper left pixel, in quarters."""
    return torch.nn.functional.one_hot(images[:, 0, 0, 0].long() // 64, 4).float()


def errors_of(sets: Iterable) -> list[ErrorRate]:
    return error_rates({"first pixel": first_pixel}, sets)["first pixel"]


def flips_of(sets: Iterable) -> list[FlipRate]:
    return flip_rates({"first pixel": first_pixel}, sets)["first pixel"]


def flat_images(reds: list[int], size: int = 8) -> Tensor:
    return torch.tensor(reds, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, size, size).clone()


def test_error_rates_count_errors_over_batches() -> None:
    images, labels = flat_images([0, 70, 140, 210, 250]), torch.tensor([0, 1, 1, 3, 2])
    (rate,) = errors_of([clean_images(images, labels, batch_size=2)])
    assert (rate.kind, rate.severity, rate.error, rate.images) == ("clean", 0, 2 / 5, 5)
    assert rate.low < 0.4 < rate.high
    both = error_rates({"a": first_pixel, "b": lambda x: first_pixel(x).roll(1, 1)}, [clean_images(images, labels)])
    assert [both[name][0].error for name in "ab"] == [2 / 5, 1]
    with pytest.raises(ValueError, match="hits"):
        errors_of([("fog", 1, [])])


def test_flip_rates_compare_noise_with_the_first_frame() -> None:
    sequence = flat_images([0, 70, 70, 0])
    found = flips_of([("snow", [sequence]), ("shot_noise", [sequence, sequence])])
    assert found == [FlipRate("snow", 2 / 3, 1), FlipRate("shot_noise", 2 / 3, 2)]
    drift = flat_images([0, 70, 70, 70])
    assert [rate.flip_probability for rate in flips_of([("snow", [drift]), ("a_noise", [drift])])] == [
        1 / 3,
        1.0,
    ]


def test_generated_sets_are_the_corruptions_of_each_image(photographs: Tensor) -> None:
    images, labels = photographs[:3], torch.tensor([5, 6, 7])
    sets = {(kind, severity): batches for kind, severity, batches in generate_corruptions(images, labels, batch_size=2)}
    assert set(sets) == {(kind, severity) for kind in CORRUPTIONS for severity in SEVERITIES}
    made = list(sets["frost", 3])
    assert torch.cat([of for _, of in made]).tolist() == [5, 6, 7]
    expected = torch.stack([corrupt(image, "frost", 3, seed=i) for i, image in enumerate(images)])
    assert torch.equal(torch.cat([part for part, _ in made]), expected)
    moved = dict(generate_perturbations(images[:2], seed=1))
    assert set(moved) == set(PERTURBATIONS)
    assert torch.equal(list(moved["tilt"])[1], perturb(images[1], "tilt", seed=2))


# ---------------------------------------------------------------- published layouts

CLASSES = ["ant", "bee", "cat", "dog"]


def write(folder: Path, red: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (red, 0, 0)).save(folder / f"{red}.png")


def test_corruptions_are_read_as_imagenet_c_has_them(tmp_path: Path) -> None:
    for severity, red in ((1, 210), (2, 100)):
        write(tmp_path / "fog" / str(severity) / "dog", red)
        write(tmp_path / "fog" / str(severity) / "bee", 70)
    found = errors_of(read_corruptions(tmp_path, CLASSES, image_size=8))
    assert [(rate.kind, rate.severity, rate.error, rate.images) for rate in found] == [
        ("fog", 1, 0, 2),
        ("fog", 2, 0.5, 2),
    ]


def test_corruptions_are_read_as_cifar_10_c_has_them(tmp_path: Path) -> None:
    reds, labels = np.array([0, 70] * 5, dtype=np.uint8), np.array([0, 1] * 5, dtype=np.uint8)
    reds[-2:] = 210  # both wrong at severity 5
    np.save(tmp_path / "labels.npy", labels)
    np.save(tmp_path / "snow.npy", np.broadcast_to(reds[:, None, None, None], (10, 8, 8, 3)))
    found = errors_of(read_corruptions(tmp_path, CLASSES, image_size=16, batch_size=1))
    assert [(rate.kind, rate.severity, rate.error) for rate in found] == [
        *(("snow", severity, 0) for severity in (1, 2, 3, 4)),
        ("snow", 5, 1),
    ]
    (_, _, batches), *_ = read_corruptions(tmp_path, CLASSES, image_size=16)
    assert next(iter(batches))[0].shape == (2, 3, 16, 16)


def test_sequences_are_read_as_cifar_10_p_has_them(tmp_path: Path) -> None:
    array = np.zeros((2, 4, 8, 8, 3), dtype=np.uint8)
    array[1, 2:] = 255  # one flip of six
    np.save(tmp_path / "tilt.npy", array)
    assert flips_of(read_perturbations(tmp_path, image_size=8)) == [FlipRate("tilt", 1 / 6, 2)]


def imagenet_p(folder: Path) -> Path:
    """The places of three sequences in ImageNet-P's layout, each an empty file."""
    for path in ("snow/n01/b.mp4", "snow/n02/a.mp4", "tilt/n01/a.mp4", "tilt/n01/notes.txt"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).touch()
    return folder


def test_sequences_are_found_as_imagenet_p_has_them(tmp_path: Path) -> None:
    found = {
        kind: [path.relative_to(tmp_path).as_posix() for path in paths]
        for kind, paths in find_videos(imagenet_p(tmp_path)).items()
    }
    assert found == {"snow": ["snow/n01/b.mp4", "snow/n02/a.mp4"], "tilt": ["tilt/n01/a.mp4"]}
    assert [kind for kind, _ in read_perturbations(tmp_path, image_size=8)] == ["snow", "tilt"]


def test_videos_without_a_decoder_are_refused_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)  # what an import of it finds where it is not installed
    says = r"perturbed: got the video .*snow/n01/b\.mp4, takes PyAV .*pip install 'ser-fast\[eval\]'"
    with pytest.raises(ValueError, match=says):
        flips_of(read_perturbations(imagenet_p(tmp_path), image_size=8))


def test_videos_are_decoded_frame_by_frame(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    path = tmp_path / "tilt" / "n01" / "a.mp4"
    path.parent.mkdir(parents=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=1)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for grey in (30, 30, 220, 220):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), grey, dtype=np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    ((kind, sequences),) = read_perturbations(tmp_path, image_size=8)
    (frames,) = sequences
    assert (kind, frames.shape, frames.dtype) == ("tilt", (4, 3, 8, 8), torch.uint8)
    greys = torch.tensor([30.0, 30.0, 220.0, 220.0])
    torch.testing.assert_close(frames.float().mean((1, 2, 3)), greys, atol=4, rtol=0)  # what the codec may lose


@pytest.mark.parametrize("names", [("bee", "dog"), ("1", "3")], ids=["by name", "by number"])
def test_a_class_folder_is_graded_among_its_own_classes(tmp_path: Path, names: tuple[str, str]) -> None:
    write(tmp_path / names[0], 70)
    write(tmp_path / names[1], 210)
    write(tmp_path / names[1], 140)  # predicted as cat, which is not asked: of bee and dog it prefers dog
    folder = ClassFolder(tmp_path, CLASSES, image_size=8)
    assert folder.indices.tolist() == [1, 3]

    def classify(images: Tensor) -> Tensor:
        return first_pixel(images) + torch.tensor([0.9, 0.0, 0.0, 0.1])

    graded = folder.grade(classify, batch_size=2)
    assert (graded.top1.value, graded.images) == (1, 3)
    assert graded.confusion.to_dense().tolist() == [[0] * 4, [0, 1, 0, 0], [0] * 4, [0, 0, 0, 2]]


def no_arrays(folder: Path) -> None:
    np.save(folder / "labels.npy", np.zeros(10))
    np.save(folder / "fog.npy", np.zeros((9, 8, 8, 3)))


@pytest.mark.parametrize(
    ("prepare", "read", "message"),
    [
        (lambda f: None, lambda f: read_corruptions(f, CLASSES, image_size=8), "takes a folder of kind/severity/class"),
        (no_arrays, lambda f: read_corruptions(f, CLASSES, image_size=8), r"got \(9, 8, 8, 3\) in .*fog.npy"),
        (
            lambda f: None,
            lambda f: read_perturbations(f, image_size=8),
            "takes a folder of kind/class/name.mp4 or kind.npy",
        ),
        (no_arrays, lambda f: read_perturbations(f, image_size=8), r"got \(9, 8, 8, 3\) in .*fog.npy"),
        (
            lambda f: write(f / "emu", 9),
            lambda f: [ClassFolder(f, CLASSES, image_size=8)],
            "with emu, takes folders of training classes",
        ),
        (
            lambda f: write(f / "7", 9),
            lambda f: [ClassFolder(f, CLASSES, image_size=8)],
            "with 7, takes folders of training classes",
        ),
        (
            lambda f: write(f, 9),
            lambda f: [ClassFolder(f, CLASSES, image_size=8)],
            "takes a folder with one folder a class",
        ),
        (lambda f: None, lambda f: [ClassFolder(f / "a", CLASSES, image_size=8)], "and there is no such folder"),
    ],
)
def test_folders_in_no_known_layout_are_refused(
    tmp_path: Path, prepare: Callable[[Path], None], read: Callable[[Path], object], message: str
) -> None:
    prepare(tmp_path)
    with pytest.raises(ValueError, match=message):
        list(read(tmp_path))


# ---------------------------------------------------------------- what is shown


def test_errors_survive_their_file(tmp_path: Path) -> None:
    mine = rates({"clean": [0.25], "fog": [0.1, 1 / 3]})
    both = {"checkpoint": mine, "random": rates({"fog": [0.9]})}
    CorruptionsResult(both, {"checkpoint": [FlipRate("tilt", 0.125, 3)]}, []).write(tmp_path)
    assert read_errors(tmp_path / "corruptions.csv") == mine
    with pytest.raises(ValueError, match=r"baseline: got .*nowhere\.csv, and there is no such file"):
        read_errors(tmp_path / "nowhere.csv")
    with pytest.raises(ValueError, match="takes a file with error rates of 'other'"):
        read_errors(tmp_path / "corruptions.csv", model="other")


def test_tables_show_errors_flips_and_their_means(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    errors = {
        "checkpoint": rates({"clean": [0.25], "fog": [0.1, 0.3]}),
        "random": rates({"clean": [0.5], "fog": [0.4, 0.4]}),
    }
    robustness.print_errors(errors, errors["random"])
    robustness.print_flips({"checkpoint": [FlipRate("tilt", 0.125, 3), FlipRate("snow", 0.375, 3)]})
    shown = [" ".join(line.replace("│", " ").split()) for line in capsys.readouterr().out.splitlines()]
    assert "clean 0.250 0.500" in shown
    assert "fog 0.200 0.400" in shown
    assert "mean corruption error 0.200 0.400" in shown
    assert "... relative to the baseline 0.500 1.000" in shown
    assert "mean flip probability 0.2500" in shown
    robustness.plot_errors(errors, tmp_path / "errors.png")
    assert (tmp_path / "errors.png").read_bytes().startswith(b"\x89PNG")
