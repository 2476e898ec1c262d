"""``report.html``: the comparison as one self-contained page, and its charts as files."""

from html import escape
from itertools import zip_longest
from pathlib import Path
from typing import Any

from deep_delta.report import numbers, parts, plots, render
from deep_delta.report.curves import Axis, Curves, over_seeds
from deep_delta.report.page import whole_page
from deep_delta.report.table import (
    Summary,
    column_names,
    conclusions,
    interval_name,
    judged_by,
    summary_rows,
)

REPORT_NAME = "report.html"

_TEXT_COLUMNS = {"variant", "verdict", "directory"}


def write_report(summary: Summary, curves: Curves, out_dir: Path) -> Path:
    """Write ``report.html`` and its charts (PNG, SVG) into ``out_dir``; return the page's path.

    ``differences`` is drawn only where there are contrasts. Raises
    UserError, before anything is written, if matplotlib is not installed.
    """
    tokens = plots.loss_curves(curves, "tokens")
    seconds = plots.loss_curves(curves, "seconds")
    sections = [
        _headline(summary),
        parts.section("Results", _results_table(summary)),
        parts.section("Loss against tokens", _curve_figure(tokens, curves, "tokens")),
        parts.section("Loss against wall-clock", _curve_figure(seconds, curves, "seconds")),
    ]
    out_dir.mkdir(parents=True, exist_ok=True)
    render.save(tokens, out_dir, "loss-vs-tokens")
    render.save(seconds, out_dir, "loss-vs-time")
    if summary["contrasts"]:
        interval = interval_name(summary)
        forest = plots.forest_plot(summary["contrasts"], summary["baseline"], interval)
        render.save(forest, out_dir, "differences")
        content = _forest_figure(forest, summary)
    else:
        content = "<p>No differences: the baseline was not run, or it was run alone.</p>"
    sections += [
        parts.section("Differences", content),
        parts.section("Every run", _runs_table(summary)),
        parts.section("How it was run", _provenance(summary)),
        parts.section("How to read this", _caveats(summary)),
    ]
    page = whole_page("Residual variants compared", "\n".join(sections))
    path = out_dir / REPORT_NAME
    path.write_text(page, encoding="utf-8")
    return path


def _headline(summary: Summary) -> str:
    variants = summary["variants"]
    verdicts = [contrast["verdict"] for contrast in summary["contrasts"]]
    items = []
    for sentence, verdict in zip_longest(conclusions(summary), verdicts):
        mark = f' class="{verdict}"' if verdict in ("lower", "higher") else ""
        items.append(f"<li{mark}>{escape(sentence)}</li>")
    found = f'<ul class="conclusions">\n{"".join(items)}\n</ul>' if items else ""
    scope = f"{len(variants)} variants, {len(summary['runs'])} runs, one recipe."
    against = f" Baseline: {summary['baseline']}." if summary["baseline"] else " No baseline."
    return (
        "<header>\n<h1>Residual variants compared</h1>\n"
        f'<p class="quiet">{escape(scope + against)} Validation loss: lower is better.</p>\n'
        f"{found}\n</header>"
    )


def _results_table(summary: Summary) -> str:
    caption = (
        "Mean ± standard deviation over n seeds; perplexity is that of the mean loss; FLOPs "
        f"forward and backward. {judged_by(summary)}"
    ).rstrip()
    return parts.table(caption, column_names(summary), summary_rows(summary), _TEXT_COLUMNS)


def _runs_table(summary: Summary) -> str:
    names = ["variant", "seed", "val loss", "training time", "tokens", "tokens/s"]
    rows = [
        [
            str(run["variant"]),
            str(run["seed"]),
            numbers.measured(run["val_loss"], None, 4),
            numbers.duration(run["train_seconds"]),
            f"{run['tokens']:,}",
            numbers.rate(run["tokens_per_s"]),
            numbers.memory(run["peak_memory_bytes"]),
            str(run["path"]),
        ]
        for run in summary["runs"]
    ]
    names += ["peak memory", "directory"]
    return parts.table("One line per training run.", names, rows, _TEXT_COLUMNS)


def _curve_figure(figure: Any, curves: Curves, x: Axis) -> str:
    title = "Loss against " + ("tokens" if x == "tokens" else "wall-clock training time")
    ends = []
    for name, runs in curves.items():
        curve = over_seeds(runs, x, "val_loss")
        last = f"{curve.mean[-1]:.4f}" if len(curve.mean) else "no finite evaluation"
        ends.append(f"{name} {last}")
    description = "Last validation loss, mean over seeds: " + "; ".join(ends) + "."
    caption = (
        "The scale fits the later part of the training, where the variants can be told apart; the "
        "steep start leaves the view at the top."
    )
    drawing = render.inline_svg(figure, f"loss-{x}", title, description)
    return parts.figure(drawing, title, caption)


def _forest_figure(figure: Any, summary: Summary) -> str:
    title = f"Differences in validation loss to {summary['baseline']}"
    caption = (
        f"Bar: {interval_name(summary)}. The verdicts are Holm's, which decides a little more: the "
        "bar of a decided difference may reach over zero. Hollow marker: fewer than three seeds, "
        "no interval."
    )
    description = " ".join(conclusions(summary))
    return parts.figure(
        render.inline_svg(figure, "differences", title, description), title, caption
    )


def _provenance(summary: Summary) -> str:
    recipe = ("Recipe, the same for every variant", parts.assignments(summary["recipe"]))
    return parts.facts([*parts.provenance(summary), recipe])


def _caveats(summary: Summary) -> str:
    level = f"{100 * summary['level']:g} %"
    points = [
        "“Within noise” means that these seeds cannot tell the two apart. It does not show that "
        "they are equal. “Seeds would decide” is how many it takes for the interval of a "
        "difference as large as the one seen to leave out zero; if it is the true one, so many "
        "seeds find it about every second time.",
        "Intervals and verdicts are about all contrasts at once: if no variant differed, about "
        f"{level} of such comparisons would call none of them lower or higher.",
        "A loss is taken as variant + seed + residual, and differences are means over the seeds "
        "that both variants have. Residuals of all variants together make their deviation; a "
        "variant whose own residuals are larger is judged by those. Runs that diverged, and the "
        "other runs of their variant, have no part in it.",
        "Student's t is over seeds of one recipe on one data set. It says nothing about another "
        "size, a longer training or other data.",
        "Every variant saw the same number of tokens. A variant with fewer tokens per second took "
        "longer for them: an equal-token comparison is not an equal-time comparison, so look at "
        "the chart against wall-clock as well.",
        "Tokens per second, training time and peak memory were measured on the machine named "
        "above, and will differ on another.",
        "All variants share the recipe above. None had a learning rate of its own, and another "
        "recipe may favour another variant.",
    ]
    return parts.bullets(points)
