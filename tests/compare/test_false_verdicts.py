"""How often verdicts are false, and how often differences are found, in simulated studies.

Losses are arm + seed + residual. A seed's deviation is three times a residual's, so that whoever
forgot to pair, or to take seeds out of the variance, would find nothing.
"""

import numpy as np
import pytest

from deep_delta.compare.statistics import WITHIN_NOISE, AdditiveFit, holm, judge

ARMS, SEEDS = range(2, 13), range(3, 9)
STUDIES = 8000  # the standard error of a rate of 6 % is 0.27 %


def simulated(deviations, seeds, shifts=0.0, studies=STUDIES):
    """losses[arm][seed], each an array (studies,), for arms with these residual deviations."""
    rng = np.random.default_rng([len(deviations), seeds])
    noise = rng.standard_normal((len(deviations), seeds, studies))
    losses = 3.0 * rng.standard_normal((1, seeds, studies))
    losses = losses + np.reshape(deviations, (-1, 1, 1)) * noise + np.reshape(shifts, (-1, 1, 1))
    return {str(arm): dict(enumerate(by_seed)) for arm, by_seed in enumerate(losses)}


def decided(losses):
    """Whether each contrast with arm 0 is decided, shape (contrasts, studies)."""
    pairs = [(arm, "0") for arm in losses if arm != "0"]
    _, _, p = AdditiveFit(losses).tests(pairs)
    return holm(p, len(pairs)) <= 0.05


def false_verdicts(deviations, seeds):
    return decided(simulated(deviations, seeds)).any(0).mean()


def with_a_noisy_one(arms, noisy):
    return [2.0 if arm == noisy else 1.0 for arm in range(arms)]


@pytest.mark.parametrize(("arms", "seeds"), [(2, 3), (5, 3), (12, 3), (8, 5), (12, 8)])
def test_false_verdicts(arms, seeds):
    assert false_verdicts(np.ones(arms), seeds) <= 0.06
    for noisy in {0, 1, arms - 1}:  # 0 is the baseline
        assert false_verdicts(with_a_noisy_one(arms, noisy), seeds) <= 0.08


@pytest.mark.slow
@pytest.mark.parametrize("arms", ARMS)
def test_false_verdicts_everywhere(arms):
    for seeds in SEEDS:
        assert false_verdicts(np.ones(arms), seeds) <= 0.06
        for noisy in range(arms):
            rate = false_verdicts(with_a_noisy_one(arms, noisy), seeds)
            assert rate <= 0.08, (seeds, noisy)


def test_the_simulation_would_notice():
    """Verdicts without a correction, and the pooled variance alone, break the limits."""
    losses = simulated(np.ones(12), 3)
    pairs = [(arm, "0") for arm in losses if arm != "0"]
    _, _, p = AdditiveFit(losses).tests(pairs)
    assert (p <= 0.05).any(0).mean() > 0.15
    losses = simulated(with_a_noisy_one(12, 0), 8)
    fit = AdditiveFit(losses)
    fit.arm_variance = lambda arm: fit.variance
    _, _, p = fit.tests(pairs)
    assert (holm(p, len(pairs)) <= 0.05).any(0).mean() > 0.14


def test_false_verdicts_with_missing_cells():
    losses = simulated(np.ones(6), 6)
    for arm, seed in [("1", 0), ("1", 1), ("2", 5), ("0", 4), ("4", 0), ("5", 3)]:
        del losses[arm][seed]
    assert decided(losses).any(0).mean() <= 0.06


@pytest.mark.parametrize("arms", [2, 5, 12])
def test_three_deviations_are_mostly_found_with_five_seeds(arms):
    shifts = np.zeros(arms)
    shifts[1] = -3.0
    found = decided(simulated(np.ones(arms), 5, shifts))
    assert found[0].mean() >= 0.85


def test_studies_one_by_one_are_judged_alike():
    losses = simulated(with_a_noisy_one(4, 2), 4, shifts=[0, 2, 0, 4], studies=20)
    verdicts = decided(losses)
    assert 0 < verdicts.mean() < 1
    for study in range(20):
        one = {arm: {s: float(x[study]) for s, x in losses[arm].items()} for arm in losses}
        found = judge(one, [(arm, "0") for arm in ("1", "2", "3")]).contrasts
        assert [c.verdict != WITHIN_NOISE for c in found] == verdicts[:, study].tolist()
