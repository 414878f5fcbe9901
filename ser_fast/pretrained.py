"""Weights from elsewhere: public ones by name, or a local file, loaded into a timm transformer whole or not at all."""

import hashlib
import json
import logging
from argparse import Namespace
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from timm.data.constants import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from timm.models import eva, vision_transformer
from torch import Tensor, nn

from ser_fast.views.pixels import IMAGENET_MEAN, IMAGENET_STD

ENCODER_FILES = ("encoder.safetensors", "model.safetensors")
"""The weights in a run's folder, and in a folder of Hugging Face's layout."""
METADATA_KEY = "split_vit"
"""In the metadata of a safetensors file of ours: the timm name, its arguments and the split, as JSON."""
CHECKSUM_FIELD = "sha256"
"""Of the whole file, in that JSON; files of earlier versions have none."""
DESCRIBED = frozenset(["model", "split", "timm_kwargs", CHECKSUM_FIELD])
"""All that may stand in it."""
PREPROCESSING_KEY = "preprocessing"
"""Beside it: what the encoder takes, as JSON."""
NORMALIZATIONS = {
    "imagenet": (IMAGENET_MEAN, IMAGENET_STD),
    "half": (IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD),
    "clip": (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
}
"""Mean and standard deviation of the pixels, in [0, 1], by name."""

# What a checkpoint keeps its weights under, the better ones first: averaged weights before the trained ones.
_WRAPPERS = ("state_dict_ema", "model_ema", "teacher", "state_dict", "model")
# What the encoder's names begin with where it is a part of the module that was saved.
_PREFIXES = ("module.", "_orig_mod.", "backbone.", "encoder.", "base_encoder.")
_HEADS = ("head", "head_dist")
_NAMED = 4  # names that an error lists of each kind

_logger = logging.getLogger(__name__)


def load_weights(vit: Any, source: str | Path, *, name: str, split: int, normalization: str = "auto") -> None:
    """Load weights into a timm vision transformer that has no classifier.

    Absolute positions are resized to the model's grid as timm does (bicubic, antialiased). The heads of a classifier,
    and the parts of a checkpoint beside its encoder, are left out, which is logged; everything else must fit.

    Every image here is normalized with ImageNet's mean and deviation. Weights that were trained with others get the
    difference folded into the patch embedding: the same function of the pixels, up to rounding.

    Args:
        vit: the model, a VisionTransformer, VisionTransformerDistilled or Eva, changed in place.
        source: "timm", the public weights of `name`; "timm:NAME", of another name of timm's; or a safetensors or pth
            file, or a folder that holds encoder.safetensors or model.safetensors. Files may nest the weights under
            state_dict_ema, model_ema, teacher, state_dict or model, and begin their names with module., _orig_mod.,
            backbone., encoder. or base_encoder. Pickles are read with weights_only=True.
        name: the model's, in timm.
        split: blocks before its prefix tokens enter; a file that says another is refused.
        normalization: a name of NORMALIZATIONS; "auto" is what timm says of public weights, and ImageNet's of a file.

    Raises:
        ValueError: weights that can't be had or read, or don't fit; the message names what is missing, unexpected or
            of another shape.
    """
    if normalization not in ("auto", *NORMALIZATIONS):
        raise ValueError(f"normalization: got {normalization!r}, takes one of {', '.join(('auto', *NORMALIZATIONS))}")
    mean, std = NORMALIZATIONS["imagenet"]
    if source == "timm" or str(source).startswith("timm:"):
        state, mean, std = _fetch(str(source).partition(":")[2] or name)
        left: list[str] = []
    else:
        content, recorded = _read(find_weights(Path(source)))
        if recorded not in (None, split):
            raise ValueError(
                f"pretrained: {source} was trained with its prefix tokens entering after {recorded} blocks, and here "
                f"they enter after {split}: another function; build it with split {recorded}"
            )
        state, left = _unwrap(content, source)
    if normalization != "auto":
        mean, std = NORMALIZATIONS[normalization]
    _check_patches(vit, state, source, name)
    _drop_zero_biases(vit, state, source)
    convert = (
        eva.checkpoint_filter_fn
        if isinstance(vit, eva.Eva)
        else partial(vision_transformer.checkpoint_filter_fn, adapt_layer_scale=True)
    )
    try:
        state = convert(dict(state), vit)
    except Exception as error:  # positions of no square grid, or names of one family with the shapes of another
        raise ValueError(f"pretrained: {source} does not fit {name}: {_one_line(error)}") from error
    expected = vit.state_dict()
    heads = [key for key in state if key not in expected and key.split(".")[0] in _HEADS]
    left += heads
    state = {key: value for key, value in state.items() if key not in heads}
    if problems := _differences(state, expected):
        raise ValueError(f"pretrained: {source} does not fit {name}: {'; '.join(problems)}")
    vit.load_state_dict(state)
    if left:
        _logger.warning("pretrained: of %s, %s left out: no part of the encoder", source, _list(sorted(left)))
    if (mean, std) != NORMALIZATIONS["imagenet"]:
        _fold_normalization(vit, mean, std, name)
        _logger.warning("pretrained: %s takes pixels of mean %s, deviation %s: folded into patches", source, mean, std)


def find_weights(path: Path) -> Path:
    """The file itself, or the one of ENCODER_FILES that a folder holds.

    Raises:
        ValueError: there is none.
    """
    for found in [path / name for name in ENCODER_FILES] if path.is_dir() else [path]:
        if found.is_file():
            return found
    absent = "is no file" if path.suffix else "is no run's folder and no file"
    what = f"holds no {' or '.join(ENCODER_FILES)}" if path.is_dir() else absent
    raise ValueError(f"path: {path} {what}")


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file.

    Raises:
        ValueError: the file can't be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except Exception as error:  # SafetensorError, OSError
        raise ValueError(f"path: {path} can't be read as safetensors: {_one_line(error)}") from error


def seal(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata of a safetensors file of ours with a checksum of the whole file, in the description of the model.

    Args:
        tensors: by name.
        metadata: with METADATA_KEY, whose value is a JSON object.
    """
    described = {**json.loads(metadata[METADATA_KEY]), CHECKSUM_FIELD: _checksum(tensors, metadata)}
    return {**metadata, METADATA_KEY: json.dumps(described)}


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file, whose checksum must fit if it has one.

    Raises:
        ValueError: the file can't be read, or is damaged.
    """
    metadata = read_metadata(path)
    try:
        tensors = load_file(path)
    except Exception as error:  # SafetensorError, OSError
        raise ValueError(f"path: {path} can't be read as safetensors: {_one_line(error)}") from error
    # Also under a key that is no longer ours: one flipped bit makes another of it.
    if any(f'"{CHECKSUM_FIELD}": ' in text and '"timm_kwargs": ' in text for text in metadata.values()):
        try:
            whole = json.loads(metadata[METADATA_KEY])[CHECKSUM_FIELD] == _checksum(tensors, metadata)
        except (ValueError, TypeError, KeyError, AttributeError):
            whole = False
        if not whole:
            raise ValueError(f"path: {path} is damaged: its checksum does not fit")
    return tensors, metadata


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Of everything in the file but the checksum itself."""
    described = {key: value for key, value in json.loads(metadata[METADATA_KEY]).items() if key != CHECKSUM_FIELD}
    digest = hashlib.sha256(json.dumps([{**metadata, METADATA_KEY: described}], sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _fetch(tag: str) -> tuple[dict[str, Tensor], Any, Any]:
    """The public weights of a timm name, with the mean and deviation of their pixels."""
    try:
        # Whole, with its classifier: timm checks the names of the weights only then.
        public = timm.create_model(tag, pretrained=True)
    except Exception as error:  # the network's, the hub's and timm's
        raise ValueError(
            f"pretrained: the weights of {tag} can't be had: {_one_line(error)}; a local safetensors or pth file "
            "works too: --model.pretrained FILE"
        ) from error
    config: Any = public.pretrained_cfg
    return public.state_dict(), tuple(config["mean"]), tuple(config["std"])


def _read(path: Path) -> tuple[Mapping[str, Any], int | None]:
    """The content of a file, and the split that it was trained with, if it says so."""
    if path.suffix == ".safetensors":
        tensors, metadata = read_safetensors(path)
        return tensors, _split_of(path, metadata)
    try:
        # Training scripts keep their arguments beside the weights; a Namespace runs nothing.
        with torch.serialization.safe_globals([Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many types for a file that isn't its own
        raise ValueError(
            f"pretrained: {path} can't be read as weights alone (torch.load, weights_only=True): {_one_line(error)}"
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(f"pretrained: {path} holds a {type(content).__name__}, takes a state dict")
    return content, None


def _split_of(path: Path, metadata: Mapping[str, str]) -> int | None:
    if METADATA_KEY not in metadata:
        return None
    try:
        described = json.loads(metadata[METADATA_KEY])
        split = described["split"] if described.keys() <= DESCRIBED else None
    except (ValueError, TypeError, KeyError, AttributeError):
        split = None
    if type(split) is not int:
        raise ValueError(f"pretrained: the metadata {METADATA_KEY!r} of {path} do not say the split")
    return split


def _unwrap(content: Mapping[str, Any], source: str | Path) -> tuple[dict[str, Tensor], list[str]]:
    """The encoder's tensors in the content of a file, and the names of what was beside them."""
    while wrapper := next((key for key in _WRAPPERS if isinstance(content.get(key), Mapping)), None):
        content = content[wrapper]
    left: list[str] = []
    while prefix := next((p for p in _PREFIXES if any(k.startswith(p) and "patch_embed." in k for k in content)), None):
        left += [key for key in content if not key.startswith(prefix)]
        content = {key.removeprefix(prefix): value for key, value in content.items() if key.startswith(prefix)}
    if others := [str(key) for key, value in content.items() if not isinstance(value, Tensor)]:
        raise ValueError(f"pretrained: {source} holds no state dict: {_list(others)} {_are(others)} no tensor")
    return dict(content), left


def _check_patches(vit: Any, state: Mapping[str, Tensor], source: str | Path, name: str) -> None:
    """Refuse patches of another size, which timm would resize."""
    weight, own = state.get("patch_embed.proj.weight"), vit.patch_embed.proj.weight
    if weight is not None and weight.ndim == 4 and weight.shape[2:] != own.shape[2:]:
        raise ValueError(
            f"pretrained: {source} does not fit {name}: patch_embed.proj.weight is {tuple(weight.shape)}, takes "
            f"{tuple(own.shape)}"
        )


def _drop_zero_biases(vit: nn.Module, state: dict[str, Tensor], source: str | Path) -> None:
    """Drop the biases of DINOv3's queries and values where the model has none, if they are zero (the keys' count not).

    timm's filter drops them whatever they are.
    """
    if "storage_tokens" not in state:
        return
    own = dict(vit.named_parameters())
    for key in [key for key in state if key.endswith("attn.qkv.bias")]:
        if key.replace("qkv.bias", "q_bias") in own:
            continue
        query, _, value = state.pop(key).chunk(3)
        if query.any() or value.any():
            raise ValueError(f"pretrained: {source} has {key}, and the model has none; its name with _qkvb has")


def _differences(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    missing = [key for key in expected if key not in state]
    unexpected = [key for key in state if key not in expected]
    shapes = [
        f"{key} {tuple(value.shape)} for {tuple(expected[key].shape)}"
        for key, value in state.items()
        if key in expected and value.shape != expected[key].shape
    ]
    found = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    return [f"{what} {_list(names)}" for what, names in found.items() if names]


@torch.no_grad()
def _fold_normalization(vit: Any, mean: Iterable[float], std: Iterable[float], name: str) -> None:
    """Let the patch embedding take pixels normalized with ImageNet's mean and deviation instead of these."""
    mean, std = torch.tensor(mean), torch.tensor(std)  # (3,) each
    scale, shift = torch.tensor(IMAGENET_STD) / std, (torch.tensor(IMAGENET_MEAN) - mean) / std
    projection = vit.patch_embed.proj
    constant = projection.weight.sum((2, 3)) @ shift  # (C,), what the shift adds to every patch
    if projection.bias is not None:
        projection.bias += constant
    elif vit.pos_embed is not None:
        vit.pos_embed[:, 0 if vit.no_embed_class else vit.num_prefix_tokens :] += constant
    else:
        raise ValueError(f"normalization: {name} has neither a patch bias nor positions that could take the mean up")
    projection.weight *= scale[:, None, None]


def _list(names: list[str]) -> str:
    rest = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def _are(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
