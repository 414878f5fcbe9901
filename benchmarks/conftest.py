"""One case compares rivals: each is checked against the oracle, then all are timed in turns in one process.

A round runs every rival once, in an order drawn anew, so that a slow phase of the machine hits all of them alike; the
medians are compared. pytest-benchmark runs the rounds and times the default backend, and its setup times the others.
Inputs rotate through copies that together exceed the last-level cache. The floor is what no implementation can go
below: a copy of the same bytes, or two matrix products of the same flops.
"""

import ctypes
import importlib.metadata
import itertools
import json
import os
import platform
import random
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor

from ser_fast.ops.backends import BACKENDS, choose, reason_not

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RESULTS = Path(__file__).parent / "results"
LEAST_ROUNDS, MOST_ROUNDS = 3, 30
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # largest error, relative to the largest value
PACKAGES = ("ser-fast", "torch", "torchvision", "pillow", "triton", "numpy", "timm", "pytest-benchmark")
PACKAGES += ("kornia", "lightly", "pytorch-metric-learning", "cut-cross-entropy", "liger-kernel", "memeff")
PACKAGES += ("torchtransform",)
_PEER = (("ms", ".3g"), ("of_default", ".2f"))
_rows = pytest.StashKey[list[dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--results",
        default="local",
        metavar="NAME",
        help="write benchmarks/results/NAME.json and NAME.md (default: local, which git ignores)",
    )
    parser.addoption("--seconds", type=float, default=2, help="time for the rounds of one case (default: 2)")
    parser.addoption("--large", action="store_true", help="run every case: on a CPU hours, not minutes")


def pytest_configure(config: pytest.Config) -> None:
    if sys.platform == "linux":
        # The allocator as a long run leaves it, with the largest threshold that it adapts to: blocks up to there are
        # used again. A rival that frees much would make the next one fault its pages in, at the cost of a copy.
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 32 * 2**20)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    config.stash[_rows] = []
    config.option.benchmark_quiet = True  # its table, twenty numbers a rival in lines of 250 characters; ours is below
    config.addinivalue_line("markers", "large: runs with --large only")


def _write_line(config: pytest.Config, line: str) -> None:
    """A line on the terminal, where pytest is about to write its next dot."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None:
        reporter.ensure_newline()
        reporter.write_line(line)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--large"):
        left_out = [item for item in items if item.get_closest_marker("large")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("large")]


@pytest.fixture(scope="session")
def device() -> torch.device:
    return DEVICE


@pytest.fixture(scope="session")
def backends() -> list[str]:
    """The backends that run on the device."""
    return [backend for backend in BACKENDS if reason_not(backend, DEVICE.type) is None]


# ---------------------------------------------------------------- measuring


def _synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def _cache_bytes() -> int:
    """The last-level cache, or 64 MiB where the system doesn't tell."""
    try:
        size = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text()
    except OSError:
        return 64 * 2**20
    return max(int(size.strip().removesuffix("K")) * 2**10, 64 * 2**20)


def _resident(field: str) -> int:
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text()).group(1)) * 2**10


def _extra_memory(run: Callable[[], object]) -> int | None:
    """How far the memory in use rises above what it was before, in bytes; None where the system doesn't tell."""
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    if sys.platform != "linux":
        run()
        return None
    ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps of earlier calls would hide what this one takes
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM, the peak, starts anew
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before


def _copy(moved: int, dtype: torch.dtype) -> Callable[[], None]:
    """Read half of `moved` bytes, write half."""
    count = moved // 2 // dtype.itemsize
    pairs = [torch.zeros(2, count, dtype=dtype, device=DEVICE) for _ in range(1 + _cache_bytes() // moved)]
    turn = itertools.cycle([*pairs, torch.zeros_like(pairs[0])])

    def copy() -> None:
        source, target = next(turn)
        target.copy_(source)

    return copy


def _products(rows: int, keys: int, dim: int, dtype: torch.dtype) -> Callable[[], None]:
    """(Q K^T) K for Q (rows, dim) and K (keys, dim), in panels of Q: 4 rows keys dim flops."""
    if DEVICE.type == "cpu":
        dtype = torch.float32  # without AMX slower in half precision
    q, k = (torch.randn(n, dim, dtype=dtype, device=DEVICE) for n in (rows, keys))
    out, panel = torch.empty_like(q), torch.empty(min(rows, 2048), keys, dtype=dtype, device=DEVICE)

    def products() -> None:
        for part, result in zip(q.split(2048), out.split(2048), strict=True):
            torch.mm(torch.mm(part, k.T, out=panel[: len(part)]), k, out=result)

    return products


Rival = Callable[[Tensor], Tensor]


def _stages(rival: Rival, way: str, cotangent: Tensor | None) -> tuple[Callable[..., Any], Callable[..., Tensor]]:
    """What comes before the clock starts, x -> state, and what is timed, state -> output or gradient."""

    def prepare(x: Tensor) -> Any:
        if way == "fwd":
            return x
        x = x.detach().requires_grad_()
        return (x, rival(x)) if way == "bwd" else x

    def run(state: Any) -> Tensor:
        if way == "fwd":
            return rival(state)
        x, out = state if way == "bwd" else (state, rival(state))
        return torch.autograd.grad(out, x, cotangent)[0]

    return prepare, run


def _error(out: Tensor, expected: Tensor) -> float:
    return float((out.double() - expected).abs().max() / expected.abs().max())


@pytest.fixture
def compare(benchmark: Any, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """Run one case; see `compare` below."""

    def compare(
        op: str,
        rivals: dict[str, Rival],
        x: Tensor,
        *,
        oracle: Rival,
        way: str = "fwd",
        moved: int = 0,
        products: tuple[int, int, int] | None = None,
        floor: Rival | None = None,
        other: dict[str, Rival] | None = None,
        tolerance: dict[str, float] | None = None,
        ours: str | None = None,
        items: int = 0,
        clock: Callable[[], float] = time.perf_counter,
        **sizes: Any,
    ) -> None:
        """Check the rivals, time them in turns, and keep a row for the table.

        Args:
            op: what is compared; with `sizes` it names the case.
            rivals: name -> function of x. The default backend is among them.
            x: the input, of which copies rotate.
            oracle: the function they must agree with, called in float64.
            way: "fwd", "bwd" (its forward pass is not timed) or "fwd+bwd" (the gradient of x).
            moved: bytes read and written; the floor copies as many.
            products: (rows, keys, D); the floor is the two products of `_products`.
            floor: the floor, where it is neither.
            other: name -> the oracle of a rival with another definition.
            tolerance: name -> largest error, where it isn't that of the dtype.
            ours: the rival that the others are compared with, where it is no backend.
            clock: the seconds that are compared.
            items: in x; where it is given, the table has a column of how many a second.
        """
        ours = ours or choose(op, "auto", torch.empty(0, device=DEVICE))
        exact = x.double() if x.is_floating_point() else x
        cotangent = None
        if way != "fwd":
            with torch.no_grad():
                out = oracle(exact)
            cotangent = torch.randn_like(out, dtype=x.dtype) if out.ndim else None

        def expect(oracle: Rival) -> Tensor:
            prepare, run = _stages(oracle, way, None if cotangent is None else cotangent.double())
            return run(prepare(exact)).double()

        common = expect(oracle)
        stages: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {}
        errors: dict[str, float] = {}
        failed: dict[str, str] = {}
        for name, rival in rivals.items():
            prepare, run = _stages(rival, way, cotangent)
            try:
                out = run(prepare(x))
            except Exception as error:  # a peer that can't run here (dtype, compiler, memory) is named in the table
                if name in BACKENDS or name == ours:
                    raise
                failed[name] = (str(error).strip() or type(error).__name__).splitlines()[0]
                continue
            expected = expect(other[name]) if name in (other or {}) else common
            errors[name] = _error(out, expected)
            limit = (tolerance or {}).get(name, TOLERANCE.get(x.dtype, 1e-4))
            assert errors[name] <= limit, f"{name}: relative error {errors[name]:.1e}, at most {limit:.0e}"
            stages[name] = prepare, run
        if floor is not None:
            stages = {"floor": _stages(floor, way, cotangent)} | stages
        else:
            bare = _copy(moved, x.dtype) if moved else _products(*products, x.dtype)
            stages = {"floor": (lambda x: x, lambda x: bare())} | stages

        copies = 2 + _cache_bytes() // (x.numel() * x.element_size())
        inputs: Iterator[Tensor] = itertools.cycle([x.clone() for _ in range(copies)])
        times: dict[str, list[float]] = {name: [] for name in stages}

        def run(name: str, state: Any) -> None:
            begin = clock()
            stages[name][1](state)
            _synchronize()
            times[name].append(clock() - begin)

        def turn(name: str) -> None:
            state = stages[name][0](next(inputs))
            _synchronize()
            run(name, state)

        memory = {name: _extra_memory(lambda name=name: turn(name)) for name in stages}
        once = sum(taken.pop() for taken in times.values())
        rest = [name for name in stages if name != ours]

        def setup() -> tuple[tuple[str, Any], dict[str, Any]]:
            for name in random.sample(rest, len(rest)):
                turn(name)
            state = stages[ours][0](next(inputs))
            _synchronize()
            return (ours, state), {}

        rounds = min(max(int(request.config.getoption("--seconds") / once), LEAST_ROUNDS), MOST_ROUNDS)
        benchmark.pedantic(run, setup=setup, rounds=rounds)
        ms = {name: 1e3 * median(taken) for name, taken in times.items()}
        flops = 4 * products[0] * products[1] * products[2] if products else 0
        row = {
            "op": op,
            "way": way,
            "dtype": str(x.dtype).removeprefix("torch."),
            **sizes,
            "bytes": moved,
            "flops": flops,
            "threads": torch.get_num_threads(),
            "rounds": rounds,
            "default": ours,
            "rivals": {
                name: {
                    "ms": ms[name],
                    "fastest_ms": 1e3 * min(times[name]),
                    "items_a_second": 1e3 * items / ms[name] if items else None,
                    "of_floor": ms[name] / ms["floor"],
                    "of_default": ms[name] / ms[ours],
                    "error": errors.get(name),
                    "extra_mib": None if memory[name] is None else memory[name] / 2**20,
                }
                for name in stages
            },
            "failed": failed,
        }
        benchmark.group = op
        benchmark.extra_info |= row
        request.config.stash[_rows].append(row)
        with capsys.disabled():
            place = request.session.items.index(request.node) + 1
            _write_line(request.config, f"[{place}/{len(request.session.items)}] {_progress(row)}")

    return compare


# ---------------------------------------------------------------- the table


def _machine() -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    versions = {d.name: d.version for d in importlib.metadata.distributions() if d.name in PACKAGES}
    return {
        "cpu": model.group(1) if model else platform.processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if DEVICE.type == "cuda" else None,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": versions,
        "command": shlex.join(["pytest", *sys.argv[1:]]),
    }


def _title(row: dict[str, Any]) -> str:
    """What a case is, in words: the operation, the way and its sizes."""
    beside = ("bytes", "flops", "threads", "rounds", "default", "rivals", "failed")
    return " ".join(
        str(value) if key in ("op", "way", "dtype") else f"{key}={value}"
        for key, value in row.items()
        if key not in beside
    )


def _best_peer(row: dict[str, Any]) -> str | None:
    """The fastest rival that is neither the floor nor a backend of this package, in any of its ways."""
    ours = ("floor", row["default"], *BACKENDS)
    peers = [name for name in row["rivals"] if name.partition(",")[0] not in ours]
    return min(peers, key=lambda name: row["rivals"][name]["ms"], default=None)


def _progress(row: dict[str, Any]) -> str:
    """A case in a line: the default backend beside the floor and the fastest of the peers."""
    rivals, ours, peer = row["rivals"], row["default"], _best_peer(row)
    line = f"{_title(row)}: {ours} {rivals[ours]['ms']:.3g} ms, {rivals[ours]['of_floor']:.2f} x floor"
    return line if peer is None else f"{line}; {peer} {rivals[peer]['of_default']:.2f} x that"


def _summary(rows: list[dict[str, Any]]) -> list[list[str]]:
    """A heading, and a line a case: ours, the floor, the fastest peer, and how many times ours it takes."""
    table = [["case", "ours", "ms", "floor ms", "best peer", "ms", "peer / ours"]]
    for row in rows:
        rivals, peer = row["rivals"], _best_peer(row)
        ours, floor = rivals[row["default"]], rivals["floor"]
        best = ["", "", ""] if peer is None else [peer, *(format(rivals[peer][key], form) for key, form in _PEER)]
        table.append([_title(row), row["default"], f"{ours['ms']:.3g}", f"{floor['ms']:.3g}", *best])
    return table


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _markdown(machine: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    summary = _summary(rows)
    rated = any(rival["items_a_second"] for row in rows for rival in row["rivals"].values())
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, {machine['capability']}; "
        f"{machine['gpu'] or 'no GPU'}. Python {machine['python']}, {packages}.",
        "",
        f"`{machine['command']}`",
        "",
        "Medians of rounds in which every rival runs once.",
        "",
        *(f"| {' | '.join(line)} |" for line in summary[:1]),
        "|---|---|--:|--:|---|--:|--:|",
        *(f"| {' | '.join(line)} |" for line in summary[1:]),
        "",
        "Every rival; the default backend is in bold.",
        "",
        "| case | rival | ms | × floor | × default | error | extra MiB |" + " items a second |" * rated,
        "|---|---|--:|--:|--:|--:|--:|" + "--:|" * rated,
    ]
    for row in rows:
        title = _title(row) + f" threads={row['threads']}" * (row["threads"] != machine["threads"])
        cost = (
            f"{row['bytes'] / 1e6:.1f} MB" if row["bytes"] else f"{row['flops'] / 1e9:.1f} GFLOP" * bool(row["flops"])
        )
        for name, rival in row["rivals"].items():
            label = f"**{name}**" if name == row["default"] else f"floor ({cost})" if name == "floor" and cost else name
            lines.append(
                f"| {title} | {label} | {rival['ms']:.3g} | {rival['of_floor']:.2f} | "
                f"{rival['of_default']:.2f} | {_number(rival['error'], '.0e')} | {_number(rival['extra_mib'], '.0f')} |"
                + f" {_number(rival['items_a_second'], '.0f')} |"
                * rated
            )
        lines += [
            f"| {title} | {name} | does not run: {why[:80].replace('|', '/')} | | | | |"
            for name, why in row["failed"].items()
        ]
    return "\n".join(lines) + "\n"


def _results(config: pytest.Config, kind: str) -> Path:
    return RESULTS / f"{config.getoption('--results')}.{kind}"


def pytest_sessionfinish(session: pytest.Session) -> None:
    rows, config = session.config.stash[_rows], session.config
    if rows:
        machine = _machine()
        RESULTS.mkdir(exist_ok=True)
        _results(config, "json").write_text(json.dumps({"machine": machine, "cases": rows}, indent=1) + "\n")
        _results(config, "md").write_text(_markdown(machine, rows))


def pytest_terminal_summary(config: pytest.Config) -> None:
    if config.stash[_rows]:
        table = _summary(config.stash[_rows])
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        for line in table:
            words = [
                line[0].ljust(widths[0]),
                *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)),
            ]
            _write_line(config, "  ".join(words))
        _write_line(config, f"{len(config.stash[_rows])} cases: {_results(config, 'md')}, and the same as .json")
