"""Training: a recipe, and one run of it."""

from deep_delta.train.folder import Diverged, RunResult, read_result
from deep_delta.train.metrics import read_metrics
from deep_delta.train.model import model_config, resolved
from deep_delta.train.recipe import Recipe, load_recipe, make_recipe, merge, parse_overrides
from deep_delta.train.run import Interrupted, train

__all__ = [
    "Diverged",
    "Interrupted",
    "Recipe",
    "RunResult",
    "load_recipe",
    "make_recipe",
    "merge",
    "model_config",
    "parse_overrides",
    "read_metrics",
    "read_result",
    "resolved",
    "train",
]
