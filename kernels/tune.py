"""Measure other launch configurations of nt_xent here, and keep what is faster: `python -m ser_fast.kernels.tune`.

An explicit step, so that no training step ever waits for it and a CUDA graph never meets it. It tries a short list for
each kernel and number of columns, times the whole operation forward and backward, and writes the winners to the file
that the launchers read (`ser_fast.kernels.configs.tuned_file`). Without that file the tables of `configs` hold.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict

import torch
import triton

from ser_fast.kernels.configs import (
    Config,
    capability_of,
    similarity_config,
    stationary_config,
    tuned,
    tuned_file,
    tuning_key,
)
from ser_fast.ops.nt_xent import info_nce, nt_xent

# Tried beside what is in use; the first two sizes of a similarity tile are BLOCK_M and BLOCK_N.
SIMILARITIES = [
    Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP": 8}, warps, stages)
    for m, n, k, warps, stages in [
        (128, 128, 32, 8, 4),
        (128, 128, 64, 4, 3),
        (128, 128, 64, 8, 3),
        (256, 128, 32, 8, 4),
        (256, 128, 64, 8, 3),
        (256, 128, 64, 8, 4),
    ]
]
STATIONARY = [
    Config({"BLOCK_M": m, "BLOCK_N": n}, warps, stages)
    for m, n, warps, stages in [
        (64, 32, 4, 2),
        (64, 64, 8, 2),
        (64, 64, 4, 3),
        (128, 64, 8, 2),
        (128, 64, 8, 3),
        (128, 128, 8, 2),
    ]
]


def milliseconds(step: Callable[[], object]) -> float:
    return triton.testing.do_bench(step, warmup=50, rep=200, return_mode="median")


def choose_fastest(
    key: str, candidates: list[Config], step: Callable[[], object], measure: Callable[..., float] = milliseconds
) -> list[float]:
    """Keep, under `key`, the candidate with which `step` takes least; returns what each took, inf if it can't run."""
    taken = []
    for config in candidates:
        tuned()[key] = config
        try:
            taken.append(measure(step))
        except (triton.CompilationError, triton.runtime.errors.OutOfResources):
            taken.append(float("inf"))
    tuned()[key] = candidates[taken.index(min(taken))]
    return taken


def tune(rows: int, columns: int, measure: Callable[..., float] = milliseconds) -> dict[str, list[float]]:
    """Tune nt_xent on `rows` rows a view, and the one-pass info_nce, for bfloat16 rows of `columns` columns.

    Returns, by tuning key, the milliseconds of each candidate, of which the first is what was in use; the winners are
    in `tuned_file()`.
    """
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    capability = capability_of(device)
    x, y = (torch.randn(rows, columns, dtype=torch.bfloat16, device=device).requires_grad_() for _ in range(2))

    def symmetric() -> None:
        nt_xent(x, y, temperature=0.3, backend="triton").backward()

    def detached() -> None:
        info_nce(x, y.detach(), temperature=0.3, backend="triton").backward()

    tried = {}
    jobs = [(tuning_key("similarities", capability), [similarity_config(capability), *SIMILARITIES], symmetric)]
    if columns in (64, 128, 256, 512):
        jobs.append(
            (
                tuning_key("stationary_gradient", capability, columns),
                [stationary_config(capability, columns), *STATIONARY],
                detached,
            )
        )
    for key, candidates, step in jobs:
        tried[key] = choose_fastest(key, candidates, step, measure)
    path = tuned_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({key: asdict(config) for key, config in tuned().items()}, indent=1) + "\n")
    return tried


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4704, help="rows of a view (default: 4704)")
    parser.add_argument("--columns", type=int, nargs="+", default=[512], help="of a row (default: 512)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch finds no GPU")
    for columns in arguments.columns:
        for key, taken in tune(arguments.rows, columns).items():
            print(f"{key}: from {taken[0]:.3f} to {min(taken):.3f} ms, {tuned()[key]}")
    print(f"written: {tuned_file()}")


if __name__ == "__main__":
    main()
