"""Evaluation of one checkpoint: loss on prepared text, and multiple-choice tasks."""

from deep_delta.evaluate.run import Settings, evaluate
from deep_delta.evaluate.tasks import TASKS

__all__ = ["TASKS", "Settings", "evaluate"]
