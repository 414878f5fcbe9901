"""All-gather of rows when every rank has its own number of them, and sums over the ranks, with gradients.

docs/distributed.md says what is exchanged in a step, and what that costs.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _ImaginedGroup:
    """In place of torch.distributed: ranks that all have what this one has, and exchange nothing."""

    def __init__(self, count: int) -> None:
        self.is_available = self.is_initialized = lambda: True
        self.get_world_size, self.get_rank = (lambda: count), (lambda: 0)

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments, **options: None


@contextmanager
def imagined_ranks(count: int) -> Iterator[None]:
    """Have this process be rank 0 of `count` ranks, for plans of memory and work.

    What would be gathered or added up has its shape, and no meaning.
    """
    global dist
    real, dist = dist, _ImaginedGroup(count)  # type: ignore[assignment]
    try:
        yield
    finally:
        dist = real


def world_size() -> int:
    """The number of ranks; 1 where torch.distributed isn't initialized."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's rank; 0 where torch.distributed isn't initialized."""
    return dist.get_rank() if world_size() > 1 else 0


def gather_counts(count: int, device: torch.device) -> list[int]:
    """How many rows each rank has. Reads them on the host: lattices differ from rank to rank and step to step.

    Where the group has a backend for the CPU, as under "cpu:gloo,cuda:nccl", they never see the device, and nothing
    waits for it.
    """
    if world_size() == 1 or isinstance(dist, _ImaginedGroup):
        return [count] * world_size()
    if "cpu:" in dist.get_backend_config():  # "cpu:gloo,cuda:nccl"; of "nccl" alone it is "cuda:nccl"
        device = torch.device("cpu")
    counts = torch.empty(world_size(), dtype=torch.long, device=device)
    dist.all_gather_into_tensor(counts, torch.tensor([count], device=device))
    return counts.tolist()


def _pad(rows: Tensor, length: int) -> Tensor:
    """Contiguous rows, and zeros after them up to the length: what is gathered or reduced at once has equal parts."""
    if len(rows) == length:
        return rows.contiguous()
    return torch.cat([rows, rows.new_zeros(length - len(rows), *rows.shape[1:])])


def _reduces_while_it_scatters(device: torch.device) -> bool:
    """Whether a rank receives one sum, as with NCCL. Gloo, for the CPU, is cheaper if each rank adds up its own rows.

    Its reduce-scatter is an all-reduce inside: each rank receives all rows twice, padding too.
    """
    return device.type != "cpu"


def add_up(x: Tensor) -> None:
    """Replace x by the sum of every rank's, without a gradient."""
    dist.all_reduce(x)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int]) -> Tensor:  # (T_rank, ...) -> (sum of T, ...)
        ctx.counts = counts
        longest = max(counts)
        gathered = rows.new_empty(len(counts) * longest, *rows.shape[1:])
        if longest:
            dist.all_gather_into_tensor(gathered, _pad(rows, longest))
        if min(counts) == longest:
            return gathered
        return torch.cat([part[:count] for part, count in zip(gathered.split(longest), counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # Every rank's loss saw these rows, so their gradient is the sum over the ranks. Keeping only the local
        # slice would lose every other rank's share.
        return _ReduceScatterRows.apply(grad, ctx.counts), None


class _ReduceScatterRows(torch.autograd.Function):
    """The sum of every rank's rows, of which each rank keeps its own: the transpose of the gather."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int]) -> Tensor:  # (sum of T, ...) -> (T_rank, ...)
        ctx.counts = counts
        longest, own = max(counts), counts[dist.get_rank()]
        if not longest:
            return torch.empty_like(rows)
        if not _reduces_while_it_scatters(rows.device):
            parts = rows.new_empty(len(counts), own, *rows.shape[1:])
            dist.all_to_all_single(parts.flatten(0, 1), rows.contiguous(), [own] * len(counts), counts)
            return parts.sum(0)
        if min(counts) < longest:
            rows = torch.cat([_pad(part, longest) for part in rows.split(counts)])
        summed = rows.new_empty(longest, *rows.shape[1:])
        dist.reduce_scatter_tensor(summed, rows.contiguous())
        return summed[:own]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _GatherRows.apply(grad, ctx.counts), None


def all_gather_rows(rows: Tensor, counts: list[int]) -> Tensor:
    """Every rank's rows, in the order of the ranks.

    Args:
        rows: (T_rank, ...), the same trailing shape and dtype on all ranks.
        counts: the T of every rank, from `gather_counts`.

    Returns:
        (sum of T, ...). Its gradient goes back to the rank that owns the row, summed over all ranks' losses.
    """
    return rows if world_size() == 1 else _GatherRows.apply(rows, counts)


def all_gather_views(views: Sequence[Tensor], counts: list[int]) -> Tensor:
    """Every rank's rows of several views, in one exchange.

    Args:
        views: V of (T_rank, D), alike.
        counts: the T of every rank, from `gather_counts`.

    Returns:
        (V, sum of T, D); as `all_gather_rows` has it for each.
    """
    if world_size() == 1:
        return torch.stack(list(views))
    return all_gather_rows(torch.stack(list(views), 1), counts).transpose(0, 1).contiguous()


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous().clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # Every rank's loss saw this rank's summand. dist.all_reduce alone would be a constant to autograd, and the
        # gradient, averaged over the ranks, 1/world_size of the true one.
        return _AllReduceSum.apply(grad)


def all_reduce_sum(x: Tensor) -> Tensor:
    """The sum of every rank's tensor, the same shape on all of them; its gradient is summed over all ranks' losses."""
    return x if world_size() == 1 else _AllReduceSum.apply(x)


def count_rows(rows: Tensor) -> Tensor:
    """How many rows all ranks have, a scalar of the dtype of `rows`: it stays on the device."""
    return all_reduce_sum(rows.new_full((), float(len(rows))))


def mean_over_rows(values: Tensor) -> Tensor:
    """This rank's part of the mean over all ranks' values (B_rank, ...), which may have different numbers of them.

    Averaged over the ranks, as DistributedDataParallel averages gradients, the parts give the mean.
    """
    if world_size() == 1:
        return values.mean()
    return world_size() * values.sum() / (count_rows(values) * math.prod(values.shape[1:]))
