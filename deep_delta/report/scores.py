"""A dot chart of task accuracies with their uncertainty, beside reported numbers."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from deep_delta.report import numbers
from deep_delta.report.plots import PHONE_WIDTH, SMALL_SIZE
from deep_delta.report.render import in_house_style, new_figure
from deep_delta.report.style import INK, variant_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Z_95 = 1.96
_APART = 0.17  # of a line: ours above the reported one


@in_house_style
def score_chart(
    tasks: Sequence[Mapping[str, Any]], average: Mapping[str, Any], variant: str
) -> "Figure":
    """One line a task and one for the mean, in the colour of ``variant``; values in per cent.

    ``tasks`` have label, shown, the shown metric and its standard error, paper and chance;
    ``average`` has mean, stderr and paper. Bars are ± 1.96 standard errors.
    """
    lines = [
        (
            task["label"],
            task[task["shown"]],
            task[f"{task['shown']}_stderr"],
            task["paper"],
        )
        for task in tasks
    ]
    lines.append(("mean", average["mean"], average["stderr"], average["paper"]))
    below, above = 0.52, 0.34
    figure, axes = new_figure(
        PHONE_WIDTH, 0.36 * len(lines) + below + above, (1.15, 0.2, below, above)
    )
    for line, (_, value, stderr, paper) in enumerate(lines):
        _draw(axes, line, value, stderr, paper, variant)
    for line, task in enumerate(tasks):
        axes.plot([task["chance"]] * 2, [line - 0.3, line + 0.3], color=INK, linewidth=1)
    axes.axhline(len(tasks) - 0.5, color=INK, linewidth=0.7)
    axes.set_yticks(range(len(lines)), [line[0] for line in lines])
    axes.set_ylim(len(lines) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    axes.set_xlim(0, 100)
    axes.set_xlabel("accuracy (%), 95 % CI over examples")
    beside = any(line[3] is not None for line in lines)
    key = f"filled: {variant}" + ("; hollow: the paper's" if beside else "") + "; tick: guessing"
    axes.text(0.0, 1.02, key, transform=axes.transAxes, va="bottom", size=SMALL_SIZE, color=INK)
    return figure


def _draw(
    axes: "Axes", line: int, value: float, stderr: float | None, paper: float | None, variant: str
) -> None:
    style = variant_style(variant)
    own = line - _APART if paper is not None else float(line)
    if stderr is not None and numbers.is_finite(stderr):
        reach = [max(0.0, value - Z_95 * stderr), min(100.0, value + Z_95 * stderr)]
        axes.plot(reach, [own, own], color=style.colour, linewidth=2.2)
    look: dict[str, Any] = {"linestyle": "none", "color": style.colour, "zorder": 3}
    axes.plot([value], [own], marker=style.marker, markersize=7.5, **look)
    if paper is not None:
        axes.plot(
            [paper], [line + _APART], marker="o", markersize=6, markerfacecolor="none", **look
        )
