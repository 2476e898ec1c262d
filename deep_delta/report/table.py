"""The comparison as a table (rich, plain or Markdown) and as one sentence per contrast."""

import math
from collections.abc import Mapping
from typing import Any

from deep_delta.report import numbers

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
    """``95 % Bonferroni CI``."""
    return f"{100 * summary['level']:g} % Bonferroni CI"


def judged_by(summary: Summary) -> str:
    """One sentence on what stands behind intervals and verdicts; empty without contrasts."""
    count, residual = len(summary["contrasts"]), summary["residual"]
    if not count:
        return ""
    over = "one contrast" if count == 1 else f"{count} contrasts"
    all_hold = f"{100 * summary['level']:g} % that all hold"
    sentence = f"Intervals are Bonferroni's over {over} ({all_hold}), verdicts are Holm's"
    if residual["deviation"] is None:
        return f"{sentence}."
    deviation = f"{residual['deviation']:.{numbers.decimals_for(residual['deviation'])}f}"
    freedom = residual["degrees_of_freedom"]
    return f"{sentence}; residual deviation {deviation} nats/token ({freedom} degrees of freedom)."


def speed_ratio(summary: Summary, name: str, reference: str | None) -> float | None:
    """Tokens per second of a variant over those of another.

    None if the other was not run, and where not all their runs had the same hardware.
    """
    entries = {entry["variant"]: entry for entry in summary["variants"]}
    if reference not in entries:
        return None
    one, other = entries[name], entries[reference]
    if len({*one["hardware"], *other["hardware"]}) > 1:
        return None
    speed = float(other["tokens_per_s"])
    return float(one["tokens_per_s"]) / speed if math.isfinite(speed) and speed > 0 else None


def _row(summary: Summary, variant: Mapping[str, Any]) -> list[str]:
    loss = numbers.measured(variant["val_loss"]["mean"], variant["val_loss"]["spread"], 4)
    against = {
        contrast["arm"]: contrast
        for contrast in summary["contrasts"]
        if contrast["reference"] == summary["baseline"]
    }
    contrast = against.get(variant["variant"])
    return [
        str(variant["variant"]),
        numbers.with_prefix(variant["parameters"]),
        f"{loss} (n = {variant['val_loss']['n']})",
        numbers.measured(variant["perplexity"], None, 2),
        numbers.difference_with_interval(contrast) if contrast else numbers.MISSING_CELL,
        _verdict_cell(summary, variant, contrast),
        numbers.with_prefix(variant["flops_per_token"]),
        _speed_cell(summary, variant),
        numbers.memory(variant["peak_memory_bytes"]),
    ]


def _speed_cell(summary: Summary, variant: Mapping[str, Any]) -> str:
    speed = numbers.rate(variant["tokens_per_s"])
    hardware = {tuple(entry["hardware"]) for entry in summary["variants"]}
    if len(hardware) > 1:
        speed += f" on {', '.join(variant['hardware'])}"
    ratio = speed_ratio(summary, variant["variant"], summary["baseline"])
    return speed if ratio is None else f"{speed} ({ratio:.2f}{numbers.TIMES})"


def _verdict_cell(
    summary: Summary, variant: Mapping[str, Any], contrast: Mapping[str, Any] | None
) -> str:
    if contrast is None:
        return "baseline" if variant["variant"] == summary["baseline"] else numbers.MISSING_CELL
    if contrast["n_to_decide"] is None:
        return str(contrast["verdict"])
    return f"{contrast['verdict']} ({numbers.seeds(contrast['n_to_decide'])} would decide)"


def conclusions(summary: Summary) -> list[str]:
    """One plain sentence per contrast; without contrasts one per variant but the baseline."""
    losses = {entry["variant"]: entry["val_loss"]["mean"] for entry in summary["variants"]}
    if summary["contrasts"]:
        return [
            f"{contrast['arm']}: {_conclusion(summary, contrast, losses[contrast['arm']])}"
            for contrast in summary["contrasts"]
        ]
    return [
        f"{name}: {_alone(loss)}" for name, loss in losses.items() if name != summary["baseline"]
    ]


_DIVERGED = "diverged (at least one run ended with a loss that is not a number): no verdict."


def _alone(loss: float | None) -> str:
    if not numbers.is_finite(loss):
        return _DIVERGED
    shown = numbers.measured(loss, None, 4)
    return f"validation loss {shown}; the baseline was not run, so there is no comparison."


def _conclusion(summary: Summary, contrast: Mapping[str, Any], loss: float | None) -> str:
    reference, n, mean = contrast["reference"], contrast["n"], contrast["mean"]
    if not numbers.is_finite(loss):
        return _DIVERGED
    if n == 0:
        return f"no seed in common with {reference}: no comparison."
    if not numbers.is_finite(mean):
        return f"not compared, because a run of {reference} diverged: no verdict."
    ratio = speed_ratio(summary, contrast["arm"], reference)
    speed = "" if ratio is None else f" at {ratio:.2f}{numbers.TIMES} its tokens/s"
    low, high = contrast["bonferroni_low"], contrast["bonferroni_high"]
    decimals = numbers.decimals_for(mean, low, high)
    size = f"{abs(mean):.{decimals}f}"
    compared = f"{size} {'lower' if mean < 0 else 'higher'} than {reference}"
    if low is None or high is None:
        count = _WORDS.get(n, numbers.seeds(n))
        return f"{compared}{speed}, but only {count}: no interval, no verdict."
    span = f"{numbers.signed(low, decimals)} to {numbers.signed(high, decimals)}"
    found = f"{interval_name(summary)} {span}, {numbers.p_value(contrast['holm_p'])} by Holm"
    if contrast["verdict"] in ("lower", "higher"):
        return f"{compared} ({found}){speed}."
    noise = f"within noise of {reference} ({found}){speed}"
    if contrast["n_to_decide"] is None:
        return f"{noise}."
    return f"{noise}; {numbers.seeds(contrast['n_to_decide'])} would decide a difference of {size}."


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
    """Print the table and what it says to standard output, with rich where it is installed."""
    sentences = [sentence for sentence in (judged_by(summary), *conclusions(summary)) if sentence]
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        print(plain_table(summary))
        print("\n".join(sentences))
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
    for sentence in sentences:
        console.print(Text(sentence), soft_wrap=True)
