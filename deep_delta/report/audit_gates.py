"""The charts of an audit's gates: their distribution, regimes, and what they depend on."""

from collections.abc import Callable, Iterable, Sequence
from statistics import fmean

from deep_delta.report.audit_lines import (
    KINDS,
    Chart,
    Summary,
    colour_of,
    mean,
    place,
    say,
    slug,
)
from deep_delta.report.audit_plots import Line, over_bins, shaded, stacked

SHOWN_GATE_BINS = 40


def gates(summary: Summary) -> Iterable[Chart]:
    names = summary["regimes"]["names"]
    top = summary["gate_bins"]["top"]
    for number, one in enumerate(summary["checkpoints"], start=1):
        suffix = "" if len(summary["checkpoints"]) == 1 else f"-{number}"
        gated = [sublayer for sublayer in one["sublayers"] if sublayer["gate"] is not None]
        if not gated:
            continue
        rows = [place(sublayer) for sublayer in gated]
        cells = [_coarse(sublayer["gate"]["histogram"]) for sublayer in gated]
        labels = ("gate β", "sublayer", f"share of tokens per {top / SHOWN_GATE_BINS:g}")
        ticks = [f"{top * k / 4:g}" for k in range(5)]
        figure = shaded(cells, rows, ticks, labels, max(map(max, cells)), extent=(0.0, float(top)))
        quantiles = "; ".join(
            f"{place(s)} " + "/".join(f"{q:.2f}" for q in s["gate"]["quantiles"].values())
            for s in gated
        )
        title = f"Distribution of the gate β, {one['name']}"
        words = f"10 %, 50 % and 90 % quantiles: {quantiles}."
        yield Chart(f"gate{suffix}", figure, title, words)
        shares = [[mean(s["gate"]["regimes"][name]) for name in names] for s in gated]
        said = "; ".join(
            f"{row}: " + ", ".join(f"{n} {100 * v:.0f} %" for n, v in zip(names, own, strict=True))
            for row, own in zip(rows, shares, strict=True)
        )
        title = f"Gate regimes, {one['name']}"
        yield Chart(
            f"regimes{suffix}", stacked(shares, rows, names, "share of tokens"), title, said + "."
        )


def _coarse(histogram: Sequence[int]) -> list[float]:
    """Shares of tokens in SHOWN_GATE_BINS bins."""
    each, total = len(histogram) // SHOWN_GATE_BINS, sum(histogram)
    return [sum(histogram[i : i + each]) / total for i in range(0, len(histogram), each)]


def _over(layers: Sequence[float | None], of: Callable[[list[float]], float]) -> float | None:
    """`of` the layers' means in a bin; None for a bin that no token fell into."""
    means = [mean for mean in layers if mean is not None]
    return of(means) if means else None


def dependence(summary: Summary) -> Iterable[Chart]:
    """The mean gate of attention and of MLPs by position and by frequency."""
    for key, bins, x_label in (
        ("by_position", summary["positions"], "position in the sequence (tokens)"),
        ("by_frequency", summary["frequencies"], "occurrences of the token per million"),
    ):
        lines = []
        for number, one in enumerate(summary["checkpoints"]):
            for index, kind in enumerate(KINDS):
                own = [s["gate"] for s in one["sublayers"] if s["kind"] == kind and s["gate"]]
                if not own:
                    continue
                columns = [[gate[key][b]["mean"] for gate in own] for b in range(len(bins))]
                many = len(summary["checkpoints"]) > 1
                lines.append(
                    Line(
                        f"{one['name']}, {kind}" if many else kind,
                        range(len(bins)),
                        [_over(column, fmean) for column in columns],
                        [_over(column, min) for column in columns],
                        [_over(column, max) for column in columns],
                        colour_of(summary, number, kind),
                        index,
                    )
                )
        if lines:
            title = "Gate by " + x_label.partition(" (")[0]
            caption = (
                "Line: mean over layers. Band: lowest to highest layer, not an interval; the "
                "intervals of every layer are in audit.json."
            )
            said = f"Bins {', '.join(bins)}. " + say(lines).replace("depth", "bins")
            figure = over_bins(lines, bins, x_label, "mean gate β")
            yield Chart(slug("gate " + key), figure, title, said, caption)
