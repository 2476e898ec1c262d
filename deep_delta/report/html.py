"""``report.html``: the comparison as one self-contained page, and its charts as files."""

from html import escape
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from deep_delta.report import numbers, parts, plots, render, search_plots
from deep_delta.report.comparison import (
    HOW_TO_READ_COSTS,
    arms_table,
    contrast_name,
    contrasts_table,
    costs_table,
    fields_table,
    runs_table,
    speed_table,
)
from deep_delta.report.curves import Axis, Curves, over_seeds
from deep_delta.report.page import whole_page
from deep_delta.report.plots import Styles
from deep_delta.report.sentences import (
    Summary,
    common_reference,
    conclusions,
    interval_name,
    judged_loss,
    judged_split,
    judged_text,
)
from deep_delta.report.style import arm_styles
from deep_delta.report.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REPORT_NAME = "report.html"
TITLE = "Trainings compared"

_LOSS_CHARTS: dict[str, tuple[Axis, str]] = {
    "loss-vs-tokens": ("tokens", "Loss against tokens"),
    "loss-vs-flops": ("flops", "Loss against FLOPs"),
    "loss-vs-time": ("seconds", "Loss against wall-clock training time"),
}


def write_report(summary: Summary, curves: Curves, out_dir: Path) -> Path:
    """Write ``report.html`` and its charts (PNG, SVG) into ``out_dir``; return the page's path.

    ``curves`` are rows of metrics.jsonl by arm and seed, of the runs that are reported.
    "differences" is drawn only where there are contrasts, "rates" after a search, "curve" where
    the baseline was trained for several lengths. Raises UserError, before anything is written, if
    matplotlib is not installed.
    """
    charts = _charts(summary, curves)
    sections = [
        _headline(summary),
        parts.section("Results", _tables(arms_table(summary), fields_table(summary))),
        parts.section("Differences", _differences(summary, charts.get("differences"))),
        parts.section("Losses", _loss_figures(summary, curves, charts)),
    ]
    if "rates" in charts:
        sections.append(parts.section("Learning rates", _rates_figure(summary, charts["rates"])))
    if "curve" in charts:
        content = _curve_figure(summary, charts["curve"]) + _tables(costs_table(summary))
        sections.append(parts.section("Costs for the same loss", content))
    if summary["speed"] is not None:
        sections.append(parts.section("Speed", _tables(speed_table(summary))))
    sections += [
        parts.section("Every run", _runs(summary)),
        parts.section("How it was run", _provenance(summary)),
        parts.section("How to read this", parts.bullets(_caveats(summary))),
    ]
    out_dir.mkdir(parents=True, exist_ok=True)
    for name, chart in charts.items():
        render.save(chart, out_dir, name)
    path = out_dir / REPORT_NAME
    path.write_text(whole_page(TITLE, "\n".join(sections)), encoding="utf-8")
    return path


def _charts(summary: Summary, curves: Curves) -> "dict[str, Figure]":
    """The charts that the summary has numbers for, by the names of their files."""
    styles = arm_styles(entry["arm"] for entry in summary["arms"])
    charts = {
        name: plots.loss_curves(curves, axis, styles) for name, (axis, _) in _LOSS_CHARTS.items()
    }
    if summary["contrasts"]:
        charts["differences"] = _forest(summary, styles)
    if summary["rates"]:
        charts["rates"] = search_plots.rate_curves(summary["rates"], _rate_key(summary), styles)
    if summary["curve"]:
        points = [
            {**cost, "loss": judged_loss(summary, cost["arm"])}
            for cost in summary["costs"]
            if cost["arm"] != summary["baseline"]
        ]
        name = f"{judged_split(summary)} loss (nats/token)"
        charts["curve"] = search_plots.baseline_curve(
            summary["curve"], points, summary["baseline"], name, styles
        )
    return charts


def _forest(summary: Summary, styles: Styles) -> "Figure":
    reference = common_reference(summary)
    labelled = [
        {**contrast, "label": contrast_name(contrast) if reference is None else contrast["arm"]}
        for contrast in summary["contrasts"]
    ]
    against = "" if reference is None else f" to {reference}"
    measured = f"difference in {judged_split(summary)} loss{against} (nats/token)"
    return plots.forest_plot(labelled, measured, interval_name(summary), styles)


def _rate_key(summary: Summary) -> dict[str, str]:
    """What to write of each arm of the search."""
    searched = {rate["arm"] for rate in summary["rates"]}
    return {
        entry["arm"]: f"{entry['arm']}: {numbers.learning_rate(entry['lr'])}"
        + (f" ({entry['edge']} tried)" if entry["edge"] else "")
        for entry in summary["arms"]
        if entry["arm"] in searched
    }


def _headline(summary: Summary) -> str:
    verdicts = [contrast["verdict"] for contrast in summary["contrasts"]]
    items = []
    for sentence, verdict in zip_longest(conclusions(summary), verdicts):
        mark = f' class="{verdict}"' if verdict in ("lower", "higher") else ""
        items.append(f"<li{mark}>{escape(sentence)}</li>")
    found = f'<ul class="conclusions">\n{"".join(items)}\n</ul>' if items else ""
    scope = f"{len(summary['arms'])} arms, {len(summary['runs'])} runs, one recipe."
    against = f" Baseline: {summary['baseline']}." if summary["baseline"] else " No baseline."
    said = f"{scope}{against} Loss in nats per token: lower is better. {judged_text(summary)}"
    return f'<header>\n<h1>{TITLE}</h1>\n<p class="quiet">{escape(said)}</p>\n{found}\n</header>'


def _tables(*tables: Table | None) -> str:
    """Those that there are, one below the other."""
    return "\n".join(
        parts.table(table.caption, table.names, table.rows, table.words)
        for table in tables
        if table is not None
    )


def _differences(summary: Summary, forest: "Figure | None") -> str:
    if forest is None:
        return "<p>No differences: nothing was run to compare with.</p>"
    title = f"Differences in {judged_split(summary)} loss"
    caption = (
        f"Bar: {interval_name(summary)}. The verdicts are Holm's, which decides a little more: the "
        "bar of a decided difference may reach over zero. Hollow marker: fewer than three seeds, "
        "no interval."
    )
    drawing = render.inline_svg(forest, "differences", title, " ".join(conclusions(summary)))
    return parts.figure(drawing, title, caption, narrow=True) + _tables(contrasts_table(summary))


def _loss_figures(summary: Summary, curves: Curves, charts: "dict[str, Figure]") -> str:
    drawn = []
    for name, (axis, title) in _LOSS_CHARTS.items():
        ends = []
        for arm, runs in curves.items():
            curve = over_seeds(runs, axis, "val_loss")
            last = f"{curve.mean[-1]:.4f}" if len(curve.mean) else "no finite evaluation"
            ends.append(f"{arm} {last}")
        description = "Last validation loss, mean over seeds: " + "; ".join(ends) + "."
        drawing = render.inline_svg(charts[name], name, title, description)
        drawn.append(parts.figure(drawing, title, f"{title}.", narrow=True))
    said = (
        "The scale fits the later part of the training, where the arms can be told apart; the "
        "steep start leaves the view at the top. The keys are in the order of the last loss."
    )
    return f'<p class="quiet">{said}</p>\n<div class="charts">\n{"".join(drawn)}\n</div>'


def _rates_figure(summary: Summary, figure: "Figure") -> str:
    title = "Validation loss over the peak learning rate"
    caption = (
        "Each point is a mean over the seeds of the search. A chosen rate at the edge of what was "
        "tried says that the best one may lie beyond it."
    )
    description = "Chosen rates: " + "; ".join(_rate_key(summary).values()) + "."
    drawing = render.inline_svg(figure, "rates", title, description)
    return parts.figure(drawing, title, caption, narrow=True)


def _curve_figure(summary: Summary, figure: "Figure") -> str:
    title = f"What {summary['baseline']} reaches with more or fewer tokens"
    caption = (
        "Every point of the line is a whole training, its schedule included. Right of the line an "
        "arm needs more tokens than the baseline for the same loss, left of it fewer."
    )
    reached = "; ".join(
        f"{numbers.with_prefix(point['tokens'])} tokens {numbers.measured(point['loss'], None, 4)}"
        for point in summary["curve"]
    )
    drawing = render.inline_svg(figure, "curve", title, f"The baseline's loss: {reached}.")
    return parts.figure(drawing, title, caption, narrow=True)


def _runs(summary: Summary) -> str:
    """The reported runs, and those before them folded away."""
    reported = [run for run in summary["runs"] if run["purpose"] == "reported"]
    others = [run for run in summary["runs"] if run["purpose"] != "reported"]
    shown = _tables(runs_table(summary, reported, "One line per training whose loss is reported."))
    if not others:
        return shown
    table = _tables(runs_table(summary, others, "One line per training."))
    said = "one more training" if len(others) == 1 else f"{len(others):,} more trainings"
    return (
        f"{shown}\n<details>\n<summary>{said}, for rates and the baseline's curve</summary>\n"
        f"{table}\n</details>"
    )


def _provenance(summary: Summary) -> str:
    recipe = (
        "Recipe, the same for every arm but for what the arm sets",
        parts.assignments(summary["recipe"]),
    )
    return parts.facts([*parts.provenance(summary), recipe])


def _caveats(summary: Summary) -> list[str]:
    level = f"{100 * summary['level']:g} %"
    points = [
        "“Within noise” means that these seeds cannot tell the two apart. It does not show that "
        "they are equal. “Seeds would decide” is how many it takes for the interval of a "
        "difference as large as the one seen to leave out zero; if it is the true one, so many "
        "seeds find it about every second time.",
        "Intervals and verdicts are about all contrasts at once: if no arm differed, about "
        f"{level} of such comparisons would call none of them lower or higher.",
        "A loss is taken as arm + seed + residual, and differences are means over the seeds "
        "that both arms have. Residuals of all arms together make their deviation; an "
        "arm whose own residuals are larger is judged by those. Runs that diverged, and the "
        "other runs of their arm, have no part in it.",
        "Student's t is over seeds of one recipe on one data set. It says nothing about another "
        "size, a longer training or other data.",
        _tokens_caveat(summary),
        "Tokens per second, training time and peak memory were measured on the machine named "
        "above, and will differ on another.",
        _rates_caveat(summary),
    ]
    if summary["costs"]:
        points.append(
            f"Ratios of costs: {HOW_TO_READ_COSTS}, 0.90 that it costs 10 % less. The "
            "baseline's tokens are read off between its trainings, and a loss beyond all of them "
            "has no number."
        )
    return points


def _tokens_caveat(summary: Summary) -> str:
    whole = [run for run in summary["runs"] if not run["diverged"]]
    tokens = {run["tokens"] for run in whole if run["purpose"] == "reported"}
    if len(tokens) > 1:
        return (
            "Runs saw different numbers of tokens (see “Every run”), so differences are not those "
            "at equal tokens."
        )
    return (
        "Every arm saw the same number of tokens. An arm with fewer tokens per second took "
        "longer for them: an equal-token comparison is not an equal-time comparison, so look at "
        "the charts against FLOPs and wall-clock as well."
    )


def _rates_caveat(summary: Summary) -> str:
    if not summary["rates"]:
        return (
            "No learning rate was searched: each arm has the recipe's or the one it was given, and "
            "another recipe may favour another arm."
        )
    tries = {entry["tries"] for entry in summary["arms"]}
    uneven = (
        " Arms had different numbers of tries, and more tries find a better rate."
        if len(tries) > 1
        else ""
    )
    return (
        "Learning rates were searched for each arm, everything else is the recipe's: another "
        f"recipe may favour another arm.{uneven}"
    )
