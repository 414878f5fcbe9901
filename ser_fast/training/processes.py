"""The processes of a training: their group under torchrun, what rank 0 does for all, and the signals that stop them."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ser_fast.device import choose_device
from ser_fast.distributed import rank, world_size

T = TypeVar("T")


@contextmanager
def process_group(name: str) -> Iterator[torch.device]:
    """The device of this process, in torchrun's process group if there is one."""
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
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


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
def stop_signals() -> Iterator[list[int]]:
    """Collects the first SIGINT or SIGTERM instead of dying of it; the second one ends the process.

    In a thread other than the main one, which can't handle signals, it collects none.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def collect(number: int, _: Any) -> None:
        received.append(number)
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)

    previous = {number: signal.signal(number, collect) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
