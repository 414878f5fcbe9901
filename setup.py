"""Packages and the native extensions; everything else is in pyproject.toml.

ser_fast._C has the operators' schemas and the CPU kernels, ser_fast._C_cuda the CUDA kernels; the latter is built where
nvcc and the torch at hand are of one major release of CUDA. Environment variables:

    SER_FAST_REQUIRE_NATIVE=1   a failed build is an error; otherwise it is a warning, and what works goes in
    SER_FAST_CUDA               0 leaves the CUDA kernels out, 1 makes it an error if they can't be built
    TORCH_CUDA_ARCH_LIST        the GPUs to compile for; default: 8.0;9.0;10.0+PTX
    MAX_JOBS                    how many sources are compiled at a time; default: one a core
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import find_packages, setup
from setuptools.errors import CompileError


def nvcc_output(*arguments: str) -> str:
    """What nvcc prints; nothing where there is none."""
    nvcc = shutil.which(
        "nvcc", path=os.path.join(os.environ["CUDA_HOME"], "bin") if "CUDA_HOME" in os.environ else None
    )
    if nvcc is None:
        return ""
    result = subprocess.run([nvcc, *arguments], capture_output=True, text=True, check=False)
    return result.stdout + result.stderr


# The nvcc on the path may be a link or a script; torch, when it is imported, wants the folder of the toolkit.
toolkit = re.search(r"_HERE_=(.+)", nvcc_output("--dryrun", "-x", "cu", os.devnull))
if toolkit:
    os.environ["CUDA_HOME"] = str(Path(toolkit[1]).parent)
os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0+PTX")
os.environ.setdefault("MAX_JOBS", str(os.cpu_count() or 1))
# torch looks for ninja on the path, where an environment that is not activated is not.
os.environ["PATH"] = os.pathsep.join((os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")))

import torch  # noqa: E402
from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension  # noqa: E402

REQUIRED = os.environ.get("SER_FAST_REQUIRE_NATIVE", "0") not in ("", "0")
# Code of one major release of CUDA does not link with a torch of another.
release = re.search(r"release (\d+)", nvcc_output("--version"))
WITH_CUDA = torch.version.cuda is not None and release is not None and release[1] == torch.version.cuda.split(".")[0]
asked = os.environ.get("SER_FAST_CUDA", "")
if asked == "1" and not WITH_CUDA:
    sys.exit(f"SER_FAST_CUDA: got 1, takes an nvcc of torch's release of CUDA, which is {torch.version.cuda}")
WITH_CUDA = WITH_CUDA and asked != "0"
# The stable ABIs of torch and (py_limited_api) Python: one wheel serves torch >= 2.10 and Python >= 3.10.
FLAGS = ["-O3", "-std=c++20", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
HEADERS = [str(path) for pattern in ("*.h", "*.inc", "*.cuh") for path in sorted(Path("csrc").rglob(pattern))]


def sources(folder: str, suffix: str) -> list[str]:
    return [str(path) for path in sorted(Path("csrc", folder).glob(f"*{suffix}"))]


def extension(build: Any, name: str, files: list[str], flags: list[str]) -> Any:
    return build(
        name,
        files,
        depends=HEADERS,
        include_dirs=[str(Path(__file__).resolve().parent / "csrc")],
        extra_compile_args={"cxx": [*flags, "-g0"], "nvcc": FLAGS},
        extra_link_args=["-Wl,-s"] if sys.platform == "linux" else [],
        py_limited_api=True,
        optional=not REQUIRED,  # without a compiler the reference backend works; `ser-fast doctor` says what is missing
    )


class Build(BuildExtension):
    """What torch raises becomes an error that setuptools knows: of an optional extension, a warning."""

    def build_extension(self, ext: Any) -> None:
        try:
            super().build_extension(ext)
        except (RuntimeError, OSError) as error:
            hint = f"{ext.name} is left out; SER_FAST_REQUIRE_NATIVE=1 makes this an error"
            raise CompileError(f"{error}\n{hint}") from error


extensions = [extension(CppExtension, "ser_fast._C", ["csrc/bindings.cpp", *sources("cpu", ".cpp")], FLAGS)]
if WITH_CUDA:
    # USE_CUDA uncovers torch's declarations for CUDA.
    files = ["csrc/bindings_cuda.cpp", *sources("cuda", ".cu")]
    extensions.append(extension(CUDAExtension, "ser_fast._C_cuda", files, [*FLAGS, "-DUSE_CUDA"]))

setup(
    packages=[*find_packages(include=["ser_fast", "ser_fast.*"]), "ser_fast.kernels"],
    package_dir={"ser_fast.kernels": "kernels"},
    ext_modules=extensions,
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
