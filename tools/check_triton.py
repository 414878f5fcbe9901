"""Compile every Triton kernel that is shipped, for GPUs that need not be here, and hold the results to account.

    python tools/check_triton.py           # compile, print the table, write it to benchmarks/results
    python tools/check_triton.py --check   # compile, and fail on a spill, a limit, a missing instruction, a regression

Each release of triton has a table of its own, benchmarks/results/triton-static-RELEASE.{json,md}; what is committed are
those of constraints*.txt. Another release is held to the limits alone.

Triton brings its own ptxas; no GPU, driver or CUDA toolkit is needed. Run it without TRITON_INTERPRET.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any

import torch
import triton
from gate import Gate, Row
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ser_fast.kernels import nt_xent_rows, nt_xent_tiles
from ser_fast.kernels.configs import (
    CAPABILITIES,
    LARGEST_STATIONARY,
    Config,
    group_action_config,
    prepare_config,
    row_config,
    row_sums_config,
    similarity_config,
    stationary_config,
)
from ser_fast.kernels.group_action import Resampling, _resample

CUOBJDUMP = triton.knobs.nvidia.cuobjdump.path

# CUDA C++ programming guide, "technical specifications per compute capability", in bytes and 32-bit registers.
SHARED_PER_BLOCK = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
SHARED_PER_SM = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}
SHARED_RESERVED = 1 << 10  # of each block, for the system
REGISTERS_PER_SM, WARPS_PER_SM, BLOCKS_PER_SM, REGISTER_UNIT = 65536, 64, 32, 8
TENSOR_MEMORY_PER_SM = 512  # columns, sm_100

PRODUCT = r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b"
VECTOR = r"\b(?:ld\.global[.:\w]*\.v4\.[bfu]32|ld\.global[.:\w]*\.v2\.[bu]64|cp\.async\.cg|cp\.async\.bulk)\b"
MORE_REGISTERS = 8  # what another release of the compiler may take without being called a regression


# ---------------------------------------------------------------- builds


@dataclass(frozen=True)
class Build:
    """One compilation of one kernel, as a launch would ask for it: what is compiled and checked.

    Attributes:
        name: unique, and the same for every capability.
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


def group_action_builds(capability: int) -> list[Build]:
    """The builds of SER's setting, projected tokens of 512 channels, and one of each other way through the kernel."""

    def build(dtype: torch.dtype, transpose: bool, *options: str | bool) -> Build:
        how = Resampling.of(*options, dtype)
        element = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
        sizes = dict.fromkeys(["height", "width", "height_out", "width_out", "channels"], "i32")
        stretched = " antialias" if how.stretch else ""
        return Build(
            f"group_action{'_transpose' if transpose else ''} {how.kernel} {how.padding}{stretched} {element}",
            _resample,
            {"x": f"*{element}", "linear": "*fp64", "offset": "*fp64", "out": f"*{element}", **sizes},
            {"HOW": how, "TRANSPOSE": transpose},
            group_action_config(capability, 512, dtype),
            aligned=("channels",),
        )

    return [
        build(dtype, transpose, *options)
        for transpose in (False, True)
        for dtype, *options in [
            (torch.bfloat16, "bicubic", "border", False),
            (torch.float32, "bicubic", "border", False),
            (torch.bfloat16, "lanczos3", "reflection", True),
            (torch.bfloat16, "nearest", "zeros", False),
        ]
    ]


_POINTERS = {
    **dict.fromkeys(("x0", "x1", "y0", "y1", "q0", "q1", "k0", "k1", "query", "key", "d_x0", "d_x1"), "*bf16"),
    **dict.fromkeys(("u", "q", "k", "kept", "panel"), "*fp16"),
    **dict.fromkeys(("image", "table", "q_table", "k_table", "positive", "order", "first", "sums"), "*i64"),
    **dict.fromkeys(("state", "loss", "weight", "largest", "out", "accumulated", "gradient"), "*fp32"),
    **dict.fromkeys(("weights", "q_weights", "k_weights"), "*fp32"),
    "valid": "*i1",
}


def nt_xent_builds(capability: int) -> list[Build]:
    """The builds for bfloat16 rows at the column counts in use; float16 rows differ in a conversion."""
    kernels = {**vars(nt_xent_rows), **vars(nt_xent_tiles)}

    def build(op: str, step: str, config: Config, columns: int, kind: str = "", **constants: Any) -> Build:
        kernel = kernels[f"_{step}"]
        constants = {"D": columns, "DIM": columns, "BLOCK_D": columns, "NORMALIZE": True, **constants, **config.tiles}
        constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
        floats = ("scale", "inverse_high", "inverse_low")
        arguments = {
            argument: _POINTERS.get(argument, "fp32" if argument in floats else "i32")
            for argument in kernel.arg_names
            if argument not in constants
        }
        product = "BLOCK_M" in constants and constants.get("SOURCE", "PRODUCT") == "PRODUCT"
        return Build(f"{op} {step}{kind} {columns}", kernel, arguments, constants, config, product=product)

    tile, row_sums, row = similarity_config(capability), row_sums_config(capability), row_config(512)
    both = {"BOUNDED": True, "BY_ROW": True, "BY_KEY": True}
    builds = []
    for columns in (64, 128, 256, 512, 1024):
        builds.append(build("nt_xent", "symmetric_sums", tile, columns, KEEP=False))
        builds.append(build("info_nce", "row_sums", row_sums, columns, LIBRARY=False))
        if columns > LARGEST_STATIONARY[capability]:
            builds.append(build("nt_xent", "gradient_panel", tile, columns, SOURCE="PRODUCT", **both))
        if columns <= 512:
            stationary = stationary_config(capability, columns)
            builds.append(build("nt_xent", "stationary_gradient", stationary, columns, **both))
            builds.append(build("info_nce", "detached_sums", stationary, columns, BOUNDED=True))
    return [
        *builds,
        build("nt_xent", "symmetric_sums", tile, 512, ", kept", KEEP=True),
        build("nt_xent", "gradient_panel", tile, 512, ", kept", SOURCE="KEPT", **both),
        build("nt_xent", "prepare", prepare_config(512), 512),
        build("nt_xent", "losses", row, 512, VIEWS=True, SUMMED=True),
        build("nt_xent", "gradient_weights", row, 512, VIEWS=True, BOUNDED=True, LIBRARY=False),
        build("nt_xent", "finish_gradient", row, 512, SIDE="VIEWS", LIBRARY=False),
        build("info_nce", "finish_detached", row, 512),
    ]


def shipped(capability: int) -> list[Build]:
    """Every build."""
    return [*group_action_builds(capability), *nt_xent_builds(capability)]


# ---------------------------------------------------------------- compilation


def builds() -> list[tuple[int, int]]:
    """(capability, index): a build by where to find it, since kernels can't be sent to another process."""
    return [(capability, index) for capability in CAPABILITIES for index in range(len(shipped(capability)))]


def compiled(build: Build, capability: int) -> Any:
    """The kernel as triton compiles it at launch."""
    constants = {**build.constants, **build.config.tiles}
    names = build.kernel.arg_names
    missing = [name for name in names if name not in build.arguments and name not in constants]
    if missing:
        raise ValueError(f"{build.name}: no type or value for {', '.join(missing)}")
    signature = {name: "constexpr" if name in constants else build.arguments[name] for name in names}
    divisible = [["tt.divisibility", 16]]
    attributes = {
        (index,): divisible
        for index, name in enumerate(names)
        if name in build.aligned or signature[name].startswith("*")
    }
    source = ASTSource(fn=build.kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": build.config.num_warps, "num_stages": build.config.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(cubin: bytes) -> dict[str, int]:
    """Per thread: registers (REG), and bytes of STACK and LOCAL memory, which is what is spilled."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text))
    return {name: int(value) for name, value in found.items()}


def blocks_per_sm(registers: int, shared: int, warps: int, tensor_memory: int, capability: int) -> int:
    """How many blocks one multiprocessor holds at a time."""
    unit = -(-registers // REGISTER_UNIT) * REGISTER_UNIT
    by_registers = REGISTERS_PER_SM // (unit * 32 * warps)
    by_shared = SHARED_PER_SM[capability] // (shared + SHARED_RESERVED)
    by_tensor_memory = TENSOR_MEMORY_PER_SM // max(tensor_memory, 1)
    return min(by_registers, by_shared, by_tensor_memory, WARPS_PER_SM // warps, BLOCKS_PER_SM)


def measure(place: tuple[int, int]) -> Row:
    """One row of the table."""
    capability, index = place
    build = shipped(capability)[index]
    kernel = compiled(build, capability)
    used, ptx = resources(kernel.asm["cubin"]), kernel.asm["ptx"]
    # All of triton's shared memory is dynamic; cuobjdump's SHARED is what the system reserves.
    shared, warps = kernel.metadata.shared, kernel.metadata.num_warps
    tensor_memory = kernel.metadata.tmem_size if capability == 100 else 0
    blocks = blocks_per_sm(used["REG"], shared, warps, tensor_memory, capability)
    products = re.findall(PRODUCT, ptx)
    return {
        "build": build.name,
        "capability": capability,
        "warps": warps,
        "stages": build.config.num_stages,
        "registers": used["REG"],
        "spilled": used["STACK"] + used["LOCAL"],
        "shared": shared,
        "tensor_memory": tensor_memory,
        "blocks_per_sm": blocks,
        "warps_per_sm": blocks * warps,
        "product": products[0] if products else "",
        "products": len(products),
        "vector_loads": len(re.findall(VECTOR, ptx)),
        "needs_product": build.product,
        "needs_vector": build.vector,
    }


def violations(row: Row, before: Row | None) -> list[str]:
    """What is wrong with a row, against the chip's limits and against the committed row of the same build."""
    found = []
    if row["spilled"]:
        found.append(f"spills {row['spilled']} bytes a thread")
    if row["registers"] > 255:
        found.append(f"{row['registers']} registers, the limit is 255")
    limit = SHARED_PER_BLOCK[row["capability"]]
    if row["shared"] > limit:
        found.append(f"{row['shared']} bytes of shared memory, the limit is {limit}")
    if row["blocks_per_sm"] == 0:
        found.append("not one block fits a multiprocessor")
    if row["needs_product"] and not row["products"]:
        found.append("no matrix instruction")
    if row["needs_vector"] and not row["vector_loads"]:
        found.append("no 16-byte load from global memory")
    if before is not None:
        if row["registers"] > before["registers"] + MORE_REGISTERS:
            found.append(f"{row['registers']} registers, were {before['registers']}")
        if row["shared"] > before["shared"]:
            found.append(f"{row['shared']} bytes of shared memory, were {before['shared']}")
    return found


# ---------------------------------------------------------------- the gate


def table(rows: list[Row]) -> str:
    heads = ["build", "sm", "warps", "stages", "registers", "spilled", "shared KB", "blocks/SM", "warps/SM", "product"]
    heads.append("16-byte loads")
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for row in rows:
        product = f"{row['product']} x {row['products']}" if row["products"] else "-"
        cells = [
            *(row[key] for key in ("build", "capability", "warps", "stages", "registers", "spilled")),
            f"{row['shared'] / 1024:.1f}",
            *(row[key] for key in ("blocks_per_sm", "warps_per_sm")),
            product,
            row["vector_loads"],
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail on a violation or a regression; write nothing")
    parser.add_argument("--only", default="", help="compile only the builds whose name contains this; write nothing")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()

    places = [place for place in builds() if arguments.only in shipped(place[0])[place[1]].name]
    with ProcessPoolExecutor(arguments.workers, mp_context=get_context("spawn")) as pool:
        rows = list(pool.map(measure, places))
    results = f"triton-static-{'.'.join(triton.__version__.split('.')[:2])}"
    gate = Gate("tools/check_triton.py", results, "triton", "build", table, violations)
    return gate.run(rows, triton.__version__, check=arguments.check, partial=bool(arguments.only))


if __name__ == "__main__":
    sys.exit(main())
