"""The trainer's options, as dataclasses that `ser-fast train` reads from the command line."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from ser_fast.loss import SERLoss
from ser_fast.objectives.moco_v3 import MoCoV3
from ser_fast.views.color import Color
from ser_fast.views.recipe import MakeViews
from ser_fast.views.samplers import SAMPLERS, Crop
from ser_fast.vit import SplitViT


@dataclass(frozen=True)
class ModelConfig:
    """The vision transformer."""

    name: str = "vit_small_patch16_224"
    """A timm model (ViT, DeiT3, DINOv2, Eva, DINOv3)."""
    split: int = 3
    """Blocks before [CLS] is inserted; SER acts on the tokens there."""
    image_size: int = 224
    """Side of the images and of the crops, in pixels."""
    patch_size: int | None = None
    embed_dim: int | None = None
    depth: int | None = None
    num_heads: int | None = None
    drop_path_rate: float = 0.0
    grad_checkpointing: bool = False
    """Recompute blocks in the backward pass to save memory."""

    def build(self) -> SplitViT:
        shape = {name: getattr(self, name) for name in ("patch_size", "embed_dim", "depth", "num_heads")}
        given = {name: value for name, value in shape.items() if value is not None}
        model = SplitViT(self.name, self.split, img_size=self.image_size, drop_path_rate=self.drop_path_rate, **given)
        model.set_grad_checkpointing(self.grad_checkpointing)
        return model


@dataclass(frozen=True)
class ViewsConfig:
    """How the two views are made."""

    sampler: Literal["d4_scale", "reflections", "affine", "crop"] = "d4_scale"
    """Draws the maps that equivariance is asked of: the paper's D4 and scales, the released code's reflections, any
    affine map, or crops as partial maps."""
    share: float = 0.1
    """Of the batch, given to equivariance; 0 trains without SER."""
    crop_area: tuple[float, float] = (0.2, 1.0)
    """Range of the crops' area, relative to the image."""
    crop_turns: bool = True
    """With the sampler "crop": crops in all eight elements of D4. Equivariance to turns is learned from turns."""
    color_strength: Annotated[float, tyro.conf.arg(aliases=("--views.colour-strength",))] = 1.0
    color_group: Annotated[int, tyro.conf.arg(aliases=("--views.colour-group",))] = 8
    """Images that share one draw of colors."""

    def build(self, patch_size: int, seed: int) -> MakeViews:
        crop = Crop(area=self.crop_area)
        partial = dataclasses.replace(crop, turns=self.crop_turns)
        sampler = partial if self.sampler == "crop" else SAMPLERS[self.sampler]()
        color = Color(self.color_strength, self.color_group)
        return MakeViews(sampler, crop, self.share, patch_size, color, seed)


@dataclass(frozen=True)
class SERConfig:
    """The equivariance term; see SERLoss."""

    weight: float = 1.0
    """lambda. 0 shapes nothing: the term is computed on detached tokens, for comparison."""
    preset: Literal["paper", "released"] = "paper"
    temperature: float | None = None
    negatives: Literal["both", "other"] | None = None
    both_directions: bool | None = None
    momentum_keys: bool = False
    """Contrast with the momentum encoder's tokens instead of the encoder's own."""
    hidden_dim: int = 512
    out_dim: int = 512
    interpolation: Literal["nearest", "bilinear", "bicubic", "catmull_rom", "mitchell", "lanczos3", "area"] = "bicubic"
    padding: Literal["zeros", "border", "reflection"] = "border"
    antialias: bool = False
    max_tokens: int | None = None
    gather: bool = True
    backend: Literal["auto", "reference", "cpu", "triton", "cuda"] = "auto"

    def build(self, dim: int) -> SERLoss:
        options = dataclasses.asdict(self)
        for name in ("weight", "momentum_keys"):
            options.pop(name)
        return SERLoss(dim, objective="moco_v3", **options)


@dataclass(frozen=True)
class MoCoV3Config:
    """The invariance objective."""

    dim: int = 256
    mlp_dim: int = 4096
    temperature: float = 0.2
    momentum: float = 0.99

    def build(self, encoder: SplitViT) -> MoCoV3:
        return MoCoV3(encoder, **dataclasses.asdict(self))


@dataclass(frozen=True)
class OptimConfig:
    """Optimiser and schedule."""

    batch_size: int = 256
    """Images a step, over all ranks and accumulated parts."""
    accumulate: int = 1
    """Parts that a rank's batch is processed in, one after another; each contrasts within itself."""
    lr: float = 3e-4
    """Peak learning rate for a batch of 256; scaled linearly with batch_size."""
    weight_decay: float = 0.1
    epochs: int = 100
    steps: int | None = None
    """Stop after this many steps; overrides epochs."""
    warmup: float = 0.1
    """Of all steps, with the learning rate rising linearly; then it falls along a cosine to 0."""
    clip_grad: float = 3.0
    """Largest norm of the gradient, for the model and for SER's projector each; 0 never clips."""


@dataclass(frozen=True)
class TrainConfig:
    """Pretrain a vision transformer with MoCo-v3 and Soft Equivariance Regularization."""

    out: Path = Path("runs/moco_v3_ser")
    """The run's folder: config, environment, log, checkpoints."""
    data: str = "photos"
    """"photos" (in scikit-image's wheel), "folder:PATH" or "cifar10:PATH"."""
    model: ModelConfig = field(default_factory=ModelConfig)
    views: ViewsConfig = field(default_factory=ViewsConfig)
    ser: SERConfig = field(default_factory=SERConfig)
    moco: MoCoV3Config = field(default_factory=MoCoV3Config)
    optim: OptimConfig = field(default_factory=OptimConfig)
    resume: str = "none"
    """"auto" continues from the newest checkpoint in `out`, if there is one; a path, from that one."""
    save_every: int = 500
    """Steps between checkpoints; one is written at the end in any case."""
    keep_checkpoints: int = 2
    """The newest ones that stay on disk."""
    amp: Literal["auto", "bf16", "off"] = "auto"
    """bfloat16 autocast; "auto" uses it on CUDA."""
    device: str = "auto"
    workers: int = 2
    """Processes that load images, on each rank."""
    seed: int = 0


# What may differ between a run and its continuation, since it changes no number.
_FREE = ("out", "resume", "save_every", "keep_checkpoints", "device", "workers")


def to_json(config: TrainConfig) -> dict[str, Any]:
    """The config in JSON's types."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def from_json(fields: dict[str, Any]) -> TrainConfig:
    """The config that `to_json` made the fields of."""
    parts = {"model": ModelConfig, "views": ViewsConfig, "ser": SERConfig, "moco": MoCoV3Config, "optim": OptimConfig}
    fields = {name: parts[name](**value) if name in parts else value for name, value in fields.items()}
    views = dataclasses.replace(fields["views"], crop_area=tuple(fields["views"].crop_area))
    return TrainConfig(**{**fields, "views": views, "out": Path(fields["out"])})


def differences(ours: dict[str, Any], theirs: dict[str, Any], prefix: str = "") -> list[str]:
    """The options, by dotted name, in which two configs (from `to_json`) would give different numbers."""
    names: list[str] = []
    for name in ours:
        if isinstance(ours[name], dict):
            names += differences(ours[name], theirs.get(name, {}), f"{prefix}{name}.")
        elif ours[name] != theirs.get(name) and prefix + name not in _FREE:
            names.append(prefix + name)
    return names
