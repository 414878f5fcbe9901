"""The demo: does the regularizer do what it says, on real photographs, in minutes on two cores?"""

from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from statistics import fmean

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ser_fast.data.loader import make_loader
from ser_fast.data.sources import ImageDataset, open_dataset
from ser_fast.evaluation.equivariance import plot
from ser_fast.evaluation.features import embed, spread_images
from ser_fast.evaluation.knn import knn_accuracy
from ser_fast.evaluation.protocol import check_positive, open_encoder, random_control
from ser_fast.evaluation.tables import write_table
from ser_fast.evaluation.token_errors import LayerRecord, equivariance_errors
from ser_fast.training.recipes import demo_recipes
from ser_fast.training.run_folder import RunFolder
from ser_fast.training.trainer import train
from ser_fast.vit import SplitViT

# What tables and figures call the recipes.
_NAMES = {"off": "lambda = 0", "ser": "lambda = 1", "ser_crops": "lambda = 1, crops"}


@dataclass(frozen=True)
class DemoResult:
    """Three runs and a random initialization, on held-out images.

    Attributes:
        records: of each layer and element, by model.
        losses: the means over the last tenth of a run, by run.
        accuracy: kNN top-1, by model.
        split: blocks before the prefix tokens enter, where SER acts.
    """

    records: dict[str, list[LayerRecord]]
    losses: dict[str, dict[str, float]]
    accuracy: dict[str, float]
    split: int

    def write(self, folder: Path) -> list[Path]:
        """Write demo.csv and demo.png; returns their paths."""
        return [
            write_table(self.records, folder / "demo.csv"),
            plot(self.records, folder / "demo.png", split=self.split, metric="retrieval"),
        ]

    def print(self, console: Console | None = None) -> None:
        """Print losses, token retrieval per layer, the error at the split and kNN accuracy, a row a model."""
        console = console or Console()
        console.print(self._table())
        guess = self.records["random"][0].chance
        console.print(
            f"Layers: how often a token is found in its new place after a rotation or flip (a guess: {guess:.3f}). "
            f"Error: at layer {self.split}, where SER acts; nearly alike tokens have a small one, too, so read "
            "retrieval first.",
            highlight=False,
        )

    def _table(self) -> Table:
        layers = sorted({record.layer for record in self.records["random"]})
        table = Table(
            title=f"Token retrieval at layers {layers[0]} to {layers[-1]} (SER acts on {self.split}), held-out images",
            box=SIMPLE_HEAD,
            padding=0,
        )
        for heading in ("", "inv. loss", "SER loss", *map(str, layers), "error", "kNN"):
            table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
        for name, records in self.records.items():
            found = [fmean(r.retrieval for r in records if r.layer == layer and r.group == "D4") for layer in layers]
            error = fmean(r.relative_error for r in records if r.layer == self.split and r.group != "identity")
            losses = self.losses.get(name)
            parts = [f"{losses[part]:.2f}" if losses else "" for part in ("invariance", "ser")]
            shares = (f"{share:.2f}" for share in found)
            table.add_row(name, *parts, *shares, f"{error:.2f}", f"{self.accuracy[name]:.3f}")
        return table


def run_demo(
    out: Path,
    *,
    data: str = "photos",
    steps: int = 60,
    images: int = 64,
    image_size: int = 64,
    patch_size: int = 8,
    seed: int = 0,
    device: str = "auto",
) -> DemoResult:
    """Pretrain a small ViT three times (lambda 0, lambda 1, lambda 1 on crops) and compare, on held-out images.

    Args:
        out: folder of the runs. Runs that are finished there are not repeated.
        data: as `open_dataset` takes it.
        steps: optimizer steps of each run.
        images: held-out images that the equivariance error is measured on.
        image_size: side of the images, in pixels.
        patch_size: side of a token, in pixels.
        seed: of all three runs.
        device: "auto", "cpu" or "cuda".

    Raises:
        ValueError: data that can't be opened, or options that a training can't take.
    """
    check_positive(images=images)
    recipes = demo_recipes(out, data=data, steps=steps, seed=seed, image_size=image_size, patch_size=patch_size)
    test_set, train_set = (open_dataset(data, train=part, image_size=image_size) for part in (False, True))
    test_images = spread_images(test_set, images)

    models: dict[str, SplitViT] = {}
    losses: dict[str, dict[str, float]] = {}
    for key, recipe in recipes.items():
        folder = train(replace(recipe, device=device))
        models[_NAMES[key]] = open_encoder(folder, device="cpu").model
        log = RunFolder(folder).read_log()
        last = log[-max(1, len(log) // 10) :]
        losses[_NAMES[key]] = {part: fmean(step[part] for step in last) for part in ("invariance", "ser")}
    models = {"random": random_control(next(iter(models.values())), seed=seed), **models}
    return DemoResult(
        records={name: equivariance_errors(model, test_images) for name, model in models.items()},
        losses=losses,
        accuracy={name: _knn(model, train_set, test_set, seed=seed) for name, model in models.items()},
        split=models["random"].split,
    )


def _knn(model: SplitViT, train_set: ImageDataset, test_set: ImageDataset, *, seed: int) -> float:
    """Top-1 accuracy on all held-out images, by about a thousand training images."""
    batch = min(64, len(train_set))
    neighbors = islice(make_loader(train_set, batch_size=batch, train=True, seed=seed), 16)
    queries = make_loader(test_set, batch_size=batch, train=False)
    return knn_accuracy(*embed(model, neighbors, "cpu"), *embed(model, queries, "cpu"), k=20)[20]
