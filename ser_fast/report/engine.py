"""The engine of all pages: templates that extend page.html, and images inside them.

A page loads nothing: its styles, images and at most one script are in it, and a content security policy says so to the
browser. Texts are escaped; a name that a template misspells is an error.
"""

import base64
import hashlib
import io
import math
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from ser_fast.io import write_text


def render(template: str, *, title: str, script: str = "", **content: Any) -> str:
    """The HTML of a page.

    Args:
        template: its file's name in this package.
        title: of the page.
        script: JavaScript to run in it.
        **content: what the template names.

    Example:
        >>> render("runs.html", title="Comparison", runs=[], tables=[], curves={}, images={})
    """
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        loader=FunctionLoader(lambda name: files("ser_fast.report").joinpath(name).read_text(encoding="utf-8")),
    )
    environment.filters |= {"is_number": _is_number, "shorten": _shorten}
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template(template).render(
        title=title, script=Markup(script), script_hash=digest if script else "", **content
    )


def write_page(path: Path, html: str) -> Path:
    """Write a page, whole or not at all; returns its path."""
    if path.is_dir():
        raise ValueError(f"out: got the folder {path}, takes a file")
    write_text(path, html)
    return path


def to_png(figure: Figure, *, dpi: int = 120) -> bytes:
    """A figure as a PNG file."""
    png = io.BytesIO()
    figure.savefig(png, dpi=dpi)
    return png.getvalue()


def data_uri(png: bytes) -> str:
    """A PNG file as the source of an image."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def aspect(png: bytes) -> float:
    """Width over height of a PNG file; 1 of one that is damaged."""
    width, height = int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")
    return width / height if width and height else 1.0


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _shorten(text: str) -> str:
    """Four significant digits of a number that isn't whole; any other text as it is."""
    if not _is_number(text) or not math.isfinite(float(text)) or text.lstrip("+-").isdigit():
        return text
    return f"{float(text):.4g}"
