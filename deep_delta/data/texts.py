"""What every reader of documents shares: the check of a text, and errors as one line."""

import re

from deep_delta.errors import UserError


def checked_text(text: object, where: str) -> str:
    """`text` itself. Errors: UserError, naming `where`, unless it is a string of valid Unicode."""
    if not isinstance(text, str):
        raise UserError(f'{where}: the record has no "text" string')
    if not text.isascii() and re.search("[\ud800-\udfff]", text):
        raise UserError(f"{where}: the text is not valid Unicode (a lone surrogate)")
    return text


def one_line(error: BaseException) -> str:
    """First line of an error's message, or its type when it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def missing_extra(what: str) -> UserError:
    """The error for a package of the extra 'train' that is not installed."""
    return UserError(f"{what} needs the extra 'train': pip install 'deep-delta-learning[train]'")
