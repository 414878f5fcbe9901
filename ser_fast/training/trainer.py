"""The training loop: one process, or several under torchrun."""

import importlib.metadata
import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter

from ser_fast.data.loader import Loader, make_loader
from ser_fast.data.sources import open_dataset
from ser_fast.device import choose_device
from ser_fast.distributed import gather_counts, rank, world_size
from ser_fast.io import write_atomically
from ser_fast.loss import SERLoss
from ser_fast.objectives.moco_v3 import MoCoV3
from ser_fast.training.checkpoint import ENCODER, list_checkpoints, load_checkpoint, save_checkpoint
from ser_fast.training.config import TrainConfig, differences, to_json
from ser_fast.views.recipe import Views
from ser_fast.vit import save_split_vit

LOG = "log.jsonl"


class NonFiniteLossError(RuntimeError):
    """The loss or its gradient is not finite; the message names the step, the images and the last good checkpoint."""


class Pretraining(nn.Module):
    """The objective and the equivariance term as one module, for DistributedDataParallel.

    Args:
        objective: gives the invariance loss and the tokens.
        ser: the equivariance term, or None to train without.
        weight: lambda. 0 computes the term on detached tokens: its projector learns, the model gets no gradient.
        momentum_keys: contrast with the momentum encoder's tokens.
    """

    def __init__(self, objective: MoCoV3, ser: SERLoss | None, *, weight: float, momentum_keys: bool) -> None:
        super().__init__()
        self.objective, self.ser = objective, ser
        self.weight, self.momentum_keys = weight, momentum_keys

    def forward(self, views: Views) -> dict[str, Tensor]:
        """The losses of one batch: "loss" to step on, and its parts "invariance" and "ser" (both unweighted)."""
        out = self.objective(*views.images)
        if self.ser is None:
            return {"loss": out.loss, "invariance": out.loss}
        chosen = len(views.g0)
        tokens = [view[:chosen] for view in out.tokens]
        keys = [view[:chosen] for view in out.keys] if self.momentum_keys else [None, None]
        if self.weight == 0:
            tokens = [view.detach() for view in tokens]
        ser = self.ser(*tokens, views.g0, views.g1, *keys)
        loss = out.loss + (self.weight if self.weight else 1.0) * ser
        return {"loss": loss, "invariance": out.loss, "ser": ser}


def train(config: TrainConfig) -> Path:
    """Run a training to its end, or on from a checkpoint; returns the run's folder.

    Writes to config.out: config.json, environment.json, log.jsonl (one line a step), tensorboard/, checkpoints/ and
    encoder.safetensors (for `ser_fast.vit.load_split_vit`). Under torchrun every rank calls it. An interrupt
    (SIGINT, SIGTERM) ends it after the step, with a checkpoint.

    Raises:
        ValueError: an option that doesn't fit, a folder that already holds a run, or a checkpoint of another config.
        NonFiniteLossError: the loss or its gradient is not finite; the optimiser did not take that step.
    """
    with _process_group(config.device) as device:
        return _Run(config, device).train()


@contextmanager
def _process_group(name: str) -> Iterator[torch.device]:
    """The device of this process, in torchrun's process group if there is one."""
    if "RANK" not in os.environ:
        yield choose_device(name)
        return
    device = choose_device(name)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM instead of dying of them."""
    received: list[int] = []
    previous = {s: signal.signal(s, lambda number, _: received.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class _Run:
    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.main = rank() == 0
        self.console = Console(quiet=not self.main)
        optim = config.optim
        for name, count in (
            ("optim.accumulate", optim.accumulate),
            ("save_every", config.save_every),
            ("keep_checkpoints", config.keep_checkpoints),
        ):
            if count < 1:
                raise ValueError(f"{name}: got {count}, takes a positive number")
        if not 0 <= optim.warmup <= 1:
            raise ValueError(f"optim.warmup: got {optim.warmup}, takes a number in [0, 1]")
        if optim.batch_size % (world_size() * optim.accumulate):
            raise ValueError(
                f"optim.batch_size: {optim.batch_size} is no multiple of {world_size()} ranks x "
                f"optim.accumulate {optim.accumulate}"
            )
        self.part = optim.batch_size // (world_size() * optim.accumulate)  # images a forward pass
        contrasted = round(config.views.share * self.part) * (world_size() if config.ser.gather else 1)
        if config.views.share > 0 and contrasted < 2:
            raise ValueError(
                f"views.share: {config.views.share} of {self.part} images is {contrasted}; SER contrasts two or more"
            )

        self.loader = self._open_data()
        self.steps = optim.steps if optim.steps is not None else optim.epochs * self.loader.sampler.batches
        if self.steps < 1:
            raise ValueError(f"optim.steps, optim.epochs: give at least one step, got {self.steps}")
        torch.manual_seed(config.seed)  # the same initial weights on every rank
        encoder = config.model.build()
        self.make_views = config.views.build(encoder.patch_size[0], config.seed)
        # The objective first: its initial weights don't depend on SER's options.
        objective = config.moco.build(encoder)
        ser = config.ser.build(encoder.embed_dim) if config.views.share else None
        module = Pretraining(objective, ser, weight=config.ser.weight, momentum_keys=config.ser.momentum_keys)
        module.to(device)
        self.objective, self.ser = module.objective, module.ser
        self.model: nn.Module = module
        if world_size() > 1:
            if device.type == "cuda":
                self.model = nn.SyncBatchNorm.convert_sync_batchnorm(module)
            self.model = DistributedDataParallel(self.model)
        self.module = module
        self.optimizer = torch.optim.AdamW(
            [p for p in module.parameters() if p.requires_grad],
            lr=optim.lr * optim.batch_size / 256,
            weight_decay=optim.weight_decay,
        )
        warmup = round(optim.warmup * self.steps)
        self.scheduler = CosineLRScheduler(
            self.optimizer,
            t_initial=self.steps + 1 - warmup,  # 0 would come after the last step, which still moves
            warmup_t=warmup,
            warmup_prefix=True,
            t_in_epochs=False,
        )
        self.amp = config.amp == "bf16" or (config.amp == "auto" and device.type == "cuda")
        self.last_checkpoint: Path | None = None
        self.start = self._resume()

    def _open_data(self) -> Loader:
        config = self.config
        dataset = open_dataset(config.data, train=True, image_size=config.model.image_size)
        return make_loader(
            dataset,
            batch_size=config.optim.batch_size,
            train=True,
            seed=config.seed,
            rank=rank(),
            world_size=world_size(),
            workers=config.workers,
        )

    # ---------------------------------------------------------------- the run's folder

    def _resume(self) -> int:
        """Load a checkpoint if asked to; returns the number of steps done."""
        config = self.config
        found, log = list_checkpoints(config.out), config.out / LOG
        if config.resume == "none":
            if found or (log.exists() and log.stat().st_size):  # empty: no step was done
                raise ValueError(
                    f"out: {config.out} already holds a run; continue it with resume='auto', or name another"
                )
            return 0
        if config.resume == "auto":
            if not found:
                return 0
            path = found[-1]
        else:
            path = Path(config.resume)
            if not path.is_file():
                raise ValueError(f"resume: {path} is no file; takes 'none', 'auto' or a checkpoint")
        state = load_checkpoint(path, self.device)
        changed = differences(to_json(config), state["config"])
        if changed:
            raise ValueError(f"resume: {path} was trained with another {', '.join(changed)}")
        self.module.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.last_checkpoint = path
        return state["step"]

    def _open_folder(self) -> tuple[Any, SummaryWriter]:
        """Write what describes the run; cut what was logged after the checkpoint it continues from."""
        out = self.config.out
        out.mkdir(parents=True, exist_ok=True)
        for name, content in (("config.json", to_json(self.config)), ("environment.json", _environment(self.device))):
            text = json.dumps(content, indent=2) + "\n"
            write_atomically(out / name, partial(Path.write_text, data=text))
        log = out / LOG
        if log.exists():
            lines = [line for line in log.read_text().splitlines(True) if _step_of(line) <= self.start]
            write_atomically(log, partial(Path.write_text, data="".join(lines)))
        return log.open("a", buffering=1), SummaryWriter(str(out / "tensorboard"), purge_step=self.start + 1)

    def _save(self, step: int) -> None:
        out = self.config.out
        state = {
            "step": step,
            "config": to_json(self.config),
            "model": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        # The encoder first: a run that has its last checkpoint has all.
        write_atomically(out / ENCODER, lambda path: save_split_vit(path, self.objective.encoder, {"step": str(step)}))
        self.last_checkpoint = save_checkpoint(out, state, keep=self.config.keep_checkpoints)

    # ---------------------------------------------------------------- the loop

    def train(self) -> Path:
        config = self.config
        log, board = self._open_folder() if self.main else (None, None)
        progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self.console,
        )
        reported = 0
        with _stop_signals() as stop, progress:
            task = progress.add_task(config.out.name, total=self.steps, completed=self.start)
            step, begin = self.start, time.perf_counter()
            for epoch, batch in self._batches():
                self.model.train()
                record = self._step(step, epoch, batch.images, batch.indices)
                step += 1
                now = time.perf_counter()
                record |= {
                    "images_per_s": config.optim.batch_size / (now - begin),
                    "peak_memory_mib": _peak_memory(self.device),
                }
                begin = now
                # All ranks leave at the same step, whichever was told to.
                stopped = max(gather_counts(max(stop, default=0), self.device))
                if log is not None and board is not None:
                    log.write(json.dumps({"step": step, "epoch": epoch, **record}) + "\n")
                    for name, value in record.items():
                        board.add_scalar(name, value, step)
                    skipped = self.loader.dataset.images.skipped
                    for path, reason in skipped[reported:]:
                        progress.console.print(f"skipped unreadable file {path}: {reason} ({len(skipped)} in all)")
                    reported = len(skipped)
                    if step % config.save_every == 0 or step == self.steps or stopped:
                        self._save(step)
                parts = "  ".join(f"{name} {record[name]:.3f}" for name in ("invariance", "ser") if name in record)
                progress.update(task, completed=step, description=f"{config.out.name}  {parts}")
                if stopped or step == self.steps:
                    break
        if log is not None and board is not None:
            log.close()
            board.close()
        if step < self.steps:
            self.console.print(f"stopped after step {step}; continue with resume='auto'")
            raise SystemExit(128 + stopped)
        return config.out

    def _batches(self) -> Iterator[tuple[int, Any]]:
        """(epoch, batch) from the first step not done, without end."""
        sampler = self.loader.sampler
        epoch, batch = divmod(self.start, sampler.batches)
        while self.start < self.steps:
            sampler.set_epoch(epoch)
            sampler.set_start(batch)
            for loaded in self.loader:
                yield epoch, loaded
            epoch, batch = epoch + 1, 0

    def _step(self, step: int, epoch: int, images: Tensor, indices: Tensor) -> dict[str, float]:
        """One optimiser step on this rank's images (B, 3, S, S) uint8; returns what to log."""
        accumulate = self.config.optim.accumulate
        # Seeded anew at each step (dropout, sampled tokens): a run that is resumed needs no generator's state.
        torch.manual_seed(int(np.random.SeedSequence([self.config.seed, step, rank()]).generate_state(1, np.uint64)[0]))
        self.scheduler.step_update(step + 1)
        self.objective.update_momentum(step / self.steps)
        self.optimizer.zero_grad(set_to_none=True)
        images = images.to(self.device, non_blocking=True)
        sums: dict[str, Tensor] = {}
        for i, (part, samples) in enumerate(zip(images.split(self.part), indices.split(self.part), strict=True)):
            views = self.make_views(part, samples, epoch)
            local = i < accumulate - 1 and isinstance(self.model, DistributedDataParallel)
            with self.model.no_sync() if local else nullcontext():  # type: ignore[operator]
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
                    losses = self.model(views)
                (losses["loss"] / accumulate).backward()
            for name, value in losses.items():
                sums[name] = sums.get(name, 0) + value.detach() / accumulate
        record = {name: float(value) for name, value in sums.items()}
        limit = self.config.optim.clip_grad or float("inf")
        # Each apart, so that SER's projector can't change how far the model moves.
        trained = [self.objective] if self.ser is None else [self.objective, self.ser]
        norms = [float(nn.utils.clip_grad_norm_(part.parameters(), limit)) for part in trained]
        # The gradient, averaged over the ranks, also tells each of them of another one's loss.
        if not np.isfinite([record["loss"], *norms]).all():
            raise NonFiniteLossError(
                f"loss is {record['loss']} ({record}), the norm of its gradient {norms[0]}, at step {step + 1} "
                f"(epoch {epoch}), on images with the indices {indices.tolist()}; "
                f"last good checkpoint: {self.last_checkpoint or 'none'}"
            )
        record |= {"lr": self.optimizer.param_groups[0]["lr"], "grad_norm": norms[0]}
        self.optimizer.step()
        return record


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):  # a line cut short when the machine went down
        return float("inf")


def _peak_memory(device: torch.device) -> float:
    """Peak memory so far in MiB: allocated on a GPU, resident for a CPU process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB; bytes on macOS
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def _environment(device: torch.device) -> dict[str, Any]:
    """What a run must say to be repeated."""
    revision = None
    if shutil.which("git"):
        command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
        revision = subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    return {
        "command": sys.argv,
        "ser_fast": importlib.metadata.version("ser-fast"),
        "git": revision,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: importlib.metadata.version(name) for name in ("torch", "torchvision", "timm", "numpy")},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or device.type,
        "threads": torch.get_num_threads(),
        "world_size": world_size(),
    }
