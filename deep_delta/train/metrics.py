"""metrics.jsonl: one JSON object a logged step, continued without gaps or repeats on resume."""

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from deep_delta.accounting import PeakMemory, peak_flops
from deep_delta.data.files import write_atomically
from deep_delta.train.processes import is_main
from deep_delta.train.progress import ProgressLine

Row = dict[str, Any]


def read_metrics(path: Path) -> list[Row]:
    """The rows of a metrics.jsonl; a last line that was cut off by a crash is left out."""
    rows = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return rows


def keep_until(path: Path, step: int) -> list[Row]:
    """Drop the rows after a step, atomically, and return those that stay."""
    rows = [row for row in read_metrics(path) if row["step"] <= step]
    write_atomically(path, "".join(_line(row) for row in rows).encode())
    return rows


def _line(row: Row) -> str:
    # JSON has no NaN: a diverged loss is null, and readers can tell it from a number.
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }
    return json.dumps(finite) + "\n"


class Metrics:
    """Writes metrics.jsonl and the progress line, and gives every row to `also`.

    Rows at logged steps: step, tokens, flops, seconds, loss, lr, grad_norm, tokens_per_s, on a GPU
    memory_bytes (the run's peak so far) and, where its peak speed is known, mfu; at
    evaluations: step, tokens, flops, seconds, val_loss. `seconds` is training time, waiting for
    data included, without evaluation and saving; `tokens` counts input tokens and `flops` what
    they cost by `flops_per_token`; `loss` is the mean over the steps since the last row.

    resumed_at: rows after this step are dropped from the file.
    devices: how many share the work, for mfu.
    """

    def __init__(
        self,
        path: Path,
        tokens_per_step: int,
        flops_per_token: float,
        resumed_at: int,
        devices: int,
        memory: PeakMemory,
        progress: ProgressLine,
        also: Callable[[Row], None],
    ):
        self.path, self.tokens_per_step, self.progress = path, tokens_per_step, progress
        self.flops_per_token, self.devices = flops_per_token, devices
        self.memory, self.also = memory, also
        rows = keep_until(path, resumed_at) if is_main() else []
        self.seconds: float = rows[-1]["seconds"] if rows else 0.0
        self.last_step = resumed_at
        self.started = math.nan  # since when the present interval trains, or waits for its data

    def start_clock(self) -> None:
        """The time since the last row was not training."""
        self.started = time.perf_counter()

    def trained(self, step: int, loss: float, lr: float, grad_norm: float) -> None:
        """A row of the steps since the last one, when the device has finished them."""
        elapsed = time.perf_counter() - self.started
        self.seconds += elapsed
        steps, self.last_step = step - self.last_step, step
        speed = steps * self.tokens_per_step / elapsed
        row = {
            **self._position(step),
            "loss": loss,
            "lr": lr,
            "grad_norm": grad_norm,
            "tokens_per_s": round(speed, 1),
        }
        if torch.cuda.is_available():
            row["memory_bytes"] = self.memory.so_far()
            most = peak_flops(torch.cuda.get_device_name())
            if most is not None:
                row["mfu"] = round(speed * self.flops_per_token / (most * self.devices), 4)
        self._append(row)
        if is_main():
            self.progress.update(step, loss, speed)
        self.start_clock()

    def evaluated(self, step: int, val_loss: float) -> None:
        """A row of an evaluation."""
        self._append({**self._position(step), "val_loss": val_loss})

    def flush(self) -> None:
        """Make the rows durable."""
        if is_main():
            with self.path.open("a", encoding="utf-8") as file:
                os.fsync(file.fileno())

    def _position(self, step: int) -> Row:
        tokens = step * self.tokens_per_step
        return {
            "step": step,
            "tokens": tokens,
            "flops": tokens * self.flops_per_token,
            "seconds": round(self.seconds, 4),
        }

    def _append(self, row: Row) -> None:
        if is_main():
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_line(row))
            self.also(row)
