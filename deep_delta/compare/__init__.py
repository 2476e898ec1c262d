"""Comparisons: the same recipe for several residuals and seeds, and one report."""

from deep_delta.compare.run import BASELINE, DEFAULT_SEEDS, DEFAULT_VARIANTS, compare

__all__ = ["BASELINE", "DEFAULT_SEEDS", "DEFAULT_VARIANTS", "compare"]
