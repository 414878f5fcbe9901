"""The options of a training, checked by name before anything is opened or made."""

import math
from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

from ser_fast.training.config import TrainConfig, to_json

# Of options whose values are an interval or a bound by their nature; dotted names, or endings of them.
_SHARES = ("optim.warmup", "max_skipped", "views.share", ".momentum", "views.color_gray", "views.local_gray")
_FROM_0 = (
    "optim.lr",
    "optim.lr_end",
    "optim.weight_decay",
    "optim.clip_grad",
    "views.locals",
    ".weight",
    "seed",
    "workers",
)
_FROM_1 = ("optim.batch_size", "optim.accumulate", "save_every", "keep_checkpoints")
_ABOVE_0 = (".temperature", "_temperature")


def check_options(config: TrainConfig, world_size: int) -> int:
    """Check the options that need neither data nor model.

    Args:
        config: of the run.
        world_size: the number of ranks.

    Returns:
        How many images a rank contrasts at a time.

    Raises:
        ValueError: one that doesn't fit, by its name on the command line.
    """
    for name, value in _numbers(to_json(config)):
        _check_number(name, value)
    for name, (low, high) in (
        ("views.crop_area", config.views.crop_area),
        ("views.local_area", config.views.local_area),
    ):
        if not 0 < low <= high <= 1:
            raise ValueError(f"views.{name}: got {low:g} {high:g}, takes a range within (0, 1]")
    if config.amp not in (takes := get_args(get_type_hints(TrainConfig)["amp"])):
        raise ValueError(f"amp: got {config.amp!r}, takes one of {', '.join(map(repr, takes))}")
    if not isinstance(config.compile, bool):
        raise ValueError(f"compile: got {config.compile!r}, takes True or False")
    optim = config.optim
    if optim.batch_size % (world_size * optim.accumulate):
        raise ValueError(
            f"optim.batch_size: {optim.batch_size} is no multiple of {world_size} ranks x "
            f"optim.accumulate {optim.accumulate}"
        )
    parts = optim.accumulate if optim.accumulate_mode == "plain" else 1
    part = optim.batch_size // (world_size * parts)
    on = {name: addon for name, addon in config.addons.items() if addon.layers not in ("off", ())}
    if config.views.share == 0 and (others := sorted(on.keys() - {"ser"})):
        raise ValueError(f"views.share: got 0, which leaves {', '.join(others)} without images")
    if config.views.share > 0 and "ser" in on:
        ser: Any = on["ser"]
        contrasted = round(config.views.share * part) * (world_size if ser.gather else 1)
        if contrasted < 2:
            raise ValueError(
                f"views.share: {config.views.share} of {part} images is {contrasted}; SER contrasts two or more"
            )
        if ser.max_tokens is not None and ser.max_tokens < 2:
            raise ValueError(f"ser.max_tokens: got {ser.max_tokens}, takes 2 or more: one token has no negatives")
    return part


def _numbers(content: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every number among the options, by its dotted name."""
    for name, value in content.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{name}.")
        else:
            for entry in value if isinstance(value, list) else [value]:
                if isinstance(entry, int | float) and not isinstance(entry, bool):
                    yield prefix + name, entry


def _check_number(name: str, value: float) -> None:
    section, _, option = name.rpartition(".")
    if not math.isfinite(value):
        raise ValueError(f"{name}: got {value}, takes a finite number")
    if name.endswith(_SHARES) and not 0 <= value <= 1:
        raise ValueError(f"{name}: got {value:g}, takes a number in [0, 1]")
    if name.endswith(_ABOVE_0) and value <= 0:
        raise ValueError(f"{name}: got {value:g}, takes a number above 0")
    if (name in _FROM_0 or (section and name.endswith(".weight"))) and value < 0:
        raise ValueError(f"{name}: got {value:g}, takes a number from 0")
    if (name in _FROM_1 or "dim" in option.split("_") or option.endswith("dims")) and value < 1:
        raise ValueError(f"{name}: got {value:g}, takes a positive number")
