"""DINO: a student finds, for all views, the distribution that a centered and sharpened teacher has for a global one."""

from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ser_fast.distributed import all_reduce_sum, mean_over_rows
from ser_fast.objectives.base import Objective, ObjectiveConfig, in_float32


class DINOHead(nn.Module):
    """Three linear layers with GELU, the norm taken away, and prototypes of a norm of their own.

    The prototypes are g v / |v|, with plain parameters: nn.utils.weight_norm can't be copied, as a teacher must be.

    Args:
        encoder_dim: C, channels of the embeddings.
        dim: K, the number of prototypes.
        mlp_dim, bottleneck_dim: hidden width, and width of what is normalized.
        norm_last_layer: keep g at 1.
    """

    def __init__(self, encoder_dim: int, *, dim: int, mlp_dim: int, bottleneck_dim: int, norm_last_layer: bool) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(encoder_dim, mlp_dim),
            nn.GELU(),
            nn.Linear(mlp_dim, mlp_dim),
            nn.GELU(),
            nn.Linear(mlp_dim, bottleneck_dim),
        )
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.weight_g = nn.Parameter(torch.ones(dim, 1), requires_grad=not norm_last_layer)
        self.weight_v = nn.Parameter(nn.Linear(bottleneck_dim, dim, bias=False).weight.detach())

    def forward(self, embedding: Tensor) -> Tensor:  # (B, C) -> (B, K)
        return _logits(self.mlp(embedding), self.weight_g, self.weight_v)


@in_float32
def _logits(x: Tensor, g: Tensor, v: Tensor) -> Tensor:
    return normalize(x, dim=-1, eps=1e-12) @ (g * normalize(v, dim=-1, eps=1e-12)).T


class DINO(Objective):
    """The DINO objective, with any number of local views.

    Args:
        encoder_dim: C, channels of the embeddings.
        dim: K, the number of prototypes.
        mlp_dim, bottleneck_dim: widths of the head.
        norm_last_layer: keep the norm of the prototypes at 1.
        momentum: of the teacher at the start; it rises to 1 along a cosine.
        student_temperature: of the student's softmax.
        first_temperature, teacher_temperature: of the teacher's: in the first epoch, and after the warm-up.
        temperature_warmup: share of the training's epochs in which the teacher's temperature rises, by equal steps
            from the first of them, where it is `first_temperature`, to the last, where it is `teacher_temperature`.
        freeze_last_layer: share of the training in which the prototypes stay as they were drawn.
        center_momentum: of the mean of the teacher's outputs, which is taken off them.

    Attributes:
        center: (K,) that mean; each step's joins it after the step.

    Source: Caron et al., arXiv 2104.14294, algorithm 1 and section 3.1.
    """

    exports = "teacher"
    joins_views = True
    center: Tensor

    def __init__(
        self,
        encoder_dim: int,
        *,
        dim: int = 65536,
        mlp_dim: int = 2048,
        bottleneck_dim: int = 256,
        norm_last_layer: bool = False,
        momentum: float = 0.982,
        student_temperature: float = 0.1,
        first_temperature: float = 0.04,
        teacher_temperature: float = 0.07,
        temperature_warmup: float = 0.1,
        freeze_last_layer: float = 0.01,
        center_momentum: float = 0.9,
    ) -> None:
        super().__init__()
        self.momentum, self.center_momentum = momentum, center_momentum
        self.student_temperature, self.freeze_last_layer = student_temperature, freeze_last_layer
        self.first_temperature, self.teacher_temperature = first_temperature, teacher_temperature
        self.temperature_warmup = temperature_warmup
        self.head: DINOHead = DINOHead(
            encoder_dim,
            dim=dim,
            mlp_dim=mlp_dim,
            bottleneck_dim=bottleneck_dim,
            norm_last_layer=norm_last_layer,
        )
        self.register_buffer("center", torch.zeros(dim))
        self._collected: list[Tensor] = []  # of each accumulated part: the sum of the teacher's outputs, their number

    def forward(self, student: list[Tensor], teacher: list[Tensor], progress: float) -> dict[str, Tensor]:
        loss = dino_loss(
            student,
            teacher,
            self.center,
            student_temperature=self.student_temperature,
            teacher_temperature=self.temperature(progress),
        )
        if self.training:
            with torch.no_grad():
                total = torch.stack([logits.sum(0, dtype=self.center.dtype) for logits in teacher]).sum(0)
                count = total.new_full((1,), sum(map(len, teacher)))
                self._collected.append(torch.cat([total, count]))
        return {"loss": loss}

    def temperature(self, progress: float) -> float:
        """The teacher's temperature, constant within an epoch; progress in [0, 1) of the training."""
        epoch = int(progress * self.epochs + 1e-6)  # 3 / 10 * 10 is less than 3
        warmup = round(self.temperature_warmup * self.epochs)
        if epoch >= warmup:
            return self.teacher_temperature
        rise = epoch / max(warmup - 1, 1)
        return self.first_temperature + (self.teacher_temperature - self.first_temperature) * rise

    def before_step(self, progress: float) -> None:
        # The gradient is dropped and the parameter keeps requires_grad: DistributedDataParallel's buckets stay.
        if progress < self.freeze_last_layer:
            self.head.weight_g.grad = self.head.weight_v.grad = None

    def after_step(self, progress: float) -> None:
        if self._collected:
            collected = all_reduce_sum(torch.stack(self._collected).sum(0))
            self.center.lerp_(collected[:-1] / collected[-1], 1 - self.center_momentum)
            self._collected.clear()


@in_float32
def dino_loss(
    student: list[Tensor],
    teacher: list[Tensor],
    center: Tensor,
    *,
    student_temperature: float,
    teacher_temperature: float,
) -> Tensor:
    """The cross-entropy of the student's distributions with those of the teacher, the mean over pairs of other views.

    Args:
        student: logits of each view (B, K), global views first.
        teacher: logits of each global view (B, K); they get no gradient.
        center: (K,), taken off the teacher's.
        student_temperature, teacher_temperature: of the two softmax.
    """
    with torch.no_grad():
        targets = [torch.softmax((logits - center) / teacher_temperature, -1) for logits in teacher]
    terms = []
    for v, logits in enumerate(student):
        logits = logits / student_temperature
        for u, target in enumerate(targets):
            if u != v:  # the cross-entropy, without another (B, K) of logarithms
                terms.append(mean_over_rows(logits.logsumexp(-1) - (target * logits).sum(-1)))
    return torch.stack(terms).mean()


@dataclass(frozen=True)
class DINOConfig(ObjectiveConfig):
    """DINO, arXiv 2104.14294."""

    section: ClassVar[str] = "dino"
    recipe: ClassVar = {
        "optim.lr": 1e-4,
        "optim.lr_end": 1.25e-6,
        "optim.weight_decay": 0.04,
        "optim.weight_decay_end": 0.4,
        "optim.decay_1d": False,
        "optim.clip_grad": 0.3,
        "optim.clip": "parameter",
        "views.crop_area": (0.25, 1.0),
        "views.local_gray": 0.2,
        "model.drop_path_rate": 0.1,
        "ser.weight": 0.3,
    }

    dim: int = 65536
    """Number of prototypes."""
    mlp_dim: int = 2048
    """Hidden width of the head."""
    bottleneck_dim: int = 256
    """Width of what is compared with the prototypes."""
    norm_last_layer: bool = False
    """Keep the norm of the prototypes at 1."""
    momentum: float = 0.982
    """Of the teacher at the start; it rises to 1 along a cosine."""
    student_temperature: float = 0.1
    """Of the student's softmax."""
    first_temperature: float = 0.04
    """Of the teacher's softmax in the first epoch."""
    teacher_temperature: float = 0.07
    """Of the teacher's softmax after its warm-up."""
    temperature_warmup: float = 0.1
    """Of all epochs, with the teacher's temperature rising from one to the next."""
    freeze_last_layer: float = 0.01
    """Of all steps, with the prototypes as they were drawn."""
    center_momentum: float = 0.9
    """Of the mean of the teacher's outputs, which is taken off them."""

    def build(self, dim: int) -> DINO:
        return DINO(dim, **asdict(self))
