"""``audit.html``: what one checkpoint, or two, does with its state; its plots as PNG and SVG.

The summary is that of ``deep_delta.audit``, whose numbers ``docs/audit.md`` defines.
"""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from deep_delta.report import audit_charts, numbers, render
from deep_delta.report.audit_lines import Chart, mean, place
from deep_delta.report.page import whole_page
from deep_delta.report.parts import bullets, facts, figure, section, table

PAGE_NAME = "audit.html"

Summary = Mapping[str, Any]


def write_audit(summary: Summary, out_dir: Path) -> Path:
    """Write ``audit.html`` and every chart as PNG and SVG into ``out_dir``; return the page's path.

    Raises UserError, before anything is written, if matplotlib is not installed.
    """
    sections = [_headline(summary)]
    drawn: list[Chart] = []
    for heading, text, charts in audit_charts.sections(summary):
        drawn += charts
        body = "\n".join(_figure(chart) for chart in charts)
        sections.append(section(heading, f"<p>{escape(text)}</p>\n{body}"))
    sections += [
        *(
            section(f"Every sublayer of {one['name']}", _table(one))
            for one in summary["checkpoints"]
        ),
        section("How it was measured", _provenance(summary)),
        section("How to read this", _caveats()),
    ]
    out_dir.mkdir(parents=True, exist_ok=True)
    for chart in drawn:
        render.save(chart.figure, out_dir, chart.name)
    path = out_dir / PAGE_NAME
    path.write_text(whole_page(_title(summary), "\n".join(sections)), encoding="utf-8")
    return path


def _title(summary: Summary) -> str:
    return "Audit of " + " and ".join(one["name"] for one in summary["checkpoints"])


def _headline(summary: Summary) -> str:
    data = summary["data"]
    scope = (
        f"{data['tokens']:,} tokens of {data['folder']} ({data['split']}): {data['sequences']} "
        f"sequences of {data['seq_len']}. Bands: {100 * summary['level']:g} % intervals over "
        "sequences."
    )
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in findings(summary))
    return (
        f"<header>\n<h1>{escape(_title(summary))}</h1>\n"
        f'<p class="quiet">{escape(scope)}</p>\n<ul class="conclusions">\n{items}\n</ul>\n</header>'
    )


def findings(summary: Summary) -> list[str]:
    """What the page says first, one sentence each."""
    sentences = []
    for one in summary["checkpoints"]:
        name, erasing = one["name"], [u for u in one["sublayers"] if u["gate"] is not None]
        sentences.append(f"{name}: loss {_interval(one['loss'], 4)} nats/token.")
        if one["sublayers"][0]["channels"] is not None:
            ranks = [u["channels"]["effective_rank"] for u in one["sublayers"]]
            sentences.append(
                f"{name}: of {one['value_channels']} value channels X uses {min(ranks):.2f} to "
                f"{max(ranks):.2f} (effective rank; 1: all of them are multiples of one)."
            )
        if not erasing:
            sentences.append(f"{name} erases nothing: it has no gate regimes and no discrepancy.")
            continue
        shares = {
            regime: sum(mean(u["gate"]["regimes"][regime]) for u in erasing) / len(erasing)
            for regime in summary["regimes"]["names"]
        }
        listed = ", ".join(f"{regime} {100 * share:.0f} %" for regime, share in shares.items())
        sentences.append(f"{name}, gates over all sublayers and tokens: {listed}.")
        needed = [
            effect
            for effect in one["interventions"]
            if effect["name"] == "erase off" and (effect["low"] or 0) > 0
        ]
        sentence = (
            f"{name}: the loss rises without the erase in {len(needed)} of {len(erasing)} "
            "sublayers, one at a time"
        )
        if needed:
            worst = max(needed, key=lambda effect: effect["mean"])
            rise = numbers.signed(worst["mean"], 4)
            sentence += f", most in layer {place(worst)} ({rise} nats/token)"
        sentences.append(sentence + ".")
    if summary["loss_difference"] is not None:
        first, second = (one["name"] for one in summary["checkpoints"])
        sentences.append(
            f"{second} less {first}, on the same sequences: "
            f"{_interval(summary['loss_difference'], 4, signed=True)} nats/token."
        )
    worst_fault = max(one["fault"] for one in summary["checkpoints"])
    sentences.append(
        "Self-test passed: every readout after a write is what the write says, |after| = "
        f"|1 − β|·|before| where it erases, to {worst_fault:.1e} of ‖X‖ (tolerance "
        f"{summary['tolerance']:.0e})."
    )
    return sentences


def _interval(entry: Mapping[str, Any], decimals: int, signed: bool = False) -> str:
    def text(value: float) -> str:
        return numbers.signed(value, decimals) if signed else f"{value:.{decimals}f}"

    if entry["mean"] is None:
        return numbers.MISSING_CELL
    if entry["low"] is None:
        return f"{text(entry['mean'])} (no interval)"
    return f"{text(entry['mean'])} [{text(entry['low'])}, {text(entry['high'])}]"


def _figure(chart: Chart) -> str:
    drawing = render.inline_svg(chart.figure, chart.name, chart.title, chart.description)
    return figure(drawing, chart.title, f"{chart.title}. {chart.caption}")


def _table(one: Mapping[str, Any]) -> str:
    effects = {
        (effect["layer"], effect["kind"], effect["name"]): effect for effect in one["interventions"]
    }
    columns: list[tuple[str, Any]] = [
        ("gate β, mean", lambda u: u["gate"] and _cell(u["gate"], 3)),
        ("|v − kᵀX| before", lambda u: u["discrepancy"] and _cell(u["discrepancy"]["before"], 3)),
        ("after", lambda u: u["discrepancy"] and _cell(u["discrepancy"]["after"], 3)),
        ("erased / ‖X‖", lambda u: u["erased"] and _cell(u["erased"], 3)),
        ("written / ‖X‖", lambda u: _cell(u["written"], 3)),
        ("cosine to X", lambda u: _cell(u["cosine"], 3)),
        ("rank of k", lambda u: u["direction_rank"] and f"{u['direction_rank']:.1f}"),
        ("Δ loss, erase off", lambda u: _effect(effects, u, "erase off")),
        ("Δ loss, write off", lambda u: _effect(effects, u, "write off")),
    ]
    shown = [(name, [cell(sublayer) for sublayer in one["sublayers"]]) for name, cell in columns]
    shown = [(name, cells) for name, cells in shown if any(cells)]  # what is absent has no column
    rows = [
        [place(sublayer), *(cells[row] or numbers.MISSING_CELL for _, cells in shown)]
        for row, sublayer in enumerate(one["sublayers"])
    ]
    names = ["sublayer", *(name for name, _ in shown)]
    return table(f"Sublayers of {one['name']}", names, rows)


def _cell(entry: Mapping[str, Any], decimals: int) -> str:
    if entry["mean"] is None:
        return numbers.MISSING_CELL
    return f"{entry['mean']:.{decimals}f}".replace("-", numbers.MINUS)


def _effect(effects: Mapping[Any, Any], sublayer: Mapping[str, Any], name: str) -> str | None:
    entry = effects.get((sublayer["layer"], sublayer["kind"], name))
    return None if entry is None else _interval(entry, 4, signed=True)


def _provenance(summary: Summary) -> str:
    data = summary["data"]
    apart = "kept apart" if data["documents_apart"] else "following one another"
    listed: list[tuple[str, str]] = [
        (key, str(summary[key]))
        for key in ("command", "commit", "device", "date", "torch", "transformers")
        if summary.get(key)
    ]
    listed += [(f"checkpoint {one['name']}", one["path"]) for one in summary["checkpoints"]]
    listed.append(
        (
            "text",
            f"{data['folder']}, split {data['split']}, tokenizer {data['tokenizer']}; "
            f"{data['sequences']} of {data['of_sequences']} sequences, evenly spread; documents "
            f"{apart}",
        )
    )
    listed.append(("arithmetic", "the reference in fp32; statistics in fp64"))
    return facts([(key, escape(value)) for key, value in listed])


def _caveats() -> str:
    points: Sequence[str] = [
        "docs/audit.md defines every number of this page; audit.json beside it holds them all.",
        "Intervals are Student's t over sequences of this text, for this one checkpoint: they say "
        "nothing about another seed, and with many sublayers some exclude zero by chance.",
        "An intervention changes one sublayer of a model that was trained as it is. A loss that "
        "rises shows what this model relies on, not that one trained that way would be worse.",
        "Where the erase off costs more than the whole write off, the harm is a write that nothing "
        "balances, rather than old content that stays.",
        "The gate of a write-only model is not told apart from its target: only their product "
        "reaches the state. What a residual does not have is left out, not shown as zero.",
    ]
    return bullets(points)
