"""Comparisons from end to end, with models that train in a blink."""

import csv
import dataclasses
import importlib
import json
import math
import signal
import statistics

import numpy as np
import pytest
import torch
from train.micro import losses, micro_recipe, some_text, user_error
from transformers import AutoModelForCausalLM

from deep_delta.compare import compare as compare_arms
from deep_delta.compare import machines as machines_module
from deep_delta.compare import make_study
from deep_delta.compare.run import made_with
from deep_delta.data import PackedSequences, TokenShards, prepare
from deep_delta.report.provenance import hardware
from deep_delta.train import Interrupted, Recipe, read_result

VARIANTS, SEEDS = ["additive", "ddl-cc", "ddl-scalar"], [0, 1, 2]
T_4 = 3.495406  # Student's t for 97.5 % with four degrees of freedom
compare_module = importlib.import_module("deep_delta.compare.run")


def compare(recipe, arms, seeds, command="ddl compare", **given):
    return compare_arms(make_study(recipe, {"arms": arms, "seeds": seeds, **given}), command)


@pytest.fixture(scope="module", autouse=True)
def no_benchmark():
    """Of speed.py's own tests; here it would only take time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare_module, "measure_speed", lambda recipes, baseline: None)
        yield


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
    """The (name, seed) of every call of train; `trained.stop_at` interrupts that call."""

    class Calls(list):
        stop_at = None

    calls = Calls()
    train = machines_module.train

    def recorded(recipe):
        calls.append((recipe.label, recipe.seed))
        if len(calls) == calls.stop_at:
            raise Interrupted(signal.SIGINT)
        return train(recipe)

    monkeypatch.setattr(machines_module, "train", recorded)
    return calls


def test_files(finished, out):
    assert read(out / "summary.json") == finished
    assert {path.name for path in out.iterdir()} == {
        "additive", "ddl-cc", "ddl-scalar", "summary.json", "runs.csv", "report.html",
        "loss-vs-tokens.png", "loss-vs-flops.png", "loss-vs-time.png", "differences.png",
        "loss-vs-tokens.svg", "loss-vs-flops.svg", "loss-vs-time.svg", "differences.svg",
    }  # fmt: skip
    for path in out.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    page = (out / "report.html").read_text(encoding="utf-8")
    assert all(f">{variant}<" in page for variant in VARIANTS)
    assert "ddl compare --test" in page
    assert "http" not in page.replace("http://www.w3.org/", "")  # nothing is loaded from outside


def test_summary_says_how_it_was_run(finished, micro_data):
    recipe = finished["recipe"]
    assert (finished["schema"], finished["baseline"], finished["level"]) == (3, "additive", 0.95)
    assert finished["command"] == "ddl compare --test"
    assert recipe["data"] == str(micro_data)
    assert recipe["model"]["hidden_size"] == 16
    decided = {"variant", "seed", "out", "name", "resume"}
    assert not decided & recipe.keys()
    assert recipe.keys() | decided == vars(Recipe()).keys()
    assert {"python", "torch", "transformers", "deep-delta-learning"} <= finished["versions"].keys()
    assert {"hardware", "commit", "arms", "runs"} <= finished.keys()


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


def test_a_loss_beyond_all_perplexities_has_none(micro_data, tmp_path, monkeypatch):
    train = machines_module.train
    monkeypatch.setattr(
        machines_module, "train", lambda r: dataclasses.replace(train(r), val_loss=1000.0)
    )
    summary = compare(micro_recipe(micro_data, tmp_path), ["additive"], [0])
    assert summary["arms"][0]["perplexity"] is None
    assert summary["arms"][0]["val_loss"]["mean"] == 1000.0


def test_runs_are_those_of_their_folders(finished, out):
    pairs = [(run["arm"], run["seed"]) for run in finished["runs"]]
    assert pairs == [(variant, seed) for seed in SEEDS for variant in VARIANTS]
    for run in finished["runs"]:
        result = read(out / run["path"] / "result.json")
        assert {key: run[key] for key in run.keys() & result.keys()} == {
            key: result[key] for key in run.keys() & result.keys()
        }
        assert (result["variant"], result["seed"]) == (run["arm"], run["seed"])
        assert run["flops"] == result["tokens"] * result["flops_per_token"]
    with (out / "runs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["arm"], int(row["seed"])) for row in rows] == pairs
    for row, run in zip(rows, finished["runs"], strict=True):
        assert row["variant"] == run["arm"]
        assert {name: row[name] for name in run} == {
            name: "" if value is None else str(value) for name, value in run.items()
        }


def test_means_and_contrasts_by_hand(finished, out):
    by_seed = {
        variant: [read(out / variant / f"seed-{seed}" / "result.json") for seed in SEEDS]
        for variant in VARIANTS
    }
    assert [entry["arm"] for entry in finished["arms"]] == VARIANTS
    for entry in finished["arms"]:
        results = by_seed[entry["arm"]]
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
    for entry in finished["arms"]:
        (row,) = [line for line in printed if line.startswith(f"{entry['arm']} ")]
        assert f"{entry['val_loss']['mean']:.4f}" in row
    for variant in VARIANTS[1:]:
        sentences = [line for line in printed if line.startswith(f"{variant}: ")]
        assert len(sentences) == 1, "each conclusion is said once"
        assert "additive" in sentences[0]
    assert f"report: {out / 'report.html'}" in printed


@pytest.mark.slow
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
        assert summary["arms"][0]["perplexity"] is summary["contrasts"][0]["mean"] is None
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
    assert "nothing was run to compare it with" in capsys.readouterr().out


def test_the_baseline_alone_works(finished, micro_data, out):
    summary = compare(micro_recipe(micro_data, out), ["additive"], [0], "alone")
    assert (summary["baseline"], len(summary["runs"])) == ("additive", 1)
    assert summary["arms"][0]["val_loss"]["spread"] is None


@pytest.mark.parametrize(
    ("arms", "seeds", "expected"),
    [
        (["additive", "dll-cc"], [0], "did you mean 'ddl-cc'"),
        (["additive", "additive"], [0], "arms has repeats"),
        (["additive"], [0, 1, 0], "seeds has repeats"),
        ([], [0], "at least one arm"),
        (["additive"], [], "one seed"),
    ],
)
def test_bad_choices_are_refused_before_training(
    micro_data, tmp_path, trained, arms, seeds, expected
):
    recipe = micro_recipe(micro_data, tmp_path / "out")
    assert expected in user_error(compare, recipe, arms, seeds)
    assert trained == []
    assert not (tmp_path / "out").exists()


def test_another_recipe_in_the_same_folder_is_refused(finished, micro_data, out):
    recipe = micro_recipe(micro_data, out, steps=7)
    assert "steps: 6 -> 7" in user_error(compare, recipe, VARIANTS, SEEDS, "ddl compare")


@pytest.fixture(scope="module")
def searched(micro_data, tmp_path_factory):
    """A summary with rates, budgets and test text, and its folder."""
    folder = tmp_path_factory.mktemp("searched")
    lines = [json.dumps({"text": some_text(10 + seed % 30, seed)}) for seed in range(120)]
    source = folder / "documents.jsonl"
    source.write_text("\n".join(lines) + "\n", encoding="utf-8")
    prepare([str(source)], folder / "data", val_fraction=0.2, test_fraction=0.2)
    recipe = micro_recipe(folder / "data", folder / "out")
    arms = ["additive", "one gate = ddl-cc gate=layer", "given = ddl-scalar lr=2e-3"]
    arms.append("lost = ddl-scalar lr=1e30")
    given = {"lr": "1e-3,4e-3,1e30", "rate_seeds": "7,8", "budgets": "128,256,384"}
    return compare(recipe, arms, [0, 1, 2], **given), folder / "out"


@pytest.mark.slow
def test_every_arm_is_reported_at_its_own_best_rate(searched):
    summary, _ = searched
    chosen = {
        entry["arm"]: (entry["lr"], entry["edge"], entry["tries"]) for entry in summary["arms"]
    }
    assert chosen["given"] == (2e-3, None, 0)
    for arm in ("additive", "one gate"):
        tried = {row["lr"]: row for row in summary["rates"] if row["arm"] == arm}
        assert list(tried) == [1e-3, 4e-3, 1e30]
        losses = {
            rate: [
                run["val_loss"]
                for run in summary["runs"]
                if (run["arm"], run["purpose"], run["lr"]) == (arm, "rate", rate)
            ]
            for rate in tried
        }
        assert tried[1e30]["val_loss"] is None
        for rate in (1e-3, 4e-3):
            assert tried[rate]["val_loss"] == pytest.approx(statistics.mean(losses[rate]))
            assert tried[rate]["n"] == len(losses[rate]) == 2
        best = min((1e-3, 4e-3), key=lambda rate: tried[rate]["val_loss"])
        assert [rate for rate, row in tried.items() if row["chosen"]] == [best]
        # A rate beyond which training diverges is no edge.
        assert chosen[arm] == (best, "lowest" if best == 1e-3 else None, 6)
    for run in summary["runs"]:
        assert run["seed"] in ([7, 8] if run["purpose"] == "rate" else [0, 1, 2])
        if run["purpose"] == "reported":
            assert run["lr"] == chosen[run["arm"]][0]


@pytest.mark.slow
def test_what_is_judged_is_the_test_text(searched):
    summary, _ = searched
    assert summary["judged_on"] == "test_loss"
    by_arm = {entry["arm"]: entry for entry in summary["arms"]}
    runs = [run for run in summary["runs"] if run["purpose"] == "reported"]
    lost = by_arm.pop("lost")  # an arm without a loss, and the report is there all the same
    assert lost["test_loss"] == {"mean": None, "spread": None, "n": 3}
    assert lost["perplexity"] is None
    for arm, entry in by_arm.items():
        losses = [run["test_loss"] for run in runs if run["arm"] == arm]
        assert entry["test_loss"]["mean"] == pytest.approx(statistics.mean(losses))
        assert entry["perplexity"] == pytest.approx(math.exp(statistics.mean(losses)))
        assert entry["test_loss"]["mean"] != entry["val_loss"]["mean"]
    for contrast in summary["contrasts"]:
        if contrast["arm"] == "lost":
            assert contrast["verdict"] == "diverged: no interval"
            continue
        means = [by_arm[contrast[side]]["test_loss"]["mean"] for side in ("arm", "reference")]
        assert contrast["mean"] == pytest.approx(means[0] - means[1])


@pytest.mark.slow
def test_the_baselines_curve_prices_the_others(searched):
    summary, _ = searched
    assert [point["tokens"] for point in summary["curve"]] == [128, 256, 384]
    assert [point["n"] for point in summary["curve"]] == [3, 3, 3]
    own = next(entry for entry in summary["arms"] if entry["arm"] == "additive")
    assert summary["curve"][-1]["loss"] == pytest.approx(own["test_loss"]["mean"])
    assert [row["arm"] for row in summary["costs"]] == ["one gate", "given"]
    for row in summary["costs"]:
        assert row["tokens"] == 384
        assert row["seconds"] is None  # without a benchmark
        assert (row["baseline_tokens"] is None) == (row["beyond"] is not None)


@pytest.mark.slow
def test_folders_say_arm_rate_and_budget(searched):
    _, out = searched
    names = {path.parent.relative_to(out).as_posix() for path in out.rglob("result.json")}
    arms = {path.split("/")[0] for path in names}
    assert arms == {"additive", "one_gate", "given", "lost"}
    assert "given/seed-0" in names
    assert "one_gate/lr-1e+30/seed-8" in names
    assert sum("/tokens-128/" in name for name in names) == 3


@pytest.mark.slow
def test_rows_for_people_who_compute(searched):
    summary, out = searched
    with (out / "runs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(summary["runs"]) == 2 * 3 * 2 + 4 * 3 + 2 * 3
    gates = {row["arm"]: row["model.gate"] for row in rows}
    assert gates == {"additive": "", "one gate": "layer", "given": "", "lost": ""}


def test_validation_text_is_spread_over_all_documents(micro_data, tmp_path):
    """A run's validation loss is that of sequences at even distances."""
    recipe = micro_recipe(micro_data, tmp_path, eval_sequences=5)
    result = read_result(train_one(recipe))
    data = PackedSequences(TokenShards.open(micro_data, "val"), 16)
    model = AutoModelForCausalLM.from_pretrained(recipe.run_folder / "final").eval()
    rows = torch.stack([data[index * len(data) // 5]["input_ids"] for index in range(5)])
    with torch.no_grad():
        assert result.val_loss == pytest.approx(model(rows, labels=rows).loss.item(), abs=2e-6)


def train_one(recipe):
    machines_module.train(recipe)
    return recipe.run_folder
