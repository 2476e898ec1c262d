"""What takes over a minute says what it waits for: a silent run looks like one that hangs."""

import sys
import threading
import time

from deep_delta.train.processes import processes, rank

LONG = 60.0  # seconds


class Watch:
    """Context that says on stderr, once for each piece of work, what a long one waits for."""

    def __init__(self) -> None:
        self._now = ("", "", time.monotonic())  # work, what it waits for, since when it goes on
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def begin(self, work: str, waits_for: str) -> None:
        """A piece of work begins, a step for example, and waits for something."""
        self._now = (work, waits_for, time.monotonic())

    def at(self, waits_for: str) -> None:
        """The same work goes on to what it waits for next."""
        work, _, since = self._now
        self._now = (work, waits_for, since)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        said = None
        while not self._done.wait(LONG / 60):
            work, waits_for, since = self._now
            if work and since != said and time.monotonic() - since > LONG:
                said = since
                who = f"rank {rank()}: " if processes() > 1 else ""
                line = f"ddl: {who}{work} takes over {LONG:g} s; it waits for {waits_for}"
                print(f"\n{line}", file=sys.stderr, flush=True)
