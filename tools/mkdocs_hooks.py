"""What the site has besides docs/: README as its first page, and the files that pages link to outside of that folder.

mkdocs loads this file as its hooks, and mkdocstrings as an extension of griffe, which reads the docstrings.
"""

import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(\]\()([^)#\s:]+)(#[^)\s]*)?(?=\))")
LANGUAGES = {".py": "python", ".cpp": "cpp", ".h": "cpp", ".cu": "cuda", ".toml": "toml", ".sh": "bash"}


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add README, and every file in the tree that it or a page links to."""
    found: dict[str, None] = {}
    pages = {"README.md": ROOT / "README.md"}
    pages |= {f"docs/{file.src_uri}": Path(file.abs_src_path) for file in files.documentation_pages()}
    for page, path in pages.items():
        for _, target, _ in LINK.findall(path.read_text(encoding="utf-8")):
            found[_in_tree(page, target)] = None
    for name in found:
        path = ROOT / name
        if name.startswith("docs/") or name in pages or not path.is_file():
            continue
        files.append(_file(config, name, path))
    files.append(File.generated(config, "index.md", content=pages["README.md"].read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links as the site has them: what lies below docs/ in the tree lies at its top."""
    source = page.file.src_uri
    name = "README.md" if source == "index.md" else f"docs/{source}" if (ROOT / "docs" / source).exists() else source

    def moved(match: re.Match[str]) -> str:
        target = _in_tree(name, match[2])
        if target.startswith("docs/"):
            target = target.removeprefix("docs/")
        elif target == "README.md":
            target = "index.md"
        elif Path(target).suffix in LANGUAGES or not Path(target).suffix:
            target = f"{target}.md"
        return f"{match[1]}{'../' * source.count('/')}{target}{match[3] or ''}"

    return LINK.sub(moved, markdown)


def _in_tree(page: str, target: str) -> str:
    """A link of a page as a path from the top of the tree."""
    parts: list[str] = []
    for part in [*page.split("/")[:-1], *target.split("/")]:
        if part == "..":
            parts.pop()
        elif part not in ("", "."):
            parts.append(part)
    return "/".join(parts)


def _file(config: MkDocsConfig, name: str, path: Path) -> File:
    if path.suffix in LANGUAGES or not path.suffix:  # a source: a page that shows it
        language = LANGUAGES.get(path.suffix, "text")
        text = f"# `{name}`\n\n````{language}\n{path.read_text(encoding='utf-8')}````\n"
        return File.generated(config, f"{name}.md", content=text)
    return File.generated(config, name, abs_src_path=str(path))


class OurDocstrings(griffe.Extension):
    """What griffe reads otherwise than it is meant: `Example:`, and a colon in the first line of what is returned."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is None:
            return
        text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
        if isinstance(obj, griffe.Function) and obj.returns is not None:  # or else what is before the colon is the type
            text = re.sub(r"^(Returns:\n +)(?=.*:)", rf"\g<1>{obj.returns}: ", text, flags=re.MULTILINE)
        obj.docstring.value = text
