"""`SERLoss`: projector, group action and contrast, as one module that returns one scalar."""

import functools
import warnings
from numbers import Integral
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from ser_fast.device import require_dense
from ser_fast.distributed import all_gather_rows, all_gather_views, gather_counts, rank, world_size
from ser_fast.interpolation import INTERPOLATIONS, PADDINGS
from ser_fast.lattice import LatticeMap, Size
from ser_fast.ops.backends import check_name
from ser_fast.ops.contract import GroupAction, check_temperature
from ser_fast.ops.group_action import group_action
from ser_fast.ops.nt_xent import info_nce, nt_xent
from ser_fast.ops.reference import resampling_matrix

# Where the paper's text and the released scripts disagree. The temperatures are (paper, released).
TEMPERATURES = {"moco_v3": (0.3, 0.5), "barlow_twins": (0.3, 0.4), "dino": (0.5, 0.4)}
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"negatives": "both", "both_directions": False},
    "released": {"negatives": "other", "both_directions": True},
}
_MOST_PREFIX_TOKENS = 8  # [CLS], a distillation token, registers: models have up to 5


class SERLoss(nn.Module):
    """Soft Equivariance Regularization: the tokens of view 0, moved as the image moved, must match those of view 1.

    LayerNorm and projector (Linear, GELU, Linear, no biases), then rho(g1 o g0^-1) on the token lattice, then a
    patch-wise NT-Xent in which every token of every other image is a negative. Add it, times lambda (1 in the paper,
    0.3 with DINO), to the invariance loss of the method it regularises.

    It has parameters: give them to the optimizer and, where there are several ranks, hold it in the module that
    DistributedDataParallel wraps.

    Args:
        dim: C, channels of the tokens.
        preset: "paper" (what its text says: NT-Xent with the negatives of both views, view 0 moved to view 1) or
            "released" (what its scripts say: negatives of the other view only, both directions, other temperatures).
            The arguments below override it.
        objective: the method it regularises, for the preset's temperature: "moco_v3", "barlow_twins" or "dino". For any
            other method the default, MoCo-v3's, is a start: 0.3 ("paper") or 0.5 ("released").
        temperature: of the contrast. None: the preset's.
        negatives: "both" views' tokens of other images, or the "other" view's only.
        both_directions: also move view 1 to view 0, and average the two losses. With the keys of one view alone there
            is one direction.
        hidden_dim, out_dim: widths of the projector.
        interpolation, padding, antialias: of the resampling; see `group_action`.
        max_tokens: use at most this many token pairs of the batch (of this rank), drawn anew at every call from torch's
            generator of the tokens' device, also among those that a partial map leaves without a partner. None uses
            all of them.
        memory_budget: bytes that `nt_xent` may keep for its backward pass, to be faster; with `negatives="both"`,
            without keys and without `gather`.
        gather: contrast with the tokens of all ranks; see docs/distributed.md. Averaged over the ranks as
            DistributedDataParallel averages gradients, N ranks give what one rank gives on the whole batch. All ranks
            must hold the same parameters, which is looked at in calls 1, 2, 4, 8 and so on.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Raises:
        TypeError: a temperature that is no number, such as a parameter: it is not learned.
        ValueError: an option that isn't one of those named, a width below 1.

    Source: SER, arXiv 2603.06693, equations of section 3.

    Example:
        >>> ser = SERLoss(dim=384)
        >>> loss = ser(tokens0, tokens1, g0, g1)  # tokens after block 3; g0, g1 took the image to its views
        >>> (invariance_loss + loss).backward()
    """

    def __init__(
        self,
        dim: int,
        *,
        preset: str = "paper",
        objective: str = "moco_v3",
        temperature: float | None = None,
        negatives: str | None = None,
        both_directions: bool | None = None,
        hidden_dim: int = 512,
        out_dim: int = 512,
        interpolation: str = "bicubic",
        padding: str = "border",
        antialias: bool = False,
        max_tokens: int | None = None,
        memory_budget: int = 0,
        gather: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        _one_of("preset", preset, PRESETS)
        if objective not in TEMPERATURES:
            raise ValueError(
                f"objective: got {objective!r}, takes one of {', '.join(map(repr, TEMPERATURES))}; for another method "
                "leave it out, or give a temperature"
            )
        for name, width in (("dim", dim), ("hidden_dim", hidden_dim), ("out_dim", out_dim)):
            if not isinstance(width, Integral) or width < 1:
                raise ValueError(f"{name}: got {width}, takes a positive number")
        if isinstance(temperature, Tensor):
            raise TypeError(f"temperature: got {type(temperature).__name__}, takes a number; it is not learned")
        chosen = PRESETS[preset]
        preset_temperature = TEMPERATURES[objective][preset == "released"]
        self.temperature = preset_temperature if temperature is None else float(temperature)
        self.negatives: str = chosen["negatives"] if negatives is None else negatives
        self.both_directions: bool = chosen["both_directions"] if both_directions is None else both_directions
        _one_of("negatives", self.negatives, ("both", "other"))
        _one_of("interpolation", interpolation, INTERPOLATIONS)
        _one_of("padding", padding, PADDINGS)
        check_temperature(self.temperature)
        for name, flag in (("antialias", antialias), ("gather", gather)):
            if not isinstance(flag, bool):
                raise ValueError(f"{name}: got {flag!r}, takes True or False")
        check_name(backend)
        if max_tokens is not None and (not isinstance(max_tokens, Integral) or max_tokens < 1):
            raise ValueError(f"max_tokens: got {max_tokens}, takes None or a positive number")
        self.interpolation, self.padding, self.antialias = interpolation, padding, antialias
        if memory_budget < 0:
            raise ValueError(f"memory_budget: got {memory_budget}, takes 0 or a number of bytes")
        self.max_tokens, self.memory_budget, self.gather, self.backend = max_tokens, memory_budget, gather, backend
        self.dim = dim
        self._gathered_calls = 0
        self.norm = nn.LayerNorm(dim)
        self.projector = nn.Sequential(
            nn.Linear(dim, hidden_dim, bias=False), nn.GELU(), nn.Linear(hidden_dim, out_dim, bias=False)
        )

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature}, negatives={self.negatives!r}, both_directions={self.both_directions}, "
            f"interpolation={self.interpolation!r}, padding={self.padding!r}, antialias={self.antialias}"
        )

    def forward(
        self,
        tokens0: Tensor | None,
        tokens1: Tensor | None,
        g0: LatticeMap,
        g1: LatticeMap,
        keys0: Tensor | None = None,
        keys1: Tensor | None = None,
        *,
        mask0: Tensor | None = None,
        mask1: Tensor | None = None,
    ) -> Tensor:
        """The loss of one batch.

        Args:
            tokens0, tokens1: (B, H, W, C) or (B, H*W, C), the token maps of the two views; the lattices may differ.
            g0, g1: the maps that took the image to its views, on tokens or, with (B, H, W, C) tokens, on pixels. What
                they filled (`LatticeMap.frames`) takes no part.
            keys0, keys1: the momentum encoder's tokens of the same views. With them the loss is one-directional
                InfoNCE: the tokens given are the queries, the keys moved to the other view are positives and
                negatives, and get no gradient. One alone, for a method with one query view: the queries are the
                tokens of the other view, and those of its own may be None.
            mask0, mask1: (B, H*W) bool, the tokens that exist in a view (masked-image models drop some). A token takes
                part where it exists and all tokens that its partner is blended of do; what is in the place of the
                others must be finite. None: all exist.

        Returns:
            A scalar, float32 (float64 for float64 tokens). 0 with zero gradients where no token takes part, as with
            one image, whose tokens have no negatives. NaN where a token that takes part is NaN.

        Raises:
            TypeError: an argument that is no tensor or no LatticeMap, or tokens of another dtype than the parameters
                outside autocast.
            ValueError: shapes that don't fit the maps, masks that aren't (B, H*W) bool.
            RuntimeError: ranks with different parameters, with `gather`.
        """
        only0, only1 = keys1 is None and keys0 is not None, keys0 is None and keys1 is not None
        name0, view0 = ("keys0", keys0) if only0 and tokens0 is None else ("tokens0", tokens0)
        name1, view1 = ("keys1", keys1) if only1 and tokens1 is None else ("tokens1", tokens1)
        lattice0 = _lattice(name0, view0, "g0", g0, self.dim)
        lattice1 = _lattice(name1, view1, "g1", g1, self.dim)
        batch = _samples(view0)
        if batch != _samples(view1):
            raise ValueError(f"{name1}: got {_samples(view1)} samples, {name0} has {batch}")
        if g0.size_in != g1.size_in:
            raise ValueError(f"g1: got a map of images of {g1.size_in}, takes those of g0, {g0.size_in}")
        for name, keys, tokens in (("keys0", keys0, tokens0), ("keys1", keys1, tokens1)):
            if keys is not None and tokens is not None and keys.shape != tokens.shape:
                raise ValueError(f"{name}: got shape {tuple(keys.shape)}, its view's tokens {tuple(tokens.shape)}")
        self._check_dtypes(tokens0=tokens0, tokens1=tokens1, keys0=keys0, keys1=keys1)

        for name, mask, lattice in (("mask0", mask0, lattice0), ("mask1", mask1, lattice1)):
            expected = (batch, lattice[0] * lattice[1])
            if mask is not None and (mask.dtype != torch.bool or tuple(mask.shape) != expected):
                raise ValueError(f"{name}: got {mask.dtype} of shape {tuple(mask.shape)}, takes bool {expected}")

        if self.gather and world_size() > 1:
            self._check_ranks()
        elif batch == 1 and not torch.compiler.is_compiling():
            _warn_of_one_image()

        g = LatticeMap.relative(g0, g1).on(lattice0, lattice1)
        masks = mask0, mask1
        forth, back = not only1, only1 or (self.both_directions and not only0)
        detached = keys0 is not None or keys1 is not None
        # z[v] are the tokens of view v, sources[v] what is moved from it to the other view.
        asked = ((0, tokens0, back), (1, tokens1, forth))
        z = {v: self._project(x) for v, x, queries in asked if x is not None and (queries or not detached)}
        sources = z
        if detached:
            moves = ((0, keys0, forth), (1, keys1, back))
            sources = {v: self._project_keys(x) for v, x, moved in moves if x is not None and moved}
        losses = []
        if forth:
            losses.append(self._contrast(sources[0], z[1], g, masks, detached))
        if back:
            losses.append(self._contrast(sources[1], z[0], g.inverse(), masks[::-1], detached))
        return losses[0] if len(losses) == 1 else (losses[0] + losses[1]) / 2

    if TYPE_CHECKING:
        __call__ = forward  # nn.Module declares its own as Callable[..., Any]

    def _check_dtypes(self, **inputs: Tensor | None) -> None:
        """Refuse what the projector's first product would refuse in words of its own."""
        weight = next(self.projector.parameters(), None)
        for name, x in inputs.items():
            if weight is None or x is None or x.dtype == weight.dtype:
                continue
            casts = x.dtype.is_floating_point and torch.float64 not in (x.dtype, weight.dtype)
            if not (casts and torch.is_autocast_enabled(x.device.type)):
                way_out = "cast it, or call this under torch.autocast" if casts else "cast it"
                raise TypeError(f"{name}: got {x.dtype}, takes that of the parameters, {weight.dtype}; {way_out}")

    @torch.no_grad()
    def _check_ranks(self) -> None:
        """Refuse ranks whose parameters differ: left out of DistributedDataParallel they drift apart silently.

        They may be alike at first, and each look waits for the device: in calls 1, 2, 4, 8 and so on.
        """
        if torch.compiler.is_compiling():
            return
        self._gathered_calls += 1
        parameters = list(self.parameters())
        if self._gathered_calls & (self._gathered_calls - 1) or not parameters:
            return
        everything = torch.cat([parameter.flatten().float() for parameter in parameters])
        # One direction in the space of the parameters. Sums would not do: SGD leaves those of some layers as they are.
        direction = torch.arange(len(everything), device=everything.device, dtype=torch.float32).cos()
        own = torch.stack([(everything * direction).sum(), everything.norm()])
        of_ranks = all_gather_rows(own[None], [1] * world_size())
        spread = of_ranks[:, 0].max() - of_ranks[:, 0].min()
        if spread > 1e-3 * of_ranks[:, 1].max():  # far above the rounding of unlike devices
            raise RuntimeError(
                f"SERLoss: its parameters differ between the ranks in call {self._gathered_calls}; hold it in the "
                "module that DistributedDataParallel wraps"
            )

    def _replicate_for_data_parallel(self) -> NoReturn:
        raise RuntimeError("SERLoss: got nn.DataParallel, takes DistributedDataParallel")

    @torch.no_grad()
    def _project_keys(self, keys: Tensor) -> Tensor:
        return self._project(keys)

    def _project(self, tokens: Tensor) -> Tensor:  # (B, H, W, C) or (B, N, C) -> (B, N, D)
        return self.projector(self.norm(tokens)).flatten(1, -2)

    def _contrast(
        self,
        source: Tensor,
        target: Tensor,
        g: LatticeMap,
        masks: tuple[Tensor | None, Tensor | None],
        detached: bool,
    ) -> Tensor:
        """Move `source` (B, N0, D) to the lattice of `target` (B, N1, D) and contrast the two, row by row.

        The masks are of the source and of the target.
        """
        moved, valid = group_action(
            source,
            g.to(source.device, non_blocking=True),
            interpolation=self.interpolation,
            padding=self.padding,
            antialias=self.antialias,
            return_valid=True,
            backend=self.backend,
        )
        source_mask, target_mask = masks
        if source_mask is not None:
            valid = valid & self._all_taps(source_mask, g)
        if target_mask is not None:
            valid = valid & target_mask
        batch, count, _ = target.shape
        image = torch.arange(batch, device=target.device)[:, None].expand(batch, count).reshape(-1)  # (T,)
        moved, target, valid = moved.flatten(0, 1), target.flatten(0, 1), valid.reshape(-1)  # (T, D), (T, D), (T,)
        if self.max_tokens is not None and len(image) > self.max_tokens:
            rows = torch.randperm(len(image), device=image.device)[: self.max_tokens]
            moved, target, valid, image = moved[rows], target[rows], valid[rows], image[rows]

        both_views = self.negatives == "both" and not detached
        if self.gather and world_size() > 1:
            return self._contrast_with_all_ranks(moved, target, image, valid, both_views)
        options: dict[str, Any] = {"temperature": self.temperature, "image": image, "valid": valid}
        if both_views:
            return nt_xent(moved, target, **options, memory_budget=self.memory_budget, backend=self.backend)
        return info_nce(target, moved, **options, backend=self.backend)

    def _all_taps(self, mask: Tensor, g: LatticeMap) -> Tensor:
        """(B, N1) bool: whether all tokens that a moved one is blended of are among those of the mask (B, N0)."""
        g = g.to(mask.device)
        options = self.interpolation, self.padding, self.antialias
        weights = resampling_matrix(GroupAction(g.linear, g.offset, g.size_in, g.size_out, *options))
        return ~((weights != 0) & ~mask[:, None]).any(-1)

    def _contrast_with_all_ranks(
        self, moved: Tensor, target: Tensor, image: Tensor, valid: Tensor, both_views: bool
    ) -> Tensor:
        """This rank's anchors against every rank's rows, so that the mean over the ranks is the global mean."""
        counts = gather_counts(len(image), image.device)
        row = sum(counts[: rank()]) + torch.arange(len(image), device=image.device)  # this rank's rows among all
        image = image + (rank() << 32)  # images on different ranks are different images
        # Images and validity in one exchange: a row that takes no part has no image.
        key_image = all_gather_rows(image.masked_fill(~valid, -1), counts)
        key_valid = key_image >= 0
        query, positive = target, row
        if both_views:
            key = all_gather_views([moved, target], counts).flatten(0, 1)
            query = torch.cat([moved, target])
            image, valid = image.repeat(2), valid.repeat(2)
            key_image, key_valid = key_image.repeat(2), key_valid.repeat(2)
            positive = torch.cat([row + sum(counts), row])
        else:
            key = all_gather_rows(moved, counts)
        total = info_nce(
            query,
            key,
            temperature=self.temperature,
            image=image,
            key_image=key_image,
            valid=valid,
            key_valid=key_valid,
            positive=positive,
            reduction="sum",
            backend=self.backend,
        )
        return world_size() * total / key_valid.sum().clamp(min=1)


def _one_of(name: str, value: str, choices: Any) -> None:
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, takes one of {', '.join(map(repr, choices))}")


@functools.cache
def _warn_of_one_image() -> None:
    warnings.warn("SERLoss: got one image, whose tokens have no negatives: the loss is 0", stacklevel=5)


def _samples(tokens: Tensor | None) -> int:
    return 0 if tokens is None else len(tokens)


def _lattice(name: str, tokens: Tensor | None, map_name: str, g: LatticeMap, dim: int) -> Size:
    """The lattice of a view's tokens, checked against the map that made the view."""
    if not isinstance(tokens, Tensor):
        raise TypeError(f"{name}: got {type(tokens).__name__}, takes a tensor")
    require_dense(name, tokens)
    if not isinstance(g, LatticeMap):
        raise TypeError(f"{map_name}: got {type(g).__name__}, takes a LatticeMap")
    shape, size = tuple(tokens.shape), g.size_out
    if tokens.ndim not in (3, 4) or shape[-1] != dim:
        raise ValueError(f"{name}: got shape {shape}, takes (B, H, W, {dim}) or (B, H*W, {dim})")
    if len(g) not in (1, shape[0]):
        raise ValueError(f"{map_name}: got {len(g)} maps for {shape[0]} samples, takes one for each or one for all")
    if tokens.ndim == 3:
        if size[0] * size[1] != shape[1]:
            raise ValueError(
                f"{name}: got {shape[1]} tokens a sample, {map_name} gives a {size[0]}x{size[1]} lattice"
                + _advice(shape[1], size, map_name)
            )
        return size
    lattice = (shape[1], shape[2])
    if any(n == 0 or pixels % n for pixels, n in zip(size, lattice, strict=True)) and size != lattice:
        raise ValueError(
            f"{name}: its {lattice[0]}x{lattice[1]} lattice is neither the {size[0]}x{size[1]} that {map_name} gives "
            "nor that many pixels in whole patches"
        )
    return lattice


def _advice(tokens: int, size: Size, map_name: str) -> str:
    """What may be meant by that many tokens a sample where the map gives another number."""
    patches = [n for n in range(1, min(size) + 1) if size[0] % n == 0 and size[1] % n == 0]
    prefix = [extra for n in patches if 0 < (extra := tokens - size[0] * size[1] // n**2) <= _MOST_PREFIX_TOKENS]
    if any(tokens == size[0] * size[1] // n**2 for n in patches):
        return f"; unflatten them to (B, H, W, C), or take the map to their lattice by {map_name}.on"
    if prefix:
        return f"; drop the first {min(prefix)} if they are prefix tokens ([CLS], registers)"
    return ""
