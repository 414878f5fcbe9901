"""What a training says of itself: a summary before its first step, its pace after some, and progress in a log file."""

import time
from datetime import datetime, timedelta

import torch
from rich.console import Console

from ser_fast.io import printable
from ser_fast.training.config import TrainConfig, objective_name
from ser_fast.training.environment import peak_memory
from ser_fast.training.pretraining import Pretraining

SMALL = (
    "ser-fast train --out runs/small --model.name vit_tiny_patch16_224 --model.image-size 64 --model.patch-size 8 "
    "--model.embed-dim 192 --model.depth 6 --model.num-heads 3 --model.split 2 --views.share 0.5 --views.frame whole "
    "--moco.mlp-dim 512 --ser.hidden-dim 256 --ser.out-dim 128 --ser.max-tokens 1024 --optim.batch-size 32 "
    "--optim.lr 12e-3 --optim.steps 60 --workers 0"
)
"""A training of minutes on two cores: one of the demo's three."""
_HOUR, _DAY = 3600, 24 * 3600
_CORE_SPEED = 2e10  # operations a second of a CPU's core in a training; for a warning about days, not for a promise
_LINES_APART = 30  # seconds
_TIMED = 4  # steps whose speed is told; the first one, which also allocates, is not counted


def summarize(config: TrainConfig, model: Pretraining, *, pictures: int, canvas: int, steps: int, device: str) -> str:
    """The lines that are printed before step 1.

    Args:
        config: of the run.
        model: encoder, objective and add-ons.
        pictures: in the data set.
        canvas: the side of the squares that they are read as, in pixels.
        steps: in all.
        device: its name, as torch has it.
    """
    optim, side = config.optim, config.model.image_size
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    encoder = sum(p.numel() for p in model.encoder.parameters())
    terms = " + ".join([objective_name(config), *model.addons])
    rate, share = optim.lr * optim.batch_size / 256, round(config.views.share * optim.batch_size)
    lines = [
        f"model: {config.model.name} at {side} pixels, {encoder / 1e6:.1f} million parameters, with heads "
        f"{trained / 1e6:.1f} million trained; {terms}",
        f"data: {pictures} pictures of {printable(config.data)}, canvas {canvas} pixels",
        f"steps: {steps} of {optim.batch_size} pictures, {share} of them for equivariance "
        f"({steps * optim.batch_size / pictures:.3g} epochs)",
        f"learning rate: {rate:.3g} at its peak, optim.lr {optim.lr:g} x batch size {optim.batch_size} / 256",
        f"device: {device}" + (f", {torch.get_num_threads()} threads" if device == "cpu" else ""),
    ]
    # A forward and a backward pass of two views, and a teacher's forward pass, of every token through every weight.
    tokens = (side / model.encoder.patch_size[0]) ** 2
    seconds = 16 * encoder * tokens * steps * optim.batch_size / (_CORE_SPEED * torch.get_num_threads())
    if device == "cpu" and seconds > _HOUR:
        told = f"{seconds / _DAY:.2g} days" if seconds > _DAY else f"{seconds / _HOUR:.2g} hours"
        lines.append(f"note: on this CPU that takes in the order of {told}; in minutes: {SMALL}, or: ser-fast demo")
    return "\n".join(lines)


class Pace:
    """Tells the speed, the expected end and the memory after some steps; and where nobody watches a bar, the progress.

    Args:
        console: to print to.
        steps: in all.
        start: steps done before.
        batch_size: pictures a step.
        device: whose memory is told.
    """

    def __init__(self, console: Console, *, steps: int, start: int, batch_size: int, device: torch.device) -> None:
        self.console, self.steps, self.start = console, steps, start
        self.batch_size, self.device = batch_size, device
        self.first = self.last = time.perf_counter()

    def after(self, step: int, text: str, now: float | None = None) -> None:
        """Print what is due after a step.

        Args:
            step: how many are done.
            text: what the bar says of it.
            now: when it was done, by time.perf_counter(); default now.
        """
        now, done = time.perf_counter() if now is None else now, step - self.start
        if done == 1:
            self.first = now
        elif done >= 2:
            left = timedelta(seconds=round((self.steps - step) * (now - self.first) / (done - 1)))
            speed = self.batch_size * (done - 1) / (now - self.first)
            if done == _TIMED:
                end = datetime.now() + left
                self._print(
                    f"{speed:.3g} pictures a second: {left} to go, until {end:%Y-%m-%d %H:%M}; "
                    f"memory {peak_memory(self.device) / 1024:.2f} GiB at its peak"
                )
            if not self.console.is_terminal and (now - self.last > _LINES_APART or step == self.steps):
                self._print(f"step {step} of {self.steps}  {text}  {speed:.3g} pictures a second, {left} to go")
                self.last = now

    def _print(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)
