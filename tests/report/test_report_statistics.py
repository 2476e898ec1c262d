import math

import pytest

from deep_delta.report.statistics import (
    DIVERGED,
    HIGHER,
    LOWER,
    NO_COMMON_SEED,
    TOO_FEW_SEEDS,
    WITHIN_NOISE,
    incomplete_beta,
    mean_and_spread,
    paired_difference,
    student_t_quantile,
)


@pytest.mark.parametrize(
    ("df", "expected"), [(1, 12.70620), (2, 4.30265), (4, 2.77645), (9, 2.26216), (30, 2.04227)]
)
def test_quantile_matches_the_printed_table(df: int, expected: float) -> None:
    assert student_t_quantile(0.975, df) == pytest.approx(expected, abs=1e-4)
    assert student_t_quantile(0.025, df) == pytest.approx(-expected, abs=1e-4)


def test_quantile_in_closed_form_and_in_the_limit() -> None:
    for p in (0.5, 0.6, 0.9, 0.999):
        assert student_t_quantile(p, 1) == pytest.approx(math.tan(math.pi * (p - 0.5)), abs=1e-8)
    assert student_t_quantile(0.975, 1e6) == pytest.approx(1.959966, abs=1e-5)


@pytest.mark.parametrize(("p", "df"), [(0.0, 3), (1.0, 3), (0.9, 0), (0.9, -1)])
def test_quantile_rejects_what_has_none(p: float, df: float) -> None:
    with pytest.raises(ValueError, match="need"):
        student_t_quantile(p, df)


def test_incomplete_beta_known_values() -> None:
    assert incomplete_beta(1.0, 1.0, 0.3) == pytest.approx(0.3)
    assert incomplete_beta(2.0, 3.0, 0.4) == pytest.approx(0.5248)
    assert incomplete_beta(2.0, 3.0, 0.0) == 0.0
    assert incomplete_beta(2.0, 3.0, 1.0) == 1.0


def test_mean_and_spread() -> None:
    assert mean_and_spread([2.0]) == (2.0, None)
    mean, spread = mean_and_spread([1.0, 2.0, 3.0, 4.0])
    assert mean == 2.5
    assert spread == pytest.approx(math.sqrt(5 / 3))
    diverged, none = mean_and_spread([1.0, math.inf])
    assert math.isnan(diverged)
    assert none is None
    with pytest.raises(ValueError, match="at least one"):
        mean_and_spread([])


def test_difference_by_hand() -> None:
    # Differences -0.1, -0.2, -0.3: mean -0.2, spread 0.1, half width 4.30265 * 0.1 / sqrt(3).
    a, b = {1: 2.9, 2: 2.8, 3: 2.7, 9: 0.0}, {1: 3.0, 2: 3.0, 3: 3.0, 8: 0.0}
    result = paired_difference(a, b)
    assert (result.n, result.verdict) == (3, WITHIN_NOISE)
    assert result.mean == pytest.approx(-0.2)
    assert result.low == pytest.approx(-0.2 - 0.248414, abs=1e-5)
    assert result.high == pytest.approx(-0.2 + 0.248414, abs=1e-5)
    narrower = paired_difference(a, b, level=0.8)
    assert narrower.verdict == LOWER
    assert paired_difference(b, a, level=0.8).verdict == HIGHER


def test_identical_differences_have_an_interval_of_no_width() -> None:
    result = paired_difference(dict.fromkeys(range(3), 2.5), dict.fromkeys(range(3), 3.0))
    assert (result.low, result.mean, result.high) == (-0.5, -0.5, -0.5)
    assert result.verdict == LOWER
    same = {0: 3.0, 1: 3.1, 2: 3.2}
    assert paired_difference(same, same).verdict == WITHIN_NOISE


@pytest.mark.parametrize("n", [1, 2])
def test_fewer_than_three_seeds_give_no_interval(n: int) -> None:
    result = paired_difference(dict.fromkeys(range(n), 1.0), dict.fromkeys(range(n), 2.0))
    assert (result.n, result.mean, result.low, result.high) == (n, -1.0, None, None)
    assert result.verdict == TOO_FEW_SEEDS


def test_no_common_seed_and_a_diverged_one() -> None:
    assert paired_difference({1: 1.0}, {2: 1.0}).verdict == NO_COMMON_SEED
    result = paired_difference(
        {s: math.nan if s else 1.0 for s in range(3)}, dict.fromkeys(range(3), 1.0)
    )
    assert result.verdict == DIVERGED
    assert math.isnan(result.mean)
    assert result.low is None
    with pytest.raises(ValueError, match="level"):
        paired_difference({1: 1.0}, {1: 1.0}, level=95)
