"""Every arm at its own best learning rate, chosen on the validation text by seeds of their own."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from deep_delta.errors import UserError


@dataclass(frozen=True)
class Choice:
    """An arm's learning rate.

    tried: mean validation loss of each rate, NaN where a run diverged; empty where it was given.
    edge: "lowest" or "highest" where the best of several rates is that one: an even better one may
        lie beyond. runs: how many trainings chose.
    """

    rate: float
    tried: Mapping[float, float]
    edge: str | None
    runs: int


def choose(arm: str, losses: Mapping[float, Sequence[float]]) -> Choice:
    """The rate with the lowest mean loss over the search's seeds; UserError if all diverged.

    losses: of each rate, one a seed; NaN for a run that diverged.
    """
    tried = {rate: fmean(losses[rate]) for rate in sorted(losses)}
    finite = {rate: loss for rate, loss in tried.items() if math.isfinite(loss)}
    if not finite:
        raise UserError(f"arm {arm} diverged at every rate that was tried: give lower ones")
    best = min(finite, key=lambda rate: finite[rate])
    # A rate beyond which training diverges is an edge of what works, not of what was tried.
    edges = {min(tried): "lowest", max(tried): "highest"}
    return Choice(best, tried, edges.get(best), sum(map(len, losses.values())))
