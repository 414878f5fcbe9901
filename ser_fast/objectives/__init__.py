"""Invariance objectives: a method is one file, and one line here."""

from ser_fast.objectives.base import ObjectiveConfig
from ser_fast.objectives.moco_v3 import MoCoV3Config

OBJECTIVES: dict[str, type[ObjectiveConfig]] = {"moco_v3": MoCoV3Config}
