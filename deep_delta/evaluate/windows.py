"""How documents longer than the context are cut, so that each token is predicted once."""

from collections.abc import Iterator
from typing import NamedTuple


class Window(NamedTuple):
    """One forward pass over a document's input, which is an end-of-text token and then its tokens.

    The pass reads inputs `start` up to `stop`, and so predicts tokens `start` up to `stop` (input
    i predicts token i); tokens from `first` on are counted, the others were by the window before.
    """

    document: int
    start: int
    stop: int
    first: int


def windows(document: int, tokens: int, context: int) -> Iterator[Window]:
    """The windows of a document of `tokens` tokens, each of at most `context` inputs.

    The first window predicts as many tokens as fit. Each later one predicts context // 2 more (the
    last, what is left) and reaches back as far as the context allows: after the first window every
    token sees at least context - context // 2 inputs.
    """
    done = 0
    while done < tokens:
        step = context if done == 0 else max(1, context // 2)
        stop = min(tokens, done + step)
        yield Window(document, max(0, stop - context), stop, done)
        done = stop
