"""Does the choice matter after training? One recipe, trained with different settings of SERLoss and several seeds."""

import csv
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import fmean, stdev

from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.table import Table
from scipy.stats import t as student_t

from ser_fast.data.sources import open_dataset
from ser_fast.demo import demo_runs
from ser_fast.evaluation.equivariance import equivariance_errors, random_control
from ser_fast.evaluation.features import spread_images
from ser_fast.io import write_atomically
from ser_fast.training.config import TrainConfig, with_options
from ser_fast.training.run_folder import RunFolder
from ser_fast.training.trainer import train
from ser_fast.vit import SplitViT, load_split_vit

TABLE, FIGURE = "training.csv", "training.png"
BASELINE = "bicubic"

# What SERLoss is given; the baseline is its default (bicubic, border, no antialias).
VARIANTS: dict[str, dict[str, str | bool]] = {
    BASELINE: {},
    **{
        name: {"interpolation": name} for name in ("nearest", "bilinear", "catmull_rom", "mitchell", "lanczos3", "area")
    },
    "antialias": {"antialias": True},
    **{name: {"padding": name} for name in ("zeros", "reflection")},
}

MEASURES = {
    "d4_error": "error on D4",
    "resampled_error": "error on scales",
    "retrieval": "retrieval",
    "last_layer_error": "error at the last layer",
}


@dataclass(frozen=True)
class Score:
    """One trained model under the protocol that all share (`equivariance_errors`, bicubic and border).

    Attributes:
        variant: a name in VARIANTS, or "random".
        seed: of the run.
        d4_error, resampled_error: the relative errors at the split, means over D4 (which no kernel touches: it only
            copies tokens) and over the scales.
        retrieval: at the split, mean over both.
        last_layer_error: mean over both.
    """

    variant: str
    seed: int
    d4_error: float
    resampled_error: float
    retrieval: float
    last_layer_error: float


def study_runs(
    out: Path, variants: Sequence[str], seeds: int, *, data: str, steps: int, image_size: int = 64, patch_size: int = 8
) -> dict[tuple[str, int], TrainConfig]:
    """The demo's run with SER (lambda = 1), for each variant and each seed 0 .. seeds - 1.

    Raises:
        ValueError: a variant that is unknown, given twice, or the baseline missing; fewer than two seeds.
    """
    if BASELINE not in variants or len(set(variants)) != len(variants) or not set(variants) <= VARIANTS.keys():
        raise ValueError(
            f"variants: got {list(variants)}, takes {BASELINE!r} and others of {list(VARIANTS)}, each once"
        )
    if seeds < 2:
        raise ValueError(f"seeds: got {seeds}, takes at least 2: without a spread no difference can be judged")
    runs = {}
    for seed in range(seeds):
        base = demo_runs(out, data=data, steps=steps, seed=seed, image_size=image_size, patch_size=patch_size)[
            "lambda = 1"
        ]
        for name in variants:
            options = {f"ser.{option}": value for option, value in VARIANTS[name].items()}
            runs[name, seed] = with_options(base, {**options, "out": out / f"{name}_seed{seed}"})
    return runs


def train_and_score(runs: dict[tuple[str, int], TrainConfig], *, images: int, device: str) -> list[Score]:
    """Train what is not finished yet, and score every model and the random initialisation on held-out images.

    Args:
        runs: of `study_runs`.
        images: held-out images, at most.
        device: "auto", "cpu" or "cuda".
    """
    first = next(iter(runs.values()))
    held_out = spread_images(open_dataset(first.data, train=False, image_size=first.model.image_size), images)
    models: dict[tuple[str, int], SplitViT] = {}
    for key, config in runs.items():
        models[key] = load_split_vit(RunFolder(train(replace(config, device=device))).encoder)
    model = next(iter(models.values()))
    controls = {("random", seed): random_control(model, seed=seed) for seed in {seed for _, seed in runs}}
    scores = []
    for (variant, seed), model in (controls | models).items():
        records = [record for record in equivariance_errors(model, held_out) if record.group != "identity"]
        split = [record for record in records if record.layer == max(1, model.split)]
        scores.append(
            Score(
                variant,
                seed,
                d4_error=fmean(r.relative_error for r in split if r.group == "D4"),
                resampled_error=fmean(r.relative_error for r in split if r.group == "resampled"),
                retrieval=fmean(r.retrieval for r in split),
                last_layer_error=fmean(r.relative_error for r in records if r.layer == model.depth),
            )
        )
    return scores


def write_scores(scores: Sequence[Score], out: Path) -> None:
    """out/training.csv with one line a model, and out/training.png."""

    def write(partial: Path) -> None:
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Score)])
            writer.writeheader()
            writer.writerows(asdict(score) for score in scores)

    write_atomically(out / TABLE, write)
    draw_scores(scores).savefig(out / FIGURE, dpi=120)


def read_scores(out: Path) -> list[Score]:
    """What `write_scores` wrote; none where there is no such file."""
    if not (out / TABLE).exists():
        return []
    with (out / TABLE).open(newline="") as file:
        return [
            Score(row["variant"], int(row["seed"]), *(float(row[measure]) for measure in MEASURES))
            for row in csv.DictReader(file)
        ]


def _values(scores: Sequence[Score], variant: str, measure: str) -> list[float]:
    return [getattr(score, measure) for score in sorted(scores, key=lambda s: s.seed) if score.variant == variant]


def _variants(scores: Sequence[Score]) -> list[str]:
    return list(dict.fromkeys(score.variant for score in scores))


def paired_difference(scores: Sequence[Score], variant: str, measure: str) -> tuple[float, float]:
    """The mean difference from the baseline at the same seed, and its standard error.

    A seed gives both runs the same initial weights, images and views, so that most of the spread cancels.
    """
    pairs = zip(_values(scores, variant, measure), _values(scores, BASELINE, measure), strict=True)
    differences = [a - b for a, b in pairs]
    return fmean(differences), stdev(differences) / math.sqrt(len(differences))


def chance(difference: float, error: float, pairs: int) -> float:
    """How probable a mean of `pairs` paired differences this far from 0 is without any effect (t test, two-sided)."""
    if error == 0:
        return float(difference == 0)
    return float(2 * student_t.sf(abs(difference) / error, pairs - 1))


def judge(scores: Sequence[Score]) -> list[str]:
    """A line a measure: which settings differ from the baseline by more than chance?

    At 5 % for the study as a whole: a probability is multiplied by the number of comparisons (Bonferroni).
    """
    settings = [variant for variant in _variants(scores) if variant not in ("random", BASELINE)]
    comparisons = len(settings) * len(MEASURES)
    lines = []
    for measure, title in MEASURES.items():
        baseline = _values(scores, BASELINE, measure)
        beside: list[str] = []
        apart: list[str] = []
        for variant in settings:
            difference, error = paired_difference(scores, variant, measure)
            p = min(1.0, comparisons * chance(difference, error, len(baseline)))
            told = f"{variant} {difference:+.4f} (standard error {error:.4f}, p {p:.2g})"
            (apart if p < 0.05 else beside).append(told)
        verdict = [f"no more than chance: {', '.join(beside)}"] if beside else []
        verdict += [f"more than chance: {', '.join(apart)}"] if apart else []
        says = "the choice matters after training" if apart else "the choice does not show after training"
        lines.append(
            f"{title}: {says}. {BASELINE} {fmean(baseline):.4f}, spread {stdev(baseline):.4f}, random weights "
            f"{fmean(_values(scores, 'random', measure)):.4f}; differences over {len(baseline)} seeds, p of "
            f"{comparisons} comparisons together: {'; '.join(verdict) or 'none, for nothing else was trained'}."
        )
    return lines


def table(scores: Sequence[Score]) -> Table:
    """Mean and standard deviation over seeds, a row a setting."""
    seeds = len({score.seed for score in scores})
    shown = Table(
        title=f"Trained with another setting, mean ± deviation over {seeds} seeds", box=SIMPLE_HEAD, padding=0
    )
    for heading in ("trained with", *MEASURES.values()):
        shown.add_column(heading, justify="right" if heading != "trained with" else "left")
    for variant in _variants(scores):
        values = [_values(scores, variant, measure) for measure in MEASURES]
        shown.add_row(variant, *(f"{fmean(of):.3f} ± {stdev(of):.3f}" for of in values))
    return shown


def draw_scores(scores: Sequence[Score]) -> Figure:
    """A panel a measure: what each setting differs by from the baseline at the same seed, as points, and their mean.

    The band is twice the baseline's spread over seeds, either way.
    """
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    variants = [variant for variant in _variants(scores) if variant not in ("random", BASELINE)]
    for axes, (measure, title) in zip(figure.subplots(1, len(MEASURES)), MEASURES.items(), strict=True):
        baseline, random = (_values(scores, variant, measure) for variant in (BASELINE, "random"))
        for i, variant in enumerate(variants):
            differences = [a - b for a, b in zip(_values(scores, variant, measure), baseline, strict=True)]
            axes.scatter([i] * len(differences), differences, s=14, color=f"C{i % 10}")
            axes.hlines(fmean(differences), i - 0.3, i + 0.3, color=f"C{i % 10}")
        axes.axhspan(-2 * stdev(baseline), 2 * stdev(baseline), color="grey", alpha=0.2, linewidth=0)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_xticks(range(len(variants)), variants, rotation=35, ha="right")
        axes.set_title(f"{title}\n{BASELINE} {fmean(baseline):.3f}, random weights {fmean(random):.3f}", fontsize=9)
        axes.grid(axis="y", alpha=0.3)
    figure.axes[0].set_ylabel(f"difference from {BASELINE}")
    return figure
