"""The pages: links, names of files, code and drawings are right, and the site builds."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("*.md"), *DOCS.glob("*.md")))


def names_in_nav(entries: Any) -> list[str]:
    if isinstance(entries, str):
        return [entries]
    values = entries.values() if isinstance(entries, dict) else entries
    return [name for value in values for name in names_in_nav(value)]


def anchors(text: str) -> set[str]:
    """Of the headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\(([^)#\s:]*)#?([^)\s:]*)\)", text):
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), f"{target}#{anchor}"


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/kernels.md"])
def test_files_that_are_named_are_there(page: str) -> None:
    named = set(re.findall(r"`([\w./-]+/[\w./-]*)`", (ROOT / page).read_text(encoding="utf-8")))
    assert len(named) > 4
    for name in named:
        if "NAME" not in name and not name.startswith("build"):
            assert (ROOT / name).exists(), name


def test_the_navigation_has_every_page() -> None:
    nav = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), yaml.SafeLoader)["nav"]
    assert sorted(names_in_nav(nav)) == sorted(["index.md", *(path.name for path in DOCS.glob("*.md"))])


def test_the_code_about_coordinates_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "coordinates.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 3
    exec("\n".join(blocks), {})


def test_the_drawings_are_those_of_their_program(tmp_path: Path) -> None:
    subprocess.run([sys.executable, DOCS / "figures.py", tmp_path], check=True)
    drawn = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()}
    assert drawn == {path.name: path.read_text(encoding="utf-8") for path in (DOCS / "figures").iterdir()}
    pages = "".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
    assert all(f"(figures/{name})" in pages for name in drawn)


def test_a_commit_is_formatted_by_the_pinned_versions() -> None:
    path = ROOT / ".pre-commit-config.yaml"
    if not path.is_file():
        pytest.skip("a source distribution has no hidden files")
    repositories = yaml.safe_load(path.read_text(encoding="utf-8"))["repos"]
    revisions = {Path(repository["repo"]).name: repository["rev"] for repository in repositories}
    pins = dict(re.findall(r"^([\w-]+)==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert revisions == {
        "ruff-pre-commit": f"v{pins['ruff']}",
        "mirrors-clang-format": f"v{pins['clang-format']}",
    }


def test_an_issue_asks_for_what_doctor_says() -> None:
    folder = ROOT / ".github" / "ISSUE_TEMPLATE"
    if not folder.is_dir():
        pytest.skip("a source distribution has no hidden files")
    forms = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in folder.glob("*.yml")}
    assert forms.keys() == {"bug", "feature", "config"}
    for name in ("bug", "feature"):
        assert {"name", "description", "body"} <= forms[name].keys()
        kinds = [entry["type"] for entry in forms[name]["body"]]
        assert set(kinds) <= {"textarea", "dropdown", "checkboxes", "input", "markdown"}
    asked = {entry["id"]: entry for entry in forms["bug"]["body"]}
    assert "ser-fast doctor" in asked["doctor"]["attributes"]["label"]
    assert asked["doctor"]["validations"]["required"] is True


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("mkdocstrings") is None or importlib.util.find_spec("material") is None:
        pytest.skip("the extra `docs` is not installed")
    folder = tmp_path_factory.mktemp("site")
    # Not --quiet, which makes warnings, broken links among them, no errors.
    # Without --quiet, under which a broken link is no error.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return folder


@pytest.mark.slow
def test_the_site_has_every_page_and_what_it_links_to(site: Path) -> None:
    names = {path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_file()}
    assert {Path(page).with_suffix(".html").name for page in PAGES if page.startswith("docs/")} <= names
    assert {"index.html", "CONTRIBUTING.html", "benchmarks/results/cpu-epyc-2core.html", "figures/tiles.svg"} <= names
    assert "figures.py" not in names
    for name in ("index.html", "kernels.html", "api.html"):
        text = (site / name).read_text(encoding="utf-8")
        fetched = re.findall(r'(?:<script[^>]*src|<img[^>]*src|<link[^>]*rel="stylesheet"[^>]*href)="([^"]+)"', text)
        assert fetched
        for address in fetched:
            assert (site / address.partition("?")[0]).is_file(), address  # nothing comes from elsewhere


@pytest.mark.slow
def test_the_site_shows_docstrings_as_they_are_meant(site: Path) -> None:
    text = (site / "api.html").read_text(encoding="utf-8")
    plain = re.sub(r"<[^>]+>", "", text)
    for name in ("ser_fast.SERLoss", "ser_fast.LatticeMap.from_views", "ser_fast.nt_xent", "ser_fast.vit.SplitViT"):
        assert f'id="{name}"' in text
    assert "widths of the projector" in plain  # of two arguments on one line
    assert "Soft Equivariance Regularization: the tokens of view 0" in plain
    assert "(B, h*w, C) or (B, h, w, C); with return_valid" in plain  # stars are no emphasis
    assert "<blockquote>" not in text  # examples are code, not quotations
    assert not re.findall(r"^\s*(?:Args|Example):\s*$", plain, re.MULTILINE)  # sections were understood
    training = (site / "api_training.html").read_text(encoding="utf-8")
    assert "Share of the images that may be unreadable" in training  # the docstring below an option
    assert "What to log: the losses" in training  # a colon that follows no type
