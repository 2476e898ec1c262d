"""`ddl eval`: one checkpoint on prepared text and on tasks, resumable, with one report."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deep_delta.checkpoint import check_folder, quiet_transformers
from deep_delta.data.files import sha256_of, write_json_atomically
from deep_delta.errors import UserError
from deep_delta.evaluate.checkpoint import Checkpoint, load_checkpoint
from deep_delta.evaluate.summary import summarise
from deep_delta.evaluate.tasks import TASKS, check_names, local_files
from deep_delta.evaluate.text_loss import data_identity, text_loss
from deep_delta.report.evaluation import print_evaluation, write_evaluation
from deep_delta.report.provenance import commit, hardware, versions
from deep_delta.version import __version__

RESULTS = "results.json"
PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "lm_eval")
MOST_SHOTS = 64


@dataclass(frozen=True)
class Settings:
    """What to evaluate, and how.

    data: a folder that `ddl prepare` made; None for no loss. split: of it, "val" or "test".
    tasks: names of TASKS; shots: numbers of examples before a question, each with every task.
    task_data: a folder of local task files; None for the hub's data sets.
    batch_size: sequences of a forward pass.
    context: tokens of a window; None for the model's max_position_embeddings.
    limit: the first documents, and the first questions of each task, only; None for all.
    """

    data: Path | None = None
    split: str = "val"
    tasks: tuple[str, ...] = tuple(TASKS)
    shots: tuple[int, ...] = (0, 1)
    task_data: Path | None = None
    batch_size: int = 8
    context: int | None = None
    limit: int | None = None


def evaluate(folder: Path, out: Path, settings: Settings, command: str) -> dict[str, Any]:
    """Evaluate the checkpoint in `folder`, and report in `out`.

    Each part (the loss, a task at a number of shots) leaves a file in OUT/parts; one that is there
    already for the same weights, data and settings is not computed again.

    Args:
        command: how the evaluation was started, for the report.

    Returns:
        The summary that is also in OUT/results.json; OUT/report.html and its plots show it.

    Raises:
        UserError: a checkpoint, data or tasks that can't be read or do not fit each other.
    """
    check_folder(folder)
    _check_settings(settings)
    quiet_transformers()
    checkpoint = load_checkpoint(folder)
    if settings.tasks:
        checkpoint.tokenizer()  # before anything is computed
    context = _context(checkpoint, settings)
    (out / "parts").mkdir(parents=True, exist_ok=True)
    common = {
        "deep_delta": __version__,
        "weights_sha256": checkpoint.weights_sha256,
        "tokenizer_sha256": checkpoint.tokenizer_sha256,
        "context": context,
        "limit": settings.limit,
    }
    loss = None
    if settings.data is not None:
        data, split = settings.data, settings.split
        loss = _part(
            out,
            "loss" if split == "val" else f"loss-{split}",
            {**common, "data": data_identity(data, split)},
            lambda: text_loss(
                checkpoint, data, split, context, settings.batch_size, settings.limit
            ),
        )
    summary = summarise(
        checkpoint,
        loss,
        _run_tasks(checkpoint, out, settings, context, common),
        {
            "command": command,
            "commit": commit(),
            "hardware": hardware(),
            "versions": versions(*PACKAGES),
            "settings": {
                "data": settings.data and str(settings.data),
                "split": settings.split,
                "task_data": settings.task_data and str(settings.task_data),
                "batch_size": settings.batch_size,
                "context": context,
                "limit": settings.limit,
                "dtype": str(checkpoint.model.dtype).removeprefix("torch."),
            },
        },
    )
    write_json_atomically(out / RESULTS, summary)
    write_evaluation(summary, out)
    print_evaluation(summary)
    print(f"\nreport: {out / 'report.html'}")
    return summary


def _run_tasks(
    checkpoint: Checkpoint, out: Path, settings: Settings, context: int, common: dict[str, Any]
) -> list[dict[str, Any]]:
    """The result of every task at every number of shots, shots by shots."""
    harness: Any = None

    def run(name: str, shots: int) -> dict[str, Any]:
        nonlocal harness
        if harness is None:  # importing it takes seconds, and all may be there already
            from deep_delta.evaluate.harness import Harness

            harness = Harness(checkpoint, context, settings.batch_size)
        print(f"{TASKS[name].label}, {shots}-shot", flush=True)
        return harness.run(name, shots, settings.task_data, settings.limit)

    results = []
    for shots in settings.shots:
        for name in settings.tasks:
            files = _files(name, shots, settings.task_data)
            identity = {**common, "lm_eval": versions("lm_eval").get("lm_eval"), "files": files}

            def compute(name: str = name, shots: int = shots) -> dict[str, Any]:
                return run(name, shots)

            found = _part(out, f"{name}-{shots}-shot", identity, compute)
            results.append({"task": name, "shots": shots, "files_sha256": files, **found})
    return results


def _part(
    out: Path, name: str, identity: dict[str, Any], compute: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """The result that OUT/parts/NAME.json has for this identity; else computed and left there."""
    path = out / "parts" / f"{name}.json"
    try:
        record = json.loads(path.read_bytes())
        if record["identity"] == identity:
            return record["result"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        pass  # not there, or not whole: compute it
    result = compute()
    write_json_atomically(path, {"identity": identity, "result": result})
    return result


def _files(name: str, shots: int, task_data: Path | None) -> dict[str, str] | None:
    """Hashes of a task's local files by name; None for the hub."""
    if task_data is None:
        return None
    return {path.name: sha256_of(path) for path in local_files(name, task_data, shots).used}


def _check_settings(settings: Settings) -> None:
    check_names(list(settings.tasks))
    if settings.data is not None:
        data_identity(settings.data, settings.split)
    elif settings.split != "val":
        raise UserError(f"--split {settings.split} needs --data, the folder that it is a part of")
    if len(set(settings.shots)) != len(settings.shots):
        raise UserError(f"shots has repeats: {', '.join(map(str, settings.shots))}")
    if any(not 0 <= shots <= MOST_SHOTS for shots in settings.shots):
        raise UserError(f"shots must lie between 0 and {MOST_SHOTS}")
    if settings.task_data is not None and not settings.task_data.is_dir():
        raise UserError(f"there is no folder of task files {settings.task_data}")
    for shots in settings.shots:
        for name in settings.tasks:
            if settings.task_data is not None:
                local_files(name, settings.task_data, shots)


def _context(checkpoint: Checkpoint, settings: Settings) -> int:
    most = checkpoint.model.config.max_position_embeddings
    if settings.context is None:
        return most
    if not 2 <= settings.context <= most:
        raise UserError(f"--context is {settings.context}; the model's lies between 2 and {most}")
    return settings.context
