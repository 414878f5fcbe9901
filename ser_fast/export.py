"""The encoder for other programs: a file that is compared with the encoder before it gets its name."""

import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import timm
import torch
from torch import Tensor

from ser_fast.pretrained import PREPROCESSING_KEY, find_weights
from ser_fast.vit import SplitViT, load_split_vit, save_split_vit

OPSET = 18
"""ONNX's, of the files that are written: the first with what antialiased resizing needs, widely supported."""
FILES = {"timm": "encoder_timm.safetensors", "onnx": "encoder.onnx", "torch": "encoder.pt2"}
"""The default name of a file, by format."""
TOLERANCE = 1e-4
"""Largest error of an exported encoder, relative to its largest output."""

Forward = Callable[[Tensor], Tensor]


@torch.no_grad()
def export(run: Path, format: Literal["timm", "onnx", "torch"], out: Path | None = None) -> Path:
    """Write a run's encoder for another program, in float32.

    Each takes normalized images (B, 3, S, S), any B and the S of the model ("timm" and its kin: any size), and gives
    the pooled embedding (B, C). What `SplitViT.preprocessing` says goes with it: in the metadata of safetensors, in
    metadata_props of ONNX, and as the extra file "preprocessing" of torch.export. The file is read again and compared
    with the encoder on batches of other sizes before it gets its name.

    Args:
        run: its folder, or a safetensors file that `save_split_vit` wrote.
        format: "timm", safetensors for timm.create_model(NAME, checkpoint_path=FILE, ...), of an encoder with split 0;
            "onnx", with opset 18; "torch", a program for torch.export.load.
        out: the file; default beside the weights, named as in FILES.

    Returns:
        The file that was written.

    Raises:
        ValueError: there is no such encoder, it has no such form, packages are missing, or the file gives other
            embeddings.

    Example:
        >>> session = onnxruntime.InferenceSession(export(Path("runs/ser"), "onnx"))
        >>> (embedding,) = session.run(None, {"images": images.numpy()})
    """
    if format not in FILES:
        raise ValueError(f"format: got {format!r}, takes one of {', '.join(map(repr, FILES))}")
    weights = find_weights(run)
    model = load_split_vit(weights).eval()
    if format == "timm" and model.split:
        raise ValueError(
            f"format: got 'timm', whose [CLS] enters before block 0, and here it enters after {model.split} blocks: "
            "the same weights would be another function; takes 'onnx' or 'torch', or load_split_vit in Python"
        )
    if format == "onnx" and (missing := [name for name in ("onnxscript", "onnxruntime") if find_spec(name) is None]):
        raise ValueError(f"format: 'onnx' needs {' and '.join(missing)}: pip install 'ser-fast[export]'")
    out = weights.parent / FILES[format] if out is None else out
    if out.is_dir():
        raise ValueError(f"out: got the folder {out}, takes a file")
    out.parent.mkdir(parents=True, exist_ok=True)
    # A folder of its own, since large ONNX models come with a second file that they name.
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".export") as folder:
        file = Path(folder) / out.name
        _compare(model, {"timm": _timm, "onnx": _onnx, "torch": _torch}[format](model, file))
        for written in sorted(Path(folder).iterdir(), reverse=True):  # NAME.data before NAME
            written.replace(out.parent / written.name)
    return out


def _timm(model: SplitViT, file: Path) -> Forward:
    save_split_vit(file, model)
    assert model.recipe is not None  # it was loaded
    name, timm_kwargs = model.recipe
    return timm.create_model(name, **{"num_classes": 0, **timm_kwargs}, checkpoint_path=str(file)).eval()


def _onnx(model: SplitViT, file: Path) -> Forward:
    import onnxruntime

    with _quiet():
        program = torch.onnx.export(
            model,
            (_images(model, 2),),
            dynamo=True,
            opset_version=OPSET,
            input_names=["images"],
            output_names=["embedding"],
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            verbose=False,
        )
    assert program is not None  # as it is with dynamo
    program.model.metadata_props[PREPROCESSING_KEY] = json.dumps(model.preprocessing())
    program.save(file)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _torch(model: SplitViT, file: Path) -> Forward:
    dynamic = {"images": {0: torch.export.Dim("batch")}}
    program = torch.export.export(model, (_images(model, 2),), dynamic_shapes=dynamic)
    with _quiet(), file.open("wb") as stream:  # a stream: torch asks for its own suffix in a name
        torch.export.save(program, stream, extra_files={PREPROCESSING_KEY: json.dumps(model.preprocessing())})
    with _quiet():
        return torch.export.load(file).module()


def _images(model: SplitViT, count: int) -> Tensor:
    return torch.randn(count, 3, *model.image_size, generator=torch.Generator().manual_seed(count))


def _compare(model: SplitViT, exported: Forward) -> None:
    for count in (1, 3):
        images = _images(model, count)
        wanted = model(images)
        error = float((exported(images) - wanted).abs().max() / wanted.abs().max())
        if not error <= TOLERANCE:
            raise ValueError(f"export: {count} random images get an embedding off by {error:.1e}, beyond {TOLERANCE}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporters say about themselves."""
    chatty = logging.getLogger("onnx_ir")
    level = chatty.level
    chatty.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        chatty.setLevel(level)
