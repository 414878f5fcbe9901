"""The results page: what is in it, and what a person sees of it in a browser."""

import base64
import csv
import hashlib
import html
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from cases.command_line import run_cli
from matplotlib.figure import Figure

from ser_fast.evaluation import BUDGET
from ser_fast.report.comparison import write_report
from ser_fast.report.runs import Run, read_runs

STEPS = 40
WEIGHTS = {"plain": 0.0, "<script>document.title='broken'<script>": 1.0, "third & last": 0.5}
HOSTILE = "</td></table><script>document.title='broken'</script><img src=http://127.0.0.1/x>"


def write_measures(folder: Path, weight: float) -> None:
    """Tables of two layers after the split at 2 and one before it, as the evaluations write them."""
    lines = ["model,layer,element,group,relative_error,retrieval"]
    for model, base in (("checkpoint", weight / 10), ("random", 0.9), (BUDGET, 0.01)):
        for layer in (1, 2, 10):
            lines.append(f"{model},{layer},none,identity,0,1")
            lines += [f"{model},{layer},rot{n},D4,{base + layer / 100 + n / 1000},{layer / 20}" for n in (1, 3)]
            lines.append(f"{model},{layer},half,resampled,{base + layer / 50},{layer / 10}")
    (folder / "equivariance.csv").write_text("\n".join(lines) + "\n")
    (folder / "embedding.csv").write_text(
        "model,embedding,element,group,relative_error\n"
        + "".join(
            f"{model},{kind},rot1,D4,{value + 0.1 * (kind == 'mean')}\n{model},{kind},half,resampled,{2 * value}\n"
            for model, value in (("checkpoint", weight / 5), ("random", 0.8))
            for kind in ("cls", "mean")
        )
    )
    (folder / "linear.csv").write_text(
        "model,head,top1,top1_low,top1_high\n"
        f"checkpoint,mlp,0.9,0.8,1\ncheckpoint,linear,{weight / 2},{weight / 4},1\nrandom,linear,0.25,0.125,0.5\n"
    )


def make_run(folder: Path, weight: float) -> Path:
    """A run's folder as the trainer and the evaluations leave it."""
    folder.mkdir()
    config = {"out": str(folder), "seed": 7, "ser": {"weight": weight, "padding": "border"}, "model": {"split": 2}}
    config |= {"resume": f"of {folder}", "workers": weight, "evaluate": {"every": weight}}  # which change no number
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "environment.json").write_text(json.dumps({"command": [str(folder)], "git": "abc"}))
    log = [{"step": step, "epoch": 0, "loss": 9 / step + weight, "lr": 1e-3} for step in range(1, STEPS + 1)]
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, log)) + '\n{"step": 41, "lo')
    with (folder / "knn.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["model", "k", "top1", "text"])
        rows.writerows([["checkpoint", k, weight / 3 + 1 / (k + 1), HOSTILE] for k in (1, 20, 5)])
    write_measures(folder, weight)
    figure = Figure(figsize=(2, 1))
    figure.subplots().plot([0, weight])
    figure.savefig(folder / "knn.png")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    parent = tmp_path_factory.mktemp("runs")
    return [make_run(parent / name, weight) for name, weight in WEIGHTS.items()]


@pytest.fixture(scope="module")
def page(folders: list[Path]) -> Path:
    path = folders[0].parent / "reports" / "report.html"
    run_cli("report", *folders, "--out", path)
    return path


class Parsed(HTMLParser):
    """The tags of a page, with their attributes and with the texts that stand directly in them."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.inside = False
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        self.texts.append((tag, ""))
        self.inside = True

    def handle_endtag(self, tag: str) -> None:
        self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside:
            tag, text = self.texts[-1]
            self.texts[-1] = tag, text + data

    def values(self, name: str) -> list[str]:
        return [value for _, attributes in self.tags if (value := attributes.get(name)) is not None]

    def table(self, title: str) -> list[list[str]]:
        """The data-value of the rows of cells below a heading."""
        headings = (i for i, text in enumerate(self.texts) if text[0] in ("h2", "h3") and text[1].strip() == title)
        *_, start = headings  # figures of the same come before
        rows: list[list[str]] = []
        for tag, attributes in self.tags[start + 1 :]:
            if tag in ("h2", "h3", "script"):
                break
            if tag == "tr":
                rows.append([])
            if tag == "td":
                rows[-1].append(attributes["data-value"] or "")
        return rows[1:]


KNN, LAST = "Accuracy of k nearest neighbors", "What was logged, at the end"


def csv_rows(folders: list[Path]) -> list[list[str]]:
    """The run's name and the values of each row of knn.csv, as a table should have them: all runs of a k together."""
    files = [list(csv.DictReader((folder / "knn.csv").open(newline=""))) for folder in folders]
    lines = [(folder.name, row) for rows in zip(*files, strict=True) for folder, row in zip(folders, rows, strict=True)]
    return [[name, *row.values()] for name, row in lines]


# ---------------------------------------------------------------- the file


def test_the_page_needs_nothing_else(page: Path) -> None:
    parsed = Parsed(page)
    assert not parsed.values("href")
    sources = parsed.values("src")
    assert len(sources) == 2 + len(WEIGHTS)  # a curve each of loss and lr, and each run's knn.png
    for source in sources:
        assert base64.b64decode(source.removeprefix("data:image/png;base64,")).startswith(b"\x89PNG\r\n\x1a\n")
    assert "url(" not in page.read_text()
    assert "@import" not in page.read_text()


def test_names_and_texts_are_no_markup(page: Path) -> None:
    parsed = Parsed(page)
    (script,) = [text for tag, text in parsed.texts if tag == "script"]
    assert "broken" not in script
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in parsed.values("content")[-1]
    assert "<script>document" not in page.read_text()


def test_tables_hold_the_numbers_of_the_files(page: Path, folders: list[Path]) -> None:
    parsed = Parsed(page)
    assert parsed.table(KNN) == csv_rows(folders)
    summary = parsed.table(LAST)
    for (name, weight), row in zip(WEIGHTS.items(), summary, strict=True):
        losses = [9 / step + weight for step in range(STEPS - 3, STEPS + 1)]  # the last tenth
        assert row[:2] == [name, str(STEPS)]
        assert [float(value) for value in row[2:]] == pytest.approx([sum(losses) / 4, 1e-3])
    assert parsed.table("Options that differ") == [["ser.weight", *map(str, WEIGHTS.values())]]


def test_the_headline_has_a_row_a_run_and_one_of_random_weights(page: Path) -> None:
    parsed = Parsed(page)
    assert [text.strip() for tag, text in parsed.texts if tag in ("h2", "h3")] == [
        *("Headline", "Options that differ", "Curves", KNN, "All tables"),  # the figure knn.png, too, by what it shows
        *("Invariance of the embedding, by element", "Equivariance of tokens, by layer and element"),
        *(KNN, "Accuracy of probes", LAST),
    ]
    columns = [text for tag, text in parsed.texts if tag == "button"][:13]
    errors = [f"error on {of}, {at}" for at in ("split", "last block") for of in ("D4", "scales")]
    classes = ["[CLS] error on D4", "[CLS] error on scales"]
    retrieval = ["retrieval, split", "retrieval, last block"]
    assert columns == ["run", *errors, *retrieval, *classes, "kNN top-1", "linear top-1", "loss", "option"]
    *rows, random = parsed.table("Headline")
    assert [row[0] for row in rows] == list(WEIGHTS)
    for weight, row in zip(WEIGHTS.values(), rows, strict=True):
        base, losses = weight / 10, [9 / step + weight for step in range(STEPS - 3, STEPS + 1)]
        expected = [base + 0.022, base + 0.04, base + 0.102, base + 0.2, (0.1 + 0.1 + 0.2) / 3, (0.5 + 0.5 + 1) / 3]
        expected += [weight / 5, 2 * weight / 5, weight / 3 + 1 / 21, weight / 2, sum(losses) / 4]
        assert [float(value) for value in row[1:]] == pytest.approx(expected)
    assert random[0] == "random weights"  # one row, since those of all runs have the same numbers
    values = [0.922, 0.94, 1.002, 1.1, 0.4 / 3, 2 / 3, 0.8, 1.6]
    assert [float(value) for value in random[1:9]] == pytest.approx(values)
    assert random[9:] == ["", "0.25", ""]
    cells = [text for tag, text in parsed.texts if tag == "td"]
    assert "0.250 [0.125, 0.500]" in cells
    assert f"{1 / 21:.3f}, k 20" in cells


@pytest.mark.parametrize(
    ("split", "place"), [({"split": None}, 3), ({"split": None, "pretrained": "timm"}, 1), ({}, 0)]
)
def test_the_split_of_the_headline_is_the_models(split: dict[str, Any], place: int, tmp_path: Path) -> None:
    lines = [f"checkpoint,{layer},rot1,D4,{layer / 10},0" for layer in (1, 2, 3, 4)]
    (tmp_path / "equivariance.csv").write_text(
        "model,layer,element,group,relative_error,retrieval\n" + "\n".join(lines) + "\n"
    )
    (tmp_path / "config.json").write_text(json.dumps({"model": split}))
    page = write_report(read_runs([tmp_path]), tmp_path / "report.html")
    ((_, error, *others),) = Parsed(page).table("Headline")
    assert float(error) == (place / 10 if place else 0.4)
    assert len(others) == (3 if place else 1)  # without a split the last block alone: error and retrieval


def test_a_folder_that_compares_models_has_a_row_for_each(tmp_path: Path) -> None:
    names = ["one", "two", "random (one)", "random (two)"]
    (tmp_path / "knn.csv").write_text("model,k,top1\n" + "".join(f"{name},5,0.{n}\n" for n, name in enumerate(names)))
    page = write_report(read_runs([tmp_path]), tmp_path / "report.html")
    rows = Parsed(page).table("Headline")
    assert [value for _, value in rows] == ["0.0", "0.1", "0.2", "0.3"]
    here = tmp_path.name
    controls = [f"random (one) weights, as of {here}", f"random (two) weights, as of {here}"]
    assert [name for name, _ in rows] == [f"{here}: one", f"{here}: two", *controls]


def test_wide_figures_take_the_whole_width(folders: list[Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(folders[0], run)
    figure = Figure(figsize=(6, 2))
    figure.subplots()
    figure.savefig(run / "wide.png")
    page = write_report(read_runs([run]), tmp_path / "report.html")
    figures = [attributes for tag, attributes in Parsed(page).tags if tag in ("figure", "img")]
    wide = [image["alt"] for figure, image in zip(figures[::2], figures[1::2], strict=True) if figure.get("class")]
    assert wide == ["wide.png of run"]


def test_controls_that_agree_are_one_row(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    head = "model,head,top1\nrandom,linear,0.25\n"
    (tmp_path / "one" / "linear.csv").write_text(head)
    (tmp_path / "two" / "linear.csv").write_text(head)
    (tmp_path / "two" / "knn.csv").write_text("model,k,top1\nrandom,20,0.5\n")
    page = write_report(read_runs([tmp_path / "one", tmp_path / "two"]), tmp_path / "report.html")
    assert Parsed(page).table("Headline")[-1] == ["random weights", "0.5", "0.25"]
    (tmp_path / "two" / "linear.csv").write_text(head.replace("25", "26"))
    page = write_report(read_runs([tmp_path / "one", tmp_path / "two"]), tmp_path / "report.html")
    assert [row[0] for row in Parsed(page).table("Headline")[-2:]] == [
        f"random weights, as of {n}" for n in ("one", "two")
    ]


def test_runs_stand_together_and_the_identity_last(page: Path, folders: list[Path]) -> None:
    rows = Parsed(page).table("Equivariance of tokens, by layer and element")
    keys = [tuple(row[1:5]) for row in rows]
    assert [row[0] for row in rows] == list(WEIGHTS) * (len(rows) // len(folders))
    assert all(len(set(keys[i : i + 3])) == 1 for i in range(0, len(keys), 3))
    assert [key[3] for key in keys].index("identity") == len(keys) - 27  # 3 models of 3 layers in 3 runs


def test_long_tables_are_folded_below_what_is_read_first(page: Path) -> None:
    tags = [tag for tag, _ in Parsed(page).tags]
    assert tags.count("details") == 5
    assert "open" not in [name for tag, attributes in Parsed(page).tags if tag == "details" for name in attributes]
    assert tags.index("details") > max(i for i, tag in enumerate(tags) if tag == "img")


def test_one_run_shows_all_its_options(folders: list[Path], tmp_path: Path) -> None:
    write_report(read_runs(folders[:1]), tmp_path / "one.html")
    options = {"seed": "7", "ser.weight": "0.0", "ser.padding": "border", "model.split": "2", "environment.git": "abc"}
    assert dict(Parsed(tmp_path / "one.html").table("Options")) == options


def test_long_tables_are_cut_and_say_so(tmp_path: Path) -> None:
    rows = [{"n": str(number)} for number in range(1001)]
    write_report([Run("long", "#123456", {}, [], {"many.csv": rows}, {})], tmp_path / "long.html")
    assert len(Parsed(tmp_path / "long.html").table("Many")) == 1000
    assert "The first 1000 rows of a run; there are: long 1001." in (tmp_path / "long.html").read_text()


def test_every_run_is_marked_with_its_color(page: Path, folders: list[Path]) -> None:
    colors = [run.color for run in read_runs(folders)]
    marks = [attributes["style"] for _, attributes in Parsed(page).tags if attributes.get("class") == "swatch"]
    assert marks[: len(colors)] == [f"background: {color}" for color in colors]  # of the legend
    assert set(marks) == set(marks[: len(colors)])


def test_colors_and_names_tell_runs_apart(tmp_path: Path) -> None:
    folders = []
    for number in range(12):
        (tmp_path / str(number)).mkdir()
        folders.append(make_run(tmp_path / str(number) / "same", number))
    runs = read_runs(folders)
    assert len({run.color for run in runs}) == len({run.name for run in runs}) == 12


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), "runs: got none"),
        (("empty",), "takes a folder that holds log.jsonl or a CSV"),
        (("empty", "empty"), "takes each folder once"),
    ],
)
def test_what_is_no_run_is_refused(tmp_path: Path, names: tuple[str, ...], message: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=message):
        read_runs([tmp_path / name for name in names])


# ---------------------------------------------------------------- what a person sees

# Measures the page in a frame of the wanted width (a window may have a least width), and becomes the result.
PROBE = """<!doctype html><meta charset="utf-8"><body><iframe style="width: {width}px; height: 900px; border: 0"
srcdoc="{page}"></iframe><script>
onload = () => {{
  const frame = document.querySelector("iframe").contentWindow, page = frame.document;
  const seen = selector => [...page.querySelectorAll(selector)].filter(
    element => element.checkVisibility() && element.getBoundingClientRect().height > 0);
  const texts = selector => seen(selector).map(element => element.innerText.trim());
  const headings = texts("h1, h2, h3"), folded = seen("details table").length;
  for (const details of page.querySelectorAll("details")) details.open = true;
  const knn = seen("h3").find(heading => heading.innerText === "Accuracy of k nearest neighbors").closest("details");
  const table = () => [...knn.querySelectorAll("tbody tr")].map(
    row => [...row.cells].map(cell => cell.innerText.trim()));
  const result = {{
    title: page.title, headings: headings, folded: folded, legend: texts(".legend li"), table: table(),
    colors: seen(".legend .swatch").map(element => frame.getComputedStyle(element).backgroundColor),
    images: seen("img").map(image => image.naturalWidth),
    requests: frame.performance.getEntriesByType("resource").map(entry => entry.name)
      .filter(name => !name.startsWith("data:")),
    width: frame.innerWidth,
    overflow: page.documentElement.scrollWidth - page.documentElement.clientWidth,
    sorted: [],
  }};
  const k = [...knn.querySelectorAll("th")].find(heading => heading.innerText.trim() === "k");
  for (let click = 0; click < 2; click++) {{
    k.querySelector("button").click();
    result.sorted.push(table().map(row => Number(row[2])));
  }}
  document.body.textContent = JSON.stringify(result);
}};
</script></body>"""


@pytest.fixture(scope="module")
def browser() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    if os.environ.get("CI"):
        pytest.fail("CI has no browser: .ci/run installs Debian's chromium")
    pytest.skip("there is no Chromium here")


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_the_page(browser: str, page: Path, folders: list[Path], tmp_path: Path, width: int) -> None:
    probe = tmp_path / "probe.html"
    probe.write_text(PROBE.format(width=width, page=html.escape(page.read_text())), encoding="utf-8")
    command = [
        browser,
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--allow-file-access-from-files"),
        *(f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,1000", "--virtual-time-budget=10000"),
        *("--dump-dom", probe.as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    body = re.search(r"<body>(\{.*\})</body>", done.stdout, re.DOTALL)
    assert body, f"the page was not measured:\n{done.stdout[-500:]}\n{done.stderr[-2000:]}"
    seen = json.loads(html.unescape(body[1]))

    assert seen["width"] == width
    assert seen["overflow"] <= 0
    assert seen["title"] == "Comparison of 3 runs"
    assert seen["headings"][:5] == [seen["title"], "Headline", "Options that differ", "Curves", KNN]
    assert seen["folded"] == 0
    assert seen["legend"] == list(WEIGHTS)
    assert len(set(seen["colors"])) == len(WEIGHTS)
    expected = csv_rows(folders)
    assert len(seen["table"]) == len(expected)
    for row, (name, model, k, top1, text) in zip(seen["table"], expected, strict=True):
        assert row == [name, model, k, row[3], text]
        assert float(row[3]) == pytest.approx(float(top1), rel=5e-4)  # four digits
    assert len(seen["images"]) == 2 + len(WEIGHTS)
    assert min(seen["images"]) > 0
    assert seen["requests"] == []
    assert seen["sorted"] == [[1] * 3 + [5] * 3 + [20] * 3, [20] * 3 + [5] * 3 + [1] * 3]


@pytest.mark.parametrize("text", ["null", "{", "[1]"])
def test_a_config_that_is_none_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("a,b\n1,2\n")
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"runs: .*config\.json is no JSON of options"):
        read_runs([tmp_path])
