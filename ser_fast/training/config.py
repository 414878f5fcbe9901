"""The trainer's options, as dataclasses that `ser-fast train` reads from the command line."""

import json
from collections.abc import Mapping, Set
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from ser_fast.addons import ADDONS
from ser_fast.addons.base import AddOn, AddOnConfig, resolve_layers
from ser_fast.addons.ser import SERConfig
from ser_fast.data import MAX_PIXELS
from ser_fast.objectives import OBJECTIVES
from ser_fast.objectives.base import ObjectiveConfig
from ser_fast.objectives.moco_v3 import MoCoV3Config
from ser_fast.views.samplers import SAMPLERS, Crop

if TYPE_CHECKING:  # options are read without timm and torchvision, which what they build takes
    from ser_fast.training.pretraining import Pretraining
    from ser_fast.views.recipe import MakeViews
    from ser_fast.vit import SplitViT


@dataclass(frozen=True)
class ModelConfig:
    """The vision transformer."""

    name: str = "vit_small_patch16_224"
    """A timm model (ViT, DeiT3, DINOv2, Eva, DINOv3)."""
    split: int | None = None
    """Blocks before [CLS] is inserted; default 3, and 0 with pretrained weights, which expect it from the start."""
    image_size: int = 224
    """Side of the images and of the crops, in pixels."""
    patch_size: int | None = None
    """Side of a patch in pixels; default the model's."""
    embed_dim: int | None = None
    """Channels of a token; default the model's."""
    depth: int | None = None
    """Number of blocks; default the model's."""
    num_heads: int | None = None
    """Of every attention; default the model's."""
    drop_path_rate: float = 0.0
    """Stochastic depth of the last block; of the others in proportion."""
    grad_checkpointing: bool = False
    """Recompute blocks in the backward pass to save memory."""
    pretrained: str = "none"
    """Weights to start from: "timm" (the public ones of the name), "timm:NAME", or a safetensors or pth file."""
    normalization: Literal["auto", "imagenet", "half", "clip"] = "auto"
    """Of the pixels that the pretrained weights were trained on: ImageNet's mean and deviation, .5 and .5, or CLIP's;
    "auto" is what timm says of its own, and ImageNet's of a file."""
    freeze: tuple[Literal["patch_embed", "pos_embed", "norm"], ...] = ()
    """Parts that are not trained: the patch embedding, its positions, the final norm."""

    @property
    def blocks_before_cls(self) -> int:
        """The split, or its default."""
        if self.split is not None:
            return self.split
        return 3 if self.pretrained == "none" else 0

    def build(self) -> "SplitViT":
        """The encoder, with drawn or pretrained weights.

        Raises:
            ValueError: as SplitViT, and for a part to freeze that the model does not have.
        """
        from ser_fast.vit import SplitViT

        shape = {name: getattr(self, name) for name in ("patch_size", "embed_dim", "depth", "num_heads")}
        given = {name: value for name, value in shape.items() if value is not None}
        try:
            model = SplitViT(
                self.name,
                self.blocks_before_cls,
                pretrained=False if self.pretrained == "none" else self.pretrained,
                normalization=self.normalization,
                img_size=self.image_size,
                drop_path_rate=self.drop_path_rate,
                **given,
            )
        except (AssertionError, TypeError) as error:  # timm's own checks of its arguments
            raise ValueError(f"model: {self.name} can't be built with {given}: {error}") from error
        if any(self.image_size % side for side in model.patch_size):
            raise ValueError(
                f"model.image_size: got {self.image_size}, takes a multiple of the patch size {model.patch_size[0]}"
            )
        blocks: Any = model.blocks
        if getattr(model, "rope", None) is not None and model.embed_dim // (heads := blocks[0].attn.num_heads) % 4:
            raise ValueError(
                f"model.num_heads: got {heads}, takes heads of a multiple of 4 channels of the {model.embed_dim}: this "
                "model's positions are rotary"
            )
        for name in self.freeze:
            part = getattr(model, name, None)
            if part is None:
                raise ValueError(f"model.freeze: got {name!r}, which {self.name} does not have")
            part.requires_grad_(False)
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
    frame: Literal["crop", "whole"] = "crop"
    """What both views of the equivariance share are maps of: one random resized crop, or the whole picture. The sampler
    "crop" needs none."""
    crop_area: tuple[float, float] = (0.2, 1.0)
    """Range of the crops' and the frames' area, relative to the image."""
    crop_turns: bool = True
    """With the sampler "crop": crops in all eight elements of D4. Equivariance to turns is learned from turns."""
    color_strength: Annotated[float, tyro.conf.arg(aliases=("--views.colour-strength",))] = 1.0
    """Multiplies the color jitter; 0 leaves the colors as they are."""
    color_jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    """How far brightness, contrast and saturation (as factors), and the hue (in turns) go; applied to 80 %."""
    color_gray: float = 0.2
    """Probability of a gray view."""
    color_blur: tuple[float, float] = (1.0, 0.1)
    """Probabilities of blur in the two global views."""
    color_solarize: tuple[float, float] = (0.0, 0.2)
    """Probabilities of solarization in the two global views."""
    share_color: bool = True
    """Whether the global views of the equivariance share change their colors, too (not with the sampler "crop")."""
    locals: int = 0
    """Local views: small crops beside the two global views, for the objective and for --ser.locals."""
    local_size: int | None = None
    """Side of local views in pixels; default 3/7 of the image's (96 of 224)."""
    local_area: tuple[float, float] = (0.05, 0.25)
    """Range of the local views' area, relative to the image."""
    local_gray: float = 0.0
    """Probability of a gray local view; DINO's is 0.2."""
    local_blur: float = 0.5
    """Probability of blur in local views."""
    turn_size: int | None = None
    """Side of the small crop that E-SSL sees in four quarter turns; default as of local views."""
    turn_area: tuple[float, float] = (0.05, 0.14)
    """Range of its area, relative to the image."""

    def build(
        self, patch_size: int, seed: int, needs: Set[str] = frozenset(), *, image_size: int | None = None
    ) -> "MakeViews":
        """What makes the views of batches, and those that add-ons need besides (see AddOn.needs).

        Args:
            patch_size: pixels a token.
            seed: of all draws.
            needs: of the add-ons.
            image_size: side of the global views; default that of the images they are cut from.

        Raises:
            ValueError: an option that doesn't fit.
        """
        from ser_fast.views.color import Color
        from ser_fast.views.recipe import MakeViews, SmallCrop

        crop = Crop(area=self.crop_area)
        partial = replace(crop, turns=self.crop_turns)
        sampler = partial if self.sampler == "crop" else SAMPLERS[self.sampler]()
        color = Color(self.color_strength, self.color_jitter, gray=self.color_gray)
        first, second = (
            replace(color, blur=blur, solarize=solarize)
            for blur, solarize in zip(self.color_blur, self.color_solarize, strict=True)
        )
        if self.locals < 0:
            raise ValueError(f"locals: got {self.locals}, takes a number from 0")
        local_color = replace(color, gray=self.local_gray, blur=self.local_blur)
        local = SmallCrop(Crop(area=self.local_area), local_color, self.local_size)
        turns = SmallCrop(Crop(area=self.turn_area), replace(color, blur=0.1), self.turn_size)
        return MakeViews(
            sampler,
            crop,
            self.share,
            patch_size,
            (first, second),
            seed,
            locals=(local,) * self.locals,
            turns=turns,
            needs=frozenset(needs),
            frame=crop if self.frame == "crop" else None,
            size=image_size,
            share_color=self.share_color,
        )


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and schedule."""

    batch_size: int = 256
    """Images a step, over all ranks and accumulated parts."""
    accumulate: int = 1
    """Parts that a rank's batch is walked over in, one after another, in the memory of one."""
    accumulate_mode: Literal["exact", "plain"] = "exact"
    """"exact": the parts give what the whole batch gives, for one more forward pass of the encoder; "plain": each part
    has heads, batch norms and contrast of its own."""
    lr: float = 3e-4
    """Peak learning rate for a batch of 256; scaled linearly with batch_size."""
    lr_end: float = 0.0
    """What it falls to; scaled likewise."""
    weight_decay: float = 0.1
    """AdamW's."""
    weight_decay_end: float | None = None
    """What it goes to along a cosine; default it stays."""
    decay_1d: bool = True
    """Also decay biases, norms and other parameters of one dimension."""
    epochs: int = 100
    """Passes over the data set."""
    steps: int | None = None
    """Stop after this many steps; overrides epochs."""
    warmup: float = 0.1
    """Of all steps, with the learning rate rising linearly; then it falls along a cosine."""
    clip_grad: float = 3.0
    """Largest norm of the gradient; 0 never clips."""
    clip: Literal["global", "parameter"] = "global"
    """Whose norm: all gradients', for the model and for each add-on's heads apart, or each parameter's own."""

    @property
    def in_exact_parts(self) -> bool:
        """Whether the encoder walks twice over parts that see one batch."""
        return self.accumulate > 1 and self.accumulate_mode == "exact"


@dataclass(frozen=True)
class EvaluateConfig:
    """Scores while it trains, on images that stay the same, by the first rank; the others wait."""

    every: int = 0
    """Steps from one evaluation to the next, and one after the last step; 0 makes none."""
    share: float = 0.1
    """Of the run's time, at most: an evaluation that would take more of it is left out."""
    train: int = 2000
    """Training images that vote for kNN, where the images have classes."""
    test: int = 500
    """Held-out images that are classified, and whose rank is measured."""
    equivariance: int = 64
    """Held-out images that the error on D4 and on scales, and token retrieval, are measured on."""


@dataclass(frozen=True)
class TrainConfig:
    """Pretrain a vision transformer with an invariance objective and equivariance terms."""

    out: Path = Path("runs/moco_v3_ser")
    """The run's folder: config, environment, log, checkpoints."""
    data: str = "photos"
    """"photos" (in scikit-image's wheel), "folder:PATH", "cifar10:PATH", "tar:PATTERN" (WebDataset shards),
    "hf:PATH_OR_NAME" (Hugging Face) or "python:MODULE:FUNCTION" (a torch data set)."""
    canvas: int | None = None
    """Side in pixels of the squares that pictures are read as and views are cut from; default 16/7 of the views' (512
    for 224), or the source's longest side where that is known to be less."""
    max_pixels: int = MAX_PIXELS
    """Of one picture; one of more is unreadable."""
    model: ModelConfig = field(default_factory=ModelConfig)
    views: ViewsConfig = field(default_factory=ViewsConfig)
    objective: ObjectiveConfig = field(default_factory=MoCoV3Config)
    """What makes the embedding invariant."""
    addons: Mapping[str, AddOnConfig] = field(default_factory=lambda: {"ser": SERConfig()})
    """Equivariance terms, by their names in ADDONS."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    resume: str = "none"
    """"auto" continues from the newest checkpoint in `out`, if there is one; a path, from that one."""
    resume_changed: bool = False
    """Continue although the images, the number of ranks, the learning rate or the clipping are not the checkpoint's."""
    max_skipped: float = 0.1
    """Share of the images that may be unreadable; with more, the run stops."""
    save_every: int = 500
    """Steps between checkpoints; one is written at the end in any case."""
    keep_checkpoints: int = 2
    """The newest ones that stay on disk."""
    log: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    """Where losses and scores are drawn besides log.jsonl: TensorBoard, Weights & Biases (project "ser-fast" unless
    WANDB_PROJECT says otherwise), both or neither."""
    amp: Literal["auto", "bf16", "fp16", "off"] = "auto"
    """Autocast to bfloat16, or to float16 with a scaled loss (a step that overflows is skipped, logged, and halves the
    scale; 20 in a row are an error); "auto" is bf16 on CUDA, else off."""
    compile: bool = False
    """Compile the encoder's blocks and the objective's heads by torch.compile: minutes before the first step, for a
    faster one on a GPU."""
    device: str = "auto"
    """"auto", "cpu" or "cuda"."""
    workers: int = 2
    """Processes that load images, on each rank."""
    loader_timeout: float = 600.0
    """Seconds that they may take for a batch; then the run ends and names the file. 0 waits for ever."""
    rank_timeout: float = 1800.0
    """Seconds that ranks wait for one another; then the run ends and names those that are missing."""
    seed: int = 0
    """Of the weights, the order of the images and every draw."""

    def build(self) -> "Pretraining":
        """The module to train, with weights drawn from torch's generator.

        Raises:
            ValueError: an option that doesn't fit the encoder.
        """
        from ser_fast.training.pretraining import Pretraining

        encoder = self.model.build()
        # The objective first: its initial weights don't depend on the add-ons' options.
        objective = self.objective.build(encoder.embed_dim)
        objective.epochs = self.optim.epochs
        addons: dict[str, tuple[float, AddOn]] = {}
        for name, options in self.addons.items():
            try:
                layers = resolve_layers(options.layers, split=encoder.split, depth=encoder.depth)
            except ValueError as error:
                raise ValueError(f"{name}.{error}") from error
            if layers and self.views.share:
                addon = options.build(encoder.embed_dim, layers, objective_name(self))
                if "locals" in addon.needs and not self.views.locals:
                    raise ValueError(f"{name}.locals: got True with views.locals 0, takes one local view or more")
                addons[name] = options.weight, addon
        return Pretraining(encoder, objective, addons)


# What may differ between a run and its continuation, since it changes no number.
FREE = (
    *("out", "resume", "resume_changed", "max_skipped", "save_every", "keep_checkpoints", "log"),
    *("device", "workers", "loader_timeout", "rank_timeout"),
    *(f"evaluate.{option.name}" for option in fields(EvaluateConfig)),
)
"""Options that may differ between a run and its continuation, since they change no number."""
_PARTS: dict[str, type[Any]] = {
    "model": ModelConfig,
    "views": ViewsConfig,
    "optim": OptimConfig,
    "evaluate": EvaluateConfig,
}
_RENAMED = {"colour_strength": "color_strength"}  # in configs of version 0.1
_DROPPED = ("color_group", "colour_group")  # there neighbors could share one draw of colors


def objective_name(config: TrainConfig) -> str:
    """The name in OBJECTIVES of a config's objective."""
    return next(name for name, kind in OBJECTIVES.items() if kind is type(config.objective))


def default_config(objective: str) -> TrainConfig:
    """The config that trains with an objective as its recipe says.

    Raises:
        ValueError: there is no such objective.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective: got {objective!r}, takes one of {', '.join(map(repr, OBJECTIVES))}")
    kind = OBJECTIVES[objective]
    return with_options(TrainConfig(out=Path(f"runs/{objective}_ser"), objective=kind()), kind.recipe)


def with_options(config: TrainConfig, options: Mapping[str, Any]) -> TrainConfig:
    """The config with other options, named as on the command line.

    Args:
        options: by name, as {"seed": 1, "views.share": 0.5, "ser.weight": 0.3, "moco.dim": 128}. An add-on's options
            bring the add-on in.

    Raises:
        ValueError: a name that is none of an option.
    """
    for name, value in options.items():
        section, _, option = name.rpartition(".")
        part: Any = config
        if section == config.objective.section:
            part = config.objective
        elif section in ADDONS:
            part = config.addons.get(section, ADDONS[section]())
        elif section in _PARTS:
            part = getattr(config, section)
        elif section:
            option = ""
        if option not in {field.name for field in fields(part)} - {*_PARTS, "objective", "addons"}:
            raise ValueError(f"options: got {name!r}, which is no option")
        changed = replace(part, **{option: value})
        if section == config.objective.section:
            config = replace(config, objective=changed)
        elif section in ADDONS:
            config = replace(config, addons={**config.addons, section: changed})
        else:
            config = replace(config, **{section: changed}) if section else changed
    return config


def to_json(config: TrainConfig) -> dict[str, Any]:
    """The config in JSON's types, by section as on the command line."""
    content = {field.name: getattr(config, field.name) for field in fields(config)}
    content |= {name: asdict(content[name]) for name in _PARTS}
    content["objective"] = objective_name(config)
    content[config.objective.section] = asdict(config.objective)
    content |= {name: asdict(addon) for name, addon in content.pop("addons").items() if addon.layers != "off"}
    return json.loads(json.dumps(content, default=str))


def from_json(content: dict[str, Any]) -> TrainConfig:
    """The config that `to_json` made the content of, also that of version 0.1.

    Raises:
        ValueError: it is no such content.
    """
    content = dict(content)
    name = content.pop("objective", "moco_v3")
    if name not in OBJECTIVES:
        raise ValueError(f"config: got objective {name!r}, takes one of {', '.join(map(repr, OBJECTIVES))}")
    kind = OBJECTIVES[name]
    objective = _section(kind, content.pop(kind.section, {}))
    addons = {name: _section(addon, content.pop(name)) for name, addon in ADDONS.items() if name in content}
    parts = {name: _section(part, content.pop(name, {})) for name, part in _PARTS.items()}
    config = _section(TrainConfig, {**content, **parts, "objective": objective, "addons": addons})
    return replace(config, out=Path(config.out))


def _section(kind: type[Any], content: dict[str, Any]) -> Any:
    """An instance of a dataclass from JSON's types."""
    content = {
        _RENAMED.get(name, name): tuple(value) if isinstance(value, list) else value
        for name, value in content.items()
        if name not in _DROPPED
    }
    if unknown := sorted(content.keys() - {field.name for field in fields(kind)}):
        raise ValueError(f"config: {kind.__name__} has no {', '.join(unknown)}: written by another version?")
    return kind(**content)


def differences(ours: dict[str, Any], theirs: dict[str, Any], prefix: str = "") -> list[str]:
    """The options, by dotted name, in which two configs (from `to_json`) would give different numbers."""
    names: list[str] = []
    for name in {**ours, **theirs}:
        one, other = ours.get(name), theirs.get(name)
        if isinstance(one, dict) or isinstance(other, dict):
            names += differences(one or {}, other or {}, f"{prefix}{name}.")
        elif one != other and prefix + name not in FREE:
            names.append(prefix + name)
    return names
