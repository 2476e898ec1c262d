"""The pieces that every report page is made of: sections, tables, figures, and how it was run."""

import json
from collections.abc import Collection, Mapping, Sequence
from html import escape
from typing import Any

_LONG = 24  # characters: a longer head of a row wraps, so that it leaves room for its row


def section(heading: str, content: str) -> str:
    """A heading (text) over ``content`` (HTML)."""
    return f"<section>\n<h2>{escape(heading)}</h2>\n{content}\n</section>"


def bullets(points: Sequence[str]) -> str:
    """A list of sentences (text)."""
    return "<ul>\n" + "\n".join(f"<li>{escape(point)}</li>" for point in points) + "\n</ul>"


def table(
    caption: str,
    names: Sequence[str],
    rows: Sequence[Sequence[str]],
    text_columns: Collection[str] = (),
) -> str:
    """A table that scrolls by itself on a narrow screen; all cells are text.

    The first column heads its row and stays in view. ``text_columns`` are aligned left and may
    wrap; the others are numbers.
    """

    def cell(tag: str, name: str, text: str, scope: str = "") -> str:
        classes = ["words"] * (name in text_columns) + ["long"] * (len(text) > _LONG)
        mark = f' class="{" ".join(classes)}"' if classes else ""
        return f"<{tag}{scope}{mark}>{escape(text)}</{tag}>"

    head = "".join(cell("th", name, name, ' scope="col"') for name in names)
    body = ""
    for row in rows:
        first, *others = zip(names, row, strict=True)
        cells = "".join(cell("td", name, text) for name, text in others)
        header = cell("th", *first, ' scope="row"')
        body += f"<tr>{header}{cells}</tr>\n"
    return (
        # Outside of the table, where it does not scroll away with it on a narrow screen.
        f'<p class="quiet">{escape(caption)}</p>\n'
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}">\n'
        f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>\n</div>"
    )


def figure(drawing: str, label: str, caption: str, narrow: bool = False) -> str:
    """A drawing (HTML) that scrolls by itself, with a caption (text) below.

    ``narrow``: it was drawn for the width of a phone, and fits there without scrolling.
    """
    mark = ' class="narrow"' if narrow else ""
    return (
        f"<figure{mark}>\n"
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(label)}">\n'
        f"{drawing}\n</div>\n<figcaption>{escape(caption)}</figcaption>\n</figure>"
    )


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """Terms (text) and what is to be said of each (HTML)."""
    listed = "\n".join(f"<dt>{escape(term)}</dt><dd>{said}</dd>" for term, said in pairs)
    return f"<dl>\n{listed}\n</dl>"


def provenance(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The `facts` of any summary: its command, commit, hardware and versions."""
    versions = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    return [
        ("Command", code(summary["command"])),
        ("Commit", code(summary["commit"] or "not in a git repository")),
        ("Hardware", escape(summary["hardware"])),
        ("Versions", escape(versions) or "unknown"),
    ]


def assignments(fields: Mapping[str, Any]) -> str:
    """``name = value``, one a line, as HTML."""
    return "<br>".join(code(f"{name} = {as_typed(value)}") for name, value in fields.items())


def code(text: str) -> str:
    """Text that a machine reads, as HTML."""
    return f"<code>{escape(text)}</code>"


def as_typed(value: object) -> str:
    """A recipe field's value as one would type it."""
    return value if isinstance(value, str) else json.dumps(value, default=str)
