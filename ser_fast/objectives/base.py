"""What an objective is: the loss on the views' embeddings. It knows no encoder, no data and no add-on."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

if TYPE_CHECKING:  # the options of a training are read without timm
    from ser_fast.vit import SplitViT


class Objective(nn.Module):
    """An objective on the embeddings of the views of a batch.

    Attributes:
        head: (B, C) -> (B, D), the projector; the same for every view.
        momentum: None where there is no teacher. Else the teacher is an exponential moving average of encoder and
            head, whose momentum rises from this value to 1 along a cosine.
        moves_teacher: whether the teacher moves before the step's forward pass, or after its optimizer step.
        exports: which encoder is the product, "student" or "teacher".
        joins_views: whether the head runs once on the rows of all views: the same function, and faster, where it mixes
            no rows. Batch normalization does.
        epochs: of the training, for what changes from epoch to epoch.
    """

    head: nn.Module
    momentum: float | None = None
    moves_teacher: Literal["before", "after"] = "after"
    exports: Literal["student", "teacher"] = "student"
    joins_views: bool = False
    epochs: int = 100

    def prepare(self, encoder: "SplitViT") -> None:
        """Change the encoder before it is trained from scratch, for instance freeze a part of it.

        Pretrained weights stay as they are: it is not called for them.
        """

    def before_step(self, progress: float) -> None:
        """Called before each optimizer step, with gradients in place; progress in [0, 1) of the training."""

    def after_step(self, progress: float) -> None:
        """Called after each optimizer step."""

    def forward(self, student: list[Tensor], teacher: list[Tensor], progress: float) -> dict[str, Tensor]:
        """The losses of one batch.

        Args:
            student: for each view (B, D), the head's output: global views first, then local ones.
            teacher: for each global view (B, D), without gradient; empty where `momentum` is None.
            progress: in [0, 1) of the training.

        Returns:
            Scalars: "loss", and its parts by name, for the log.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class ObjectiveConfig:
    """The options of an objective.

    Attributes:
        section: its name on the command line, as in --moco.dim.
        recipe: the defaults of other options with this objective, by name, as {"optim.lr": 3e-4}.
    """

    section: ClassVar[str]
    recipe: ClassVar[Mapping[str, Any]] = {}

    def build(self, dim: int) -> Objective:
        """The objective on embeddings (B, dim)."""
        raise NotImplementedError


def fix_patches(encoder: "SplitViT") -> None:
    """Freeze the patch embedding, and set absolute positions, where there are some, to fixed sin-cos.

    Source: MoCo-v3, arXiv 2104.02057, section 4.2, for stability.
    """
    if getattr(encoder, "pos_embed", None) is not None:
        encoder.fix_sincos_positions()
    encoder.patch_embed.requires_grad_(False)


def view_pairs(count: int) -> list[tuple[int, int]]:
    """The pairs of `count` views, the first two of which are global: each of a global view and one after it."""
    return [(one, other) for one in range(min(count, 2)) for other in range(one + 1, count)]


def off_diagonal(matrix: Tensor) -> Tensor:
    """(D, D) -> (D * (D - 1),), all entries but the diagonal's."""
    size = len(matrix)
    return matrix.flatten()[:-1].view(size - 1, size + 1)[:, 1:].flatten()


def in_float32(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The loss in float32 at least: in bfloat16 DINO's gradient is off by 1 to 3 %, Barlow Twins' by 1.4 %.

    Arguments that are tensors, or lists of them, are cast, and autocast is off.
    """

    def cast(argument: Any) -> Any:
        if isinstance(argument, list):
            return [cast(entry) for entry in argument]
        half = isinstance(argument, Tensor) and argument.dtype in (torch.bfloat16, torch.float16)
        return argument.float() if half else argument

    @functools.wraps(loss)
    def cast_loss(*arguments: Any, **options: Any) -> Tensor:
        first = arguments[0][0] if isinstance(arguments[0], list) else arguments[0]
        with torch.autocast(first.device.type, enabled=False):
            return loss(*map(cast, arguments), **options)

    return cast_loss
