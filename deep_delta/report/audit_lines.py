"""What the charts of an audit share: lines from a summary's entries, names, and words for them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deep_delta.report.audit_plots import COLOURS, DASHES, Line
from deep_delta.report.style import FALLBACK_COLOURS, variant_style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Summary = Mapping[str, Any]
One = Mapping[str, Any]  # a checkpoint of the summary
Entry = Mapping[str, Any]  # n, mean, spread, low, high

KINDS = ("attention", "MLP")


@dataclass(frozen=True)
class Chart:
    """A figure, the name of its file, and its words; `description` is read instead of looking."""

    name: str
    figure: "Figure"
    title: str
    description: str
    caption: str = ""


def mean(entry: Entry) -> float:
    """The mean, where there surely is one."""
    return float(entry["mean"])


def place(sublayer: Mapping[str, Any]) -> str:
    """The name of a sublayer, of an intervention's too: "3 MLP"."""
    return f"{sublayer['layer']} {sublayer['kind']}"


def slug(text: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in text.lower()).strip("-")


def each(summary: Summary, *draw: Callable[[One, str], Iterable[Chart]]) -> Iterable[Chart]:
    """Charts of each checkpoint by itself; the second gets its number into the file's name."""
    for make in draw:
        for number, one in enumerate(summary["checkpoints"], start=1):
            yield from make(one, "" if len(summary["checkpoints"]) == 1 else f"-{number}")


def _depth(sublayer: Mapping[str, Any]) -> float:
    return sublayer["layer"] + 0.5 * (sublayer["kind"] == KINDS[1])


def line_of(
    label: str, sublayers: Sequence[Mapping[str, Any]], entries: Sequence[Any], **style
) -> Line:
    """A line over depth through entries with intervals, plain numbers or None."""
    full = [entry if isinstance(entry, Mapping) else {"mean": entry} for entry in entries]
    return Line(
        label,
        [_depth(sublayer) for sublayer in sublayers],
        [entry["mean"] for entry in full],
        [entry.get("low") for entry in full],
        [entry.get("high") for entry in full],
        **style,
    )


def say(lines: Sequence[Line]) -> str:
    """The text alternative of lines: every number."""
    said = []
    for line in lines:
        values = ", ".join("none" if y is None else f"{y:.3g}" for y in line.y)
        said.append(f"{line.label}: {values}")
    return "In the order of depth. " + "; ".join(said) + "."


def colour_of(summary: Summary, number: int, kind: str) -> str:
    """A checkpoint's colour: its variant's, as in every report, or another if the first has that.

    Two of one variant are called "ddl-cc (1)" and "ddl-cc (2)". A single checkpoint's MLPs have a
    colour of their own, since bands of one colour cannot be told apart.
    """
    checkpoints = summary["checkpoints"]
    first, *others = (variant_style(one["name"].split(" (")[0]).colour for one in checkpoints)
    another = next(colour for colour in FALLBACK_COLOURS if colour != first)
    if not others:
        return first if kind == KINDS[0] else another
    if number == 0:
        return first
    return another if others[0] == first else others[0]


def look(index: int) -> dict[str, Any]:
    """Colour and dash of a chart's line that is no checkpoint's, by its number."""
    return {"colour": COLOURS[index % len(COLOURS)], "dash": index % len(DASHES)}


def by_kind(summary: Summary, rows: str, value: Callable[[Mapping[str, Any]], Any]) -> list[Line]:
    """A line for attention and one for the MLP of each checkpoint that has the value."""
    many = len(summary["checkpoints"]) > 1
    lines = []
    for number, one in enumerate(summary["checkpoints"]):
        for index, kind in enumerate(KINDS):
            own = [row for row in one[rows] if row["kind"] == kind and value(row) is not None]
            label = f"{one['name']}, {kind}" if many else kind
            if own:
                values = [value(row) for row in own]
                colour = colour_of(summary, number, kind)
                lines.append(line_of(label, own, values, colour=colour, dash=index))
    return lines
