"""What devices can do, for plans: the vendors' numbers without sparsity, at the boost clock."""

import os
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Device:
    """A device's peaks.

    Attributes:
        memory: bytes.
        half: floating-point operations a second on 16 bits, accumulated in 32.
        single: on 32 bits, TF32 not used.
        bandwidth: bytes a second between memory and processors.
        kind: of the backend that runs there: "gpu" or "cpu".
    """

    memory: float
    half: float
    single: float
    bandwidth: float
    kind: str = "gpu"


_MIB = 2**20
DEVICES = {
    "h100-sxm": Device(memory=81559 * _MIB, half=989.4e12, single=66.9e12, bandwidth=3.35e12),
    "h200": Device(memory=143771 * _MIB, half=989.4e12, single=66.9e12, bandwidth=4.8e12),
    "a100-80": Device(memory=81920 * _MIB, half=311.9e12, single=19.5e12, bandwidth=2.039e12),
    "4090": Device(memory=24564 * _MIB, half=165.2e12, single=82.6e12, bandwidth=1.008e12),
}
# Of a CPU's thread: two fused multiply-adds of 8 numbers a cycle at 3 GHz, and its part of the memory's speed.
_THREAD_FLOPS, _THREAD_BANDWIDTH = 96e9, 10e9


def find_device(
    name: str,
    *,
    tflops: float | None = None,
    single_tflops: float | None = None,
    bandwidth: float | None = None,
    memory: float | None = None,
) -> Device:
    """A device by its name, or "cpu" for this machine's, with numbers of one's own in place of its.

    Args:
        name: one of DEVICES, or "cpu".
        tflops, single_tflops: 10^12 operations a second, on 16 and on 32 bits.
        bandwidth: 10^9 bytes a second.
        memory: GiB.

    Raises:
        ValueError: a name that is none of them, or a number that isn't positive.
    """
    if name == "cpu":
        threads = torch.get_num_threads()
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        speed = threads * _THREAD_FLOPS
        device = Device(size, speed, speed, threads * _THREAD_BANDWIDTH, "cpu")
    elif name in DEVICES:
        device = DEVICES[name]
    else:
        raise ValueError(f"plan.device: got {name!r}, takes one of {', '.join(map(repr, [*DEVICES, 'cpu']))}")
    given = {
        "tflops": ("half", tflops, 1e12),
        "single_tflops": ("single", single_tflops, 1e12),
        "bandwidth": ("bandwidth", bandwidth, 1e9),
        "memory": ("memory", memory, 2.0**30),
    }
    for option, (field, value, unit) in given.items():
        if value is None:
            continue
        if not 0 < value < float("inf"):
            raise ValueError(f"plan.{option}: got {value:g}, takes a finite number above 0")
        device = replace(device, **{field: value * unit})  # type: ignore[arg-type]
    return device
