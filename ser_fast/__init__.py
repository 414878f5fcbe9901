"""ser-fast: Soft Equivariance Regularization for self-supervised vision transformers."""

from importlib.metadata import PackageNotFoundError, version

from ser_fast.lattice import LatticeMap
from ser_fast.loss import SERLoss
from ser_fast.ops.group_action import group_action
from ser_fast.ops.nt_xent import info_nce, nt_xent

try:
    __version__ = version("ser-fast")
except PackageNotFoundError:  # sources that are on the path without being installed
    __version__ = "unknown"

__all__ = ["LatticeMap", "SERLoss", "__version__", "group_action", "info_nce", "nt_xent"]
