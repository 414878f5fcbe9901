"""`ser-fast plan`: memory, work and speed of a training, before it is begun, on any device and without it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ser_fast.lattice import LatticeMap, Size
from ser_fast.loss import PRESETS
from ser_fast.progress import track
from ser_fast.training.config import TrainConfig, objective_name
from ser_fast.training.devices import Device, find_device
from ser_fast.training.validation import check_options
from ser_fast.views.samplers import SAMPLERS, Crop, D4Scale

if TYPE_CHECKING:  # the options are shown without timm and torchvision
    from ser_fast.training.planned_step import StepCost

# Of a GPU's memory, for tensors: the rest is of CUDA's context, libraries' workspaces and gaps between tensors.
USABLE = 0.92
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}
_GRID = 512  # points a side that a lattice's size is averaged on
_DRAWN = 2048  # maps that tokens without a partner are counted on


@dataclass(frozen=True)
class PlanConfig:
    """What to plan for."""

    device: str = "h100-sxm"
    """"h100-sxm", "h200", "a100-80", "4090", or "cpu" for this machine."""
    ranks: int = 1
    """Devices that share the batch."""
    batch: tuple[int, ...] = ()
    """Numbers of images a step, over all ranks; default --optim.batch-size."""
    share: tuple[float, ...] = ()
    """Shares of the batch for equivariance; default --views.share."""
    accumulate: tuple[int, ...] = ()
    """Numbers of parts; default --optim.accumulate."""
    pictures: int | None = None
    """In the data set, which then isn't opened; default those of --data."""
    tflops: float | None = None
    """The device's 10^12 operations a second on 16 bits; default what its vendor says."""
    single_tflops: float | None = None
    """The same on 32 bits."""
    bandwidth: float | None = None
    """Its 10^9 bytes a second."""
    memory: float | None = None
    """Its memory in GiB."""


@dataclass(frozen=True)
class Row:
    """The plan of one batch size, share and number of parts.

    Attributes:
        batch: images a step, over all ranks.
        share: of the batch, for equivariance.
        accumulate: parts of a rank's batch.
        cost: of a step of one rank: memory with the largest lattices that the sampler draws, work with its usual ones.
        negatives: that SER contrasts a token with, the mean over the sampler's draws; None without SER.
        seconds: of a step, no less.
        images_per_second: over all ranks, no more.
        hours: of the run, no less.
        fits: whether the device has the memory.
    """

    batch: int
    share: float
    accumulate: int
    cost: "StepCost"
    negatives: float | None
    seconds: float
    images_per_second: float
    hours: float
    fits: bool


def plan(config: TrainConfig, options: PlanConfig | None = None, *, progress: bool = False) -> list[Row]:
    """What a training takes, for each batch size, share and number of parts.

    Nothing is trained, and no weights are loaded: a step runs on fake tensors, which have shapes and no memory.

    Args:
        config: of the run.
        options: the device, the number of ranks, and what to vary.
        progress: show a bar.

    Returns:
        A row for each combination, in the order of the options.

    Raises:
        ValueError: an option that doesn't fit, by its name.

    Example:
        >>> rows = plan(TrainConfig(), PlanConfig(device="a100-80", batch=(256, 512), pictures=1_281_167))
        >>> [row.cost.peak / 2**30 for row in rows]
    """
    options = options or PlanConfig()
    device = _device(options)
    for name, value in (("ranks", options.ranks), ("pictures", options.pictures)):
        if value is not None and value < 1:
            raise ValueError(f"plan.{name}: got {value}, takes a positive number")
    varied = [config for config in _variants(config, options) if check_options(config, options.ranks)]
    pictures, canvas = _pictures(config, options)
    return [_row(variant, options, device, pictures, canvas) for variant in track(varied, "plan", show=progress)]


def show(rows: Sequence[Row], config: TrainConfig, options: PlanConfig, console: Console | None = None) -> None:
    """Print a plan: what it is of, the table, and what its numbers assume."""
    console, device, first = console or Console(), _device(options), rows[0].cost
    terms = " + ".join([objective_name(config), *config.addons])
    console.print(
        f"{config.model.name} at {config.model.image_size} pixels, {terms}, on {options.ranks} x {options.device}: "
        f"{_tera(device.half)} TFLOP/s on 16 bits, {_tera(device.single)} on 32, {_tera(device.bandwidth)} TB/s, "
        f"{_gib(device.memory)} GiB, {_gib(_usable(device))} of them for tensors\n"
        f"of every device: parameters {_gib(first.parameters)} GiB, teacher {_gib(first.teacher)}, "
        f"optimizer {_gib(first.optimizer)}",
        highlight=False,
    )
    table = Table(box=SIMPLE_HEAD, padding=0)
    for name in ("batch", "share", "parts", "peak", "activations", "TFLOP", "negatives", "images/s", "hours", "fits"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        negatives = "-" if row.negatives is None else f"{row.negatives:.0f}"
        cells = [str(row.batch), f"{row.share:g}", str(row.accumulate)]
        cells += [_gib(row.cost.peak), _gib(row.cost.activations), _tera(row.cost.flops), negatives]
        cells += [f"{row.images_per_second:.0f}", f"{row.hours:.2f}", "yes" if row.fits else "no"]
        table.add_row(*cells, style=None if row.fits else "red")
    console.print(table)
    console.print(
        "Peak and activations are GiB of one device's tensors, with the largest lattices that are drawn, TFLOP are a "
        "step's, negatives a token's in the mean over the draws. Images a second are an upper bound and hours a lower "
        "one: products at the device's peak, or the operands of every operator, unfused, once to and from "
        "memory, whichever takes longer; no time for data, exchange between devices and launches.",
        highlight=False,
    )


def expected_negatives(config: TrainConfig, ranks: int = 1) -> float | None:
    """The mean, over the sampler's draws, of the tokens that SER contrasts a token with; None without SER.

    Of the two global views. A token that a map leaves without a partner is no negative.
    """
    ser: Any = config.addons.get("ser")
    part = check_options(config, ranks)
    chosen = round(config.views.share * part)
    if ser is None or ser.layers in ("off", ()) or chosen == 0:
        return None
    patch = _patch_size(config)
    tokens, valid, _ = _lattices(config, patch)
    here, elsewhere = chosen * tokens, (ranks - 1) * chosen * tokens if ser.gather else 0.0
    used = min(1.0, (ser.max_tokens or here) / here)
    if used < 1:  # drawn without replacement: what is left are one token fewer, and those of its image with it
        here = (ser.max_tokens - 1) * (here - tokens) / (here - 1)
    else:
        here -= tokens
    negatives = ser.negatives or PRESETS[ser.preset]["negatives"]
    views = 2 if negatives == "both" and not ser.momentum_keys else 1
    return views * valid * (here + used * elsewhere)


def _variants(config: TrainConfig, options: PlanConfig) -> Iterator[TrainConfig]:
    batches = options.batch or (config.optim.batch_size,)
    shares = options.share or (config.views.share,)
    for batch, share, parts in product(batches, shares, options.accumulate or (config.optim.accumulate,)):
        optim = replace(config.optim, batch_size=batch, accumulate=parts)
        yield replace(config, optim=optim, views=replace(config.views, share=share))


def _row(config: TrainConfig, options: PlanConfig, device: Device, pictures: int, canvas: int) -> Row:
    from ser_fast.training.planned_step import step_cost

    optim = config.optim
    steps = optim.steps if optim.steps is not None else optim.epochs * (pictures // optim.batch_size)
    if steps < 1:
        raise ValueError(
            f"optim.batch_size: got {optim.batch_size} with {pictures} pictures, which is no step an epoch"
        )
    _, _, largest = _lattices(config, _patch_size(config))
    usual = (config.model.image_size // _patch_size(config),) * 2
    amp = config.amp if config.amp != "auto" else "bf16" if device.kind == "gpu" else "off"
    kind = _backend_kind(config, device)
    run: dict[str, Any] = {"canvas": canvas, "ranks": options.ranks, "amp": _AUTOCAST[amp], "kind": kind}
    cost = step_cost(config, lattices=(largest, largest), **run)
    if largest != usual and config.views.share > 0:
        work = step_cost(config, lattices=(usual, usual), **run)
        cost = replace(cost, half_flops=work.half_flops, single_flops=work.single_flops, traffic=work.traffic)
    products = cost.half_flops / device.half + cost.single_flops / device.single
    seconds = max(products, cost.traffic / device.bandwidth)
    return Row(
        batch=optim.batch_size,
        share=config.views.share,
        accumulate=optim.accumulate,
        cost=cost,
        negatives=expected_negatives(config, options.ranks),
        seconds=seconds,
        images_per_second=optim.batch_size / seconds,
        hours=steps * seconds / 3600,
        fits=cost.peak <= _usable(device),
    )


def _lattices(config: TrainConfig, patch: int) -> tuple[float, float, Size]:
    """Of the equivariance share: the mean number of tokens of a view, the part of them that has a partner in the other
    view, and the largest lattice."""
    side = config.model.image_size // patch
    sampler: Any = Crop(area=config.views.crop_area, turns=config.views.crop_turns)
    if config.views.sampler != "crop":
        sampler = SAMPLERS[config.views.sampler]()
    if isinstance(sampler, D4Scale):
        points = (torch.arange(_GRID, dtype=torch.float64) + 0.5) / _GRID
        sizes = sampler.lattices((side, side), torch.cartesian_prod(points, points))
        tokens = sizes.prod(1)
        height, width = sizes[tokens.argmax()].tolist()
        return float(tokens.double().mean()), 1.0, (height, width)
    size = config.model.image_size, config.model.image_size
    generator = torch.Generator().manual_seed(0)
    g0, g1 = (
        sampler(size, patch, torch.rand(_DRAWN, 23, dtype=torch.float64, generator=generator), view) for view in (0, 1)
    )
    partners = LatticeMap.relative(g0, g1).on((side, side), (side, side)).valid()
    return float(side**2), float(partners.double().mean()), (side, side)


def _patch_size(config: TrainConfig) -> int:
    with torch.device("meta"):
        return replace(config.model, pretrained="none", depth=1, split=0).build().patch_size[0]


def _pictures(config: TrainConfig, options: PlanConfig) -> tuple[int, int]:
    """The number of pictures, and the side of the squares that they are read as."""
    from ser_fast.data.sources import default_canvas, open_canvases

    if options.pictures is not None:
        return options.pictures, config.canvas or default_canvas(config.model.image_size)
    opened = open_canvases(
        config.data,
        train=True,
        image_size=config.model.image_size,
        canvas=config.canvas,
        max_pixels=config.max_pixels,
    )
    return len(opened), opened.image_size


def _device(options: PlanConfig) -> Device:
    own: dict[str, Any] = {name: getattr(options, name) for name in ("tflops", "single_tflops", "bandwidth", "memory")}
    return find_device(options.device, **own)


def _usable(device: Device) -> float:
    return device.memory * (USABLE if device.kind == "gpu" else 1)


def _backend_kind(config: TrainConfig, device: Device) -> str:
    """Whose temporary memory SER takes: that of the backend asked for, or of the fastest that a device has."""
    ser: Any = config.addons.get("ser")
    if ser is not None and ser.backend == "reference":
        return "reference"
    return device.kind


def _gib(count: float) -> str:
    return f"{count / 2**30:.2f}"


def _tera(count: float) -> str:
    return f"{count / 1e12:.3g}"
