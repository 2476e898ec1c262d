"""Micro runs that the tests of training, comparing and the command line share: under a second each.

`tests` is on the path (pytest puts it there for its conftest), so `from train.micro import …` works
in every test file.
"""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import close
from transformers import AutoModelForCausalLM

from deep_delta.data import prepare
from deep_delta.errors import UserError
from deep_delta.train import Recipe

WORDS = ("the", "river", "stone", "light", "over", "under", "quiet", "old", "walks", "sings", "and")
MODEL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "head_dim": 16}
FIELDS: dict[str, Any] = {
    "steps": 6, "batch_size": 4, "seq_len": 16, "warmup_steps": 2,
    "lr": 3e-3, "log_every": 1, "eval_every": 3, "eval_sequences": 8,
}  # fmt: skip


def some_text(words: int, seed: int) -> str:
    """Made-up text, the same for the same arguments."""
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def make_data(folder: Path) -> Path:
    """Sixty documents as shards (96 training and 20 validation sequences of 16 tokens)."""
    lines = [json.dumps({"text": some_text(10 + seed % 30, seed)}) for seed in range(60)]
    source = folder / "documents.jsonl"
    source.write_text("\n".join(lines) + "\n", encoding="utf-8")
    prepare([str(source)], folder / "shards", val_fraction=0.25)
    return folder / "shards"


def micro_recipe(data: Path, out: Path, **fields: Any) -> Recipe:
    """A recipe that trains six steps; `fields` on top, `model` field by field."""
    model = {**MODEL, **fields.pop("model", {})}
    return Recipe(**{**FIELDS, "data": str(data), "out": str(out), **fields, "model": model})


def as_options(**fields: Any) -> list[str]:
    """Recipe fields as a user types them: --name value, and --model.name value."""
    model = {f"model.{name}": value for name, value in fields.pop("model", {}).items()}
    return [word for item in {**fields, **model}.items() for word in (f"--{item[0]}", str(item[1]))]


def rows_of(folder: Path, key: str) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl that have the key, read without the code under test."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if key in row]


def losses(folder: Path) -> list[tuple[int, str, float]]:
    """What must repeat bit by bit when a run does: (step, kind, loss), in the file's order."""
    kinds = [(row, "val_loss" if "val_loss" in row else "loss") for row in rows_of(folder, "step")]
    return [(row["step"], kind, row[kind]) for row, kind in kinds]


def user_error(call: Any, *arguments: Any) -> str:
    """The message of the UserError that the call must raise."""
    with pytest.raises(UserError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The final weights of a run."""
    return AutoModelForCausalLM.from_pretrained(folder / "final").state_dict()


def equal_weights(folder: Path, other: Path, atol: float = 0.0) -> None:
    """Both runs must end with the same weights."""
    actual, expected = weights(folder), weights(other)
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        close(tensor, expected[name], atol)
