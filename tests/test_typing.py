"""What a user's type checker sees of the public API."""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import ser_fast

ROOT = Path(__file__).parents[1]
PROGRAM = '''
"""Every public function, as a user calls it; with --strict an Any that is returned is an error, too."""

import torch
from torch import Tensor
from typing_extensions import assert_type

from ser_fast import LatticeMap, SERLoss, __version__, group_action, info_nce, nt_xent


def maps(batch: int) -> tuple[LatticeMap, LatticeMap]:
    turns = LatticeMap.rot90((14, 14), torch.randint(4, (batch,)))
    resized = LatticeMap.resize((14, 14), (12, 16), batch=batch) @ turns
    return assert_type(turns.inverse(), LatticeMap), LatticeMap.relative(turns, resized).to("cpu")


def moved(x: Tensor, g: LatticeMap) -> Tensor:
    out, valid = group_action(x, g, return_valid=True)
    assert_type(out, Tensor)
    assert_type(valid, Tensor)
    assert_type(group_action(x, g, interpolation="bilinear", padding="zeros", antialias=True), Tensor)
    return group_action(x, g, return_valid=False, backend="auto")


def moved_with_flag(x: Tensor, g: LatticeMap, return_valid: bool) -> Tensor:
    out = group_action(x, g, return_valid=return_valid)
    return out[0] if isinstance(out, tuple) else out


def contrast(z0: Tensor, z1: Tensor, image: Tensor) -> Tensor:
    both = nt_xent(z0, z1, temperature=0.3, image=image, valid=None, reduction="mean", normalize=True)
    one = info_nce(z0, z1.detach(), temperature=0.3, image=image, key_image=image)
    return assert_type(both, Tensor) + assert_type(one, Tensor)


def loss(tokens0: Tensor, tokens1: Tensor, g0: LatticeMap, g1: LatticeMap) -> Tensor:
    ser = SERLoss(dim=384, preset="paper", temperature=0.5)
    return ser(tokens0, tokens1, g0, g1)


assert_type(__version__, str)
'''


@pytest.mark.slow
def test_a_strict_type_checker_accepts_calls_of_the_public_api(tmp_path: Path) -> None:
    """The sources stand where pip would put them: with py.typed, and with the kernels inside."""
    package = tmp_path / "installed" / "ser_fast"
    package.mkdir(parents=True)
    for source in (*(ROOT / "ser_fast").iterdir(), ROOT / "kernels"):
        if not (package / source.name).exists():
            (package / source.name).symlink_to(source)
    program = tmp_path / "program.py"
    program.write_text(PROGRAM, encoding="utf-8")
    # Errors in the package itself are those of `make lint`, and silent here as in an installed one.
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--cache-dir", tmp_path / "cache"]
    done = subprocess.run(
        [*command, program],
        cwd=tmp_path,
        env=os.environ | {"MYPYPATH": str(package.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_package_says_that_it_is_typed_and_its_version() -> None:
    assert (Path(ser_fast.__file__).parent / "py.typed").is_file()
    assert ser_fast.__version__ == version("ser-fast")
