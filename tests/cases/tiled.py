"""Rows, oracle and kinds of tiles for the tests of kernels that go through the similarity matrix by tiles."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
f16, f64 = torch.float16, torch.float64


def rows(count: int, dim: int, seed: int = 0, dtype: torch.dtype = f16) -> tuple[Tensor, Tensor]:
    """Two views that agree a little, as early in training."""
    generator = torch.Generator().manual_seed(seed)
    x, noise = torch.randn(2, count, dim, dtype=f64, generator=generator)
    return x.to(DEVICE, dtype), (x + 1.5 * noise).to(DEVICE, dtype)


def with_gradients(function: Callable[..., Tensor], x: Tensor, y: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """The losses, and the gradients in x and y of their sum with weights."""
    x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
    loss = function(x, y, reduction="none", **options)
    weight = torch.linspace(0.5, 1.5, len(loss), device=loss.device)
    return loss.detach(), *torch.autograd.grad((weight * loss).sum(), (x, y))


def oracle(function: Callable[..., Tensor], x: Tensor, y: Tensor, **options: Any) -> tuple[Tensor, ...]:
    options.pop("memory_budget", None)
    return with_gradients(function, x.to(f64), y.to(f64), backend="reference", **options)


def check(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], temperature: float) -> None:
    """Rounding the operands moves s by at most eps / temperature; results are rounded once more."""
    tolerance = torch.finfo(f16).eps * (1 + 1 / (2 * temperature))
    for found, truth in zip(actual, expected, strict=True):
        scale = max(1.0, truth.abs().max().item()) if truth.dim() == 1 else truth.abs().max().item()
        assert (found.to(f64) - truth).abs().max() <= tolerance * scale


KINDS = (
    "own image",
    "own image, some valid",
    "full, masked and empty tiles",
    "invalid tiles",
    "one image",
    "contiguous, some valid",
    "shuffled",
    "alike in 32 bits",
)


def images_of(kind: str, tile: int) -> tuple[Tensor, Tensor | None]:
    """Images, and which rows are valid, of two tiles of rows and a ragged one: images of the first two are disjoint."""
    row = torch.arange(tile * 9 // 4, device=DEVICE)
    shuffle = torch.randperm(len(row), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    return {
        "own image": (row, None),
        "own image, some valid": (row, shuffle > tile // 3),
        "full, masked and empty tiles": (row // tile, None),
        "invalid tiles": (row // tile, row >= tile),
        "one image": (row * 0, None),
        "contiguous, some valid": (row // 7, shuffle > tile // 3),
        "shuffled": (row[shuffle] // 7, None),
        "alike in 32 bits": (row // 30 * 2**32, None),
    }[kind]


def every_kind_of_tile(function: Callable[..., Tensor], kind: str, tile: int, backend: str) -> None:
    image, valid = images_of(kind, tile)
    x, y = rows(len(image), 40)
    options = {"temperature": 0.3, "image": image, "valid": valid}
    actual = with_gradients(function, x, y, backend=backend, **options)
    check(actual, oracle(function, x, y, **options), 0.3)
    if kind == "one image":
        assert not any(result.any() for result in actual)
