"""Charts of a comparison from plain data: its frame, and loss curves.

Each function returns a matplotlib Figure that belongs to no global state;
`deep_delta.report.render` saves it. matplotlib is imported on the first call. Charts are as wide
as a phone, where their text is legible as it is: what does not fit into the axes stands in a key
below them.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from deep_delta.report import numbers
from deep_delta.report.curves import Axis, Curves, SeedCurve, diverged, over_seeds, smoothed
from deep_delta.report.render import in_house_style, new_figure
from deep_delta.report.style import INK, VariantStyle

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PHONE_WIDTH = 4.4  # inches: legible at the width of a phone
FONT_SIZE = 9.0  # points
SMALL_SIZE = 7.5
MARKER_SIZE = 4.5
CHARACTER = 0.6 * FONT_SIZE / 72  # inches: a generous mean width, so that labels are never cut
LINE = 1.45 * FONT_SIZE / 72  # inches from one line of text to the next

_LEFT, _RIGHT = 0.74, 0.14  # inches beside the axes
_X_LABEL, _LEGEND_HEIGHT = 0.62, 0.42  # inches below and above the axes
_SAMPLE = (0.12, 0.5)  # inches: where a key's piece of line begins and ends
_KEY_LEFT = 0.62  # inches: where its text begins
_KEY_CHARACTERS = int((PHONE_WIDTH - _KEY_LEFT - 0.05) / CHARACTER)
_AXES_HEIGHT = 2.7  # inches

# A training falls by several nats at first while the arms differ by hundredths: the view is
# scaled to what each line does after this share of its run, and the early fall leaves at the top.
_VIEW_FROM = 0.4

_LEGEND = (
    "line: validation, mean over seeds; band: lowest to\nhighest seed; faint: training, smoothed"
)

Styles = Mapping[str, VariantStyle]
Key = Sequence[tuple[str, VariantStyle]]


def wrapped(label: str, characters: int) -> list[str]:
    """The lines of a label of any length; at least one."""
    return textwrap.wrap(label, characters) or [""]


def keyed_figure(key: Key, legend: str) -> "tuple[Figure, Axes]":
    """A figure as wide as a phone with one axes, a legend (two lines) above and a key below.

    The key has a piece of line with its marker for each (label, style), in this order.
    """
    from matplotlib.lines import Line2D

    labels = [wrapped(label, _KEY_CHARACTERS) for label, _ in key]
    at = LINE * sum(map(len, labels))  # inches from the bottom, falling
    below = at + _X_LABEL
    height = _AXES_HEIGHT + below + _LEGEND_HEIGHT
    figure, axes = new_figure(PHONE_WIDTH, height, (_LEFT, _RIGHT, below, _LEGEND_HEIGHT))
    axes.text(1.0, 1.02, legend, transform=axes.transAxes, ha="right", va="bottom", size=SMALL_SIZE)
    for lines, (_, style) in zip(labels, key, strict=True):
        middle = (at - LINE / 2) / height
        start, end = (inches / PHONE_WIDTH for inches in _SAMPLE)
        look: dict[str, Any] = {"color": style.colour, "transform": figure.transFigure}
        dash: Any = style.dash  # matplotlib's types want the word itself
        figure.add_artist(Line2D([start, end], [middle] * 2, linestyle=dash, **look))
        figure.add_artist(
            Line2D([(start + end) / 2], [middle], marker=style.marker, markersize=6, **look)
        )
        for line in lines:
            figure.text(_KEY_LEFT / PHONE_WIDTH, (at - LINE / 2) / height, line, va="center")
            at -= LINE
    return figure, axes


@in_house_style
def loss_curves(curves: Curves, x: Axis, styles: Styles) -> "Figure":
    """Validation loss (line, marker, min-max band over seeds) and faint smoothed training loss.

    ``x`` is "tokens", "flops" or "seconds" (wall-clock training time), ``styles`` has one for
    every arm of ``curves``. The key is in the order in which the lines end, with where they do.
    """
    validation = {name: over_seeds(runs, x, "val_loss") for name, runs in curves.items()}
    drawn = {name: curve for name, curve in validation.items() if len(curve.x)}
    ends = {name: float(curve.mean[-1]) for name, curve in drawn.items()}
    key = [
        (_key_label(name, ends.get(name), diverged(curves[name])), styles[name])
        for name in sorted(curves, key=lambda name: -ends.get(name, -math.inf))
    ]
    figure, axes = keyed_figure(key, _LEGEND)
    scale, unit = _x_unit(x, max((float(c.x.max()) for c in drawn.values()), default=0.0))
    axes.set_xlabel(unit)
    axes.set_ylabel("loss (nats/token)")
    if not drawn:
        axes.text(
            0.5, 0.5, "no evaluation with a finite loss", ha="center", transform=axes.transAxes
        )
        return figure
    for name, curve in drawn.items():
        _draw_training(axes, curves[name], x, scale, styles[name].colour)
        _draw_validation(axes, curve, scale, styles[name])
    _set_view(axes, list(drawn.values()), scale)
    return figure


def _key_label(name: str, end: float | None, has_diverged: bool) -> str:
    last = "no finite evaluation" if end is None else f"{end:.4f}"
    return f"{name}: {last}" + (" (diverged)" if has_diverged else "")


def _x_unit(x: Axis, largest: float) -> tuple[float, str]:
    """Divisor and axis label that keep the tick labels short."""
    if x == "tokens":
        for size, word in [(1e9, "billions"), (1e6, "millions"), (1e3, "thousands")]:
            if largest >= 2 * size:
                return size, f"training tokens ({word})"
        return 1.0, "training tokens"
    if x == "flops":
        power = 3 * int(math.log10(largest) // 3) if largest >= 1000 else 0
        raised = str(power).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))
        return 10.0**power, f"training FLOPs (10{raised})" if power else "training FLOPs"
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


def _draw_validation(axes: "Axes", curve: SeedCurve, scale: float, style: VariantStyle) -> None:
    xs = curve.x / scale
    look: dict[str, Any] = {"color": style.colour, "zorder": 3}
    axes.fill_between(
        xs, curve.low, curve.high, color=style.colour, alpha=0.18, linewidth=0, zorder=2
    )
    axes.plot(
        xs, curve.mean, linestyle=style.dash, linewidth=1.6, marker=style.marker,
        markersize=MARKER_SIZE, markevery=max(1, len(xs) // 12), **look,
    )  # fmt: skip
    # The end always has its marker, because the key goes by the ends.
    axes.plot(xs[-1:], curve.mean[-1:], marker=style.marker, markersize=6, **look)


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


@in_house_style
def forest_plot(
    contrasts: Sequence[Mapping[str, Any]], measured: str, interval: str, styles: Styles
) -> "Figure":
    """Contrasts and their intervals, each under its label and its numbers.

    ``contrasts`` are those of a summary, each with a "label"; ``measured`` says what they are and
    ``interval`` what their intervals are called. A hollow marker is a difference without an
    interval; a diverged one has no marker, only its text.
    """
    side = 0.15  # inches left and right
    characters = int((PHONE_WIDTH - 2 * side) / CHARACTER)
    blocks = [_over_a_bar(contrast, characters) for contrast in contrasts]
    tops = [0.0]  # inches from the top of the axes, and where the last block ends
    for lines in blocks:
        tops.append(tops[-1] + LINE * len(lines) + 0.34)
    unit = [*wrapped(measured, characters), interval]
    below, above = 0.4 + LINE * len(unit), 0.3
    figure, axes = new_figure(PHONE_WIDTH, tops[-1] + below + above, (side, side, below, above))
    reach = _reach(contrasts)
    axes.set_xlim(-reach, reach)
    axes.set_ylim(tops[-1], 0.0)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.locator_params(axis="x", nbins=5)
    axes.set_xlabel("\n".join(unit))
    for contrast, lines, top in zip(contrasts, blocks, tops, strict=False):
        bar = top + 0.06 + LINE * len(lines) + 0.1
        for number, (left, right) in enumerate(lines):
            place: dict[str, Any] = {
                "xycoords": ("axes fraction", "data"),
                "va": "center",
                "color": INK,
            }
            height = top + 0.06 + LINE * (number + 0.5)
            axes.annotate(left, (0.0, height), ha="left", **place)
            axes.annotate(right, (1.0, height), ha="right", **place)
        axes.plot([0.0, 0.0], [bar - 0.09, bar + 0.09], color=INK, linewidth=1.1, zorder=1)
        _draw_difference(axes, bar, contrast, styles[contrast["arm"]])
    for position, where, text in (
        (0.0, "left", "\u2190 lower is better"),
        (1.0, "right", "worse \u2192"),
    ):
        axes.text(position, 1.0, text, transform=axes.transAxes, ha=where, va="bottom", color=INK)
    return figure


def _over_a_bar(contrast: Mapping[str, Any], characters: int) -> list[tuple[str, str]]:
    """Lines of (label, numbers): the numbers beside the label's last line if they fit, or below."""
    text = numbers.difference_with_interval(contrast)
    lines = [(line, "") for line in wrapped(contrast["label"], characters)]
    if len(lines[-1][0]) + len(text) + 2 <= characters:
        return [*lines[:-1], (lines[-1][0], text)]
    return [*lines, ("", text)]


def _draw_difference(
    axes: "Axes", line: float, contrast: Mapping[str, Any], style: VariantStyle
) -> None:
    if not numbers.is_finite(contrast["mean"]):
        return
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
