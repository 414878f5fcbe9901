"""SER in a loop of one's own: a plain timm ViT, torchvision's transforms, and any objective (here SimCLR's).

python examples/own_loop.py [STEPS]
"""

import sys

import timm
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from ser_fast import LatticeMap, SERLoss, info_nce
from ser_fast.capture import TokenCapture

STEPS, BATCH, SIDE = int(sys.argv[1]) if len(sys.argv) > 1 else 100, 16, 64


def make_views(images: list[torch.Tensor]) -> tuple[torch.Tensor, LatticeMap]:
    """A view of each image (3, H, W), whatever their sizes, and the maps that took the images there."""
    boxes, flips, views = [], [], []
    for image in images:
        top, left, height, width = v2.RandomResizedCrop.get_params(image, (0.3, 1.0), (3 / 4, 4 / 3))
        flip = bool(torch.rand(()) < 0.5)
        view = F.resized_crop(image, top, left, height, width, [SIDE, SIDE], antialias=True)
        view = F.horizontal_flip(view) if flip else view
        views.append(v2.ColorJitter(0.4, 0.4, 0.2, 0.1)(view))
        boxes.append([top, left, height, width])
        flips.append(flip)
    sizes = torch.tensor([image.shape[1:] for image in images])
    g = LatticeMap.from_views(sizes, (SIDE, SIDE), box=torch.tensor(boxes), hflip=torch.tensor(flips))
    return torch.stack(views), g


torch.manual_seed(0)
vit = timm.create_model("vit_tiny_patch16_224", img_size=SIDE, patch_size=8, depth=4, embed_dim=96, num_classes=0)
head, ser = torch.nn.Linear(96, 64), SERLoss(dim=96, hidden_dim=128, out_dim=64)
capture = TokenCapture(vit, block=2)
# SERLoss has parameters of its own.
optimizer = torch.optim.AdamW([*vit.parameters(), *head.parameters(), *ser.parameters()], lr=1e-3)
for step in range(STEPS):
    images = [torch.rand(3, *torch.randint(80, 160, (2,)).tolist()) for _ in range(BATCH)]  # yours
    (view0, g0), (view1, g1) = make_views(images), make_views(images)
    embedding0, tokens0 = head(vit(view0)), capture.tokens  # (B, 64), (B, 8, 8, 96)
    embedding1, tokens1 = head(vit(view1)), capture.tokens
    simclr = info_nce(embedding0, embedding1, temperature=0.2)
    loss = simclr + ser(tokens0, tokens1, g0, g1)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 10 == 0 or step == STEPS - 1:
        print(f"step {step + 1}: loss {loss.item():.3f}, of which SimCLR {simclr.item():.3f}")
