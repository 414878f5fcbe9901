"""AdamW with what the objectives' recipes ask of it: parameter groups, schedules and clipping."""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ser_fast.training.config import OptimConfig

if TYPE_CHECKING:
    from ser_fast.training.pretraining import Pretraining


def build_optimizer(options: OptimConfig, model: nn.Module, *, fused: bool = False) -> torch.optim.AdamW:
    """AdamW on all parameters that train; a second group, where the options ask for it, has no weight decay.

    Args:
        options: of the run.
        model: whose parameters are trained.
        fused: take a step in a few kernels, which can be told on the device to take none; other roundings.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": trained, "weight_decay": options.weight_decay}]
    if not options.decay_1d:
        groups[0]["params"] = [p for p in trained if p.ndim > 1]
        groups.append({"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0})
    return torch.optim.AdamW(groups, lr=options.lr * options.batch_size / 256, fused=fused)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a state dict, also one of another device: how a step is computed is no part of what goes on."""
    fused = optimizer.defaults["fused"]
    optimizer.load_state_dict({**state, "param_groups": [group | {"fused": fused} for group in state["param_groups"]]})


def set_schedules(optimizer: torch.optim.Optimizer, options: OptimConfig, step: int, steps: int) -> None:
    """Set the learning rate and the weight decay for a step of 0 .. steps - 1."""
    scale = options.batch_size / 256
    warmup = round(options.warmup * steps)
    # A count from 1 to `steps` on a path that ends a step later: no step is wasted on the two ends.
    lr = warmup_cosine(step + 1, steps + 1, options.lr * scale, options.lr_end * scale, warmup)
    for group in optimizer.param_groups:
        group["lr"] = lr
    if options.weight_decay_end is not None:  # the second group has none
        optimizer.param_groups[0]["weight_decay"] = warmup_cosine(
            step, steps, options.weight_decay, options.weight_decay_end
        )


def warmup_cosine(step: int, steps: int, peak: float, end: float, warmup: int = 0) -> float:
    """From 0 linearly to `peak` at step `warmup`, then along a cosine to `end` at step `steps`."""
    if step < warmup:
        return step * (peak / warmup)
    return end + 0.5 * (peak - end) * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float, clip: Literal["global", "parameter"]) -> Tensor:
    """Scale gradients down to a norm, either all of them by one factor or each by its own.

    Args:
        parameters: whose gradients are changed in place.
        limit: the largest norm that stays.
        clip: whose norm it is.

    Returns:
        The norm of all gradients before, a scalar that stays on their device.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return torch.zeros(())
    norms = torch.stack(torch._foreach_norm(gradients))
    norm = norms.norm()
    factor = (limit / ((norm if clip == "global" else norms) + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(gradients, factor if clip == "global" else list(factor.unbind()))
    return norm


def clip_groups(options: OptimConfig, model: "Pretraining") -> list[Tensor]:
    """Clip the gradients of the model and of each add-on apart, so that no add-on's heads can change how far the
    model moves; the norms before, as `clip_gradients`.
    """
    own = [*model.encoder.parameters(), *model.objective.parameters()]
    groups = [own, *(list(addon.parameters()) for addon in model.addons.values())]
    return [clip_gradients(group, options.clip_grad or float("inf"), options.clip) for group in groups]
