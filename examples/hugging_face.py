"""SERLoss on a Hugging Face ViT or DINOv2, with views that are rotated, and masks that are stricter than the maps.

python examples/hugging_face.py [--model vit] [--data folder:PHOTOGRAPHS] [--steps 100]

--model vit and dinov2 are small ones with random weights. Any other name is that of public weights, which transformers
downloads: facebook/dinov2-small, google/vit-base-patch16-224-in21k.
"""

import argparse

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F
from transformers import AutoImageProcessor, AutoModel, Dinov2Config, ViTConfig

from ser_fast import LatticeMap, SERLoss, info_nce
from ser_fast.capture import TokenCapture
from ser_fast.data.sources import open_source

SMALL = {"hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 3, "image_size": 64, "patch_size": 8}
CONFIGS = {
    "vit": ViTConfig(**SMALL, intermediate_size=192),
    "dinov2": Dinov2Config(**SMALL, mlp_ratio=2),
}
BATCH = 16


class TwoViews(Dataset):
    """Two views of each picture, the maps that took the picture there, and which tokens show the picture.

    Args:
        data: source of the pictures.
        side: of the views, in pixels.
        patch: side of a token, in pixels.
        mean, std: of the pixels.
    """

    def __init__(self, data: str, side: int, patch: int, mean: list[float], std: list[float]) -> None:
        self.pictures = open_source(data, train=True, image_size=128)  # yours
        self.size, self.tokens = (side, side), (side // patch, side // patch)
        normalize = v2.Normalize(mean, std)
        self.colors = v2.Compose([v2.ColorJitter(0.4, 0.4, 0.2, 0.1), v2.ToDtype(torch.float32, scale=True), normalize])

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, LatticeMap, LatticeMap, Tensor, Tensor]:
        picture = self.pictures.read(index).pixels  # uint8 (3, H, W), of any size
        (view0, g0, mask0), (view1, g1, mask1) = self.make_view(picture), self.make_view(picture)
        return view0, view1, g0, g1, mask0, mask1

    def make_view(self, picture: Tensor) -> tuple[Tensor, LatticeMap, Tensor]:
        box = v2.RandomResizedCrop.get_params(picture, (0.3, 1.0), (3 / 4, 4 / 3))
        angle = torch.empty(1).uniform_(-30, 30)
        view = F.resized_crop(picture, *box, list(self.size), antialias=True)
        view = F.rotate(view, angle.item(), F.InterpolationMode.BILINEAR)
        g = LatticeMap.from_views(picture.shape[1:], self.size, box=torch.tensor([box]), angle=angle)
        # The map knows what the rotation filled; the mask also keeps out tokens whose partner is blended of such ones.
        return self.colors(view), g, LatticeMap.rotate(self.tokens, angle).valid()[0]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="dinov2")
    parser.add_argument("--data", default="photos")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.model in CONFIGS:
        model, side, mean, std = AutoModel.from_config(CONFIGS[options.model]), 64, [0.5] * 3, [0.5] * 3
    else:
        processor = AutoImageProcessor.from_pretrained(options.model)
        model, side = AutoModel.from_pretrained(options.model), 224
        mean, std = processor.image_mean, processor.image_std
    dim, patch = model.config.hidden_size, model.config.patch_size
    model, ser, head = model.to(device), SERLoss(dim=dim).to(device), torch.nn.Linear(dim, 64).to(device)
    capture = TokenCapture(model, block=2)  # output.hidden_states[2][:, 1:] is the same, not yet (B, H, W, C)
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters(), *ser.parameters()], lr=1e-4)
    loader = DataLoader(TwoViews(options.data, side, patch, mean, std), BATCH, shuffle=True, drop_last=True)
    step = 0
    while step < options.steps:
        for batch in loader:
            view0, view1, g0, g1, mask0, mask1 = (part.to(device) for part in batch)
            embedding0, tokens0 = head(model(view0).last_hidden_state[:, 0]), capture.tokens
            embedding1, tokens1 = head(model(view1).last_hidden_state[:, 0]), capture.tokens
            simclr = info_nce(embedding0, embedding1, temperature=0.2)
            loss = simclr + ser(tokens0, tokens1, g0, g1, mask0=mask0, mask1=mask1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            print(f"step {step}: loss {loss.item():.3f}, of which SimCLR {simclr.item():.3f}")
            if step == options.steps:
                break
