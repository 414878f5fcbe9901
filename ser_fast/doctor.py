"""What can run on this machine, as tables."""

import torch
from rich.table import Table

from ser_fast.ops import backends
from ser_fast.ops.backends import BACKENDS, fastest, preferred, reason_not


def backend_tables() -> tuple[Table, Table]:
    """The backends of the kernels on each device, with the reason why one can't run; and what backend="auto" takes."""
    runs = Table(title=f"torch {torch.__version__}, CUDA {'available' if torch.cuda.is_available() else 'absent'}")
    for heading in ("backend", "on cpu tensors", "on cuda tensors"):
        runs.add_column(heading)
    for backend in BACKENDS:
        runs.add_row(backend, *(reason_not(backend, device) or "runs" for device in ("cpu", "cuda")))
    automatic = Table(title='what backend="auto" takes')
    for heading in ("tensors on", *backends.PREFERRED):
        automatic.add_column(heading)
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    for device in (torch.device("cpu"), *gpus):
        automatic.add_row(str(device), *(fastest(op, device) for op in backends.PREFERRED))
    if not gpus:
        starts = sorted({start for order in backends.PREFERRED.values() for start in order})
        for start, end in zip(starts, [*starts[1:], None], strict=True):
            capability = f"from {start}.0 on" if end is None else f"below {end}.0"
            row = (preferred(op, start) for op in backends.PREFERRED)
            automatic.add_row(f"a GPU of compute capability {capability}", *row)
    return runs, automatic
