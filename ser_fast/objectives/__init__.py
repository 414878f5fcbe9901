"""Invariance objectives: a method is one file, and one line here."""

from ser_fast.objectives.barlow_twins import BarlowTwinsConfig
from ser_fast.objectives.base import ObjectiveConfig
from ser_fast.objectives.byol import BYOLConfig
from ser_fast.objectives.dino import DINOConfig
from ser_fast.objectives.moco_v3 import MoCoV3Config
from ser_fast.objectives.simclr import SimCLRConfig
from ser_fast.objectives.vicreg import VICRegConfig

OBJECTIVES: dict[str, type[ObjectiveConfig]] = {
    "moco_v3": MoCoV3Config,
    "dino": DINOConfig,
    "barlow_twins": BarlowTwinsConfig,
    "simclr": SimCLRConfig,
    "byol": BYOLConfig,
    "vicreg": VICRegConfig,
}
