"""The eight multiple-choice tasks of the paper, as lm-evaluation-harness defines them.

Its own task files say how questions are put and scored; here is only what they leave open: which
number the paper shows, and which local files stand for the hub's data sets.
"""

import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deep_delta.errors import UserError


@dataclass(frozen=True)
class TaskInfo:
    """One task; its key in TASKS is its name in lm-evaluation-harness and its local folder's.

    label: as the paper's tables name it.
    scored: the split that is scored, and so the local file SCORED.jsonl.
    options: how many answers a question has (ARC has a few of 3 or 5).
    shown: the metric that is set beside the paper's number, "acc" or "acc_norm".
    fields: what a local record must have.
    """

    label: str
    scored: str
    options: int
    shown: str
    fields: tuple[str, ...]


_ARC = ("question", "choices", "answerKey")

TASKS: dict[str, TaskInfo] = {
    "arc_challenge": TaskInfo("ARC-Challenge", "test", 4, "acc_norm", _ARC),
    "arc_easy": TaskInfo("ARC-Easy", "test", 4, "acc_norm", _ARC),
    "hellaswag": TaskInfo(
        "HellaSwag",
        "validation",
        4,
        "acc_norm",
        ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
    ),
    "openbookqa": TaskInfo(
        "OpenBookQA", "test", 4, "acc_norm", ("question_stem", "choices", "answerKey")
    ),
    "piqa": TaskInfo("PIQA", "validation", 2, "acc_norm", ("goal", "sol1", "sol2", "label")),
    "sciq": TaskInfo(
        "SciQ",
        "test",
        4,
        "acc_norm",
        ("support", "question", "distractor1", "distractor2", "distractor3", "correct_answer"),
    ),
    "social_iqa": TaskInfo(
        "Social IQA",
        "validation",
        3,
        "acc",
        ("context", "question", "answerA", "answerB", "answerC", "label"),
    ),
    "winogrande": TaskInfo(
        "WinoGrande", "validation", 2, "acc", ("sentence", "option1", "option2", "answer")
    ),
}

# Both of its options are scored on the same words that follow them, so that a division by their
# length changes nothing: acc_norm is acc. (lm-evaluation-harness would divide by the length of what
# stands before those words.)
SAME_WORDS = ("winogrande",)


def check_names(names: list[str]) -> None:
    """UserError for an unknown or repeated task."""
    for name in names:
        if name not in TASKS:
            near = difflib.get_close_matches(name, TASKS, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise UserError(f"unknown task {name!r}; {hint}known: {', '.join(TASKS)}")
    if len(set(names)) != len(names):
        raise UserError(f"tasks has repeats: {', '.join(names)}")


@dataclass(frozen=True)
class LocalFiles:
    """A task's local files: the one that is scored, and the one that examples are drawn from."""

    scored: Path
    examples: Path | None

    @property
    def used(self) -> list[Path]:
        return [self.scored] + ([self.examples] if self.examples else [])


def local_files(name: str, folder: Path, shots: int) -> LocalFiles:
    """The files of a task under `folder`: NAME/SCORED.jsonl and, for examples, NAME/train*.jsonl.

    Where there is no training file and the test split is scored, examples come from
    validation.jsonl. Errors: UserError for a file that is missing.
    """
    here, scored = folder / name, TASKS[name].scored
    path = here / f"{scored}.jsonl"
    if not path.is_file():
        raise UserError(f"the task {name} has no file {path}")
    if shots == 0:
        return LocalFiles(path, None)
    found = [here / "train.jsonl", *sorted(here.glob("train_*.jsonl"))]
    if scored == "test":
        found.append(here / "validation.jsonl")
    for file in found:
        if file.is_file():
            return LocalFiles(path, file)
    raise UserError(f"the task {name} has no file {here / 'train.jsonl'} to draw examples from")


def read_rows(path: Path, fields: tuple[str, ...]) -> list[dict[str, Any]]:
    """The records of a .jsonl file. UserError, naming the line, for one that is not as needed."""
    rows = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{where}: not a JSON object") from error
            if not isinstance(row, dict):
                raise UserError(f"{where}: not a JSON object")
            missing = [field for field in fields if row.get(field) is None]
            if missing:
                raise UserError(f"{where}: the record has no {missing[0]!r}")
            _check_answer(row, where)
            rows.append({field: row[field] for field in fields})
    if not rows:
        raise UserError(f"{path} is empty")
    return rows


def _check_answer(row: dict[str, Any], where: str) -> None:
    if "answerKey" not in row:
        return
    choices = row["choices"]
    labels = choices.get("label") if isinstance(choices, dict) else None
    texts = choices.get("text") if isinstance(choices, dict) else None
    if not isinstance(labels, list) or not isinstance(texts, list) or len(labels) != len(texts):
        raise UserError(f"{where}: 'choices' must have as many 'text' as 'label'")
    if str(row["answerKey"]).strip() not in labels:
        raise UserError(f"{where}: the answer {row['answerKey']!r} is none of the choices")
