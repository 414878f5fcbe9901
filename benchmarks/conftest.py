"""What all benchmarks share: inputs that don't stay in the cache, and an output that is checked before it is timed."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

CACHE = 64 * 2**20  # bytes; more than the last-level cache of the machines at hand


@pytest.fixture
def timed(benchmark: Any) -> Callable[..., None]:
    """Time run(x) over copies of x that together exceed the cache, after checking it against the oracle's output.

    Rivals of one case share a pytest-benchmark group: its table gives each as a multiple of the fastest, the floor.
    """

    def timed(
        group: str,
        run: Callable[[Tensor], Tensor],
        x: Tensor,
        expected: Tensor | None,
        *,
        bytes: int = 0,
        flops: int = 0,
    ) -> None:
        error = 0.0
        if expected is not None:
            error = float((run(x) - expected).abs().max() / expected.abs().max())
            assert error < 1e-4, f"{group}: relative error {error}"
        copies = max(2, -(-CACHE // (x.numel() * x.element_size())))
        inputs = itertools.cycle([x.clone() for _ in range(copies)])
        benchmark.group = group
        benchmark.extra_info |= {
            "bytes": bytes,
            "flops": flops,
            "error": error,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        benchmark.pedantic(lambda: run(next(inputs)), rounds=7, warmup_rounds=1)

    return timed
