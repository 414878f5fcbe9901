"""What --help says, of every command and option, and what a word that is no command is answered."""

import io
import re
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import pytest
from cases.command_line import run_cli

from ser_fast import cli
from ser_fast.addons import ADDONS
from ser_fast.objectives import OBJECTIVES
from ser_fast.training import options
from ser_fast.training.config import default_config

ROOT = Path(__file__).parent.parent


def help_of(*argv: str) -> list[tuple[str, list[str]]]:
    """The options that --help shows, with the lines of their texts."""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out):
        # Wide enough for every text; where there are several groups, one of them must fill the terminal.
        patch.setenv("COLUMNS", "120" if argv[0] in ("train", "plan") else "500")
        with pytest.raises(SystemExit):
            run_cli(*argv, "--help")
    found: list[tuple[str, list[str]]] = []
    for line in out.getvalue().splitlines():
        if option := re.match(r"  (\S.*?)(?:  +(\S.*))?$", line.rstrip()):
            name, text = option.groups()
            found.append((name, [text] if text else []))
        elif line.startswith("      ") and line.strip() and found:
            found[-1][1].append(line.strip())
    return [(name, lines) for name, lines in found if re.match(r"--?\w|\[", name)]


@pytest.mark.parametrize(
    "argv",
    [[command.__name__] for command in cli.COMMANDS] + [["train", "--objective", name] for name in OBJECTIVES],
    ids=" ".join,
)
def test_every_option_is_described(argv: list[str]) -> None:
    described = help_of(*argv)
    assert len(described) > (60 if argv[0] in ("train", "plan") else 0)
    for name, lines in described:
        text = re.sub(r"\((default|repeatable|required).*", "", " ".join(lines)).strip()
        assert re.match(r'[\w"].*\w', text), f"{name} has no text"
        assert len(lines) == 1 or argv[0] in ("train", "plan"), f"{name} breaks in mid-sentence: {lines}"


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_texts_of_training_options_are_a_line_each(name: str) -> None:
    kind = options._options(default_config(name), {})
    options._describe(kind)
    top = {option.name: option for option in fields(kind)}
    sections = {"model", "views", "optim", "evaluate", OBJECTIVES[name].section, *ADDONS}
    given = [option for section in sections for option in fields(get_type_hints(kind)[section])]
    given += [option for option in top.values() if option.name not in {*sections, "addons", "config", "objective"}]
    texts = {option.name: option.metadata["help"] for option in given}
    assert not [text for text in texts.values() if "\n" in text or "  " in text or BRITISH.search(text)]
    assert texts["canvas"].endswith("(512 for 224), or the source's longest side where that is known to be less.")


BRITISH = re.compile(
    r"\w*colour(?!-strength)|(?<!\w)centres?(?!\w)|neighbour|behaviour|grey|labelled|"
    r"(?:optim|normal|initial|synchron)is(?:e|ation)",
    re.IGNORECASE,
)


def test_words_that_users_read_are_american() -> None:
    texts = {path.name: path.read_text() for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"))}
    texts |= {command.__name__: command.__doc__ or "" for command in cli.COMMANDS}
    for where, text in texts.items():
        assert BRITISH.findall(text) == [], where


@pytest.mark.parametrize(("typed", "meant"), [("trian", "train"), ("segment", "segmentation"), ("xyz", None)])
def test_a_command_that_is_none_is_answered_in_a_line(
    typed: str, meant: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run_cli(typed)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"ser-fast: command: got {typed}, takes train, sweep, plan,")
    assert line.partition("; did you mean ")[2] == ("" if meant is None else f"{meant}?")


def test_the_help_names_the_program_without_its_path(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["/some/where/ser-fast", "knn", "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().out.startswith("usage: ser-fast knn ")


def test_a_reader_that_leaves_is_no_error() -> None:
    program = "import sys; from ser_fast import cli; sys.argv = ['ser-fast', 'train', '--help']; cli.main()"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.close()
        assert child.stderr.read() == b""
