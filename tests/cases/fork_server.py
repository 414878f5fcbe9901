"""A process that imports the trainer once, and forks one for each run that something is to happen to."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

POINTS = {"open", "fsync", "replace", "rename", "unlink", "chmod", "mkdir", "close", "save_file", "write_end_of_file"}
"""Calls in a save after which the disk is another one than before."""


class Ended(NamedTuple):
    """What became of a process: its exit status (-9 killed by SIGKILL), and what it wrote."""

    status: int
    said: str


class ForkServer:
    """Runs trainings in processes of their own, a few milliseconds after they were asked for."""

    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def run(self, config: dict[str, Any], fault: dict[str, Any] | None = None, *, ranks: int = 1) -> list[Ended]:
        """Train in as many processes as there are ranks; returns when all ended, and stopped ones were killed.

        Args:
            config: from `to_json`.
            fault: what happens, to rank "rank" (0): "kill" at the n-th call of a function, "kill_in_save" of step
                "step" at its n-th point, "stop" (SIGSTOP) at a step, or no file may be larger than "largest_file"
                bytes. With n = 0 the calls are counted and said.
            ranks: how many.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([config, fault or {}, ranks]) + "\n")
        self.process.stdin.flush()
        return [Ended(*ended) for ended in json.loads(self.process.stdout.readline())]

    def close(self) -> None:
        """End it."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")  # other processes may have the pipe as well: its end may not be seen
        self.process.stdin.close()
        self.process.wait(60)


def _serve() -> None:
    import torch

    from ser_fast.training import processes, trainer

    torch.set_num_threads(1)
    processes._ANSWER_WITHIN = 1.0
    answers = os.fdopen(os.dup(1), "w")
    for number, line in enumerate(iter(sys.stdin.readline, "\n")):
        config, fault, ranks = json.loads(line)
        children = {}
        for rank in range(ranks):
            said = Path(config["out"]).with_name(f"said_{number}_{rank}")
            if not (child := os.fork()):
                with said.open("w") as file:
                    os.dup2(file.fileno(), 1)
                    os.dup2(file.fileno(), 2)
                if ranks > 1:
                    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
                    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(29_700 + number % 200)}
                os._exit(_train(trainer, config, fault if fault.get("rank", 0) == rank else {}))
            children[child] = said
        ended = _wait(list(children))
        answers.write(json.dumps([(ended[child], said.read_text()) for child, said in children.items()]) + "\n")
        answers.flush()


def _train(trainer: Any, config: dict[str, Any], fault: dict[str, Any]) -> int:
    from ser_fast.training.config import from_json

    points = _Points(fault.get("kill", fault.get("kill_in_save")), every="kill" in fault)
    save, step = trainer.Trainer.save, trainer.Trainer.step

    def watched_save(self: Any, number: int) -> None:
        if number != fault["step"]:
            return save(self, number)
        with points:
            return save(self, number)

    def stopped_step(self: Any, number: int, *batch: Any) -> Any:
        if number == fault["stop"]:
            os.kill(os.getpid(), signal.SIGSTOP)
        return step(self, number, *batch)

    if "largest_file" in fault:
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault["largest_file"],) * 2)
    if "kill_in_save" in fault:
        trainer.Trainer.save = watched_save
    if "stop" in fault:
        trainer.Trainer.step = stopped_step
    try:
        if "kill" in fault:
            with points:
                trainer.train(from_json(config))
        else:
            trainer.train(from_json(config))
    except SystemExit as stopped:
        return int(stopped.code or 0)
    except Exception as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        return 1
    print(f"calls {points.count}", flush=True)
    return 0


class _Points:
    """Within, counts calls of functions, or of POINTS alone, and kills the process at number `end`."""

    def __init__(self, end: int | None, *, every: bool) -> None:
        self.end, self.every, self.count = end, every, 0

    def __enter__(self) -> None:
        sys.setprofile(self._on_call)

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _on_call(self, frame: FrameType, event: str, argument: Any) -> None:
        # Of POINTS the return: what they do to the disk is done.
        if event in ("call", "c_call") if self.every else event == "c_return" and argument.__name__ in POINTS:
            self.count += 1
            if self.count == self.end:
                os.kill(os.getpid(), signal.SIGKILL)


def _wait(children: list[int]) -> dict[int, int]:
    """The exit statuses of all; a stopped one is killed when no other is left, and all are after a minute or two."""
    ended: dict[int, int] = {}
    stopped: set[int] = set()
    end = time.monotonic() + 100
    while len(ended) < len(children):
        for child in children:
            if child not in ended and (found := os.waitpid(child, os.WNOHANG | os.WUNTRACED))[0]:
                if os.WIFSTOPPED(found[1]):
                    stopped.add(child)
                else:
                    ended[child] = os.waitstatus_to_exitcode(found[1])
        left = set(children) - set(ended)
        if left and (left == stopped - set(ended) or time.monotonic() > end):
            for child in left:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    return ended


if __name__ == "__main__":
    _serve()
