"""What goes wrong around a run: damaged checkpoints, changed data, two runs in one folder, ranks that differ."""

import errno
import json
import multiprocessing
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases.runs import CPU, ENVIRONMENT, patterns, read_log, tiny_config
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data._utils import signal_handling

from ser_fast.data import pictures, sources
from ser_fast.io import write_atomically
from ser_fast.training import run_folder
from ser_fast.training.config import TrainConfig, to_json, with_options
from ser_fast.training.processes import stop_signals
from ser_fast.training.run_folder import CHECKPOINT_FORMAT, RunFolder, RunLog, load_checkpoint
from ser_fast.training.trainer import NonFiniteLossError, Trainer, train


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    """Of a run of 6 steps with a checkpoint every 2."""
    data = patterns(tmp_path / "images", 24)
    return with_options(tiny_config(tmp_path / "run", data), {"optim.steps": 6, "save_every": 2, "keep_checkpoints": 3})


@pytest.fixture
def done(config: TrainConfig) -> RunFolder:
    return RunFolder(train(config))


def flip_a_bit(path: Path, where: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(where * len(content))] ^= 0x40
    path.write_bytes(content)


# ---------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("damage", ["bit", "cut", "empty"])
def test_a_damaged_checkpoint_is_found_and_the_one_before_is_taken(
    config: TrainConfig, done: RunFolder, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    newest, weights = done.list_checkpoints()[-1], load_file(done.encoder)
    if damage == "bit":
        flip_a_bit(newest, 0.5)
    else:
        newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2 if damage == "cut" else 0])
    with pytest.raises(ValueError, match=f"resume: .*{newest.name}"):
        load_checkpoint(newest, CPU)
    train(replace(config, resume="auto"))
    shown = "".join(capsys.readouterr().out.split())
    assert newest.name in shown
    assert "goingonfromtheonebefore" in shown
    assert [line["step"] for line in read_log(done.path)] == [1, 2, 3, 4, 5, 6]
    for name, value in load_file(done.encoder).items():
        assert torch.equal(value, weights[name])


def test_only_damaged_checkpoints_are_no_beginning(config: TrainConfig, done: RunFolder) -> None:
    for path in done.list_checkpoints():
        flip_a_bit(path, 0.5)
    with pytest.raises(ValueError, match=r"resume: every checkpoint of .* is damaged"):
        train(replace(config, resume="auto"))


def test_a_pipe_in_the_place_of_a_checkpoint_is_not_waited_for(config: TrainConfig, done: RunFolder) -> None:
    done.list_checkpoints()[-1].unlink()
    os.mkfifo(done.checkpoints / "step_00000006.pt")
    notes = Trainer(with_options(config, {"resume": "auto"}), CPU).beginning.notes
    assert re.search(r"step_00000006\.pt .*not a regular file; going on from the one before", " ".join(notes))


def test_copies_of_checkpoints_are_the_users_own(config: TrainConfig, done: RunFolder) -> None:
    names = ["step_00000001_good.pt", "step_00000006_good.pt", "step_best.pt"]
    for name in names:
        shutil.copy(done.list_checkpoints()[-1], done.checkpoints / name)
    train(with_options(config, {"resume": "auto", "optim.steps": 10, "keep_checkpoints": 1}))
    there = sorted(path.name for path in done.checkpoints.glob("*.pt"))
    assert there == ["step_00000001_good.pt", "step_00000006_good.pt", "step_00000010.pt", "step_best.pt"]


def test_a_checkpoint_of_another_format_says_so(config: TrainConfig, done: RunFolder) -> None:
    path = done.list_checkpoints()[-1]
    torch.save({**torch.load(path), "format": CHECKPOINT_FORMAT + 1}, path)
    with pytest.raises(ValueError, match=f"has format {CHECKPOINT_FORMAT + 1}, this version reads {CHECKPOINT_FORMAT}"):
        train(replace(config, resume="auto"))


def test_a_checkpoint_without_a_newer_option_has_its_default(config: TrainConfig, done: RunFolder) -> None:
    path = done.list_checkpoints()[0]
    state = torch.load(path)
    del state["config"]["ser"]["max_tokens"]
    torch.save(state, path)
    Trainer(replace(config, resume=str(path)), CPU)
    with pytest.raises(ValueError, match=r"another ser\.max_tokens"):
        Trainer(with_options(config, {"ser.max_tokens": 9, "resume": str(path)}), CPU)
    state["config"]["ser"]["unheard_of"] = 1
    torch.save(state, path)
    with pytest.raises(ValueError, match="SERConfig has no unheard_of"):
        Trainer(replace(config, resume=str(path)), CPU)


@pytest.mark.parametrize("change", ["a shape", "a name", "the optimizer", "a step as text", "a later step"])
def test_a_checkpoint_that_does_not_fit_is_named(config: TrainConfig, done: RunFolder, change: str) -> None:
    path = done.list_checkpoints()[0]
    state, expected = torch.load(path), "does not hold the state of this model"
    weights = state["model"]
    if change == "a shape":
        weights["encoder.patch_embed.proj.bias"] = torch.zeros(3)
    elif change == "a name":
        del weights["encoder.patch_embed.proj.bias"]
    elif change == "the optimizer":
        state["optimizer"]["param_groups"][0]["params"].pop()
    elif change == "a step as text":
        state["step"], expected = "2", "is no checkpoint of this trainer"
    else:
        state["step"], expected = 10**6, "is of step 1000000, and the run has 6"
    torch.save(state, path)
    with pytest.raises(ValueError, match=rf"^resume: {path} {expected}") as error:
        train(replace(config, resume=str(path)))
    assert "\n" not in str(error.value)


def test_a_run_that_failed_goes_on_at_a_lower_rate(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says how, and it is so."""
    step, failing = Trainer.step, {"images": True}

    def not_finite(self: Trainer, number: int, epoch: int, images: torch.Tensor, *others: Any) -> Any:
        if number == 3 and failing["images"]:
            for parameter in self.model.objective.parameters():
                parameter.data.fill_(float("nan"))
        return step(self, number, epoch, images, *others)

    monkeypatch.setattr(Trainer, "step", not_finite)
    with pytest.raises(NonFiniteLossError, match=r"step_00000002\.pt; to go on, lower optim\.lr .* --resume-changed"):
        train(config)
    failing["images"] = False
    lower = with_options(config, {"resume": "auto", "optim.lr": 1e-3, "optim.clip_grad": 1.0})
    with pytest.raises(ValueError, match=r"another optim\.lr, optim\.clip_grad; --resume-changed"):
        train(lower)
    train(replace(lower, resume_changed=True))
    log = read_log(config.out)
    assert [line["step"] for line in log] == [1, 2, 3, 4, 5, 6]
    assert log[2]["lr"] < 1e-3 < 20 * log[1]["lr"]


def test_going_back_keeps_the_new_branch_and_sets_the_old_one_aside(config: TrainConfig, done: RunFolder) -> None:
    weights, back = load_file(done.encoder), done.checkpoints / "step_00000002.pt"
    part = with_options(config, {"resume": str(back), "keep_checkpoints": 1})
    trainer = Trainer(part, CPU)
    assert trainer.start == 2
    trainer.train()
    assert [path.name for path in done.list_checkpoints()] == ["step_00000006.pt"]
    aside = sorted(path.name for path in (done.checkpoints / "set_aside_1").iterdir())
    assert aside == ["step_00000004.pt", "step_00000006.pt"]
    for name, value in load_file(done.encoder).items():
        assert torch.equal(value, weights[name])


def test_a_checkpoint_is_not_continued_in_the_folder_of_another_run(config: TrainConfig, done: RunFolder) -> None:
    other = with_options(config, {"seed": 1, "out": config.out.with_name("other")})
    train(other)
    log = read_log(other.out)
    with pytest.raises(ValueError, match=r"out: .*other already holds a run"):
        train(with_options(config, {"out": other.out, "resume": str(done.list_checkpoints()[0])}))
    assert read_log(other.out) == log


def test_a_run_can_be_made_longer_and_not_shorter(config: TrainConfig, done: RunFolder) -> None:
    train(with_options(config, {"resume": "auto", "optim.steps": 8}))
    assert [line["step"] for line in read_log(done.path)] == list(range(1, 9))
    with pytest.raises(ValueError, match=r"another optim\.steps"):
        train(with_options(config, {"resume": "auto", "optim.steps": 7}))


def test_the_way_out_is_named_where_it_is_one(config: TrainConfig, done: RunFolder) -> None:
    (Path(config.data.removeprefix("folder:")) / "03.png").unlink()
    other = with_options(config, {"resume": "auto", "resume_changed": True, "seed": 5})
    with pytest.raises(ValueError, match=r"trained with another seed, data's files$"):
        Trainer(other, CPU)
    with pytest.raises(ValueError, match=r"continued by --out .*run --resume auto"):
        Trainer(with_options(config, {"resume": str(done.path), "out": config.out.with_name("new")}), CPU)


def test_a_link_to_nothing_is_skipped_and_named(config: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    (Path(config.data.removeprefix("folder:")) / "99.png").symlink_to("nowhere")
    train(with_options(config, {"optim.batch_size": 25, "optim.steps": 1}))
    assert "99.png" in "".join(capsys.readouterr().out.split())


# ---------------------------------------------------------------- the same run


@pytest.mark.parametrize("change", ["added", "removed", "replaced"])
def test_other_data_is_another_run(config: TrainConfig, done: RunFolder, change: str) -> None:
    folder = Path(config.data.removeprefix("folder:"))
    if change == "removed":
        (folder / "03.png").unlink()
    else:
        (folder / ("03.png" if change == "replaced" else "99.png")).write_bytes((folder / "04.png").read_bytes() + b" ")
    again = with_options(config, {"resume": str(done.list_checkpoints()[0])})
    with pytest.raises(ValueError, match="trained with another data's files; --resume-changed goes on all the same"):
        Trainer(again, CPU)
    assert Trainer(replace(again, resume_changed=True), CPU).start == 2


def test_data_that_moved_are_the_same(config: TrainConfig, done: RunFolder) -> None:
    folder = Path(config.data.removeprefix("folder:"))
    folder.rename(folder.with_name("moved"))
    moved = with_options(config, {"data": f"folder:{folder.with_name('moved')}", "resume": "auto"})
    assert Trainer(moved, CPU).start == 6


def test_another_number_of_ranks_is_another_run(config: TrainConfig, done: RunFolder) -> None:
    path = done.list_checkpoints()[0]
    torch.save({**torch.load(path), "world_size": 2}, path)
    again = with_options(config, {"resume": str(path)})
    with pytest.raises(ValueError, match=r"another number of ranks \(2\); --resume-changed"):
        Trainer(again, CPU)
    assert Trainer(replace(again, resume_changed=True), CPU).start == 2


def test_too_many_unreadable_images_stop_the_run(config: TrainConfig) -> None:
    folder = Path(config.data.removeprefix("folder:"))
    for number in range(8, 16):
        (folder / f"{number:02}.png").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"data: \d of 24 images can't be read by step \d.*max_skipped = 0.1"):
        train(config)
    train(with_options(config, {"out": config.out.with_name("tolerant"), "max_skipped": 0.5}))


def test_names_are_printed_as_they_are(config: TrainConfig, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = tmp_path / "a[" / "red]"
    patterns(folder, 24)
    (folder / "00.png").write_bytes(b"damaged")
    train(with_options(config, {"data": f"folder:{folder}", "out": tmp_path / "run[red]", "optim.steps": 3}))
    shown = "".join(capsys.readouterr().out.split())
    assert "a[/red]/00.png" in shown
    assert "run[red]" in shown


def test_names_of_images_need_not_be_text(config: TrainConfig, tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"im\xffages")
    patterns(folder, 24)
    (folder / os.fsdecode(b"a\xff.png")).write_bytes(b"damaged")
    changed = with_options(config, {"data": f"folder:{folder}", "optim.steps": 1, "optim.batch_size": 25})
    program = "import json, sys; from ser_fast.training.config import from_json; from ser_fast.training import trainer"
    program += "; trainer.train(from_json(json.loads(sys.argv[1])))"
    command = [sys.executable, "-c", program, json.dumps(to_json(changed))]
    ended = subprocess.run(command, env=ENVIRONMENT, capture_output=True, check=False)
    assert ended.returncode == 0, ended.stderr.decode(errors="replace")
    assert rb"a\udcff.png" in b"".join(ended.stdout.split())
    with pytest.raises(ValueError, match=r"^out: got .*, takes a name in UTF-8, as TensorBoard and torch.save do"):
        train(replace(config, out=tmp_path / os.fsdecode(b"run\xff")))


def test_files_that_mean_harm_are_skipped_and_named(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, programs = tmp_path / "mixed/ant", tmp_path / "programs"
    patterns(folder, 12)
    programs.mkdir()
    (programs / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path / 'ran'}\n")
    (programs / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    os.mkfifo(folder / "pipe.jpg")
    (folder / "itself.png").symlink_to(folder / "itself.png")
    (folder / "again").symlink_to(folder.parent)
    (folder / "zero.png").symlink_to("/dev/zero")
    (folder / "script.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n%%EOF\n")
    (folder / "cut.png").write_bytes((folder / "01.png").read_bytes()[:200])
    (folder / "a\x1b[31m[bold]b\x07.png").write_bytes(b"nothing")
    Image.new("L", (1, 65000)).save(folder / "long.png")
    Image.new("1", (50_000, 50_000)).save(folder / "large.png")
    harmful = ["pipe.jpg", "itself.png", "zero.png", "script.jpg", "cut.png", "[bold]b", "large.png"]
    train(
        with_options(
            config, {"data": f"folder:{folder.parent}", "workers": 1, "max_skipped": 0.5, "loader_timeout": 60.0}
        )
    )
    shown = capfd.readouterr().out
    assert [name for name in harmful if name not in "".join(shown.split())] == []
    assert f"({len(harmful)} in all)" in shown
    assert not {"\x1b", "\x07"} & set(shown)
    assert not (tmp_path / "ran").exists()
    assert len(read_log(config.out)) == 6


# ---------------------------------------------------------------- one run a folder


def test_two_runs_do_not_share_a_folder(config: TrainConfig, done: RunFolder) -> None:
    before = read_log(done.path)
    again = Trainer(with_options(config, {"resume": "auto", "optim.steps": 8}), CPU)
    with done.lock(), pytest.raises(ValueError, match=rf"out: .* is being trained into by process {os.getpid()} on "):
        again.train()
    assert read_log(done.path) == before
    again.train()


def test_runs_that_began_at_once_do_not_share_a_folder(config: TrainConfig) -> None:
    one, other = Trainer(config, CPU), Trainer(config, CPU)
    one.train()
    with pytest.raises(ValueError, match=r"out: .* holds a run that began at the same time"):
        other.train()


def test_a_run_that_went_on_while_its_successor_began_loses_nothing(config: TrainConfig, done: RunFolder) -> None:
    longer = with_options(config, {"resume": "auto", "optim.steps": 10, "save_every": 3})
    one, other = Trainer(longer, CPU), Trainer(longer, CPU)
    one.train()
    before = read_log(done.path), done.list_checkpoints()
    with pytest.raises(ValueError, match=r"out: .* has other checkpoints than a moment ago; start again"):
        other.train()
    assert (read_log(done.path), done.list_checkpoints()) == before


def test_partial_files_of_a_killed_process_are_removed(config: TrainConfig, done: RunFolder) -> None:
    left = [done.path / ".config.json.0123.partial", done.checkpoints / ".step_00000005.pt.4567.partial"]
    for path in left:
        path.write_text("")
    train(replace(config, resume="auto"))
    assert not any(path.exists() for path in left)


def test_a_link_in_the_place_of_a_partial_file_is_not_followed(tmp_path: Path) -> None:
    victim, path = tmp_path / "victim", tmp_path / "file"
    victim.write_text("mine")
    (tmp_path / ".file.partial").symlink_to(victim)
    write_atomically(path, lambda partial: partial.write_text("content"))
    assert (victim.read_text(), path.read_text()) == ("mine", "content")


def test_files_have_the_mode_that_the_umask_says(tmp_path: Path) -> None:
    def private(partial: Path) -> None:
        partial.write_text("content")
        partial.chmod(0o600)

    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "file", private)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


@pytest.mark.parametrize("there", ["a file", "a link to nothing", "a file above", "a folder that is read-only"])
def test_an_output_folder_that_can_not_be_one_is_named(
    config: TrainConfig, there: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = config.out
    if there == "a link to nothing":
        out.symlink_to("nowhere")
    elif there == "a folder that is read-only":

        def denied(path: Path, **_: Any) -> None:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

        monkeypatch.setattr(Path, "mkdir", denied)
    else:
        out.write_text("mine")
        out = out if there == "a file" else out / "below"
    reason = {"a file": "is no folder", "a link to nothing": "is a link to nothing"}.get(there, "can't be written to: ")
    with pytest.raises(ValueError, match=f"^out: {out} {reason}"):
        train(replace(config, out=out))
    assert there != "a file" or out.read_text() == "mine"


def test_a_log_that_can_not_be_written_is_named(done: RunFolder) -> None:
    log = done.open_log(6)
    log.lines = open("/dev/full", "a", buffering=1)  # noqa: SIM115
    with pytest.raises(OSError, match=f"No space left on device: '{done.log}'"):
        log.write(7, 0, {"loss": 1.0})


def test_what_is_missing_in_the_log_is_named(
    config: TrainConfig, done: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = done.log.read_text().splitlines(True)
    done.log.write_text("".join([lines[0], *lines[3:]]))
    train(with_options(config, {"resume": "auto", "optim.steps": 7}))
    assert f"steps2to3aremissingfrom{done.log}" in "".join(capsys.readouterr().out.split())
    assert [line["step"] for line in read_log(done.path)] == [1, 4, 5, 6, 7]


DAMAGED_LINES = (
    *(b'{"step": 3, "epoch": 1, "loss": \xff\xfe}\n', b'{"step": "x"}\n', b'{"step": -9}\n', b"3\n"),
    b"\0" * 64 + b"\n",
)


@pytest.mark.parametrize("damage", DAMAGED_LINES, ids=str)
def test_a_damaged_line_of_the_log_is_dropped(config: TrainConfig, done: RunFolder, damage: bytes) -> None:
    lines = done.log.read_bytes().splitlines(True)
    done.log.write_bytes(b"".join([*lines[:2], damage, *lines[3:]]))
    assert [line["step"] for line in done.read_log()] == [1, 2, 4, 5, 6]
    log = done.open_log(6)
    assert log.note == f"log: steps 3 to 3 are missing from {done.log}; the run itself is whole"
    log.close()
    assert [line["step"] for line in read_log(done.path)] == [1, 2, 4, 5, 6]


def test_a_checkpoint_never_goes_beyond_the_log_on_the_disk(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a checkpoint gets its name, the log of its steps was flushed to the disk, and so was the folder."""
    flushed: dict[Path, int] = {}

    def flush(path: Path) -> None:
        flushed[path] = len(path.read_text().splitlines()) if path.is_file() else len(list(path.iterdir()))

    replaced, seen = Path.replace, []

    def replace_file(path: Path, target: Path) -> Path:
        if target.suffix == ".pt":
            seen.append((int(target.stem.removeprefix("step_")), flushed[config.out / "log.jsonl"]))
            assert config.out in flushed
        return replaced(path, target)

    monkeypatch.setattr(run_folder, "flush_to_disk", flush)
    monkeypatch.setattr(Path, "replace", replace_file)
    train(config)
    assert seen == [(2, 2), (4, 4), (6, 6)]


def test_partial_files_that_nobody_writes_any_more_are_removed(tmp_path: Path) -> None:
    """In folders that several processes may write to, as that of cached features."""
    old, new = tmp_path / ".a.0123.partial", tmp_path / ".b.4567.partial"
    for path in (old, new):
        path.write_text("")
    os.utime(old, (time.time() - 2 * 86400,) * 2)
    write_atomically(tmp_path / "file", lambda partial: partial.write_text("content"))
    assert {path.name for path in tmp_path.iterdir()} == {new.name, "file"}


def test_what_fails_while_a_file_is_written_keeps_its_words(tmp_path: Path) -> None:
    def compute(_: Path) -> None:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match=r"^out of memory$"):
        write_atomically(tmp_path / "file", compute)


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def full(partial: Path) -> None:
        partial.write_text("half")
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        write_atomically(tmp_path / "file", full)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- signals


def test_the_second_signal_is_not_held_back() -> None:
    script = """
import os, signal, time
from ser_fast.training.processes import stop_signals
with stop_signals("stopping soon") as received:
    os.kill(os.getpid(), signal.SIGTERM)
    print(len(received), flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
"""
    ended = subprocess.run([sys.executable, "-c", script], env=ENVIRONMENT, capture_output=True, text=True, timeout=50)
    assert ended.stdout == "1\n"
    assert ended.stderr == "\nstopping soon\n"
    assert ended.returncode == -signal.SIGINT


def test_training_works_outside_the_main_thread(config: TrainConfig) -> None:
    failed: list[BaseException] = []

    def run() -> None:
        try:
            train(with_options(config, {"optim.steps": 1}))
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert not failed
    assert len(read_log(config.out)) == 1


def test_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stop_signals():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


# ---------------------------------------------------------------- hangs


@pytest.fixture
def forked_workers() -> Iterator[None]:
    """Workers that have what a test replaced; by default they fork before Python 3.14 alone."""
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("fork", force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


@pytest.mark.usefixtures("forked_workers")
@pytest.mark.parametrize("fault", ["reads for ever", "stopped", "killed"])
def test_a_worker_that_gives_nothing_is_named_with_its_file(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """The run ends within its limit, and goes on from its last checkpoint to the bits of one without the fault."""
    held = Path(config.data.removeprefix("folder:")) / f"{np.random.default_rng((0, 0)).permutation(24)[20]:02}.png"
    read = pictures.read_image

    def slow(path: str, **options: Any) -> torch.Tensor:
        if path == str(held) and get_worker_info() is not None:  # of the third batch
            if fault == "reads for ever":
                time.sleep(600)
            os.kill(os.getpid(), signal.SIGKILL if fault == "killed" else signal.SIGSTOP)
        return read(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(sources, "read_image", slow)
        with pytest.raises(OSError, match=r"^data: .*worker 0 was reading (.*)$") as error:
            train(with_options(config, {"workers": 1, "loader_timeout": 600.0 if fault == "killed" else 2.0}))
    assert str(held) in str(error.value)
    dead = r"data: DataLoader worker \(pid\(s\) \d+\) exited unexpectedly"
    late = r"data: worker 0 \(process \d+\) gave no batch in 2 s \(loader_timeout\)"
    assert re.match(dead if fault == "killed" else late, str(error.value))
    if fault == "reads for ever":  # the others may hold back the batch before
        assert RunFolder(config.out).list_checkpoints()[-1].name == "step_00000002.pt"
    train(replace(config, resume="auto"))
    straight = RunFolder(train(with_options(config, {"out": config.out.with_name("straight")})))
    for name, value in load_file(straight.encoder).items():
        assert torch.equal(load_file(RunFolder(config.out).encoder)[name], value)


@pytest.mark.parametrize("installed", ["none", "torch's", "a user's", "a user's without a module"])
def test_a_dead_worker_raises_nowhere_that_a_lock_may_be_held(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, installed: str
) -> None:
    """As torch's handler of SIGCHLD does, which a DataLoader before this one or the run's own may have installed."""
    seen = []
    kept, step = signal.getsignal(signal.SIGCHLD), Trainer.step

    def look(self: Trainer, *given: Any) -> Any:
        seen.append(signal.getsignal(signal.SIGCHLD))
        return step(self, *given)

    def users(number: int, frame: Any) -> None: ...

    users.__module__ = None if installed.endswith("module") else users.__module__  # type: ignore[assignment]
    monkeypatch.setattr(Trainer, "step", look)
    try:
        signal.signal(signal.SIGCHLD, users if installed.startswith("a user's") else signal.SIG_DFL)
        monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", False)  # it is installed once a process
        if installed == "torch's":
            next(iter(DataLoader(range(2), num_workers=1)))
            assert signal.getsignal(signal.SIGCHLD) is not signal.SIG_DFL
        before = signal.getsignal(signal.SIGCHLD)
        train(with_options(config, {"workers": 1}))
        assert seen == [users if installed.startswith("a user's") else signal.SIG_DFL] * 6
        assert signal.getsignal(signal.SIGCHLD) is before
    finally:
        signal.signal(signal.SIGCHLD, kept)


@pytest.mark.usefixtures("forked_workers")
def test_what_a_worker_raises_is_one_line(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(path: str, **_: Any) -> torch.Tensor:
        if get_worker_info() is not None:
            raise ValueError("data: got nothing, takes: something")
        return torch.zeros(3, 8, 8, dtype=torch.uint8)

    monkeypatch.setattr(sources, "read_image", failing)
    with pytest.raises(ValueError, match=r"^data: got nothing, takes: something$"):
        train(with_options(config, {"workers": 1}))


INTERRUPTED = """
import json, sys

if __name__ == "__main__":
    import torch
    from ser_fast.training.config import from_json
    from ser_fast.training.trainer import train

    torch.set_num_threads(1)
    torch.multiprocessing.set_start_method(sys.argv[1])
    train(from_json(json.loads(sys.argv[2])))
"""

PICTURES = """
import os, signal, time
from pathlib import Path
from PIL import Image
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data._utils import signal_handling

class Pictures:
    def __len__(self):
        return 24

    def __getitem__(self, index):
        once = Path(__file__).with_name("once")
        if get_worker_info() is not None and not once.exists():
            once.touch()
            os.killpg(0, signal.SIGINT)  # as Ctrl-C in a terminal: to all processes of the group
            time.sleep(1)
        return Image.new("RGB", (32, 32), (index, 0, 0)), 0

def pictures(train):
    return Pictures()
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_ctrl_c_reaches_the_training_and_not_its_workers(config: TrainConfig, tmp_path: Path, method: str) -> None:
    """While the first batch is made, which then has its step and a checkpoint."""
    (tmp_path / "interrupted.py").write_text(INTERRUPTED)
    (tmp_path / "its_data.py").write_text(PICTURES)
    long = {"data": "python:its_data:pictures", "workers": 1, "optim.steps": 30, "save_every": 30}
    ended = subprocess.run(
        [sys.executable, tmp_path / "interrupted.py", method, json.dumps(to_json(with_options(config, long)))],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=100, start_new_session=True,
    )  # fmt: skip
    assert ended.returncode == 128 + signal.SIGINT, ended.stderr
    assert "Traceback" not in ended.stderr
    assert "stopped after step 1" in ended.stdout
    assert [path.name for path in RunFolder(config.out).list_checkpoints()] == ["step_00000001.pt"]


# ---------------------------------------------------------------- ranks


RANKS = """
import json, os, sys
from pathlib import Path
from ser_fast.training.config import from_json, with_options
from ser_fast.training.trainer import train

options, of_rank_1 = json.loads(sys.argv[1]), json.loads(sys.argv[2])
of_rank_1 |= {"out": Path(of_rank_1["out"])} if "out" in of_rank_1 else {}
config = from_json(options)
train(with_options(config, of_rank_1) if os.environ["RANK"] == "1" else config)
"""


def two_ranks(folder: Path, config: TrainConfig, of_rank_1: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    script = folder / "ranks.py"
    script.write_text(RANKS)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    arguments = [json.dumps(to_json(config)), json.dumps(of_rank_1)]
    return subprocess.run([*launch, *arguments], env=ENVIRONMENT, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_ranks_with_other_options_do_not_train(config: TrainConfig, tmp_path: Path) -> None:
    ended = two_ranks(tmp_path, config, {"optim.lr": 0.5, "seed": 3})
    assert ended.returncode != 0
    assert ended.stderr.count("ranks: rank 1 was started with another optim.lr, seed than rank 0") >= 2
    assert not config.out.exists()


@pytest.mark.slow
def test_ranks_with_other_files_do_not_train(config: TrainConfig, tmp_path: Path) -> None:
    other = patterns(tmp_path / "other", 23)
    ended = two_ranks(tmp_path, config, {"data": other})
    assert ended.returncode != 0
    assert "ranks: rank 1 was started with another data's files than rank 0" in ended.stderr


@pytest.mark.slow
def test_a_rank_that_sees_no_checkpoint_gets_that_of_rank_0(config: TrainConfig, tmp_path: Path) -> None:
    straight = two_ranks(tmp_path, config, {"out": str(tmp_path / "elsewhere")})
    assert straight.returncode == 0, straight.stderr
    expected, folder = load_file(RunFolder(config.out).encoder), RunFolder(config.out)
    for path in folder.list_checkpoints()[1:]:
        path.unlink()
    again = two_ranks(tmp_path, replace(config, resume="auto"), {"out": str(tmp_path / "elsewhere")})
    assert again.returncode == 0, again.stderr
    assert [line["step"] for line in read_log(config.out)] == [1, 2, 3, 4, 5, 6]
    for name, value in load_file(folder.encoder).items():
        assert torch.equal(value, expected[name])


@pytest.mark.slow
def test_files_that_one_rank_alone_can_not_read_are_named(config: TrainConfig, tmp_path: Path) -> None:
    order = np.random.default_rng((config.seed, 0)).permutation(24)
    damaged = f"{order[4]:02}.png"  # of the first batch of 8, the second rank's half
    (Path(config.data.removeprefix("folder:")) / damaged).write_bytes(b"damaged")
    ended = two_ranks(tmp_path, with_options(config, {"optim.steps": 1}), {})
    assert ended.returncode == 0, ended.stderr
    assert damaged in "".join(ended.stdout.split())


@pytest.mark.slow
def test_torchrun_restarts_from_the_checkpoint(config: TrainConfig, tmp_path: Path) -> None:
    """A rank that is killed takes the others along; all begin again, with the same arguments, and end as if not."""
    script = tmp_path / "restarted.py"
    script.write_text(RESTARTED)
    environment = ENVIRONMENT | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for options in (["--max-restarts", "2"], []):
        run = replace(config, resume="auto", out=config.out if options else config.out.with_name("straight"))
        ended = subprocess.run(
            [*launch, *options, script, "killed" if options else "straight", json.dumps(to_json(run))],
            env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "killed").exists()
    assert [line["step"] for line in read_log(config.out)] == [1, 2, 3, 4, 5, 6]
    expected = load_file(RunFolder(config.out.with_name("straight")).encoder)
    for name, value in load_file(RunFolder(config.out).encoder).items():
        assert torch.equal(value, expected[name])


RESTARTED = """
import json, os, signal, sys
from pathlib import Path
import torch
from ser_fast.training.config import from_json
from ser_fast.training.trainer import Trainer, train

torch.set_num_threads(1)
step, once = Trainer.step, Path(__file__).with_name("killed")

def killed(self, number, *batch):
    if sys.argv[1] == "killed" and number == 3 and os.environ["RANK"] == "1" and not once.exists():
        once.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, number, *batch)

Trainer.step = killed
train(from_json(json.loads(sys.argv[2])))
"""


def test_a_run_that_fails_closes_its_log(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    logs: list[RunLog] = []
    write = RunLog.write
    monkeypatch.setattr(RunLog, "write", lambda log, *given: (logs.append(log), write(log, *given)))
    with pytest.raises(NonFiniteLossError):
        train(with_options(config, {"optim.lr": 1e30, "optim.warmup": 0.0, "optim.clip_grad": 0.0}))
    assert logs[0].lines.closed
