"""The operators called by their names, with arguments that don't fit: each call is refused, and none ends the process.

The calls are made in one process of their own (`cases.bad_calls`), so that the name of a call that ends it is known.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from ser_fast.ops.backends import reason_not

CALLS = Path(__file__).parent / "cases" / "bad_calls.py"
pytestmark = pytest.mark.skipif(reason_not("cpu", "cpu") is not None, reason="no native extension")


def outcomes(*arguments: str) -> dict[str, str]:
    """What came of each call."""
    program = f"import sys; sys.path.insert(0, {str(CALLS.parents[1])!r}); from cases.bad_calls import main; main()"
    run = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    lines = run.stdout.splitlines()
    assert run.returncode == 0, f"ended with {run.returncode} in: {lines[-1] if lines else run.stderr}\n{run.stderr}"
    # Names have colons, outcomes begin with a word that none of them has.
    split = [line.partition(": raised ") if ": raised " in line else line.partition(": returned") for line in lines]
    return {name: outcome or "returned" for name, _, outcome in split}


@pytest.mark.parametrize("kernels", [(), pytest.param(("host",), marks=pytest.mark.slow)], ids=["cpu", "cuda"])
def test_calls_that_do_not_fit_are_refused(kernels: tuple[str, ...]) -> None:
    found = outcomes(*kernels)
    right = {name: outcome for name, outcome in found.items() if name.endswith(", right")}
    assert set(right.values()) == {"returned"}, right
    taken = [name for name, outcome in found.items() if outcome == "returned" and name not in right]
    assert taken == []
    assert len(found) > 100
