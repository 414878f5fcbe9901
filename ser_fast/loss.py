"""`SERLoss`: projector, group action and contrast, as one module that returns one scalar."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ser_fast.distributed import all_gather_rows, all_gather_views, gather_counts, rank, world_size
from ser_fast.interpolation import INTERPOLATIONS, PADDINGS
from ser_fast.lattice import LatticeMap, Size
from ser_fast.ops.contract import GroupAction
from ser_fast.ops.group_action import group_action
from ser_fast.ops.nt_xent import info_nce, nt_xent
from ser_fast.ops.reference import resampling_matrix

# Where the paper's text and the released scripts disagree. The temperatures are (paper, released).
TEMPERATURES = {"moco_v3": (0.3, 0.5), "barlow_twins": (0.3, 0.4), "dino": (0.5, 0.4)}
_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"negatives": "both", "both_directions": False},
    "released": {"negatives": "other", "both_directions": True},
}


class SERLoss(nn.Module):
    """Soft Equivariance Regularization: the tokens of view 0, moved as the image moved, must match those of view 1.

    LayerNorm and projector (Linear, GELU, Linear, no biases), then rho(g1 o g0^-1) on the token lattice, then a
    patch-wise NT-Xent in which every token of every other image is a negative. Add it, times lambda (1 in the paper,
    0.3 with DINO), to the invariance loss of the method it regularises.

    Args:
        dim: C, channels of the tokens.
        preset: "paper" (what its text says: NT-Xent with the negatives of both views, view 0 moved to view 1) or
            "released" (what its scripts say: negatives of the other view only, both directions, other temperatures).
            The arguments below override it.
        objective: the method it regularises, for the preset's temperature: "moco_v3", "barlow_twins" or "dino".
        temperature: of the contrast.
        negatives: "both" views' tokens of other images, or the "other" view's only.
        both_directions: also move view 1 to view 0, and average the two losses.
        hidden_dim, out_dim: widths of the projector.
        interpolation, padding, antialias: of the resampling; see `group_action`.
        max_tokens: use at most this many token pairs of the batch (of this rank), drawn anew at every call from torch's
            generator of the tokens' device, also among those that a partial map leaves without a partner. None uses
            all of them.
        memory_budget: bytes that `nt_xent` may keep for its backward pass, to be faster; with `negatives="both"`,
            without keys and without `gather`.
        gather: contrast with the tokens of all ranks; see `ser_fast.distributed`. Averaged over the ranks as
            DistributedDataParallel averages gradients, N ranks give what one rank gives on the whole batch.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Raises:
        ValueError: an option that isn't one of those named.

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
        _one_of("preset", preset, _PRESETS)
        _one_of("objective", objective, TEMPERATURES)
        chosen = _PRESETS[preset]
        self.temperature = TEMPERATURES[objective][preset == "released"] if temperature is None else temperature
        self.negatives: str = chosen["negatives"] if negatives is None else negatives
        self.both_directions: bool = chosen["both_directions"] if both_directions is None else both_directions
        _one_of("negatives", self.negatives, ("both", "other"))
        _one_of("interpolation", interpolation, INTERPOLATIONS)
        _one_of("padding", padding, PADDINGS)
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature: got {temperature}, takes a finite positive number")
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens: got {max_tokens}, takes None or a positive number")
        self.interpolation, self.padding, self.antialias = interpolation, padding, antialias
        if memory_budget < 0:
            raise ValueError(f"memory_budget: got {memory_budget}, takes 0 or a number of bytes")
        self.max_tokens, self.memory_budget, self.gather, self.backend = max_tokens, memory_budget, gather, backend
        self.dim = dim
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
        tokens0: Tensor,
        tokens1: Tensor,
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
            g0, g1: the maps that took the image to its views, on tokens or, with (B, H, W, C) tokens, on pixels.
            keys0, keys1: the momentum encoder's tokens of the same views. With them the loss is one-directional
                InfoNCE: the tokens given are the queries, the keys moved to the other view are positives and
                negatives, and get no gradient.
            mask0, mask1: (B, H*W) bool, the tokens that exist in a view (masked-image models drop some). A token takes
                part where it exists and all tokens that its partner is blended of do; what is in the place of the
                others must be finite. None: all exist.

        Returns:
            A scalar, float32 (float64 for float64 tokens). 0 with zero gradients where no token takes part.

        Raises:
            TypeError: an argument that is no tensor or no LatticeMap.
            ValueError: shapes that don't fit the maps, masks that aren't (B, H*W) bool, or one of keys0, keys1 without
                the other.
        """
        if (keys0 is None) != (keys1 is None):
            raise ValueError("keys0, keys1: give both or neither")
        lattice0 = _lattice("tokens0", tokens0, "g0", g0, self.dim)
        lattice1 = _lattice("tokens1", tokens1, "g1", g1, self.dim)
        if len(tokens0) != len(tokens1):
            raise ValueError(f"tokens1: got {len(tokens1)} samples, tokens0 has {len(tokens0)}")
        if g0.size_in != g1.size_in:
            raise ValueError(f"g1: got a map of images of {g1.size_in}, takes those of g0, {g0.size_in}")
        for name, keys, tokens in (("keys0", keys0, tokens0), ("keys1", keys1, tokens1)):
            if keys is not None and keys.shape != tokens.shape:
                raise ValueError(f"{name}: got shape {tuple(keys.shape)}, its view's tokens {tuple(tokens.shape)}")

        for name, mask, lattice in (("mask0", mask0, lattice0), ("mask1", mask1, lattice1)):
            expected = (len(tokens0), lattice[0] * lattice[1])
            if mask is not None and (mask.dtype != torch.bool or tuple(mask.shape) != expected):
                raise ValueError(f"{name}: got {mask.dtype} of shape {tuple(mask.shape)}, takes bool {expected}")

        g = LatticeMap.relative(g0, g1).on(lattice0, lattice1)
        masks = mask0, mask1
        z1 = self._project(tokens1)
        if keys0 is None or keys1 is None:
            z0 = self._project(tokens0)
            loss = self._contrast(z0, z1, g, masks, detached=False)
            back = (z1, z0) if self.both_directions else None
        else:
            loss = self._contrast(self._project_keys(keys0), z1, g, masks, detached=True)
            back = (self._project_keys(keys1), self._project(tokens0)) if self.both_directions else None
        if back is not None:
            loss = (loss + self._contrast(*back, g.inverse(), masks[::-1], detached=keys0 is not None)) / 2
        return loss

    if TYPE_CHECKING:
        __call__ = forward  # nn.Module declares its own as Callable[..., Any]

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


def _lattice(name: str, tokens: Tensor, map_name: str, g: LatticeMap, dim: int) -> Size:
    """The lattice of a view's tokens, checked against the map that made the view."""
    if not isinstance(tokens, Tensor):
        raise TypeError(f"{name}: got {type(tokens).__name__}, takes a tensor")
    if not isinstance(g, LatticeMap):
        raise TypeError(f"{map_name}: got {type(g).__name__}, takes a LatticeMap")
    shape, size = tuple(tokens.shape), g.size_out
    if tokens.ndim not in (3, 4) or shape[-1] != dim:
        raise ValueError(f"{name}: got shape {shape}, takes (B, H, W, {dim}) or (B, H*W, {dim})")
    if len(g) not in (1, shape[0]):
        raise ValueError(f"{map_name}: got {len(g)} maps for {shape[0]} samples, takes one for each or one for all")
    if tokens.ndim == 3:
        if size[0] * size[1] != shape[1]:
            raise ValueError(f"{name}: got {shape[1]} tokens a sample, {map_name} gives a {size[0]}x{size[1]} lattice")
        return size
    lattice = (shape[1], shape[2])
    if any(n == 0 or pixels % n for pixels, n in zip(size, lattice, strict=True)) and size != lattice:
        raise ValueError(
            f"{name}: its {lattice[0]}x{lattice[1]} lattice is neither the {size[0]}x{size[1]} that {map_name} gives "
            "nor that many pixels in whole patches"
        )
    return lattice
