"""Contrastive losses of vectors over all ranks, for add-ons: those of the objectives, on two views."""

from torch import Tensor

from ser_fast.objectives.moco_v3 import moco_v3_terms
from ser_fast.objectives.simclr import simclr_loss


def symmetric(z0: Tensor, z1: Tensor, temperature: float) -> Tensor:
    """NT-Xent between z0 and z1 (T, D): negatives are all other rows of both sides, on all ranks.

    Source: SimCLR, arXiv 2002.05709, equation 1.
    """
    return simclr_loss([z0, z1], temperature=temperature)


def cross_view(z0: Tensor, z1: Tensor, temperature: float) -> Tensor:
    """2 tau times the cross-entropy of z0 (T, D) among the rows of z1 alone, and of z1 among those of z0.

    Keys get no gradient, as in the released code of SER.

    Source: MoCo-v3, arXiv 2104.02057, algorithm 1.
    """
    return moco_v3_terms([z0, z1], [z0, z1], temperature=temperature).sum()
