"""Commands that show, write or explain what is there."""

from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console

from ser_fast.commands import say


def report(runs: tyro.conf.Positional[tuple[Path, ...]], out: Path = Path("runs/report.html")) -> None:
    """Compare runs in one HTML file: their curves, options, figures and every CSV file in their folders.

    Args:
        runs: folders of training runs, or any folders with CSV files.
        out: the file, which needs no other.
    """
    from ser_fast.report.comparison import write_report
    from ser_fast.report.runs import read_runs

    say(f"written: {write_report(read_runs(runs), out)}")


def export(
    run: tyro.conf.Positional[Path], format: Literal["timm", "onnx", "torch"] = "onnx", out: Path | None = None
) -> None:
    """Write a run's encoder for another program, and compare it with the encoder.

    Args:
        run: its folder, or an encoder.safetensors.
        format: "timm", weights that plain timm loads, where the split is 0; "onnx"; "torch", a torch.export program.
        out: the file; default encoder_timm.safetensors, encoder.onnx or encoder.pt2 beside the weights.
    """
    from ser_fast.export import export as export_encoder

    say(f"written: {export_encoder(run, format, out)}")


def doctor() -> None:
    """What is installed and what can run here: versions, GPUs, and the backends of the kernels on each device."""
    from ser_fast.doctor import backend_tables, describe_machine

    for name, value in describe_machine().items():  # lines that an issue takes as they are
        say(f"{name:17} {value}")
    Console().print(*backend_tables())
