"""The color augmentation of views."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms import v2

from ser_fast.views.samplers import COLOR, generator


@dataclass(frozen=True)
class Color:
    """MoCo-v3's color augmentation (its two views differ in blur and solarisation), on batches on their device.

    Attributes:
        strength: multiplies the jitter; 0 leaves the colors as they are.
        group: neighbours in a batch that share one draw (the group's first sample's). 1 draws for every sample, at the
            price of as many small kernels.
    """

    strength: float = 1.0
    group: int = 8

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 5:  # there the hue has gone full circle
            raise ValueError(f"color strength: got {self.strength}, takes a number in [0, 5]")
        if self.group < 1:
            raise ValueError(f"color group: got {self.group}, takes a positive number")

    def __call__(self, images: Tensor, samples: Tensor, *, seed: int, epoch: int, view: int) -> Tensor:
        """Change the colors of images (B, 3, H, W) in [0, 1]; samples (B,) are their indices in the data set."""
        if self.strength == 0:
            return images
        transform = self._transform(view, images.shape[-1])
        parts = []
        for part, first in zip(images.split(self.group), samples[:: self.group].tolist(), strict=True):
            # torchvision draws from torch's global generator; torch.manual_seed would reseed the GPUs' too.
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(int(generator(seed, epoch, first, view, COLOR).integers(2**62)))
                parts.append(transform(part))
        return torch.cat(parts) if parts else images

    def _transform(self, view: int, size: int) -> v2.Compose:
        jitter = v2.ColorJitter(
            brightness=0.4 * self.strength,
            contrast=0.4 * self.strength,
            saturation=0.2 * self.strength,
            hue=0.1 * self.strength,
        )
        kernel = max(3, size // 10 | 1)  # SimCLR: a tenth of the image, odd
        blur = v2.GaussianBlur(kernel, sigma=(0.1, 2.0))
        return v2.Compose(
            [
                v2.RandomApply([jitter], p=0.8),
                v2.RandomGrayscale(p=0.2),
                v2.RandomApply([blur], p=(1.0, 0.1)[view]),
                v2.RandomSolarize(threshold=0.5, p=(0.0, 0.2)[view]),
            ]
        )
