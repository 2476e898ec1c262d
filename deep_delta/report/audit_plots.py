"""Charts of an audit: lines over depth or over bins, shaded grids, shares that add up to one.

As in `plots`, each function returns a matplotlib Figure that belongs to no global state.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deep_delta.report.curves import spread_apart
from deep_delta.report.plots import FONT_SIZE, MARKER_SIZE, SMALL_SIZE
from deep_delta.report.render import in_house_style, new_figure
from deep_delta.report.style import DASHED, DOTTED, INK, SOLID, Dash, variant_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# For what is no checkpoint (channels, before and after), in this order. Their contrast
# is what the style sheet's tests ask for.
COLOURS = tuple(
    variant_style(name).colour
    for name in ("ddl-cc", "write-only-cc", "ddl-scalar", "ddl-tc", "write-only-tc", "additive")
)
DASHES: tuple[Dash, ...] = (SOLID, DASHED, DOTTED)
MARKERS = ("o", "s", "^", "D", "v", "P")

WIDTH = 6.6  # inches; the report shows it up to about twice that
_CHARACTER = 0.6 * FONT_SIZE / 72  # inches
_LINE = 1.45 * FONT_SIZE / 72
_STRONGEST = 0.75  # opacity of a full cell: text on it stays legible, in the dark too
_SCALE_STEPS = 5


@dataclass(frozen=True)
class Line:
    """A labelled line. low and high are its interval; None, like a point's y, for what is absent.

    colour is hexadecimal, dash an index into DASHES.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None
    colour: str = COLOURS[0]
    dash: int = 0


@in_house_style
def over_depth(
    lines: Sequence[Line],
    y_label: str,
    layers: int,
    reference: tuple[float, str] | None = None,
    view: tuple[float | None, float | None] = (None, None),
) -> "Figure":
    """Lines over the layers 1 … `layers`; an MLP stands half a layer behind its attention.

    reference: a value, drawn across, and what it is. view: where the y axis begins and ends; None
    leaves that to the numbers.
    """
    figure, axes, height = _axes_for([line.label for line in lines], 0.52)
    axes.set_xlabel("layer (attention at the number, MLP half a step later)")
    step = -(-layers // 12)
    axes.set_xticks(range(1, layers + 1, step))
    _draw_lines(axes, lines, y_label, height, reference, view)
    return figure


@in_house_style
def over_bins(lines: Sequence[Line], bins: Sequence[str], x_label: str, y_label: str) -> "Figure":
    """Lines over bins, whose labels stand below; a line's x counts them from 0."""
    turned = len(bins) > 6
    figure, axes, height = _axes_for([line.label for line in lines], 0.75 if turned else 0.52)
    axes.set_xticks(range(len(bins)), bins, rotation=30 if turned else 0)
    axes.set_xlabel(x_label)
    _draw_lines(axes, lines, y_label, height)
    return figure


def _axes_for(labels: Sequence[str], below: float) -> "tuple[Figure, Axes, float]":
    """Room for the labels on the right; the height of the axes in inches."""
    right = 0.35 + _CHARACTER * max(len(label) for label in labels)
    height = max(2.3, _LINE * len(labels))
    figure, axes = new_figure(WIDTH, height + below + 0.2, (0.85, right, below, 0.2))
    return figure, axes, height


def _draw_lines(
    axes: "Axes",
    lines: Sequence[Line],
    y_label: str,
    height: float,
    reference: tuple[float, str] | None = None,
    view: tuple[float | None, float | None] = (None, None),
) -> None:
    for number, line in enumerate(lines):
        marker = MARKERS[number % len(MARKERS)]
        _draw_interval(axes, line)
        axes.plot(
            line.x,
            [float("nan") if y is None else y for y in line.y],
            color=line.colour,
            linestyle=DASHES[line.dash],
            linewidth=1.5,
            marker=marker,
            markersize=MARKER_SIZE,
        )
    axes.set_ylabel(y_label)
    axes.margins(x=0.03, y=0.08)
    if reference is not None:
        axes.axhline(reference[0], color=INK, linewidth=0.9, zorder=1)
        axes.annotate(
            reference[1], (0.0, reference[0]), (2, 2), xycoords=("axes fraction", "data"),
            textcoords="offset points", size=SMALL_SIZE, color=INK,
        )  # fmt: skip
    axes.set_ylim(*view)
    _label_ends(axes, lines, height)


def _draw_interval(axes: "Axes", line: Line) -> None:
    if line.low is None or line.high is None:
        return
    bounds = zip(line.x, line.low, line.high, strict=True)
    whole = [(x, low, high) for x, low, high in bounds if low is not None and high is not None]
    if whole:
        x, low, high = (list(column) for column in zip(*whole, strict=True))
        axes.fill_between(x, low, high, color=line.colour, alpha=0.18, linewidth=0)


def _label_ends(axes: "Axes", lines: Sequence[Line], height: float) -> None:
    """Each line's label right of the axes, at the height of its end or close to it."""
    bottom, top = axes.get_ylim()
    right = axes.get_xlim()[1]
    drawn = [number for number, line in enumerate(lines) if any(y is not None for y in line.y)]
    ends = {number: _end(lines[number]) for number in drawn}
    wanted = [(ends[number][1] - bottom) / (top - bottom) for number in drawn]
    for number, place in zip(drawn, spread_apart(wanted, _LINE / height), strict=True):
        colour = lines[number].colour
        axes.annotate(
            "", xy=ends[number], xytext=(1.02, place), textcoords="axes fraction",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.7, "alpha": 0.6,
                        "shrinkA": 0.0, "shrinkB": 0.0},
        )  # fmt: skip
        axes.plot(
            [1.03], [place], transform=axes.transAxes, clip_on=False, color=colour,
            marker=MARKERS[number % len(MARKERS)], markersize=MARKER_SIZE,
        )  # fmt: skip
        axes.text(
            1.05, place, lines[number].label, transform=axes.transAxes, va="center", color=INK
        )
    axes.set_xlim(right=right)
    axes.set_ylim(bottom, top)


def _end(line: Line) -> tuple[float, float]:
    """The last point that is there."""
    return [(x, y) for x, y in zip(line.x, line.y, strict=True) if y is not None][-1]


@in_house_style
def shaded(
    cells: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    labels: tuple[str, str, str],
    top: float,
    written: int = 2,
    extent: tuple[float, float] | None = None,
) -> "Figure":
    """A grid of cells, rows downwards, the more opaque the larger the number (0 … `top`).

    labels: of the x axis, of the y axis and of the numbers. written: decimals of the numbers in the
    cells, where these are large enough to hold them. extent: the columns cut this range of numbers
    into equal parts; `columns` then stand at equal distances from its start to its end.
    """
    count = len(cells[0])
    left = 0.45 + _CHARACTER * max(len(row) for row in rows)
    side = (WIDTH - left - 0.2) / count
    each = 0.26 if extent else min(0.32, max(0.16, side))
    inside = each * len(rows)
    turned = extent is None and max(map(len, columns)) > 3
    below = 0.52 + (0.8 * _CHARACTER * max(map(len, columns)) if turned else 0)
    figure, axes = new_figure(WIDTH, inside + below + 0.45, (left, 0.2, below, 0.45))
    start, end = extent or (-0.5, count - 0.5)
    colour = _rgb(COLOURS[0])
    opacity = [[_opacity(value, top) for value in row] for row in cells]
    # Numbers for the mesh, whose colours are then set one by one; rows run downwards.
    mesh = axes.pcolormesh(
        [start + (end - start) * edge / count for edge in range(count + 1)],
        [row - 0.5 for row in range(len(rows) + 1)],
        [list(row) for row in cells],
    )
    mesh.set_array(None)
    mesh.set_facecolor([(*colour, alpha) for row in opacity for alpha in row])
    mesh.set_edgecolor("none")
    axes.invert_yaxis()
    axes.grid(False)
    axes.set_yticks(range(len(rows)), rows)
    if extent is None:
        step = -(-count // 24)
        axes.set_xticks(range(0, count, step), columns[::step], rotation=60 if turned else 0)
    else:
        places = [start + (end - start) * k / (len(columns) - 1) for k in range(len(columns))]
        axes.set_xticks(places, columns)
    axes.tick_params(length=0)
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    if extent is None and side > _CHARACTER * (written + 2.2):
        for row, values in enumerate(cells):
            for column, value in enumerate(values):
                axes.text(
                    column, row, f"{value:.{written}f}", ha="center", va="center",
                    size=SMALL_SIZE, color=INK,
                )  # fmt: skip
    _scale(axes, labels[2], top, inside)
    return figure


def _scale(axes: "Axes", label: str, top: float, inside: float) -> None:
    """The key of a shaded grid, above it: what opacity means."""
    y, width, height = 1 + 0.16 / inside, 0.035, 0.14 / inside
    colour = _rgb(COLOURS[0])
    from matplotlib.patches import Rectangle

    axes.text(0, y, f"{label}: 0", transform=axes.transAxes, size=SMALL_SIZE, color=INK)
    begin = (len(label) + 4) * 0.9 * 0.6 * SMALL_SIZE / 72 / (axes.get_position().width * WIDTH)
    for step in range(_SCALE_STEPS):
        alpha = _STRONGEST * step / (_SCALE_STEPS - 1)
        place = (begin + step * width, y - 0.02 / inside)
        axes.add_patch(
            Rectangle(place, width, height, transform=axes.transAxes, clip_on=False,
                      facecolor=(*colour, alpha), edgecolor=INK, linewidth=0.4)
        )  # fmt: skip
    end = begin + (_SCALE_STEPS + 0.3) * width
    axes.text(end, y, f"{top:.3g}", transform=axes.transAxes, size=SMALL_SIZE, color=INK)


def _opacity(value: float, top: float) -> float:
    return _STRONGEST * min(1.0, max(0.0, value / top)) if top > 0 else 0.0


def _rgb(colour: str) -> tuple[float, float, float]:
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return red, green, blue


@in_house_style
def stacked(
    shares: Sequence[Sequence[float]], rows: Sequence[str], parts: Sequence[str], x_label: str
) -> "Figure":
    """One bar a row, cut into `parts` that add up to 1; a part of 12 % or more says how much."""
    left = 0.45 + _CHARACTER * max(len(row) for row in rows)
    inside = 0.26 * len(rows)
    figure, axes = new_figure(WIDTH, inside + 0.95, (left, 0.2, 0.5, 0.45))
    colours = (COLOURS[5], COLOURS[2], COLOURS[0], COLOURS[1], COLOURS[3])
    for row, values in enumerate(shares):
        start = 0.0
        for colour, value in zip(colours, values, strict=False):
            axes.barh(row, value, left=start, color=colour, alpha=_STRONGEST, height=0.78)
            if value >= 0.12:
                axes.text(
                    start + value / 2, row, f"{100 * value:.0f} %", ha="center", va="center",
                    size=SMALL_SIZE, color=INK,
                )  # fmt: skip
            start += value
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
    axes.grid(False, axis="y")
    axes.set_xlabel(x_label)
    place, y = 0.0, 1 + 0.16 / inside
    width = WIDTH - left - 0.2
    for colour, part in zip(colours, parts, strict=False):
        axes.plot(
            [place + 0.01], [y + 0.05 / inside], transform=axes.transAxes, clip_on=False,
            marker="s", color=colour, alpha=_STRONGEST, markersize=7,
        )  # fmt: skip
        axes.text(place + 0.03, y, part, transform=axes.transAxes, size=SMALL_SIZE, color=INK)
        place += 0.06 + len(part) * 0.58 * SMALL_SIZE / 72 / width
    return figure
