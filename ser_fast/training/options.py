"""The options of `ser-fast train`: TrainConfig with a section for each add-on, and for the chosen objective."""

import ast
import inspect
import textwrap
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from dataclasses import field, fields, is_dataclass, make_dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, get_type_hints

import tyro
import yaml

from ser_fast.addons import ADDONS
from ser_fast.objectives import OBJECTIVES
from ser_fast.training.config import TrainConfig, default_config, from_json, objective_name


def parse(arguments: Sequence[str], *, prog: str = "ser-fast train") -> TrainConfig:
    """The config that the arguments of `ser-fast train` ask for.

    The options of an objective are there, with its recipe as defaults of the others, where --objective names it.

    Example:
        >>> parse(["--objective", "moco_v3", "--moco.dim", "128", "--ser.layers", "2", "4"]).addons["ser"].layers
        (2, 4)
    """
    config, _ = parse_with(arguments, prog, TrainConfig, {})
    return config


def parse_with(
    arguments: Sequence[str], prog: str, described: Any, sections: Mapping[str, type[Any]]
) -> tuple[TrainConfig, dict[str, Any]]:
    """The config of a command that takes the options of `ser-fast train`, and sections of its own by their names.

    Args:
        arguments: after the command.
        prog: what the help calls it.
        described: whose docstring says what it does.
        sections: dataclasses of options with defaults.
    """
    first = ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--objective")
    first.add_argument("--config", type=Path)
    known, _ = first.parse_known_args(arguments)
    if known.config is None:
        defaults = default_config(known.objective or objective_name(TrainConfig()))
    else:
        defaults = read_options(known.config)
        if known.objective not in (None, objective_name(defaults)):
            raise ValueError(f"objective: got {known.objective}, and {known.config} is of {objective_name(defaults)}")
    kind = _options(defaults, sections)
    _describe(kind)
    description = " ".join((described.__doc__ or "").split())
    options = tyro.cli(kind, args=arguments, prog=prog, description=description)
    given = {part.name: getattr(options, part.name) for part in fields(TrainConfig)}
    given["objective"] = getattr(options, defaults.objective.section)
    addons = {name: getattr(options, name) for name in ADDONS}
    given["addons"] = {name: addon for name, addon in addons.items() if addon.layers != "off"}
    return TrainConfig(**given), {name: getattr(options, name) for name in sections}


def read_options(path: Path) -> TrainConfig:
    """The config of a YAML or JSON file of options by section, as a run writes it; what is missing has its default.

    Raises:
        ValueError: the file can't be read, or holds something else.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it holds no options by name")
        return from_json(content)
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"config: {path} can't be read as options of a training: {reason}") from error


def _describe(kind: type[Any]) -> None:
    """Give the help text of each option of a dataclass, and of the dataclasses in it, its field.

    It is the string below the field, as one line: read by tyro it would keep some of its line breaks.
    """
    texts: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        try:
            (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        except (OSError, TypeError):  # object, and what make_dataclass made, have no text of their own
            continue
        assert isinstance(tree, ast.ClassDef)
        for line, text in pairwise(tree.body):
            if isinstance(line, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                texts[ast.unparse(line.target)] = " ".join(str(text.value.value).split())
    hints = get_type_hints(kind)
    for option in fields(kind):
        if option.name in texts:
            option.metadata = MappingProxyType({**option.metadata, "help": texts[option.name]})
        if is_dataclass(hints[option.name]):
            _describe(hints[option.name])


def _options(defaults: TrainConfig, sections: Mapping[str, type[Any]]) -> type[Any]:
    """TrainConfig with `defaults` and more sections; its objective is a name, and a section as each add-on is."""

    def default(value: Any) -> Any:
        return field(default_factory=lambda: value)

    literal: Any = Literal
    given = defaults.addons
    changed: list[tuple[str, Any, Any]] = [(name, kind, default(kind())) for name, kind in sections.items()]
    changed += [
        (part.name, part.type, default(getattr(defaults, part.name)))
        for part in fields(TrainConfig)
        if part.name not in ("objective", "addons")
    ]
    help_text = "What makes the embedding invariant; its options and defaults are those that --help shows with it."
    objective: Any = Annotated[literal[tuple(OBJECTIVES)], tyro.conf.arg(help=help_text)]
    about = "YAML or JSON file of options, as config.json of a run; options that are given besides override it."
    changed += [
        ("config", Annotated[Path | None, tyro.conf.arg(help=about)], None),
        ("objective", objective, default(objective_name(defaults))),
        ("addons", tyro.conf.Suppress[Mapping[str, Any]], default({})),
        (defaults.objective.section, type(defaults.objective), default(defaults.objective)),
        *((name, kind, default(given.get(name) or replace(kind(), layers="off"))) for name, kind in ADDONS.items()),
    ]
    return make_dataclass("TrainOptions", changed, bases=(TrainConfig,), frozen=True)
