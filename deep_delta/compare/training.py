"""One training of a comparison, and what it is for."""

import math
from dataclasses import dataclass

from deep_delta.compare.arms import Arm
from deep_delta.train import Recipe, RunResult

REPORTED, RATE, BUDGET = "reported", "rate", "budget"  # what a training is for


@dataclass(frozen=True)
class Training:
    """One training of a comparison, and what came of it."""

    arm: Arm
    purpose: str
    recipe: Recipe
    result: RunResult

    @property
    def losses(self) -> dict[str, float]:
        """Of validation and test text; NaN where it diverged or there is no such text."""
        result = self.result
        found = {"val_loss": result.val_loss, "test_loss": result.test_loss}
        return {name: math.nan if loss is None else loss for name, loss in found.items()}
