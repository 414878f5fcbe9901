"""SplitViT: a timm vision transformer that keeps patch tokens alone up to a block, and inserts [CLS] there.

Its file format stands here too, since the class reads and writes it.
"""

import json
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.layers import PatchEmbed, build_sincos2d_pos_embed, resample_abs_pos_embed
from timm.models import checkpoint, is_model_in_modules
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ser_fast.io import write_atomically, write_text
from ser_fast.pretrained import (
    DESCRIBED,
    METADATA_KEY,
    PREPROCESSING_KEY,
    find_weights,
    load_weights,
    read_safetensors,
    seal,
)
from ser_fast.views.pixels import IMAGENET_MEAN, IMAGENET_STD

# Exact types: a subclass may embed or pool in a way of its own, and would silently become another function.
SUPPORTED = (VisionTransformer, VisionTransformerDistilled, Eva)
SUPPORTED_MODULES = ("vision_transformer", "deit", "eva")
# The arguments of timm that shape these models, and name nothing outside of them.
ARCHITECTURE = frozenset(
    [
        "attn_drop_rate",
        "class_token",
        "depth",
        "drop_path_rate",
        "drop_rate",
        "dynamic_img_size",
        "embed_dim",
        "fc_norm",
        "final_norm",
        "global_pool",
        "img_size",
        "in_chans",
        "init_values",
        "mlp_ratio",
        "no_embed_class",
        "num_classes",
        "num_heads",
        "num_reg_tokens",
        "patch_drop_rate",
        "patch_size",
        "pos_drop_rate",
        "pos_embed",
        "pre_norm",
        "proj_drop_rate",
        "qk_norm",
        "qkv_bias",
        "qkv_fused",
        "reg_tokens",
        "rope_grid_offset",
        "rope_mixed_mode",
        "rope_rotate_half",
        "rope_temperature",
        "scale_attn_inner_norm",
        "scale_attn_norm",
        "scale_mlp_norm",
        "swiglu_align_to",
        "swiglu_mlp",
        "use_abs_pos_emb",
        "use_post_norm",
        "use_rot_pos_emb",
        "weight_init",
    ]
)
SUPPORTED_NAMES = "timm's ViT, DeiT, DINOv2, EVA and DINOv3 models (VisionTransformer and Eva with a PatchEmbed)"


class Encoded(NamedTuple):
    """What `SplitViT.encode` read on its walk; layer k is the state after k blocks, before the final norm.

    Attributes:
        embedding: (B, C), pooled after the last block and the final norm; None where the walk stopped before it.
        tokens: by layer, (B, H, W, C), the patch tokens alone.
        cls: by layer, (B, C), the class token, where it has entered: layers above the split.
    """

    embedding: Tensor | None
    tokens: dict[int, Tensor]
    cls: dict[int, Tensor]


class SplitViT(nn.Module):
    """A timm vision transformer in two halves: `early` sees patch tokens alone, `late` inserts the prefix tokens.

    `encode` is the walk over all blocks, and reads any layers on its way.

    Blocks 0 .. split-1 run on the H x W patch tokens; class, distillation and register tokens enter before block
    `split`, with their own position embeddings where the family has them. With split=0 this is timm's own forward.
    With split=depth no block follows: a pooled [CLS] then carries nothing of the image. Sides of images may be any
    multiples of the patch size: absolute positions are resized to the exact grid (bicubic, antialiased, as timm does)
    and rotary positions are built for it.

    Parameter names and state_dict keys are timm's. The timm instance is taken over, not copied: its parameters are
    shared, and rotary attention in its blocks before the split no longer expects prefix tokens, so do not use it
    for anything else. Train-time rotary coordinate augmentation, where asked for, is drawn once a walk.

    Args:
        model: a timm name, built with num_classes=0 and dynamic_img_size=True, or a timm instance that has
            dynamic_img_size=True.
        split: the number of blocks before the prefix tokens, 0 .. depth.
        pretrained: weights to start from, only with a name: True or "timm", the public ones of that name; "timm:NAME",
            of another name; or a local file. See `ser_fast.pretrained.load_weights`. Public models insert their
            prefix tokens before block 0: with another split their weights start as another function.
        normalization: of the pixels that these weights were trained on; see there.
        timm_kwargs: further arguments of timm.create_model; only with a name.

    Attributes:
        recipe: what a checkpoint needs to rebuild the model: timm name and arguments; None of an instance.
        pretrained: whether the weights were loaded, not drawn. What an objective does to an encoder before training
            from scratch is then left undone.

    Raises:
        ValueError: for a model that is not supported, has a fixed image size or drops patches, for a split outside
            0 .. depth, and for weights that can't be had or don't fit.

    Example:
        >>> vit = SplitViT("vit_small_patch16_224", split=3)
        >>> tokens = vit.early(images)  # (B, H, W, C), for the equivariance loss
        >>> embedding = vit.pool(vit.late(tokens))  # (B, C), for the invariance loss
    """

    _timm: VisionTransformer | Eva

    def __init__(
        self,
        model: str | nn.Module,
        split: int,
        *,
        pretrained: bool | str | Path = False,
        normalization: str = "auto",
        **timm_kwargs: Any,
    ) -> None:
        super().__init__()
        self.recipe: tuple[str, dict[str, Any]] | None = None
        self.pretrained = bool(pretrained)
        vit: Any
        if isinstance(model, str):
            name = model
            if not is_model_in_modules(name, SUPPORTED_MODULES):
                raise ValueError(f"model: {name!r} is not supported; SplitViT takes {SUPPORTED_NAMES}")
            self.recipe = (name, {k: v for k, v in timm_kwargs.items() if k != "checkpoint_path"})
            vit = timm.create_model(name, **{"num_classes": 0, "dynamic_img_size": True, **timm_kwargs})
        elif pretrained:
            raise ValueError("pretrained: came with a built model; it goes with a timm name")
        elif timm_kwargs:
            raise ValueError(f"timm_kwargs: {sorted(timm_kwargs)} came with a built model; they go with a timm name")
        else:
            name, vit = type(model).__name__, model
        if type(vit) not in SUPPORTED or not isinstance(vit.patch_embed, PatchEmbed):
            raise ValueError(f"model: {name!r} is not supported; SplitViT takes {SUPPORTED_NAMES}")
        if not vit.dynamic_img_size:
            raise ValueError(f"model: {name!r} has a fixed image size; create it with dynamic_img_size=True")
        if not (vit.patch_drop is None or isinstance(vit.patch_drop, nn.Identity)):
            raise ValueError(f"model: {name!r} drops patches, which leaves no token lattice; use patch_drop_rate=0")
        if split not in range(len(vit.blocks) + 1):
            raise ValueError(f"split: {name!r} can be split at 0 to {len(vit.blocks)} blocks, got {split}")
        if pretrained:
            source = "timm" if pretrained is True else pretrained
            load_weights(vit, source, name=name, split=split, normalization=normalization)

        # The registries themselves are shared with the timm module, so that names and state_dict keys are timm's and
        # both always hold the same tensors. The module is set past nn.Module, which would register it as a child.
        self._parameters, self._modules = vit._parameters, vit._modules
        object.__setattr__(self, "_timm", vit)
        self.split = split
        if getattr(vit, "rope", None) is not None:
            # Rotary attention leaves its first num_prefix_tokens tokens unrotated. Set here for good and not around
            # each call, since gradient checkpointing runs the blocks again during backward.
            for i, block in enumerate(vit.blocks):
                block.attn.num_prefix_tokens = 0 if i < split else vit.num_prefix_tokens

    def _replicate_for_data_parallel(self) -> NoReturn:
        # A replica would hold the original's timm module, and compute with its weights.
        raise RuntimeError("SplitViT: got nn.DataParallel, takes DistributedDataParallel")

    @property
    def embed_dim(self) -> int:
        """The number of channels C of a token."""
        return self._timm.embed_dim

    @property
    def depth(self) -> int:
        """The number of blocks."""
        return len(self._timm.blocks)

    @property
    def patch_size(self) -> tuple[int, int]:
        """Height and width of a patch, in pixels."""
        return self._timm.patch_embed.patch_size

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images that the model was made for, in pixels; others work too."""
        return self._timm.patch_embed.img_size

    @property
    def num_prefix_tokens(self) -> int:
        """The number P of class, distillation and register tokens that `late` puts before the patch tokens."""
        return self._timm.num_prefix_tokens

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that timm exempts from weight decay; timm.optim asks for it."""
        return self._timm.no_weight_decay()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block, before and after the split, during backward instead of storing its activations."""
        self._timm.set_grad_checkpointing(enable)

    def preprocessing(self) -> dict[str, Any]:
        """What an image needs before `forward`, in JSON's types; it is recorded in every file.

        Pixels in [0, 1], (pixels - mean) / std a channel; image_size is height and width, for which the shorter side is
        resized with antialiased `interpolation`, and the center cut out.
        """
        return {
            "mean": list(IMAGENET_MEAN),
            "std": list(IMAGENET_STD),
            "image_size": list(self.image_size),
            "interpolation": "bilinear",
        }

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the encoder to a folder in Hugging Face's layout, for `from_pretrained`.

        model.safetensors is what `save_split_vit` writes; config.json repeats its metadata for other tools.

        Raises:
            ValueError: as `save_split_vit`.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "model.safetensors", lambda path: save_split_vit(path, self))
        config = {"library_name": "ser-fast", **_describe(self), PREPROCESSING_KEY: self.preprocessing()}
        write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "SplitViT":
        """The encoder that `save_pretrained` wrote to a folder, in eval mode as Hugging Face's.

        Nothing is downloaded; of a model on the hub, give huggingface_hub.snapshot_download(NAME).

        Raises:
            ValueError: as `load_split_vit`.

        Example:
            >>> load_split_vit("runs/ser").save_pretrained("ser-vit-small")
            >>> encoder = SplitViT.from_pretrained("ser-vit-small")
        """
        return load_split_vit(folder).eval()

    def fix_sincos_positions(self) -> None:
        """Set the position embedding to the fixed 2-D sin-cos of MoCo-v3 and freeze it.

        Prefix tokens get zeros. A checkpoint stores the values; that they are frozen is not part of it.

        Raises:
            ValueError: if the model has no absolute position embedding, or embed_dim is not a multiple of 4.
        """
        pos_embed = self._timm.pos_embed
        if pos_embed is None or self.embed_dim % 4:
            raise ValueError(
                f"model: sin-cos positions need an absolute position embedding and an embed_dim that is a multiple "
                f"of 4, got {'none' if pos_embed is None else 'one'} and {self.embed_dim}"
            )
        grid_size = self._timm.patch_embed.grid_size
        sincos = build_sincos2d_pos_embed(grid_size, self.embed_dim, interleave_sin_cos=True)  # (H*W, C)
        with torch.no_grad():
            pos_embed.zero_()
            pos_embed[0, -len(sincos) :] = sincos
        pos_embed.requires_grad_(False)

    def encode(self, images: Tensor, layers: Collection[int] = (), until: int | None = None) -> Encoded:
        """Walk over the blocks once, reading layers on the way.

        Args:
            images: (B, 3, Hp, Wp), sides in pixels, multiples of the patch size.
            layers: what to read, each 0 .. depth; layer k is the state after k blocks, 0 the patch embedding.
            until: the layer to stop at, at least the highest of `layers`; default depth, with the embedding.

        Returns:
            The embedding, and the patch tokens and class tokens of the layers.

        Raises:
            ValueError: if images has another shape, and for layers that are not on the way.

        Example:
            >>> encoded = SplitViT("vit_small_patch16_224", split=3).encode(images, layers=(3, 12))
            >>> encoded.tokens[3].shape, encoded.cls[12].shape, encoded.embedding.shape
            (torch.Size([8, 14, 14, 384]), torch.Size([8, 384]), torch.Size([8, 384]))
        """
        last = self.depth if until is None else until
        if last not in range(self.depth + 1):
            raise ValueError(f"until: got {until}, takes 0 to {self.depth}, the number of blocks")
        if out := sorted(layer for layer in layers if layer not in range(last + 1)):
            raise ValueError(f"layers: got {out}, takes 0 to {last}, the layers on the way")
        embedded, grid = self._embed(images)
        has_class_token = getattr(self._timm, "cls_token", None) is not None
        tokens, cls = {}, {}
        for layer, sequence in self._walk(embedded, grid, 0, last):
            if layer in layers:
                tokens[layer] = sequence[:, -grid[0] * grid[1] :].unflatten(1, grid)
                if layer > self.split and has_class_token:
                    cls[layer] = sequence[:, 0]
        if until is not None:
            return Encoded(None, tokens, cls)
        return Encoded(self.pool(self._finish(sequence)), tokens, cls)

    def early(self, images: Tensor) -> Tensor:
        """The patch tokens after block split-1 (after the embedding for split=0), without the final norm.

        Args:
            images: (B, 3, Hp, Wp), sides in pixels, multiples of the patch size.

        Returns:
            (B, H, W, C) with H = Hp / patch height and W = Wp / patch width.

        Raises:
            ValueError: if images has another shape.
        """
        return self.encode(images, (self.split,), until=self.split).tokens[self.split]

    def late(self, tokens: Tensor) -> Tensor:
        """The rest of the transformer on the patch tokens of `early`, with the prefix tokens inserted.

        Args:
            tokens: (B, H, W, C).

        Returns:
            (B, P + H*W, C) after the final norm, prefix tokens first, as timm's forward_features.

        Raises:
            ValueError: if tokens has another shape.
        """
        if tokens.ndim != 4 or tokens.shape[-1] != self.embed_dim:
            raise ValueError(f"tokens: got {tuple(tokens.shape)}, takes (B, H, W, {self.embed_dim})")
        grid = tokens.shape[1], tokens.shape[2]
        # A queue of one: without gradients, nothing of the blocks before is kept.
        ((_, sequence),) = deque(self._walk(tokens.flatten(1, 2), grid, self.split, self.depth), maxlen=1)
        return self._finish(sequence)

    def norm_final(self, features: Tensor) -> Tensor:
        """The final norm of features (..., C); the identity in models that normalize what they pooled."""
        return self._timm.norm(features)

    def pool(self, features: Tensor) -> Tensor:
        """The embedding (B, C) of `late`'s features (B, P + H*W, C), as timm's forward_head(pre_logits=True)."""
        return self._timm.forward_head(features, pre_logits=True)

    def forward(self, images: Tensor) -> Tensor:
        """The pooled embedding (B, C) of images (B, 3, Hp, Wp): pool(late(early(images)))."""
        embedding = self.encode(images).embedding
        assert embedding is not None  # the walk went to its end
        return embedding

    def layer_maps(self, images: Tensor) -> list[Tensor]:
        """The patch tokens after each block, before and after the split, without the final norm.

        Args:
            images: (B, 3, Hp, Wp), sides in pixels, multiples of the patch size.

        Returns:
            depth tensors (B, H, W, C); entry split-1 is `early`'s result.

        Raises:
            ValueError: if images has another shape.
        """
        layers = range(1, self.depth + 1)
        return list(self.encode(images, layers, until=self.depth).tokens.values())

    def class_tokens(self, images: Tensor, blocks: int) -> list[Tensor]:
        """The class token after each of the last `blocks` blocks, each through the final norm.

        Args:
            images: (B, 3, Hp, Wp), sides in pixels, multiples of the patch size.
            blocks: 1 .. depth - split, the blocks that the class token runs through.

        Returns:
            `blocks` tensors (B, C), the last block's last: that of `late`.

        Raises:
            ValueError: if images has another shape, for other blocks, and if the model has no class token.

        Source: DINO's get_intermediate_layers.
        """
        if getattr(self._timm, "cls_token", None) is None:
            raise ValueError("model: has no class token")
        if blocks not in range(1, self.depth - self.split + 1):
            raise ValueError(
                f"blocks: got {blocks}, takes 1 to {self.depth - self.split}, the blocks after the split that the "
                "class token runs through"
            )
        layers = range(self.depth - blocks + 1, self.depth + 1)
        return [self.norm_final(token) for token in self.encode(images, layers, until=self.depth).cls.values()]

    def _embed(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Patch tokens (B, H*W, C) with absolute positions, and their grid (H, W)."""
        vit = self._timm
        if (
            images.ndim != 4
            or images.shape[1] != vit.in_chans
            or any(side == 0 or side % patch for side, patch in zip(images.shape[2:], self.patch_size, strict=True))
        ):
            raise ValueError(
                f"images: got {tuple(images.shape)}, takes (B, {vit.in_chans}, height, width), the sides multiples of "
                f"the patch size {self.patch_size}"
            )
        # Not vit.patch_embed(images): it checks the sides again with a message that has them in it, for which
        # torch.compile would compile anew for every size.
        tokens = vit.patch_embed.norm(vit.patch_embed.proj(images).permute(0, 2, 3, 1))  # (B, H, W, C)
        grid = (tokens.shape[1], tokens.shape[2])
        tokens = tokens.flatten(1, 2)  # (B, H*W, C)
        if vit.pos_embed is not None:
            num_prefix_positions = 0 if vit.no_embed_class else vit.num_prefix_tokens
            tokens = tokens + self._resampled(vit.pos_embed[:, num_prefix_positions:], grid)
        # In the order of rows, which is not that of the convolution: as the blocks give it, for the next one.
        return vit.norm_pre(vit.pos_drop(tokens)).contiguous(), grid

    def _resampled(self, positions: Tensor, grid: tuple[int, int]) -> Tensor:
        """Positions (1, H*W, C) of a grid from those of the model's own."""
        own = self._timm.patch_embed.grid_size
        if not torch.compiler.is_compiling() or torch.compiler.is_exporting():
            return resample_abs_pos_embed(positions, new_size=list(grid), old_size=list(own), num_prefix_tokens=0)
        # The same without asking whether the grid is the model's own: compiled, each answer would be a graph.
        lattice = positions.float().unflatten(1, own).permute(0, 3, 1, 2)
        lattice = F.interpolate(lattice, size=grid, mode="bicubic", antialias=True)
        return lattice.flatten(2).mT.to(positions.dtype)

    def _insert_prefix(self, tokens: Tensor) -> Tensor:
        """(B, P + H*W, C) from the patch tokens (B, H*W, C): what timm does to prefix tokens before block 0."""
        vit = self._timm
        prefix_tokens = [getattr(vit, name, None) for name in ("cls_token", "dist_token", "reg_token")]
        present = [token for token in prefix_tokens if token is not None]
        if not present:
            return tokens
        prefix = torch.cat(present, dim=1).expand(tokens.shape[0], -1, -1)  # (B, P, C)
        if vit.pos_embed is not None and not vit.no_embed_class:
            prefix = prefix + vit.pos_embed[:, : vit.num_prefix_tokens]
        return torch.cat([vit.norm_pre(vit.pos_drop(prefix)), tokens], dim=1)

    def _rope(self, grid: tuple[int, int]) -> Tensor | None:
        """Sines and cosines of the rotary families: (H*W, 2*D), or (depth, heads, H*W, 2*D) where blocks differ."""
        rope = getattr(self._timm, "rope", None)
        return None if rope is None else rope.get_embed(shape=grid)

    def _walk(self, sequence: Tensor, grid: tuple[int, int], start: int, stop: int) -> Iterator[tuple[int, Tensor]]:
        """(layer, sequence) of each layer from `start` to `stop`, without the prefix tokens up to the split.

        sequence: (B, H*W, C) at layer `start`, not beyond the split; (B, P + H*W, C) of the layers above it.
        """
        rope = self._rope(grid)
        yield start, sequence
        for i in range(start, stop):
            if i == self.split:
                sequence = self._insert_prefix(sequence)
            sequence = self._block(i, sequence, rope)
            yield i + 1, sequence

    def _finish(self, sequence: Tensor) -> Tensor:
        """(B, P + H*W, C) after the final norm from the sequence at layer depth."""
        if self.split == self.depth:
            sequence = self._insert_prefix(sequence)
        return self.norm_final(sequence)

    def _block(self, i: int, tokens: Tensor, rope: Tensor | None) -> Tensor:
        """Block i on tokens (B, N, C)."""
        vit = self._timm
        args: tuple[Tensor, ...] = (tokens,)
        if rope is not None:
            args += (rope[i] if vit.rope_mixed else rope,)
        block = vit.blocks[i]
        return checkpoint(block, *args) if vit.grad_checkpointing else block(*args)


def save_split_vit(path: str | Path, model: SplitViT, metadata: Mapping[str, str] | None = None) -> None:
    """Write a SplitViT to a safetensors file that says how to rebuild it: timm name, its arguments, and the split.

    The tensors have timm's names, but the split is part of the function they compute: loaded into plain timm, whose
    prefix tokens enter at block 0, they give other features. `metadata` is stored beside them, and what
    `SplitViT.preprocessing` says, for safetensors.safe_open(path, "pt").metadata(). A checksum covers all of it.

    Raises:
        TypeError: if model is not a SplitViT, such as a DistributedDataParallel or compiled one.
        ValueError: if model wraps an instance rather than a timm name, or was built with arguments JSON cannot hold.
    """
    if not isinstance(model, SplitViT):
        raise TypeError(f"model: got a {type(model).__name__}, takes a SplitViT: give the module that it wraps")
    own = {METADATA_KEY: _describe(model), PREPROCESSING_KEY: model.preprocessing()}
    texts = {key: json.dumps(value) for key, value in own.items()}
    tensors = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
    path = Path(path)
    path.touch()
    mode = path.stat().st_mode  # the umask's; safetensors writes files that their owner alone can read
    save_file(tensors, path, metadata=seal(tensors, {"format": "pt", **(metadata or {}), **texts}))
    path.chmod(mode)


def load_split_vit(path: str | Path) -> SplitViT:
    """Rebuild the SplitViT that save_split_vit wrote to path, on the CPU, in training mode as any new module.

    Args:
        path: the file, or a folder that holds it: a run's, or one of `SplitViT.save_pretrained`.

    Raises:
        ValueError: if there is no such file, if it is damaged (its checksum is verified), or does not say how to
            rebuild a SplitViT, as plain timm weights do not.
    """
    path = find_weights(Path(path))
    tensors, metadata = read_safetensors(path)
    recipe = metadata.get(METADATA_KEY)
    if recipe is None:
        raise ValueError(
            f"path: {path} has no {METADATA_KEY!r} metadata, so the split is not known; build "
            f"SplitViT(name, split, pretrained={str(path)!r})"
        )
    name, split, architecture = _architecture(path, recipe)
    depth = architecture.get("depth")
    if isinstance(depth, int | float) and depth > len(tensors):  # building so many would take hours
        raise ValueError(f"path: {path} has {len(tensors)} tensors, too few for the {depth} blocks of its metadata")
    try:
        with torch.device("meta"):  # takes no memory: metadata could ask for any
            described = SplitViT(name, split, **architecture).state_dict()
        differing = [
            key for key, tensor in tensors.items() if key in described and described[key].shape != tensor.shape
        ]
        if differing:
            shapes = f"{tuple(tensors[differing[0]].shape)}, described as {tuple(described[differing[0]].shape)}"
            raise RuntimeError(f"{differing[0]} is {shapes}")
        if described.keys() - tensors.keys():
            raise RuntimeError(f"Missing key(s): {', '.join(sorted(described.keys() - tensors.keys())[:3])}")
        model = SplitViT(name, split, **architecture)
        model.load_state_dict(tensors)
    except (RuntimeError, TypeError, AssertionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"path: {path} does not hold the weights that its metadata describe: {reason}") from error
    model.pretrained = True
    return model


def _architecture(path: Path, recipe: str) -> tuple[str, int, dict[str, Any]]:
    """Name, split and arguments of the model that a file describes.

    A file may come from anybody, and timm takes arguments that name files to read, addresses to download from and
    folders to write to: of a file, only plain values that shape the network are taken.
    """
    try:
        fields = json.loads(recipe)
        name, split, architecture = fields["model"], fields["split"], fields["timm_kwargs"]
        known = fields.keys() <= DESCRIBED
        plain = known and isinstance(name, str) and type(split) is int and isinstance(architecture, dict)
    except (ValueError, TypeError, KeyError, AttributeError):
        plain = False
    if not plain:
        raise ValueError(f"path: the metadata {METADATA_KEY!r} of {path} do not describe a SplitViT")
    refused = sorted(key for key, value in architecture.items() if key not in ARCHITECTURE or not _is_plain(value))
    if refused:
        raise ValueError(f"path: the metadata of {path} have arguments that no architecture has: {', '.join(refused)}")
    return name, split, architecture


def _is_plain(value: Any) -> bool:
    """A number, a flag, None, a short word, or a list of numbers."""
    if isinstance(value, list):
        return len(value) <= 64 and all(isinstance(entry, int | float) for entry in value)
    return value is None or isinstance(value, int | float) or (isinstance(value, str) and len(value) <= 16)


def _describe(model: SplitViT) -> dict[str, Any]:
    """What `load_split_vit` rebuilds a model from."""
    if model.recipe is None:
        raise ValueError("model: wraps a timm instance; only a SplitViT built from a timm name can be rebuilt")
    name, timm_kwargs = model.recipe
    described = {"model": name, "split": model.split, "timm_kwargs": timm_kwargs}
    try:
        json.dumps(described)
    except TypeError as error:
        raise ValueError(f"model: was built with timm_kwargs={timm_kwargs}, which JSON cannot hold: {error}") from error
    return described
