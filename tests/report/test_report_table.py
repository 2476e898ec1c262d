import builtins
import math
from collections.abc import Callable
from typing import Any

import pytest
from report.comparison_helpers import with_budgets, with_search, with_speed

from deep_delta.report import numbers
from deep_delta.report.comparison import (
    arms_table,
    contrasts_table,
    costs_table,
    fields_table,
    markdown_table,
    print_table,
    runs_table,
    speed_table,
    tables,
)
from deep_delta.report.sentences import conclusions, judged_by, judged_text
from deep_delta.report.table import Table

SummaryOf = Callable[..., dict[str, Any]]

BASE = {1: 3.30, 2: 3.31, 3: 3.29}


def lower_by(*amounts: float) -> dict[int, float]:
    return {seed: BASE[seed] - amount for seed, amount in zip(sorted(BASE), amounts, strict=False)}


def column(table: Table | None, name: str) -> list[str]:
    """The cells under the one column whose name starts so."""
    assert table is not None
    (place,) = (place for place, one in enumerate(table.names) if one.startswith(name))
    return [row[place] for row in table.rows]


def test_conclusion_with_an_interval(summary_of: SummaryOf) -> None:
    summary = summary_of({"additive": BASE, "ddl-cc": lower_by(0.020, 0.021, 0.022)})
    assert conclusions(summary) == [
        "ddl-cc: 0.0210 lower than additive (95 % Bonferroni CI \u22120.0235 to \u22120.0185, "
        "p = 0.00076 by Holm) at 0.50\u00d7 its tokens/s."
    ]
    summary = summary_of({"additive": BASE, "ddl-cc": lower_by(-0.020, -0.021, -0.022)})
    assert (
        "0.0210 higher than additive (95 % Bonferroni CI +0.0185 to +0.0235, "
        in (conclusions(summary)[0])
    )


def test_conclusion_within_noise(summary_of: SummaryOf) -> None:
    summary = summary_of({"additive": BASE, "ddl-cc": lower_by(0.02, -0.01, 0.01)})
    (sentence,) = conclusions(summary)
    assert sentence == (
        "ddl-cc: within noise of additive (95 % Bonferroni CI \u22120.0446 to +0.0313, p = 0.53 by "
        "Holm) at 0.50\u00d7 its tokens/s; 23 seeds would decide a difference of 0.0067."
    )
    assert column(arms_table(summary), "verdict") == [
        "baseline", "within noise (23 seeds would decide)",
    ]  # fmt: skip
    same = summary_of({"additive": BASE, "ddl-cc": BASE})
    assert conclusions(same)[0].endswith("p = 1.00 by Holm) at 0.50\u00d7 its tokens/s.")
    assert column(arms_table(same), "verdict")[1] == "within noise"


def test_what_stands_behind_the_verdicts_is_said(summary_of: SummaryOf) -> None:
    lower = lower_by(0.02, -0.01, 0.01)
    summary = summary_of({"additive": BASE, "ddl-cc": lower, "ddl-tc": lower, "x": lower})
    # Differences scatter by 0.0153; one arm of four against three alike: half of it is left.
    assert judged_by(summary) == (
        "Intervals are Bonferroni's over 3 contrasts (95 % that all hold), verdicts are Holm's; "
        "residual deviation 0.0076 nats/token (6 degrees of freedom)."
    )
    assert judged_by(summary_of({"additive": BASE, "x": BASE})).startswith(
        "Intervals are Bonferroni's over one contrast (95 % that all hold), "
    )
    one = {1: 3.0}
    assert judged_by(summary_of({"additive": one, "x": one})).endswith("verdicts are Holm's.")
    assert judged_by(summary_of({"x": BASE}, baseline=None)) == ""


def test_perplexity_is_that_of_the_mean_loss(summary_of: SummaryOf) -> None:
    summary = summary_of({"additive": {1: 1.0, 2: 3.0, 3: 5.0}})
    assert column(arms_table(summary), "perplexity") == [f"{math.exp(3.0):.2f}"]


@pytest.mark.parametrize(("n", "words"), [(1, "one seed"), (2, "two seeds")])
def test_conclusion_with_too_few_seeds(summary_of: SummaryOf, n: int, words: str) -> None:
    summary = summary_of({"additive": BASE, "ddl-cc": lower_by(*[0.02, 0.02, 0.02][:n])})
    assert conclusions(summary) == [
        "ddl-cc: 0.0200 lower than additive at 0.50\u00d7 its tokens/s, "
        f"but only {words}: no interval, no verdict."
    ]


def test_conclusions_without_a_baseline(summary_of: SummaryOf) -> None:
    for baseline in (None, "additive"):
        summary = summary_of({"ddl-cc": BASE}, baseline=baseline)
        assert conclusions(summary) == [
            "ddl-cc: validation loss 3.3000; nothing was run to compare it with."
        ]
        assert "verdict" not in arms_table(summary).names
    tested = summary_of({"ddl-cc": BASE}, baseline=None, tested=True)
    assert conclusions(tested)[0].startswith("ddl-cc: test loss 3.4000; ")


def test_conclusion_without_a_common_seed(summary_of: SummaryOf) -> None:
    summary = summary_of({"additive": {1: 3.0}, "ddl-cc": {2: 3.0}})
    assert conclusions(summary) == ["ddl-cc: no seed in common with additive: no comparison."]
    assert column(arms_table(summary), "val loss difference")[1] == "no common seed"


def test_speeds_of_different_machines_are_not_compared(summary_of: SummaryOf) -> None:
    summary = summary_of({"additive": BASE, "ddl-cc": lower_by(0.1, 0.1, 0.1)})
    speeds = column(arms_table(summary), "tokens/s")
    assert speeds == ["1,000 (1.00\u00d7)", "500 (0.50\u00d7)"]
    assert "0.50\u00d7 its tokens/s" in conclusions(summary)[0]
    summary["arms"][1]["hardware"] = ["another CPU"]
    assert column(arms_table(summary), "tokens/s") == [
        "1,000 on a CPU (1.00\u00d7)", "500 on another CPU",
    ]  # fmt: skip
    assert "tokens/s" not in conclusions(summary)[0]
    for entry in summary["arms"]:
        entry["hardware"] = ["a CPU", "another CPU"]  # which seed ran where is not known here
    assert column(arms_table(summary), "tokens/s")[1] == "500"


def test_diverged_runs_say_so(summary_of: SummaryOf) -> None:
    nan = {**BASE, 2: math.nan}
    summary = summary_of({"additive": BASE, "ddl-cc": nan})
    table = arms_table(summary)
    assert column(table, "val loss (nats/token)")[1] == "diverged (n = 3)"
    assert column(table, "perplexity")[1] == "diverged"
    assert column(table, "val loss difference")[1] == "diverged"
    assert column(table, "verdict")[1] == "diverged: no interval"
    assert "diverged" in conclusions(summary)[0]
    assert "a run of additive diverged" in conclusions(summary_of({"additive": nan, "x": BASE}))[0]
    runs = runs_table(summary, summary["runs"], "All.")
    assert column(runs, "val loss")[3:] == ["3.3000", "diverged", "3.2900"]


def test_differences_are_of_the_test_text_where_there_is_one(summary_of: SummaryOf) -> None:
    losses = {"additive": BASE, "ddl-cc": lower_by(0.020, 0.021, 0.022)}
    without = summary_of(losses)
    assert "test" not in "".join(arms_table(without).names)
    assert judged_text(without) == "Judged on validation text."
    assert judged_text(with_search(without)).endswith(", on which rates were chosen too.")
    summary = with_search(summary_of(losses, tested=True))
    assert judged_text(summary) == "Judged on test text, on which nothing was chosen."
    table = arms_table(summary)
    assert judged_text(summary) in table.caption
    assert column(table, "val loss (")[0] == "3.3000 \u00b1 0.0100 (n = 3)"
    assert column(table, "test loss (")[0] == "3.4000 \u00b1 0.0100 (n = 3)"
    assert column(table, "test loss difference to additive")[1].startswith("\u22120.0210 [")
    assert column(table, "perplexity")[0] == f"{math.exp(3.4):.2f}"
    # A training of the search has no test loss, which is no divergence.
    runs = runs_table(summary, summary["runs"], "All.")
    assert column(runs, "test loss")[:2] == ["3.4000", "3.4100"]
    assert set(column(runs, "test loss")[6:]) == {"\u2013", "diverged"}


def test_chosen_rates_and_edges_are_told(summary_of: SummaryOf) -> None:
    losses = {"additive": BASE, "ddl-cc": lower_by(0.020, 0.021, 0.022)}
    assert "learning rate" not in arms_table(summary_of(losses)).names
    summary = with_search(summary_of(losses))
    assert column(arms_table(summary), "learning rate") == [
        "1e-3 (8 tries)", "2e-3 (6 tries), highest tried",
    ]  # fmt: skip
    warning = "2e-3 is the highest that was tried: it may do better at a higher one."
    assert conclusions(summary)[0].endswith(f" its tokens/s. Its best rate {warning}")
    summary["arms"][0] |= {"edge": "lowest", "lr": 1.25e-4}
    assert conclusions(summary)[0].endswith(
        f"Its best rate {warning} The best rate of additive, 1.25e-4, is the lowest that was "
        "tried: it may do better at a lower one."
    )
    alone = with_search(summary_of({"ddl-cc": BASE}, baseline=None))
    assert conclusions(alone)[0].endswith(warning)
    summary["arms"][0] |= {"edge": None, "tries": 0}
    assert column(arms_table(summary), "learning rate")[0] == "1.25e-4 (given)"


def test_contrasts_of_any_pairs_have_a_table_of_their_own(summary_of: SummaryOf) -> None:
    losses = {"additive": BASE, "a": lower_by(0.01, 0.011, 0.012), "b": lower_by(0.03, 0.03, 0.032)}
    summary = summary_of(losses, pairs=[("a", "additive"), ("b", "a"), ("b", "additive")])
    assert "verdict" not in arms_table(summary).names
    table = contrasts_table(summary)
    assert column(table, "contrast") == ["a \u2212 additive", "b \u2212 a", "b \u2212 additive"]
    differences = column(table, "val loss difference")
    assert [cell.split()[0] for cell in differences] == [
        "\u22120.0110", "\u22120.0197", "\u22120.0307",
    ]  # fmt: skip
    sentences = conclusions(summary)
    assert sentences[1].startswith("b: 0.0197 lower than a (95 % Bonferroni CI")
    assert "at 0.67\u00d7 its tokens/s" in sentences[1]
    # All against one arm that is not the baseline: as ever, beside the arms.
    summary = summary_of(losses, pairs=[("additive", "a"), ("b", "a")])
    assert contrasts_table(summary) is None
    assert column(arms_table(summary), "verdict") == ["higher", "reference", "lower"]
    assert column(arms_table(summary), "val loss difference to a")[1] == "\u2013"


def test_what_arms_set_is_said_where_names_do_not(summary_of: SummaryOf) -> None:
    summary = summary_of({"additive": BASE, "ddl-cc": BASE})
    assert fields_table(summary) is None
    summary["arms"][1]["fields"] = {"lr": 0.004, "variant": "ddl-cc", "model.gate": "layer"}
    assert column(fields_table(summary), "differs in") == [
        "additive", "ddl-cc, lr = 0.004, model.gate = layer",
    ]  # fmt: skip


def test_costs_are_ratios_or_words(summary_of: SummaryOf) -> None:
    nan = {**BASE, 2: math.nan}
    shifts = {"additive": 0.0, "better": 0.025, "best": 0.2, "worst": -0.2}
    losses = {name: lower_by(*[shift] * 3) for name, shift in shifts.items()}
    summary = summary_of({**losses, "gone": nan})
    assert costs_table(summary) is None
    table = costs_table(with_budgets(summary))
    assert column(table, "baseline's tokens") == [
        "64.0 k", "90.5 k", "beyond the curve: better than all of it",
        "beyond the curve: worse than all of it", "diverged",
    ]  # fmt: skip
    assert column(table, "FLOPs (ratio)") == ["1.00", "0.71", "\u2013", "\u2013", "\u2013"]
    assert column(table, "training time (ratio)")[:2] == ["1.10", "0.78"]
    assert table is not None
    assert "1.10 means that the arm costs 10 % more than the baseline" in table.caption


def test_speeds_are_the_benchmarks_where_it_was_steady(summary_of: SummaryOf) -> None:
    summary = summary_of({"additive": BASE, "a": lower_by(0.1, 0.1, 0.1), "b": BASE})
    assert speed_table(summary) is None
    steady = with_speed(summary)
    assert column(speed_table(steady), "ratio") == ["1.00\u00d7", "0.80\u00d7", "0.67\u00d7"]
    assert column(speed_table(steady), "lowest")[1] == "0.78\u00d7 to 0.81\u00d7"
    assert column(arms_table(steady), "tokens/s")[1] == "1,600 (0.80\u00d7)"
    assert "0.80\u00d7 its tokens/s" in conclusions(steady)[0]
    # An arm that the benchmark left out is judged by the runs, as all are where it was not steady.
    del steady["speed"]["arms"]["b"]
    assert column(arms_table(steady), "tokens/s")[2] == "333 (0.33\u00d7)"
    unsteady = with_speed(summary, steady=False)
    table = speed_table(unsteady)
    assert column(table, "ratio") == ["\u2013"] * 3
    assert table is not None
    assert "No ratio: the rounds differ too much, something else ran." in table.caption
    assert column(arms_table(unsteady), "tokens/s")[1] == "500 (0.50\u00d7)"


def test_null_instead_of_nan_is_diverged_as_well() -> None:
    assert numbers.measured(None, None, 4) == "diverged"


def test_every_arm_is_in_every_form(
    summary_of: SummaryOf, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["additive", "[bold]odd|name", *(f"ddl-variant-number-{i}" for i in range(9))]
    summary = with_speed(with_budgets(with_search(summary_of(dict.fromkeys(names, BASE)))))
    shown = tables(summary)
    assert [table.title for table in shown] == ["Results", "Costs", "Speed"]
    assert all(column(table, "arm") == names for table in shown)
    lines = [line for line in markdown_table(summary).splitlines() if line.startswith("|")]
    assert len(lines) == 3 * (len(names) + 2)
    for table in shown:
        own, lines = lines[: len(names) + 2], lines[len(names) + 2 :]
        assert all(line.replace("\\|", "").count("|") == len(table.names) + 1 for line in own)
    print_table(summary)
    printed = capsys.readouterr().out
    # Each cell is whole: nothing was truncated or wrapped for an assumed 80 columns.
    for row in (row for table in shown for row in table.rows):
        assert any(all(cell in line for cell in row) for line in printed.splitlines())
    for sentence in (judged_text(summary), judged_by(summary), *conclusions(summary)):
        assert sentence in printed.splitlines()


def test_table_prints_without_rich(
    summary_of: SummaryOf, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real_import = builtins.__import__

    def no_rich(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "rich":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_rich)
    summary = summary_of({"additive": BASE, "ddl-cc": lower_by(0.02, 0.021, 0.022)})
    print_table(summary)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].index("parameters") == printed[2].index("124 M") == printed[3].index("124 M")
    assert printed[-1] == conclusions(summary)[-1]
    print_table(with_speed(summary))
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1].split() == [
        "ddl-cc",
        "1,600",
        "0.80\u00d7",
        "0.78\u00d7",
        "to",
        "0.81\u00d7",
    ]


def test_numbers() -> None:
    assert numbers.signed(-0.00001, 4) == "0.0000"
    assert numbers.signed(-0.021, 4) == "\u22120.0210"
    assert numbers.decimals_for(-0.02, -0.04, -0.00003) == 5
    assert numbers.decimals_for(0.0, None) == 4
    assert [numbers.p_value(p) for p in (1.0, 0.123, 0.0312, 0.00076, 0.00001)] == [
        "p = 1.00",
        "p = 0.12",
        "p = 0.031",
        "p = 0.00076",
        "p < 0.0001",
    ]
    rates = [numbers.learning_rate(lr) for lr in (4e-3, 1.25e-4, 1.0, 0.02)]
    assert rates == ["4e-3", "1.25e-4", "1e0", "2e-2"]
    assert [numbers.with_prefix(v) for v in (12, 1234, 124_439_808, 1.2e9)] == [
        "12",
        "1.23 k",
        "124 M",
        "1.20 G",
    ]
    assert [numbers.memory(v) for v in (0, 5 * 2**20, 3 * 2**30)] == [
        "\u2013",
        "5.0 MiB",
        "3.00 GiB",
    ]
    assert [numbers.duration(s) for s in (2.46, 41.2, 725, 12000)] == [
        "2.5 s",
        "41 s",
        "12 min 05 s",
        "3 h 20 min",
    ]
