"""Does the choice matter after training? One recipe, trained with different settings of SERLoss and several seeds."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import fmean, stdev

from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from scipy.stats import t as student_t

from ser_fast.csv_files import read_csv, write_csv
from ser_fast.data.sources import open_dataset
from ser_fast.evaluation.features import spread_images
from ser_fast.evaluation.figures import save
from ser_fast.evaluation.protocol import check_positive, open_encoder, random_control
from ser_fast.evaluation.token_errors import equivariance_errors
from ser_fast.sensitivity import BASELINE, VARIANTS
from ser_fast.training.config import TrainConfig, with_options
from ser_fast.training.recipes import demo_recipes
from ser_fast.training.trainer import train
from ser_fast.vit import SplitViT

TABLE, FIGURE = "training.csv", "training.png"
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
    """The demo's recipe with SER (lambda = 1), for each variant and each seed 0 .. seeds - 1.

    Args:
        out: folder of the runs' folders.
        variants: names in VARIANTS, the baseline among them.
        seeds: how many runs of each.
        data: what they are trained on, as `open_dataset` takes it.
        steps: optimizer steps of a run.
        image_size: side of the images, in pixels.
        patch_size: side of a token, in pixels.

    Returns:
        The options of each run, by variant and seed.

    Raises:
        ValueError: a variant that is unknown, given twice, or the baseline missing; fewer than two seeds.
    """
    if BASELINE not in variants or len(set(variants)) != len(variants) or not set(variants) <= VARIANTS.keys():
        raise ValueError(
            f"variants: got {list(variants)}, takes {BASELINE!r} and others of {list(VARIANTS)}, each once"
        )
    if seeds < 2:
        raise ValueError(f"seeds: got {seeds}, takes 2 or more: without a spread no difference can be judged")
    runs = {}
    for seed in range(seeds):
        base = demo_recipes(out, data=data, steps=steps, seed=seed, image_size=image_size, patch_size=patch_size)["ser"]
        for name in variants:
            options = {f"ser.{option}": value for option, value in VARIANTS[name].items()}
            runs[name, seed] = with_options(base, {**options, "out": out / f"{name}_seed{seed}"})
    return runs


def train_and_score(runs: dict[tuple[str, int], TrainConfig], *, images: int, device: str) -> list[Score]:
    """Train what is not finished yet, and score every model and the random initialization on held-out images.

    Args:
        runs: of `study_runs`.
        images: held-out images, at most.
        device: "auto", "cpu" or "cuda".
    """
    first = next(iter(runs.values()))
    held_out = spread_images(open_dataset(first.data, train=False, image_size=first.model.image_size), images)
    models: dict[tuple[str, int], SplitViT] = {}
    for key, config in runs.items():
        models[key] = open_encoder(train(replace(config, device=device)), device="cpu").model
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


def read_scores(out: Path) -> list[Score]:
    """The scores that `RetrainingResult.write` wrote to a folder; none where there is no such file."""
    if not (out / TABLE).exists():
        return []
    return [
        Score(row["variant"], int(row["seed"]), *(float(row[measure]) for measure in MEASURES))
        for row in read_csv(out / TABLE)
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
    """How probable a mean this far from 0 is without any effect: a two-sided t test.

    Args:
        difference: the mean.
        error: its standard error.
        pairs: how many paired differences it is the mean of.
    """
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
            described = f"{variant} {difference:+.4f} (standard error {error:.4f}, p {p:.2g})"
            (apart if p < 0.05 else beside).append(described)
        verdict = [f"no more than chance: {', '.join(beside)}"] if beside else []
        verdict += [f"more than chance: {', '.join(apart)}"] if apart else []
        says = "the choice matters after training" if apart else "the choice does not show after training"
        lines.append(
            f"{title}: {says}. {BASELINE} {fmean(baseline):.4f}, spread {stdev(baseline):.4f}, random weights "
            f"{fmean(_values(scores, 'random', measure)):.4f}; differences over {len(baseline)} seeds, p of "
            f"{comparisons} comparisons together: {'; '.join(verdict) or 'none, for nothing else was trained'}."
        )
    return lines


def draw_scores(scores: Sequence[Score]) -> Figure:
    """A panel a measure: what each setting differs by from the baseline at the same seed, as points, and their mean.

    The band is twice the baseline's spread over seeds, either way.
    """
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    variants = [variant for variant in _variants(scores) if variant not in ("random", BASELINE)]
    for axes, (measure, title) in zip(figure.subplots(1, len(MEASURES)), MEASURES.items(), strict=True):
        baseline, control = (_values(scores, variant, measure) for variant in (BASELINE, "random"))
        for i, variant in enumerate(variants):
            differences = [a - b for a, b in zip(_values(scores, variant, measure), baseline, strict=True)]
            axes.scatter([i] * len(differences), differences, s=14, color=f"C{i % 10}")
            axes.hlines(fmean(differences), i - 0.3, i + 0.3, color=f"C{i % 10}")
        axes.axhspan(-2 * stdev(baseline), 2 * stdev(baseline), color="grey", alpha=0.2, linewidth=0)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_xticks(range(len(variants)), variants, rotation=35, ha="right")
        axes.set_title(f"{title}\n{BASELINE} {fmean(baseline):.3f}, random weights {fmean(control):.3f}", fontsize=9)
        axes.grid(axis="y", alpha=0.3)
    figure.axes[0].set_ylabel(f"difference from {BASELINE}")
    return figure


# ---------------------------------------------------------------- the protocol


@dataclass(frozen=True)
class RetrainingResult:
    """The scores of models that were trained with each setting."""

    scores: list[Score]

    def write(self, folder: Path) -> list[Path]:
        """Write training.csv with one line a model, and training.png; returns their paths."""
        return [
            write_csv([field.name for field in fields(Score)], map(asdict, self.scores), folder / TABLE),
            save(draw_scores(self.scores), folder / FIGURE, dpi=120),
        ]

    def print(self, console: Console | None = None) -> None:
        """Print mean and standard deviation over seeds, a row a setting, and what is judged of each measure."""
        console = console or Console()
        seeds = len({score.seed for score in self.scores})
        table = Table(
            title=f"Trained with another setting, mean ± deviation over {seeds} seeds", box=SIMPLE_HEAD, padding=0
        )
        for heading in ("trained with", *MEASURES.values()):
            table.add_column(heading, justify="right" if heading != "trained with" else "left")
        for variant in _variants(self.scores):
            values = [_values(self.scores, variant, measure) for measure in MEASURES]
            table.add_row(variant, *(f"{fmean(by_seed):.3f} ± {stdev(by_seed):.3f}" for by_seed in values))
        console.print(table)
        for line in judge(self.scores):
            console.print(line, highlight=False)


def evaluate(
    out: Path,
    data: str = "photos",
    *,
    variants: Sequence[str] = tuple(VARIANTS),
    seeds: int = 3,
    steps: int = 60,
    images: int = 64,
    device: str = "auto",
) -> RetrainingResult:
    """Train the demo's recipe with each setting of SERLoss and several seeds, and score the models alike.

    Args:
        out: folder of the runs' folders; what is finished there is not trained again.
        data: what they are trained on, and whose held-out images score them, as `open_dataset` takes it.
        variants: names in VARIANTS, the baseline among them.
        seeds: how many runs of each.
        steps: optimizer steps of a run.
        images: held-out images, at most.
        device: "auto", "cpu" or "cuda".

    Raises:
        ValueError: variants or seeds that can't be judged, or data that can't be opened; before a step is taken.

    Example:
        >>> result = evaluate(Path("results/runs"), variants=("bicubic", "nearest"))
        >>> result.write(Path("results"))
    """
    check_positive(steps=steps, images=images)
    runs = study_runs(out, variants, seeds, data=data, steps=steps)
    return RetrainingResult(train_and_score(runs, images=images, device=device))
