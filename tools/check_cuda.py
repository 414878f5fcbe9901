"""Compile every CUDA kernel for GPUs that need not be here, and hold the results to account.

    python tools/check_cuda.py           # compile, print the table, write benchmarks/results/cuda-static.{json,md}
    python tools/check_cuda.py --check   # compile, and fail on a spill, a limit, a missing instruction, a regression

It takes nvcc, and a cuobjdump: the toolkit's or the one that comes with triton. Shared memory that a launch asks for is
not in the table; tests/test_cuda_host.py holds it to the limits.
"""

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gate import Gate, Row

CSRC = Path(__file__).parents[1] / "csrc"
CAPABILITIES = (80, 90, 100)  # A100, H100, B200
STATIC_SHARED = 48 << 10  # bytes of shared memory that a kernel may declare
MORE_REGISTERS = 8  # what another release of the compiler may take without being called a regression

# The instructions that are counted, and those that a kernel must have.
INSTRUCTIONS = {
    "16-byte async copies": r"LDGSTS\.E\.BYPASS\.128",
    "16-byte loads": r"LDG\.E\.128",
    "16-byte stores": r"STG\.E\.128",
    "matrix products": r"H[G]?MMA",
}
REQUIRED = {
    r"group_action_kernel<\w+, true, ": ("16-byte async copies", "16-byte loads", "16-byte stores"),
    r"(stationary_gradient|detached_sums)_kernel<|(symmetric_sums|row_sums|gradient_panel)_kernel$": (
        "16-byte async copies",
        "matrix products",
    ),
    r"gradient_panel_kernel$": ("16-byte stores",),
    r"(prepare|finish_gradient|finish_detached)_kernel<|gradient_panel_from_": ("16-byte loads", "16-byte stores"),
    r"(losses|gradient_weights|panel_row_sums)_kernel<": ("16-byte loads",),
}

_PROPERTIES = re.compile(
    r"Function properties for (?P<symbol>\S+)\n"
    r"\s*(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads\n"
    r"[^\n]*Used (?P<registers>\d+) registers(?:[^\n]*?(?P<shared>\d+) bytes smem)?"
)


def cuobjdump() -> str:
    """The toolkit's, or else triton's."""
    found = shutil.which("cuobjdump")
    if found is None:
        triton = importlib.util.find_spec("triton")
        if triton is None or triton.origin is None:
            raise FileNotFoundError("cuobjdump: not on the path, and triton, which brings one, is not installed")
        found = str(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    return found


def run(*command: Any) -> str:
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{command[0]} failed:\n{result.stderr}")
    return result.stdout + result.stderr


def kernel_name(symbol: str) -> str:
    """resample<bfloat16, true, false>"""
    demangled = run("c++filt", symbol).strip()
    found = re.search(r"(\w+<[^()]*?>|\w+)\(", re.sub(r"\(anonymous namespace\)::|ser_fast::|cuda::", "", demangled))
    return found[1] if found else demangled


def measure(source: Path, capability: int) -> list[Row]:
    """The rows of the kernels of one file."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        flags = ("-std=c++20", "-O3", "-I", CSRC, f"-arch=sm_{capability}", "-Xptxas", "-v", "-cubin")
        messages = run("nvcc", *flags, source, "-o", cubin)
        listing = run(cuobjdump(), "-sass", cubin)
    code = dict(re.findall(r"Function : (\S+)\n(.*?)(?=Function : |\Z)", listing, re.DOTALL))
    return [
        {
            "kernel": kernel_name(found["symbol"]),
            "capability": capability,
            "registers": int(found["registers"]),
            "spilled": int(found["stack"]) + int(found["stores"]) + int(found["loads"]),
            "shared": int(found["shared"] or 0),
            **{name: len(re.findall(pattern, code[found["symbol"]])) for name, pattern in INSTRUCTIONS.items()},
        }
        for found in _PROPERTIES.finditer(messages)
        if found["symbol"] in code
    ]


def violations(row: Row, before: Row | None) -> list[str]:
    """What is wrong with a row, against the chip's limits and against the committed row of the same kernel."""
    wrong = []
    if row["spilled"]:
        wrong.append(f"spills, or keeps on a stack, {row['spilled']} bytes a thread")
    if row["registers"] > 255:
        wrong.append(f"{row['registers']} registers, the limit is 255")
    if row["shared"] > STATIC_SHARED:
        wrong.append(f"{row['shared']} bytes of shared memory, the limit is {STATIC_SHARED}")
    for kernels, instructions in REQUIRED.items():
        if re.match(kernels, row["kernel"]):
            wrong += [f"no {name}" for name in instructions if not row[name]]
    if before is not None and row["registers"] > before["registers"] + MORE_REGISTERS:
        wrong.append(f"{row['registers']} registers, were {before['registers']}")
    return wrong


def table(rows: list[Row]) -> str:
    lines = [f"| {' | '.join(rows[0])} |", f"|{'---|' * len(rows[0])}"]
    lines += [f"| {' | '.join(map(str, row.values()))} |" for row in rows]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail on a violation or a regression; write nothing")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()

    jobs = [(source, capability) for source in sorted((CSRC / "cuda").glob("*.cu")) for capability in CAPABILITIES]
    with ThreadPoolExecutor(arguments.workers) as pool:
        rows = [row for part in pool.map(lambda job: measure(*job), jobs) for row in part]
    release = re.search(r"release ([\d.]+)", run("nvcc", "--version"))
    gate = Gate("tools/check_cuda.py", "cuda-static", "nvcc", "kernel", table, violations)
    return gate.run(rows, release[1] if release else "?", check=arguments.check)


if __name__ == "__main__":
    sys.exit(main())
