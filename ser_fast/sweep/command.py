"""The command line of `ser-fast sweep`: its own options, and all of `ser-fast train`."""

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ser_fast.sweep.cells import make_cells

_ABOUT = """Train with several values of some options and several seeds, and say which differences are more than chance.

  ser-fast sweep --vary ser.weight 0 0.1 1 --vary ser.layers 1 2,4 --seeds 3 --optim.steps 300 --data photos
  ser-fast sweep --cell base --cell last ser.layers=last --cell "AugSelf at 3" ser.layers=off augself.layers=3

The first trains all combinations, the second what is named; both can be given. Other options are those of
`ser-fast train`, for all cells. A call that was stopped goes on; cells and seeds can be added later."""


def parse(arguments: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """The arguments for `ser-fast train`, and those of `run_sweep`.

    Raises:
        ValueError: cells that don't fit.
        SystemExit: an option that can't be read, or help.
    """
    parser = ArgumentParser(
        prog="ser-fast sweep", description=_ABOUT, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add(
        "--vary",
        nargs="+",
        action="append",
        default=[],
        metavar=("OPTION", "VALUE"),
        help="an option and its values; several values at once are parted by commas",
    )
    add("--cell", nargs="+", action="append", default=[], metavar=("NAME", "OPTION=VALUE"), help="one more cell")
    add("--seeds", type=int, default=3, help="runs of each cell (%(default)s)")
    add("--baseline", metavar="NAME", help="the cell that others are compared with; default the first")
    add("--layer", type=int, help="whose errors are compared, besides the last one's; default the split")
    add("--train-images", type=int, default=5000, help="training images that vote for kNN (%(default)s)")
    add("--test-images", type=int, default=2000, help="held-out images that are classified (%(default)s)")
    add("--images", type=int, default=256, help="held-out images that errors are measured on (%(default)s)")
    add("--processes", type=int, default=1, help="runs at a time (%(default)s)")
    add("--ranks", type=int, default=1, help="of each run, under torchrun (%(default)s)")
    add(
        "--out",
        type=Path,
        default=Path("runs/sweep"),
        help="folder for the runs, sweep.csv and report.html (%(default)s)",
    )
    own, shared = parser.parse_known_args(arguments)
    options = vars(own)
    options["cells"] = make_cells(options.pop("vary"), options.pop("cell"))
    counts = {"train": "train_images", "test": "test_images", "equivariance": "images"}
    return shared, options | {name: options.pop(given) for name, given in counts.items()}
