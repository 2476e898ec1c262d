"""Signals end a run after the step in which they come, with a checkpoint."""

import signal
from typing import Any

from deep_delta.train.processes import Agreement, processes

# Ctrl-C; what schedulers send before they kill; what a terminal sends when it closes.
SIGNALS = [signal.SIGINT, signal.SIGTERM]
if hasattr(signal, "SIGHUP"):  # not on Windows
    SIGNALS.append(signal.SIGHUP)


class NotFinite(Exception):
    """A loss or gradient norm that is no number: what, at which step, on which sequences."""

    def __init__(self, what: str, value: float, step: int, sequences: list[int]):
        super().__init__(f"the {what} is {value} at step {step}")
        self.what, self.value, self.step, self.sequences = what, value, step, sequences


class StopOnSignal:
    """Context in which Ctrl-C, SIGTERM or SIGHUP, in any process, is kept until it is asked for.

    `requested` is then the signal's number, else None. Ctrl-C after that ends the run at once;
    another SIGTERM, which schedulers like to repeat, changes nothing.
    """

    def __init__(self) -> None:
        self.requested: int | None = None
        self._agreement = Agreement()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopOnSignal":
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup's
                self._before[number] = signal.signal(number, self._stop)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if exc[0] not in (None, NotFinite) and processes() > 1:
            # This process ends and says why. So does torchrun end it, whose signal may come first.
            # After NotFinite, which all meet, a comparison goes on.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def _stop(self, number: int, *_: object) -> None:
        if self.requested is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = self.requested or number

    def agree(self) -> int | None:
        """`requested`, the same in all processes from here on."""
        self.requested = self._agreement.highest(self.requested or 0) or None
        return self.requested
