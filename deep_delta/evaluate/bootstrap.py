"""Confidence intervals of ratios of sums, by resampling what is independent."""

import numpy as np
import numpy.typing as npt

RESAMPLES = 2000
FEWEST = 5  # resampling fewer says more about which they are than about their spread
CHUNK_NUMBERS = 4_000_000  # counts held at once: 32 MB

Array = npt.NDArray[np.float64]


def ratio_intervals(
    numerator: Array, denominators: list[Array], level: float, seed: int = 0
) -> list[tuple[float, float] | None]:
    """Percentile intervals of sum(numerator) / sum(denominator), for each of the denominators.

    All are (n,): the sums of n groups that are independent of each other, which are drawn n at a
    time with replacement, RESAMPLES times, from a generator started with `seed`. None for fewer
    than FEWEST groups.
    """
    groups = len(numerator)
    if groups < FEWEST:
        return [None for _ in denominators]
    generator = np.random.default_rng(seed)
    sums = np.stack([numerator, *denominators], axis=1)
    drawn = np.concatenate(
        [
            generator.multinomial(groups, np.full(groups, 1 / groups), size=rows) @ sums
            for rows in _chunk_rows(groups)
        ]
    )
    tail = 50 * (1 - level)
    bounds = [
        np.percentile(drawn[:, 0] / drawn[:, column], [tail, 100 - tail])
        for column in range(1, sums.shape[1])
    ]
    return [(float(low), float(high)) for low, high in bounds]


def _chunk_rows(groups: int) -> list[int]:
    rows = max(1, CHUNK_NUMBERS // groups)
    return [min(rows, RESAMPLES - start) for start in range(0, RESAMPLES, rows)]
