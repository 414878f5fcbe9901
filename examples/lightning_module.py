"""SERLoss in Lightning: an attribute of the LightningModule, so that DDP wraps it and the optimizer has its parameters.

The data set returns each view's map beside it: the DataLoader joins the maps, and Lightning moves them to the device.

python examples/lightning_module.py [--data folder:PHOTOGRAPHS] [--steps 100] [--devices 2]
"""

import argparse

import lightning
import timm
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from ser_fast import LatticeMap, SERLoss, info_nce
from ser_fast.capture import TokenCapture
from ser_fast.data.sources import open_source

SIDE, BATCH = 64, 16
COLORS = v2.Compose([v2.ColorJitter(0.4, 0.4, 0.2, 0.1), v2.ToDtype(torch.float32, scale=True)])


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
        box = v2.RandomResizedCrop.get_params(picture, (0.3, 1.0), (3 / 4, 4 / 3))
        flip = torch.rand(1) < 0.5
        view = F.resized_crop(picture, *box, [SIDE, SIDE], antialias=True)
        view = F.horizontal_flip(view) if flip else view
        g = LatticeMap.from_views(picture.shape[1:], (SIDE, SIDE), box=torch.tensor([box]), hflip=flip)
        return COLORS(view), g


class SimCLRWithSER(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        shape = {"img_size": SIDE, "patch_size": 8, "embed_dim": 96, "depth": 4}
        self.vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, **shape)
        self.head = torch.nn.Linear(96, 64)
        self.ser = SERLoss(dim=96, hidden_dim=128, out_dim=64, gather=True)  # negatives of all ranks
        self.capture = TokenCapture(self.vit, block=2)

    def training_step(self, batch: tuple[Tensor, Tensor, LatticeMap, LatticeMap], _: int) -> Tensor:
        view0, view1, g0, g1 = batch
        embedding0, tokens0 = self.head(self.vit(view0)), self.capture.tokens  # (B, 64), (B, 8, 8, 96)
        embedding1, tokens1 = self.head(self.vit(view1)), self.capture.tokens
        loss = info_nce(embedding0, embedding1, temperature=0.2) + self.ser(tokens0, tokens1, g0, g1)
        self.log("loss", loss)
        self.print(f"step {self.global_step + 1}: loss {loss.item():.3f}")
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)  # those of self.ser, too


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="photos")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--devices", type=int, default=1)
    options = parser.parse_args()
    torch.manual_seed(0)
    loader = DataLoader(TwoViews(options.data), BATCH, shuffle=True, drop_last=True)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(max_steps=options.steps, devices=options.devices, enable_model_summary=False, **quiet)
    trainer.fit(SimCLRWithSER(), loader)
