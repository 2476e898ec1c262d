"""From what was measured to the summary that table, page and results.json share."""

import math
from collections.abc import Mapping
from typing import Any

from deep_delta.evaluate.checkpoint import Checkpoint
from deep_delta.evaluate.paper import SOURCE, TABLES, paper_scores
from deep_delta.evaluate.tasks import TASKS


def summarise(
    checkpoint: Checkpoint,
    loss: dict[str, Any] | None,
    results: list[dict[str, Any]],
    context: Mapping[str, Any],
) -> dict[str, Any]:
    """The summary of an evaluation, ready for JSON.

    Accuracies, their standard errors and the paper's numbers are in per cent. A task's "shown" is
    the metric that is set beside "paper"; an average is the plain mean of the shown metrics, its
    standard error that of independent tasks. "paper" is None where the paper has no such row, and
    an average has one only if all eight tasks were scored.
    """
    variant, size = checkpoint.variant, checkpoint.size
    tasks = [_task(result, variant, size) for result in results]
    return {
        "schema": 1,
        **context,
        "checkpoint": {
            "path": str(checkpoint.folder),
            "variant": variant,
            "size": size,
            "parameters": sum(p.numel() for p in checkpoint.model.parameters()),
            "weights_sha256": checkpoint.weights_sha256,
            "tokenizer_sha256": checkpoint.tokenizer_sha256,
        },
        "loss": loss,
        "tasks": tasks,
        "averages": [
            _average([task for task in tasks if task["shots"] == shots], shots, variant, size)
            for shots in dict.fromkeys(task["shots"] for task in tasks)
        ],
        "paper": {
            "source": SOURCE,
            "tables": {str(shots): number for (of, shots), number in TABLES.items() if of == size},
        },
    }


def _task(result: dict[str, Any], variant: str, size: str) -> dict[str, Any]:
    name, shots = result["task"], result["shots"]
    info = TASKS[name]
    scores = {
        key: None if result[key] is None else 100 * result[key]
        for key in ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr")
    }
    return {
        **result,
        **scores,
        "label": info.label,
        "shown": info.shown,
        "chance": 100 / info.options,
        "paper": paper_scores(variant, size, shots).get(name),
    }


def _average(tasks: list[dict[str, Any]], shots: int, variant: str, size: str) -> dict[str, Any]:
    errors = [task[f"{task['shown']}_stderr"] for task in tasks]
    known = [error for error in errors if error is not None]
    whole = {task["task"] for task in tasks} == set(TASKS)
    return {
        "shots": shots,
        "tasks": len(tasks),
        "mean": sum(task[task["shown"]] for task in tasks) / len(tasks),
        "stderr": math.hypot(*known) / len(tasks) if len(known) == len(errors) else None,
        "paper": paper_scores(variant, size, shots).get("average") if whole else None,
    }
