"""SERLoss on a feature map of a ResNet: any lattice that moves as the picture does will do.

Views are cut on the device, by the maps themselves (`transform_images`): nothing is drawn twice.

python examples/resnet_features.py [--data folder:PHOTOGRAPHS] [--steps 100] [--pretrained]
"""

import argparse

import timm
import torch
from torch.utils.data import DataLoader

from ser_fast import LatticeMap, SERLoss, info_nce
from ser_fast.data.sources import open_dataset
from ser_fast.views.pixels import normalize, transform_images
from ser_fast.views.samplers import Crop, draws

PICTURE, VIEW, BATCH = (128, 128), (64, 64), 16
STRIDE = 8  # of the feature map after layer2, the stem being number 0


def token_lattice() -> LatticeMap:
    """From a view's pixels to the feature map.

    Patches tile the view: their maps are g.on(PICTURE, lattice). A convolution of stride 2 with an odd kernel and
    symmetric padding keeps pixels 0, 2, 4 ...: its feature 0 is centered on pixel 0, not in the middle of the first 8.
    """
    height, width = (-(-side // STRIDE) for side in VIEW)
    corner = (1 - STRIDE) / 2
    return LatticeMap.crop(VIEW, (corner, corner, STRIDE * height, STRIDE * width), (height, width))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="photos")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--pretrained", action="store_true", help="start from public weights, which timm downloads")
    options = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    resnet = timm.create_model("resnet18", num_classes=0, pretrained=options.pretrained).to(device)
    channels = resnet.feature_info[2]["num_chs"]
    ser, head = SERLoss(dim=channels).to(device), torch.nn.Linear(resnet.num_features, 64).to(device)
    optimizer = torch.optim.AdamW([*resnet.parameters(), *head.parameters(), *ser.parameters()], lr=1e-3)
    dataset = open_dataset(options.data, train=True, image_size=PICTURE[0])  # yours: uint8 (3, 128, 128), label, index
    sampler, lattice = Crop(area=(0.3, 1.0), turns=True), token_lattice()
    step, epoch = 0, 0
    while step < options.steps:
        for pictures, _, indices in DataLoader(dataset, BATCH, shuffle=True, drop_last=True):
            pictures = pictures.to(device).float() / 255
            maps, embeddings, tokens = [], [], []
            for view in (0, 1):
                # A crop of the picture, turned, on fewer pixels: `on` changes how many there are, not what they show.
                g = sampler(PICTURE, STRIDE, draws(0, epoch, indices, view), view).on(PICTURE, VIEW)
                images = normalize(transform_images(pictures, g, antialias=True))
                last, (features,) = resnet.forward_intermediates(images, indices=[2])
                maps.append(lattice @ g)
                embeddings.append(head(last.mean((2, 3))))
                tokens.append(features.permute(0, 2, 3, 1))  # (B, 8, 8, 128)
            simclr = info_nce(*embeddings, temperature=0.2)
            loss = simclr + ser(*tokens, *maps)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            print(f"step {step}: loss {loss.item():.3f}, of which SimCLR {simclr.item():.3f}")
            if step == options.steps:
                break
        epoch += 1
