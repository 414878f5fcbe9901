"""The two operations alone, without SERLoss, and compiled.

python examples/operations.py [--data folder:PHOTOGRAPHS] [--backend inductor]

`group_action` moves tokens as the picture moved. `nt_xent` contrasts every row of two views with all rows of other
images, exactly, without storing their similarities. Both work under torch.compile, autocast and autograd.
"""

import argparse

import torch
from torch import Tensor

from ser_fast import LatticeMap, group_action, nt_xent
from ser_fast.data.sources import open_dataset


def moved_and_contrasted(tokens0: Tensor, tokens1: Tensor, g: LatticeMap) -> Tensor:
    """The loss of tokens (B, H, W, C): those of view 0, moved by g, must match those of view 1."""
    moved, valid = group_action(tokens0, g, return_valid=True)  # (B, H, W, C), (B, H*W)
    # Which image a row is of, and whether it has a partner: where no part of view 0 went, there is nothing to match.
    image = torch.arange(len(valid), device=valid.device).repeat_interleave(valid.shape[1])
    return nt_xent(moved.flatten(0, 2), tokens1.flatten(0, 2), temperature=0.3, image=image, valid=valid.flatten())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="photos")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    options = parser.parse_args()
    dataset = open_dataset(options.data, train=True, image_size=64)
    images = torch.stack([dataset[index * len(dataset) // 8][0] for index in range(8)]).float() / 255
    # The pixels of patches of 8 x 8 pixels in place of an encoder's tokens: (8, 8, 8, 192).
    tokens = images.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).flatten(3)

    # A quarter turn for each image by itself: a permutation of its tokens, to the bit.
    turns = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
    turned = group_action(tokens, LatticeMap.rot90((8, 8), turns))
    expected = torch.stack([image.rot90(turn, (0, 1)) for image, turn in zip(tokens, turns.tolist(), strict=True)])
    print(f"quarter turns: differ from torch.rot90 by {(turned - expected).abs().max():g}")

    # Any other map takes each token from its neighbors; a crop says which tokens it has no part of the lattice for.
    g = LatticeMap.rotate((8, 8), torch.linspace(0, 315, 8)) @ LatticeMap.crop((8, 8), (2, 2, 6, 6), (8, 8))
    moved, valid = group_action(tokens, g, interpolation="bicubic", return_valid=True)
    print(f"rotated crops: {tuple(moved.shape)}, {valid.float().mean():.0%} of the tokens have a partner")

    tokens0, tokens1 = tokens.clone().requires_grad_(), moved
    loss = moved_and_contrasted(tokens0, tokens1, g)
    loss.backward()
    print(f"nt_xent: loss {loss.item():.3f}, gradient {tokens0.grad.norm():.3f}")

    # One graph, without a break: both are operators of torch.library.
    compiled = torch.compile(moved_and_contrasted, fullgraph=True, backend=options.backend)
    other0 = tokens.clone().requires_grad_()
    other = compiled(other0, tokens1, g)
    other.backward()
    difference = max((loss - other).abs().item(), (tokens0.grad - other0.grad).abs().max().item())
    print(f"compiled: loss {other.item():.3f}, differs by {difference:.1g}")
