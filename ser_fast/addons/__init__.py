"""Equivariance terms beside an objective: an add-on is one file, and one line here."""

from ser_fast.addons.augself import AugSelfConfig
from ser_fast.addons.base import AddOnConfig
from ser_fast.addons.equimod import EquiModConfig
from ser_fast.addons.essl import ESSLConfig
from ser_fast.addons.ser import SERConfig
from ser_fast.addons.stl import STLConfig

ADDONS: dict[str, type[AddOnConfig]] = {
    "ser": SERConfig,
    "equimod": EquiModConfig,
    "augself": AugSelfConfig,
    "essl": ESSLConfig,
    "stl": STLConfig,
}
