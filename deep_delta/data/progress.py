"""What `prepare` shows while it works: a live line on a terminal, nothing elsewhere."""

import sys
import time
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class ProgressLine:
    """Context manager for the live line: current input, documents, tokens, tokens per second.

    Stays silent when stderr is not a terminal, or when rich is not installed: a missing ornament is
    no reason to stop.
    """

    def __init__(self, inputs: int) -> None:
        """`inputs`: how many input files there are."""
        self._inputs = inputs
        self._start = time.monotonic()
        self._tokens = 0
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            try:
                from rich.console import Console
                from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
            except ImportError:
                return self
            self._progress = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[counts]}"),
                TimeElapsedColumn(),
                console=Console(stderr=True),
            )
            self._task = self._progress.add_task("", total=self._inputs, counts="")
            self._progress.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._progress is not None:
            self._progress.stop()

    def update(self, index: int, name: str, documents: int, tokens: int) -> None:
        """Show that `tokens` more tokens were written; `documents` counts all so far.

        index: zero-based number of the input `name` that is being read.
        """
        self._tokens += tokens
        if self._progress is None or self._task is None:
            return
        speed = self._tokens / max(time.monotonic() - self._start, 1e-9)
        self._progress.update(
            self._task,
            completed=index,
            description=f"{name} ({index + 1} of {self._inputs})",
            counts=f"{documents:,} documents, {self._tokens:,} tokens, {speed:,.0f} tokens/s",
        )
