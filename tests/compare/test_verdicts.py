"""Verdicts on contrasts against hand-made formulas, worked examples and missing cells."""

import dataclasses
import math

import numpy as np
import pytest
from scipy.stats import t as student_t

from deep_delta.compare.statistics import (
    DIVERGED,
    HIGHER,
    LOWER,
    MOST_SEEDS,
    NO_COMMON_SEED,
    TOO_FEW_SEEDS,
    WITHIN_NOISE,
    holm,
    judge,
    mean_and_spread,
)


def study(rows, first_seed=0):
    """losses[arm][seed] from an array (arms, seeds); the arms are called a, b, c, ..."""
    return {
        "abcdefghijkl"[i]: {first_seed + s: float(loss) for s, loss in enumerate(row)}
        for i, row in enumerate(rows)
    }


def some_rows(arms, seeds, seed=0):
    rng = np.random.default_rng(seed)
    return 3 + 0.3 * rng.standard_normal(seeds) + 0.1 * rng.standard_normal((arms, seeds))


def against(reference, losses):
    return [(arm, reference) for arm in losses if arm != reference]


def least_squares(losses):
    """Residuals by cell of loss ~ arm + seed, and their degrees of freedom, by numpy's lstsq."""
    cells = [(arm, seed) for arm in losses for seed in losses[arm]]
    arms, seeds = list(losses), sorted({seed for _, seed in cells})
    design = np.zeros((len(cells), len(arms) + len(seeds)))
    for row, (arm, seed) in enumerate(cells):
        design[row, arms.index(arm)] = design[row, len(arms) + seeds.index(seed)] = 1
    values = np.array([losses[arm][seed] for arm, seed in cells])
    solution, _, rank, _ = np.linalg.lstsq(design, values, rcond=None)
    residuals = values - design @ solution
    return dict(zip(cells, residuals, strict=True)), len(cells) - rank


def test_mean_and_spread():
    assert mean_and_spread([2.0]) == (2.0, None)
    mean, spread = mean_and_spread([1.0, 2.0, 3.0, 4.0])
    assert mean == 2.5
    assert spread == pytest.approx(math.sqrt(5 / 3))
    diverged, none = mean_and_spread([1.0, math.inf])
    assert math.isnan(diverged)
    assert none is None
    with pytest.raises(ValueError, match="at least one"):
        mean_and_spread([])


def test_two_arms_are_a_paired_t_test():
    # Differences -0.1, -0.2, -0.3: mean -0.2, spread 0.1, half width 4.30265 * 0.1 / sqrt(3).
    a, b = {1: 2.9, 2: 2.8, 3: 2.7}, {1: 3.0, 2: 3.0, 3: 3.0}
    result = judge({"a": a, "b": b}, [("a", "b")])
    (found,) = result.contrasts
    assert (found.arm, found.reference, found.n) == ("a", "b", 3)
    assert found.verdict == WITHIN_NOISE
    assert found.mean == pytest.approx(-0.2)
    assert found.standard_error == pytest.approx(0.1 / math.sqrt(3))
    assert found.bonferroni_low == pytest.approx(-0.2 - 0.248414, abs=1e-5)
    assert found.bonferroni_high == pytest.approx(-0.2 + 0.248414, abs=1e-5)
    # t = 2 sqrt(3) with two degrees of freedom, for which P(|T| > t) = 1 - t / sqrt(2 + t^2).
    assert found.p == found.holm_p == pytest.approx(1 - math.sqrt(12 / 14))
    assert result.degrees_of_freedom == 2
    # A difference's variance is that of two residuals.
    assert result.residual_deviation == pytest.approx(0.1 / math.sqrt(2))
    assert judge({"a": a, "b": b}, [("a", "b")], level=0.9).contrasts[0].verdict == LOWER
    assert judge({"a": a, "b": b}, [("b", "a")], level=0.9).contrasts[0].verdict == HIGHER


@pytest.mark.parametrize(("arms", "seeds"), [(2, 3), (3, 4), (5, 3), (12, 8)])
def test_all_cells_there_is_a_two_way_analysis_of_variance(arms, seeds):
    rows = some_rows(arms, seeds)
    losses = study(rows)
    result = judge(losses, against("a", losses))
    residuals = rows - rows.mean(0) - rows.mean(1, keepdims=True) + rows.mean()
    df = (arms - 1) * (seeds - 1)
    pooled = (residuals**2).sum() / df
    own = (residuals**2).sum(1) / (df / arms)  # an arm's share of the degrees of freedom
    assert result.degrees_of_freedom == df
    assert result.residual_deviation == pytest.approx(math.sqrt(pooled))
    for i, found in enumerate(result.contrasts, start=1):
        variance = max(pooled, own[0]) + max(pooled, own[i])
        mean, error = (rows[i] - rows[0]).mean(), math.sqrt(variance / seeds)
        assert (found.mean, found.standard_error) == pytest.approx((mean, error))
        assert found.p == pytest.approx(2 * student_t.cdf(-abs(mean) / error, df))
        half = student_t.ppf(1 - 0.025 / (arms - 1), df) * error
        assert found.bonferroni_low == pytest.approx(mean - half)
        assert found.bonferroni_high == pytest.approx(mean + half)


def test_missing_cells_are_fitted_by_least_squares():
    losses = study(some_rows(4, 6))
    del losses["b"][0], losses["c"][5], losses["c"][4]
    losses["d"][9] = 7.0  # a seed of one arm alone says nothing about residuals
    result = judge(losses, [("b", "a"), ("d", "c"), ("b", "c")])
    residuals, df = least_squares(losses)
    assert df == 4 * 6 - 3 + 1 - (4 + 7 - 1)
    pooled = sum(residual**2 for residual in residuals.values()) / df
    assert result.degrees_of_freedom == df
    assert result.residual_deviation == pytest.approx(math.sqrt(pooled))
    variance = {}
    for arm in losses:
        # What is left of a 1 in one cell is the share of the residuals' variance found there.
        share = 0.0
        for seed in losses[arm]:
            one = {of: {s: float((of, s) == (arm, seed)) for s in losses[of]} for of in losses}
            share += least_squares(one)[0][arm, seed]
        own = sum(residual**2 for (of, _), residual in residuals.items() if of == arm) / share
        variance[arm] = max(pooled, own)
    assert len(set(variance.values())) > 1
    assert [found.n for found in result.contrasts] == [5, 4, 3]
    for found in result.contrasts:
        a, b = losses[found.arm], losses[found.reference]
        assert found.mean == pytest.approx(np.mean([a[seed] - b[seed] for seed in a if seed in b]))
        both = variance[found.arm] + variance[found.reference]
        assert found.standard_error == pytest.approx(math.sqrt(both / found.n))


def test_a_noisy_arm_is_judged_by_its_own_residuals_and_spares_the_others():
    losses = study([[3.0, 3.0, 3.0], [3.1, 3.1, 3.1], [3.0, 3.2, 2.8], [3.2, 3.2, 3.2]])
    quiet, noisy, _ = judge(losses, against("a", losses)).contrasts
    pooled = 0.75 * 0.08 / 6  # of the noisy arm's squares, (1 - 1/4) is in the residuals
    assert quiet.standard_error == pytest.approx(math.sqrt(2 * pooled / 3))
    # 9/16 of 0.08 are in its own residuals, which have 6/4 degrees of freedom.
    assert noisy.standard_error == pytest.approx(math.sqrt((pooled + 0.045 / 1.5) / 3))


def test_holm_by_hand():
    p = np.array([0.01, 0.04, 0.03, 0.005])
    # Sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1; the last may not fall below 0.06.
    assert holm(p, 4) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm(p, 5) == pytest.approx([0.04, 0.09, 0.09, 0.025])
    assert holm(np.array([0.5, 0.6]), 2) == pytest.approx([1.0, 1.0])
    assert holm(np.empty(0), 3).shape == (0,)
    columns = np.stack([p, p[::-1]], axis=1)
    assert holm(columns, 4)[:, 1] == pytest.approx([0.02, 0.06, 0.06, 0.03])


def test_holm_decides_what_bonferroni_leaves_open():
    # Noise that arms and seeds do not explain: c is clear, after which b pays for itself alone.
    noise = np.array([[1, -1, 1, -1], [1, -1, -1, 1], [-2, 2, 0, 0]]) / 10
    losses = study(noise + np.array([[3.0], [3.33], [2.0]]))
    b, c = judge(losses, against("a", losses)).contrasts
    assert c.holm_p == pytest.approx(2 * c.p)
    assert b.holm_p == pytest.approx(b.p)
    assert (b.verdict, c.verdict) == (HIGHER, LOWER)
    assert b.p < 0.05 < 2 * b.p
    assert b.bonferroni_low < 0 < b.bonferroni_high
    assert b.n_to_decide is None


@pytest.mark.parametrize(("arms", "difference"), [(2, 0.2), (2, 0.02), (5, 0.07), (12, 0.1)])
def test_n_to_decide_is_the_fewest_seeds_that_do(arms, difference):
    rows = np.full((arms, 3), 3.0)
    rows[1] = [3.0 + difference + step for step in (0.1, 0.0, -0.1)]
    losses = study(rows)
    found = judge(losses, against("a", losses)).contrasts[0]
    assert found.verdict == WITHIN_NOISE
    deviation = found.standard_error * math.sqrt(3)

    def half_width(n):
        quantile = student_t.ppf(1 - 0.025 / (arms - 1), (arms - 1) * (n - 1))
        return quantile * deviation / math.sqrt(n)

    n = found.n_to_decide
    assert n > 3
    assert half_width(n) < difference <= half_width(n - 1)


def test_no_number_of_seeds_decides_next_to_nothing():
    a = {0: 3.0, 1: 3.1, 2: 3.2}
    assert judge({"a": a, "b": a}, [("a", "b")]).contrasts[0].n_to_decide is None
    b = {0: 3.1, 1: 3.0, 2: 3.2 + 1e-4}
    found = judge({"a": a, "b": b}, [("a", "b")]).contrasts[0]
    assert found.mean != 0.0
    assert found.n_to_decide is None
    # Even half as many standard errors as a verdict takes need more seeds.
    assert 3 * (found.standard_error / found.mean) ** 2 > MOST_SEEDS


def test_losses_that_do_not_scatter():
    losses = study([[3.0] * 3, [2.5] * 3, [3.0] * 3])
    lower, same = judge(losses, against("a", losses)).contrasts
    assert lower.verdict == LOWER
    assert (lower.bonferroni_low, lower.bonferroni_high) == pytest.approx((-0.5, -0.5))
    assert (same.verdict, same.p, same.mean) == (WITHIN_NOISE, 1.0, 0.0)


@pytest.mark.parametrize("n", [1, 2])
def test_fewer_than_three_seeds_give_no_interval(n):
    losses = study([[2.0] * n, [1.0] * n, [1.5] * n])
    for found in judge(losses, against("a", losses)).contrasts:
        assert (found.n, found.verdict) == (n, TOO_FEW_SEEDS)
        assert found.mean in (-1.0, -0.5)
        assert {found.standard_error, found.p, found.holm_p, found.n_to_decide} == {None}
        assert (found.bonferroni_low, found.bonferroni_high) == (None, None)


def test_a_diverged_arm_has_no_verdict_and_no_part_in_the_others():
    losses = study(some_rows(4, 4))
    steady = {arm: losses[arm] for arm in "abc"}
    losses["d"] = {0: 9.0, 1: math.nan, 2: 3.0, 3: 1.0}
    with_it = judge(losses, against("a", losses))
    diverged = with_it.contrasts[-1]
    assert (diverged.arm, diverged.n, diverged.verdict) == ("d", 4, DIVERGED)
    assert math.isnan(diverged.mean)
    assert diverged.standard_error is diverged.holm_p is diverged.bonferroni_low is None
    without = judge(steady, against("a", steady))
    assert with_it.residual_deviation == without.residual_deviation
    for one, other in zip(with_it.contrasts, without.contrasts, strict=False):
        assert (one.p, one.standard_error) == (other.p, other.standard_error)
        # It was asked for, and counts for the corrections.
        assert one.bonferroni_high - one.mean > other.bonferroni_high - other.mean
        assert one.holm_p > other.holm_p
    everything = judge({"a": {0: math.nan}, "b": {0: math.inf}}, [("b", "a")])
    assert (everything.residual_deviation, everything.degrees_of_freedom) == (None, 0)
    assert everything.contrasts[0].verdict == DIVERGED


def test_no_seed_in_common():
    losses = {"a": {1: 1.0}, "b": {2: 1.0}}
    (found,) = judge(losses, [("b", "a")]).contrasts
    assert (found.n, found.verdict) == (0, NO_COMMON_SEED)
    assert math.isnan(found.mean)


def test_declared_pairs_keep_their_order_and_direction():
    losses = study(some_rows(3, 4))
    forth, back = judge(losses, [("c", "b"), ("a", "c")]).contrasts
    assert (forth.arm, forth.reference, back.arm, back.reference) == ("c", "b", "a", "c")
    (turned,) = judge(losses, [("b", "c")]).contrasts
    assert (turned.mean, turned.p) == pytest.approx((-forth.mean, forth.p))
    assert judge(losses, []).contrasts == []


@pytest.mark.parametrize(
    ("pairs", "level", "expected"),
    [
        ([("a", "b")], 95, "level"),
        ([("a", "x")], 0.95, "no arm is called 'x'"),
        ([("a", "a")], 0.95, "with itself"),
        ([("a", "b"), ("b", "a")], 0.95, "twice"),
    ],
)
def test_what_cannot_be_judged_is_refused(pairs, level, expected):
    with pytest.raises(ValueError, match=expected):
        judge(study([[1.0], [2.0]]), pairs, level)


def test_a_contrast_has_only_what_json_can_hold():
    losses = study(some_rows(3, 3))
    for found in judge(losses, against("a", losses)).contrasts:
        kinds = {type(value) for value in dataclasses.astuple(found)}
        assert kinds <= {str, int, float, type(None)}
