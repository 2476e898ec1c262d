"""Speeds of arms that are measured in turn."""

import dataclasses
import json

import pytest
from train.micro import micro_recipe

from deep_delta.compare import speed
from deep_delta.compare.speed import measure_speed
from deep_delta.report.provenance import hardware
from deep_delta.train.loop import Loop

COST = {"additive": 1.0, "ddl-cc": 1.25, "ddl-scalar": 2.0}  # seconds a step, by the made-up clock


@pytest.fixture
def clock(monkeypatch):
    """A clock that only steps move on; `clock.late` are the numbers of steps that take twice."""

    class Clock:
        def __init__(self):
            self.now, self.steps, self.late, self.names = 0.0, 0, (), []

    clock = Clock()

    def step(loop):
        name = loop.recipe.variant
        clock.steps += 1
        clock.now += COST[name] * (2 if clock.steps in clock.late else 1)
        clock.names.append(name)

    monkeypatch.setattr(speed.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(Loop, "train_step", step)
    return clock


def arms(data, out, *names):
    return {name: micro_recipe(data, out, variant=name) for name in names}


def test_an_arm_is_as_fast_as_itself(micro_data, tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "STEADY", 10.0)  # the machine may be busy
    monkeypatch.setitem(speed.SECONDS, "cpu", 1.0)
    recipe = micro_recipe(micro_data, tmp_path / "out")
    found = measure_speed({"one": recipe, "other": recipe}, "one")
    assert 0.6 < found["arms"]["other"]["ratio"] < 1.7
    assert found["arms"]["other"]["low"] <= found["arms"]["other"]["ratio"]
    assert found["arms"]["other"]["high"] >= found["arms"]["other"]["ratio"]
    assert found["arms"]["one"]["ratio"] == 1.0
    assert found["hardware"] == hardware()
    assert not (tmp_path / "out").exists(), "no run folder is begun"


def test_a_slower_arm_has_a_ratio_below_one(micro_data, tmp_path, clock):
    found = measure_speed(arms(micro_data, tmp_path, *COST), "additive")
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found.keys() == {"hardware", "steady", "arms"}
    assert found["steady"] is True
    tokens = 4 * 16
    for name, entry in found["arms"].items():
        assert entry == pytest.approx({
            "tokens_per_s": tokens / COST[name],
            **dict.fromkeys(("ratio", "low", "high"), 1 / COST[name]),
        })  # fmt: skip
    # Two arms at a time, a round forwards and the next backwards; two steps of each before.
    a, b, c = COST
    assert clock.names == [
        a, a, b, b, a, b, b, a, a, b, b, a, a, b,
        c, c, a, c, c, a, a, c, c, a, a, c,
    ]  # fmt: skip


def test_one_late_round_of_five_is_left_out(micro_data, tmp_path, clock):
    clock.late = (8,)
    found = measure_speed(arms(micro_data, tmp_path, "additive", "ddl-cc"), "additive")
    assert found["steady"] is True
    entry = found["arms"]["ddl-cc"]
    assert (entry["ratio"], entry["high"]) == pytest.approx((0.8, 1.6))


def test_two_late_rounds_are_not_steady_and_give_no_ratio(micro_data, tmp_path, clock):
    clock.late = (8, 12)  # the baseline's steps in the second round and the fourth
    found = measure_speed(arms(micro_data, tmp_path, "additive", "ddl-cc"), "additive")
    assert found["steady"] is False
    assert [entry["ratio"] for entry in found["arms"].values()] == [None, None]
    entry = found["arms"]["ddl-cc"]
    assert (entry["low"], entry["high"]) == pytest.approx((0.8, 1.6))
    assert entry["tokens_per_s"] == pytest.approx(64 / 1.25), "the median does not mind"


def test_without_a_baseline_there_are_no_ratios(micro_data, tmp_path, clock):
    found = measure_speed(arms(micro_data, tmp_path, "additive", "ddl-cc"), None)
    assert found["steady"] is True
    for name, entry in found["arms"].items():
        assert entry == {"tokens_per_s": 64 / COST[name], "ratio": None, "low": None, "high": None}


def test_the_baseline_alone(micro_data, tmp_path, clock):
    found = measure_speed(arms(micro_data, tmp_path, "additive"), "additive")
    assert found["arms"] == {
        "additive": {"tokens_per_s": 64.0, "ratio": 1.0, "low": 1.0, "high": 1.0}
    }


def test_tokens_count_and_not_steps(micro_data, tmp_path, clock):
    recipes = arms(micro_data, tmp_path, "additive", "ddl-cc")
    recipes["ddl-cc"] = dataclasses.replace(recipes["ddl-cc"], batch_size=8)
    found = measure_speed(recipes, "additive")
    assert found["arms"]["ddl-cc"]["ratio"] == pytest.approx(2 / 1.25)


def test_not_under_torchrun(micro_data, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert measure_speed(arms(micro_data, tmp_path, "additive"), "additive") is None
