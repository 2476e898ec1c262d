"""Sums that grow with no text: means, histograms and second moments, accumulated in fp64."""

import math
from typing import Any

import torch
from scipy.stats import t as student_t
from torch import Tensor

LEVEL = 0.95
FEWEST = 3  # sequences; with fewer no interval is given


class Means:
    """Means of a number that every token has, by bin of a few; one bin unless told otherwise.

    The spread is over tokens. The interval is Student's t over sequences, each of which counts by
    the mean of its tokens, because tokens of one text are not independent.
    """

    def __init__(self, bins: int = 1, device: torch.device | None = None):
        # Of tokens, and of the means of sequences: how many, their sum, the sum of their squares.
        self.tokens = torch.zeros(3, bins, dtype=torch.float64, device=device)
        self.sequences = torch.zeros_like(self.tokens)

    def add(self, values: Tensor, bins: Tensor | None = None, where: Tensor | None = None) -> None:
        """values (B, T); bins (B, T), each token's; where (B, T), False for one that is left out.

        A token that is left out may hold any number, NaN too.
        """
        batch, count = len(values), self.tokens.shape[1]
        counted = torch.ones_like(values, dtype=torch.bool) if where is None else where
        values = torch.where(counted, values, 0.0).double()
        row = torch.arange(batch, device=values.device).unsqueeze(-1).expand_as(values) * count
        place = (row if bins is None else row + bins).flatten()
        powers = torch.stack([counted.double(), values, values.square()]).flatten(1)
        sums = powers.new_zeros(3, batch * count).index_add_(1, place, powers).view(3, batch, count)
        self.tokens += sums.sum(1)
        means, present = sums[1] / sums[0].clamp(min=1), sums[0] > 0
        self.sequences += torch.stack([present.double(), means, means.square()]).sum(1)

    def entries(self) -> list[dict[str, Any]]:
        """Of each bin: n tokens, mean, spread, low, high; None for what too little gives."""
        rows = torch.cat([self.tokens, self.sequences]).T.tolist()
        return [_entry(*row) for row in rows]

    def entry(self) -> dict[str, Any]:
        """That of the only bin."""
        (entry,) = self.entries()
        return entry


def _entry(
    n: float, total: float, squares: float, sequences: float, their_sum: float, their_squares: float
) -> dict[str, Any]:
    if n == 0:
        return {"n": 0, "mean": None, "spread": None, "low": None, "high": None}
    mean = total / n
    entry = {"n": int(n), "mean": mean, "spread": _deviation(n, total, squares)}
    if sequences < FEWEST:
        return {**entry, "low": None, "high": None}
    error = _deviation(sequences, their_sum, their_squares) / math.sqrt(sequences - 1)
    half = float(student_t.isf((1 - LEVEL) / 2, sequences - 1)) * error
    return {**entry, "low": mean - half, "high": mean + half}


def _deviation(n: float, total: float, squares: float) -> float:
    return math.sqrt(max(0.0, squares / n - (total / n) ** 2))


class Histogram:
    """Counts of numbers between 0 and `top` in equal bins, for their quantiles and shares."""

    def __init__(self, bins: int, top: float, device: torch.device | None = None):
        self.top = top
        self.counts = torch.zeros(bins, dtype=torch.float64, device=device)

    def add(self, values: Tensor) -> None:
        bins = len(self.counts)
        place = (values.flatten() * (bins / self.top)).long().clamp(0, bins - 1)
        self.counts += torch.bincount(place, minlength=bins)

    def quantile(self, share: float) -> float:
        """The number that `share` of all lie below, to the width of a bin."""
        below = self.counts.cumsum(0)
        index = int(torch.searchsorted(below, share * below[-1]).clamp(max=len(below) - 1))
        start = float(below[index - 1]) if index else 0.0
        inside = (share * float(below[-1]) - start) / max(float(self.counts[index]), 1.0)
        return self.top / len(self.counts) * (index + inside)


class SecondMoments:
    """Σ xxᵀ of vectors (size,), over tokens and whatever else is summed over."""

    def __init__(self, size: int, device: torch.device | None = None):
        self.total = torch.zeros(size, size, dtype=torch.float64, device=device)

    def add(self, vectors: Tensor) -> None:
        """vectors (..., size)."""
        flat = vectors.flatten(0, -2)
        self.total += flat.mT @ flat

    def effective_rank(self) -> float | None:
        """(tr C)²/tr C², the participation ratio of C's eigenvalues; None if all is zero.

        size for vectors that fill all dimensions evenly, 1 for vectors along one line. Of unit
        vectors it is 1 over the mean squared cosine of two that are drawn at random.
        """
        trace, squares = float(self.total.trace()), float(self.total.square().sum())
        return trace**2 / squares if squares > 0 else None
