"""``report.html`` of one evaluated checkpoint: tables, charts beside the paper's numbers."""

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from deep_delta.report import numbers, parts, render
from deep_delta.report.page import whole_page
from deep_delta.report.scores import score_chart

Evaluation = Mapping[str, Any]
TITLE = "Evaluation of a checkpoint"


def write_evaluation(summary: Evaluation, out_dir: Path) -> Path:
    """Write ``report.html`` into ``out_dir``, and its charts as PNG and SVG; the page's path.

    Raises UserError, before anything is written, if matplotlib is not installed.
    """
    charts = {
        average["shots"]: score_chart(
            tasks_of(summary, average["shots"]), average, summary["checkpoint"]["variant"]
        )
        for average in summary["averages"]
    }
    sections = [_headline(summary)]
    if summary["loss"] is not None:
        sections.append(parts.section(f"{_split(summary)} text", _loss(summary)))
    for average in summary["averages"]:
        shots = average["shots"]
        content = _scores_table(summary, average) + _chart(summary, average, charts[shots])
        sections.append(parts.section(f"Tasks, {shots}-shot", content))
    sections += [
        parts.section("How it was run", _provenance(summary)),
        parts.section("How to read this", parts.bullets(_caveats(summary))),
    ]
    out_dir.mkdir(parents=True, exist_ok=True)
    for shots, chart in charts.items():
        render.save(chart, out_dir, f"scores-{shots}-shot")
    path = out_dir / "report.html"
    path.write_text(whole_page(TITLE, "\n".join(sections)), encoding="utf-8")
    return path


def _split(summary: Evaluation) -> str:
    """What the text is called that the loss is of."""
    return {"val": "Validation", "test": "Test"}[summary["settings"]["split"]]


def tasks_of(summary: Evaluation, shots: int) -> list[dict[str, Any]]:
    """The tasks of one number of shots, in the summary's order."""
    return [task for task in summary["tasks"] if task["shots"] == shots]


def print_evaluation(summary: Evaluation) -> None:
    """Print the result as plain tables to standard output."""
    if summary["loss"] is not None:
        print(f"{_split(summary)} text")
        print("\n".join(f"{name}: {value}" for name, value in loss_rows(summary["loss"])))
    for average in summary["averages"]:
        print(f"\n{average['shots']}-shot")
        print(_plain([SCORE_COLUMNS, *score_rows(summary, average)]))


def _plain(lines: list[list[str]]) -> str:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _headline(summary: Evaluation) -> str:
    checkpoint = summary["checkpoint"]
    about = (
        f"{checkpoint['variant']}, size {checkpoint['size']}, "
        f"{numbers.with_prefix(checkpoint['parameters'])} parameters: {checkpoint['path']}"
    )
    found = []
    if summary["loss"] is not None:
        rows = dict(loss_rows(summary["loss"]))
        found.append(f"{_split(summary)} loss {rows['loss (nats/token)']} nats per token.")
    for average in summary["averages"]:
        mean = numbers.measured(average["mean"], average["stderr"], 2)
        beside = "" if average["paper"] is None else f"; the paper's is {average['paper']:.2f} %"
        scope = f"mean of {average['tasks']} tasks"
        found.append(f"{average['shots']}-shot accuracy {mean} %, {scope}{beside}.")
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in found)
    return (
        f'<header>\n<h1>{TITLE}</h1>\n<p class="quiet">{escape(about)}</p>\n'
        f'<ul class="conclusions">\n{items}\n</ul>\n</header>'
    )


def loss_rows(loss: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name and value of each measure of the text."""
    return [
        ("loss (nats/token)", _with_interval(loss["loss"], 4)),
        ("perplexity", _with_interval(loss["perplexity"], 3)),
        ("bits per byte", _with_interval(loss["bits_per_byte"], 4)),
        ("documents", f"{loss['documents']:,}"),
        ("tokens", f"{loss['tokens']:,}"),
        ("bytes of text", f"{loss['bytes']:,}"),
    ]


def _with_interval(measure: Mapping[str, float | None], decimals: int) -> str:
    text = numbers.measured(measure["mean"], None, decimals)
    if measure["low"] is None or measure["high"] is None:
        return text
    return f"{text} [{measure['low']:,.{decimals}f}, {measure['high']:,.{decimals}f}]"


def _loss(summary: Evaluation) -> str:
    loss = summary["loss"]
    level = f"{100 * loss['level']:g} %"
    groups = f"{loss['groups']:,} {loss['grouped_by']}s"
    interval = (
        f"in brackets the {level} bootstrap interval over {groups}"
        if loss["loss"]["low"] is not None
        else f"no interval, there are only {groups}"
    )
    rows = [list(row) for row in loss_rows(loss)]
    return parts.table(
        f"Every token predicted once; {interval}.", ["measure", "value"], rows, {"measure"}
    )


SCORE_COLUMNS = [
    "task",
    "examples",
    "acc (%)",
    "acc_norm (%)",
    "shown",
    "paper (%)",
    "ours − paper",
]


def score_rows(summary: Evaluation, average: Mapping[str, Any]) -> list[list[str]]:
    """One row per task and one for the average; cells as SCORE_COLUMNS."""
    rows = [
        [
            task["label"],
            f"{task['examples']:,}",
            numbers.measured(task["acc"], task["acc_stderr"], 2),
            numbers.measured(task["acc_norm"], task["acc_norm_stderr"], 2),
            task["shown"],
            *_beside(task[task["shown"]], task[f"{task['shown']}_stderr"], task["paper"]),
        ]
        for task in tasks_of(summary, average["shots"])
    ]
    mean = numbers.measured(average["mean"], average["stderr"], 2)
    beside = _beside(average["mean"], average["stderr"], average["paper"])
    dash = numbers.MISSING_CELL
    label = "mean as shown" if average["tasks"] == 8 else f"mean of {average['tasks']}"
    return [*rows, [label, dash, dash, dash, mean, *beside]]


def _beside(value: float, stderr: float | None, paper: float | None) -> list[str]:
    if paper is None:
        return [numbers.MISSING_CELL] * 2
    spread = "" if stderr is None else f" ± {stderr:.2f}"
    return [f"{paper:.2f}", numbers.signed(value - paper, 2) + spread]


def _scores_table(summary: Evaluation, average: Mapping[str, Any]) -> str:
    caption = (
        "Accuracy ± standard error over the examples; “shown” is the metric set beside the paper's "
        "number and averaged."
    )
    return parts.table(caption, SCORE_COLUMNS, score_rows(summary, average), {"task", "shown"})


def _chart(summary: Evaluation, average: Mapping[str, Any], chart: Any) -> str:
    shots = average["shots"]
    title = f"Accuracy by task, {shots}-shot"
    said = [
        f"{row[0]} {row[2] if row[4] == 'acc' else row[3] if row[4] == 'acc_norm' else row[4]}"
        + (f", paper {row[5]}" if row[5] != numbers.MISSING_CELL else "")
        for row in score_rows(summary, average)
    ]
    caption = "Filled: this checkpoint; bar: ± 1.96 standard errors over the examples. "
    if average["paper"] is not None or any(
        task["paper"] is not None for task in tasks_of(summary, shots)
    ):
        number = summary["paper"]["tables"][str(shots)]
        caption += f"Hollow: {summary['paper']['source']}, Table {number}, which gives no errors. "
    caption += "Tick: guessing."
    drawing = render.inline_svg(
        chart, f"scores-{shots}", title, "Accuracy in per cent: " + "; ".join(said) + "."
    )
    return parts.figure(drawing, title, caption, narrow=True)


def _provenance(summary: Evaluation) -> str:
    checkpoint = summary["checkpoint"]
    hashes = {**checkpoint["weights_sha256"], "tokenizer.json": checkpoint["tokenizer_sha256"]}
    facts = [
        *parts.provenance(summary),
        ("Settings", parts.assignments(summary["settings"])),
        ("SHA-256 of the checkpoint", parts.assignments(hashes)),
    ]
    files = {
        f"{task['task']}/{name}": sha256
        for task in summary["tasks"]
        for name, sha256 in (task["files_sha256"] or {}).items()
    }
    if files:
        facts.append(("SHA-256 of the task files", parts.assignments(files)))
    return parts.facts(facts)


def _caveats(summary: Evaluation) -> list[str]:
    points = []
    context = summary["settings"]["context"]
    limit = summary["settings"]["limit"]
    if limit is not None:
        points.append(
            f"Only the first {limit:,} documents and questions were read (--limit): this is a trial"
        )
    if summary["loss"] is not None:
        points += [
            "A document is read after one end-of-text token, in windows of "
            f"{context:,} tokens. The first window predicts as many tokens as fit; each later one "
            "predicts half a window more and sees at least the other half before it. End-of-text "
            "tokens are not predicted and not counted, so the loss differs a little from the one "
            "during training, where documents are cut into sequences and end-of-text tokens count.",
            "Bits per byte divide by the UTF-8 bytes of the documents' text, so that models with "
            "different tokenizers can be compared; loss and perplexity can't.",
            _interval_point(summary["loss"]),
        ]
    if summary["tasks"]:
        points += [
            "Tasks are those of lm-evaluation-harness, with its prompts and its draw of examples. "
            "acc takes the answer with the highest log-likelihood, acc_norm the highest per "
            "character. WinoGrande scores the same words after either option, so there both are "
            "one; Social IQA's own task file lists acc alone.",
            "The paper does not say which of the two its tables show. Set beside them is acc_norm "
            "for ARC, HellaSwag, OpenBookQA, PIQA and SciQ, and acc for Social IQA and "
            "WinoGrande: an earlier paper of the same first author says so of the same tasks "
            "(arXiv 2501.06425). It is a guess; both are in the table of our own scores. The "
            "paper's average is the plain mean of the eight, as ours.",
            "The paper's models saw 49.15 B tokens of FineWeb-Edu, one run each. A difference to "
            "them is one between trainings as well, and standard errors here are only over the "
            "questions: they say nothing about another seed. Errors of the average take the tasks "
            "as independent.",
        ]
    return points


def _interval_point(loss: Mapping[str, Any]) -> str:
    level = f"{100 * loss['level']:g} %"
    if loss["grouped_by"] == "source":
        return (
            f"The {level} interval draws whole sources again with replacement, because documents "
            "of one source (parts of a book, say) are not independent. It is about other text of "
            "the same kind, not about another seed."
        )
    return (
        f"The {level} interval draws documents again with replacement: this data names no sources. "
        "Where documents are parts of one text it is too narrow. It is about other text of the "
        "same kind, not about another seed."
    )
