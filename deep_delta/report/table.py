"""The comparison as a table (rich, plain or Markdown) and as one sentence per variant."""

import math
from collections.abc import Mapping
from typing import Any

from deep_delta.report import numbers, statistics

Summary = Mapping[str, Any]

_WORDS = {1: "one seed", 2: "two seeds"}


def column_names(summary: Summary) -> list[str]:
    """Headings of the nine columns of `summary_rows`."""
    baseline = summary["baseline"]
    against = f"difference to {baseline}" if baseline else "difference to a baseline"
    return [
        "variant",
        "parameters",
        "val loss (nats/token)",
        "perplexity",
        f"{against} [{interval_name(summary)}]",
        "verdict",
        "FLOPs/token",
        "tokens/s (ratio)" if baseline else "tokens/s",
        "peak memory",
    ]


def summary_rows(summary: Summary) -> list[list[str]]:
    """One row of nine cells per variant, in the order of the summary."""
    return [_row(summary, variant) for variant in summary["variants"]]


def interval_name(summary: Summary) -> str:
    """``95 % CI``."""
    return f"{100 * summary['level']:g} % CI"


def speed_ratio(summary: Summary, variant: Mapping[str, Any]) -> float | None:
    """Tokens per second of a variant over those of the baseline.

    None without a baseline run, and where not all their runs had the same hardware.
    """
    entries = {entry["variant"]: entry for entry in summary["variants"]}
    baseline = entries.get(summary["baseline"])
    if baseline is None or len({*baseline["hardware"], *variant["hardware"]}) > 1:
        return None
    speed = float(baseline["tokens_per_s"])
    return float(variant["tokens_per_s"]) / speed if math.isfinite(speed) and speed > 0 else None


def _row(summary: Summary, variant: Mapping[str, Any]) -> list[str]:
    loss = numbers.measured(variant["val_loss"]["mean"], variant["val_loss"]["spread"], 4)
    perplexity = variant["perplexity"]
    return [
        str(variant["variant"]),
        numbers.with_prefix(variant["parameters"]),
        f"{loss} (n = {variant['val_loss']['n']})",
        numbers.measured(perplexity["mean"], perplexity["spread"], 2),
        _difference_cell(variant),
        _verdict_cell(summary, variant),
        numbers.with_prefix(variant["flops_per_token"]),
        _speed_cell(summary, variant),
        numbers.memory(variant["peak_memory_bytes"]),
    ]


def _speed_cell(summary: Summary, variant: Mapping[str, Any]) -> str:
    speed = numbers.rate(variant["tokens_per_s"])
    hardware = {tuple(entry["hardware"]) for entry in summary["variants"]}
    if len(hardware) > 1:
        speed += f" on {', '.join(variant['hardware'])}"
    ratio = speed_ratio(summary, variant)
    return speed if ratio is None else f"{speed} ({ratio:.2f}{numbers.TIMES})"


def _difference_cell(variant: Mapping[str, Any]) -> str:
    difference = variant["difference"]
    if difference is None:
        return numbers.MISSING_CELL
    return numbers.difference_with_interval(**difference)


def _verdict_cell(summary: Summary, variant: Mapping[str, Any]) -> str:
    if variant["difference"] is not None:
        return str(variant["difference"]["verdict"])
    if variant["variant"] == summary["baseline"]:
        return "baseline"
    return numbers.MISSING_CELL


def conclusions(summary: Summary) -> list[str]:
    """One plain sentence per variant other than the baseline, in the order of the summary."""
    return [
        f"{variant['variant']}: {_conclusion(summary, variant)}"
        for variant in summary["variants"]
        if variant["variant"] != summary["baseline"]
    ]


def _conclusion(summary: Summary, variant: Mapping[str, Any]) -> str:
    difference, baseline = variant["difference"], summary["baseline"]
    if not numbers.is_finite(variant["val_loss"]["mean"]):
        return "diverged (at least one run ended with a loss that is not a number): no verdict."
    if difference is None:
        loss = numbers.measured(variant["val_loss"]["mean"], None, 4)
        return f"validation loss {loss}; the baseline was not run, so there is no comparison."
    if difference["n"] == 0 or difference["verdict"] == statistics.NO_COMMON_SEED:
        return f"no seed in common with {baseline}: no comparison."
    if not numbers.is_finite(difference["mean"]):
        return f"not compared, because a run of {baseline} diverged: no verdict."
    ratio = speed_ratio(summary, variant)
    speed = "" if ratio is None else f" at {ratio:.2f}{numbers.TIMES} its tokens/s"
    mean, low, high = difference["mean"], difference["low"], difference["high"]
    decimals = numbers.decimals_for(mean, low, high)
    size = f"{abs(mean):.{decimals}f} {'lower' if mean < 0 else 'higher'} than {baseline}"
    if low is None or high is None:
        count = _WORDS.get(difference["n"], numbers.seeds(difference["n"]))
        return f"{size}{speed}, but only {count}: no interval, no verdict."
    level = f"{100 * summary['level']:g} % interval"
    if difference["verdict"] == statistics.WITHIN_NOISE:
        span = f"{numbers.signed(low, decimals)} to {numbers.signed(high, decimals)}"
        return f"within noise of {baseline} (the {level} {span} contains zero){speed}."
    near, far = sorted((abs(low), abs(high)))
    span = f"{near:.{decimals}f} to {far:.{decimals}f} {difference['verdict']}"
    return f"{size} ({level} {span}){speed}."


def markdown_table(summary: Summary) -> str:
    """The table as GitHub Markdown, numbers right-aligned, ending in a newline."""
    names = column_names(summary)
    rule = ["---", *["---:"] * 4, "---", *["---:"] * 3]
    lines = [names, rule, *summary_rows(summary)]
    return "".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in line) + " |\n"
        for line in lines
    )


def plain_table(summary: Summary) -> str:
    """The table as aligned text, ending in a newline."""
    lines = [column_names(summary), *summary_rows(summary)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    lines.insert(1, ["-" * width for width in widths])
    return "".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        + "\n"
        for line in lines
    )


def print_table(summary: Summary) -> None:
    """Print the table and the conclusions to standard output, with rich where it is installed."""
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        print(plain_table(summary))
        print("\n".join(conclusions(summary)))
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(column_names(summary)):
        text_column = index in (0, 5)
        table.add_column(Text(name), justify="left" if text_column else "right", overflow="fold")
    for row in summary_rows(summary):
        # Text and not str: a "[" in a variant's name is not markup.
        table.add_row(*(Text(cell) for cell in row))
    console = Console(highlight=False)
    if not console.is_terminal:
        # Into a file or pipe rich assumes 80 columns and would break the cells apart.
        console = Console(highlight=False, width=1000)
    console.print(table)
    for sentence in conclusions(summary):
        console.print(Text(sentence), soft_wrap=True)
