"""Draw the scaling cases of a run: `python benchmarks/scaling.py [NAME]` reads results/NAME.json (default: local)."""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
# op, what is scaled, the size on the x axis, its label
PANELS = (
    ("nt_xent", "rows", "n", "rows n = 2T"),
    ("group_action", "lattice", "lattice", "side of the lattice, tokens"),
    ("nt_xent", "threads", "threads", "threads"),
    ("group_action", "threads", "threads", "threads"),
)


def _position(row: dict[str, Any], size: str) -> int:
    return int(row[size].split("x")[0]) if size == "lattice" else row[size]


def draw(name: str) -> Path:
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        sys.exit(f"{path}: there is no such file; `pytest benchmarks --benchmark-only --results {name}` writes it")
    run = json.loads(path.read_text())
    panels = [
        (rows, op, size, label)
        for op, scaling, size, label in PANELS
        # A run of some cases may have none for a panel.
        if (rows := [row for row in run["cases"] if row["op"] == op and row.get("scaling") == scaling])
    ]
    if not panels:
        sys.exit(f"{name}: no scaling cases among its results")
    figure, axes = plt.subplots(2, len(panels), figsize=(4 * len(panels), 7), layout="constrained", squeeze=False)
    for column, (rows, op, size, label) in zip(axes.T, panels, strict=True):
        for ax, quantity, unit in zip(column, ("ms", "extra_mib"), ("ms", "extra memory, MiB"), strict=True):
            for rival in dict.fromkeys(name for row in rows for name in row["rivals"]):
                if rival == "floor" and quantity == "extra_mib":
                    continue  # its buffers are there before
                points = [
                    (_position(row, size), row["rivals"][rival][quantity]) for row in rows if rival in row["rivals"]
                ]
                points = [point for point in points if point[1]]  # a log scale has no 0
                style = "k--" if rival == "floor" else "o-"
                ax.plot([at for at, _ in points], [value for _, value in points], style, label=rival)
            ax.set(xlabel=label, ylabel=unit, xscale="log", yscale="log")
            ax.set_xticks(sorted({_position(row, size) for row in rows}), labels=None, minor=False)
            ax.xaxis.set_major_formatter("{x:g}")
            ax.minorticks_off()
            ax.grid(alpha=0.3)
        column[0].set_title(op)
        column[0].legend(fontsize="small")
    figure.suptitle(
        f"{run['machine']['cpu']}, {run['machine']['threads']} threads; {run['machine']['gpu'] or 'no GPU'}"
    )
    path = RESULTS / f"scaling-{name}.png"
    figure.savefig(path, dpi=120)
    return path


if __name__ == "__main__":
    print(draw(*(sys.argv[1:] or ["local"])))
