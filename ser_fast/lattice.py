"""`LatticeMap`: an affine map of the image plane, acting on a lattice of tokens or of pixels.

Coordinates (y down, x right). A lattice of H x W tokens covers [0, H] x [0, W]; token (i, j) has its center at
(i + 1/2, j + 1/2). Pixels likewise. With patches of p pixels, u_token = u_pixel / p, so the same map moves pixels and
tokens; a resize to h x w is u' = u * (h/H, w/W), which is PyTorch's half-pixel convention (align_corners=False).

A map is stored the way resampling needs it, from OUTPUT to INPUT, about the two lattices' centers:

    u_in - (H, W)/2  =  linear (u_out - (h, w)/2) + offset

About the centers the elements of D4 (rotations by 90 degrees and flips) have entries 0 and +-1, token centers are
half-integers, and all arithmetic on them is exact.

A composed map is one affine map, and knows besides which part of its output was seen: `ser_fast.frames`.

Over 450 lines: one class, its constructors, its algebra and what is read of it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.data._utils.collate import default_collate_fn_map  # where the docs of default_collate register types

from ser_fast.device import require_dense, send
from ser_fast.frames import cat_frames, frame_of_lattice, frames_through, in_frames, join_frames

Size = tuple[int, int]

# A center this close to the edge of the lattice (in tokens) lies in it; a position this close to the border between
# two tokens lies on it. Far above the rounding of composed maps, far below anything an image shows.
TOLERANCE = 1e-4

# A map with a number beyond this, or that is not finite, takes nothing from its lattice: products of smaller ones are
# finite. A position farther out than FARTHEST tokens counts as that far: float64 has 20 bits left for the place within
# a token there.
LARGEST = 1e100
MOST_TOKENS = 2**31 - 1  # of a side, and of a lattice that is computed on: what indices in kernels can count
FARTHEST = 2.0**32

_ROT90 = ((0.0, 1.0), (-1.0, 0.0))
_HFLIP = ((1.0, 0.0), (0.0, -1.0))


def precision(device: torch.device) -> torch.dtype:
    """What maps are kept in on a device: float64, which MPS doesn't have; there float32, in which D4 is exact, too."""
    return torch.float32 if device.type == "mps" else torch.float64


def _d4_table() -> Tensor:
    """(8, 2, 2) linear parts of D4 by code: code = k + 4 f is hflip f times, then rot90 k times."""
    rot90, hflip = torch.tensor(_ROT90, dtype=torch.float64), torch.tensor(_HFLIP, dtype=torch.float64)
    power = torch.linalg.matrix_power
    return torch.stack([power(hflip, f) @ power(rot90, k) for f in range(2) for k in range(4)]) + 0.0  # no -0


_D4 = _d4_table()


def _centers(size: Sequence[int], like: Tensor) -> tuple[Tensor, Tensor]:
    """The centers of a lattice's tokens about its own: y and x, each (h*w,)."""
    h, w = size
    y = torch.arange(h, dtype=like.dtype, device=like.device) + (0.5 - h / 2)
    x = torch.arange(w, dtype=like.dtype, device=like.device) + (0.5 - w / 2)
    return y[:, None].expand(h, w).reshape(-1), x[None, :].expand(h, w).reshape(-1)


def positions(linear: Tensor, offset: Tensor, size_in: Sequence[int], size_out: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Where each output token's center comes from: input lattice coordinates y and x, each (B, h*w)."""
    y, x = _centers(size_out, linear)
    source = linear[:, :, :1] * y + linear[:, :, 1:] * x + offset[:, :, None]  # (B, 2, h*w)
    return source[:, 0] + size_in[0] / 2, source[:, 1] + size_in[1] / 2


def usable(linear: Tensor, offset: Tensor) -> Tensor:
    """(B,) bool: every number of the map is finite and no larger than LARGEST."""
    largest = min(LARGEST, torch.finfo(linear.dtype).max)
    return torch.cat([linear.flatten(1), offset], 1).abs().amax(1) <= largest  # amax gives NaN where there is one


@dataclass(frozen=True, eq=False)
class LatticeMap:
    """A batch of affine maps from one lattice to another.

    Attributes:
        linear: (B, 2, 2) float64 (float32 on MPS), output to input, rows and columns in the order (y, x).
        offset: (B, 2) likewise, in input tokens, (y, x).
        size_in: (H, W) tokens of the lattice it acts on.
        size_out: (h, w) tokens of the lattice it gives.
        axis_aligned: known, without reading `linear`, to be a D4 element with scales and shifts along the axes.
        frames: (B, K, 3) like linear, bands of the output that show the picture; see below. None: all of it does.

    `a @ b` applies b first. Build one with `identity`, `rot90`, `hflip`, `vflip`, `d4`, `resize`, `rotate`, `crop` or
    `affine`: the input size comes first, and per-sample arguments are tensors of B values. `stack` and `cat` join the
    maps of samples, and so does the DataLoader: a Dataset may return a map of one sample, torch's `default_collate`
    makes a batch of them, and `pin_memory=True` pins it.

    A rotation, or any map that reaches beyond its lattice, fills what comes from outside. Such a map keeps the frame of
    its lattice in `frames`, and so does all that is composed with it: `valid`, `relative` and SERLoss then leave out
    the tokens whose centers show filling, in either view. D4, resizes and crops within the picture fill nothing and
    keep no frame. Where a picture goes on beyond its frame, as with border or reflection padding that both views
    share, `dataclasses.replace(g, frames=None)` says so.

    The constructors refuse numbers that are not finite. A map that got a NaN, an Inf or a number beyond 1e100 by other
    ways is taken on every device alike, since refusing it would wait for the device: its tokens are not `valid`, and
    `group_action` makes them 0. What is farther out than 2^32 tokens counts as that far.

    Raises:
        TypeError: `linear` or `offset` is no float64 tensor (on MPS, float32).
        ValueError: their shapes or devices don't fit, or a size is no pair of whole numbers.

    Example:
        >>> g0 = LatticeMap.resize((14, 14), (12, 16), batch=8)
        >>> g1 = LatticeMap.rot90((14, 14), torch.randint(4, (8,)))
        >>> LatticeMap.relative(g0, g1).size_in  # from view 0 to view 1, one map
        (12, 16)
    """

    linear: Tensor
    offset: Tensor
    size_in: Size
    size_out: Size
    axis_aligned: bool = False
    frames: Tensor | None = None

    def __post_init__(self) -> None:
        for name, x in (("linear", self.linear), ("offset", self.offset)):
            if not isinstance(x, Tensor) or x.dtype != precision(x.device):
                raise TypeError(f"{name}: got {getattr(x, 'dtype', type(x).__name__)}, takes a float64 tensor")
            require_dense(name, x)
        if self.linear.ndim != 3 or self.linear.shape[1:] != (2, 2):
            raise ValueError(f"linear: got shape {tuple(self.linear.shape)}, takes (B, 2, 2)")
        if self.offset.shape != self.linear.shape[:2]:
            raise ValueError(f"offset: got shape {tuple(self.offset.shape)}, takes ({self.linear.shape[0]}, 2)")
        if self.offset.device != self.linear.device:
            raise ValueError(f"offset: got device {self.offset.device}, takes that of linear, {self.linear.device}")
        for name, size in (("size_in", self.size_in), ("size_out", self.size_out)):
            if len(size) != 2 or any(isinstance(n, float) or not 0 <= n <= MOST_TOKENS for n in size):
                raise ValueError(f"{name}: got {size}, takes (H, W), whole numbers from 0 to 2^31 - 1")
        if (frames := self.frames) is not None:
            if not isinstance(frames, Tensor) or (frames.dtype, frames.device) != (self.linear.dtype, self.device):
                raise TypeError(
                    f"frames: got {getattr(frames, 'dtype', type(frames).__name__)}, takes a tensor like linear"
                )
            if frames.ndim != 3 or (frames.shape[0], frames.shape[2]) != (len(self), 3):
                raise ValueError(f"frames: got shape {tuple(frames.shape)}, takes ({len(self)}, K, 3)")

    # ---------------------------------------------------------------- constructors

    @classmethod
    def identity(cls, size: Size, *, batch: int = 1) -> "LatticeMap":
        """The map that changes nothing."""
        return cls.d4(size, 0, batch=batch)

    @classmethod
    def rot90(cls, size: Size, k: int | Tensor, *, batch: int = 1) -> "LatticeMap":
        """torch.rot90(x, k, dims=(H, W)): counter-clockwise quarter turns; k is an int or (B,) integers."""
        return cls.d4(size, _integers("k", k % 4 if isinstance(k, int) else k, batch) % 4)

    @classmethod
    def hflip(cls, size: Size, *, batch: int = 1) -> "LatticeMap":
        """Mirror left and right: x.flip(W)."""
        return cls.d4(size, 4, batch=batch)

    @classmethod
    def vflip(cls, size: Size, *, batch: int = 1) -> "LatticeMap":
        """Mirror top and bottom: x.flip(H)."""
        return cls.d4(size, 6, batch=batch)

    @classmethod
    def d4(cls, size: Size, code: int | Tensor, *, batch: int = 1) -> "LatticeMap":
        """An element of D4 by its code k + 4 f: hflip f times, then rot90 k times; an int or (B,) integers.

        Raises:
            ValueError: a code outside 0..7, or turns that would give one batch two sizes (H x W and W x H).
        """
        if isinstance(code, int) and not 0 <= code <= 7:
            raise ValueError(f"code: got {code}, takes 0..7 (k + 4 f)")
        size, code = _size("size", size), _integers("code", code, batch)
        if code.numel() and not 0 <= int(code.min()) <= int(code.max()) <= 7:
            raise ValueError(f"code: got {int(code.min())} to {int(code.max())}, takes 0..7 (k + 4 f)")
        turned = code % 2 == 1
        if size[0] != size[1] and bool(turned.any()) and not bool(turned.all()):
            raise ValueError(f"code: odd and even quarter turns of a {size[0]}x{size[1]} lattice differ in size")
        swap = bool(turned.any()) and size[0] != size[1]
        linear = _D4.to(code.device, precision(code.device))[code]
        return cls(linear, linear.new_zeros(len(code), 2), size, size[::-1] if swap else size, axis_aligned=True)

    @classmethod
    def resize(cls, size: Size, size_out: Size, *, batch: int = 1) -> "LatticeMap":
        """Stretch the whole lattice onto another: F.interpolate(size=size_out, align_corners=False)."""
        size, size_out = _size("size", size, least=1), _size("size_out", size_out, least=1)
        return cls.identity((1, 1), batch=batch).on(size, size_out)

    @classmethod
    def rotate(cls, size: Size, angle: float | Tensor, *, batch: int = 1) -> "LatticeMap":
        """Rotate about the center, counter-clockwise, within the same frame; degrees, a float or (B,)."""
        angle = _exact("angle", angle)
        if angle.ndim > 1 or not bool(torch.isfinite(angle).all()):
            raise ValueError(f"angle: got {angle}, takes finite degrees, a float or (B,)")
        radians = torch.deg2rad(angle.expand(_batch(batch)) if angle.ndim == 0 else angle)
        # 15 decimals make quarter turns exact (cos(pi/2) is 6e-17) and change no other angle that float32 can tell.
        cos, sin = radians.cos().round(decimals=15) + 0.0, radians.sin().round(decimals=15) + 0.0
        return cls.affine(size, torch.stack([cos, sin, -sin, cos], -1).unflatten(-1, (2, 2)))

    @classmethod
    def crop(cls, size: Size, box: Sequence[float] | Tensor, size_out: Size) -> "LatticeMap":
        """Cut out a box and resize it to `size_out`.

        Args:
            size: (H, W) of the input lattice.
            box: (B, 4) or (4,): top, left, height, width in input tokens, not necessarily whole. It may leave the
                lattice, which pads, but not lie outside.
            size_out: (h, w) of the result.

        Raises:
            ValueError: wrong shapes, values that are not finite, no height or width, or a box outside the lattice.
        """
        size, size_out = _size("size", size), _size("size_out", size_out, least=1)
        box = _exact("box", box)
        if box.ndim not in (1, 2) or box.shape[-1] != 4:
            raise ValueError(f"box: got shape {tuple(box.shape)}, takes (B, 4): top, left, height, width")
        box = box.reshape(-1, 4)
        if not bool(torch.isfinite(box).all() & (box[:, 2:] > 0).all()):
            raise ValueError("box: every value must be finite, height and width positive")
        corner, extent, sides = box[:, :2], box[:, 2:], box.new_tensor(size)
        if bool(((corner >= sides) | (corner + extent <= 0)).any()):
            raise ValueError("box: got one that shows nothing of what it is cut from")
        linear = torch.diag_embed(extent / extent.new_tensor(size_out))
        offset = corner + extent / 2 - sides / 2
        return cls(linear, offset, size, size_out, axis_aligned=True)._with_own_frame()

    @classmethod
    def from_views(
        cls,
        image_size: Size | Tensor,
        view_size: Size,
        *,
        box: Tensor | None = None,
        hflip: Tensor | None = None,
        vflip: Tensor | None = None,
        angle: Tensor | None = None,
    ) -> "LatticeMap":
        """What a usual pipeline did to a batch of pictures: crop and resize, then flips, then a rotation in the frame.

        The pictures may have different sizes: the maps are of the picture as a unit square, which relates two views of
        the same pictures (`SERLoss`, `relative`), on pixels or, by `on`, on tokens.

        Args:
            image_size: (H, W) of all pictures, or (B, 2), in pixels.
            view_size: (h, w) of the views, in pixels.
            box: (B, 4) top, left, height, width in pixels, as torchvision's RandomResizedCrop draws them; default the
                whole picture.
            hflip, vflip: (B,) bool, mirrored left and right, top and bottom; default none.
            angle: (B,) degrees, counter-clockwise about the view's center, as torchvision's rotate takes them; default
                none. The tokens that it fills are not `valid`, also where they come from within the picture.

        Raises:
            ValueError: wrong shapes, or a box that shows nothing of its picture.

        Example:
            >>> g0 = LatticeMap.from_views((375, 500), (224, 224), box=boxes0, hflip=torch.rand(8) < 0.5)
            >>> g1 = LatticeMap.from_views((375, 500), (224, 224), box=boxes1)
            >>> loss = ser(tokens0, tokens1, g0, g1)  # (8, 14, 14, C) each
        """
        sizes = torch.as_tensor(image_size, dtype=torch.float64)
        given = [values for values in (box, hflip, vflip, angle) if values is not None]
        batch = len(given[0]) if given else sizes.shape[0] if sizes.ndim == 2 else 1
        if sizes.ndim not in (1, 2) or sizes.shape[-1] != 2 or not bool((sizes > 0).all()):
            raise ValueError(f"image_size: got shape {tuple(sizes.shape)}, takes (H, W) or (B, 2), positive")
        sizes = sizes.reshape(-1, 2).expand(batch, 2)
        whole = torch.cat([torch.zeros_like(sizes), sizes], 1)
        boxes = whole if box is None else torch.as_tensor(box, dtype=torch.float64)
        if boxes.shape != (batch, 4):
            raise ValueError(f"box: got shape {tuple(boxes.shape)}, takes ({batch}, 4): top, left, height, width")
        g = cls.crop((1, 1), boxes / torch.cat([sizes, sizes], 1), view_size)
        for name, flags, code in (("hflip", hflip, 4), ("vflip", vflip, 6)):
            if flags is not None:
                if flags.dtype != torch.bool or flags.shape != (batch,):
                    raise ValueError(f"{name}: got {flags.dtype} of shape {tuple(flags.shape)}, takes bool ({batch},)")
                g = cls.d4(view_size, code * flags.long()).compose(g)
        if angle is not None:
            if angle.shape != (batch,):
                raise ValueError(f"angle: got shape {tuple(angle.shape)}, takes ({batch},)")
            g = cls.rotate(view_size, angle).compose(g)
        return g

    @classmethod
    def affine(
        cls, size: Size, linear: Tensor, offset: Tensor | None = None, size_out: Size | None = None
    ) -> "LatticeMap":
        """Any invertible affine map, output to input about the lattices' centers.

        Args:
            size: (H, W) of the input lattice.
            linear: (B, 2, 2) or (2, 2), in the order (y, x).
            offset: (B, 2) or (2,) in input tokens, (y, x); default zero.
            size_out: (h, w) of the result; default the input's.

        Raises:
            ValueError: wrong shapes, values that are not finite, or a `linear` that can't be inverted.
        """
        size = _size("size", size)
        size_out = size if size_out is None else _size("size_out", size_out)
        linear = _exact("linear", linear)
        if linear.ndim not in (2, 3) or linear.shape[-2:] != (2, 2):
            raise ValueError(f"linear: got shape {tuple(linear.shape)}, takes (B, 2, 2)")
        linear = linear.reshape(-1, 2, 2)
        offset = linear.new_zeros(2) if offset is None else torch.as_tensor(offset).to(linear)
        if offset.ndim not in (1, 2) or offset.shape[-1] != 2:
            raise ValueError(f"offset: got shape {tuple(offset.shape)}, takes (B, 2)")
        offset = offset.reshape(-1, 2)
        if len(linear) != len(offset) and 1 not in (len(linear), len(offset)):
            raise ValueError(f"offset: got {len(offset)} of them for {len(linear)} maps")
        batch = len(offset) if len(linear) == 1 else len(linear)
        linear, offset = linear.expand(batch, 2, 2).clone(), offset.expand(batch, 2).clone()
        if not bool(torch.isfinite(linear).all() & torch.isfinite(offset).all()):
            raise ValueError("linear, offset: every value must be finite")
        if bool((torch.linalg.det(linear) == 0).any()):
            raise ValueError("linear: every map must be invertible (determinant other than 0)")
        return cls(linear, offset, size, size_out)._with_own_frame()

    @classmethod
    def cat(cls, maps: Sequence["LatticeMap"]) -> "LatticeMap":
        """The maps of several batches as one batch, in their order.

        Args:
            maps: at least one, all from lattices of one size to lattices of one size.
        """
        if not maps or not all(isinstance(g, LatticeMap) for g in maps):
            raise TypeError(f"maps: got {[type(g).__name__ for g in maps]}, takes a list of LatticeMaps")
        sizes = {(g.size_in, g.size_out) for g in maps}
        if len(sizes) > 1:
            raise ValueError(f"maps: got sizes {sorted(sizes)}, takes maps of one size_in and one size_out")
        linear, offset = torch.cat([g.linear for g in maps]), torch.cat([g.offset for g in maps])
        frames = cat_frames([g.frames for g in maps], [g.linear for g in maps])
        return cls(linear, offset, *sizes.pop(), axis_aligned=all(g.axis_aligned for g in maps), frames=frames)

    @classmethod
    def stack(cls, maps: Sequence["LatticeMap"]) -> "LatticeMap":
        """The maps of single samples, each a batch of one, as one batch: what a DataLoader does with them.

        Example:
            >>> flips = [LatticeMap.hflip((14, 14)), LatticeMap.identity((14, 14))]
            >>> len(LatticeMap.stack(flips))
            2
        """
        joined = cls.cat(maps)
        if len(joined) != len(maps) or any(len(g) != 1 for g in maps):
            raise ValueError(
                f"maps: got batches of {[len(g) for g in maps]}, takes maps of one sample each (or use cat)"
            )
        return joined

    # ---------------------------------------------------------------- algebra

    def __matmul__(self, first: "LatticeMap") -> "LatticeMap":
        """`self @ first`: apply `first`, then `self`, as one map (one resampling) with the frames of both."""
        return self.compose(first)

    def compose(self, first: "LatticeMap") -> "LatticeMap":
        """`self @ first` under a name (torch.compile traces methods, but not the operator)."""
        if self.size_in != first.size_out:
            raise ValueError(f"a @ b: b gives a {first.size_out} lattice, a takes {self.size_in}")
        if len(self) != len(first) and 1 not in (len(self), len(first)):
            raise ValueError(f"a @ b: batches of {len(self)} and {len(first)} maps")
        linear = first.linear @ self.linear
        offset = (first.linear @ self.offset[:, :, None])[:, :, 0] + first.offset
        frames = [] if self.frames is None else [self.frames]
        if first.frames is not None:
            frames.append(frames_through(first.frames, self.linear, self.offset))
        axis_aligned = self.axis_aligned and first.axis_aligned
        return LatticeMap(linear, offset, first.size_in, self.size_out, axis_aligned, join_frames(frames, len(linear)))

    def inverse(self) -> "LatticeMap":
        """The map that undoes this one: g.inverse() @ g is the identity of size_in.

        The frames go to the other side: what g shows of its input is what its inverse takes from its output. The
        inverse fills nothing of its own, since it only says where things were; `valid` tells what g shows.
        """
        a, b, c, d = self.linear.flatten(1).unbind(-1)
        # The adjugate keeps D4 exact; adding 0 turns its -0 into 0.
        adjugate = torch.stack([d, -b, -c, a], -1).unflatten(-1, (2, 2))
        linear = adjugate / (a * d - b * c)[:, None, None] + 0.0
        offset = -(linear @ self.offset[:, :, None])[:, :, 0] + 0.0
        frames = None if self.frames is None else frames_through(self.frames, linear, offset)
        return LatticeMap(linear, offset, self.size_out, self.size_in, self.axis_aligned, frames)

    @staticmethod
    def relative(g0: "LatticeMap", g1: "LatticeMap") -> "LatticeMap":
        """g1 o g0^-1, for g0 and g1 that take one image to its views: it takes view 0 to view 1, in one resampling.

        A token of view 1 is `valid` where it shows the image and its place in view 0 does.
        """
        return g1.compose(g0.inverse())

    def on(self, size_in: Size, size_out: Size) -> "LatticeMap":
        """The same map of the plane on other lattices that cover the same two areas.

        `g.on((14, 14), (12, 16))` takes a map between images of 224 x 224 and 192 x 256 pixels to their tokens.
        """
        (height, width), (h, w) = self.size_in, self.size_out
        if 0 in (height, width, *size_out):
            raise ValueError(f"size_out: got {size_out} for a map of {self.size_in}; an empty lattice covers no area")
        # Products of whole numbers first: a ratio that is 1 comes out as exactly 1, and D4 stays D4.
        ratio = [
            [size_in[0] * h / (height * size_out[0]), size_in[0] * w / (height * size_out[1])],
            [size_in[1] * h / (width * size_out[0]), size_in[1] * w / (width * size_out[1])],
        ]
        linear = self.linear * self.linear.new_tensor(ratio)
        offset = self.offset * self.offset.new_tensor([size_in[0] / height, size_in[1] / width])
        frames = self.frames
        if frames is not None:
            frames = frames * frames.new_tensor([h / size_out[0], w / size_out[1], 1])
        return LatticeMap(linear, offset, size_in, size_out, self.axis_aligned, frames)

    # ---------------------------------------------------------------- reading

    def __len__(self) -> int:
        return self.linear.shape[0]

    def __getitem__(self, samples: slice | Tensor) -> "LatticeMap":
        """The maps of some samples, by a slice or a (K,) tensor of indices."""
        linear = self.linear[samples]
        if linear.ndim != 3:
            raise TypeError(f"samples: got {samples!r}, takes a slice or a (K,) tensor of indices")
        frames = None if self.frames is None else self.frames[samples]
        return LatticeMap(linear, self.offset[samples], self.size_in, self.size_out, self.axis_aligned, frames)

    @property
    def device(self) -> torch.device:
        return self.linear.device

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "LatticeMap":
        """The same maps on another device; `non_blocking` goes to a GPU by pinned memory, and waits for nothing."""
        device = torch.device(device)
        dtype = precision(device)
        return self._with_tensors(lambda x: send(x, device, dtype) if non_blocking else x.to(device, dtype))

    def pin_memory(self) -> "LatticeMap":
        """The same maps in page-locked memory, from which `to(device, non_blocking=True)` doesn't wait."""
        return self._with_tensors(Tensor.pin_memory)

    def _with_tensors(self, change: Callable[[Tensor], Tensor]) -> "LatticeMap":
        frames = None if self.frames is None else change(self.frames)
        linear, offset = change(self.linear), change(self.offset)
        return LatticeMap(linear, offset, self.size_in, self.size_out, self.axis_aligned, frames)

    def _with_own_frame(self) -> "LatticeMap":
        """The same maps, which fill what comes from outside the lattice; without a frame where nothing does."""
        half_in, half_out = (self.linear.new_tensor(size) / 2 for size in (self.size_in, self.size_out))
        reach = self.offset.abs() + self.linear.abs() @ half_out
        if bool((reach <= half_in * (1 + 1e-6)).all()):  # nor does the rounding of float32 boxes
            return self
        return replace(self, frames=frame_of_lattice(self.linear, self.offset, self.size_in))

    @property
    def d4_code(self) -> Tensor:
        """(B,) the code k + 4 f (see `d4`) of the samples that are exactly an element of D4; -1 for the others.

        Read off `linear`: products of signed permutations are exact, so nothing is lost by composing them.
        """
        turned = torch.arange(8, device=self.device) % 2 == 1
        fits = torch.where(turned, self.size_out == self.size_in[::-1], self.size_out == self.size_in)
        same = (self.linear[:, None] == _D4.to(self.linear)).flatten(2).all(-1)  # (B, 8)
        same = same & fits & (self.offset == 0).all(-1, keepdim=True)
        return torch.where(same.any(-1), same.int().argmax(-1), -1)

    def theta(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(B, 2, 3) for torch.nn.functional.affine_grid(theta, (B, C, h, w), align_corners=False)."""
        half_in = self.linear.new_tensor(self.size_in[::-1]) / 2  # (x, y), as affine_grid has it
        half_out = self.linear.new_tensor(self.size_out[::-1]) / 2
        linear = self.linear.flip(-1, -2) * half_out / half_in[:, None]
        return torch.cat([linear, (self.offset.flip(-1) / half_in)[:, :, None]], -1).to(dtype)

    def valid(self) -> Tensor:
        """(B, h*w) bool: the preimage of the token's center lies in the input lattice and in all frames.

        Edges are included. So at least half of a valid token shows the picture, save at the corner of a frame.
        """
        require_countable("size_out", self.size_out)
        y, x = positions(self.linear, self.offset, self.size_in, self.size_out)
        height, width = self.size_in
        inside_y = (y >= -TOLERANCE) & (y <= height + TOLERANCE)
        inside = inside_y & (x >= -TOLERANCE) & (x <= width + TOLERANCE)
        if self.frames is None:
            return inside
        return inside & in_frames(self.frames, *_centers(self.size_out, self.linear), TOLERANCE)


def require_countable(name: str, size: Size) -> None:
    """Raise ValueError for a lattice of more tokens than an index counts."""
    if size[0] * size[1] > MOST_TOKENS:
        raise ValueError(f"{name}: got {size}, takes a lattice of fewer than 2^31 tokens to compute on")


def _size(name: str, size: Size, least: int = 0) -> Size:
    try:
        height, width = (int(n) for n in size)
        if (height, width) != tuple(size) or min(height, width) < least or max(height, width) > MOST_TOKENS:
            raise ValueError
    except (TypeError, ValueError):
        raise ValueError(f"{name}: got {size}, takes (H, W), whole numbers from {least} to 2^31 - 1") from None
    return height, width


def _batch(batch: int) -> int:
    if not isinstance(batch, int) or not 0 <= batch <= MOST_TOKENS:
        raise ValueError(f"batch: got {batch}, takes a whole number from 0 to 2^31 - 1")
    return batch


def _exact(name: str, values: float | Sequence[float] | Tensor) -> Tensor:
    """The values in the precision of maps, where they are."""
    if isinstance(values, Tensor):
        require_dense(name, values)
    dtype = precision(values.device) if isinstance(values, Tensor) else torch.float64
    return torch.as_tensor(values, dtype=dtype)


def _integers(name: str, value: int | Tensor, batch: int) -> Tensor:
    if isinstance(value, int):
        return torch.full((_batch(batch),), value)
    if not isinstance(value, Tensor) or value.ndim != 1 or value.is_floating_point() or value.dtype == torch.bool:
        raise ValueError(f"{name}: got {value!r}, takes an int or (B,) integers")
    require_dense(name, value)
    if batch not in (1, len(value)):
        raise ValueError(f"batch: got {batch} with {len(value)} values of {name}")
    return value.long()


def _collate(batch: Sequence[LatticeMap], *, collate_fn_map: object = None) -> LatticeMap:
    return LatticeMap.stack(batch)


default_collate_fn_map[LatticeMap] = _collate
