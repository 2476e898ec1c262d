"""metrics.jsonl: one JSON object a logged step, continued without gaps or repeats on resume."""

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from deep_delta.accounting import peak_flops
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


class MetricsWriter(TrainerCallback):
    """Writes metrics.jsonl and the progress line, and gives every row to `also`.

    Rows at logged steps: step, tokens, flops, seconds, loss, lr, grad_norm, tokens_per_s, on a GPU
    memory_bytes (the allocator's peak so far) and, where its peak speed is known, mfu; at
    evaluations: step, tokens, flops, seconds, val_loss. `seconds` is training time, waiting for
    data included, without evaluation and saving; `tokens` counts input tokens and `flops` what
    they cost by `flops_per_token`; `loss` is the mean over the steps since the last row.
    """

    def __init__(
        self,
        path: Path,
        tokens_per_step: int,
        flops_per_token: float,
        resumed_at: int,
        progress: ProgressLine,
        also: Callable[[Row], None],
    ):
        self.path, self.tokens_per_step, self.progress = path, tokens_per_step, progress
        self.flops_per_token, self.also = flops_per_token, also
        rows = keep_until(path, resumed_at) if is_main() else []
        self.seconds: float = rows[-1]["seconds"] if rows else 0.0
        self.last_step = resumed_at
        self.started = math.nan  # since when the present interval trains, or waits for its data

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs
    ) -> None:
        # A resumed state brings the intervals of the run before.
        state.logging_steps, state.eval_steps = int(args.logging_steps), int(args.eval_steps or 0)
        state.save_steps = int(args.save_steps)
        self.started = time.perf_counter()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs
    ) -> None:
        self.started = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs
    ) -> None:
        # Whatever else happens after a step happens after its log, which stops the clock and
        # empties the running loss: an evaluation is not timed, and a checkpoint loses no loss.
        control.should_log |= control.should_evaluate or control.should_save

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs,
    ) -> None:
        if logs is None or "loss" not in logs:
            return
        elapsed = time.perf_counter() - self.started
        self.seconds += elapsed
        steps = state.global_step - self.last_step
        self.last_step = state.global_step
        speed = steps * self.tokens_per_step / elapsed
        row = {
            **self._position(state),
            "loss": logs["loss"],
            "lr": logs.get("learning_rate"),
            "grad_norm": logs.get("grad_norm"),
            "tokens_per_s": round(speed, 1),
        }
        if torch.cuda.is_available():
            row["memory_bytes"] = torch.cuda.max_memory_allocated()
            most = peak_flops(torch.cuda.get_device_name())
            if most is not None:
                row["mfu"] = round(speed * self.flops_per_token / (most * args.world_size), 4)
        self._append(row, state, control)
        if state.is_world_process_zero:
            self.progress.update(state.global_step, logs["loss"], speed)
        self.started = time.perf_counter()

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs,
    ) -> None:
        if metrics is None or "eval_loss" not in metrics:
            return
        self._append({**self._position(state), "val_loss": metrics["eval_loss"]}, state, control)
        self.started = time.perf_counter()

    def _position(self, state: TrainerState) -> Row:
        tokens = state.global_step * self.tokens_per_step
        return {
            "step": state.global_step,
            "tokens": tokens,
            "flops": tokens * self.flops_per_token,
            "seconds": round(self.seconds, 4),
        }

    def _append(self, row: Row, state: TrainerState, control: TrainerControl) -> None:
        if state.is_world_process_zero:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_line(row))
                if control.should_save:  # no checkpoint may outlive the rows before it
                    file.flush()
                    os.fsync(file.fileno())
            self.also(row)
