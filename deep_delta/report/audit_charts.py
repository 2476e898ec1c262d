"""From an audit's summary to its charts: what is drawn, in which section, with which words."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deep_delta.report.audit_plots import Line, over_bins, over_depth, shaded, stacked

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Summary = Mapping[str, Any]
One = Mapping[str, Any]  # a checkpoint of the summary
Entry = Mapping[str, Any]  # n, mean, spread, low, high

SHOWN_GATE_BINS = 40
KINDS = ("attention", "MLP")


@dataclass(frozen=True)
class Chart:
    """A figure, the name of its file, and its words; `description` is read instead of looking."""

    name: str
    figure: "Figure"
    title: str
    description: str
    caption: str = ""


def sections(summary: Summary) -> list[tuple[str, str, list[Chart]]]:
    """(heading, text, charts) of the page, without sections that would be empty."""
    found = [
        (
            "Gate",
            "A write multiplies the discrepancy v − kᵀX by 1 − β. β below 0.1 skips, up to 0.9 "
            "contracts, from 0.9 to 1.1 sets the readout to its target, above 1.1 overshoots, and "
            "above 1.9 the gate is saturated.",
            [*_gates(summary), *_dependence(summary)],
        ),
        (
            "Discrepancy",
            "How far the readout is from its target before and after each write.",
            list(_each(summary, _discrepancy)),
        ),
        (
            "What is written and erased",
            "Sizes relative to ‖X‖ before the write (net: what is left of both), and the cosine of "
            "the net write to X: negative where it takes away more of what is there than it adds.",
            [*_each(summary, _sizes), _joint(summary, "cosine", "cosine of the write to X")],
        ),
        (
            "Size of the state",
            "The root mean square of X's entries after each sublayer, so that states of different "
            "width compare. Audit an additive model beside to see its growth.",
            [_growth(summary)],
        ),
        (
            "Directions",
            "Effective rank: over how many dimensions k spreads over tokens. Overlap: the mean of "
            "(kᵢᵀkⱼ)² of two sublayers on the same token.",
            [
                _joint(summary, "direction_rank", "effective rank of k (dimensions)"),
                *_each(summary, _overlap),
            ],
        ),
        (
            "Value channels",
            "Each channel's share of ‖X‖², how many channels X really uses, and the compressors' "
            "weights.",
            list(_each(summary, _channel_shares, _channel_rank, _compressors)),
        ),
        (
            "Interventions",
            "The change in loss when one sublayer's write is changed and nothing else. Where the "
            "loss rises without the erase, the model relies on erasing.",
            [*_effects(summary), *_each(summary, _channel_effects)],
        ),
    ]
    return [(heading, text, charts) for heading, text, charts in found if charts]


def mean(entry: Entry) -> float:
    """The mean, where there surely is one."""
    return float(entry["mean"])


def place(sublayer: Mapping[str, Any]) -> str:
    """The name of a sublayer, of an intervention's too: "3 MLP"."""
    return f"{sublayer['layer']} {sublayer['kind']}"


def _slug(text: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in text.lower()).strip("-")


def _each(summary: Summary, *draw: Callable[[One, str], Iterable[Chart]]) -> Iterable[Chart]:
    """Charts of each checkpoint by itself; the second gets its number into the file's name."""
    for make in draw:
        for number, one in enumerate(summary["checkpoints"], start=1):
            yield from make(one, "" if len(summary["checkpoints"]) == 1 else f"-{number}")


def _depth(sublayer: Mapping[str, Any]) -> float:
    return sublayer["layer"] + 0.5 * (sublayer["kind"] == KINDS[1])


def _line(
    label: str, sublayers: Sequence[Mapping[str, Any]], entries: Sequence[Any], **look
) -> Line:
    """A line over depth through entries with intervals, plain numbers or None."""
    full = [entry if isinstance(entry, Mapping) else {"mean": entry} for entry in entries]
    return Line(
        label,
        [_depth(sublayer) for sublayer in sublayers],
        [entry["mean"] for entry in full],
        [entry.get("low") for entry in full],
        [entry.get("high") for entry in full],
        **look,
    )


def _say(lines: Sequence[Line]) -> str:
    """The text alternative of lines: every number."""
    said = []
    for line in lines:
        values = ", ".join("none" if y is None else f"{y:.3g}" for y in line.y)
        said.append(f"{line.label}: {values}")
    return "In the order of depth. " + "; ".join(said) + "."


def _by_kind(summary: Summary, rows: str, value: Callable[[Mapping[str, Any]], Any]) -> list[Line]:
    """A line for attention and one for the MLP of each checkpoint that has the value."""
    many = len(summary["checkpoints"]) > 1
    lines = []
    for number, one in enumerate(summary["checkpoints"]):
        for index, kind in enumerate(KINDS):
            own = [row for row in one[rows] if row["kind"] == kind and value(row) is not None]
            label = f"{one['name']}, {kind}" if many else kind
            look = {"colour": number if many else index, "dash": index}
            if own:
                lines.append(_line(label, own, [value(row) for row in own], **look))
    return lines


def _joint(summary: Summary, key: str, label: str) -> Chart:
    lines = _by_kind(summary, "sublayers", lambda sublayer: sublayer[key])
    layers = max(one["layers"] for one in summary["checkpoints"])
    figure = over_depth(lines, label, layers, (0.0, "") if key == "cosine" else None)
    return Chart(_slug(key), figure, label[0].upper() + label[1:], _say(lines))


def _gates(summary: Summary) -> Iterable[Chart]:
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


def _dependence(summary: Summary) -> Iterable[Chart]:
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
                present = [c for c in columns if None not in c]
                places = [b for b, c in enumerate(columns) if None not in c]
                many = len(summary["checkpoints"]) > 1
                lines.append(
                    Line(
                        f"{one['name']}, {kind}" if many else kind,
                        places,
                        [sum(c) / len(c) for c in present],
                        [min(c) for c in present],
                        [max(c) for c in present],
                        number if many else index,
                        index,
                    )
                )
        if lines:
            title = "Gate by " + x_label.partition(" (")[0]
            caption = (
                "Line: mean over layers. Band: lowest to highest layer, not an interval; the "
                "intervals of every layer are in audit.json."
            )
            said = f"Bins {', '.join(bins)}. " + _say(lines).replace("depth", "bins")
            figure = over_bins(lines, bins, x_label, "mean gate β")
            yield Chart(_slug("gate " + key), figure, title, said, caption)


def _discrepancy(one: One, suffix: str) -> Iterable[Chart]:
    own = [sublayer for sublayer in one["sublayers"] if sublayer["discrepancy"] is not None]
    if own:
        lines = [
            _line(name, own, [s["discrepancy"][name] for s in own], colour=index, dash=index)
            for index, name in enumerate(("before", "after"))
        ]
        figure = over_depth(lines, "‖v − kᵀX‖ / √d_v", one["layers"], view=(0, None))
        title = f"Discrepancy before and after the write, {one['name']}"
        caption = "Root mean square over value channels, mean over tokens; units of X."
        yield Chart(f"discrepancy{suffix}", figure, title, _say(lines), caption)


def _sizes(one: One, suffix: str) -> Iterable[Chart]:
    lines = []
    names = (("written", "written"), ("erased", "erased"), ("changed", "net"))
    for index, (key, label) in enumerate(names):
        own = [sublayer for sublayer in one["sublayers"] if sublayer[key] is not None]
        if own:
            lines.append(_line(label, own, [s[key] for s in own], colour=index, dash=index))
    if len(lines) == 2:  # nothing is erased: the net write is what is written
        lines = lines[:1]
    figure = over_depth(lines, "share of ‖X‖", one["layers"], view=(0, None))
    title = f"Written and erased, {one['name']}"
    yield Chart(f"sizes{suffix}", figure, title, _say(lines))


def _growth(summary: Summary) -> Chart:
    lines = []
    for number, one in enumerate(summary["checkpoints"]):
        rows = [{"layer": 1, "kind": None, "rms_after": one["sublayers"][0]["rms"]}]
        start = _line("", rows, [rows[0]["rms_after"]])
        line = _line(
            one["name"], one["sublayers"], [s["rms_after"] for s in one["sublayers"]],
            colour=number, dash=number,
        )  # fmt: skip
        lines.append(
            Line(
                line.label,
                [0.5, *line.x],
                [*start.y, *line.y],
                [*(start.low or ()), *(line.low or ())],
                [*(start.high or ()), *(line.high or ())],
                number,
                number,
            )
        )
    layers = max(one["layers"] for one in summary["checkpoints"])
    figure = over_depth(lines, "root mean square of X", layers, view=(0, None))
    caption = "The first point is the state that the embeddings give."
    return Chart("state-size", figure, "Size of the state over depth", _say(lines), caption)


def _overlap(one: One, suffix: str) -> Iterable[Chart]:
    overlap = one["overlap"]
    names = [place(sublayer) for sublayer in one["sublayers"]]
    cells = overlap["same_token"]
    figure = shaded(cells, names, names, ("sublayer", "sublayer", "mean (kᵢᵀkⱼ)²"), 1.0)
    groups: dict[str, list[tuple[int, int]]] = {}
    for i, first in enumerate(one["sublayers"]):
        for j, second in enumerate(one["sublayers"]):
            if i < j:
                kinds = first["kind"], second["kind"]
                layer = "same layer" if first["layer"] == second["layer"] else "other layers"
                both = kinds[0] if kinds[0] == kinds[1] else "attention and MLP"
                groups.setdefault(f"{both}, {layer}", []).append((i, j))
    said = []
    for name, pairs in sorted(groups.items()):
        same, other = (
            sum(overlap[key][i][j] for i, j in pairs) / len(pairs)
            for key in ("same_token", "other_token")
        )
        said.append(f"{name} {same:.3f} ({other:.3f})")
    words = (
        f"Means over pairs, in brackets those of two tokens at random: {'; '.join(said)}. "
        f"Unrelated directions: {overlap['chance']:.3f}."
    )
    yield Chart(f"overlap{suffix}", figure, f"Overlap of directions, {one['name']}", words, words)


def _channel_shares(one: One, suffix: str) -> Iterable[Chart]:
    if one["sublayers"][0]["channels"] is None:
        return
    lines = [
        _line(
            f"channel {channel + 1}", one["sublayers"],
            [s["channels"]["state_share"][channel] for s in one["sublayers"]],
            colour=channel, dash=channel % 3,
        )
        for channel in range(one["value_channels"])
    ]  # fmt: skip
    even = (1 / one["value_channels"], "even")
    figure = over_depth(lines, "share of ‖X‖²", one["layers"], even, (0, None))
    title = f"Use of the value channels, {one['name']}"
    yield Chart(f"channel-shares{suffix}", figure, title, _say(lines))


def _channel_rank(one: One, suffix: str) -> Iterable[Chart]:
    if one["sublayers"][0]["channels"] is None:
        return
    channels = one["value_channels"]
    ranks = [s["channels"]["effective_rank"] for s in one["sublayers"]]
    lines = [_line("X", one["sublayers"], ranks)]
    label = f"effective rank of X (of {channels} channels)"
    figure = over_depth(lines, label, one["layers"], view=(0.9, channels))
    last = one["sublayers"][-1]["channels"]["correlation"]
    pairs = [last[i][j] for i in range(channels) for j in range(i)]
    caption = (
        "1: the channels are one channel, repeated and scaled. "
        f"After the last sublayer the cosine of two channels is {min(pairs):.3f} to "
        f"{max(pairs):.3f}."
    )
    title = f"Effective rank of X over channels, {one['name']}"
    yield Chart(f"channel-rank{suffix}", figure, title, _say(lines) + " " + caption, caption)


def _compressors(one: One, suffix: str) -> Iterable[Chart]:
    """Root mean square weights, a row for every compressor: a layer's two may be one."""
    named = [(place(s), s["compressor"]) for s in one["sublayers"]]
    if named[0][1] is None:
        return
    if all(a[1] == b[1] for a, b in zip(named[::2], named[1::2], strict=True)):
        named = [(f"layer {s['layer']}", s["compressor"]) for s in one["sublayers"][::2]]
    named.append(("readout", one["readout_compressor"]))
    taps = len(named[0][1]["rms"])
    columns = [
        f"channel {channel + 1}" + (f", t−{taps - 1 - tap}" if taps > 1 else "")
        for tap in range(taps)
        for channel in range(one["value_channels"])
    ]
    cells = [[value for tap in weights["rms"] for value in tap] for _, weights in named]
    figure = shaded(
        cells, [name for name, _ in named], columns, ("weight of", "", "root mean square"),
        max(map(max, cells)), 3,
    )  # fmt: skip
    said = "; ".join(
        f"{name}: " + ", ".join(f"{value:.3f}" for value in row)
        for (name, _), row in zip(named, cells, strict=True)
    )
    title = f"Compressor weights, {one['name']}"
    yield Chart(f"compressors{suffix}", figure, title, f"{', '.join(columns)}. {said}.")


def _effects(summary: Summary) -> Iterable[Chart]:
    for name, what in (
        ("erase off", "Nothing is erased (b = 0)"),
        ("gate at 1", "The readout is set to its target (β = 1)"),
        ("write off", "Nothing is written or erased (a = b = 0)"),
    ):
        lines = _by_kind(summary, "interventions", functools.partial(_named, name))
        if lines:
            layers = max(one["layers"] for one in summary["checkpoints"])
            figure = over_depth(lines, "change in loss (nats/token)", layers, (0.0, ""))
            yield Chart(_slug(name), figure, f"{what} in one sublayer", _say(lines))


def _named(name: str, row: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The intervention, if it is of this name."""
    return row if row["name"] == name else None


def _channel_effects(one: One, suffix: str) -> Iterable[Chart]:
    rows = [row for row in one["interventions"] if row["name"] == "channel off"]
    if rows:
        lines = []
        for channel in range(1, one["value_channels"] + 1):
            own = [row for row in rows if row["channel"] == channel]
            look = {"colour": channel - 1, "dash": (channel - 1) % 3}
            lines.append(_line(f"channel {channel}", own, own, **look))
        zero = (0.0, "")
        figure = over_depth(lines, "change in loss (nats/token)", one["layers"], zero)
        title = f"One value channel is left as it is by one sublayer, {one['name']}"
        yield Chart(f"channel-off{suffix}", figure, title, _say(lines))
