"""SERLoss on several ranks: N processes give the loss, and so the weights, of one with the whole batch.

torchrun --nproc-per-node 2 examples/two_processes.py [--data folder:PHOTOGRAPHS] [--steps 100]
python examples/two_processes.py

Both print the same losses. It takes three things: `gather=True`, SERLoss within the module that DistributedDataParallel
wraps, and an objective that contrasts over all ranks, too.
"""

import argparse
import os

import timm
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ser_fast import LatticeMap, SERLoss, info_nce
from ser_fast.capture import TokenCapture
from ser_fast.data.sources import open_dataset
from ser_fast.distributed import all_gather_rows
from ser_fast.views.pixels import normalize, transform_images
from ser_fast.views.samplers import Crop, draws

SIDE, BATCH = 64, 16  # images a step, over all ranks


class Method(nn.Module):
    """Encoder, objective and SER as one module: DistributedDataParallel keeps all of its parameters equal."""

    def __init__(self) -> None:
        super().__init__()
        shape = {"img_size": SIDE, "patch_size": 8, "embed_dim": 96, "depth": 4}
        self.vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, **shape)
        self.head = nn.Linear(96, 64)
        self.ser = SERLoss(dim=96, hidden_dim=128, out_dim=64, gather=True)
        self.capture = TokenCapture(self.vit, block=2)

    def forward(self, view0: Tensor, view1: Tensor, g0: LatticeMap, g1: LatticeMap) -> Tensor:
        """This rank's loss; the mean over the ranks is that of the whole batch."""
        embedding0, tokens0 = self.head(self.vit(view0)), self.capture.tokens
        embedding1, tokens1 = self.head(self.vit(view1)), self.capture.tokens
        keys = all_gather_rows(embedding1, [len(embedding1)] * ranks)
        own = rank * len(embedding0) + torch.arange(len(embedding0), device=keys.device)  # its images among all
        everything = torch.arange(len(keys), device=keys.device)
        simclr = info_nce(embedding0, keys, temperature=0.2, image=own, key_image=everything, positive=own)
        return simclr + self.ser(tokens0, tokens1, g0, g1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="photos")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if torch.cuda.is_available() else "cpu"
    if ranks > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    torch.manual_seed(0)  # the same weights, and the same batches, on every rank
    method = Method().to(device)
    model = DistributedDataParallel(method) if ranks > 1 else method
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-3)
    dataset, sampler = open_dataset(options.data, train=True, image_size=SIDE), Crop(area=(0.3, 1.0))
    for step in range(options.steps):
        batch = torch.randint(len(dataset), (BATCH,))
        own = batch[rank * BATCH // ranks : (rank + 1) * BATCH // ranks]
        pictures = torch.stack([dataset[index][0] for index in own.tolist()]).to(device).float() / 255
        # What is drawn depends on the step, the picture and the view alone, not on the rank that draws it.
        g0, g1 = (sampler((SIDE, SIDE), 8, draws(0, step, own, view), view) for view in (0, 1))
        loss = model(*(normalize(transform_images(pictures, g, antialias=True)) for g in (g0, g1)), g0, g1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if ranks > 1:
            dist.all_reduce(loss.detach())  # in place: its sum
        if rank == 0:
            print(f"step {step + 1}: loss {loss.item() / ranks:.5f}")
    if ranks > 1:
        dist.destroy_process_group()
