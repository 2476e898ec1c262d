import builtins
import math
from collections.abc import Callable
from typing import Any

import pytest

from deep_delta.report import numbers
from deep_delta.report.table import (
    column_names,
    conclusions,
    judged_by,
    markdown_table,
    print_table,
    summary_rows,
)

SummaryOf = Callable[..., dict[str, Any]]

BASE = {1: 3.30, 2: 3.31, 3: 3.29}


def lower_by(*amounts: float) -> dict[int, float]:
    return {seed: BASE[seed] - amount for seed, amount in zip(sorted(BASE), amounts, strict=False)}


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
    assert summary_rows(summary)[1][5] == "within noise (23 seeds would decide)"
    same = summary_of({"additive": BASE, "ddl-cc": BASE})
    assert conclusions(same)[0].endswith("p = 1.00 by Holm) at 0.50\u00d7 its tokens/s.")
    assert summary_rows(same)[1][5] == "within noise"


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
    assert column_names(summary)[3] == "perplexity"
    assert summary_rows(summary)[0][3] == f"{math.exp(3.0):.2f}"


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
            "ddl-cc: validation loss 3.3000; the baseline was not run, so there is no comparison."
        ]
        assert len(summary_rows(summary)[0]) == len(column_names(summary))


def test_conclusion_without_a_common_seed(summary_of: SummaryOf) -> None:
    summary = summary_of({"additive": {1: 3.0}, "ddl-cc": {2: 3.0}})
    assert conclusions(summary) == ["ddl-cc: no seed in common with additive: no comparison."]
    assert summary_rows(summary)[1][4] == "no common seed"


def test_speeds_of_different_machines_are_not_compared(summary_of: SummaryOf) -> None:
    summary = summary_of({"additive": BASE, "ddl-cc": lower_by(0.1, 0.1, 0.1)})
    speeds = [row[7] for row in summary_rows(summary)]
    assert speeds == ["1,000 (1.00\u00d7)", "500 (0.50\u00d7)"]
    assert "0.50\u00d7 its tokens/s" in conclusions(summary)[0]
    summary["variants"][1]["hardware"] = ["another CPU"]
    assert [row[7] for row in summary_rows(summary)] == [
        "1,000 on a CPU (1.00\u00d7)", "500 on another CPU",
    ]  # fmt: skip
    assert "tokens/s" not in conclusions(summary)[0]
    for entry in summary["variants"]:
        entry["hardware"] = ["a CPU", "another CPU"]  # which seed ran where is not known here
    assert summary_rows(summary)[1][7] == "500"


def test_diverged_runs_say_so(summary_of: SummaryOf) -> None:
    nan = {**BASE, 2: math.nan}
    summary = summary_of({"additive": BASE, "ddl-cc": nan})
    row = summary_rows(summary)[1]
    assert row[2:6] == ["diverged (n = 3)", "diverged", "diverged", "diverged: no interval"]
    assert "diverged" in conclusions(summary)[0]
    assert "a run of additive diverged" in conclusions(summary_of({"additive": nan, "x": BASE}))[0]


def test_null_instead_of_nan_is_diverged_as_well() -> None:
    assert numbers.measured(None, None, 4) == "diverged"


def test_every_variant_is_in_every_form(
    summary_of: SummaryOf, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["additive", "[bold]odd|name", *(f"ddl-variant-number-{i}" for i in range(9))]
    summary = summary_of(dict.fromkeys(names, BASE))
    assert [row[0] for row in summary_rows(summary)] == names
    lines = markdown_table(summary).splitlines()
    assert len(lines) == len(names) + 2
    assert all(line.replace("\\|", "").count("|") == 10 for line in lines)
    print_table(summary)
    printed = capsys.readouterr().out
    # Each cell is whole: nothing was truncated or wrapped for an assumed 80 columns.
    for row in summary_rows(summary):
        assert any(all(cell in line for cell in row) for line in printed.splitlines())
    for sentence in (judged_by(summary), *conclusions(summary)):
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
