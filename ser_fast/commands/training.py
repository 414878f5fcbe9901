"""Commands that train, or plan to."""

import sys
from pathlib import Path

from rich.console import Console

from ser_fast.commands import say


def train() -> None:
    """Pretrain a vision transformer with an invariance objective and equivariance terms (also under torchrun)."""
    from ser_fast.training.options import parse

    config = parse(sys.argv[2:])
    from ser_fast.training.trainer import train as run_training

    run_training(config)


def sweep() -> None:
    """Train with several values of some options and several seeds, and say which differences are more than chance."""
    from ser_fast.sweep.command import parse

    arguments, options = parse(sys.argv[2:])
    from ser_fast.sweep.evaluation import run_sweep

    console = Console()
    result = run_sweep(arguments=arguments, console=console, **options)
    result.print(console)
    console.print(f"written: {options['out'] / 'sweep.csv'}, {options['out'] / 'report.html'}", markup=False)


def plan() -> None:
    """What a training would take, on a device that need not be here: memory, work, negatives, speed at most, hours.

    It takes the options of `ser-fast train`, and --plan.* for the device and for what to vary.
    """
    from ser_fast.training.options import parse_with
    from ser_fast.training.plan import PlanConfig, show
    from ser_fast.training.plan import plan as make_plan

    config, sections = parse_with(sys.argv[2:], "ser-fast plan", plan, {"plan": PlanConfig})
    show(make_plan(config, sections["plan"], progress=True), config, sections["plan"])


def demo(
    out: Path = Path("runs/demo"),
    data: str = "photos",
    steps: int = 60,
    images: int = 64,
    image_size: int = 64,
    patch_size: int = 8,
    seed: int = 0,
    device: str = "auto",
) -> None:
    """Pretrain a small ViT three times (lambda 0, lambda 1, lambda 1 on crops) and compare, on held-out images.

    Args:
        out: folder of the runs, of demo.csv and of demo.png. Runs that are finished there are not repeated.
        data: "photos", "folder:PATH" or another source, as `ser-fast train` takes it.
        steps: optimizer steps of each run.
        images: held-out images that the equivariance error is measured on.
        image_size: side of the images, in pixels.
        patch_size: side of a token, in pixels.
        seed: of all three runs.
        device: "auto", "cpu" or "cuda".
    """
    from ser_fast.demo import run_demo

    sizes = {"image_size": image_size, "patch_size": patch_size}
    result = run_demo(out, data=data, steps=steps, images=images, seed=seed, device=device, **sizes)
    result.print()
    table, figure = result.write(out)
    say(f"{figure} and {table} hold every layer and every element.")
