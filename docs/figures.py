"""The drawings of docs/figures, from the library's own numbers: python docs/figures.py [FOLDER]

White cards, so that they read on light and dark pages.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch

from ser_fast import LatticeMap, group_action

FOLDER = Path(__file__).parent / "figures"
INK, FAINT, PALE = "#3a3f4b", "#c3c8d4", "#eef0f6"
BLUE, ORANGE, GREEN = "#4051b5", "#e2711d", "#2a9d6f"


class Drawing:
    """SVG elements on a white card, text of 16 pixels."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'font-family="sans-serif" font-size="16" fill="{INK}">',
            f"<title>{title}</title>",
            *(
                f'<marker id="{color[1:]}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
                f'markerUnits="userSpaceOnUse" orient="auto"><path d="M0 0 8 4 0 8z" fill="{color}"/></marker>'
                for color in (INK, BLUE, ORANGE, GREEN)
            ),
            f'<rect width="{width}" height="{height}" rx="8" fill="#fff"/>',
        ]

    def rectangle(
        self, x: float, y: float, w: float, h: float, fill: str = "none", stroke: str = FAINT, **more
    ) -> None:
        self._add("rect", x=x, y=y, width=w, height=h, fill=fill, stroke=stroke, **more)

    def line(self, *points: tuple[float, float], color: str = INK, **more) -> None:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self._add("polyline", points=path, fill="none", stroke=color, **more)

    def arrow(self, *points: tuple[float, float], color: str = INK, **more) -> None:
        self.line(*points, color=color, marker_end=f"url(#{color[1:]})", **more)

    def dot(self, x: float, y: float, color: str = INK, r: float = 3) -> None:
        self._add("circle", cx=x, cy=y, r=r, fill=color)

    def text(self, x: float, y: float, text: str, anchor: str = "middle", **more) -> None:
        self._add("text", text, x=x, y=y, text_anchor=anchor, **more)

    def lattice(self, x: float, y: float, rows: int, columns: int, cell: float, stroke: str = FAINT) -> None:
        for i in range(rows):
            for j in range(columns):
                self.rectangle(x + j * cell, y + i * cell, cell, cell, stroke=stroke)
        self.rectangle(x, y, columns * cell, rows * cell, stroke=INK)

    def save(self, path: Path) -> None:
        path.write_text("\n".join([*self.parts, "</svg>", ""]), encoding="utf-8")

    def _add(self, tag: str, text: str | None = None, **attributes: object) -> None:
        shown = (f"{value:.1f}" if isinstance(value, float) else value for value in attributes.values())
        pairs = zip(attributes, shown, strict=True)
        body = " ".join(f'{name.replace("_", "-")}="{value}"' for name, value in pairs)
        self.parts.append(f"<{tag} {body}/>" if text is None else f"<{tag} {body}>{text}</{tag}>")


def lattice() -> Drawing:
    """Tokens and pixels over one plane."""
    d = Drawing(570, 390, "A lattice of 3 x 4 tokens over 12 x 16 pixels")
    x, y, cell = 96, 70, 88
    for i in range(13):
        d.line((x, y + i * cell / 4), (x + 4 * cell, y + i * cell / 4), color=PALE)
    for j in range(17):
        d.line((x + j * cell / 4, y), (x + j * cell / 4, y + 3 * cell), color=PALE)
    d.rectangle(x + 2 * cell, y + cell, cell, cell, fill=ORANGE, fill_opacity=0.25)
    d.rectangle(x, y, cell / 4, cell / 4, fill=BLUE, fill_opacity=0.4)
    d.lattice(x, y, 3, 4, cell)
    for i in range(3):
        for j in range(4):
            d.dot(x + (j + 0.5) * cell, y + (i + 0.5) * cell)
    d.arrow((x, y - 34), (x + 4 * cell + 24, y - 34))
    d.text(x + 4 * cell + 32, y - 28, "x", anchor="start")
    d.arrow((x - 62, y), (x - 62, y + 3 * cell + 20))
    d.text(x - 62, y + 3 * cell + 40, "y")
    for j in range(5):
        d.text(x + j * cell, y - 12, "W = 4" if j == 4 else str(j))
    for i in range(1, 4):
        d.text(x - 8, y + i * cell + 5, "H = 3" if i == 3 else str(i), anchor="end")
    d.text(x + 2.5 * cell, y + 1.5 * cell - 12, "(1.5, 2.5)", fill=ORANGE)
    d.line((x + 2.55 * cell, y + 1.55 * cell), (x + 4 * cell + 10, y + 2.2 * cell), color=ORANGE)
    d.text(x + 4 * cell + 14, y + 2.2 * cell + 5, "token (1, 2)", anchor="start", fill=ORANGE)
    d.line((x + cell / 8, y + cell / 4), (x + cell / 8, y + 3 * cell + 20), color=BLUE)
    d.text(x, y + 3 * cell + 38, "a pixel: 1/4 of a token here", anchor="start", fill=BLUE)
    return d


def composition() -> Drawing:
    """From a picture to two views, and from one view to the other."""
    d = Drawing(600, 400, "g0 and g1 take the picture to its views, g takes view 0 to view 1")
    d.text(105, 98, "the picture")
    d.rectangle(20, 110, 170, 156, fill=PALE, stroke=INK)
    d.rectangle(38, 138, 88, 88, fill=BLUE, fill_opacity=0.15, stroke=BLUE, stroke_width=2)
    d.rectangle(86, 132, 90, 100, fill=GREEN, fill_opacity=0.15, stroke=GREEN, stroke_width=2)
    d.text(40, 131, "box 0", fill=BLUE, font_size=14, anchor="start")
    d.text(150, 252, "box 1", fill=GREEN, font_size=14)
    d.text(455, 34, "view 0, 4 × 4 tokens")
    d.lattice(400, 44, 4, 4, 28, stroke=BLUE)
    d.text(455, 386, "view 1, mirrored, 4 × 4 tokens")
    d.lattice(400, 252, 4, 4, 28, stroke=GREEN)
    d.arrow((190, 165), (392, 100), color=BLUE)
    d.text(280, 112, "g0", fill=BLUE)
    d.arrow((190, 215), (392, 306), color=GREEN)
    d.text(280, 286, "g1", fill=GREEN)
    d.arrow((456, 162), (456, 246), color=ORANGE, stroke_width=2)
    d.text(468, 208, "g = g1 ∘ g0⁻¹", anchor="start", fill=ORANGE)
    return d


def tiles() -> Drawing:
    """The similarity matrix that is never stored."""
    d = Drawing(640, 500, "NT-Xent tile by tile")
    x, y, cell, count = 70, 70, 44, 8
    for i in range(count):
        for j in range(count):
            half = count // 2
            same = i % half == j % half
            if j < i:
                d.rectangle(x + j * cell, y + i * cell, cell, cell, fill="#fff", stroke=PALE)
            else:
                d.rectangle(x + j * cell, y + i * cell, cell, cell, fill=FAINT if same else PALE)
    size = count * cell
    d.line((x, y), (x + size, y + size), color=INK, stroke_dasharray="2 4")
    d.line((x + size / 2, y), (x + size, y + size / 2), color=GREEN, stroke_width=3, stroke_dasharray="6 4")
    d.rectangle(x + 6 * cell, y + cell, cell, cell, fill=ORANGE, fill_opacity=0.7, stroke=ORANGE)
    d.arrow((x + 7 * cell, y + 1.5 * cell), (x + size + 26, y + 1.5 * cell), color=ORANGE, stroke_width=2)
    d.arrow((x + 6.5 * cell, y + 2 * cell), (x + 6.5 * cell, y + size + 24), color=ORANGE, stroke_width=2)
    d.rectangle(x + size + 30, y, 14, size, fill=PALE, stroke=FAINT)
    d.rectangle(x, y + size + 28, size, 14, fill=PALE, stroke=FAINT)
    d.rectangle(x + size + 30, y + cell, 14, cell, fill=ORANGE, fill_opacity=0.7, stroke=ORANGE)
    d.rectangle(x + 6 * cell, y + size + 28, cell, 14, fill=ORANGE, fill_opacity=0.7, stroke=ORANGE)
    d.text(x + size + 52, y + 1.5 * cell + 5, "L of its rows", anchor="start", fill=ORANGE)
    d.text(x + 6.5 * cell, y + size + 64, "L of its columns", fill=ORANGE)
    d.text(x + size / 4, y - 12, "view 0")
    d.text(x + 3 * size / 4, y - 12, "view 1")
    d.text(x - 10, y + size / 4, "view 0", anchor="end")
    d.text(x - 10, y + 3 * size / 4, "view 1", anchor="end")
    d.text(x + size / 2, 32, "all rows against all rows", font_weight="bold")
    d.text(x + 1.9 * cell, y + 6.2 * cell, "the same numbers:", font_size=14)
    d.text(x + 1.9 * cell, y + 6.2 * cell + 19, "never computed", font_size=14)
    d.line((x + size + 53, y + 4.7 * cell + 8), (x + size + 69, y + 4.7 * cell + 8), color=GREEN, stroke_width=3)
    d.text(x + size + 75, y + 4.7 * cell + 14, "positives, apart", anchor="start")
    d.rectangle(x + size + 53, y + 5.6 * cell, 16, 16, fill=FAINT)
    d.text(x + size + 75, y + 5.6 * cell + 14, "masks needed", anchor="start")
    d.rectangle(x + size + 53, y + 6.3 * cell, 16, 16, fill=PALE)
    d.text(x + size + 75, y + 6.3 * cell + 14, "none needed", anchor="start")
    return d


def action() -> Drawing:
    """One row of W, and one of its transpose."""
    d = Drawing(600, 640, "The group action gathers taps; its transpose gathers them backwards")
    n, cell, left, right = 5, 44, 40, 340
    g = LatticeMap.rotate((n, n), 30)
    eye = torch.eye(n * n, dtype=torch.float64)[None]
    w = group_action(eye, g, interpolation="bilinear", padding="zeros", backend="reference")[0]
    moved = int(1 * n + 3)  # the token of the result that is looked at
    taken = int(w[moved].argmax())  # and the one of the input
    for y, heading, one, other in (
        (70, "group_action: a token of the result takes its taps", w[moved], moved),
        (390, "its transpose: a token takes from all that took it", w[:, taken], taken),
    ):
        back = y > 300
        d.text(300, y - 38, heading, font_weight="bold")
        d.text(left + n * cell / 2, y - 10, "x" if not back else "gradient of x")
        d.text(right + n * cell / 2, y - 10, "ρ(g) x" if not back else "gradient of ρ(g) x")
        d.lattice(left, y, n, n, cell)
        d.lattice(right, y, n, n, cell)
        many, single = (right, left) if back else (left, right)
        sx, sy = single + (other % n) * cell, y + (other // n) * cell
        d.rectangle(sx, sy, cell, cell, fill=ORANGE, fill_opacity=0.7, stroke=ORANGE)
        for token, weight in enumerate(one.tolist()):
            if weight < 5e-3:
                continue
            tx, ty = many + (token % n) * cell, y + (token // n) * cell
            d.rectangle(tx, ty, cell, cell, fill=BLUE, fill_opacity=0.1 + 0.6 * weight, stroke=BLUE)
            d.text(tx + cell / 2, ty + cell / 2 + 5, f"{weight:.2f}".lstrip("0"), font_size=14)
            ends = (tx if back else tx + cell, ty + cell / 2), (sx + cell if back else sx, sy + cell / 2)
            d.arrow(*ends, color=ORANGE, stroke_opacity=0.8)
    return d


FIGURES: tuple[Callable[[], Drawing], ...] = (lattice, composition, tiles, action)

if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    folder.mkdir(exist_ok=True)
    for figure in FIGURES:
        figure().save(folder / f"{figure.__name__}.svg")
