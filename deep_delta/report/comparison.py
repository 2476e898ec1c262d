"""The tables of a comparison, from its summary."""

from collections.abc import Mapping, Sequence
from typing import Any

from deep_delta.report import numbers, parts
from deep_delta.report.sentences import (
    Summary,
    common_reference,
    conclusions,
    interval_name,
    judged_by,
    judged_loss,
    judged_split,
    judged_text,
    speed_ratio,
)
from deep_delta.report.table import Table, as_markdown, print_tables, table_of

_WORDS = {"arm", "verdict", "contrast", "differs in", "learning rate", "hardware", "directory"}

HOW_TO_READ_COSTS = (
    "1.10 means that the arm costs 10 % more than the baseline does for the same loss"
)
_BEYOND = {
    "below": "beyond the curve: better than all of it",
    "above": "beyond the curve: worse than all of it",
}
_PURPOSES = {"reported": "reported", "rate": "rate search", "budget": "baseline's curve"}


def tables(summary: Summary) -> list[Table]:
    """The tables that the summary has numbers for; the first is that of the arms' results."""
    found = [
        arms_table(summary),
        contrasts_table(summary),
        fields_table(summary),
        costs_table(summary),
        speed_table(summary),
    ]
    return [table for table in found if table is not None]


def print_table(summary: Summary) -> None:
    """Print the tables and what they say to standard output, with rich where it is installed."""
    said = [judged_text(summary), judged_by(summary), *conclusions(summary)]
    print_tables(tables(summary), [sentence for sentence in said if sentence])


def markdown_table(summary: Summary) -> str:
    """The tables as GitHub Markdown, all but the first under title and caption."""
    first, *others = tables(summary)
    return as_markdown(first) + "".join(
        f"\n{table.title}. {table.caption}\n\n{as_markdown(table)}" for table in others
    )


def arms_table(summary: Summary) -> Table:
    """One row per arm, in the order of the summary.

    Differences stand here if all contrasts have one reference, else in `contrasts_table`.
    """
    split = judged_split(summary)
    caption = (
        f"Mean ± standard deviation over n seeds; perplexity is that of the mean {split} loss; "
        f"FLOPs forward and backward. {judged_text(summary)} {judged_by(summary)}"
    ).rstrip()
    if any(_benchmarked(summary, entry["arm"]) for entry in summary["arms"]):
        caption += " Tokens/s are the benchmark's where it has a ratio."
    rows = [_arm_row(summary, entry) for entry in summary["arms"]]
    return table_of("Results", caption, rows, _WORDS)


def _arm_row(summary: Summary, entry: Mapping[str, Any]) -> dict[str, str]:
    row = {"arm": str(entry["arm"]), "parameters": numbers.with_prefix(entry["parameters"])}
    if summary["rates"]:
        row["learning rate"] = _rate_cell(entry)
    row["val loss (nats/token)"] = _loss_cell(entry["val_loss"])
    if any(one["test_loss"] for one in summary["arms"]):
        row["test loss (nats/token)"] = _loss_cell(entry["test_loss"])
    row["perplexity"] = numbers.measured(entry["perplexity"], None, 2)
    reference = common_reference(summary)
    if reference is not None:
        against = {contrast["arm"]: contrast for contrast in summary["contrasts"]}
        row |= _difference_cells(summary, entry["arm"], reference, against.get(entry["arm"]))
    speeds = "tokens/s (ratio)" if summary["baseline"] else "tokens/s"
    return row | {
        "FLOPs/token": numbers.with_prefix(entry["flops_per_token"]),
        speeds: _speed_cell(summary, entry),
        "peak memory": numbers.memory(entry["peak_memory_bytes"]),
    }


def _rate_cell(entry: Mapping[str, Any]) -> str:
    rate, tries = numbers.learning_rate(entry["lr"]), entry["tries"]
    if not tries:
        return f"{rate} (given)"
    counted = f"{rate} ({tries} {'try' if tries == 1 else 'tries'})"
    return counted if entry["edge"] is None else f"{counted}, {entry['edge']} tried"


def _loss_cell(loss: Mapping[str, Any] | None) -> str:
    if loss is None:
        return numbers.MISSING_CELL
    return f"{numbers.measured(loss['mean'], loss['spread'], 4)} (n = {loss['n']})"


def _loss(loss: float | None) -> str:
    return numbers.measured(loss, None, 4)


def _difference_cells(
    summary: Summary, arm: str, reference: str, contrast: Mapping[str, Any] | None
) -> dict[str, str]:
    difference, verdict = numbers.MISSING_CELL, numbers.MISSING_CELL
    if contrast is not None:
        difference, verdict = numbers.difference_with_interval(contrast), _verdict(contrast)
    elif arm == reference:
        verdict = "baseline" if arm == summary["baseline"] else "reference"
    what = f"{judged_split(summary)} loss difference to {reference} [{interval_name(summary)}]"
    return {what: difference, "verdict": verdict}


def _verdict(contrast: Mapping[str, Any]) -> str:
    if contrast["n_to_decide"] is None:
        return str(contrast["verdict"])
    return f"{contrast['verdict']} ({numbers.seeds(contrast['n_to_decide'])} would decide)"


def _speed_cell(summary: Summary, entry: Mapping[str, Any]) -> str:
    """By the benchmark where that has a ratio, else by the runs."""
    arm = entry["arm"]
    ratio = speed_ratio(summary, arm, summary["baseline"])
    if _benchmarked(summary, arm):
        return f"{numbers.rate(summary['speed']['arms'][arm]['tokens_per_s'])} ({_times(ratio)})"
    speed = numbers.rate(entry["tokens_per_s"])
    if len({tuple(one["hardware"]) for one in summary["arms"]}) > 1:
        speed += f" on {', '.join(entry['hardware'])}"
    return speed if ratio is None else f"{speed} ({_times(ratio)})"


def _benchmarked(summary: Summary, arm: str) -> bool:
    measured = (summary["speed"] or {"arms": {}})["arms"]
    return all(name in measured and measured[name]["ratio"] for name in (arm, summary["baseline"]))


def _times(ratio: float | None) -> str:
    return numbers.MISSING_CELL if ratio is None else f"{ratio:.2f}{numbers.TIMES}"


def contrasts_table(summary: Summary) -> Table | None:
    """One row per contrast where they have different references, else None."""
    if not summary["contrasts"] or common_reference(summary) is not None:
        return None
    what = f"{judged_split(summary)} loss difference [{interval_name(summary)}]"
    rows = [
        {
            "contrast": contrast_name(contrast),
            what: numbers.difference_with_interval(contrast),
            "verdict": _verdict(contrast),
        }
        for contrast in summary["contrasts"]
    ]
    caption = (
        "Mean over the seeds that both arms have, in nats/token; below zero the first is better."
    )
    return table_of("Contrasts", caption, rows, _WORDS)


def contrast_name(contrast: Mapping[str, Any]) -> str:
    """``arm − reference``."""
    return f"{contrast['arm']} {numbers.MINUS} {contrast['reference']}"


def fields_table(summary: Summary) -> Table | None:
    """What each arm sets in the recipe; None where their names say it all."""
    rows = [
        {"arm": str(entry["arm"]), "differs in": _in_words(entry["fields"])}
        for entry in summary["arms"]
    ]
    if all(row["differs in"] in (row["arm"], "nothing") for row in rows):
        return None
    return table_of("Arms", "What each arm sets in the shared recipe.", rows, _WORDS)


def _in_words(fields: Mapping[str, Any]) -> str:
    """``ddl-cc, model.gate = layer``: the variant goes without saying that it is one."""
    said = [str(fields["variant"])] if "variant" in fields else []
    said += [
        f"{name} = {parts.as_typed(value)}" for name, value in fields.items() if name != "variant"
    ]
    return ", ".join(said) or "nothing"


def costs_table(summary: Summary) -> Table | None:
    """What each arm's loss costs the baseline; None without the baseline's curve."""
    if not summary["costs"]:
        return None
    rows = [
        {
            "arm": str(cost["arm"]),
            "tokens": numbers.with_prefix(cost["tokens"]),
            "baseline's tokens for its loss": _baseline_tokens(summary, cost),
            "FLOPs (ratio)": _ratio(cost["flops"]),
            "training time (ratio)": _ratio(cost["seconds"]),
        }
        for cost in summary["costs"]
    ]
    caption = (
        f"What {summary['baseline']} needs for an arm's {judged_split(summary)} loss is read off "
        f"its curve over trainings of other lengths. Ratios: {HOW_TO_READ_COSTS}."
    )
    return table_of("Costs", caption, rows, _WORDS)


def _baseline_tokens(summary: Summary, cost: Mapping[str, Any]) -> str:
    if cost["beyond"] is not None:
        return _BEYOND[cost["beyond"]]
    if cost["baseline_tokens"] is not None:
        return numbers.with_prefix(cost["baseline_tokens"])
    known = numbers.is_finite(judged_loss(summary, cost["arm"]))
    return numbers.MISSING_CELL if known else numbers.DIVERGED_CELL


def _ratio(value: float | None) -> str:
    return numbers.MISSING_CELL if value is None else f"{value:.2f}"


def speed_table(summary: Summary) -> Table | None:
    """The benchmark in which the arms took turns; None without one."""
    speed = summary["speed"]
    if speed is None:
        return None
    rows = [
        {
            "arm": str(arm),
            "tokens/s": numbers.rate(measured["tokens_per_s"]),
            "ratio": _times(measured["ratio"]),
            "lowest to highest round": _span(measured),
        }
        for arm, measured in speed["arms"].items()
    ]
    caption = (
        "Median over the rounds of one benchmark in which the arms take turns on one device "
        f"({speed['hardware']}), ratios to {summary['baseline']}."
    )
    if not speed["steady"]:
        caption += " No ratio: the rounds differ too much, something else ran."
    return table_of("Speed", caption, rows, _WORDS)


def _span(measured: Mapping[str, Any]) -> str:
    if measured["low"] is None or measured["high"] is None:
        return numbers.MISSING_CELL
    return f"{_times(measured['low'])} to {_times(measured['high'])}"


def runs_table(summary: Summary, runs: Sequence[Mapping[str, Any]], caption: str) -> Table:
    """One row per training; ``runs`` are some of the summary's."""
    several = len({run["hardware"] for run in summary["runs"]}) > 1
    various = any(run["purpose"] != "reported" for run in runs)
    tested = any(run["test_loss"] is not None for run in runs)
    rows = []
    for run in runs:
        row = {"arm": str(run["arm"])}
        if various:
            row["purpose"] = _PURPOSES[run["purpose"]]
        row |= {
            "seed": str(run["seed"]),
            "learning rate": numbers.learning_rate(run["lr"]),
            "val loss": _loss(run["val_loss"]),
        }
        if tested:
            measured = run["diverged"] or run["test_loss"] is not None
            row["test loss"] = _loss(run["test_loss"]) if measured else numbers.MISSING_CELL
        row |= {
            "tokens": f"{run['tokens']:,}",
            "FLOPs": numbers.with_prefix(run["flops"]),
            "training time": numbers.duration(run["train_seconds"]),
            "tokens/s": numbers.rate(run["tokens_per_s"]),
            "peak memory": numbers.memory(run["peak_memory_bytes"]),
        }
        if several:
            row["hardware"] = run["hardware"] or "unknown"
        row["directory"] = str(run["path"])
        rows.append(row)
    return table_of("Runs", caption, rows, {*_WORDS, "purpose"} - {"learning rate"})
