"""Compile every kernel that is shipped for GPUs that need not be here, and hold the results to account.

    python benchmarks/static.py           # compile, print the table, write results/triton-static.{json,md}
    python benchmarks/static.py --check   # compile, and fail on a spill, a limit, a missing instruction or a regression

Triton brings its own ptxas; no GPU, driver or CUDA toolkit is needed. Builds come from the function `shipped` of each
kernel module. Run it without TRITON_INTERPRET.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ser_fast.kernels.configs import CAPABILITIES, Build

MODULES = ("ser_fast.kernels.group_action", "ser_fast.kernels.nt_xent")
RESULTS = Path(__file__).parent / "results" / "triton-static"
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


def builds() -> list[tuple[str, int, int]]:
    """(module, capability, index): a build by where to find it, since kernels can't be sent to another process."""
    return [
        (module, capability, index)
        for module in MODULES
        for capability in CAPABILITIES
        for index in range(len(import_module(module).shipped(capability)))
    ]


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


def measure(place: tuple[str, int, int]) -> dict[str, Any]:
    """One row of the table."""
    module, capability, index = place
    build = import_module(module).shipped(capability)[index]
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


def faults(row: dict[str, Any], before: dict[str, Any] | None) -> list[str]:
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


def table(rows: list[dict[str, Any]]) -> str:
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
    parser.add_argument("--check", action="store_true", help="fail on a fault or a regression; write nothing")
    parser.add_argument("--only", default="", help="compile only the builds whose name contains this; write nothing")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()

    committed = RESULTS.with_suffix(".json")
    before = {}
    if arguments.check and committed.exists():
        before = {(row["build"], row["capability"]): row for row in json.loads(committed.read_text())["builds"]}
    places = [place for place in builds() if arguments.only in _name(place)]
    with ProcessPoolExecutor(arguments.workers, mp_context=get_context("spawn")) as pool:
        rows = list(pool.map(measure, places))
    rows.sort(key=lambda row: (row["build"], row["capability"]))
    print(table(rows), end="")

    if not arguments.check and not arguments.only:
        text = json.dumps({"triton": triton.__version__, "builds": rows}, indent=1)
        committed.write_text(text + "\n")
        head = (
            f"What triton {triton.__version__} makes of every kernel that is shipped (`python benchmarks/static.py`).\n"
        )
        RESULTS.with_suffix(".md").write_text(f"{head}\n{table(rows)}")
    bad = 0
    for row in rows:
        key = row["build"], row["capability"]
        for fault in faults(row, before.get(key)):
            print(f"{row['build']} sm_{row['capability']}: {fault}", file=sys.stderr)
            bad += 1
    if arguments.check and not arguments.only and before.keys() != {(row["build"], row["capability"]) for row in rows}:
        print(f"{committed.name} is not of these builds: run benchmarks/static.py", file=sys.stderr)
        bad += 1
    return int(bad > 0)


def _name(place: tuple[str, int, int]) -> str:
    module, capability, index = place
    return import_module(module).shipped(capability)[index].name


if __name__ == "__main__":
    sys.exit(main())
