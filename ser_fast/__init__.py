"""ser-fast: Soft Equivariance Regularization for self-supervised vision transformers."""

from ser_fast.lattice import LatticeMap
from ser_fast.loss import SERLoss
from ser_fast.ops.group_action import group_action
from ser_fast.ops.nt_xent import info_nce, nt_xent

__all__ = ["LatticeMap", "SERLoss", "group_action", "info_nce", "nt_xent"]
