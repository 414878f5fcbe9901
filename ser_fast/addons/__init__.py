"""Equivariance terms beside an objective: an add-on is one file, and one line here."""

from ser_fast.addons.base import AddOnConfig
from ser_fast.addons.ser import SERConfig

ADDONS: dict[str, type[AddOnConfig]] = {"ser": SERConfig}
