"""How the kernels are launched: tile sizes, warps and stages, by compute capability."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
import triton

CAPABILITIES = (80, 90, 100)  # A100, H100, B200: what tools/check_triton.py compiles for


def capability_of(device: torch.device) -> int:
    """Which of CAPABILITIES the kernels for `device` are configured as; any of them serves the interpreter."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return max((known for known in CAPABILITIES if known <= 10 * major + minor), default=CAPABILITIES[0])


@dataclass(frozen=True)
class Config:
    """How one kernel is launched: its tile sizes (constexpr arguments by name), warps and pipeline stages."""

    tiles: Mapping[str, int]
    num_warps: int
    num_stages: int


# group_action, by capability and bytes an element: CHANNELS of a slab, at most. Wider slabs build W less often, but
# spill.
_GROUP_ACTION = {
    (80, 2): Config({"CHANNELS": 64}, 8, 2),
    (80, 4): Config({"CHANNELS": 32}, 8, 1),
    (90, 2): Config({"CHANNELS": 128}, 4, 2),
    (90, 4): Config({"CHANNELS": 64}, 4, 2),
    (100, 2): Config({"CHANNELS": 128}, 8, 2),
    (100, 4): Config({"CHANNELS": 64}, 8, 1),
}


def group_action_config(capability: int, channels: int, dtype: torch.dtype) -> Config:
    widest = _GROUP_ACTION[capability, min(dtype.itemsize, 4)]  # float64 is there to be tested, not to be fast
    slab = min(widest.tiles["CHANNELS"], max(16, 1 << (channels - 1).bit_length()))
    return replace(widest, tiles={"CHANNELS": slab})


# nt_xent and info_nce. Tiles of the similarity matrix: BLOCK_M is a multiple of BLOCK_N (a thread holds the images of
# its columns), and GROUP tile rows share the second-level cache.
_SIMILARITIES = {
    80: Config({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32, "GROUP": 8}, 8, 3),
    90: Config({"BLOCK_M": 256, "BLOCK_N": 128, "BLOCK_K": 64, "GROUP": 8}, 8, 3),
    100: Config({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "GROUP": 8}, 8, 3),
}

# Row blocks of BLOCK_M rows that one program sums, with a running maximum.
_ROW_SUMS = {
    80: Config({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32}, 8, 3),
    90: Config({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}, 8, 3),
    100: Config({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}, 8, 3),
}

# Row blocks of BLOCK_M rows whose gradient one program keeps, by capability and columns.
_STATIONARY = {
    (80, 64): Config({"BLOCK_M": 128, "BLOCK_N": 64}, 4, 3),
    (80, 128): Config({"BLOCK_M": 128, "BLOCK_N": 64}, 8, 3),
    (80, 256): Config({"BLOCK_M": 128, "BLOCK_N": 64}, 8, 2),
    (80, 512): Config({"BLOCK_M": 64, "BLOCK_N": 32}, 8, 2),
    (90, 64): Config({"BLOCK_M": 128, "BLOCK_N": 128}, 8, 3),
    (90, 128): Config({"BLOCK_M": 128, "BLOCK_N": 128}, 8, 3),
    (90, 256): Config({"BLOCK_M": 128, "BLOCK_N": 128}, 8, 2),
    (90, 512): Config({"BLOCK_M": 64, "BLOCK_N": 64}, 8, 2),
    (100, 64): Config({"BLOCK_M": 128, "BLOCK_N": 128}, 8, 3),
    (100, 128): Config({"BLOCK_M": 128, "BLOCK_N": 128}, 8, 3),
    (100, 256): Config({"BLOCK_M": 128, "BLOCK_N": 64}, 8, 2),
    (100, 512): Config({"BLOCK_M": 64, "BLOCK_N": 32}, 8, 2),
}

# triton 3.8 takes more registers for the same kernels; these would spill with the tables' configurations.
if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8):
    _GROUP_ACTION[100, 4] = Config({"CHANNELS": 64}, 4, 1)
    _STATIONARY[90, 256] = Config({"BLOCK_M": 128, "BLOCK_N": 64}, 8, 3)

# The backward pass: up to so many columns by `stationary_gradient` (5 units of work with the forward pass), beyond by
# panels of G in two bytes that the library multiplies (4 units). A panel's bytes pay from 263 columns on.
LARGEST_STATIONARY = {80: 256, 90: 256, 100: 256}


# ---------------------------------------------------------------- what was measured here (ser_fast.kernels.tune)


def tuned_file() -> Path:
    """Where `tune` keeps what it chose on this machine: $SER_FAST_CACHE or ~/.cache/ser_fast, in triton.json."""
    return Path(os.environ.get("SER_FAST_CACHE", Path.home() / ".cache" / "ser_fast")) / "triton.json"


@cache
def tuned() -> dict[str, Config]:
    """The configurations that take the place of the tables', by `tuning_key`; none where nothing was tuned."""
    try:
        return {key: Config(**config) for key, config in json.loads(tuned_file().read_text()).items()}
    except FileNotFoundError:
        return {}


def tuning_key(kind: str, capability: int, columns: int | None = None) -> str:
    return f"{kind} sm_{capability}" + (f" {columns}" if columns else "")


def similarity_config(capability: int) -> Config:
    if triton.knobs.runtime.interpret:  # time goes by programs there, and by padding
        return Config({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "GROUP": 1}, 4, 1)
    return tuned().get(tuning_key("similarities", capability), _SIMILARITIES[capability])


def row_sums_config(capability: int) -> Config:
    if triton.knobs.runtime.interpret:
        return Config({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}, 4, 1)
    return _ROW_SUMS[capability]


def stationary_config(capability: int, columns: int) -> Config:
    if triton.knobs.runtime.interpret:
        return Config({"BLOCK_M": 128, "BLOCK_N": 128}, 4, 1)
    return tuned().get(tuning_key("stationary_gradient", capability, columns), _STATIONARY[capability, columns])


def prepare_config(columns: int) -> Config:
    """SPANS of 32 rows a program, with `columns` a power of two."""
    if triton.knobs.runtime.interpret:
        return Config({"SPANS": 4}, 4, 1)
    return Config({"SPANS": 1}, max(4, columns // 64), 1)


def row_config(columns: int) -> Config:
    """Kernels that read each row once: 2048 numbers a program."""
    if triton.knobs.runtime.interpret:
        return Config({"ROWS": 128}, 4, 1)
    return Config({"ROWS": max(1, 2048 // triton.next_power_of_2(columns))}, 4, 1)
