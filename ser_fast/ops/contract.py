"""The contract of the backends: what each operation takes and returns, declared once.

An operation takes its arguments as one of the tuples below and is a method of `Backend`, which every backend implements
and mypy checks. Only torch.library sees them flat (`ser_fast.ops.operator`). Arguments are complete and valid here:
the public functions check them, and make explicit what may be left out.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


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
