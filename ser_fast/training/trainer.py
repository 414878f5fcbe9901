"""The training loop: one process, or several under torchrun.

The host queues a step and goes on to the next one. What a step computed, it looks at one step late, in one place
(`StepRecord.read`); what must not happen to a step that is not finite, the device sees to (`training/skipping.py`).
"""

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ser_fast.data.loader import Batch, make_loader
from ser_fast.data.prefetch import prefetch
from ser_fast.data.sources import open_canvases
from ser_fast.device import send
from ser_fast.distributed import gather_counts, rank, world_size
from ser_fast.io import printable
from ser_fast.progress import progress_bar
from ser_fast.training.accumulation import backward_in_parts
from ser_fast.training.boards import open_boards, require_boards
from ser_fast.training.config import TrainConfig, to_json
from ser_fast.training.environment import describe_environment, peak_memory
from ser_fast.training.optim import build_optimizer, clip_groups, load_optimizer, set_schedules
from ser_fast.training.processes import of_all_ranks, on_rank_0, process_group, report_activity, stop_signals
from ser_fast.training.records import LateReports, StepRecord
from ser_fast.training.resume import Identity, find_beginning, require_agreement, restore
from ser_fast.training.run_folder import RunFolder, RunLog
from ser_fast.training.skipping import SavedBuffers, not_finite, step_unless
from ser_fast.training.summary import Pace, summarize
from ser_fast.training.validation import check_options

MOST_OVERFLOWS = 20  # steps in a row that float16 may overflow in, each at half the scale of the one before


class NonFiniteLossError(RuntimeError):
    """The loss or its gradient is not finite; the message names the step, the images and the last good checkpoint."""


def train(config: TrainConfig) -> Path:
    """Run a training to its end, or on from a checkpoint; returns the run's folder.

    Writes to config.out the files that `RunFolder` names, and to the boards of config.log. Under torchrun every rank
    calls it. An interrupt (SIGINT, SIGTERM) ends it after the step, with a checkpoint.

    Raises:
        ValueError: an option that doesn't fit, a folder that already holds a run, or a checkpoint of another config.
        ModuleNotFoundError: a board's package is not installed.
        NonFiniteLossError: the loss or its gradient is not finite; that step was not taken. Under --amp fp16, where
            that lowers the scale of the loss, it takes 20 such steps in a row.
    """
    check_options(config, int(os.environ.get("WORLD_SIZE", "1")))  # before the ranks meet
    require_boards(config.log)
    with process_group(config.device, config.rank_timeout) as device:
        return Trainer(config, device).train()


class Trainer:
    """A training, from its first step or from a checkpoint.

    Args:
        config: of the run.
        device: of this process.

    Attributes:
        model: encoder, objective and add-ons.
        steps: in all.
        start: steps that were done before.

    Raises:
        ValueError: an option that doesn't fit, a folder that already holds a run, or a checkpoint of another config.

    Example:
        >>> trainer = Trainer(config, torch.device("cuda"))
        >>> for step, (epoch, batch) in enumerate(trainer.batches()):
        ...     print(trainer.step(step, epoch, batch.images, batch.indices, batch.aspects)["loss"])
    """

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self.config, self.device, self.folder = config, device, RunFolder(config.out)
        self.log: RunLog | None = None  # of rank 0, while it trains
        self.console = Console(quiet=rank() != 0)
        optim = config.optim
        self.part = check_options(config, world_size())  # images that are contrasted on this rank
        self.loader = make_loader(
            open_canvases(
                config.data,
                train=True,
                image_size=config.model.image_size,
                canvas=config.canvas,
                max_pixels=config.max_pixels,
            ),
            batch_size=optim.batch_size,
            train=True,
            seed=config.seed,
            rank=rank(),
            world_size=world_size(),
            workers=config.workers,
            timeout=config.loader_timeout,
        )
        self.steps = optim.steps if optim.steps is not None else optim.epochs * self.loader.sampler.batches
        if self.steps < 1:
            raise ValueError(f"optim.steps, optim.epochs: give at least one step, got {self.steps}")
        self.identity = Identity(to_json(config), self.loader.dataset.images.digest(), world_size())
        require_agreement(self.identity)
        self.beginning = find_beginning(config, self.identity)
        torch.manual_seed(config.seed)  # the same initial weights on every rank
        self.model = config.build().to(device)
        self.make_views = config.views.build(
            self.model.encoder.patch_size[0], config.seed, self.model.needs, image_size=config.model.image_size
        )
        if config.compile:
            self.model.compile_blocks_and_heads()
        self.parallel: nn.Module = self.model
        if world_size() > 1:
            self.parallel = DistributedDataParallel(self.model)
        self.optimizer = build_optimizer(optim, self.model, fused=device.type == "cuda")
        amp = config.amp if config.amp != "auto" else "bf16" if device.type == "cuda" else "off"
        self.amp = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
        self.overflows = torch.zeros(2, device=device)  # of float16: in all, and in a row up to the last step
        restore(self.beginning, self.model, self._load_optimizer)
        self.start, self.last_checkpoint = self.beginning.step, self.beginning.path
        self.beginning = self.beginning._replace(state=None)
        if self.start > self.steps:
            raise ValueError(f"resume: {self.last_checkpoint} is of step {self.start}, and the run has {self.steps}")

    def _load_optimizer(self, state: dict[str, Any]) -> None:
        """Give the optimizer, and the scale of float16's loss, their part of a checkpoint."""
        load_optimizer(self.optimizer, state["optimizer"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
            self.overflows.copy_(torch.tensor(state["overflows"]))

    def save(self, step: int) -> None:
        """Write the encoder and a checkpoint after a step."""
        state = {
            "step": step,
            **self.identity._asdict(),
            "log_begins": self.beginning.log_begins,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        if self.scaler.is_enabled():
            state |= {"scaler": self.scaler.state_dict(), "overflows": self.overflows.tolist()}
        self.folder.save_encoder(self.model.product, step)  # first: a run that has its last checkpoint has all
        self.last_checkpoint = self.folder.save_checkpoint(state, keep=self.config.keep_checkpoints)

    def train(self) -> Path:
        """Run to the end; see `train`."""
        with ExitStack() as stack:
            on_rank_0(lambda: self._occupy(stack))
            return self._train()

    def _occupy(self, stack: ExitStack) -> None:
        """Lock the run's folder, and open its log and boards, until the stack is left."""
        stack.enter_context(self.folder.lock())
        if self.config.resume == "none" and self.folder.holds_a_run:
            raise ValueError(f"out: {self.config.out} holds a run that began at the same time; name another")
        if self.folder.list_checkpoints() != self.beginning.seen:  # a run went on while this one began
            raise ValueError(f"out: {self.config.out} has other checkpoints than a moment ago; start again")
        boards = open_boards(self.config, self.start)
        try:
            log = self.folder.open_log(self.start, boards, begins=self.beginning.log_begins)
        except BaseException:
            for board in boards:
                board.close(1)
            raise
        self.log = stack.enter_context(log)

    def _train(self) -> Path:
        config, log = self.config, self.log
        if log is not None:
            self.folder.write_description(config, describe_environment(self.device))
        for note in [*self.beginning.notes, *([log.note] if log is not None and log.note else [])]:
            self.console.print(note, markup=False)
        images = self.loader.dataset.images
        monitor = None
        if config.evaluate.every and log is not None:
            from ser_fast.training.monitor import Monitor  # with figures and tables, which training alone takes none of

            monitor = Monitor(config, self.model)
        summary = summarize(
            config,
            self.model,
            pictures=len(images),
            canvas=images.image_size,
            steps=self.steps,
            device=self.device.type,
        )
        self.console.print(summary, markup=False, highlight=False, soft_wrap=True)
        if self.start >= self.steps:
            self.console.print(f"nothing to train: the checkpoint is at step {self.start} of {self.steps}")
        batch_size, device = config.optim.batch_size, self.device
        pace = Pace(self.console, steps=self.steps, start=self.start, batch_size=batch_size, device=device)
        reported, skipped = 0, set()
        name = escape(printable(config.out.name))
        progress = progress_bar(console=self.console)
        task = progress.add_task(name, total=self.steps, completed=self.start)

        def report(step: int, epoch: int, record: StepRecord, measured: dict[str, float], now: float) -> None:
            values = record.read()
            if log is not None:
                log.write(step, epoch, values | measured)
            losses = "  ".join(f"{term} {values[term]:.3f}" for term in ("invariance", *self.model.weights))
            progress.update(task, completed=step, description=f"{name}  {losses}")
            pace.after(step, losses, now)

        notice = "" if log is None else "stopping after this step, with a checkpoint; a second Ctrl-C ends it at once"
        with stop_signals(notice) as stop, self.loader.failures_named(), progress, LateReports(report) as reports:
            step, begin = self.start, time.perf_counter()
            for epoch, batch in prefetch(islice(self.batches(), self.steps - self.start), device):
                report_activity(f"in step {step + 1}")
                record = self.step(step, epoch, batch.images, batch.indices, batch.aspects)
                step += 1
                now = time.perf_counter()
                measured = {
                    "images_per_s": config.optim.batch_size / (now - begin),
                    "peak_memory_mib": peak_memory(self.device),
                }
                if monitor is not None:
                    measured |= monitor.after(step, self.steps)
                    now = time.perf_counter()
                begin = now
                reports.add(step, epoch, record, measured, now)
                # All ranks leave at the same step, whichever was told to, and know of every file that one can't read.
                new = images.skipped[reported:]
                reported += len(new)
                codes = gather_counts(max(stop, default=0) + 256 * len(new), self.device)
                stopped = max(code % 256 for code in codes)
                for path, reason in chain(*of_all_ranks(new)) if max(codes) >= 256 else ():
                    skipped.add(path)
                    message = f"skipped unreadable file {path}: {reason} ({len(skipped)} in all)"
                    progress.console.print(printable(message), markup=False)
                if step % config.save_every == 0 or step == self.steps or stopped:
                    reports.drain()  # no checkpoint of a step that was not looked at
                    if log is not None:
                        log.flush()
                        self.save(step)
                if len(skipped) > config.max_skipped * len(images):
                    raise ValueError(
                        f"data: {len(skipped)} of {len(images)} images can't be read by step {step}, more than the "
                        f"share max_skipped = {config.max_skipped}"
                    )
                if stopped:
                    break
                report_activity(f"loading images of step {step + 1}")
        if step < self.steps:
            self.console.print(f"stopped after step {step}; continue with --resume auto")
            raise SystemExit(128 + stopped)
        told = (
            f"finished: {config.out}; next: ser-fast equivariance, knn or linear {config.out}, then report {config.out}"
        )
        self.console.print(printable(told), markup=False, highlight=False, soft_wrap=True)
        return config.out

    def batches(self) -> Iterator[tuple[int, Batch]]:
        """(epoch, batch) from the first step not done, without end."""
        sampler = self.loader.sampler
        epoch, batch = divmod(self.start, sampler.batches)
        while self.start < self.steps:
            sampler.set_epoch(epoch)
            sampler.set_start(batch)
            for loaded in self.loader:
                yield epoch, loaded
            epoch, batch = epoch + 1, 0

    def step(self, step: int, epoch: int, images: Tensor, indices: Tensor, aspects: Tensor | None = None) -> StepRecord:
        """One optimizer step. It is queued on the device and not waited for.

        Args:
            step: how many were done before.
            epoch: of the data.
            images: (B, 3, K, K) uint8, this rank's.
            indices: (B,), theirs in the data set.
            aspects: (B,), the true width over height of the pictures stretched on them; default 1.

        Returns:
            What to log: the losses, the learning rate and the norm of the gradient; with float16 also the scale of the
            loss, and the overflows so far. Looking at it waits for the step: look when the next one is queued. It
            raises NonFiniteLossError if the loss or its gradient is not finite. Then parameters, moments, counts of
            steps, buffers, and a teacher that moves after the step, are what they were before it.
        """
        accumulate, progress = self.config.optim.accumulate, step / self.steps
        self.parallel.train()
        # Seeded anew at each step (dropout, sampled tokens): a run that is resumed needs no generator's state.
        torch.manual_seed(int(np.random.SeedSequence([self.config.seed, step, rank()]).generate_state(1, np.uint64)[0]))
        set_schedules(self.optimizer, self.config.optim, step, self.steps)
        objective = self.model.objective
        if objective.moves_teacher == "before":
            self.model.move_teacher(progress)
        self.optimizer.zero_grad(set_to_none=True)
        buffers = SavedBuffers(self.model)
        images = send(images, self.device)
        aspects = torch.ones(len(images)) if aspects is None else aspects
        if self.config.optim.in_exact_parts:
            views = self.make_views(images, indices, epoch, aspects)
            losses = backward_in_parts(self.model, views, accumulate, progress, amp=self.amp, scale=self.scaler.scale)
        else:
            losses = self._backward(images, indices, epoch, progress, aspects)
        self.scaler.unscale_(self.optimizer)
        norms = [norm.to(self.device) for norm in clip_groups(self.config.optim, self.model)]
        skip = not_finite([losses["loss"], *norms])
        objective.before_step(progress)
        step_unless(skip, self.optimizer)
        objective.after_step(progress)
        if objective.moves_teacher == "after":
            self.model.move_teacher(progress, skip)
        buffers.restore_where(skip)
        values = {**losses, "lr": self.optimizer.param_groups[0]["lr"], "grad_norm": norms[0]}
        hidden = {"skipped": skip}
        if self.scaler.is_enabled():
            total, row = self.overflows
            self.overflows = torch.stack([total + skip, (row + 1) * skip])
            values |= {"loss_scale": self.scaler.scale(torch.ones_like(skip)), "overflows": self.overflows[0]}
            hidden = {"skipped": self.overflows[1] >= MOST_OVERFLOWS}
            self.scaler.update()
        last, indices = self.last_checkpoint, indices.clone()
        clips = self.config.optim.clip_grad > 0
        lower = "optim.lr or optim.clip_grad" if clips else "optim.lr, or set optim.clip_grad (0 never clips),"
        changed = " --resume-changed" if last else ""  # without a checkpoint it begins anew, whatever is changed

        def check(values: dict[str, float]) -> None:
            if values["skipped"]:
                told = {name: value for name, value in values.items() if name in losses}
                overflows = (
                    f", and the {MOST_OVERFLOWS - 1} before it were no better" if self.scaler.is_enabled() else ""
                )
                raise NonFiniteLossError(
                    f"loss is {values['loss']} ({told}), the norm of its gradient {values['grad_norm']}, at step "
                    f"{step + 1} (epoch {epoch}){overflows}, on images with the indices {indices.tolist()}; the "
                    f"last checkpoint is {last or 'none'}; to go on, lower {lower} and give --resume auto{changed}"
                )

        return StepRecord(values | hidden, self.device, check, frozenset(hidden))

    def _backward(
        self, images: Tensor, indices: Tensor, epoch: int, progress: float, aspects: Tensor
    ) -> dict[str, Tensor]:
        """Add the gradient of the batch, of each of its parts by itself; the losses."""
        accumulate = len(images) // self.part
        sums: dict[str, Tensor] = {}
        split = (values.split(self.part) for values in (images, indices, aspects))
        for i, (part, samples, true) in enumerate(zip(*split, strict=True)):
            views = self.make_views(part, samples, epoch, true)
            local = i < accumulate - 1 and isinstance(self.parallel, DistributedDataParallel)
            with self.parallel.no_sync() if local else nullcontext():  # type: ignore[operator]
                with torch.autocast(self.device.type, self.amp, enabled=self.amp is not None):
                    losses = self.parallel(views, progress)
                self.scaler.scale(losses["loss"] / accumulate).backward()
            for name, value in losses.items():
                sums[name] = sums.get(name, 0) + value.detach() / accumulate
        return sums
