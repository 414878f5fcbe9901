"""What the kernels are compiled to: launch configurations, and the builds that are compiled without a GPU."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

CAPABILITIES = (80, 90, 100)  # A100, H100, B200: what the builds are compiled for and held to


@dataclass(frozen=True)
class Config:
    """How one kernel is launched: its tile sizes (constexpr arguments by name), warps and pipeline stages."""

    tiles: Mapping[str, int]
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Build:
    """One compilation of one kernel, as a launch would ask for it: what `benchmarks/static.py` compiles and checks.

    Attributes:
        name: unique among the builds of all modules, the same for every capability.
        kernel: the function under @triton.jit.
        arguments: the types of its other arguments by name, in any order: "*bf16", "i32", "fp32". Pointers are taken
            to be 16-byte aligned, as torch allocates.
        constants: the values of its tl.constexpr arguments by name.
        config: tiles (added to the constants), warps and stages.
        aligned: integer arguments that are multiples of 16; those in do_not_specialize never are.
        product: the kernel has a tl.dot, so a matrix instruction must be there.
        vector: it must load 16 bytes at a time from global memory.
    """

    name: str
    kernel: Any
    arguments: Mapping[str, str]
    constants: Mapping[str, Any]
    config: Config
    aligned: tuple[str, ...] = field(default=())
    product: bool = True
    vector: bool = True
