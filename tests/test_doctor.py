"""What `ser-fast doctor` says of the machine; tests/test_cli.py has what it says of the backends."""

import os
import platform
import sys
from pathlib import Path

import pytest
import timm
import torch
from cases.command_line import run_cli

import ser_fast
from ser_fast import doctor


def test_doctor_says_what_an_issue_needs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Versions, the state of both extensions and the driver, a line each; what is missing is said to be."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nprintf '580.65.06\\n580.65.06\\n'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(doctor, "PACKAGES", ("timm", "no-such-package"))
    monkeypatch.setattr(doctor, "EXTENSIONS", ("ser_fast.doctor", "ser_fast.demo", "ser_fast._no_such"))
    monkeypatch.delitem(sys.modules, "ser_fast.demo", raising=False)
    run_cli("doctor")
    shown = capsys.readouterr().out
    said = dict(line.split(maxsplit=1) for line in shown.splitlines() if line[:1].isalpha())
    assert said["ser-fast"] == ser_fast.__version__
    assert said["python"].startswith(platform.python_version())
    assert said["platform"] == platform.platform()
    assert said["torch"].startswith(torch.__version__)
    assert said["timm"] == timm.__version__
    assert said["no-such-package"] == "not installed"
    extensions = [said[name] for name in doctor.EXTENSIONS]
    assert extensions == ["built, loaded", "built, not loaded", "not built"]
    assert said["driver"] == "580.65.06"


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo no devices; echo at all >&2; exit 9", "nvidia-smi fails: at all, no devices"),
        ("exec sleep 60", "nvidia-smi does not answer: TimeoutExpired"),
    ],
)
def test_doctor_outlives_a_driver_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, said: str
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(doctor, "PATIENCE", 0.2)
    assert doctor.describe_machine()["driver"] == said
