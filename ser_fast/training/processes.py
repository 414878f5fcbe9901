"""The processes of a training: their group under torchrun, what rank 0 does for all, and the signals that stop them."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ser_fast.device import choose_device
from ser_fast.distributed import rank, world_size

T = TypeVar("T")
_ANSWER_WITHIN = 5.0  # seconds that ranks have when they are called


class LostRankError(ConnectionError):
    """A rank does not answer, or none goes on; the message names them."""


@dataclass
class _Activity:
    """What this process is doing, and since when."""

    what: str = "starting"
    since: float = field(default_factory=time.monotonic)


_activity = _Activity()


def report_activity(what: str) -> None:
    """Say what this rank begins to do; in `process_group`, one that takes longer than the limit ends the run."""
    _activity.what, _activity.since = what, time.monotonic()


@contextmanager
def process_group(name: str, limit: float = 1800.0) -> Iterator[torch.device]:
    """The device of this process, in torchrun's process group if there is one.

    Args:
        name: of the device, as `choose_device` takes it.
        limit: seconds that one activity of a rank may take (see `report_activity`). Then, as where a connection breaks,
            the ranks are called, and the run ends with a line that names those that do not answer. Nothing but the
            process's end gets out of a collective that hangs.

    Raises:
        ValueError: a device that can't be had, or several tasks without torchrun.
        LostRankError: a connection broke.
    """
    if "RANK" not in os.environ:
        if int(os.environ.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in os.environ:
            raise ValueError(
                f"SLURM_NTASKS: got {os.environ['SLURM_NTASKS']} tasks without a process group; start them by torchrun"
            )
        yield choose_device(name)
        return
    device = choose_device(name)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # With gloo beside NCCL, counts and objects are exchanged without the device, and nothing waits for it.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=limit + 60))  # ours comes first, and names ranks
    done = threading.Event()
    report_activity("starting")
    threading.Thread(target=_watch, args=(limit, done), daemon=True).start()
    try:
        yield device
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):  # gloo's have no type of their own
            raise
        raise LostRankError(f"ranks: {_roll_call()}, in the middle of {_activity.what}") from error
    finally:
        done.set()
        dist.destroy_process_group()


def _watch(limit: float, done: threading.Event) -> None:
    """End the process when an activity takes longer than the limit."""
    while not done.wait(min(1.0, limit / 4)):
        if time.monotonic() - _activity.since > limit:
            message = f"ranks: {_roll_call()}; nothing went on for {limit:g} s (rank_timeout)"
            if not done.is_set():  # the others did not end it meanwhile
                sys.stderr.write(f"ser-fast: {message}\n")
                sys.stderr.flush()
                os._exit(1)


def _roll_call() -> str:
    """Which ranks do not answer, or what each of them is doing."""
    answers: dict[int, str] = {}

    def ask() -> None:  # the store itself may hang with rank 0
        store: Any = dist.distributed_c10d._get_default_store()
        store = store.clone()  # a connection of its own, which no other thread waits on
        store.set(f"activity/{rank()}", _activity.what)
        while len(answers) < world_size():
            for number in range(world_size()):
                if number not in answers and store.check([f"activity/{number}"]):
                    answers[number] = store.get(f"activity/{number}").decode()
            time.sleep(0.1)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_ANSWER_WITHIN)
    missing = [str(number) for number in range(world_size()) if number not in answers]
    if not answers:
        return "rank 0, or the machine that the ranks met on, does not answer"
    if missing:
        return f"rank {', '.join(missing)} {'does' if len(missing) == 1 else 'do'} not answer"
    return ", ".join(f"rank {number} is {what}" for number, what in sorted(answers.items()))


def on_rank_0(function: Callable[[], T]) -> T:
    """What the function returns, or raises, on rank 0; the other ranks get a copy of it without calling it."""
    if world_size() == 1:
        return function()
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = function()
        except Exception as error:  # every rank ends with it
            outcome[1] = error
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def of_all_ranks(value: T) -> list[T]:
    """The value of every rank, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


@contextmanager
def stop_signals(notice: str = "") -> Iterator[list[int]]:
    """Collects the first SIGINT or SIGTERM instead of dying of it; the second one ends the process.

    In a thread other than the main one, which can't handle signals, it collects none.

    Args:
        notice: what the first one writes to standard error, at once: a step may take minutes.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def collect(number: int, _: Any) -> None:
        received.append(number)
        if notice:
            with suppress(OSError):  # not print: a handler may run inside another write to the same stream
                os.write(2, f"\n{notice}\n".encode())
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)

    previous = {number: signal.signal(number, collect) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
