"""What every reader shares: documents out of records, and errors as one line."""

import re
from typing import NamedTuple

from deep_delta.errors import UserError

# What a document is a part of, a book say. Not "source": in most data sets that is a collection.
SOURCE_FIELD = "source_file"


class Document(NamedTuple):
    """A text, and the name of the source that it is part of, without line breaks; None for none."""

    text: str
    source: str | None = None


def document_of(record: object, where: str) -> Document:
    """The "text" of a record, and its SOURCE_FIELD where that is a string.

    Errors: UserError, naming `where`, unless the text is a string of valid Unicode.
    """
    fields = record if isinstance(record, dict) else {}
    text, source = fields.get("text"), fields.get(SOURCE_FIELD)
    if not isinstance(text, str):
        raise UserError(f'{where}: the record has no "text" string')
    if not text.isascii() and re.search("[\ud800-\udfff]", text):
        raise UserError(f"{where}: the text is not valid Unicode (a lone surrogate)")
    # One space for any white space: names are written one a line.
    name = " ".join(source.split()) if isinstance(source, str) else ""
    return Document(text, name or None)


def one_line(error: BaseException) -> str:
    """First line of an error's message, or its type when it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def missing_extra(what: str) -> UserError:
    """The error for a package of the extra 'train' that is not installed."""
    return UserError(f"{what} needs the extra 'train': pip install 'deep-delta-learning[train]'")
