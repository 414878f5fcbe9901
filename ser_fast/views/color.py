"""The color augmentation of views: every sample's own, on batches on their device, and known afterwards."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ser_fast.device import send
from ser_fast.views.samplers import COLOR, generator

LAYOUT = (
    "jittered",  # 1 where brightness, contrast, saturation and hue were changed
    "brightness",  # where in its range the factor lies: (factor - 1) / (highest - lowest), 0 where unchanged
    "contrast",  # likewise
    "saturation",  # likewise
    "hue",  # the shift / (highest - lowest)
    "first",  # which of the four was changed first: 0 brightness, 1 contrast, 2 saturation, 3 hue
    "second",
    "third",
    "fourth",
    "gray",  # 1 where all color was taken
    "blurred",  # 1 where blurred
    "sigma",  # of the blur, in pixels; 0 where not blurred
    "threshold",  # from which on values were inverted; 1 where not solarized
)
"""What a row of draws holds. Not applied: order 0 1 2 3, threshold 1, and 0 everywhere else."""

_UNCHANGED = torch.tensor([0.0, 0, 0, 0, 0, 0, 1, 2, 3, 0, 0, 0, 1], dtype=torch.float64)
_ORDERS = torch.tensor(list(itertools.permutations(range(4))), dtype=torch.float64)
_DRAWS = 10  # uniform numbers a sample takes
_SIGMA = 0.1, 2.0


def columns(draws: Tensor, *names: str) -> Tensor:
    """(B, K) of draws (B, P): the columns of those names in LAYOUT."""
    return draws[:, [LAYOUT.index(name) for name in names]]


@dataclass(frozen=True)
class Color:
    """Jitter in a random order, then gray, blur and solarization, each with a probability: torchvision's transforms.

    Attributes:
        strength: multiplies the jitter; 0 leaves the colors as they are.
        jitter: how far brightness, contrast and saturation (as factors, about 1) and hue (in turns) go.
        jittered, gray, blur, solarize: probabilities.

    Source: the augmentations of SimCLR, BYOL and MoCo-v3 as torchvision.transforms.v2 has them: ColorJitter,
        RandomGrayscale, GaussianBlur (sigma 0.1 to 2, kernel a tenth of the image) and RandomSolarize (at 0.5).
    """

    strength: float = 1.0
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    jittered: float = 0.8
    gray: float = 0.2
    blur: float = 1.0
    solarize: float = 0.0

    def __post_init__(self) -> None:
        if len(self.jitter) != 4 or min(self.jitter) < 0:
            raise ValueError(f"color jitter: got {self.jitter}, takes four numbers from 0")
        largest = 0.5 / self.jitter[3] if self.jitter[3] else math.inf  # there the hue has gone full circle
        if not 0 <= self.strength <= largest:
            raise ValueError(f"color strength: got {self.strength}, takes a number in [0, {largest:g}]")
        for name in ("jittered", "gray", "blur", "solarize"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"color {name}: got {getattr(self, name)}, takes a probability, 0 to 1")

    @property
    def ranges(self) -> Tensor:
        """(4, 2) float64, the lowest and the highest factors of brightness, contrast, saturation, and shift of hue."""
        reach = self.strength * torch.tensor(self.jitter, dtype=torch.float64)
        low = torch.cat([(1 - reach[:3]).clamp(min=0), -reach[3:]])
        return torch.stack([low, torch.cat([1 + reach[:3], reach[3:]])], -1)

    def positions(self, factors: Tensor) -> Tensor:
        """(B, 4) where in their ranges brightness, contrast, saturation and hue (B, 4) lie; see LAYOUT."""
        neutral = factors.new_tensor([1, 1, 1, 0])
        low, high = self.ranges.to(factors).unbind(-1)
        return (factors - neutral) / (high - low).where(high > low, torch.inf)

    def factors(self, draws: Tensor) -> Tensor:
        """(B, 4) the factors of brightness, contrast and saturation, and the shift of the hue in turns, of draws."""
        low, high = self.ranges.to(draws).unbind(-1)
        changes = columns(draws, "brightness", "contrast", "saturation", "hue") * (high - low)
        return changes + draws.new_tensor([1, 1, 1, 0])

    def __call__(self, images: Tensor, samples: Tensor, *, seed: int, epoch: int, view: int) -> tuple[Tensor, Tensor]:
        """Change the colors of images by draws that depend on (seed, epoch, sample, view) alone.

        Args:
            images: (B, 3, H, W) floating point in [0, 1].
            samples: (B,) their indices in the data set.
            seed, epoch, view: of the draws.

        Returns:
            The changed images, and what was drawn, (B, P) float64 on the CPU as LAYOUT says.
        """
        draws = self.draw(samples, seed=seed, epoch=epoch, view=view)
        return self.apply(images, draws), draws

    def draw(self, samples: Tensor, *, seed: int, epoch: int, view: int) -> Tensor:
        """(B, P) float64 draws for samples (B,), as LAYOUT says."""
        draws = _UNCHANGED.repeat(len(samples), 1)
        if self.strength == 0 or len(samples) == 0:
            return draws
        rows = [generator(seed, epoch, sample, view, COLOR).random(_DRAWS) for sample in samples.tolist()]
        u = torch.from_numpy(np.stack(rows))
        jittered, gray, blurred, solarized = (
            u[:, i] < chance for i, chance in enumerate((self.jittered, self.gray, self.blur, self.solarize))
        )
        low, high = self.ranges.unbind(-1)
        jitter = torch.cat([self.positions(low + u[:, 4:8] * (high - low)), _ORDERS[(24 * u[:, 8]).long()]], 1)
        draws[:, 1:9] = torch.where(jittered[:, None], jitter, draws[:, 1:9])
        sigma = (_SIGMA[0] + u[:, 9] * (_SIGMA[1] - _SIGMA[0])) * blurred
        applied = {"jittered": jittered, "gray": gray, "blurred": blurred, "sigma": sigma}
        for name, values in {**applied, "threshold": 1 - 0.5 * solarized}.items():
            draws[:, LAYOUT.index(name)] = values.to(draws)
        return draws

    def apply(self, images: Tensor, draws: Tensor) -> Tensor:
        """Change the colors of images (B, 3, H, W) in [0, 1] as draws (B, P) say."""
        from kornia.color import rgb_to_grayscale  # takes half a second to import
        from kornia.filters import gaussian_blur2d

        draws = draws.cpu()
        jittered, gray, blurred, sigma, threshold = columns(
            draws, "jittered", "gray", "blurred", "sigma", "threshold"
        ).T
        order, factors = columns(draws, "first", "second", "third", "fourth"), self.factors(draws)
        changed = images.clone()
        if jittered.any():
            kind = order.where(jittered[:, None] > 0, -1).long().T  # (4, B): what comes first, second, ...
            # Brightness, contrast and saturation are one operation, a blend with black, with the mean gray or with the
            # gray picture, of all samples at once; where it is another's turn the factor is 1.
            blended = (kind >= 0) & (kind < 3)
            factor = torch.where(blended, factors.gather(1, kind.T.clamp(0, 3)).T, 1)
            tables = torch.stack([factor, (kind == 1).double(), (kind == 2).double()], 1)  # (4, 3, B)
            tables = send(tables, images.device, images.dtype)[..., None, None, None]
            for place, (factor, mean, local) in enumerate(tables):
                grays = rgb_to_grayscale(changed)  # (B, 1, H, W)
                other = grays * local + grays.mean((-2, -1), keepdim=True) * mean
                changed = (changed * factor + other * (1 - factor)).clamp(0, 1)
                rows = torch.nonzero(kind[place] == 3)[:, 0]
                _change(changed, rows, shift_hue, factors[rows, 3])
        _change(changed, torch.nonzero(gray)[:, 0], lambda part: rgb_to_grayscale(part).expand_as(part))
        kernel = max(3, images.shape[-1] // 10 | 1)  # SimCLR: a tenth of the image, odd
        rows = torch.nonzero(blurred)[:, 0]
        sigmas = sigma[rows, None].expand(-1, 2)  # on the CPU: there kornia can look at them without waiting
        _change(changed, rows, lambda part: gaussian_blur2d(part, kernel, sigmas))
        rows = torch.nonzero(threshold < 1)[:, 0]
        _change(
            changed, rows, lambda part, t: torch.where(part >= t[:, None, None, None], 1 - part, part), threshold[rows]
        )
        return changed


def shift_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Turn the hue of images (B, 3, H, W) by turns (B,), value and saturation kept.

    Source: https://en.wikipedia.org/wiki/HSL_and_HSV#HSV_to_RGB_alternative, which needs a third of the kernels that
        a way through HSV in three channels does.
    """
    value, largest = images.max(1, keepdim=True)
    chroma = value - images.amin(1, keepdim=True)
    differences = images.roll(-1, 1) - images.roll(-2, 1)  # g - b, b - r, r - g
    hue = differences.gather(1, largest) / chroma.where(chroma > 0, 1) + 2 * largest  # in sixths of a turn
    offsets = torch.arange(5, 0, -2, device=images.device).to(images)[:, None, None]  # 5, 3, 1
    along = (hue + 6 * turns[:, None, None, None] + offsets) % 6
    return value - chroma * torch.minimum(along, 4 - along).clamp(0, 1)


def _change(images: Tensor, rows: Tensor, operation: Callable[..., Tensor], *values: Tensor) -> None:
    """Change some rows of images in place, each with its own values."""
    if len(rows) == 0:
        return
    rows = send(rows, images.device)
    images[rows] = operation(images[rows], *(send(value, images.device, images.dtype) for value in values))
