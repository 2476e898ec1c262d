"""One line a run: step, loss, tokens/s and time left, kept up to date while it trains."""

import multiprocessing
import sys
import time


class ProgressLine:
    """Rewrites its line on a terminal; elsewhere it prints a new one about every tenth of the run.

    A process that another one started has no terminal to itself: its lines are new ones too.

    label: what stands in front, e.g. "ddl-cc seed 0"; steps: how many the run has.
    """

    def __init__(self, label: str, steps: int, start: int = 0):
        self.label, self.steps, self.start = label, steps, start
        self.began, self.counts_start_up = time.monotonic(), True
        self.live = sys.stderr.isatty() and multiprocessing.parent_process() is None
        self.tenths = 0
        self._width = 0

    def update(self, step: int, loss: float, tokens_per_s: float) -> None:
        done, elapsed = step - self.start, time.monotonic() - self.began
        left = elapsed / done * (self.steps - step) if done else 0.0
        if self.counts_start_up and done:  # compiling is not what the steps to come will cost
            self.start, self.began, self.counts_start_up = step, time.monotonic(), False
        text = (
            f"{self.label}  step {step:,}/{self.steps:,}  loss {loss:.4f}  "
            f"{tokens_per_s:,.0f} tokens/s  ETA {_clock(left)}"
        )
        if self.live:
            self._rewrite(text)
        elif 10 * step // self.steps > self.tenths:
            self.tenths = 10 * step // self.steps
            print(text, file=sys.stderr, flush=True)

    def finish(self, text: str) -> None:
        """Replace the line by how the run ended."""
        if self.live:
            self._rewrite(f"{self.label}  {text}")
            print(file=sys.stderr)
        else:
            print(f"{self.label}  {text}", file=sys.stderr, flush=True)

    def _rewrite(self, text: str) -> None:
        print("\r" + text.ljust(self._width), end="", file=sys.stderr, flush=True)
        self._width = len(text)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
