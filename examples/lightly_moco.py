"""SERLoss in lightly's MoCo with a ViT: one query view, so the keys of one view, and one direction.

lightly's transforms keep what they draw to themselves. Boxes and flips are drawn here, beside their maps; what does not
move the picture (colors, blur) is lightly's or torchvision's as ever.

python examples/lightly_moco.py [--data folder:PHOTOGRAPHS] [--steps 100]
"""

import argparse
from copy import deepcopy

import timm
import torch
from lightly.loss import NTXentLoss
from lightly.models.modules import MoCoProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.transforms import GaussianBlur
from lightly.utils.scheduler import cosine_schedule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from ser_fast import LatticeMap, SERLoss
from ser_fast.capture import TokenCapture
from ser_fast.data.sources import open_source

SIDE, BATCH = 64, 16
COLORS = v2.Compose([v2.ColorJitter(0.4, 0.4, 0.2, 0.1), v2.RandomGrayscale(0.2), GaussianBlur(prob=0.5)])


class TwoViews(Dataset):
    """Two views of each picture (3, SIDE, SIDE), and the maps that took the picture there."""

    def __init__(self, data: str) -> None:
        self.pictures = open_source(data, train=True, image_size=128)  # yours

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, LatticeMap, LatticeMap]:
        picture = self.pictures.read(index).pixels  # uint8 (3, H, W), of any size
        (view0, g0), (view1, g1) = self.make_view(picture), self.make_view(picture)
        return view0, view1, g0, g1

    def make_view(self, picture: Tensor) -> tuple[Tensor, LatticeMap]:
        box = v2.RandomResizedCrop.get_params(picture, (0.2, 1.0), (3 / 4, 4 / 3))
        flip = torch.rand(1) < 0.5
        view = F.resized_crop(picture, *box, [SIDE, SIDE], antialias=True)
        view = F.horizontal_flip(view) if flip else view
        g = LatticeMap.from_views(picture.shape[1:], (SIDE, SIDE), box=torch.tensor([box]), hflip=flip)
        return COLORS(view), g


class MoCo(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        shape = {"img_size": SIDE, "patch_size": 8, "embed_dim": 96, "depth": 4}
        self.vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, **shape)
        self.head = MoCoProjectionHead(96, 192, 64)
        self.key_vit, self.key_head = deepcopy(self.vit), deepcopy(self.head)  # before the hooks of TokenCapture
        deactivate_requires_grad(self.key_vit)
        deactivate_requires_grad(self.key_head)
        self.ser = SERLoss(dim=96, hidden_dim=128, out_dim=64)
        self.captures = TokenCapture(self.vit, block=2), TokenCapture(self.key_vit, block=2)
        self.moco = NTXentLoss(temperature=0.2, memory_bank_size=(1024, 64))

    def forward(self, view0: Tensor, view1: Tensor, g0: LatticeMap, g1: LatticeMap) -> tuple[Tensor, Tensor]:
        """MoCo's loss and SER's."""
        query, tokens0 = self.head(self.vit(view0)), self.captures[0].tokens
        with torch.no_grad():
            key, keys1 = self.key_head(self.key_vit(view1)), self.captures[1].tokens
        # View 1 has keys alone: its tokens are moved to view 0, and the queries are the tokens of view 0.
        return self.moco(query, key), self.ser(tokens0, None, g0, g1, keys1=keys1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="photos")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = MoCo().to(device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)  # also SER's
    loader = DataLoader(TwoViews(options.data), BATCH, shuffle=True, drop_last=True)
    step = 0
    while step < options.steps:
        for batch in loader:
            momentum = cosine_schedule(step, options.steps, 0.99, 1)
            update_momentum(model.vit, model.key_vit, momentum)
            update_momentum(model.head, model.key_head, momentum)
            moco, ser = model(*(part.to(device) for part in batch))  # a LatticeMap goes there as tensors do
            optimizer.zero_grad()
            (moco + ser).backward()
            optimizer.step()
            step += 1
            print(f"step {step}: loss {moco + ser:.3f}, of which MoCo {moco:.3f}")
            if step == options.steps:
                break
