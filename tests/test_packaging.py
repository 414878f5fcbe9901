"""What an installation takes, and what is said where something is missing: extras, the source distribution, wheels."""

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterable
from pathlib import Path

import pytest
from cases.native_build import ROOT, missing, run
from setuptools.compat.py310 import tomllib

from ser_fast import extras
from ser_fast.extras import EXTRAS

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PINS = ("constraints.txt", "constraints-newest.txt")
CORE = {"torch", "numpy", "triton"}
# Where a distribution's name is not the module's.
IMPORTED_AS = {"pillow": "PIL", "pyyaml": "yaml", "scikit-image": "skimage"}


def without(names: Iterable[str], program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the program as where the modules of these names are not installed."""
    blocked = f"import sys\nsys.modules.update(dict.fromkeys({list(names)}))\n"
    command = [sys.executable, "-c", blocked + program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def distributions(requirements: Iterable[str]) -> set[str]:
    """The modules that the requirements are imported by, without extras of this package itself."""
    names = {re.match(r"[\w.-]+", requirement)[0] for requirement in requirements}
    return {IMPORTED_AS.get(name, name) for name in names - {"ser-fast"}}


def test_the_core_is_torch_numpy_and_triton() -> None:
    assert distributions(PROJECT["dependencies"]) == CORE


def test_the_extras_are_those_that_messages_name() -> None:
    optional = PROJECT["optional-dependencies"]
    others = {"all", "bench", "docs", "examples", "test"}
    assert {"train", "eval", "export", "hf", "wandb", "webdataset"} | others == optional.keys()
    for extra, modules in EXTRAS.items():
        assert distributions(optional[extra]) <= set(modules)
    for extra in optional.keys() - others:
        assert re.search(rf"\W{extra}\W", str(optional["all"])), extra


def test_the_changelog_begins_with_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (.+)", text, re.MULTILINE)[0] == PROJECT["version"]


def test_both_sets_of_versions_pin_the_same_packages() -> None:
    pins = [re.findall(r"^[\w-]+", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE) for name in PINS]
    assert pins[0] == pins[1]
    assert {"torch", "torchvision", "triton", "numpy", "timm"} <= set(pins[0])


def test_the_oldest_versions_are_the_lower_bounds() -> None:
    optional = PROJECT["optional-dependencies"]
    requirements = [*PROJECT["dependencies"], *(each for extra in EXTRAS for each in optional[extra])]
    bounds = re.findall(r"^([\w-]+)>=([\w.]+)", "\n".join(requirements), re.MULTILINE)
    text = (ROOT / "constraints-oldest.txt").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^([\w-]+)==([\w.]+)$", text, re.MULTILINE)) == sorted(bounds)


def test_every_import_is_of_the_core_or_an_extra() -> None:
    known = {"ser_fast", "markupsafe", "mpl_toolkits", *CORE, *sys.stdlib_module_names}.union(*EXTRAS.values())
    files = [path for folder in ("ser_fast", "kernels") for path in (ROOT / folder).rglob("*.py")]
    unknown = set()
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            else:
                continue
            unknown |= {f"{path.name}: {name}" for name in names if name.partition(".")[0] not in known}
    assert not unknown


LOSS = """
import torch
from ser_fast import LatticeMap, SERLoss
torch.manual_seed(0)
ser = SERLoss(dim=16, hidden_dim=8, out_dim=8)
g0, g1 = LatticeMap.resize((4, 4), (3, 4), batch=2), LatticeMap.rot90((4, 4), torch.tensor([1, 2]))
tokens = torch.randn(2, 3, 4, 16, requires_grad=True)
ser(tokens, torch.randn(2, 4, 4, 16), g0, g1).backward()
assert tokens.grad.abs().sum() > 0
print("done")
"""


def test_the_loss_needs_no_extra() -> None:
    done = without([name for names in EXTRAS.values() for name in names], LOSS)
    assert (done.stdout, done.stderr) == ("done\n", "")


def test_training_needs_no_other_extra() -> None:
    others = [name for extra, names in EXTRAS.items() if extra != "train" for name in names]
    done = without(
        others, "import ser_fast.data.shards, ser_fast.data.sources, ser_fast.training.trainer, ser_fast.vit"
    )
    assert (done.returncode, done.stderr) == (0, "")


RUN = "from ser_fast import cli\nsys.argv[0] = 'ser-fast'\ncli.main()\n"


@pytest.mark.parametrize(
    ("missing", "extra", "command"),
    [
        ("tyro", "train", "train"),
        ("rich", "train", "doctor"),
        ("scipy", "eval", "linear"),
        ("jinja2", "eval", "report"),
    ],
)
def test_a_command_whose_extra_is_missing_names_it(missing: str, extra: str, command: str) -> None:
    done = without([missing], RUN, command, *(["x"] if extra == "eval" else []))
    line = f"ser-fast: {missing} is not installed, which this command takes: pip install 'ser-fast[{extra}]'\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", line)


def test_a_module_of_no_extra_stays_an_error() -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such"):
        extras.advice(ModuleNotFoundError("No module named 'no_such'", name="no_such"))


# ---------------------------------------------------------------- the source distribution and the wheels

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
# What is in the tree and in no distribution.
MADE = ("*.so", "__pycache__", ".*", "build", "dist", "runs", "*.egg-info", "local.*")
USE = """
import sys
# An editable installation would lend the wheel what it lacks.
sys.meta_path[:] = [each for each in sys.meta_path if "editable" not in getattr(each, "__module__", "")]
import importlib.util, torch
import ser_fast
from ser_fast import LatticeMap, SERLoss
from ser_fast.ops.backends import reason_not
print(ser_fast.__file__)
print(reason_not("cuda", "cuda"))
if importlib.util.find_spec("ser_fast._C_cuda"):
    import ser_fast._C_cuda  # it loads where there is no GPU, too
print(reason_not("cpu", "cpu"))
g0, g1 = LatticeMap.resize((4, 4), (3, 4), batch=2), LatticeMap.rot90((4, 4), torch.tensor([1, 2]))
x, y = torch.randn(2, 3, 4, 16), torch.randn(2, 4, 4, 16)
losses = []
for backend in ("cpu", "reference"):
    torch.manual_seed(0)
    losses.append(SERLoss(dim=16, hidden_dim=8, out_dim=8, backend=backend)(x, y, g0, g1))
print(torch.allclose(*losses))
"""


@pytest.fixture
def copied(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A copy of the tree without git, and an environment in which there is no nvcc."""
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*MADE))
    folders = [folder for folder in os.environ["PATH"].split(os.pathsep) if not (Path(folder) / "nvcc").exists()]
    environment = os.environ | {"PATH": os.pathsep.join(folders)}
    environment.pop("CUDA_HOME", None)
    return source, environment


@pytest.mark.slow
@pytest.mark.parametrize("required", ["0", "1"])
def test_a_build_that_fails_is_an_error_where_it_was_asked_for(
    copied: tuple[Path, dict[str, str]], required: str
) -> None:
    source, environment = copied
    for path in source.glob("csrc/**/*.cpp"):
        path.write_text("#error this does not compile\n")
    environment["SER_FAST_REQUIRE_NATIVE"] = required
    built = run(sys.executable, "setup.py", "build_ext", cwd=source, env=environment)
    assert built.returncode == int(required), built.stdout + built.stderr
    assert "this does not compile" in built.stdout + built.stderr
    assert "ser_fast._C is left out" in built.stderr


@pytest.mark.slow
def test_cuda_that_was_asked_for_is_an_error_without_nvcc(copied: tuple[Path, dict[str, str]]) -> None:
    source, environment = copied
    built = run(sys.executable, "setup.py", "--version", cwd=source, env=environment | {"SER_FAST_CUDA": "1"})
    assert built.returncode != 0
    assert built.stderr.splitlines()[-1].startswith("SER_FAST_CUDA: got 1, takes an nvcc of torch's release of CUDA")


def used(wheel: Path, tmp_path: Path) -> list[str]:
    """What the program prints with the wheel installed in a folder of its own, away from the sources."""
    elsewhere = tmp_path / "elsewhere"
    installed = run(*PIP, "install", "--target", elsewhere, "--no-deps", wheel)
    assert installed.returncode == 0, installed.stderr
    done = run(sys.executable, "-c", USE, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(elsewhere)})
    assert (done.returncode, done.stderr) == (0, "")
    where, *rest = done.stdout.splitlines()
    assert where.startswith(str(elsewhere))
    return rest


@pytest.mark.slow
def test_the_source_distribution_is_whole_and_makes_a_wheel(
    copied: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    """Packed without nvcc or git: every source, test and golden file. The wheel that it makes there works elsewhere."""
    source, environment = copied
    files = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    packed = run(sys.executable, "setup.py", "sdist", cwd=source, env=environment)
    assert packed.returncode == 0, packed.stderr
    (archive,) = (source / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as file:
        inside = {name.partition("/")[2] for name in file.getnames()}
    assert not files - inside
    options = ["--no-build-isolation", "--no-deps", "-w", tmp_path]
    built = run(*PIP, "wheel", archive, *options, env=environment | {"SER_FAST_REQUIRE_NATIVE": "1"})
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert "-cp310-abi3-" in wheel.name
    cuda, cpu, equal = used(wheel, tmp_path)
    assert cuda == "the native extension ser_fast._C_cuda was not built"
    assert (cpu, equal) == ("None", "True")


@pytest.mark.slow
def test_a_wheel_with_the_cuda_kernels_works_away_from_the_sources(tmp_path: Path) -> None:
    """Its extensions are those that the tree has: they take minutes to build."""
    built = [path for name in ("_C", "_C_cuda") if (path := native(name)) is not None]
    if len(built) < 2:
        missing("the CUDA kernels were not built here")
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*MADE))
    (tmp_path / "lib" / "ser_fast").mkdir(parents=True)
    for path in built:
        shutil.copyfile(path, tmp_path / "lib" / "ser_fast" / path.name)
    (tmp_path / "extra.cfg").write_text(f"[build]\nbuild_lib = {tmp_path / 'lib'}\n")
    command = ["setup.py", "build_py", "bdist_wheel", "--skip-build", "--dist-dir", tmp_path]
    packed = run(
        sys.executable, *command, cwd=source, env=os.environ | {"DIST_EXTRA_CONFIG": str(tmp_path / "extra.cfg")}
    )
    assert packed.returncode == 0, packed.stderr
    (wheel,) = tmp_path.glob("*.whl")
    cuda, cpu, equal = used(wheel, tmp_path)
    assert "was not built" not in cuda
    assert "does not load" not in cuda
    assert (cpu, equal) == ("None", "True")


def native(name: str) -> Path | None:
    """The extension in the installation at hand."""
    spec = importlib.util.find_spec(f"ser_fast.{name}")
    return Path(spec.origin) if spec is not None and spec.origin is not None else None
