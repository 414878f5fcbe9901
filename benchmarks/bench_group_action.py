"""group_action on SER's own maps (D4 and a resize), forward and backward, against a copy of the same bytes."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ser_fast import LatticeMap, group_action
from ser_fast.ops.backends import BACKENDS, reason_not

BATCH, CHANNELS, SIZE_IN, SIZE_OUT = 64, 512, (14, 14), (12, 16)
MAPS = {
    "d4": LatticeMap.d4(SIZE_IN, torch.arange(BATCH) % 8),
    "d4 and resize": LatticeMap.resize(SIZE_IN, SIZE_OUT) @ LatticeMap.d4(SIZE_IN, torch.arange(BATCH) % 8),
}
RIVALS = ("floor", "grid_sample", *(backend for backend in BACKENDS if reason_not(backend, "cpu") is None))


def _forward(rival: str, g: LatticeMap) -> Callable[[Tensor], Tensor]:
    if rival == "floor":
        out = torch.empty(BATCH, *g.size_out, CHANNELS)
        rows = min(g.size_in[0] * g.size_in[1], g.size_out[0] * g.size_out[1])
        return lambda x: out.flatten(1, 2)[:, :rows].copy_(x.detach().flatten(1, 2)[:, :rows])
    if rival == "grid_sample":

        def sample(x: Tensor) -> Tensor:
            grid = F.affine_grid(g.theta(), [BATCH, CHANNELS, *g.size_out], align_corners=False)
            planes = x.permute(0, 3, 1, 2).contiguous()
            out = F.grid_sample(planes, grid, mode="bicubic", padding_mode="border", align_corners=False)
            return out.permute(0, 2, 3, 1).contiguous()

        return sample
    return lambda x: group_action(x, g, backend=rival)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("rival", RIVALS)
def bench_group_action(timed: Callable[..., None], name: str, rival: str, backward: bool) -> None:
    g = MAPS[name]
    x = torch.randn(BATCH, *SIZE_IN, CHANNELS)
    forward = _forward(rival, g)
    weight = torch.randn(BATCH, *g.size_out, CHANNELS)

    def gradient(x: Tensor, forward: Callable[[Tensor], Tensor] = forward) -> Tensor:
        if rival == "floor":  # bytes in once and out once, each way
            forward(x)
            return x.clone()
        x = x.requires_grad_()
        return torch.autograd.grad((forward(x) * weight).sum(), x)[0]

    run = gradient if backward else forward
    oracle = _forward("reference", g)
    expected = None if rival == "floor" else gradient(x, oracle) if backward else oracle(x)
    moved = 4 * (x.numel() + weight.numel()) * (2 if backward else 1)
    timed(f"group_action {name} {'fwd+bwd' if backward else 'fwd'}", run, x, expected, bytes=moved)
