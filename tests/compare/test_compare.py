"""Comparisons from end to end, with models that train in a blink."""

import dataclasses
import importlib
import json
import math
import signal
import statistics

import numpy as np
import pytest
from train.micro import losses, micro_recipe, user_error

from deep_delta.compare import compare
from deep_delta.compare.run import made_with
from deep_delta.compare.summary import summarise
from deep_delta.report.provenance import hardware
from deep_delta.train import Interrupted, Recipe, read_result

VARIANTS, SEEDS = ["additive", "ddl-cc", "ddl-scalar"], [0, 1, 2]
T_4 = 3.495406  # Student's t for 97.5 % with four degrees of freedom
compare_module = importlib.import_module("deep_delta.compare.run")


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def out(micro_data, tmp_path_factory):
    return tmp_path_factory.mktemp("compare")


@pytest.fixture(scope="module")
def finished(micro_data, out):
    """The summary of three variants and three seeds."""
    return compare(micro_recipe(micro_data, out), VARIANTS, SEEDS, "ddl compare --test")


@pytest.fixture
def trained(monkeypatch):
    """The (variant, seed) of every call of train; `trained.stop_at` interrupts that call."""

    class Calls(list):
        stop_at = None

    calls = Calls()
    train = compare_module.train

    def recorded(recipe):
        calls.append((recipe.variant, recipe.seed))
        if len(calls) == calls.stop_at:
            raise Interrupted(signal.SIGINT)
        return train(recipe)

    monkeypatch.setattr(compare_module, "train", recorded)
    return calls


def test_files(finished, out):
    assert read(out / "summary.json") == finished
    assert {path.name for path in out.iterdir()} == {
        "additive", "ddl-cc", "ddl-scalar", "summary.json", "report.html",
        "loss-vs-tokens.png", "loss-vs-time.png", "differences.png",
        "loss-vs-tokens.svg", "loss-vs-time.svg", "differences.svg",
    }  # fmt: skip
    for path in out.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    page = (out / "report.html").read_text(encoding="utf-8")
    assert all(f">{variant}<" in page for variant in VARIANTS)
    assert "ddl compare --test" in page
    assert "http" not in page.replace("http://www.w3.org/", "")  # nothing is loaded from outside


def test_summary_says_how_it_was_run(finished, micro_data):
    recipe = finished["recipe"]
    assert (finished["schema"], finished["baseline"], finished["level"]) == (2, "additive", 0.95)
    assert finished["command"] == "ddl compare --test"
    assert recipe["data"] == str(micro_data)
    assert recipe["model"]["hidden_size"] == 16
    assert not {"variant", "seed", "out", "resume"} & recipe.keys()
    assert recipe.keys() | {"variant", "seed", "out", "resume"} == vars(Recipe()).keys()
    assert {"python", "torch", "transformers", "deep-delta-learning"} <= finished["versions"].keys()
    assert {"hardware", "commit", "variants", "runs"} <= finished.keys()


def test_runs_are_said_to_be_of_two_machines(finished, out):
    own = read_result(out / "additive" / "seed-0")
    assert finished["hardware"] == own.hardware == hardware()
    assert finished["versions"] == own.versions
    here = dataclasses.replace(own, hardware="A", commit="1", versions={"torch": "2"})
    there = dataclasses.replace(here, hardware="B", versions={"torch": "3", "triton": "4"})
    assert made_with([here, there, here]) == {
        "commit": "1",
        "hardware": "A; B: speeds and memory may not compare",
        "versions": {"torch": "2; 3", "triton": "none; 4"},
    }
    older = dataclasses.replace(here, hardware=None, commit=None, versions=None)
    assert made_with([older]) == {"commit": "unknown", "hardware": "unknown", "versions": {}}


def test_a_loss_beyond_all_perplexities_has_none(out, finished):
    own = read_result(out / "additive" / "seed-0")
    run = dataclasses.replace(own, val_loss=1000.0)
    summary = summarise([run], {("additive", 0): out / "additive" / "seed-0"}, out, "additive", {})
    assert summary["variants"][0]["perplexity"] is None
    assert summary["variants"][0]["val_loss"]["mean"] == 1000.0


def test_runs_are_those_of_their_folders(finished, out):
    pairs = [(run["variant"], run["seed"]) for run in finished["runs"]]
    assert pairs == [(variant, seed) for seed in SEEDS for variant in VARIANTS]
    for run in finished["runs"]:
        result = read(out / run["path"] / "result.json")
        assert {key: run[key] for key in run.keys() & result.keys()} == {
            key: result[key] for key in run.keys() & result.keys()
        }
        assert (result["variant"], result["seed"]) == (run["variant"], run["seed"])


def test_means_and_contrasts_by_hand(finished, out):
    by_seed = {
        variant: [read(out / variant / f"seed-{seed}" / "result.json") for seed in SEEDS]
        for variant in VARIANTS
    }
    assert [entry["variant"] for entry in finished["variants"]] == VARIANTS
    for entry in finished["variants"]:
        results = by_seed[entry["variant"]]
        ends = [result["val_loss"] for result in results]
        assert entry["val_loss"]["n"] == 3
        assert entry["val_loss"]["mean"] == pytest.approx(statistics.mean(ends))
        assert entry["val_loss"]["spread"] == pytest.approx(statistics.stdev(ends))
        assert entry["perplexity"] == pytest.approx(math.exp(statistics.mean(ends)))
        speeds = [result["tokens_per_s"] for result in results]
        assert entry["tokens_per_s"] == pytest.approx(statistics.mean(speeds))
        peaks = [result["peak_memory_bytes"] for result in results]
        assert entry["peak_memory_bytes"] == statistics.median(peaks)
        assert {entry["parameters"]} == {result["parameters"] for result in results}
        assert {entry["flops_per_token"]} == {result["flops_per_token"] for result in results}
    losses = np.array([[result["val_loss"] for result in by_seed[name]] for name in VARIANTS])
    residuals = losses - losses.mean(0) - losses.mean(1, keepdims=True) + losses.mean()
    pooled, own = (residuals**2).sum() / 4, (residuals**2).sum(1) / (4 / 3)
    assert finished["residual"]["degrees_of_freedom"] == 4
    assert finished["residual"]["deviation"] == pytest.approx(math.sqrt(pooled))
    pairs = [(contrast["arm"], contrast["reference"]) for contrast in finished["contrasts"]]
    assert pairs == [("ddl-cc", "additive"), ("ddl-scalar", "additive")]
    for contrast, of, own_one in zip(finished["contrasts"], losses[1:], own[1:], strict=True):
        mean = (of - losses[0]).mean()
        error = math.sqrt((max(pooled, own[0]) + max(pooled, own_one)) / 3)
        assert contrast["n"] == 3
        keys = ("mean", "standard_error", "bonferroni_low", "bonferroni_high")
        expected = [mean, error, mean - T_4 * error, mean + T_4 * error]
        assert [contrast[key] for key in keys] == pytest.approx(expected, rel=1e-5)
        decided = contrast["holm_p"] <= 0.05
        side = "lower" if mean < 0 else "higher"
        assert contrast["verdict"] == (side if decided else "within noise")


def test_a_second_call_trains_nothing_and_prints_the_table(finished, micro_data, out, capsys):
    before = {path: path.stat().st_mtime_ns for path in out.rglob("result.json")}
    assert len(before) == 9
    again = compare(micro_recipe(micro_data, out, log_every=2), VARIANTS, SEEDS, "again")
    assert {path: path.stat().st_mtime_ns for path in out.rglob("result.json")} == before
    assert again["runs"] == finished["runs"]
    printed = [line.strip() for line in capsys.readouterr().out.splitlines()]
    for entry in finished["variants"]:
        (row,) = [line for line in printed if line.startswith(f"{entry['variant']} ")]
        assert f"{entry['val_loss']['mean']:.4f}" in row
    for variant in VARIANTS[1:]:
        sentences = [line for line in printed if line.startswith(f"{variant}: ")]
        assert len(sentences) == 1, "each conclusion is said once"
        assert "additive" in sentences[0]
    assert f"report: {out / 'report.html'}" in printed


def test_an_interrupted_comparison_goes_on_with_what_is_missing(
    micro_data, tmp_path, trained, out, finished
):
    recipe = micro_recipe(micro_data, tmp_path)
    trained.stop_at = 3
    with pytest.raises(Interrupted):
        compare(recipe, VARIANTS, SEEDS[:2], "ddl compare")
    # Seeds are the outer loop: what is there is paired.
    assert trained == [("additive", 0), ("ddl-cc", 0), ("ddl-scalar", 0)]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")}
    assert len(before) == 2
    assert not (tmp_path / "summary.json").exists()
    trained.stop_at = None
    compare(recipe, VARIANTS, SEEDS[:2], "ddl compare")
    assert {path: path.stat().st_mtime_ns for path in before} == before
    for variant in VARIANTS:
        for seed in SEEDS[:2]:
            folder = f"{variant}/seed-{seed}"
            assert losses(tmp_path / folder) == losses(out / folder)


def test_a_run_that_diverges_does_not_stop_the_others(micro_data, tmp_path, capsys):
    recipe = micro_recipe(micro_data, tmp_path, lr=1e30, clip=1e30, warmup_steps=0)
    for _ in range(2):  # the second time from what is there
        summary = compare(recipe, VARIANTS[:2], [0], "ddl compare")
        assert "diverged" in capsys.readouterr().out
        assert summary["variants"][0]["perplexity"] is summary["contrasts"][0]["mean"] is None
        assert summary["residual"] == {"deviation": None, "degrees_of_freedom": 0}
    assert len(list(tmp_path.rglob("result.json"))) == 2


# The runs of the following tests are there; only their reports are new.
def test_two_seeds_give_no_interval_and_no_verdict(finished, micro_data, out, capsys):
    summary = compare(micro_recipe(micro_data, out), VARIANTS[:2], [0, 1], "two seeds")
    (contrast,) = summary["contrasts"]
    ends = (contrast["bonferroni_low"], contrast["bonferroni_high"])
    assert (contrast["n"], *ends) == (2, None, None)
    assert contrast["verdict"] not in ("lower", "higher", "within noise")
    assert "only two seeds: no interval, no verdict" in capsys.readouterr().out


def test_without_the_baseline_there_are_no_differences(finished, micro_data, out, capsys):
    summary = compare(micro_recipe(micro_data, out), ["ddl-scalar", "ddl-cc"], SEEDS, "no baseline")
    assert summary["baseline"] is None
    assert summary["contrasts"] == []
    assert "the baseline was not run" in capsys.readouterr().out


def test_the_baseline_alone_works(finished, micro_data, out):
    summary = compare(micro_recipe(micro_data, out), ["additive"], [0], "alone")
    assert (summary["baseline"], len(summary["runs"])) == ("additive", 1)
    assert summary["variants"][0]["val_loss"]["spread"] is None


@pytest.mark.parametrize(
    ("variants", "seeds", "expected"),
    [
        (["additive", "dll-cc"], [0], "did you mean 'ddl-cc'"),
        (["additive", "additive"], [0], "variants has repeats"),
        (["additive"], [0, 1, 0], "seeds has repeats"),
        ([], [0], "at least one variant"),
        (["additive"], [], "one seed"),
    ],
)
def test_bad_choices_are_refused_before_training(
    micro_data, tmp_path, trained, variants, seeds, expected
):
    recipe = micro_recipe(micro_data, tmp_path / "out")
    assert expected in user_error(compare, recipe, variants, seeds, "ddl compare")
    assert trained == []
    assert not (tmp_path / "out").exists()


def test_another_recipe_in_the_same_folder_is_refused(finished, micro_data, out):
    recipe = micro_recipe(micro_data, out, steps=7)
    assert "steps: 6 -> 7" in user_error(compare, recipe, VARIANTS, SEEDS, "ddl compare")
