"""Figures in, files and inline SVG out: everything that depends on matplotlib's own ways."""

import functools
import html
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from deep_delta.errors import UserError
from deep_delta.report.style import INK, LIGHT_BACKGROUND

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

P = ParamSpec("P")
R = TypeVar("R")

PNG_DPI = 150

_SETTINGS: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.0,
    "axes.labelsize": 9.0,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": INK,
    "grid.alpha": 0.14,
    "grid.linewidth": 0.6,
    # Text stays text: smaller, searchable, and read in the reader's own font.
    "svg.fonttype": "none",
    # An arm may be called "$x$"; that is a name and not a formula.
    "text.parse_math": False,
}


def in_house_style(draw: Callable[P, R]) -> Callable[P, R]:
    """Decorator: run ``draw`` under this module's settings, and restore the user's after it.

    All of the drawing has to happen inside, because matplotlib reads its settings whenever it makes
    a text or a tick. Raises UserError on the call if matplotlib is not installed.
    """

    @functools.wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> R:
        matplotlib, _ = _matplotlib()
        with matplotlib.rc_context(_SETTINGS):
            return draw(*args, **kwargs)

    return styled


def new_figure(
    width: float, height: float, margins: tuple[float, float, float, float]
) -> "tuple[Figure, Axes]":
    """A figure of ``width`` x ``height`` inches with one axes.

    ``margins`` are left, right, below and above the axes, in inches.
    """
    _, figure_class = _matplotlib()
    left, right, below, above = margins
    figure = figure_class(figsize=(width, height))
    box = (
        left / width,
        below / height,
        (width - left - right) / width,
        (height - below - above) / height,
    )
    return figure, figure.add_axes(box)


def _matplotlib() -> tuple[Any, Any]:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(
            "drawing the report needs the extra 'report': pip install 'deep-delta-learning[report]'"
        ) from error
    return matplotlib, Figure


def save(figure: "Figure", folder: Path, name: str) -> None:
    """Write the figure as NAME.png and NAME.svg."""
    save_png(figure, folder / f"{name}.png")
    save_svg(figure, folder / f"{name}.svg")


def save_png(figure: "Figure", path: Path) -> None:
    """Write a PNG at 150 dpi on white; the same figure gives the same bytes."""
    matplotlib, _ = _matplotlib()
    with matplotlib.rc_context(_SETTINGS):
        figure.savefig(
            path,
            format="png",
            dpi=PNG_DPI,
            facecolor=LIGHT_BACKGROUND,
            metadata={"Software": None},
        )


def save_svg(figure: "Figure", path: Path) -> None:
    """Write an SVG on white; the same figure gives the same bytes."""
    matplotlib, _ = _matplotlib()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({**_SETTINGS, "svg.hashsalt": path.name}):
        figure.savefig(path, format="svg", facecolor=LIGHT_BACKGROUND, metadata=nothing)


def inline_svg(figure: "Figure", name: str, title: str, description: str) -> str:
    """The figure as an ``<svg role="img">`` element to put into a page.

    ``name`` prefixes every id, so it must be unique in the page. The background is transparent and
    text and axes take the page's text colour. ``title`` and ``description`` are the text
    alternative.
    """
    matplotlib, _ = _matplotlib()
    buffer = io.StringIO()
    with matplotlib.rc_context({**_SETTINGS, "svg.hashsalt": name}):
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", facecolor="none", metadata=nothing)
    drawing = buffer.getvalue()
    view_box = re.search(r'viewBox="([^"]+)"', drawing)
    body = re.search(r"<svg\b[^>]*>(.*)</svg>", drawing, flags=re.DOTALL)
    if view_box is None or body is None:
        raise ValueError("matplotlib wrote an SVG without a viewBox or a body")
    label = html.escape(title)
    return (
        f'<svg role="img" aria-label="{label}" aria-describedby="{name}-description" '
        f'viewBox="{view_box.group(1)}" '
        # matplotlib asks for these by a rule for "*", which would apply to the whole page.
        'style="stroke-linejoin: round; stroke-linecap: butt">\n'
        f"<title>{label}</title>\n"
        f'<desc id="{name}-description">{html.escape(description)}</desc>'
        f"{_clean(body.group(1), name)}</svg>"
    )


def _clean(body: str, name: str) -> str:
    """Drop metadata, comments and style rules, make ids unique, let the page choose the ink."""
    for part in (r"<metadata>.*?</metadata>", r"<style\b.*?</style>", r"<!--.*?-->"):
        body = re.sub(part, "", body, flags=re.DOTALL)
    body = body.replace("xlink:href=", "href=").replace(INK, "currentColor")
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', body))

    def own_id(match: "re.Match[str]") -> str:
        return f' id="{name}-{match.group(1)}"' if match.group(1) in used else ""

    body = re.sub(r' id="([^"]+)"', own_id, body)
    return re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", body)
