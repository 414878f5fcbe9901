"""What a step costs, from a step on fake tensors: the trainer's calls on shapes alone, with every storage followed.

Fake tensors are of the CPU, whatever the device that is planned for: torch's fake CUDA tensors need a GPU to go
backward. Attention is then the CPU's fused one, which keeps what CUDA's keeps, and autocast the CPU's, which rounds the
same products.
"""

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ser_fast.distributed import imagined_ranks, world_size
from ser_fast.lattice import LatticeMap, Size
from ser_fast.ops.work import scratch_bytes
from ser_fast.training.accumulation import backward_in_parts
from ser_fast.training.config import ModelConfig, TrainConfig
from ser_fast.training.optim import build_optimizer, clip_groups
from ser_fast.training.pretraining import Pretraining
from ser_fast.views.color import LAYOUT
from ser_fast.views.recipe import MakeViews, View, Views
from ser_fast.views.samplers import Crop
from ser_fast.vit import SplitViT

_FEW = range(10, 21)  # pictures whose views are made, to know the memory of making those of a batch


@dataclass(frozen=True)
class StepCost:
    """Of one step on one rank; bytes, and floating-point operations.

    Attributes:
        parameters: of the student, its heads and buffers.
        teacher: its parameters and buffers.
        optimizer: its state.
        gradients: those that exist when most memory is taken, with what DistributedDataParallel copies them to.
        activations: all else at that time: what is kept for the backward pass, views, pictures, temporary tensors.
        half_flops, single_flops: of operands of 16 bits, and of wider ones.
        traffic: bytes that operators read and write, each by itself.
    """

    parameters: int
    teacher: int
    optimizer: int
    gradients: int
    activations: int
    half_flops: int
    single_flops: int
    traffic: int

    @property
    def peak(self) -> int:
        """Bytes that are taken at most."""
        return self.parameters + self.teacher + self.optimizer + self.gradients + self.activations

    @property
    def flops(self) -> int:
        """Of both kinds."""
        return self.half_flops + self.single_flops


class Work(TorchDispatchMode):
    """Follows the storages of all tensors that operators give, real ones or fake ones, and counts what operators do.

    Args:
        kind: of the backend whose temporary memory is counted; see `ser_fast.ops.work.scratch_bytes`.
        snapshot: called whenever there is more than ever.

    Attributes:
        live: bytes of the storages that exist.
        peak: the most that did at a time.
        at_peak: what `snapshot` gave then.
        half_flops, single_flops, traffic: as `StepCost` has them.
    """

    def __init__(self, kind: str = "cpu", snapshot: Callable[[], int] = lambda: 0) -> None:
        super().__init__()
        self.kind, self.snapshot, self.threads = kind, snapshot, torch.get_num_threads()
        self.live = self.peak = self.at_peak = 0
        self.half_flops = self.single_flops = self.traffic = 0
        self._storages: dict[int, weakref.ref[Any]] = {}

    def hold(self, tensors: Iterable[Tensor]) -> int:
        """Follow tensors that were made before; their bytes."""
        before = self.live
        for tensor in tensors:
            self._follow(tensor)
        self.note(0)
        return self.live - before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):  # it has no value
            return False if args[0].dtype == torch.bool else 1
        out = func(*args, **kwargs)
        inputs, outputs = [*_tensors(args), *_tensors(kwargs.values())], [*_tensors((out,))]
        for tensor in outputs:
            self._follow(tensor)
        packet = func._overloadpacket
        scratch = scratch_bytes(packet, args, self.kind, self.threads)
        self.note(scratch)
        if packet in flop_registry:
            flops = flop_registry[packet](*args, **kwargs, out_val=out)
            if inputs[0].dtype.itemsize == 2:
                self.half_flops += flops
            else:
                self.single_flops += flops
        if func._schema.is_mutable or not _is_view(inputs, outputs):
            self.traffic += sum(map(_bytes, inputs)) + sum(map(_bytes, outputs)) + 2 * scratch
        return out

    def note(self, besides: int) -> None:
        """Take the peak of what is live, with so many bytes besides that are gone at once."""
        if self.live + besides > self.peak:
            self.peak, self.at_peak = self.live + besides, self.snapshot()

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return

        def gone(_: Any) -> None:
            self._storages.pop(key, None)
            self.live -= size

        self._storages[key] = weakref.ref(storage, gone)
        self.live += size


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Those among the values, and in lists and tuples of them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _bytes(tensor: Tensor) -> int:
    return min(tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes())


def _is_view(inputs: list[Tensor], outputs: list[Tensor]) -> bool:
    """Whether an operator only gives its inputs other shapes, or memory that nothing was written to."""
    known = {tensor.untyped_storage()._cdata for tensor in inputs}
    return not inputs or all(tensor.untyped_storage()._cdata in known for tensor in outputs)


class _DrawnModel(ModelConfig):
    """The model with drawn weights in place of pretrained ones, which have the same shapes."""

    def build(self) -> SplitViT:
        options = {"pretrained": "none", "split": self.blocks_before_cls}
        encoder = ModelConfig(**{**vars(self), **options}).build()
        encoder.pretrained = self.pretrained != "none"
        return encoder


def step_cost(
    config: TrainConfig,
    *,
    canvas: int,
    lattices: tuple[Size, Size],
    ranks: int = 1,
    amp: torch.dtype | None = None,
    kind: str = "cpu",
) -> StepCost:
    """The cost of a step, on one of `ranks` ranks.

    Args:
        config: of the run.
        canvas: side of the squares that pictures are read as, in pixels.
        lattices: of the two global views of the equivariance share, in tokens; those of crops are the image's.
        ranks: that share the batch.
        amp: the dtype of autocast; None: without.
        kind: of the backend; see `ser_fast.ops.work.scratch_bytes`.

    Raises:
        ValueError: an option that doesn't fit the encoder.
    """
    model_config = _DrawnModel(**vars(config.model))
    addons = config.addons
    if "ser" in addons:  # what is asked for need not run here
        addons = {**addons, "ser": replace(addons["ser"], backend="auto")}  # type: ignore[call-arg]
    config = replace(config, model=model_config, addons=addons)
    batch = config.optim.batch_size // ranks
    accumulate = config.optim.accumulate
    exact = config.optim.in_exact_parts
    with imagined_ranks(ranks), torch.device("meta"):
        model = config.build()
    make_views = config.views.build(
        model.encoder.patch_size[0], config.seed, model.needs, image_size=config.model.image_size
    )
    contrasted = batch if exact else batch // accumulate
    making = _bytes_of_making_views(make_views, contrasted, canvas)
    with imagined_ranks(ranks), FakeTensorMode(allow_non_fake_inputs=True):
        return _run(config, model, make_views, lattices, batch, canvas, amp, kind, making)


def _run(
    config: TrainConfig,
    model: Pretraining,
    make_views: MakeViews,
    lattices: tuple[Size, Size],
    batch: int,
    canvas: int,
    amp: torch.dtype | None,
    kind: str,
    making: int,
) -> StepCost:
    """The step itself, as `Trainer.step` takes it, where all tensors are fake."""
    accumulate = config.optim.accumulate
    exact = config.optim.in_exact_parts
    model.to_empty(device="cpu").train()
    optimizer = _optimizer_with_state(config, model, kind)
    gradients: dict[Tensor, int] = {}

    def count(parameter: Tensor) -> None:
        gradients[parameter] = parameter.numel() * parameter.itemsize

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(count)
    work = Work(kind, lambda: sum(gradients.values()))
    teacher = [] if model.teacher is None else [*model.teacher.parameters(), *model.teacher.buffers()]
    of_teacher = work.hold(teacher)
    of_parameters = work.hold([*model.parameters(), *model.buffers()])
    of_optimizer = work.hold(x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor))
    exchanged = trained if world_size() > 1 and not exact else []  # by DistributedDataParallel, which copies them
    copies = [torch.empty_like(parameter) for parameter in exchanged]
    of_copies = work.hold(copies)
    static = work.live
    with work:
        pictures = torch.empty(batch, 3, canvas, canvas, dtype=torch.uint8)
        objective, progress = model.objective, 0.5
        if objective.moves_teacher == "before":
            model.move_teacher(progress)
        if exact:
            work.note(making)
            views = planned_views(make_views, model.encoder.image_size, batch, lattices)
            backward_in_parts(model, views, accumulate, progress, amp=amp)
            del views
        else:
            for _ in range(accumulate):
                work.note(making)
                views = planned_views(make_views, model.encoder.image_size, batch // accumulate, lattices)
                with torch.autocast("cpu", amp, enabled=amp is not None):
                    loss = model(views, progress)["loss"]
                (loss / accumulate).backward()
                del views, loss
        clip_groups(config.optim, model)
        objective.before_step(progress)
        optimizer.step()
        objective.after_step(progress)
        if objective.moves_teacher == "after":
            model.move_teacher(progress, torch.zeros(()))
        del pictures, copies
    return StepCost(
        parameters=of_parameters,
        teacher=of_teacher,
        optimizer=of_optimizer,
        gradients=work.at_peak + of_copies,
        activations=work.peak - static - work.at_peak,
        half_flops=work.half_flops,
        single_flops=work.single_flops,
        traffic=work.traffic,
    )


def _optimizer_with_state(config: TrainConfig, model: Pretraining, kind: str) -> torch.optim.Optimizer:
    """The optimizer as it is after its first step."""
    optimizer = build_optimizer(config.optim, model)
    for group in optimizer.param_groups:
        if kind != "cpu" and group.get("foreach") is None and not group.get("fused"):
            group["foreach"] = True  # torch's default on CUDA
        for parameter in group["params"]:
            parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return optimizer


def planned_views(make_views: MakeViews, image_size: Size, batch: int, lattices: tuple[Size, Size]) -> Views:
    """Empty views, of the shapes that `make_views` gives a batch."""
    make, chosen, patch = make_views, round(make_views.share * batch), make_views.patch_size

    def view(sizes: list[tuple[int, Size]], role: Any = "global", color: bool = True) -> View:
        parts = [torch.empty(count, 3, *size) for count, size in sizes if count]
        linear, offset = torch.empty(chosen, 2, 2, dtype=torch.float64), torch.empty(chosen, 2, dtype=torch.float64)
        g = LatticeMap(linear, offset, image_size, sizes[0][1])
        return View(parts, g, torch.empty(chosen, len(LAYOUT), dtype=torch.float64) if color else None, role)

    views = []
    for height, width in lattices:
        if isinstance(make.sampler, Crop):
            views.append(view([(batch, image_size)]))
        else:
            views.append(view([(chosen, (height * patch, width * patch)), (batch - chosen, image_size)]))
    for local in make.locals:
        side = local.side(image_size, patch)
        views.append(view([(batch, (side, side))], "local"))
    if chosen and "plain" in make.needs:
        views.append(view([(chosen, image_size)], "plain", color=False))
    if chosen and "turns" in make.needs:
        assert make.turns is not None
        side = make.turns.side(image_size, patch)
        views += [view([(chosen, (side, side))], "turn") for _ in range(4)]
    return Views(views, chosen)


def _bytes_of_making_views(make_views: MakeViews, batch: int, canvas: int) -> int:
    """The most memory that making a batch's views takes: measured on a few pictures, in proportion."""

    def rounding(count: int) -> float:
        return abs(round(make_views.share * count) / count - make_views.share)

    few = batch if batch < _FEW.stop else min(_FEW, key=rounding)
    return _bytes_of_making_few(make_views, few, canvas) * batch // few


@functools.lru_cache
def _bytes_of_making_few(make_views: MakeViews, count: int, canvas: int) -> int:
    images = torch.zeros(count, 3, canvas, canvas, dtype=torch.uint8)
    with Work() as work:
        make_views(images, torch.arange(count), 0, torch.ones(count, dtype=torch.float64))
    return work.peak
