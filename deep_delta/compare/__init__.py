"""Comparisons: one recipe for several arms, rates and seeds, and one report."""

from deep_delta.compare.arms import Arm, parse_arm
from deep_delta.compare.run import compare
from deep_delta.compare.study import Study, make_study, read_study

__all__ = ["Arm", "Study", "compare", "make_study", "parse_arm", "read_study"]
