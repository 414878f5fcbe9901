"""Layers point one way, and tests stand alone. Imports are read from the sources; none is executed."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A part may import its own layer and those above it in this list. `ser_fast` is the package's own __init__.
LAYERS = (
    ("lattice", "frames", "interpolation", "device", "extras"),
    ("ops", "kernels", "_C", "_C_cuda"),
    ("io", "csv_files", "progress"),
    ("loss", "capture", "vit", "pretrained", "heads", "export", "distributed", "views", "ser_fast"),
    ("data",),
    ("objectives", "addons"),
    ("training",),
    ("evaluation", "sensitivity", "sweep", "report", "doctor"),
    ("demo",),
    ("commands",),
    ("cli",),
)
RANK = {part: rank for rank, layer in enumerate(LAYERS) for part in layer}
READS_RUNS = {"evaluation", "report"}  # of training they may import what reads a run's folder, and nothing that trains
MONITORS = {
    "ser_fast.evaluation.knn.SampledImages",
    "ser_fast.evaluation.scores",
}  # what a training measures as it runs
RUN = {f"ser_fast.training.{name}" for name in ("run_folder", "config", "checkpoint")}


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that a file imports, wherever in it; `from a import b` is a.b."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{package}.{alias.name}") for alias in node.names)


def part_of(name: str) -> str:
    """The part of the package that a full name is of: ser_fast.views.color.Color is of views."""
    part = name.split(".")[1]
    return part if part in RANK else "ser_fast"


def sources() -> list[tuple[str, Path]]:
    """(part, file) of the whole package; ser_fast.kernels lies in kernels/."""
    package = [
        (path.relative_to(ROOT / "ser_fast").parts[0].removesuffix(".py"), path)
        for path in sorted((ROOT / "ser_fast").rglob("*.py"))
        if "kernels" not in path.parts
    ]
    return [("ser_fast" if part == "__init__" else part, path) for part, path in package] + [
        ("kernels", path) for path in sorted((ROOT / "kernels").glob("*.py"))
    ]


def test_layers_point_one_way() -> None:
    violations = [f"{path.relative_to(ROOT)}: {part} has no layer" for part, path in sources() if part not in RANK]
    for part, path in sources() if not violations else ():
        for line, name in imports(path):
            where = f"{path.relative_to(ROOT)}:{line}: {part} imports {name}"
            if name.startswith("."):
                violations.append(f"{where}, which is relative")
            elif name.split(".")[0] == "ser_fast":
                other = part_of(name)
                if part == "training" and any(f"{name}.".startswith(f"{module}.") for module in MONITORS):
                    continue
                trains = other == "training" and not any(f"{name}.".startswith(f"{module}.") for module in RUN)
                if RANK[other] > RANK[part] or (part in READS_RUNS and trains):
                    violations.append(where)
    assert not violations, "\n".join(violations)


@pytest.mark.parametrize("folder", ["tests", "benchmarks", "ser_fast", "kernels"])
def test_nothing_imports_a_test(folder: str) -> None:
    violations = [
        f"{path.relative_to(ROOT)}:{line}: imports {name}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line, name in imports(path)
        if name.split(".")[0].startswith(("test_", "tests", "conftest"))
    ]
    assert not violations, "\n".join(violations)


def test_benchmarks_use_public_names_only() -> None:
    violations = [
        f"{path.relative_to(ROOT)}:{line}: imports {name}"
        for path in sorted((ROOT / "benchmarks").rglob("*.py"))
        for line, name in imports(path)
        if name.startswith("ser_fast.") and any(word.startswith("_") for word in name.split("."))
    ]
    assert not violations, "\n".join(violations)
