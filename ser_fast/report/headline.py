"""The headline of a comparison of runs: a row a run, of the few numbers that tell one from another."""

from collections.abc import Callable, Sequence
from statistics import fmean

from ser_fast.evaluation import BUDGET, CONTROL
from ser_fast.report.runs import Run
from ser_fast.report.tables import Cell, Table, is_loss, last_means
from ser_fast.training.config import ModelConfig

_NEIGHBORS = 20
_GROUPS = {"D4": "D4", "resampled": "scales"}
_NOTE = (
    "Of the tokens: the relative error, 0 is equivariant and 1 no better than the mean token; retrieval, 1 finds "
    "every token. Of [CLS]: 0 is invariant. Means over elements and images; accuracies with 95 % intervals; losses are "
    "means of the last tenth of the steps."
)

_Rows = Sequence[dict[str, str]]


def headline(runs: Sequence[Run]) -> Table:
    """One row for each run, or each model of a folder that compares several, then one for each random control.

    Controls with the same numbers, as far as both have them, are one row: those of runs of one architecture. A column
    that no run has a number for is left out.
    """
    rows: list[tuple[Cell, dict[str, Cell]]] = []
    controls: list[tuple[Cell, dict[str, Cell]]] = []
    for run in runs:
        models = _models(run)
        own = [model for model in models if not model.startswith(CONTROL)]
        for model in own or [""]:
            name = run.name if len(own) < 2 else f"{run.name}: {model}"
            rows.append((Cell(name, run=run), _measures(run, model) | _losses(run)))
        for model in models:
            if not model.startswith(CONTROL) or not (cells := _measures(run, model)):
                continue
            for _, other in controls:
                if (common := other.keys() & cells.keys()) and all(other[name] == cells[name] for name in common):
                    other.update(cells)
                    break
            else:
                controls.append((Cell(f"{model} weights, as of {run.name}"), cells))
    if len(controls) == 1:
        controls = [(Cell(f"{CONTROL} weights"), controls[0][1])]
    columns = list(dict.fromkeys(name for _, cells in rows + controls for name in cells))
    columns.sort(key=lambda name: _ORDER.index(name) if name in _ORDER else len(_ORDER))
    lines = [[name, *(cells.get(column, Cell("")) for column in columns)] for name, cells in rows + controls]
    return Table("Headline", [Cell(name) for name in ("run", *columns)], lines if columns else [], note=_NOTE)


def _models(run: Run) -> list[str]:
    """The names of the models in a run's tables, but for encoders of mean colors."""
    files = ("equivariance.csv", "embedding.csv", "knn.csv", "linear.csv")
    names = dict.fromkeys(row.get("model", "") for file in files for row in run.csv.get(file, []))
    return [name for name in names if name and not name.startswith(BUDGET)]


def _measures(run: Run, model: str) -> dict[str, Cell]:
    cells: dict[str, Cell] = {}

    def of(file: str) -> _Rows:
        return [row for row in run.csv.get(file, []) if row.get("model", "") == model]

    def add(column: str, value: float | None, text: str = "") -> None:
        if value is not None:
            cells[column] = Cell(str(value), text)

    tokens = of("equivariance.csv")
    layers = sorted({int(row["layer"]) for row in tokens if row.get("layer", "").isdigit()})
    split = _split(run)
    places = {"split": max(1, split)} if split is not None and layers else {}
    for place, layer in (places | {"last block": layers[-1]} if layers else {}).items():
        there = [row for row in tokens if row["layer"] == str(layer)]
        for group, title in _GROUPS.items():
            add(f"error on {title}, {place}", _mean(there, "relative_error", _of_group(group)))
        add(f"retrieval, {place}", _mean(there, "retrieval", _moved))
    classes = [row for row in of("embedding.csv") if row.get("embedding") == "cls"]
    for group, title in _GROUPS.items():
        add(f"[CLS] error on {title}", _mean(classes, "relative_error", _of_group(group)))
    votes = [row for row in of("knn.csv") if row.get("k", "").isdigit()]
    fitting = [row for row in votes if int(row["k"]) <= _NEIGHBORS] or votes
    if fitting:
        best = max(fitting, key=lambda row: int(row["k"]))
        add("kNN top-1", _number(best, "top1"), _with_interval(best, f", k {best['k']}"))
    probes = of("linear.csv")
    for row in [row for row in probes if row.get("head") == "linear"][:1] or probes[:1]:
        add("linear top-1", _number(row, "top1"), _with_interval(row))
    return cells


_ORDER = [
    *(f"error on {title}, {place}" for place in ("split", "last block") for title in _GROUPS.values()),
    *("retrieval, split", "retrieval, last block", "[CLS] error on D4", "[CLS] error on scales"),
    *("kNN top-1", "linear top-1"),
]


def _losses(run: Run) -> dict[str, Cell]:
    return {name: Cell(str(value)) for name, value in last_means(run).items() if is_loss(name)}


def _split(run: Run) -> int | None:
    """Blocks before [CLS] of the run's model; None where its options don't tell."""
    given = run.options.get("model.split", "")
    if given != "None" and not given.isdigit():
        return None
    split = None if given == "None" else int(given)
    return ModelConfig(split=split, pretrained=run.options.get("model.pretrained", "none")).blocks_before_cls


def _mean(rows: _Rows, column: str, chosen: Callable[[dict[str, str]], bool]) -> float | None:
    values = [value for row in rows if chosen(row) and (value := _number(row, column)) is not None]
    return fmean(values) if values else None


def _of_group(group: str) -> Callable[[dict[str, str]], bool]:
    return lambda row: row.get("group") == group


def _moved(row: dict[str, str]) -> bool:
    return row.get("group") != "identity"


def _number(row: dict[str, str], column: str) -> float | None:
    try:
        return float(row[column])
    except (KeyError, ValueError):
        return None


def _with_interval(row: dict[str, str], more: str = "") -> str:
    value, low, high = (_number(row, name) for name in ("top1", "top1_low", "top1_high"))
    interval = "" if low is None or high is None else f" [{low:.3f}, {high:.3f}]"
    return "" if value is None else f"{value:.3f}{interval}{more}"
