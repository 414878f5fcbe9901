"""The page of a study: its words, figures and errors in one HTML file."""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from ser_fast.evaluation.figures import save
from ser_fast.io import write_atomically
from ser_fast.report.engine import data_uri, render, write_page
from ser_fast.sensitivity import measures
from ser_fast.sensitivity.analysis import FACTORS, mean, resampled, source_of, varied
from ser_fast.sensitivity.figures import draw
from ser_fast.sensitivity.retraining import Score, draw_scores, judge
from ser_fast.sensitivity.table import TABLE, Row
from ser_fast.sensitivity.words import bounds, level_name, summarize

REPORT, SUMMARY = "report.html", "summary.txt"


def write_report(rows: Sequence[Row], scores: Sequence[Score], out: Path) -> list[Path]:
    """Write the figures as PNG files, report.html, which holds all of it, and summary.txt; returns their paths.

    Args:
        rows: of the study.
        scores: of the study of trained models; may be empty.
        out: the folder.

    Raises:
        ValueError: the rows hold no equivariance of any source but random features.
    """
    summary = summarize(rows)
    figures = draw(rows)
    if scores:
        caption = (
            "Trained with each setting of SERLoss and measured alike, less the default's run with the same seed: every "
            "seed, and their mean. Band: twice the spread of the default's runs over seeds."
        )
        figures = {"training": (caption, draw_scores(scores)), **figures}
    drawn = {name: save(figure, out / f"{name}.png", dpi=120) for name, (_, figure) in figures.items()}
    page = render(
        "sensitivity.html",
        title="Sensitivity to interpolation, padding and alignment",
        summary=summary,
        training=judge(scores) if scores else [],
        figures=[(figures[name][0], data_uri(path.read_bytes())) for name, path in drawn.items()],
        columns=["factor", "level", *_sources(rows)],
        table=_errors(rows),
        measures=measures.__doc__ or "",
        csv=TABLE,
    )
    write_atomically(out / SUMMARY, partial(Path.write_text, data="\n".join(summary) + "\n", encoding="utf-8"))
    return [*drawn.values(), write_page(out / REPORT, page), out / SUMMARY]


def _sources(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(map(source_of, resampled(rows, "relative_error"))))


def _errors(rows: Sequence[Row]) -> list[list[str]]:
    """A row of cells for each level of each factor: its names, and the relative error of each source."""
    table = []
    for factor in FACTORS:
        for level, level_rows in varied(resampled(rows, "relative_error"), factor).items():
            values = [mean(row for row in level_rows if source_of(row) == name) for name in _sources(rows)]
            cells = ("" if math.isnan(value[0]) else bounds(value) for value in values)
            table.append([factor, level_name(factor, level), *cells])
    return table
