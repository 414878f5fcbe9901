"""What one training step costs, by objective and add-on: floating-point operations of a ViT-S/16 at 224 pixels, counted
by torch without computing anything, and the time of a small model's step on the CPU.

    python benchmarks/method_costs.py --name NAME      # writes benchmarks/results/NAME.md
"""

import argparse
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.progress import track
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from ser_fast.addons import ADDONS
from ser_fast.objectives import OBJECTIVES
from ser_fast.training.config import TrainConfig, default_config, with_options
from ser_fast.training.environment import describe_environment
from ser_fast.training.pretraining import Pretraining
from ser_fast.views.recipe import View, Views

RESULTS = Path(__file__).parent / "results"
SHARES = 0.01, 0.1, 0.5


# A product of (T, D) and (D, M) rows counts 2 T M D. nt_xent takes 2T rows against themselves: half of the square
# forward, two products with the whole one backward; info_nce the whole one, and two.
@register_flop_formula(torch.ops.ser_fast.nt_xent)
def _nt_xent(z0: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    rows, dim = 2 * z0[0], z0[1]
    return rows * rows * dim


@register_flop_formula(torch.ops.ser_fast.nt_xent_backward)
def _nt_xent_backward(z0: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    rows, dim = 2 * z0[0], z0[1]
    return 3 * rows * rows * dim


@register_flop_formula(torch.ops.ser_fast.info_nce)
def _info_nce(query: Any, key: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * query[0] * key[0] * query[1]


@register_flop_formula(torch.ops.ser_fast.info_nce_detached)
def _info_nce_detached(query: Any, key: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 4 * query[0] * key[0] * query[1]


@register_flop_formula(torch.ops.ser_fast.info_nce_backward)
def _info_nce_backward(query: Any, key: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 6 * query[0] * key[0] * query[1]


def views_of(config: TrainConfig, model: Pretraining) -> Views:
    size, batch = config.model.image_size, config.optim.batch_size
    config = with_options(config, {"views.color_strength": 0.0})
    images = torch.zeros(batch, 3, size, size, dtype=torch.uint8)
    make = config.views.build(model.encoder.patch_size[0], config.seed, model.needs)
    return make(images, torch.arange(batch), epoch=0)


def flops(config: TrainConfig) -> int:
    """Of one step's forward and backward pass, the teacher's among them; nothing is computed but the maps."""
    model = config.build().train()
    views = views_of(config, model)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = torch.nn.Parameter(mode.from_tensor(parameter.detach()), parameter.requires_grad)
                module._parameters[name] = fake
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else mode.from_tensor(buffer)
    with mode, FlopCounterMode(display=False) as counter:
        empty = [
            View([torch.empty(images.shape) for images in view.images], view.g, view.color, view.role)
            for view in views.views
        ]
        model(Views(empty, views.equivariant), 0.0)["loss"].backward()
    return counter.get_total_flops()


def seconds(configs: dict[str, TrainConfig], rounds: int) -> dict[str, float]:
    """The median time of a step of each, all of them in turns."""
    steps: dict[str, Any] = {}
    for name, config in configs.items():
        model = config.build().train()
        views = views_of(config, model)

        def step(model: Pretraining = model, views: Views = views) -> Tensor:
            loss = model(views, 0.0)["loss"]
            loss.backward()
            return loss

        steps[name] = step
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in track(range(rounds + 1), "a step of each, in turns", transient=True):
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            if number:  # the first one warms up
                times[name].append(time.perf_counter() - begin)
    return {name: median(values) for name, values in times.items()}


def variants(base: TrainConfig, last: int) -> dict[str, TrainConfig]:
    """Without an add-on, and with each at a quarter of the depth and at the last layer."""
    plain = with_options(base, {"ser.layers": "off"})
    found = {"none": plain}
    for name in ADDONS:
        for layer in (last // 4, last):
            found[f"{name} {layer}"] = with_options(plain, {f"{name}.layers": (layer,)})
    return found


def table(heading: str, rows: dict[str, dict[str, float]], unit: float, form: str) -> list[str]:
    """A row for each objective: its cost without add-ons, and the ratio with each."""
    names = list(next(iter(rows.values())))
    lines = [f"| {heading} | {' | '.join(names)} |", f"|---|{'--:|' * len(names)}"]
    for objective, costs in rows.items():
        cells = [form.format(costs["none"] / unit), *(f"× {costs[name] / costs['none']:.3f}" for name in names[1:])]
        lines.append(f"| {objective} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--name", default="method-costs")
    parser.add_argument("--batch", type=int, default=64, help="images a step of the ViT-S/16")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each; 0 counts operations alone")
    options = parser.parse_args()

    counted: dict[str, dict[str, float]] = {}
    for objective in track(OBJECTIVES, "counting", transient=True):
        base = with_options(default_config(objective), {"optim.batch_size": options.batch, "views.share": 0.5})
        counted[objective] = {name: flops(config) for name, config in variants(base, 12).items()}
    lines = [
        "# What one step costs, by objective and add-on",
        "",
        f"`python benchmarks/method_costs.py --name {options.name}`. Floating-point operations of forward and backward",
        f"pass of ViT-S/16 at 224 pixels, batch {options.batch}, [CLS] after 3 blocks, half of the batch for the",
        "add-on: 10^12 without an add-on, and the ratio to it with one.",
        "",
        *table("objective", counted, 1e12, "{:.2f}"),
        "",
        "A step with SER at layer 3 beside MoCo-v3, batch 256, by the share of the batch that SER sees; the paper says",
        "× 1.008 and does not say for which share:",
        "",
        f"| {' | '.join(f'{share:.0%}' for share in SHARES)} |",
        f"|{'--:|' * len(SHARES)}",
    ]
    ratios = []
    for share in SHARES:
        base = with_options(default_config("moco_v3"), {"optim.batch_size": 256, "views.share": share})
        ratios.append(flops(base) / flops(with_options(base, {"ser.layers": "off"})))
    lines += [f"| {' | '.join(f'× {ratio:.4f}' for ratio in ratios)} |"]

    if options.rounds:
        timed = {}
        for objective in OBJECTIVES:
            base = with_options(
                default_config(objective),
                {
                    "model.name": "vit_tiny_patch16_224", "model.image_size": 64, "model.patch_size": 8,
                    "model.embed_dim": 192, "model.depth": 8, "model.num_heads": 3, "model.split": 2,
                    "optim.batch_size": 32, "views.share": 0.5,
                },
            )  # fmt: skip
            timed[objective] = seconds(variants(base, 8), options.rounds)
        machine = describe_environment(torch.device("cpu"))
        lines += [
            "",
            f"Milliseconds of a step of a small ViT (192 wide, 8 blocks, 64 tokens, batch 32) on {machine['device']}",
            f"with {machine['threads']} threads, torch {machine['packages']['torch']}: the median of {options.rounds},",
            "all in turns, and the ratio to it with an add-on.",
            "",
            *table("objective", timed, 1e-3, "{:.0f}"),
        ]
    path = RESULTS / f"{options.name}.md"
    path.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    print(f"written: {path}")


if __name__ == "__main__":
    main()
