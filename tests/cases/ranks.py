"""Programs that run on several ranks, in processes of their own."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist


def results_of_ranks(programs: dict[str, Callable[[], Any]], world: int, folder: Path) -> dict[str, list[Any]]:
    """For each program, what it returned on each of `world` ranks of gloo; tensors and plain values.

    Args:
        programs: functions of a test file, by name.
        world: how many processes.
        folder: an empty one.
    """
    with pytest.MonkeyPatch.context() as patch:
        # A rank imports the test file under the name it has here, from the folder above tests/.
        patch.syspath_prepend(str(Path(__file__).parents[2]))
        torch.multiprocessing.spawn(_run_rank, (world, folder, programs), nprocs=world)
    ranks = [torch.load(folder / f"{rank}.pt") for rank in range(world)]
    return {name: [result[name] for result in ranks] for name in programs}


def _run_rank(rank: int, world: int, folder: Path, programs: dict[str, Callable[[], Any]]) -> None:
    torch.set_num_threads(1)
    timeout = timedelta(minutes=2)  # where collectives don't match, instead of half an hour
    dist.init_process_group("gloo", f"file://{folder}/meeting", timeout, rank=rank, world_size=world)
    results = {}
    for name, program in programs.items():
        torch.manual_seed(0)
        results[name] = program()
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()
