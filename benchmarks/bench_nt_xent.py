"""nt_xent forward and backward against the matrix products it can't do without, and dense autograd."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ser_fast import nt_xent
from ser_fast.ops.backends import BACKENDS, reason_not

TOKENS_PER_IMAGE, DIM, TEMPERATURE = 64, 512, 0.3
RIVALS = ("floor", "eager", *(backend for backend in BACKENDS if reason_not(backend, "cpu") is None))


def _gradient(rival: str, rows: int) -> Callable[[Tensor], Tensor]:
    """z (2T, D) to d loss / d z, both views stacked."""
    image = torch.arange(rows // 2) // TOKENS_PER_IMAGE
    if rival == "floor":  # 4U = two full products, n^2 D multiply-adds each

        def products(z: Tensor) -> Tensor:
            return (z @ z.mT) @ z

        return products
    if rival == "eager":

        def loss(z: Tensor) -> Tensor:
            u = F.normalize(z, dim=1)
            s = u @ u.mT / TEMPERATURE
            images = image.repeat(2)
            positive = torch.arange(rows).roll(rows // 2)
            kept = (images[:, None] != images) | (torch.arange(rows) == positive[:, None])
            return F.cross_entropy(s.masked_fill(~kept, float("-inf")), positive)

    else:

        def loss(z: Tensor) -> Tensor:
            return nt_xent(*z.chunk(2), temperature=TEMPERATURE, image=image, backend=rival)

    def gradient(z: Tensor) -> Tensor:
        z = z.requires_grad_()
        return torch.autograd.grad(loss(z), z)[0]

    return gradient


@pytest.mark.parametrize("rows", [2048, 4096])
@pytest.mark.parametrize("rival", RIVALS)
def bench_nt_xent(timed: Callable[..., None], rows: int, rival: str) -> None:
    z = torch.randn(rows, DIM)
    expected = None if rival == "floor" else _gradient("reference", rows)(z.double()).float()
    timed(f"nt_xent fwd+bwd n={rows}", _gradient(rival, rows), z, expected, flops=4 * rows**2 * DIM)
