"""Charts of what went before a comparison: searches of rates, and the baseline's curve."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from deep_delta.report import numbers
from deep_delta.report.plots import CHARACTER, MARKER_SIZE, Styles, keyed_figure
from deep_delta.report.render import in_house_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_AXES_WIDTH = 3.5  # inches, of a keyed figure


@in_house_style
def rate_curves(
    rates: Sequence[Mapping[str, Any]], key: Mapping[str, str], styles: Styles
) -> "Figure":
    """Validation loss over the learning rate, one line per arm; the chosen rate in a ring.

    ``rates`` are those of a summary, ``key`` says what to write of each arm. A rate that diverged
    is a cross at the top edge. The scale fits the rates that are worth looking at: a line may
    leave at the top.
    """
    figure, axes = keyed_figure(
        [(label, styles[arm]) for arm, label in key.items()],
        "ring: the chosen rate; cross at the top: diverged",
    )
    axes.set_xscale("log")
    axes.set_ylabel("val loss (nats/token)")
    axes.set_xlabel("peak learning rate")
    crosses: Counter[float] = Counter()
    for arm in key:
        style = styles[arm]
        own = sorted((rate for rate in rates if rate["arm"] == arm), key=lambda rate: rate["lr"])
        finite = [rate for rate in own if numbers.is_finite(rate["val_loss"])]
        axes.plot(
            [rate["lr"] for rate in finite], [rate["val_loss"] for rate in finite],
            color=style.colour, linestyle=style.dash, linewidth=1.4, marker=style.marker,
            markersize=MARKER_SIZE,
        )  # fmt: skip
        for rate in finite:
            if rate["chosen"]:
                axes.plot(
                    [rate["lr"]], [rate["val_loss"]], marker="o", markersize=11,
                    markerfacecolor="none", color=style.colour,
                )  # fmt: skip
        for rate in own:
            if not numbers.is_finite(rate["val_loss"]):
                # One below the other where several arms diverged at one rate.
                height = 1.0 - 0.05 * crosses[rate["lr"]]
                crosses[rate["lr"]] += 1
                axes.plot(
                    [rate["lr"]], [height], transform=axes.get_xaxis_transform(), marker="x",
                    markersize=6, markeredgewidth=1.8, color=style.colour, clip_on=False,
                )  # fmt: skip
    _view_rates(axes, rates)
    _log_ticks(axes, [rate["lr"] for rate in rates], numbers.learning_rate)
    return figure


def _view_rates(axes: "Axes", rates: Sequence[Mapping[str, Any]]) -> None:
    losses = [rate["val_loss"] for rate in rates if numbers.is_finite(rate["val_loss"])]
    if not losses:
        return
    chosen = [rate["val_loss"] for rate in rates if rate["chosen"] and rate["val_loss"] in losses]
    bottom = min(losses)
    top = min(max(losses), max([bottom + 3 * (median(losses) - bottom), *chosen]))
    margin = 0.1 * (top - bottom) or 0.05 * abs(top) or 1.0
    axes.set_ylim(bottom - margin, top + margin)


@in_house_style
def baseline_curve(
    curve: Sequence[Mapping[str, Any]],
    points: Sequence[Mapping[str, Any]],
    baseline: str,
    loss_name: str,
    styles: Styles,
) -> "Figure":
    """The baseline's loss over the tokens of whole trainings, and the other arms set against it.

    ``curve`` is that of a summary; ``points`` are its costs, each with the arm's "loss". A thin
    line goes from an arm to where the baseline has its loss.
    """
    shown = [point for point in points if numbers.is_finite(point["loss"])]
    key = [(f"{baseline}: whole trainings of several lengths", styles[baseline])]
    key += [(f"{point['arm']}: {point['loss']:.4f}", styles[point["arm"]]) for point in shown]
    figure, axes = keyed_figure(key, "thin line: to where the baseline has the same loss")
    axes.set_xscale("log")
    axes.set_ylabel(loss_name)
    axes.set_xlabel("training tokens")
    style = styles[baseline]
    known = [point for point in curve if numbers.is_finite(point["loss"])]
    axes.plot(
        [point["tokens"] for point in known], [point["loss"] for point in known],
        color=style.colour, linestyle=style.dash, marker=style.marker, markersize=MARKER_SIZE,
    )  # fmt: skip
    for point in shown:
        style = styles[point["arm"]]
        if point["baseline_tokens"] is not None:
            reach = [point["tokens"], point["baseline_tokens"]]
            axes.plot(reach, [point["loss"]] * 2, color=style.colour, linewidth=0.8)
        axes.plot(
            [point["tokens"]], [point["loss"]], marker=style.marker, markersize=7,
            color=style.colour,
        )  # fmt: skip
    axes.margins(x=0.08, y=0.1)
    _log_ticks(axes, [point["tokens"] for point in known], numbers.with_prefix)
    return figure


def _log_ticks(axes: "Axes", values: Sequence[float], words: Callable[[float], str]) -> None:
    """Ticks at the values themselves, as many as have room for their labels."""
    places = sorted(set(values))
    low, high = (math.log(limit) for limit in axes.get_xlim())
    kept: list[float] = []
    for value in places:
        room = CHARACTER * (len(words(value)) + 1) / _AXES_WIDTH * (high - low)
        if not kept or math.log(value) - math.log(kept[-1]) >= room:
            kept.append(value)
    axes.set_xticks(kept, [words(value) for value in kept])
    axes.minorticks_off()
