"""From an audit's summary to its charts: what is drawn, in which section, with which words."""

import functools
from collections.abc import Iterable, Mapping
from typing import Any

from deep_delta.report.audit_gates import dependence, gates
from deep_delta.report.audit_lines import (
    KINDS,
    Chart,
    One,
    Summary,
    by_kind,
    colour_of,
    each,
    line_of,
    look,
    place,
    say,
    slug,
)
from deep_delta.report.audit_plots import over_depth, shaded


def sections(summary: Summary) -> list[tuple[str, str, list[Chart]]]:
    """(heading, text, charts) of the page, without sections that would be empty."""
    found = [
        (
            "Gate",
            "A write multiplies the discrepancy v − kᵀX by 1 − β. β below 0.1 skips, up to 0.9 "
            "contracts, from 0.9 to 1.1 sets the readout to its target, above 1.1 overshoots, and "
            "above 1.9 the gate is saturated.",
            [*gates(summary), *dependence(summary)],
        ),
        (
            "Discrepancy",
            "How far the readout is from its target before and after each write.",
            list(each(summary, _discrepancy)),
        ),
        (
            "What is written and erased",
            "Sizes relative to ‖X‖ before the write (net: what is left of both), and the cosine of "
            "the net write to X: negative where it takes away more of what is there than it adds.",
            [*each(summary, _sizes), _joint(summary, "cosine", "cosine of the write to X")],
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
                *each(summary, _overlap),
            ],
        ),
        (
            "Value channels",
            "Each channel's share of ‖X‖², how many channels X really uses, and the compressors' "
            "weights.",
            list(each(summary, _channel_shares, _channel_rank, _compressors)),
        ),
        (
            "Interventions",
            "The change in loss when one sublayer's write is changed and nothing else. Where the "
            "loss rises without the erase, the model relies on erasing.",
            [*_effects(summary), *each(summary, _channel_effects)],
        ),
    ]
    return [(heading, text, charts) for heading, text, charts in found if charts]


def _joint(summary: Summary, key: str, label: str) -> Chart:
    lines = by_kind(summary, "sublayers", lambda sublayer: sublayer[key])
    layers = max(one["layers"] for one in summary["checkpoints"])
    figure = over_depth(lines, label, layers, (0.0, "") if key == "cosine" else None)
    return Chart(slug(key), figure, label[0].upper() + label[1:], say(lines))


def _discrepancy(one: One, suffix: str) -> Iterable[Chart]:
    own = [sublayer for sublayer in one["sublayers"] if sublayer["discrepancy"] is not None]
    if own:
        lines = [
            line_of(name, own, [s["discrepancy"][name] for s in own], **look(index))
            for index, name in enumerate(("before", "after"))
        ]
        figure = over_depth(lines, "‖v − kᵀX‖ / √d_v", one["layers"], view=(0, None))
        title = f"Discrepancy before and after the write, {one['name']}"
        caption = "Root mean square over value channels, mean over tokens; units of X."
        yield Chart(f"discrepancy{suffix}", figure, title, say(lines), caption)


def _sizes(one: One, suffix: str) -> Iterable[Chart]:
    lines = []
    names = (("written", "written"), ("erased", "erased"), ("changed", "net"))
    for index, (key, label) in enumerate(names):
        own = [sublayer for sublayer in one["sublayers"] if sublayer[key] is not None]
        if own:
            lines.append(line_of(label, own, [s[key] for s in own], **look(index)))
    if len(lines) == 2:  # nothing is erased: the net write is what is written
        lines = lines[:1]
    figure = over_depth(lines, "share of ‖X‖", one["layers"], view=(0, None))
    title = f"Written and erased, {one['name']}"
    yield Chart(f"sizes{suffix}", figure, title, say(lines))


def _growth(summary: Summary) -> Chart:
    start = {"layer": 0.5, "kind": None}  # what the embeddings give
    lines = [
        line_of(
            one["name"],
            [start, *one["sublayers"]],
            [one["sublayers"][0]["rms"], *(s["rms_after"] for s in one["sublayers"])],
            colour=colour_of(summary, number, KINDS[0]),
            dash=number,
        )
        for number, one in enumerate(summary["checkpoints"])
    ]
    layers = max(one["layers"] for one in summary["checkpoints"])
    figure = over_depth(lines, "root mean square of X", layers, view=(0, None))
    caption = "The first point is the state that the embeddings give."
    return Chart("state-size", figure, "Size of the state over depth", say(lines), caption)


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
        line_of(
            f"channel {channel + 1}", one["sublayers"],
            [s["channels"]["state_share"][channel] for s in one["sublayers"]],
            **look(channel),
        )
        for channel in range(one["value_channels"])
    ]  # fmt: skip
    even = (1 / one["value_channels"], "even")
    most = max(share for s in one["sublayers"] for share in s["channels"]["state_share"])
    view = (0, max(1.6 * even[0], 1.1 * most))  # room above what is even
    figure = over_depth(lines, "share of ‖X‖²", one["layers"], even, view)
    title = f"Use of the value channels, {one['name']}"
    yield Chart(f"channel-shares{suffix}", figure, title, say(lines))


def _channel_rank(one: One, suffix: str) -> Iterable[Chart]:
    if one["sublayers"][0]["channels"] is None:
        return
    channels = one["value_channels"]
    ranks = [s["channels"]["effective_rank"] for s in one["sublayers"]]
    lines = [line_of("X", one["sublayers"], ranks)]
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
    yield Chart(f"channel-rank{suffix}", figure, title, say(lines) + " " + caption, caption)


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
        lines = by_kind(summary, "interventions", functools.partial(_named, name))
        if lines:
            layers = max(one["layers"] for one in summary["checkpoints"])
            figure = over_depth(lines, "change in loss (nats/token)", layers, (0.0, ""))
            yield Chart(slug(name), figure, f"{what} in one sublayer", say(lines))


def _named(name: str, row: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The intervention, if it is of this name."""
    return row if row["name"] == name else None


def _channel_effects(one: One, suffix: str) -> Iterable[Chart]:
    rows = [row for row in one["interventions"] if row["name"] == "channel off"]
    if rows:
        lines = []
        for channel in range(1, one["value_channels"] + 1):
            own = [row for row in rows if row["channel"] == channel]
            lines.append(line_of(f"channel {channel}", own, own, **look(channel - 1)))
        zero = (0.0, "")
        figure = over_depth(lines, "change in loss (nats/token)", one["layers"], zero)
        title = f"One value channel is left as it is by one sublayer, {one['name']}"
        yield Chart(f"channel-off{suffix}", figure, title, say(lines))
