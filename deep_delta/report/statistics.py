"""Means, spreads and paired differences over seeds, with Student t intervals."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

LOWER = "lower"
HIGHER = "higher"
WITHIN_NOISE = "within noise"
TOO_FEW_SEEDS = "fewer than three seeds: no interval"
NO_COMMON_SEED = "no seed in common: no comparison"
DIVERGED = "diverged: no interval"

# Two pairs would give an interval with one degree of freedom, 12.7 standard errors wide: it looks
# like information and is none, so three pairs are the least for which an interval is reported.
FEWEST_PAIRS = 3


@dataclass(frozen=True)
class Difference:
    """Mean of ``a - b`` over ``n`` shared seeds, with its confidence interval.

    ``low`` and ``high`` are None where there is no interval; ``mean`` is NaN where a shared seed
    diverged or no seed is shared. ``verdict`` is one of the constants of this module.
    """

    n: int
    mean: float
    low: float | None
    high: float | None
    verdict: str


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (ddof 1; None for fewer than two values).

    A NaN or infinity among the values gives ``(nan, None)``: a mean over the runs that happened
    to survive would flatter the variant. Raises ValueError for no values.
    """
    if not values:
        raise ValueError("mean_and_spread needs at least one value")
    if not all(math.isfinite(value) for value in values):
        return math.nan, None
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None
    squares = math.fsum((value - mean) ** 2 for value in values)
    return mean, math.sqrt(squares / (len(values) - 1))


def paired_difference(
    a: Mapping[int, float], b: Mapping[int, float], level: float = 0.95
) -> Difference:
    """Difference ``a - b`` of two variants, paired by seed, at confidence ``level`` in (0, 1).

    ``a`` and ``b`` map seed to validation loss; seeds that only one of them has are left out.
    """
    if not 0.0 < level < 1.0:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    differences = [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]
    n = len(differences)
    if n == 0:
        return Difference(0, math.nan, None, None, NO_COMMON_SEED)
    mean, spread = mean_and_spread(differences)
    if math.isnan(mean):
        return Difference(n, mean, None, None, DIVERGED)
    if n < FEWEST_PAIRS or spread is None:
        return Difference(n, mean, None, None, TOO_FEW_SEEDS)
    half_width = student_t_quantile((1.0 + level) / 2.0, n - 1) * spread / math.sqrt(n)
    low, high = mean - half_width, mean + half_width
    verdict = LOWER if high < 0.0 else HIGHER if low > 0.0 else WITHIN_NOISE
    return Difference(n, mean, low, high, verdict)


def student_t_quantile(p: float, df: float) -> float:
    """The ``t`` with P(T <= t) = ``p`` for Student's t with ``df`` > 0 degrees of freedom."""
    if not 0.0 < p < 1.0 or df <= 0.0:
        raise ValueError(f"need 0 < p < 1 and df > 0, got p={p}, df={df}")
    if p < 0.5:
        return -student_t_quantile(1.0 - p, df)
    low, high = 0.0, 1.0
    while _upper_tail(high, df) > 1.0 - p:
        low, high = high, 2.0 * high
    while high - low > 1e-12 * high:
        middle = 0.5 * (low + high)
        if middle in (low, high):
            break
        if _upper_tail(middle, df) > 1.0 - p:
            low = middle
        else:
            high = middle
    return 0.5 * (low + high)


def _upper_tail(t: float, df: float) -> float:
    """P(T > t) for t >= 0."""
    return 0.5 * incomplete_beta(0.5 * df, 0.5, df / (df + t * t))


def incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularised incomplete beta function I_x(a, b), for a, b > 0 and 0 <= x <= 1."""
    if x <= 0.0 or x >= 1.0:
        return 0.0 if x <= 0.0 else 1.0
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    front = math.exp(log_front + a * math.log(x) + b * math.log1p(-x))
    # The fraction converges fast only below the mean; above it, use I_x(a, b) = 1 - I_1-x(b, a).
    if x < (a + 1.0) / (a + b + 2.0):
        return front * _beta_fraction(a, b, x) / a
    return 1.0 - front * _beta_fraction(b, a, 1.0 - x) / b


def _beta_fraction(a: float, b: float, x: float) -> float:
    """Continued fraction of the incomplete beta function, by Lentz's method."""
    tiny = 1e-300
    c = 1.0
    d = 1.0 / _away_from_zero(1.0 - (a + b) * x / (a + 1.0), tiny)
    result = d
    for m in range(1, 10_000):
        even = m * (b - m) * x / ((a + 2 * m - 1.0) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1.0))
        for coefficient in (even, odd):
            d = 1.0 / _away_from_zero(1.0 + coefficient * d, tiny)
            c = _away_from_zero(1.0 + coefficient / c, tiny)
            result *= c * d
        if abs(c * d - 1.0) < 1e-15:
            return result
    raise ArithmeticError(f"incomplete beta did not converge for a={a}, b={b}, x={x}")


def _away_from_zero(value: float, tiny: float) -> float:
    return value if abs(value) > tiny else tiny
