"""Packages and the native extension; everything else is in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

SOURCES = ["csrc/bindings.cpp", *sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp"))]
HEADERS = sorted(str(path) for pattern in ("*.h", "*.inc") for path in Path("csrc/cpu").glob(pattern))

setup(
    packages=[*find_packages(include=["ser_fast", "ser_fast.*"]), "ser_fast.kernels"],
    package_dir={"ser_fast.kernels": "kernels"},
    ext_modules=[
        CppExtension(
            "ser_fast._C",
            SOURCES,
            depends=HEADERS,
            include_dirs=[str(Path(__file__).resolve().parent / "csrc")],
            # The stable ABIs of torch and (py_limited_api) Python: one wheel serves torch >= 2.10 and Python >= 3.10.
            extra_compile_args=[
                "-O3",
                "-std=c++20",
                "-DTORCH_TARGET_VERSION=0x020a000000000000",
            ],
            py_limited_api=True,
            optional=True,  # without a compiler the reference backend works; `ser-fast doctor` says what is missing
        )
    ],
    cmdclass={"build_ext": BuildExtension.with_options(use_ninja=False)},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
