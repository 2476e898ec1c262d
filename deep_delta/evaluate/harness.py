"""One task at one number of shots, by lm-evaluation-harness on the loaded model."""

import hashlib
import json
import logging
import math
from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
from lm_eval import evaluate as harness_evaluate
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from deep_delta.data.texts import one_line
from deep_delta.errors import UserError
from deep_delta.evaluate.checkpoint import Checkpoint
from deep_delta.evaluate.tasks import SAME_WORDS, TASKS, local_files, read_rows

METRICS = ("acc", "acc_norm")
EXAMPLES = "examples"  # the split of local data that examples are drawn from

# Where the harness keeps our eight: a list of all its thousands of tasks takes seconds to make.
FOLDERS = ("arc", "hellaswag", "openbookqa", "piqa", "sciq", "siqa", "winogrande")


class Harness:
    """The harness around one model; `run` scores one task."""

    def __init__(self, checkpoint: Checkpoint, context: int, batch_size: int) -> None:
        """context: the most tokens of a question and an answer; what stands before is cut."""
        logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its bars stay, its advice does not
        datasets.disable_progress_bars()
        here = Path(lm_eval.tasks.__file__).parent
        self.tasks = TaskManager(
            include_defaults=False, include_path=[here / folder for folder in FOLDERS]
        )
        self.model = HFLM(
            pretrained=checkpoint.model,
            tokenizer=checkpoint.tokenizer(),
            backend="causal",
            max_length=context,
            batch_size=batch_size,
        )

    def run(
        self, name: str, shots: int, task_data: Path | None, limit: int | None
    ) -> dict[str, Any]:
        """Score one task, with data from the folder `task_data` or, without one, from the hub.

        Returns examples (how many were scored); acc, acc_stderr, acc_norm, acc_norm_stderr, as
        fractions, a standard error None for a single example; rows_sha256, a hash of the records
        that were scored.

        Errors: UserError for data that can't be had or read.
        """
        task = self._task(name, shots, task_data)
        documents = task.task_docs
        count = min(limit or len(documents), len(documents))
        # What simple_evaluate does before it calls this, less its search for the machine's facts,
        # which takes longer than a small model's answers.
        task.set_config("num_fewshot", shots)
        task.set_fewshot_seed(DEFAULT_OTHER_SEED)
        found = harness_evaluate(
            self.model, {"tasks": {name: task}}, limit=limit, log_samples=False
        )
        assert found is not None  # None is for processes other than the first
        scores = found["results"][name]
        result: dict[str, Any] = {"examples": count}
        for metric in METRICS:
            source = "acc" if name in SAME_WORDS else metric
            result[metric] = float(scores[f"{source},none"])
            result[f"{metric}_stderr"] = _stderr(scores[f"{source}_stderr,none"])
        result["rows_sha256"] = _hash_of_rows(documents, count)
        return result

    def _task(self, name: str, shots: int, task_data: Path | None) -> Any:
        metrics = ("acc",) if name in SAME_WORDS else METRICS
        changed: dict[str, Any] = {
            "task": name,
            "metric_list": [  # Social IQA's own list has acc alone
                {"metric": metric, "aggregation": "mean", "higher_is_better": True}
                for metric in metrics
            ],
        }
        try:
            if task_data is not None:
                changed |= _local(name, shots, task_data)
            # A task with fields changed is loaded as the member of a group.
            return self.tasks.load([{"group": "ddl", "task": [changed]}])["tasks"][name]
        except UserError:
            raise
        except Exception as error:  # the hub client and the network below it raise dozens of kinds
            source = f"from {task_data}" if task_data else "from the hub"
            hint = "" if task_data else "; --task-data DIR reads local files"
            raise UserError(f"can't load {name} {source}: {one_line(error)}{hint}") from error


def _local(name: str, shots: int, folder: Path) -> dict[str, Any]:
    """The fields of a task that make it read local files. Errors: those of reading them."""
    info, files = TASKS[name], local_files(name, folder, shots)
    splits = {info.scored: datasets.Dataset.from_list(read_rows(files.scored, info.fields))}
    if files.examples is not None:
        splits[EXAMPLES] = datasets.Dataset.from_list(read_rows(files.examples, info.fields))
    return {
        "custom_dataset": lambda **_: splits,
        "training_split": EXAMPLES if files.examples else None,
        "validation_split": info.scored if info.scored == "validation" else None,
        "test_split": info.scored if info.scored == "test" else None,
    }


def _stderr(value: Any) -> float | None:
    """None for what the harness gives in place of the standard error of one example."""
    return float(value) if isinstance(value, float) and math.isfinite(value) else None


def _hash_of_rows(documents: Any, count: int) -> str:
    digest = hashlib.sha256()
    for row in documents.select(range(count)):
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()
