"""What a step has to log: it stays on the device until it is looked at, one step late, so that no step waits."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


class StepRecord(Mapping[str, float]):
    """The numbers of a step by name. The first look at one waits for the step, and for nothing that is queued after it.

    Args:
        values: scalar tensors of any device, and numbers.
        device: of the step.
        check: called with the values at the first look; raises where they tell of a failure. Then every look raises.
        hidden: names of values that are for `check` alone.
    """

    def __init__(
        self,
        values: Mapping[str, Tensor | float],
        device: torch.device,
        check: Callable[[dict[str, float]], None],
        hidden: frozenset[str] = frozenset(),
    ) -> None:
        self._values, self._check, self._hidden = dict(values), check, hidden
        self._read: dict[str, float] | None = None
        scalars = [value.detach() for value in values.values() if isinstance(value, Tensor)]
        stacked = torch.stack([value.to(device, non_blocking=True) for value in scalars])
        # A copy that is queued now: one that is asked for later would wait for the steps that were queued by then.
        self._numbers = stacked.to("cpu", non_blocking=True)
        self._copied: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(device))

    def read(self) -> dict[str, float]:
        """All values; the one place where a training looks at what the device computed.

        Raises:
            NonFiniteLossError: the step was not finite, and left no trace.
        """
        if self._read is None:
            if self._copied is not None:
                self._copied.synchronize()
            numbers = iter(self._numbers.tolist())
            self._read = {
                name: next(numbers) if isinstance(value, Tensor) else value for name, value in self._values.items()
            }
        self._check(self._read)
        return {name: value for name, value in self._read.items() if name not in self._hidden}

    def __getitem__(self, name: str) -> float:
        return self.read()[name]

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._values if name not in self._hidden)

    def __len__(self) -> int:
        return len(self._values) - len(self._hidden)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self)})"  # a look at the values would wait


class LateReports:
    """Reports each step when the next one is queued; what is left when it is drained, or at the end of the context.

    Args:
        report: takes what `add` was given.
    """

    def __init__(self, report: Callable[..., None]) -> None:
        self._report = report
        self._waiting: tuple[Any, ...] | None = None

    def add(self, *step: Any) -> None:
        """Report the step before; this one has just been queued."""
        self.drain()
        self._waiting = step

    def drain(self) -> None:
        """Report what waits to be."""
        step, self._waiting = self._waiting, None
        if step is not None:
            self._report(*step)

    def __enter__(self) -> "LateReports":
        return self

    def __exit__(self, *_: object) -> None:
        self.drain()  # also where an error ends the run: the log has every step that was taken
