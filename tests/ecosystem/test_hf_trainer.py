"""transformers' Trainer: the same loss however a batch is cut, padded or flattened."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import close, token_ids
from small_models import FOUR, FP32, small_model
from torch.nn import functional as F

from deep_delta import DeepDeltaForCausalLM

pytest.importorskip("accelerate", reason="needs the extra train")

from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

LENGTHS = (12, 5, 9, 2, 7, 12, 3, 10)
# Tokens 1 to 60 (0 pads), of very different lengths, with a prompt that is not predicted.
ROWS: list[dict[str, Any]] = []
for _number, _length in enumerate(LENGTHS):
    _ids = (1 + token_ids(1, _length, vocab_size=60, seed=_number)[0]).tolist()
    ROWS.append({"input_ids": _ids, "labels": [-100, *_ids[1:]]})


def padded(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)

    def pad(name: str, value: int) -> torch.Tensor:
        return torch.tensor([row[name] + [value] * (longest - len(row[name])) for row in rows])

    ids = pad("input_ids", 0)
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": pad("labels", -100)}


def train(model: DeepDeltaForCausalLM, folder: Path, collate=padded, **options: Any) -> float:
    """One step of plain gradient descent on all rows; the loss that Trainer logs."""
    fields = {
        "per_device_train_batch_size": len(ROWS),
        "max_steps": 1,
        "optim": "sgd",
        "learning_rate": 0.1,
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    arguments = TrainingArguments(str(folder), **{**fields, **options})
    trainer = Trainer(model, arguments, train_dataset=ROWS, data_collator=collate)
    trainer.train()
    return next(row["loss"] for row in trainer.state.log_history if "loss" in row)


def own_loss(model: DeepDeltaForCausalLM, smoothing: float = 0.0) -> float:
    """Row by row, without padding."""
    scores, targets = [], []
    with torch.no_grad():
        for row in ROWS:
            scores.append(model.eval()(torch.tensor([row["input_ids"]])).logits[0, :-1])
            targets += row["labels"][1:]
    goal = torch.tensor(targets)
    return F.cross_entropy(torch.cat(scores), goal, label_smoothing=smoothing).item()


def test_own_loss_is_not_the_loss_of_unshifted_labels():
    """What label smoothing trained when Trainer did not know the class: to repeat the input."""
    model = small_model("ddl-cc")
    with torch.no_grad():
        scores = [model(torch.tensor([row["input_ids"]])).logits[0] for row in ROWS]
    labels = torch.tensor([label for row in ROWS for label in row["labels"]])
    unshifted = F.cross_entropy(torch.cat(scores), labels, label_smoothing=0.1).item()
    assert abs(unshifted - own_loss(model, 0.1)) > 0.05


@pytest.mark.parametrize("variant", FOUR)
def test_accumulated_gradients_are_those_of_one_large_batch(variant, tmp_path):
    whole, parts = small_model(variant), small_model(variant)
    expected = own_loss(whole)
    start = {name: p.detach().clone() for name, p in whole.named_parameters()}
    assert train(whole, tmp_path) == pytest.approx(expected, abs=FP32)
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    assert train(parts, tmp_path, **options) == pytest.approx(expected, abs=FP32)
    for name, parameter in parts.named_parameters():
        close(parameter.detach(), whole.get_parameter(name).detach(), atol=2e-6)
        assert not torch.equal(parameter, start[name]), name


@pytest.mark.parametrize("variant", FOUR)
def test_label_smoothing_smooths_the_next_token(variant, tmp_path):
    model = small_model(variant)
    expected = own_loss(model, smoothing=0.1)
    assert train(model, tmp_path, label_smoothing_factor=0.1) == pytest.approx(expected, abs=FP32)


@pytest.mark.parametrize("variant", FOUR)
def test_flattened_rows_train_what_padded_rows_do(variant, tmp_path):
    """One row without padding or mask, whose position_ids restart where a text begins."""
    pad, flat = small_model(variant), small_model(variant)
    expected = own_loss(pad)
    assert train(pad, tmp_path) == pytest.approx(expected, abs=FP32)
    loss = train(flat, tmp_path, DataCollatorWithFlattening(return_tensors="pt"))
    assert loss == pytest.approx(expected, abs=FP32)
    for name, parameter in flat.named_parameters():
        close(parameter.detach(), pad.get_parameter(name).detach(), atol=2e-6)
