"""Charts from plain data: loss curves and a forest plot of contrasts.

Each function returns a matplotlib Figure that belongs to no global state;
`deep_delta.report.render` saves it. matplotlib is imported on the first call.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from deep_delta.report import numbers
from deep_delta.report.curves import (
    Axis,
    Curves,
    SeedCurve,
    diverged,
    over_seeds,
    smoothed,
    spread_apart,
)
from deep_delta.report.render import in_house_style, new_figure
from deep_delta.report.style import INK, variant_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 6.6  # inches; the report shows it up to about twice that
FONT_SIZE = 9.0  # points
SMALL_SIZE = 7.5
MARKER_SIZE = 4.5
_LABEL_X = 1.05  # fraction of the axes' width
_CHARACTER = 0.6 * FONT_SIZE / 72  # inches: a generous mean width, so that labels are never cut
_LINE = 1.45 * FONT_SIZE / 72  # inches from one label to the next

# A training falls by several nats at first while the variants differ by hundredths: the view is
# scaled to what each line does after this share of its run, and the early fall leaves at the top.
_VIEW_FROM = 0.4

_KEY = "line: validation, mean over seeds; band: lowest to highest seed; faint: training, smoothed"


@in_house_style
def loss_curves(curves: Curves, x: Axis) -> "Figure":
    """Validation loss (line, marker, min-max band over seeds) and faint smoothed training loss.

    ``x`` is "tokens" or "seconds" (wall-clock training time). Each line is labelled at its end.
    """
    validation = {name: over_seeds(runs, x, "val_loss") for name, runs in curves.items()}
    labels = {
        name: variant_style(name).label + (" (diverged)" if diverged(runs) else "")
        for name, runs in curves.items()
    }
    right = 0.55 + _CHARACTER * max((len(label) for label in labels.values()), default=0)
    below, above = 0.52, 0.3
    plot_height = max(3.0, _LINE * len(labels))
    figure, axes = new_figure(WIDTH, plot_height + below + above, (0.72, right, below, above))
    drawn = {name: curve for name, curve in validation.items() if len(curve.x)}
    scale, unit = _x_unit(x, max((float(c.x.max()) for c in drawn.values()), default=0.0))
    axes.set_xlabel(unit)
    axes.set_ylabel("loss (nats/token)")
    axes.text(0.0, 1.03, _KEY, transform=axes.transAxes, va="bottom", size=SMALL_SIZE, color=INK)
    if not drawn:
        axes.text(0.5, 0.5, "no evaluation with a finite loss", ha="center", color=INK)
        return figure
    for name, curve in drawn.items():
        _draw_training(axes, curves[name], x, scale, variant_style(name).colour)
        _draw_validation(axes, name, curve, scale)
    _set_view(axes, list(drawn.values()), scale)
    _label_ends(
        axes, {labels[name]: (name, curve) for name, curve in drawn.items()}, scale, plot_height
    )
    return figure


def _x_unit(x: Axis, largest: float) -> tuple[float, str]:
    """Divisor and axis label that keep the tick labels short."""
    if x == "tokens":
        steps = [(1e9, "billions"), (1e6, "millions"), (1e3, "thousands")]
        for size, word in steps:
            if largest >= 2 * size:
                return size, f"training tokens ({word})"
        return 1.0, "training tokens"
    for size, word, least in [(3600.0, "hours", 3 * 3600.0), (60.0, "minutes", 600.0)]:
        if largest >= least:
            return size, f"wall-clock training time ({word})"
    return 1.0, "wall-clock training time (seconds)"


def _draw_training(
    axes: "Axes", runs: Mapping[int, Sequence[Any]], x: Axis, scale: float, colour: str
) -> None:
    curve = over_seeds(runs, x, "loss")
    if len(curve.x):
        xs, ys = smoothed(curve.x / scale, curve.mean)
        axes.plot(xs, ys, color=colour, alpha=0.35, linewidth=0.8, zorder=1)


def _draw_validation(axes: "Axes", name: str, curve: SeedCurve, scale: float) -> None:
    style = variant_style(name)
    xs = curve.x / scale
    axes.fill_between(
        xs, curve.low, curve.high, color=style.colour, alpha=0.18, linewidth=0, zorder=2
    )
    axes.plot(
        xs,
        curve.mean,
        color=style.colour,
        linestyle=style.dash,
        linewidth=1.6,
        marker=style.marker,
        markersize=MARKER_SIZE,
        markevery=max(1, len(xs) // 12),
        zorder=3,
    )


def _set_view(axes: "Axes", drawn: Sequence[SeedCurve], scale: float) -> None:
    end = max(float(curve.x.max()) for curve in drawn)
    highs, lows = [], []
    for curve in drawn:
        late = curve.x >= _VIEW_FROM * curve.x[-1]
        highs.append(float(curve.high[late].max()))
        lows.append(float(curve.low[late].min()))
    bottom, top = min(lows), max(highs)
    margin = 0.06 * (top - bottom) or 0.05 * abs(top) or 1.0
    axes.set_ylim(bottom - margin, top + margin)
    axes.set_xlim(0.0, 1.02 * end / scale)


def _label_ends(
    axes: "Axes", ends: Mapping[str, tuple[str, SeedCurve]], scale: float, plot_height: float
) -> None:
    """Write each label right of the axes, joined to the end of its line, none over another."""
    bottom, top = axes.get_ylim()
    heights = [(float(curve.mean[-1]) - bottom) / (top - bottom) for _, curve in ends.values()]
    positions = spread_apart(heights, _LINE / plot_height)
    for (label, (name, curve)), height in zip(ends.items(), positions, strict=True):
        style = variant_style(name)
        axes.annotate(
            "",
            xy=(float(curve.x[-1]) / scale, float(curve.mean[-1])),
            xytext=(_LABEL_X, height),
            textcoords="axes fraction",
            annotation_clip=False,
            zorder=1.5,
            arrowprops={
                "arrowstyle": "-",
                "color": style.colour,
                "linewidth": 0.7,
                "alpha": 0.6,
                "shrinkA": 0.0,
                "shrinkB": 0.0,
            },
        )
        # The marker once more, because the joining lines of early finishers cross other lines.
        axes.plot(
            [_LABEL_X],
            [height],
            transform=axes.transAxes,
            clip_on=False,
            color=style.colour,
            marker=style.marker,
            markersize=MARKER_SIZE,
        )
        axes.text(_LABEL_X + 0.02, height, label, transform=axes.transAxes, va="center", color=INK)


@in_house_style
def forest_plot(contrasts: Sequence[Mapping[str, Any]], baseline: str, interval: str) -> "Figure":
    """Contrasts of validation losses with ``baseline`` and their intervals, one a line.

    ``contrasts`` are those of a summary, ``interval`` is what their intervals are called. A hollow
    marker is a difference without an interval; a diverged one has no marker, only its text.
    """
    names = [contrast["arm"] for contrast in contrasts]
    texts = [numbers.difference_with_interval(contrast) for contrast in contrasts]
    left = 0.2 + _CHARACTER * max((len(name) for name in names), default=0)
    right = 0.25 + _CHARACTER * max((len(text) for text in texts), default=0)
    below, above = 0.52, 0.3
    height = 0.36 * max(2, len(names))
    width = max(WIDTH, left + right + 2.6)
    figure, axes = new_figure(width, height + below + above, (left, right, below, above))
    axes.axvline(0.0, color=INK, linewidth=1.1, zorder=1)
    for line, contrast in enumerate(contrasts):
        _draw_difference(axes, line, contrast)
        axes.annotate(
            texts[line], (1.03, line), xycoords=("axes fraction", "data"), va="center", color=INK
        )
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    reach = _reach(contrasts)
    axes.set_xlim(-reach, reach)
    axes.locator_params(axis="x", nbins=5)
    axes.set_xlabel(f"difference in val loss to {baseline} (nats/token), {interval}")
    for position, side, text in ((0.0, "left", "lower is better"), (1.0, "right", "worse")):
        arrow = f"\u2190 {text}" if side == "left" else f"{text} \u2192"
        axes.text(position, 1.03, arrow, transform=axes.transAxes, ha=side, va="bottom", color=INK)
    return figure


def _draw_difference(axes: "Axes", line: int, contrast: Mapping[str, Any]) -> None:
    if not numbers.is_finite(contrast["mean"]):
        return
    style = variant_style(contrast["arm"])
    ends = [contrast["bonferroni_low"], contrast["bonferroni_high"]]
    certain = None not in ends
    if certain:
        axes.plot(ends, [line, line], color=style.colour, linewidth=2.4)
    axes.plot(
        [contrast["mean"]],
        [line],
        linestyle="none",
        marker=style.marker,
        markersize=7.5,
        color=style.colour,
        markerfacecolor=style.colour if certain else "none",
        zorder=3,
    )


def _reach(contrasts: Sequence[Mapping[str, Any]]) -> float:
    """Half-width of a view symmetric about zero, so that both directions weigh the same."""
    keys = ("mean", "bonferroni_low", "bonferroni_high")
    values = (contrast[key] for contrast in contrasts for key in keys)
    largest = max((abs(value) for value in values if numbers.is_finite(value)), default=0.0)
    return 1.12 * largest or 0.01
