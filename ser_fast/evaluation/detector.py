"""A Faster R-CNN on a frozen SplitViT: what is put on the encoder, its training, and what it finds.

The detector and its losses are torchvision's.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import Conv2dNormActivation, box_convert
from torchvision.transforms import v2

from ser_fast.data.loader import EpochSampler
from ser_fast.evaluation.coco import CocoFolder, Example
from ser_fast.evaluation.features import evaluating
from ser_fast.evaluation.protocol import check_positive
from ser_fast.io import write_atomically
from ser_fast.progress import progress_bar, track
from ser_fast.views.pixels import IMAGENET_MEAN, IMAGENET_STD
from ser_fast.vit import SplitViT

# Small beside torchvision's defaults (256, 1024, 2000 and 1000, 2000 and 1000, 512): what is measured is the encoder.
_CHANNELS = 64  # of the pyramid
_HIDDEN = 256  # of the head that classifies boxes
_PROPOSALS = 256  # of an image, after as many times two on each level
_BOXES = 64  # that the head learns from, an image
_ANCHOR = 4  # side of a level's anchors, in its strides
_FROZEN = "backbone.encoder."  # the parameters that belong to the encoder


class FeaturePyramid(nn.Module):
    """Four maps of one width from the last tokens of a frozen SplitViT: 2, 1, 1/2 and 1/4 times their resolution.

    The encoder runs in eval mode and without gradients; only the convolutions are trained. It sees images enlarged or
    reduced so that a patch covers `stride` of their pixels.

    Source: Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection", 2022, the simple feature
    pyramid, with group norm and strided convolutions.
    """

    def __init__(self, encoder: SplitViT, channels: int) -> None:
        super().__init__()
        self.encoder, self.out_channels = encoder, channels
        patch, _ = encoder.patch_size
        self.stride = 2 ** max(1, round(math.log2(patch)))  # torchvision's RoIAlign takes powers of two
        block = partial(Conv2dNormActivation, norm_layer=partial(nn.GroupNorm, 8))
        dim = encoder.embed_dim
        self.levels = nn.ModuleList(
            [
                nn.Sequential(nn.ConvTranspose2d(dim, channels, 2, stride=2), block(channels, channels)),
                nn.Sequential(block(dim, channels, 1), block(channels, channels)),
                nn.Sequential(block(dim, channels, stride=2), block(channels, channels)),
                nn.Sequential(block(dim, channels, stride=2), block(channels, channels, stride=2)),
            ]
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """{"0": (B, C, 2 H, 2 W), ... "3": (B, C, H / 4, W / 4)} of images with H x W tokens."""
        patch, _ = self.encoder.patch_size
        if patch != self.stride:
            size = [side // self.stride * patch for side in images.shape[2:]]
            images = F.interpolate(images, size, mode="bilinear", antialias=True)
        with evaluating(self.encoder):
            tokens = self.encoder.early(images)  # (B, H, W, dim)
            last = self.encoder.late(tokens)[:, self.encoder.num_prefix_tokens :].unflatten(1, tokens.shape[1:3])
        features = last.permute(0, 3, 1, 2)  # (B, dim, H, W)
        return {str(number): level(features) for number, level in enumerate(self.levels)}


def build_detector(encoder: SplitViT, *, categories: int, image_size: int) -> FasterRCNN:
    """Faster R-CNN on a frozen encoder: images [(3, H, W)] in [0, 1] of any size to boxes, as torchvision's own.

    Args:
        encoder: is taken over, not copied, and not changed.
        categories: their number; label 0 is the background.
        image_size: to which the shorter side of an image is resized, in pixels; the longer one to at most twice that.

    Raises:
        ValueError: patches that aren't square.

    Example:
        >>> detector = build_detector(load_split_vit("encoder.safetensors"), categories=80, image_size=448)
        >>> losses = detector(images, [{"boxes": boxes, "labels": labels}])  # in training
    """
    height, width = encoder.patch_size
    if height != width:
        raise ValueError(f"checkpoint: got patches of {height} x {width} pixels, takes squares")
    pyramid = FeaturePyramid(encoder, _CHANNELS)
    strides = (pyramid.stride // 2, pyramid.stride, 2 * pyramid.stride, 4 * pyramid.stride)
    return FasterRCNN(
        pyramid,
        min_size=image_size,
        max_size=2 * image_size,
        image_mean=list(IMAGENET_MEAN),
        image_std=list(IMAGENET_STD),
        size_divisible=strides[-1],
        rpn_anchor_generator=AnchorGenerator(
            tuple((_ANCHOR * stride,) for stride in strides), ((0.5, 1.0, 2.0),) * len(strides)
        ),
        box_head=TwoMLPHead(_CHANNELS * 7 * 7, _HIDDEN),
        box_predictor=FastRCNNPredictor(_HIDDEN, categories + 1),
        rpn_pre_nms_top_n_train=2 * _PROPOSALS,
        rpn_pre_nms_top_n_test=2 * _PROPOSALS,
        rpn_post_nms_top_n_train=_PROPOSALS,
        rpn_post_nms_top_n_test=_PROPOSALS,
        box_batch_size_per_image=_BOXES,
    )


def train_head(
    detector: FasterRCNN,
    dataset: CocoFolder,
    path: Path,
    *,
    steps: int,
    batch_size: int = 8,
    lr: float = 4e-3,
    seed: int = 0,
    save_every: int = 50,
    workers: int = 0,
    progress: bool = False,
) -> None:
    """Train what `build_detector` put on the encoder, with AdamW, one learning-rate cycle and horizontal flips.

    The head is saved to `path` as it grows. If `path` is there, training goes on from it, to the bit on the CPU.

    Args:
        detector: on its device.
        dataset: to train on.
        path: of the head's weights, the optimizer's state and the settings; the encoder's weights aren't in it.
        steps: in all.
        batch_size: images a step; at most all of them.
        lr: the largest learning rate.
        seed: of the order of the images, the flips and the boxes that are sampled.
        save_every: steps between two writes.
        workers: processes that load images.
        progress: show a bar on the terminal.

    Raises:
        ValueError: no positive steps, batch_size or save_every, or `path` holds a head of another setting.
    """
    check_positive(steps=steps, batch_size=batch_size, save_every=save_every)
    trained = {name: p for name, p in detector.named_parameters() if not name.startswith(_FROZEN)}
    device = next(iter(trained.values())).device
    optimizer = torch.optim.AdamW(trained.values(), lr=lr)
    schedule = OneCycleLR(optimizer, max_lr=lr, total_steps=steps, pct_start=0.1)
    settings = {
        "images": str(dataset.examples.root),
        "categories": len(dataset.categories),
        "image_size": detector.transform.min_size[0],
        "steps": steps,
        "batch_size": batch_size,
        "lr": lr,
        "seed": seed,
        "encoder": _fingerprint(detector.backbone.encoder),
    }
    start = 0
    if path.is_file():
        state = _read_head(path, device)
        changed = [name for name, value in settings.items() if state["settings"].get(name) != value]
        if changed:
            raise ValueError(
                f"out: got {path}, trained with another {', '.join(changed)}; delete it or name another out"
            )
        frozen = {name: tensor for name, tensor in detector.state_dict().items() if name.startswith(_FROZEN)}
        detector.load_state_dict({**frozen, **state["head"]})
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        start = state["step"]

    batches = _batches(dataset, start, batch_size=batch_size, seed=seed, workers=workers)
    flip = v2.RandomHorizontalFlip()
    detector.train()
    with progress_bar(show=progress) as bar:
        task = bar.add_task(path.stem, total=steps, completed=start)
        for step in range(start, steps):
            batch = next(batches)
            torch.manual_seed(int(np.random.SeedSequence([seed, step]).generate_state(1)[0]))
            images, targets = zip(*(flip(example) for example in batch), strict=True)
            losses = detector(
                [image.to(device) for image in images],
                [{name: value.to(device) for name, value in target.items()} for target in targets],
            )
            loss = sum(losses.values())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(trained.values(), 1.0)
            optimizer.step()
            schedule.step()
            bar.update(task, advance=1, description=f"{path.stem}  loss {loss.item():.2f}")
            if (step + 1) % save_every == 0 or step + 1 == steps:
                head = {name: value for name, value in detector.state_dict().items() if not name.startswith(_FROZEN)}
                state = {
                    "step": step + 1,
                    "settings": settings,
                    "head": head,
                    "optimizer": optimizer.state_dict(),
                    "schedule": schedule.state_dict(),
                }
                write_atomically(path, partial(torch.save, state))


def predict(
    detector: FasterRCNN, dataset: CocoFolder, *, batch_size: int = 8, workers: int = 0, progress: bool = False
) -> list[dict[str, Any]]:
    """The boxes that a detector finds.

    Args:
        detector: on its device.
        dataset: the images.
        batch_size: images at a time.
        workers: processes that load images.
        progress: show a bar on the terminal.

    Returns:
        In COCO's format for results: image_id, category_id, bbox (left, top, width, height, in pixels), score.
    """
    device = next(detector.parameters()).device
    results: list[dict[str, Any]] = []
    ids = iter(dataset.examples.ids)
    loader = DataLoader(dataset, batch_size, collate_fn=list, num_workers=workers)
    with evaluating(detector):
        for batch in track(loader, "detecting", show=progress):
            for output in detector([image.to(device) for image, _ in batch]):
                image_id = next(ids)
                boxes = box_convert(output["boxes"], "xyxy", "xywh").tolist()  # (n, 4)
                for box, label, score in zip(boxes, output["labels"].tolist(), output["scores"].tolist(), strict=True):
                    category = dataset.categories[label - 1]
                    results.append({"image_id": image_id, "category_id": category, "bbox": box, "score": score})
    return results


def _read_head(path: Path, device: torch.device) -> dict[str, Any]:
    try:
        with ZipFile(path) as archive:
            broken = archive.testzip()  # torch.load does not look at the checksums
        state = torch.load(path, map_location=device, weights_only=True) if broken is None else {}
        if broken is not None or not {"step", "settings", "head", "optimizer", "schedule"} <= state.keys():
            raise ValueError(f"{broken or 'what it holds'} is not as it was written")
    except Exception as error:  # zipfile and torch.load raise many types
        reason = " ".join(str(error).split())
        raise ValueError(f"out: got {path}, damaged or no detector's head; delete it: {reason}") from error
    return state


def _batches(dataset: CocoFolder, start: int, *, batch_size: int, seed: int, workers: int) -> Iterator[list[Example]]:
    """Batches of a shuffled dataset without end, from number `start` on."""
    size = min(batch_size, len(dataset))
    sampler = EpochSampler(len(dataset), batch_size=size, seed=seed, rank=0, world_size=1, train=True)
    loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=list, num_workers=workers)
    epoch, batch = divmod(start, sampler.batches)
    while True:
        sampler.set_epoch(epoch)
        sampler.set_start(batch)
        yield from loader
        epoch, batch = epoch + 1, 0


def _fingerprint(encoder: SplitViT) -> str:
    """A hash of the encoder's weights."""
    digest = hashlib.sha256(json.dumps([encoder.recipe and encoder.recipe[0], encoder.split]).encode())
    for name, tensor in encoder.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
