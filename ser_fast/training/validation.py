"""The options of a training, checked by name before anything is opened or made."""

import math
import os
import re
from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

from ser_fast.training.config import TrainConfig, to_json

_ANY, _ABOVE_0 = math.inf, math.ulp(0)
# What an option takes, from and to, by the end of its dotted name: the first that fits, and the last fits all. An
# upper end bounds what would only end in memory, where no larger one has a use.
_RANGES: tuple[tuple[str, float, float], ...] = (
    (r"max_skipped|(views|evaluate)\.share|\.warmup|momentum|_warmup|freeze_last_layer", 0, 1),
    (r"views\.(color|local)_(gray|blur|solarize)", 0, 1),
    (r"views\.color_(strength|jitter)", 0, 10),
    (r"model\.drop_path_rate", 0, 0.99),
    (r"_area", _ABOVE_0, 1),
    (r"temperature", _ABOVE_0, _ANY),
    (r"rank_timeout", _ABOVE_0, 10**7),
    (r"evaluate\.(train|test|equivariance)", 1, _ANY),
    (r"max_pixels|batch_size|accumulate|save_every|keep_checkpoints|epochs", 1, _ANY),
    (r"canvas|(image|patch|local|turn)_size", 1, 2**14),
    (r"dims?", 1, 2**20),
    (r"model\.(depth|num_heads)", 1, 1024),
    (r"model\.split|layers|views\.locals|workers", 0, 1024),
    (r"seed", 0, 2**63 - 1),
    (r"optim\.(lr|weight_decay)(_end)?", 0, 1e30),  # float32 has no step of a larger rate
    (r"", 0, _ANY),
)


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
        ("crop_area", config.views.crop_area),
        ("local_area", config.views.local_area),
        ("turn_area", config.views.turn_area),
    ):
        if low > high:
            raise ValueError(f"views.{name}: got {low:g} {high:g}, takes a range within (0, 1]")
    if config.amp not in (takes := get_args(get_type_hints(TrainConfig)["amp"])):
        raise ValueError(f"amp: got {config.amp!r}, takes one of {', '.join(map(repr, takes))}")
    if not isinstance(config.compile, bool):
        raise ValueError(f"compile: got {config.compile!r}, takes True or False")
    hue = config.views.color_strength * config.views.color_jitter[3]
    if hue > 0.5:
        raise ValueError(
            f"views.color_jitter: got a hue of {config.views.color_jitter[3]:g} x views.color_strength "
            f"{config.views.color_strength:g}, takes half a turn at most"
        )
    optim = config.optim
    if optim.batch_size % (world_size * optim.accumulate):
        raise ValueError(
            f"optim.batch_size: {optim.batch_size} is no multiple of {world_size} ranks x "
            f"optim.accumulate {optim.accumulate}"
        )
    parts = optim.accumulate if optim.accumulate_mode == "plain" else 1
    if optim.batch_size // parts < 2:
        among = f" in {parts} parts" if parts > 1 else ""
        raise ValueError(
            f"optim.batch_size: got {optim.batch_size}{among}, takes 2 images or more a part: one alone has no other "
            "to be contrasted with or normalized over"
        )
    try:
        os.fspath(config.out).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"out: got {config.out}, takes a name in UTF-8, as TensorBoard and torch.save do") from error
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
    if not math.isfinite(value):
        raise ValueError(f"{name}: got {value}, takes a finite number")
    low, high = next((low, high) for names, low, high in _RANGES if re.search(f"({names})$", name))
    if not low <= value <= high:
        if low == 1:
            takes = "a positive number" + (f", {high:.9g} at most" if high < _ANY else "")
        elif high < _ANY:
            takes = f"a number in {'(0' if low == _ABOVE_0 else f'[{low:g}'}, {high:.9g}]"
        else:
            takes = "a number above 0" if low == _ABOVE_0 else f"a number from {low:g}"
        raise ValueError(f"{name}: got {value:g}, takes {takes}")
