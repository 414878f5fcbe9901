"""Encoder, objective and add-ons as one module, which walks over every view once."""

import copy
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from ser_fast.addons.base import AddOn, LayerView
from ser_fast.distributed import world_size
from ser_fast.objectives.base import Objective
from ser_fast.views.recipe import View, Views
from ser_fast.vit import Encoded, SplitViT

_ROLES = "global", "local", "plain", "turn"


class Teacher(nn.Module):
    """The exponential moving average of an encoder and an objective's head, in which nothing is dropped.

    Args:
        encoder: the student, copied.
        head: the objective's, copied.
    """

    def __init__(self, encoder: SplitViT, head: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = copy.deepcopy(encoder), copy.deepcopy(head)
        self.requires_grad_(False)
        for module in self.modules():
            if isinstance(module, DropPath):  # train() would drop paths in a teacher, too
                module.drop_prob = 0.0


class Pretraining(nn.Module):
    """What is trained: one module, so that DistributedDataParallel sees one forward pass.

    Args:
        encoder: the model to pretrain; the objective may prepare it, unless its weights are pretrained ones.
        objective: gives the invariance loss; its teacher, where it has one, is made and moved here.
        addons: by name, the weight and the term. Weight 0 computes a term on detached features: its heads learn, and
            the encoder gets no gradient.

    Raises:
        ValueError: an add-on that reads what the encoder or the objective does not have.
    """

    def __init__(
        self, encoder: SplitViT, objective: Objective, addons: Mapping[str, tuple[float, AddOn]] | None = None
    ) -> None:
        super().__init__()
        if not encoder.pretrained:
            objective.prepare(encoder)
        self.encoder, self.objective = encoder, objective
        self.teacher = None if objective.momentum is None else Teacher(encoder, objective.head)
        self.addons = nn.ModuleDict({name: addon for name, (_, addon) in (addons or {}).items()})
        self.weights = {name: weight for name, (weight, _) in (addons or {}).items()}
        for name, addon in self._addons().items():
            addon.prepare(encoder)
            no_cls = getattr(encoder, "cls_token", None) is None or min(addon.layers) <= encoder.split
            if addon.reads == "cls" and no_cls:
                raise ValueError(
                    f"{name}.layers: got {min(addon.layers)}, where there is no class token; it enters after "
                    f"{encoder.split} blocks"
                )
            if "teacher" in addon.needs and self.teacher is None:
                raise ValueError(f"{name}: needs a teacher, and the objective has none")

    def forward(self, views: Views, progress: float) -> dict[str, Tensor]:
        """The losses of one batch.

        Args:
            views: of the batch.
            progress: in [0, 1) of the training.

        Returns:
            Scalars: "loss" to step on, "invariance", every add-on by its name (unweighted), and the parts of each.
        """
        return self.contrast(views, self.encode(views), self.teach(views), progress)

    def encode(self, views: Views) -> list[Encoded]:
        """What the encoder gives of each view: the embedding, and the layers that add-ons read."""
        return _walk(self.encoder, views.views, {role: self._layers(role) for role in _ROLES})

    @torch.no_grad()
    def teach(self, views: Views) -> list[Encoded | None]:
        """What the teacher's encoder gives of each global view; None of the others, and without a teacher."""
        if self.teacher is None:
            return [None] * len(views.views)
        addons = self._addons().values()
        layers = sorted({layer for addon in addons if "teacher" in addon.needs for layer in addon.layers})
        return [_encode(self.teacher.encoder, view, layers) if view.role == "global" else None for view in views.views]

    def contrast(
        self, views: Views, seen: list[Encoded], teacher: list[Encoded | None], progress: float
    ) -> dict[str, Tensor]:
        """The losses, as `forward` returns them, from what `encode` and `teach` gave of the whole batch."""
        addons = self._addons()
        student = self._project(self.objective.head, seen)
        with torch.no_grad():
            targets = [] if self.teacher is None else self._project(self.teacher.head, teacher)
        parts = self.objective(student, targets, progress)
        losses = {"loss": parts["loss"], "invariance": parts["loss"]}
        losses |= {name: value for name, value in parts.items() if name != "loss"}
        for name, addon in addons.items():
            parts = addon(
                [
                    self._layer_view(addon, view, encoded, known, views.equivariant, detach=self.weights[name] == 0)
                    for view, encoded, known in zip(views.views, seen, teacher, strict=True)
                    if view.role in addon.roles
                ]
            )
            losses["loss"] = losses["loss"] + (self.weights[name] or 1.0) * parts["loss"]
            losses[name] = parts["loss"]
            losses |= {f"{name}_{part}": value for part, value in parts.items() if part != "loss"}
        return losses

    @torch.no_grad()
    def move_teacher(self, progress: float, skip: Tensor | None = None) -> None:
        """Move the teacher towards the student.

        Args:
            progress: in [0, 1] of the training.
            skip: a scalar; 1 leaves the teacher as it is, 0 moves it.
        """
        if self.teacher is None or self.objective.momentum is None:
            return
        rate = (1 - self.objective.momentum) * (1 + math.cos(math.pi * progress)) / 2
        slow: list[Tensor] = [*self.teacher.encoder.parameters(), *self.teacher.head.parameters()]
        fast: list[Tensor] = [*self.encoder.parameters(), *self.objective.head.parameters()]
        if skip is None:
            torch._foreach_lerp_(slow, fast, rate)
        else:  # the same numbers
            change = torch._foreach_sub(fast, slow)
            torch._foreach_mul_(change, 1 - skip)
            torch._foreach_add_(slow, change, alpha=rate)

    def compile_blocks_and_heads(self, **options: Any) -> None:
        """Compile the encoders' blocks, all of which share what is compiled, and the objective's heads, in place.

        Losses and views stay as they are. Over several ranks so do the heads, whose batch norms talk to each other.

        Args:
            options: of torch.compile.
        """
        encoders = [self.encoder] if self.teacher is None else [self.encoder, self.teacher.encoder]
        parts: list[nn.Module] = [block for encoder in encoders for block in encoder.get_submodule("blocks").children()]
        if world_size() == 1:
            parts += [*self.objective.children(), *([] if self.teacher is None else [self.teacher.head])]
        for part in parts:
            part.compile(dynamic=True, **options)  # lattices change from step to step

    @property
    def product(self) -> SplitViT:
        """The encoder that the objective exports."""
        if self.objective.exports == "teacher" and self.teacher is not None:
            return self.teacher.encoder
        return self.encoder

    @property
    def needs(self) -> frozenset[str]:
        """What the add-ons need of the views; see `ser_fast.addons.base.AddOn`."""
        return frozenset(need for addon in self._addons().values() for need in addon.needs)

    def _layers(self, role: str) -> list[int]:
        """The layers that add-ons read of views of a role."""
        return sorted({layer for addon in self._addons().values() if role in addon.roles for layer in addon.layers})

    def _addons(self) -> dict[str, AddOn]:
        return dict(self.addons.items())  # type: ignore[arg-type]

    def _project(self, head: nn.Module, seen: Sequence[Encoded | None]) -> list[Tensor]:
        """The head's output of each view that has an embedding."""
        embeddings = [encoded.embedding for encoded in seen if encoded is not None and encoded.embedding is not None]
        if self.objective.joins_views:
            return list(head(torch.cat(embeddings)).split([len(embedding) for embedding in embeddings]))
        return [head(embedding) for embedding in embeddings]

    def _layer_view(
        self, addon: AddOn, view: View, student: Encoded, teacher: Encoded | None, count: int, *, detach: bool
    ) -> LayerView:
        features = _features(self.encoder, addon, student, count)
        if detach:
            features = {layer: feature.detach() for layer, feature in features.items()}
        keys = None
        if "teacher" in addon.needs and teacher is not None and self.teacher is not None:
            keys = _features(self.teacher.encoder, addon, teacher, count)
        return LayerView(features, keys, view.g, view.color if "color" in addon.needs else None, view.role)


def _walk(encoder: SplitViT, views: list[View], layers: Mapping[str, list[int]]) -> list[Encoded]:
    """The embeddings of the views, and the layers of their role: small views of one size in one walk.

    A view that is made for add-ons alone is walked to the highest of its layers and no further.
    """
    seen: list[Encoded] = []
    for (role, _), group in itertools.groupby(views, key=lambda view: (view.role, view.images[0].shape)):
        alike, read = list(group), layers[role]
        if role == "global":
            seen += [_encode(encoder, view, read) for view in alike]
            continue
        until = max(read, default=0) if role in ("plain", "turn") else None
        together = encoder.encode(torch.cat([view.images[0] for view in alike]), read, until=until)
        seen += [_part(together, index, len(alike)) for index in range(len(alike))]
    return seen


def _part(encoded: Encoded, index: int, count: int) -> Encoded:
    """One of `count` views that were encoded together."""
    embedding = None if encoded.embedding is None else encoded.embedding.chunk(count)[index]
    tokens, cls = (
        {layer: feature.chunk(count)[index] for layer, feature in found.items()}
        for found in (encoded.tokens, encoded.cls)
    )
    return Encoded(embedding, tokens, cls)


def _encode(encoder: SplitViT, view: View, layers: list[int]) -> Encoded:
    """The embeddings (B, C) of all parts of a view, and the layers of the first one."""
    first = encoder.encode(view.images[0], layers)
    others = [encoder.encode(images).embedding for images in view.images[1:]]
    embeddings = [embedding for embedding in (first.embedding, *others) if embedding is not None]
    return first._replace(embedding=torch.cat(embeddings))


def _features(encoder: SplitViT, addon: AddOn, encoded: Encoded, count: int) -> dict[int, Tensor]:
    """What an add-on reads of the first `count` samples; the last layer's after the final norm."""
    found = encoded.cls if addon.reads == "cls" else encoded.tokens
    features = {layer: found[layer][:count] for layer in addon.layers}
    if encoder.depth in features:
        features[encoder.depth] = encoder.norm_final(features[encoder.depth])
    if addon.reads == "mean":
        features = {layer: tokens.mean((1, 2)) for layer, tokens in features.items()}
    return features
