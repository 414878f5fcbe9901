"""Tables, logs and names that come from anywhere: what is written is no formula, and what is read ends no command."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from ser_fast.csv_files import format_csv, read_csv, unquote, write_csv
from ser_fast.evaluation import detection, robustness, transformations
from ser_fast.evaluation.classification import grade
from ser_fast.evaluation.coco import CategoryRecord
from ser_fast.evaluation.figures import plot_confusion
from ser_fast.evaluation.protocol import make_folder
from ser_fast.evaluation.tables import print_rows, write_confusion
from ser_fast.export import export
from ser_fast.io import printable, write_text
from ser_fast.report.comparison import write_report
from ser_fast.report.runs import read_runs
from ser_fast.sensitivity.table import COLUMNS, read_rows
from ser_fast.training.config import ModelConfig, TrainConfig, with_options
from ser_fast.training.trainer import train
from ser_fast.vit import SplitViT, save_split_vit

FORMULAS = ["=HYPERLINK(1)", "@SUM(1)", "+1+1", "-2+3", "\t=1", "\r=1", "'=1", "''@", "-"]
PLAIN = ["-1", "+2.5", "-1e-3", "-inf", "a=b", "'quoted'", "", "ant", "5"]


def test_no_text_is_a_formula(tmp_path: Path) -> None:
    texts = FORMULAS + PLAIN
    path = write_csv(["text", "number"], [{"text": text, "number": -1.5} for text in texts], tmp_path / "table.csv")
    with path.open(newline="", encoding="utf-8") as file:
        written = list(csv.DictReader(file))
    assert [row["text"] for row in written] == ["'" + text for text in FORMULAS] + PLAIN
    assert {row["number"] for row in written} == {"-1.5"}
    assert [row["text"] for row in read_csv(path)] == texts, "what is read is what was given"


def test_every_table_is_written_so(tmp_path: Path) -> None:
    labels = torch.tensor([0, 1])
    rows = [({"model": "=1+1"}, grade(torch.tensor([[0], [0]]), labels, 2))]
    text = write_confusion(rows, ["=HYPERLINK(0)", "@SUM(1)"], tmp_path / "confusion.csv").read_text()
    assert text.splitlines()[1:] == ["'=1+1,'=HYPERLINK(0),'=HYPERLINK(0),1", "'=1+1,'@SUM(1),'=HYPERLINK(0),1"]


def test_a_study_reads_its_texts_again(tmp_path: Path) -> None:
    numbers = {"layer": 1, "antialias": False, "frequency": "", "value": 1.0, "low": 0.5, "high": 2.0, "images": 3}
    row = {**dict.fromkeys(COLUMNS, "x"), **numbers, "model": "=vit", "signal": "-photos"}
    (tmp_path / "table.csv").write_text(format_csv(COLUMNS, [row]), newline="")
    (read,) = read_rows(tmp_path / "table.csv")
    assert (read.model, read.signal, read.value) == ("=vit", "-photos", 1.0)
    assert unquote({None: ["left over"], "a": None}) == {None: ["left over"], "a": None}


# ---------------------------------------------------------------- logs and tables of anybody


def test_a_report_passes_over_lines_that_are_no_records(tmp_path: Path) -> None:
    lines = [
        '{"step": 1, "epoch": 0, "loss": 2.0}',
        "7",
        "[1, 2]",
        '"text"',
        "null",
        "true",
        "[" * 100_000,
        '{"loss": 3.0}',
        '{"step": "two", "loss": 3.0}',
        '{"step": null, "loss": 3.0}',
        '{"step": Infinity, "loss": 3.0}',
        '{"step": 2, "loss": "high", "other": [1], "flag": true, "long": 1' + "0" * 400 + "}",
        '{"step": 3, "loss": 4.0}',
        '{"step": 4, "lo',
    ]
    (tmp_path / "log.jsonl").write_bytes("\n".join(lines).encode() + b"\xff\xfe\n")
    (run,) = read_runs([tmp_path])
    assert run.log == [{"step": 1, "epoch": 0, "loss": 2.0}, {"step": 2}, {"step": 3, "loss": 4.0}]
    assert "loss" in write_report([run], tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_table_that_can_not_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "long.csv").write_text("a,b\n" + "x" * 140_000 + ",1\n")
    with pytest.raises(ValueError, match=r"^runs: .*long\.csv can't be read as CSV: field larger than [^\n]*$"):
        read_runs([tmp_path])
    (tmp_path / "long.csv").write_bytes(b"\xef\xbb\xbfname,b\n\xe4\xf6,1,2\nc\n")
    (run,) = read_runs([tmp_path])
    assert run.csv["long.csv"] == [{"name": "\ufffd\ufffd", "b": "1"}, {"name": "c", "b": ""}]


# ---------------------------------------------------------------- names that are no UTF-8, and other locales

ODD = os.fsdecode(b"caf\xe9")  # Latin-1


def test_names_that_are_no_utf_8_are_written_and_shown(tmp_path: Path) -> None:
    write_text(tmp_path / "text", f"{ODD} \u732b")
    assert (tmp_path / "text").read_text(encoding="utf-8") == "caf\\udce9 \u732b"
    assert printable(f"{ODD}\x1b[31m \u732b\n") == "caf\\udce9\\x1b[31m \u732b\\n"
    rows = [({"model": f"{ODD}[red]\x1b"}, grade(torch.tensor([[0]]), torch.tensor([0]), 1))]
    console = Console(record=True, width=200)
    print_rows(rows, f"kNN of folder:{ODD}[/x]", console)
    shown = console.export_text()
    assert "caf\\udce9[red]\\x1b" in shown
    assert "folder:caf\\udce9[/x]" in shown
    folder = tmp_path / f"{ODD}[red]"
    folder.mkdir()
    write_confusion(rows, [ODD], folder / "confusion.csv")
    write_report(read_runs([folder]), folder / "report.html")
    assert "caf\\udce9[red]" in (folder / "report.html").read_text(encoding="utf-8")


def test_names_of_models_are_no_markup_in_any_table() -> None:
    name = f"[/red]{ODD}\x1b[0m"
    console = Console(record=True, width=400)
    error = robustness.ErrorRate("fog", 1, 0.5, 0.4, 0.6, 10)
    robustness.print_errors({name: [error]}, console=console)
    robustness.print_flips({name: [robustness.FlipRate("tilt", 0.1, 3)]}, console)
    detection.print_table({name: [CategoryRecord("all", *[0.5] * 7, 3)]}, console)
    transformations.print_predictions({name: []}, console)
    shown = console.export_text()
    assert shown.count("[/red]caf\\udce9\\x1b[0m") >= 4
    assert "\x1b" not in shown


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["$x^$", "$\\frac{$", ODD, "a\x1bb", "{", "%s", "\u732b"])
def test_a_figure_shows_any_name(name: str, tmp_path: Path) -> None:
    rows = [({"model": name}, grade(torch.tensor([[0], [0]]), torch.tensor([0, 1]), 2))]
    assert plot_confusion(rows, [name, "other"], tmp_path / "confusion.png").stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_commands_take_any_name_in_any_locale(locale: str, tmp_path: Path) -> None:
    """The report of a folder with an odd name, to a file with another; the class is not ASCII."""
    folder = tmp_path / f"{ODD} \u732b [red]"
    folder.mkdir()
    (folder / "knn.csv").write_text("model,class\na,\u732b\n", encoding="utf-8")
    environment = {**os.environ, "LC_ALL": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "ser_fast.cli", "report", str(folder), "--out", str(folder / "report.html")]
    done = subprocess.run(command, capture_output=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert b"[red]" in done.stdout
    assert "\u732b" in (folder / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", ["file", "link to nothing", "below a file"])
def test_an_out_that_is_no_folder_is_refused_in_a_line(kind: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if kind == "link to nothing":
        out.symlink_to(tmp_path / "nowhere")
    else:
        out.write_text("")
    out = out / "deeper" if kind == "below a file" else out
    with pytest.raises(ValueError, match=rf"^out: got {out}, takes a folder that can be made: [^\n]*$"):
        make_folder(out)


def test_an_out_that_is_a_folder_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=rf"^out: got the folder {tmp_path}, takes a file$"):
        write_report(read_runs([tmp_path]), tmp_path)
    save_split_vit(tmp_path / "encoder.safetensors", SplitViT("vit_tiny_patch16_224", 0, img_size=32, depth=1))
    with pytest.raises(ValueError, match=rf"^out: got the folder {tmp_path}, takes a file$"):
        export(tmp_path, "timm", tmp_path)


# ---------------------------------------------------------------- options that can't work, before the run's folder


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optim.batch_size": 1}, r"^optim.batch_size: got 1, takes 2 images or more a part: one alone has no other"),
        (
            {"optim.batch_size": 4, "optim.accumulate": 4, "optim.accumulate_mode": "plain"},
            r"^optim.batch_size: got 4 in 4 parts, takes 2 images or more a part",
        ),
        ({"out": Path(ODD)}, r"^out: got .*, takes a name in UTF-8, as TensorBoard and torch.save do$"),
        ({"model.image_size": 30}, r"^model.image_size: got 30, takes a multiple of the patch size"),
    ],
    ids=str,
)
def test_a_training_that_can_not_work_makes_no_folder(
    options: dict[str, object], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = ModelConfig(
        "vit_tiny_patch16_224", image_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, split=1
    )
    config = with_options(TrainConfig(out=Path("run"), model=model, addons={}, device="cpu", workers=0), options)
    with pytest.raises(ValueError, match=message):
        train(config)
    assert not list(tmp_path.iterdir())
