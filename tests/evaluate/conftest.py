"""A checkpoint that answers in a blink, data of made-up text, and small files of every task."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from train.micro import MODEL, make_data

from deep_delta import DeepDeltaConfig, DeepDeltaForCausalLM
from deep_delta.data import bundled_tokenizer

ROWS = 7
WORDS = ("sun", "moon", "river", "stone", "light", "wind", "fire")


def word(number: int) -> str:
    return WORDS[number % len(WORDS)]


def rows_of_tasks(number: int) -> dict[str, dict[str, Any]]:
    """Record `number` of every task, with what the public data sets have."""
    four = [word(number + i) + " of the valley" * (i % 3) for i in range(4)]
    choices = {"text": four, "label": ["A", "B", "C", "D"]}
    question = f"Which is the {word(number)} of the {word(3 * number + 1)}?"
    answer = "ABCD"[number % 4]
    return {
        "arc_challenge": {"question": question, "choices": choices, "answerKey": answer},
        "arc_easy": {"question": question + "!", "choices": choices, "answerKey": answer},
        "hellaswag": {
            "activity_label": "Walking", "ctx_a": f"A {word(number)} rises.", "ctx_b": "then",
            "endings": four, "label": str(number % 4),
        },
        "openbookqa": {"question_stem": question, "choices": choices, "answerKey": answer},
        "piqa": {"goal": question, "sol1": four[0], "sol2": four[1], "label": number % 2},
        "sciq": {
            "support": "" if number == 2 else f"The {word(number)} is old.", "question": question,
            "distractor1": four[0], "distractor2": four[1], "distractor3": four[2],
            "correct_answer": four[3],
        },
        "social_iqa": {
            "context": f"Kim saw the {word(number)}.", "question": "What next?",
            "answerA": four[0], "answerB": four[1], "answerC": four[2],
            "label": str(1 + number % 3),
        },
        "winogrande": {
            "sentence": f"The {four[0]} beat the {four[1]}, for _ was {word(number + 5)}.",
            "option1": four[0], "option2": four[1], "answer": str(1 + number % 2),
        },
    }  # fmt: skip


def write_tasks(folder: Path) -> Path:
    """Every split of every task, but no training split for SciQ."""
    splits = {"train": 100, "validation": 200, "test": 300}
    for split, offset in splits.items():
        records = [rows_of_tasks(offset + number) for number in range(ROWS)]
        for name in records[0]:
            if (name, split) == ("sciq", "train"):
                continue
            path = folder / name / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(record[name]) + "\n" for record in records))
    return folder


def write_checkpoint(folder: Path) -> Path:
    """Random weights, large enough that predictions differ, with the bundled tokenizer."""
    torch.manual_seed(5)
    config = DeepDeltaConfig.from_preset(
        "ddl-cc", "tiny", **MODEL, max_position_embeddings=48, initializer_range=0.5
    )
    DeepDeltaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(bundled_tokenizer() / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("eval") / "final")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("eval-data"))


@pytest.fixture(scope="session")
def task_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("eval-tasks"))
