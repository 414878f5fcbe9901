"""What the evaluations share: the encoder that is opened, the random control beside it, and the checks before the work.

Every protocol checks its arguments, then measures "checkpoint" and "random" alike.
"""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ser_fast.data import MAX_PIXELS
from ser_fast.data.sources import ImageDataset, Squares, open_dataset
from ser_fast.device import choose_device
from ser_fast.evaluation import CONTROL
from ser_fast.evaluation.controls import TokenMaps
from ser_fast.evaluation.features import evaluating
from ser_fast.io import printable
from ser_fast.lattice import Size
from ser_fast.training.run_folder import RunFolder, find_encoder
from ser_fast.vit import SplitViT, load_split_vit

DEFAULT_DATA = "photos"
Models = SplitViT | Mapping[str, SplitViT]
"""One encoder, or several by name."""
_NAMED = 3  # of the images that could not be read

_logger = logging.getLogger(__name__)


class Checkpoint(NamedTuple):
    """An encoder and what its file's folder tells of it.

    Attributes:
        model: on its device.
        data: the source that was given, or that the run was trained on; DEFAULT_DATA where the folder doesn't tell.
        folder: of the file.
    """

    model: SplitViT
    data: str
    folder: Path


def open_encoder(path: Path | str, data: str | None = None, *, device: str = "auto") -> Checkpoint:
    """Open an encoder.

    Args:
        path: a run's folder, a safetensors file, or "timm:NAME", the public weights of a timm model.
        data: a source; default that of the run's config.json.
        device: "auto", "cpu" or "cuda".

    Raises:
        ValueError: the path is none of these, the file is damaged, the weights can't be had, the device isn't there, or
            the config.json names a source that runs code ("python:") or downloads ("hf:").

    Example:
        >>> model, data, folder = open_encoder(Path("runs/moco_v3_ser"))
        >>> knn.evaluate(model, data).write(folder)
    """
    target = choose_device(device)
    if str(path).startswith("timm:"):
        model = SplitViT(str(path).removeprefix("timm:"), 0, pretrained=True)
        return Checkpoint(model.to(target), data or DEFAULT_DATA, Path("runs") / str(path).replace(":", "_"))
    weights = find_encoder(Path(path))
    run = RunFolder(weights.parent)
    if data is None:
        data = _data_of(run)
        if data.partition(":")[0] in ("python", "hf"):  # a folder from somebody else would choose what runs here
            raise ValueError(
                f"data: {run.config} names {data!r}, which imports code or goes to the network; give it as data"
            )
    return Checkpoint(load_split_vit(weights).to(target), data, run.path)


def open_encoders(
    paths: Sequence[Path | str], data: str | None = None, *, device: str = "auto"
) -> tuple[Models, str, Path]:
    """Open one encoder or several, for the same images.

    Args:
        paths: each as `open_encoder` takes it.
        data: a source; default that of the runs.
        device: "auto", "cpu" or "cuda".

    Returns:
        The encoder, or the encoders by name, where there are several; the source; and the folder that results go to:
        that of the one, or "runs/comparison".

    Raises:
        ValueError: as `open_encoder`; none, one that comes twice, or runs on different data where none is given.
    """
    if not paths:
        raise ValueError("checkpoints: got none, takes a run's folder, a .safetensors file or timm:NAME")
    opened = [open_encoder(path, data, device=device) for path in paths]
    if len(opened) == 1:
        return opened[0]
    sources = dict.fromkeys(checkpoint.data for checkpoint in opened)
    if len(sources) > 1:
        raise ValueError(f"data: the checkpoints were trained on {', '.join(sources)}; name one for all of them")
    short = [_short_name(path) for path in paths]
    names = [name if short.count(name) == 1 else str(path) for name, path in zip(short, paths, strict=True)]
    if len(set(names)) < len(names):
        raise ValueError(f"checkpoints: got {', '.join(map(str, paths))}, takes each once")
    models = {name: checkpoint.model for name, checkpoint in zip(names, opened, strict=True)}
    return models, next(iter(sources)), Path("runs/comparison")


def _short_name(path: Path | str) -> str:
    if str(path).startswith("timm:"):
        return str(path).removeprefix("timm:")
    resolved = Path(path).resolve()
    return resolved.parent.name if resolved.name == RunFolder(resolved.parent).encoder.name else resolved.stem


def _data_of(run: RunFolder) -> str:
    """The source that a run was trained on; beside an encoder may lie the config.json of any other program."""
    if not run.config.is_file():
        return DEFAULT_DATA
    try:
        data = run.read_config().data
        if not isinstance(data, str):
            raise ValueError(f"config: {run.config} can't be read as that of a run: data is {data!r}")
    except ValueError as error:
        raise ValueError(f"{error}; give the images as data, and the file is not read") from error
    return data


# ---------------------------------------------------------------- models


def random_control(model: SplitViT, *, seed: int = 0) -> SplitViT:
    """The same architecture, split and device with fresh random weights: what `model` was before it was trained.

    Fixed sin-cos positions are kept, for training did not make them either. Global random state stays as it was.

    Args:
        model: built from a timm name.
        seed: of the weights.

    Raises:
        ValueError: model wraps a timm instance, which can't be built again.
    """
    if model.recipe is None:
        raise ValueError("model: wraps a timm instance; only a SplitViT built from a timm name can be built again")
    name, timm_kwargs = model.recipe
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the GPUs too
        control = SplitViT(name, model.split, **timm_kwargs)
    positions = control.state_dict().get("pos_embed")  # (1, P + H*W, C), the model's own memory
    if positions is not None and model.embed_dim % 4 == 0:
        drawn = positions.clone()
        control.fix_sincos_positions()
        if not torch.equal(positions, model.state_dict()["pos_embed"].cpu()):
            positions.copy_(drawn)
    return control.to(device_of(model))


def random_controls(models: Mapping[str, SplitViT], *, seed: int = 0, prefix: str = CONTROL) -> dict[str, SplitViT]:
    """A random initialization of each architecture, by a name that begins with the prefix.

    Args:
        models: by name.
        seed: of the weights.
        prefix: of the names.
    """
    controls: dict[str, SplitViT] = {}
    for name, model in models.items():
        if all((control.recipe, control.split) != (model.recipe, model.split) for control in controls.values()):
            controls[f"{prefix} ({name})" if controls else prefix] = random_control(model, seed=seed)
    return controls


def name_models(models: Models) -> dict[str, SplitViT]:
    """The models that are given, by name.

    Args:
        models: one, called "checkpoint", or several by name.

    Raises:
        ValueError: none, or one that has a control's name.
    """
    named = {"checkpoint": models} if isinstance(models, SplitViT) else dict(models)
    if not named:
        raise ValueError("models: got none, takes one or more")
    if taken := [name for name in named if name.startswith(CONTROL)]:
        raise ValueError(f"models: got the name {taken[0]!r}, which is that of a random control")
    return named


def with_controls(models: Models) -> dict[str, SplitViT]:
    """The models that every protocol measures, by name: those given, and a random control of each architecture.

    Args:
        models: as `name_models`.
    """
    named = name_models(models)
    return {**named, **random_controls(named)}


def image_size_of(model: SplitViT, image_size: int | None) -> int:
    """The side of a model's images in pixels: the one given, or its own."""
    return model.image_size[0] if image_size is None else image_size


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's parameters."""
    return next(model.parameters()).device


# ---------------------------------------------------------------- checks


def check_positive(**numbers: float | None) -> None:
    """Raise ValueError for the first of the named numbers that is there and isn't above 0."""
    for name, number in numbers.items():
        if number is not None and not number > 0:
            raise ValueError(f"{name}: got {number}, takes a positive number")


def check_image_size(model: SplitViT, image_size: int | None, *, read: Callable[[Tensor], Tensor] | None = None) -> int:
    """The side of the images in pixels, after a black image of it went through the model.

    Args:
        model: on its device.
        image_size: in pixels; None for the model's own.
        read: what is read from a model's images (1, 3, S, S); default its embedding.

    Raises:
        ValueError: a size that isn't positive, or that the model can't take.
    """
    size = image_size_of(model, image_size)
    check_positive(image_size=size)
    with evaluating(model):
        (read or model)(torch.zeros(1, 3, size, size, device=device_of(model)))
    return size


def check_images(model: TokenMaps, images: Tensor) -> Size:
    """The lattice (H, W) of the tokens of images (N, 3, Hp, Wp) uint8.

    Raises:
        TypeError: images of another type.
        ValueError: images of another shape, or sides that aren't multiples of the patch size.
    """
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        raise TypeError(f"images: got {getattr(images, 'dtype', type(images))}, takes a uint8 tensor (N, 3, Hp, Wp)")
    patch_height, patch_width = model.patch_size
    if images.ndim != 4 or not images.numel() or images.shape[2] % patch_height or images.shape[3] % patch_width:
        raise ValueError(
            f"images: got {tuple(images.shape)}, takes (N, 3, Hp, Wp), N > 0, the sides multiples of the patch size "
            f"{patch_height, patch_width}"
        )
    return images.shape[2] // patch_height, images.shape[3] // patch_width


def open_labelled(
    data: str, image_size: int, *, crop_pct: float = 1.0, max_pixels: int = MAX_PIXELS
) -> tuple[Squares, Squares]:
    """The training images and the held-out images of a source, of the same classes.

    Args:
        data: as `open_dataset` takes it.
        image_size: the side of the images in pixels.
        crop_pct: share of a picture's shorter side that the images show.
        max_pixels: of one picture; one of more is unreadable.

    Raises:
        ValueError: the source can't be opened, or not all of its images have a class, as far as that is known without
            reading them.
    """
    train, test = (
        open_dataset(data, train=part, image_size=image_size, crop_pct=crop_pct, max_pixels=max_pixels)
        for part in (True, False)
    )
    if not train.classes:
        raise ValueError(
            f"data: got {data!r}, whose images have no classes, takes a source with labels, "
            "such as folder:OTHER with a folder for each class below train/ and val/"
        )
    for part, images in (("training", train), ("held-out", test)):
        if images.labels is not None and (without := sum(label < 0 for label in images.labels)):
            raise ValueError(f"data: got {data!r}, {without} of whose {len(images)} {part} images have no class")
    return train, test


def tell_skipped(*datasets: ImageDataset) -> None:
    """Log in one line how many images the data sets could not read, and the first of them; nothing where there is none.

    Every protocol calls it before it returns its result.
    """
    skipped = list(dict.fromkeys(entry for dataset in datasets for entry in dataset.skipped))
    if skipped:
        named = "; ".join(f"{printable(path)} ({printable(reason)})" for path, reason in skipped[:_NAMED])
        more = f" and {len(skipped) - _NAMED} more" if len(skipped) > _NAMED else ""
        images = f"{len(skipped)} image{'s' * (len(skipped) > 1)}"
        _logger.warning("data: %s could not be read, left out: %s%s", images, named, more)


def make_folder(out: Path) -> Path:
    """Make the folder that results go to.

    Raises:
        ValueError: it can't be made, or not be written to.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out: got {out}, takes a folder that can be made: {error.strerror}") from error
    if not os.access(out, os.W_OK | os.X_OK):
        raise ValueError(f"out: got {out}, takes a folder that can be written to")
    return out
