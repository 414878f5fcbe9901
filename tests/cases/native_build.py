"""What tests compile: once for the same sources, flags and compiler, however many processes and runs ask for it."""

import fcntl
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import pytest

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
HOST_CUDA = ROOT / "tests" / "host_cuda"
INCLUDE = ("-I", CSRC, "-I", HOST_CUDA)
CI = "CI" in os.environ  # there nothing may be missing: instead of a skip the tests fail, and say what is

_CACHE = ROOT / "build" / "tests"


def missing(reason: str) -> NoReturn:
    pytest.fail(reason) if CI else pytest.skip(reason)


def run(*command: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, **options)


def compiled(sources: Sequence[Path], flags: Sequence[Any], link: Sequence[Any] = (), suffix: str = "") -> Path:
    """The program, or with `-shared` in `link` the library, that g++ makes of the sources without a warning.

    Skips where there is no g++.

    Args:
        sources: C++, whatever their names end in.
        flags: for the compiler and the linker.
        link: for the linker alone.
        suffix: what the file's name ends in.
    """
    if shutil.which("g++") is None:
        missing("no g++ here")

    def compiled_object(source: Path) -> Path:
        content = source.read_bytes() + _headers()
        return _cached(source.stem, content, ".o", ["-c", *flags, "-x", "c++", source])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled_object, sources))
    names = "".join(path.name for path in objects)
    return _cached(sources[-1].stem, names.encode(), suffix, [*flags, *objects, *link])


def module(name: str, sources: Sequence[Path], flags: Sequence[Any], link: Sequence[Any]) -> ModuleType:
    """The Python module `name` that the sources define with pybind11."""
    if importlib.util.find_spec("pybind11") is None:
        missing("pybind11 is not installed")
    folders = (importlib.import_module("pybind11").get_include(), sysconfig.get_paths()["include"])
    include = [flag for folder in folders for flag in ("-isystem", folder)]  # before the copy that torch has
    path = compiled(sources, [*include, *flags, "-fPIC", "-fvisibility=hidden"], ["-shared", *link], ".so")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    result = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(result)
    return result


@functools.cache
def reason_no_sanitizer(sanitizer: str) -> str | None:
    """Why programs with `-fsanitize=` do not build or run here; None if they do."""
    try:
        ran = run(compiled([ROOT / "tests" / "native" / "empty.cpp"], [f"-fsanitize={sanitizer}"]))
    except AssertionError as error:
        return f"no {sanitizer} sanitizer here: {error}"
    return None if ran.returncode == 0 else f"no {sanitizer} sanitizer here: {ran.stderr}"


def _cached(stem: str, content: bytes, suffix: str, arguments: Sequence[Any]) -> Path:
    """The file that g++ makes with the arguments; `content` is what they stand for, and with them names the file."""
    key = hashlib.sha256(repr((_compiler(), list(map(str, arguments)))).encode() + content).hexdigest()[:24]
    path = _CACHE / f"{stem}-{key}{suffix}"
    with _locked(path.with_name(f"{path.name}.lock")):
        if not path.exists():
            part = path.with_name(f"{path.name}.part")
            made = run("g++", *arguments, "-o", part)
            assert (made.returncode, made.stderr) == (0, ""), made.stderr
            part.replace(path)
    return path


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process, and one thread of it, at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # let go of when the file is closed
        yield


@functools.cache
def _compiler() -> str:
    return run("g++", "-v").stderr


@functools.cache
def _headers() -> bytes:
    """All that a source may include, in one digest."""
    digest = hashlib.sha256()
    for folder in (CSRC, HOST_CUDA):
        for path in sorted(p for p in folder.rglob("*") if p.suffix in (".h", ".cuh", ".inc")):
            digest.update(path.read_bytes())
    return digest.digest()
