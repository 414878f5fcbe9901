"""The command line: `ser-fast COMMAND`."""

import os
import re
import select
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from importlib.metadata import version
from inspect import cleandoc
from io import TextIOWrapper

from ser_fast import extras
from ser_fast.io import printable

try:
    import tyro
    from rich.console import Console

    from ser_fast.commands import evaluations, results, training
except ModuleNotFoundError as error:
    sys.exit(extras.advice(error))

_ABOUT = "Soft Equivariance Regularization for vision transformers: train, evaluate, compare."


def _break(self: Console) -> None:
    """In place of what rich does where a pipe breaks, which is to end with status 1; `main` ends it."""
    raise


Console.on_broken_pipe = _break  # type: ignore[method-assign]
_SIGPIPE = 141  # the status of a command that its closed pipe ends

COMMANDS: tuple[Callable[..., None], ...] = (
    *(training.train, training.sweep, training.plan, training.demo),
    *(evaluations.equivariance, evaluations.sensitivity, evaluations.knn, evaluations.linear, evaluations.corruptions),
    *(evaluations.detection, evaluations.segmentation, evaluations.show),
    *(results.report, results.export, results.doctor),
)


def main() -> None:
    """Run the command line; errors of the user's making are one line, not a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # not one that a test put there
            stream.reconfigure(errors="backslashreplace")  # what the locale or UTF-8 can't say is no end of the work
    try:
        try:
            _run(sys.argv[1:])
        finally:
            if sys.stdout is not None:  # it was closed from the beginning
                sys.stdout.flush()  # at the interpreter's end a pipe that nobody reads would be complained of
    except ModuleNotFoundError as error:
        sys.exit(extras.advice(error))
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _leave_closed_pipes():
            sys.exit(_SIGPIPE)
        sys.exit(f"ser-fast: {printable(error)}")
    except RuntimeError as error:
        from ser_fast.training.trainer import NonFiniteLossError

        if not isinstance(error, NonFiniteLossError):
            raise
        sys.exit(f"ser-fast: {printable(error)}")
    except KeyboardInterrupt:
        sys.exit("ser-fast: stopped")


def _leave_closed_pipes() -> bool:
    """Whether the reader of standard output or error is gone, as `head` is; what is left to be written goes nowhere.

    Other pipes break, too: those to processes that load images.
    """
    if not hasattr(select, "poll"):  # Windows, where a closed pipe is another error
        return False
    poll = select.poll()
    for descriptor in (1, 2):
        poll.register(descriptor, 0)
    closed = [descriptor for descriptor, event in poll.poll(0) if event & select.POLLERR]
    for descriptor in closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    return bool(closed)


def _run(arguments: Sequence[str]) -> None:
    commands = {command.__name__: command for command in COMMANDS}
    name = next(iter(arguments), "")
    if name == "--version":
        print(f"ser-fast {version('ser-fast')}")
    elif name in ("train", "sweep", "plan"):  # options that depend on the objective
        commands[name]()
    elif name in commands or name.startswith("-") or not name:
        for command in COMMANDS:
            command.__doc__ = _joined(command.__doc__ or "")
        tyro.extras.subcommand_cli_from_dict(commands, args=arguments, prog="ser-fast", description=_ABOUT)
    else:
        hint = "".join(f"; did you mean {close}?" for close in get_close_matches(name, commands, 1))
        print(f"ser-fast: command: got {printable(name)}, takes {', '.join(commands)}{hint}", file=sys.stderr)
        sys.exit(2)


def _joined(text: str) -> str:
    """A docstring whose paragraphs and arguments are a line each: tyro keeps some of its line breaks."""
    text = cleandoc(text)  # as Python 3.13 and later keep it
    text = re.sub(r"(?m)^( {4}\w+: .*(?:\n {8}\S.*)+)", lambda match: re.sub(r"\n +", " ", match[1]), text)
    return re.sub(r"(?<=\S)\n(?=\S)", " ", text)


if __name__ == "__main__":
    main()
