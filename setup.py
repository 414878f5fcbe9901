"""Packages and the native extension; everything else is in pyproject.toml."""

import os
import re
import shutil
import subprocess
from pathlib import Path

from setuptools import find_packages, setup


def nvcc_says(*arguments: str) -> str:
    """What nvcc prints; nothing where there is none."""
    nvcc = shutil.which(
        "nvcc", path=os.path.join(os.environ["CUDA_HOME"], "bin") if "CUDA_HOME" in os.environ else None
    )
    if nvcc is None:
        return ""
    result = subprocess.run([nvcc, *arguments], capture_output=True, text=True, check=False)
    return result.stdout + result.stderr


# The nvcc on the path may be a link or a script; torch, when it is imported, wants the folder of the toolkit.
where = re.search(r"_HERE_=(.+)", nvcc_says("--dryrun", "-x", "cu", os.devnull))
if where:
    os.environ["CUDA_HOME"] = str(Path(where[1]).parent)
os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0+PTX")

import torch  # noqa: E402
from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension  # noqa: E402

# Code of one major release of CUDA does not link with a torch of another.
release = re.search(r"release (\d+)", nvcc_says("--version"))
WITH_CUDA = torch.version.cuda is not None and release is not None and release[1] == torch.version.cuda.split(".")[0]
ROOMS = ("cpu", "cuda") if WITH_CUDA else ("cpu",)
BINDINGS = ["csrc/bindings.cpp", *(["csrc/bindings_cuda.cpp"] if WITH_CUDA else [])]
SOURCES, HEADERS = (
    sorted(str(path) for room in ROOMS for path in Path("csrc", room).glob("*") if path.suffix in suffixes)
    for suffixes in ((".cpp", ".cu"), (".h", ".inc"))
)
# The stable ABIs of torch and (py_limited_api) Python: one wheel serves torch >= 2.10 and Python >= 3.10.
FLAGS = ["-O3", "-std=c++20", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
# USE_CUDA uncovers torch's declarations for CUDA.
CUDA_FLAGS = ["-DUSE_CUDA"] if WITH_CUDA else []

setup(
    packages=[*find_packages(include=["ser_fast", "ser_fast.*"]), "ser_fast.kernels"],
    package_dir={"ser_fast.kernels": "kernels"},
    ext_modules=[
        (CUDAExtension if WITH_CUDA else CppExtension)(
            "ser_fast._C",
            [*BINDINGS, *SOURCES],
            depends=["csrc/bindings.h", *HEADERS],
            include_dirs=[str(Path(__file__).resolve().parent / "csrc")],
            extra_compile_args={"cxx": FLAGS + CUDA_FLAGS, "nvcc": FLAGS},
            py_limited_api=True,
            optional=True,  # without a compiler the reference backend works; `ser-fast doctor` says what is missing
        )
    ],
    cmdclass={"build_ext": BuildExtension.with_options(use_ninja=False)},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
