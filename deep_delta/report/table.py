"""A table of text cells in every form but HTML: rich, aligned text, Markdown."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """Cells under their columns' names; ``words`` are the columns of text, the rest are numbers.

    ``caption`` is one or more whole sentences that say what the numbers are.
    """

    title: str
    caption: str
    names: list[str]
    rows: list[list[str]]
    words: Collection[str]


def table_of(
    title: str, caption: str, rows: Sequence[Mapping[str, str]], words: Collection[str]
) -> Table:
    """The table of at least one row; each row has the same columns in the same order."""
    return Table(title, caption, list(rows[0]), [list(row.values()) for row in rows], words)


def as_markdown(table: Table) -> str:
    """The cells as GitHub Markdown, numbers right-aligned, ending in a newline."""
    rule = ["---" if name in table.words else "---:" for name in table.names]
    return "".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in line) + " |\n"
        for line in [table.names, rule, *table.rows]
    )


def as_text(table: Table) -> str:
    """The cells as aligned text, ending in a newline."""
    lines = [table.names, *table.rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(table.names))]
    lines.insert(1, ["-" * width for width in widths])
    return "".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        + "\n"
        for line in lines
    )


def print_tables(tables: Sequence[Table], sentences: Sequence[str]) -> None:
    """Print tables, the first without its title and caption, the sentences between it and the rest.

    With rich where that is installed.
    """
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table as RichTable
        from rich.text import Text
    except ImportError:
        first, *others = tables
        print(as_text(first))
        print("\n".join(sentences))
        for table in others:
            print(f"\n{table.title}. {table.caption}\n\n{as_text(table)}", end="")
        return
    console = Console(highlight=False)
    if not console.is_terminal:
        # Into a file or pipe rich assumes 80 columns and would break the cells apart.
        console = Console(highlight=False, width=1000)

    def say(text: str) -> None:
        # Text and not str: a "[" in an arm's name is not markup.
        console.print(Text(text), soft_wrap=True)

    for number, table in enumerate(tables):
        if number:
            say(f"\n{table.title}. {table.caption}")
        drawn = RichTable(box=box.SIMPLE_HEAD, pad_edge=False)
        for name in table.names:
            in_words = name in table.words
            drawn.add_column(Text(name), justify="left" if in_words else "right", overflow="fold")
        for row in table.rows:
            drawn.add_row(*(Text(cell) for cell in row))
        console.print(drawn)
        if not number:
            for sentence in sentences:
                say(sentence)
