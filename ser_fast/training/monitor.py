"""What an encoder is worth while it trains: a few scores every so many steps, on images that stay the same."""

import time
from collections.abc import Callable
from typing import Any

from ser_fast.evaluation.knn import SampledImages
from ser_fast.evaluation.scores import OF_A_LAYER, score_encoder
from ser_fast.training.config import TrainConfig
from ser_fast.training.pretraining import Pretraining

PREFIX = "eval/"


class Monitor:
    """Scores of a training's product: kNN top-1, RankMe, and equivariance at the layers that add-ons read.

    The training waits for them: `EvaluateConfig` says how often, and for which share of its time at most.

    Args:
        config: of the run; it has `evaluate.every`.
        model: of the run.
        clock: of seconds.

    Raises:
        ValueError: the images can't be opened.
    """

    def __init__(self, config: TrainConfig, model: Pretraining, clock: Callable[[], float] = time.perf_counter) -> None:
        options = config.evaluate
        self.options, self.model, self.clock = options, model, clock
        self.images = SampledImages.open(
            config.data,
            config.model.image_size,
            train=options.train,
            test=options.test,
            equivariance=options.equivariance,
            max_pixels=config.max_pixels,
        )
        addons: Any = model.addons
        self.layers = {layer for addon in addons.values() for layer in addon.layers} or {max(1, model.encoder.split)}
        self.began, self.spent, self.last = clock(), 0.0, 0.0

    def after(self, step: int, steps: int) -> dict[str, float]:
        """What is to be logged after a step: nothing, or the scores and the seconds that they took.

        Args:
            step: how many were done.
            steps: in all. The last one is always looked at.
        """
        if step != steps and (not self.options.every or step % self.options.every or not self._has_time()):
            return {}
        begin = self.clock()
        scores = {
            f"{PREFIX}{record.name}": record.value
            for record in score_encoder(self.model.product, self.images)
            if record.measure not in OF_A_LAYER or record.layer in self.layers
        }
        self.last = self.clock() - begin
        self.spent += self.last
        return scores | {f"{PREFIX}seconds": self.last}

    def _has_time(self) -> bool:
        """Whether one more evaluation, as long as the last one, stays within the share."""
        return self.spent + self.last <= self.options.share * (self.clock() - self.began)
