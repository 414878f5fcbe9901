"""What an objective is: the loss on the views' embeddings. It knows no encoder, no data and no add-on."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from ser_fast.vit import SplitViT


class Objective(nn.Module):
    """An objective on the embeddings of the views of a batch.

    Attributes:
        head: (B, C) -> (B, D), the projector; the same for every view.
        momentum: None where there is no teacher. Else the teacher is an exponential moving average of encoder and
            head, whose momentum rises from this value to 1 along a cosine.
        moves_teacher: whether the teacher moves before the step's forward pass, or after its optimizer step.
        exports: which encoder is the product, "student" or "teacher".
    """

    head: nn.Module
    momentum: float | None = None
    moves_teacher: Literal["before", "after"] = "after"
    exports: Literal["student", "teacher"] = "student"

    def prepare(self, encoder: SplitViT) -> None:
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
