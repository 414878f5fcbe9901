"""The contract of the backends: what each operation takes and returns, declared once.

An operation takes its arguments as one of the tuples below and is a method of `Backend`, which every backend implements
and mypy checks. Only torch.library sees them flat (`ser_fast.ops.operator`). Arguments are complete and valid here:
the public functions check them in the user's words, and make explicit what may be left out. Operators can be called by
their names, too, as exported programs do: `check_*` below refuse what doesn't fit before any backend sees it.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ser_fast.interpolation import INTERPOLATIONS, PADDINGS
from ser_fast.lattice import precision


class GroupAction(NamedTuple):
    """W_g, a sparse row operator per sample: what group_action multiplies tokens by."""

    linear: Tensor  # (B, 2, 2) float64, of a LatticeMap
    offset: Tensor  # (B, 2) float64
    size_in: Sequence[int]  # H, W
    size_out: Sequence[int]  # h, w
    interpolation: str
    padding: str
    antialias: bool


class NTXent(NamedTuple):
    """Of nt_xent: two views; row t of z0 and row t of z1 are each other's positive."""

    z0: Tensor  # (T, D)
    z1: Tensor  # (T, D)
    image: Tensor  # (T,) int64, of the rows of both views
    valid: Tensor  # (T,) bool
    temperature: float
    normalize: bool


class InfoNCE(NamedTuple):
    """Of info_nce: key b is a negative of query t where both are valid and their images differ."""

    query: Tensor  # (T, D)
    key: Tensor  # (M, D)
    image: Tensor  # (T,) int64
    key_image: Tensor  # (M,) int64
    valid: Tensor  # (T,) bool
    key_valid: Tensor  # (M,) bool
    positive: Tensor  # (T,) int64, rows of key
    temperature: float
    normalize: bool


class LossGradient(NamedTuple):
    """What the backward pass of a loss takes beside its inputs."""

    weight: Tensor  # d / d loss of each anchor, (2T,) of nt_xent and (T,) of info_nce
    loss: Tensor  # like weight: what the forward pass returned


def _check(name: str, x: Tensor, dtype: torch.dtype | None, shape: Sequence[int], like: Tensor) -> None:
    """x has that dtype (None: that of like) and shape, on the device of like."""
    if x.dtype != (dtype or like.dtype):
        raise TypeError(f"{name}: got {x.dtype}, takes {dtype or like.dtype}")
    if x.shape != shape:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, takes {tuple(shape)}")
    if x.device != like.device:
        raise ValueError(f"{name}: got device {x.device}, takes {like.device}")


FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _check_rows(name: str, x: Tensor) -> None:
    if x.dtype not in FLOATS:
        raise TypeError(f"{name}: got {x.dtype}, takes one of {', '.join(map(str, FLOATS))}")
    if x.ndim != 2 or x.shape[1] == 0:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, takes rows and at least one column")


def check_temperature(temperature: float) -> None:
    """Raise ValueError unless float32 has the number and its inverse."""
    if not 1e-30 <= temperature <= 1e30:
        raise ValueError(f"temperature: got {temperature}, takes a number from 1e-30 to 1e30")


def check_group_action(x: Tensor, action: GroupAction, transpose: bool) -> None:
    """x fits the action, or with transpose what the action gives.

    Raises:
        TypeError: a dtype that is not taken.
        ValueError: a shape, size, device or option that doesn't fit.
    """
    size_in, size_out = action.size_in, action.size_out
    for name, size in (("size_in", size_in), ("size_out", size_out)):
        if len(size) != 2 or size[0] < 0 or size[1] < 0:
            raise ValueError(f"{name}: got {size}, takes (H, W), whole numbers of at least 0")
    if x.dtype not in FLOATS:
        raise TypeError(f"x: got {x.dtype}, takes one of {', '.join(map(str, FLOATS))}")
    height, width = size_out if transpose else size_in
    if x.ndim != 3 or x.shape[1] != height * width:
        raise ValueError(f"x: got shape {tuple(x.shape)}, takes (B, {height * width}, C)")
    _check("linear", action.linear, precision(x.device), (x.shape[0], 2, 2), x)
    _check("offset", action.offset, precision(x.device), (x.shape[0], 2), x)
    if action.interpolation not in INTERPOLATIONS:
        raise ValueError(f"interpolation: got {action.interpolation!r}, takes one of {INTERPOLATIONS}")
    if action.padding not in PADDINGS:
        raise ValueError(f"padding: got {action.padding!r}, takes one of {PADDINGS}")


def check_nt_xent(inputs: NTXent) -> None:
    """Both views are alike, and each row has an image and is valid or not; raises as `check_group_action`."""
    z0 = inputs.z0
    _check_rows("z0", z0)
    _check("z1", inputs.z1, None, z0.shape, z0)
    _check("image", inputs.image, torch.int64, z0.shape[:1], z0)
    _check("valid", inputs.valid, torch.bool, z0.shape[:1], z0)
    check_temperature(inputs.temperature)


def check_info_nce(inputs: InfoNCE) -> None:
    """Queries and keys have the same columns, and what is said of their rows is said of each; likewise raises."""
    query, key = inputs.query, inputs.key
    _check_rows("query", query)
    _check_rows("key", key)
    _check("key", key, None, (key.shape[0], query.shape[1]), query)
    if key.shape[0] == 0 and query.shape[0] > 0:
        raise ValueError(f"key: got no rows for {query.shape[0]} of query, takes at least one")
    _check("image", inputs.image, torch.int64, query.shape[:1], query)
    _check("key_image", inputs.key_image, torch.int64, key.shape[:1], query)
    _check("valid", inputs.valid, torch.bool, query.shape[:1], query)
    _check("key_valid", inputs.key_valid, torch.bool, key.shape[:1], query)
    _check("positive", inputs.positive, torch.int64, query.shape[:1], query)
    check_temperature(inputs.temperature)


def check_loss_gradient(gradient: LossGradient, anchors: int, like: Tensor) -> None:
    """Weight and loss of so many anchors of rows `like`; likewise raises."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    _check("weight", gradient.weight, dtype, (anchors,), like)
    _check("loss", gradient.loss, dtype, (anchors,), like)


class Backend(Protocol):
    """One implementation of every operation. Results are new and contiguous, on the device of the inputs."""

    def group_action(self, x: Tensor, action: GroupAction) -> Tensor:
        """(B, H*W, C) to (B, h*w, C): W_g x, in the dtype of x."""

    def group_action_transpose(self, x: Tensor, action: GroupAction) -> Tensor:
        """(B, h*w, C) to (B, H*W, C): W_g^T x, in the dtype of x."""

    def kept_bytes(self, rows: int, dtype: torch.dtype, temperature: float, normalize: bool) -> int:
        """How many bytes of similarities nt_xent on `rows` rows a view can keep for its backward pass; 0 for none."""

    def nt_xent(self, inputs: NTXent, similarities: Tensor) -> Tensor:
        """(2T,) losses in at least float32, the anchors of z0 first.

        similarities: (K,) uint8, written in the backend's own layout unless K is 0; else K is `kept_bytes`.
        """

    def nt_xent_backward(self, inputs: NTXent, gradient: LossGradient, similarities: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of z0 and z1, (T, D) twice. similarities: (K,) uint8, what `nt_xent` wrote, or empty."""

    def info_nce(self, inputs: InfoNCE) -> Tensor:
        """(T,) losses in at least float32."""

    def info_nce_backward(
        self, inputs: InfoNCE, gradient: LossGradient, need_query: bool, need_key: bool
    ) -> tuple[Tensor, Tensor]:
        """The gradients of query (T, D) and key (M, D); (0,) where not needed."""

    def info_nce_detached(self, inputs: InfoNCE) -> tuple[Tensor, Tensor]:
        """(T,) losses, and (T, D) the gradient of each in its own query, both in at least float32."""
