"""The choice of a rate, and an arm's loss read off the baseline's curve."""

import math

import pytest
from train.micro import user_error

from deep_delta.compare.costs import Cost, cost
from deep_delta.compare.rates import choose


def test_the_rate_with_the_lowest_mean_is_chosen():
    choice = choose("a", {4e-3: [3.0, 3.3], 1e-3: [3.2, 3.4], 2e-3: [3.1, 3.0]})
    assert (choice.rate, choice.edge, choice.runs) == (2e-3, None, 6)
    assert choice.tried == pytest.approx({1e-3: 3.3, 2e-3: 3.05, 4e-3: 3.15})


@pytest.mark.parametrize(("best", "edge"), [(1e-3, "lowest"), (4e-3, "highest"), (2e-3, None)])
def test_a_best_rate_on_the_edge_is_flagged(best, edge):
    rates = (1e-3, 2e-3, 4e-3)
    choice = choose("a", {rate: [2.0 if rate == best else 3.0] for rate in rates})
    assert (choice.rate, choice.edge) == (best, edge)


def test_rates_that_diverge_are_not_chosen_and_bound_what_was_tried():
    choice = choose("a", {1e-3: [3.2, 3.2], 2e-3: [3.1, 3.1], 4e-3: [2.9, math.nan]})
    assert (choice.rate, choice.edge) == (2e-3, None)
    assert "diverged at every rate" in user_error(choose, "a", {1e-3: [math.nan]})


CURVE = {10**6: 4.0, 10**7: 3.5, 10**8: 3.0}


def test_a_loss_is_read_as_tokens():
    found = cost("a", 3.25, 10**7, CURVE, flops_ratio=1.2, speed_ratio=0.8)
    needed = math.sqrt(10**15)  # half-way on a logarithmic axis
    assert found.baseline_tokens == pytest.approx(needed)
    assert found.flops == pytest.approx(1.2 * 10**7 / needed)
    assert found.seconds == pytest.approx(10**7 / needed / 0.8)
    assert cost("a", 3.25, 10**7, CURVE, 1.2, None).seconds is None


def test_the_baseline_itself_costs_what_it_costs():
    found = cost("a", 3.5, 10**7, CURVE, 1.0, 1.0)
    assert [found.flops, found.seconds] == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize(("loss", "beyond"), [(2.9, "below"), (4.1, "above")])
def test_beyond_the_curve_there_is_no_number(loss, beyond):
    assert cost("a", loss, 10**7, CURVE, 1.0, 1.0) == Cost("a", 10**7, None, beyond, None, None)


def test_a_curve_that_rises_by_noise_is_flat_there():
    found = cost("a", 3.25, 10**7, {**CURVE, 2 * 10**7: 3.51}, 1.0, 1.0)
    assert 2 * 10**7 < found.baseline_tokens < 10**8
