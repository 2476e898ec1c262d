"""Verdicts on differences between arms that were trained with the same seeds.

An arm is anything with a name and a validation loss per seed. The model is the two-way layout
loss = arm + seed + residual: what a seed does to all arms cancels, and all arms together say how
large residuals are. Its fit is least squares over every cell that is there, so that arms may have
different seeds. Differences are means over the seeds that both arms of a contrast have. With all
cells there the t ratios are exact; with cells missing almost, because a mean over common seeds is
then not the least-squares one.

Residuals need not be of one size: an arm that is trained less stably scatters more, and if it is
the reference it misleads every contrast at once. So an arm's variance is the larger of two: the
pooled one, and the mean square of the arm's own residuals, which would be the same on average if
all arms were alike. The variance of a difference is the sum of its two arms' over n, with the
degrees of freedom of the pooled one. Verdicts are Holm's over all contrasts.

Simulated rates of at least one false verdict at 5 %, the worst of 2 to 12 arms against a baseline
and 3 to 8 seeds: 5 % if all scatter alike (about 3 % with more than two arms), 6.6 % with a
baseline that scatters twice as much as the others, 5 % with another such arm. The pooled variance
alone gives 15.8 % with that baseline, the larger of the pooled and the contrast's own paired
variance 9.6 %. A difference of three residual deviations is found with five seeds in 90 % of the
studies (pooled variance alone: 95 %; paired variances alone, with 12 arms: 40 %).
"""

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import t as student_t

LOWER = "lower"
HIGHER = "higher"
WITHIN_NOISE = "within noise"
TOO_FEW_SEEDS = "fewer than three seeds: no interval"
NO_COMMON_SEED = "no seed in common: no comparison"
DIVERGED = "diverged: no interval"

# Two pairs alone would give an interval with one degree of freedom: it looks like information and
# is none. More arms lend degrees of freedom, but two seeds still are hardly a sample of seeds.
FEWEST_PAIRS = 3
MOST_SEEDS = 1_000_000  # nobody trains more: a difference that needs them counts as none

Array = NDArray[np.float64]
Pair = tuple[str, str]


@dataclass(frozen=True)
class Contrast:
    """The difference ``arm - reference`` in nats/token, and what is to be thought of it.

    Attributes:
        n: seeds that both arms have.
        mean: over these seeds; NaN where there are none, or where a run of the two arms diverged.
        standard_error: of the mean. This and the next four are None where there is no interval.
        p: two-sided, of this contrast alone.
        holm_p: p adjusted by Holm's method for all contrasts of the study.
        bonferroni_low, bonferroni_high: intervals that all hold at once at the study's level.
        verdict: LOWER or HIGHER where ``holm_p`` is small enough, else WITHIN_NOISE, or why there
            is none. Holm decides a little more than the Bonferroni intervals show: an interval
            may contain zero by a little and the difference be decided.
        n_to_decide: for WITHIN_NOISE, how many seeds would decide a difference of this size: the
            fewest for which half of the Bonferroni interval is shorter than ``|mean|``, with the
            same variance, arms and contrasts. If the true difference is this large, so many seeds
            find it about every second time. None for zero, and beyond MOST_SEEDS.
    """

    arm: str
    reference: str
    n: int
    mean: float
    standard_error: float | None
    p: float | None
    holm_p: float | None
    bonferroni_low: float | None
    bonferroni_high: float | None
    verdict: str
    n_to_decide: int | None


@dataclass(frozen=True)
class Judgement:
    """The contrasts of a study, in the order that was asked for.

    ``residual_deviation`` is the pooled standard deviation of the two-way layout's residuals,
    with ``degrees_of_freedom``; None where there are none.
    """

    residual_deviation: float | None
    degrees_of_freedom: int
    contrasts: list[Contrast]


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (ddof 1; None for fewer than two values).

    A NaN or infinity among the values gives ``(nan, None)``: a mean over the runs that happened
    to survive would flatter the arm. Raises ValueError for no values.
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


def judge(
    losses: Mapping[str, Mapping[int, float]], pairs: Sequence[Pair], level: float = 0.95
) -> Judgement:
    """Judge the contrasts ``pairs`` of (arm, reference), all at once at ``level`` in (0, 1).

    ``losses[arm][seed]`` is a validation loss, NaN for a run that diverged. An arm with such a run
    has no verdict and no part in the variance: what its other runs do is no measure of the rest.
    All pairs count for the corrections, also those that get no verdict. Raises ValueError for a
    level outside (0, 1) and for pairs of unknown arms, of one arm with itself, or twice the same.
    """
    if not 0.0 < level < 1.0:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    _check_pairs(losses, pairs)
    steady = {
        arm: by_seed
        for arm, by_seed in losses.items()
        if by_seed and all(math.isfinite(loss) for loss in by_seed.values())
    }
    tested = [
        (arm, reference)
        for arm, reference in pairs
        if {arm, reference} <= steady.keys()
        and len(steady[arm].keys() & steady[reference].keys()) >= FEWEST_PAIRS
    ]
    fit = AdditiveFit(steady)
    means, errors, p_values = fit.tests(tested)
    rows = zip(means, errors, p_values, holm(p_values, len(pairs)), strict=True)
    found = {
        pair: _judged(pair, fit, [float(value) for value in row], len(pairs), level)
        for pair, row in zip(tested, rows, strict=True)
    }
    return Judgement(
        math.sqrt(float(fit.variance)) if fit.df else None,
        fit.df,
        [found.get(pair) or _not_judged(pair, losses) for pair in pairs],
    )


class AdditiveFit:
    """The least-squares fit of arm + seed to ``losses[arm][seed]``, none of which is NaN.

    Losses may be arrays of any one shape, as if there were so many studies with the same cells;
    what is said of losses below then has that shape too.

    Attributes:
        df: degrees of freedom, the cells less what arms and seeds explain.
        variance: the pooled mean square of the residuals; NaN without degrees of freedom.
    """

    def __init__(self, losses: Mapping[str, Mapping[int, ArrayLike]]):
        self.losses = losses
        cells = [(arm, seed) for arm, by_seed in losses.items() for seed in by_seed]
        arms = np.array([list(losses).index(arm) for arm, _ in cells], dtype=int)
        _, seeds = np.unique([seed for _, seed in cells], return_inverse=True)
        columns = [np.equal.outer(of, np.unique(of)).astype(float) for of in (arms, seeds)]
        design = np.concatenate(columns, axis=1)
        rest = np.eye(len(cells)) - design @ np.linalg.pinv(design)  # takes losses to residuals
        values = np.array([losses[arm][seed] for arm, seed in cells], dtype=np.float64)
        squares = np.square(np.tensordot(rest, values, 1))
        # A cell's residual varies by this share of the residuals' variance.
        shares = rest.diagonal()
        self.df = round(float(shares.sum()))
        self.variance: Array = squares.sum(0) / self.df if self.df else np.nan * squares.sum(0)
        self._own = {
            arm: (squares[arms == index].sum(0), float(shares[arms == index].sum()))
            for index, arm in enumerate(losses)
        }

    def arm_variance(self, arm: str) -> Array:
        """The larger of the pooled variance and the mean square of the arm's own residuals.

        Needs an arm that shares seeds with another one.
        """
        squares, share = self._own[arm]
        return np.maximum(self.variance, squares / share)

    def tests(self, pairs: Sequence[Pair]) -> tuple[Array, Array, Array]:
        """Means, standard errors and p of ``arm - reference``, each of shape (pairs, ...).

        Each pair needs at least two seeds in common.
        """
        if not pairs:
            return np.empty(0), np.empty(0), np.empty(0)
        means, errors = [], []
        for arm, reference in pairs:
            a, b = self.losses[arm], self.losses[reference]
            differences = [np.subtract(a[seed], b[seed]) for seed in sorted(a.keys() & b.keys())]
            variance = self.arm_variance(arm) + self.arm_variance(reference)
            means.append(np.mean(differences, axis=0))
            errors.append(np.sqrt(variance / len(differences)))
        mean, error = np.array(means), np.array(errors)
        # Losses that do not scatter at all decide everything but a difference of zero.
        extreme = np.where(mean == 0.0, 0.0, np.inf)
        ratio = np.divide(np.abs(mean), error, out=extreme, where=error > 0.0)
        return mean, error, 2.0 * student_t.sf(ratio, self.df)


def holm(p: Array, count: int) -> Array:
    """Holm's adjustment of ``p``, of shape (tests, ...), as part of ``count`` >= tests contrasts.

    The smallest p times count, the next times count - 1 and so on, none below the one before it
    and none above 1. Contrasts without a p count as if theirs were 1.
    """
    order = np.argsort(p, axis=0)
    factors = np.arange(count, count - len(p), -1.0).reshape(-1, *[1] * (p.ndim - 1))
    stepped = np.maximum.accumulate(np.take_along_axis(p, order, 0) * factors, axis=0)
    adjusted = np.empty_like(p)
    np.put_along_axis(adjusted, order, np.minimum(stepped, 1.0), 0)
    return adjusted


def _judged(pair: Pair, fit: AdditiveFit, row: list[float], count: int, level: float) -> Contrast:
    mean, error, p, holm_p = row
    n = len(fit.losses[pair[0]].keys() & fit.losses[pair[1]].keys())
    chance = (1.0 - level) / count
    half_width = float(student_t.isf(chance / 2.0, fit.df)) * error
    decided = holm_p <= 1.0 - level
    verdict = (LOWER if mean < 0.0 else HIGHER) if decided else WITHIN_NOISE
    needed = None if decided else _n_to_decide(mean, error * math.sqrt(n), fit, chance, n)
    low, high = mean - half_width, mean + half_width
    return Contrast(*pair, n, mean, error, p, holm_p, low, high, verdict, needed)


def _n_to_decide(
    mean: float, deviation: float, fit: AdditiveFit, chance: float, n: int
) -> int | None:
    """See `Contrast`; ``deviation`` is that of one seed's difference, ``n`` did not decide."""

    def decides(seeds: int) -> bool:
        quantile = student_t.isf(chance / 2.0, (len(fit.losses) - 1) * (seeds - 1))
        return bool(quantile * deviation / math.sqrt(seeds) < abs(mean))

    candidates = range(n + 1, MOST_SEEDS + 1)
    index = bisect_left(candidates, True, key=decides)
    return candidates[index] if index < len(candidates) else None


def _not_judged(pair: Pair, losses: Mapping[str, Mapping[int, float]]) -> Contrast:
    a, b = (losses[arm] for arm in pair)
    common = sorted(a.keys() & b.keys())
    mean, verdict = math.nan, NO_COMMON_SEED
    if common:
        diverged = not all(map(math.isfinite, [*a.values(), *b.values()]))
        verdict = DIVERGED if diverged else TOO_FEW_SEEDS
        mean = math.nan if diverged else math.fsum(a[s] - b[s] for s in common) / len(common)
    return Contrast(*pair, len(common), mean, None, None, None, None, None, verdict, None)


def _check_pairs(losses: Mapping[str, Mapping[int, float]], pairs: Sequence[Pair]) -> None:
    seen: set[frozenset[str]] = set()
    for arm, reference in pairs:
        for name in (arm, reference):
            if name not in losses:
                raise ValueError(f"no arm is called {name!r}; there are {', '.join(losses)}")
        if arm == reference:
            raise ValueError(f"{arm!r} cannot be compared with itself")
        if frozenset((arm, reference)) in seen:
            raise ValueError(f"{arm!r} and {reference!r} are compared twice")
        seen.add(frozenset((arm, reference)))
