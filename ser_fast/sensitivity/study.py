"""The study: every source, setting and element measured once."""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import to_dtype

from ser_fast.data.sources import open_dataset
from ser_fast.evaluation.features import spread_images
from ser_fast.evaluation.protocol import random_controls, tell_skipped
from ser_fast.lattice import LatticeMap, Size
from ser_fast.progress import progress_bar
from ser_fast.sensitivity import measures
from ser_fast.sensitivity.analysis import combine
from ser_fast.sensitivity.factors import (
    DEFAULT,
    ELEMENTS,
    FEW_ELEMENTS,
    Resampling,
    Setting,
    one_at_a_time,
    whole_grid,
)
from ser_fast.sensitivity.sources import CONTROL, Features, Fields, Photographs, Source
from ser_fast.sensitivity.table import StudyTable, Unit
from ser_fast.training.recipes import demo_model
from ser_fast.vit import SplitViT

_TIMED_ELEMENTS = ("scale 0.75", "angle 15")
_Key = TypeVar("_Key", bound=Hashable)


@dataclass(frozen=True)
class Protocol:
    """What all measurements of a study share.

    Attributes:
        data: whose held-out images are used.
        images: how many of them, and of synthetic fields.
        image_size: their side in pixels.
        seed: of the fields, the random initializations and the bootstrap.
    """

    data: str = "photos"
    images: int = 16
    image_size: int = 128
    seed: int = 0


def run_study(
    models: Mapping[str, SplitViT],
    protocol: Protocol,
    folder: Path | None,
    *,
    full: bool,
    device: torch.device,
    progress: bool = False,
) -> StudyTable:
    """Measure fields, photographs, the models and random initializations; what the folder holds already is kept.

    Args:
        models: by name; without any, the demo's architecture gives the random control.
        protocol: images and seed.
        folder: of sensitivity.csv; None keeps the rows in memory.
        full: the whole grid on all elements, else one factor at a time on a few.
        device: where tokens are moved and models run.
        progress: show a bar on the terminal.

    Raises:
        ValueError: data that can't be opened, or a folder with rows of another protocol.
    """
    controls = random_controls(models or {"": demo_model().build()}, seed=protocol.seed, prefix=CONTROL)
    held_out = open_dataset(protocol.data, train=False, image_size=protocol.image_size)
    images = to_dtype(spread_images(held_out, protocol.images).to(device), torch.float32, scale=True)  # (N, 3, S, S)
    tell_skipped(held_out)
    sources: list[Source] = [
        Fields(len(images), seed=protocol.seed, device=device),
        Photographs(images),
        *(Features(name, model.to(device), images) for name, model in {**models, **controls}.items()),
    ]
    table = StudyTable(folder, asdict(protocol))
    settings = whole_grid() if full else one_at_a_time()
    elements = list(ELEMENTS) if full else FEW_ELEMENTS
    measure(table, sources, settings, elements, seed=protocol.seed, device=device, progress=progress)
    # The levels that win one at a time are also measured together: what is recommended was measured.
    together = [DEFAULT, replace(DEFAULT, resampling=combine(table.rows))]
    measure(table, sources, together, elements, seed=protocol.seed, device=device, progress=progress)
    return table


def measure(
    table: StudyTable,
    sources: Sequence[Source],
    settings: Sequence[Setting],
    elements: Sequence[str],
    *,
    seed: int,
    device: torch.device,
    progress: bool = False,
) -> None:
    """Measure what the table lacks, unit by unit; each is on disk before the next begins.

    Args:
        table: takes the rows.
        sources: whose tokens are moved; of the same number of images each.
        settings: points of the grid; a source is measured once for those that it can't tell apart.
        elements: names in ELEMENTS.
        seed: of bootstrap and noise.
        device: of the sources.
        progress: show a bar on the terminal.
    """

    @lru_cache(maxsize=1)  # the elements of a lattice come one after the other
    def before(index: int, lattice: Size, positions: str) -> list[Tensor]:
        return sources[index].maps(LatticeMap.identity(lattice), positions=positions or DEFAULT.positions)

    todo = [(unit, missing) for unit, r in units(sources, settings, elements) if (missing := table.missing(unit, r))]
    with progress_bar(show=progress and bool(todo)) as bar:
        task = bar.add_task("sensitivity", total=len(todo))
        for unit, resamplings in todo:
            kind, source, lattice, element, pixels, positions = unit
            described = " ".join(filter(None, (kind, unit.labels()["signal"], unit.labels()["lattice"], element)))
            bar.update(task, description=described)
            if kind == "response":
                estimates = measures.response(element, resamplings)
            elif lattice is None:
                estimates = measures.cost(DEFAULT.lattice, element, resamplings, device)
            elif source is None:
                estimates = measures.operator(lattice, element, resamplings)
            elif kind == "algebra":
                estimates = measures.algebra(
                    before(sources.index(source), lattice, positions), element, resamplings, seed=seed
                )
            else:
                g = ELEMENTS[element].build(lattice)
                after = source.maps(g, pixels=pixels or DEFAULT.pixels, positions=positions or DEFAULT.positions)
                estimates = measures.equivariance(
                    before(sources.index(source), lattice, positions), after, g, resamplings, seed=seed
                )
            table.add(unit, estimates)
            bar.advance(task)


def units(
    sources: Sequence[Source], settings: Sequence[Setting], elements: Sequence[str]
) -> Iterator[tuple[Unit, list[Resampling]]]:
    """Everything to measure, in the order that shares most work, and the resamplings of each.

    Args:
        sources: whose tokens are moved.
        settings: points of the grid.
        elements: names in ELEMENTS.
    """
    resamplings = list(dict.fromkeys(setting.resampling for setting in settings))
    # Padding plays no part far from the borders, nor has a convention a price.
    kernels = list(dict.fromkeys(replace(r, padding=DEFAULT.resampling.padding) for r in resamplings))
    priced = list(dict.fromkeys(replace(r, convention=DEFAULT.resampling.convention) for r in resamplings))
    yield from ((Unit("cost", None, None, element, "", ""), priced) for element in _TIMED_ELEMENTS)
    yield from ((Unit("response", None, None, element, "", ""), kernels) for element in elements)
    for lattice, group in _by(settings, lambda setting: setting.lattice):
        resamplings = list(dict.fromkeys(setting.resampling for setting in group))
        yield from ((Unit("operator", None, lattice, element, "", ""), resamplings) for element in elements)
    for source in sources:
        seen = [_as_seen_by(source, setting) for setting in settings]
        for (lattice, positions), group in _by(seen, lambda setting: (setting.lattice, setting.positions)):
            for element in elements:
                for pixels, same in _by(group, lambda setting: setting.pixels):
                    resamplings = list(dict.fromkeys(setting.resampling for setting in same))
                    yield Unit("equivariance", source, lattice, element, pixels, positions), resamplings
                if positions in ("", DEFAULT.positions):
                    resamplings = list(dict.fromkeys(setting.resampling for setting in group))
                    yield Unit("algebra", source, lattice, element, "", positions), resamplings


def _as_seen_by(source: Source, setting: Setting) -> Setting:
    """The setting with "" for the factors that the source has none of."""
    pixels, positions = (getattr(setting, name) if name in source.factors else "" for name in ("pixels", "positions"))
    return replace(setting, pixels=pixels, positions=positions)


def _by(settings: Sequence[Setting], key: Callable[[Setting], _Key]) -> list[tuple[_Key, list[Setting]]]:
    """The settings of each value of a key, in the order of first appearance."""
    order = {value: i for i, value in enumerate(dict.fromkeys(map(key, settings)))}
    return [(value, list(group)) for value, group in groupby(sorted(settings, key=lambda s: order[key(s)]), key=key)]
