"""Between two steps the Trainer must neither wait for the GPU nor keep Python busy."""

import json
from unittest import mock

import pytest
import torch
from helpers import Waits
from train.micro import micro_recipe, rows_of

from deep_delta import DeepDeltaForCausalLM
from deep_delta.train import train, trainer
from deep_delta.train.trainer import DeltaTrainer


@pytest.mark.parametrize("passes", [1, 2])
def test_steps_between_two_logs_read_nothing_back(micro_data, tmp_path, monkeypatch, passes):
    step, log = DeltaTrainer.training_step, DeltaTrainer.log
    waits = Waits()

    def marked_step(self, *arguments):
        waits.found.append("pass")
        return step(self, *arguments)

    def marked_log(self, *arguments):
        log(self, *arguments)
        waits.found.append("log")

    monkeypatch.setattr(DeltaTrainer, "training_step", marked_step)
    monkeypatch.setattr(DeltaTrainer, "log", marked_log)
    fields = {"steps": 9, "log_every": 4, "eval_every": 9, "micro_batch_size": 4 // passes}
    with waits:
        train(micro_recipe(micro_data, tmp_path, **fields))
    # An interval is from one log's end to the next pass, ..., the last pass, and the log's own.
    steps = "".join({"pass": "p", "log": "L"}.get(name, "w") for name in waits.found)
    first, second, *_ = steps[steps.index("p") :].split("L")
    assert first.rstrip("w") == second.rstrip("w") == "p" * 4 * passes
    assert first.endswith("w")  # a log reads: it would have been seen


def test_passes_do_not_count_the_models_parameters(micro_data, tmp_path, monkeypatch):
    """Trainer does to estimate FLOPs, which metrics.jsonl has: a walk over all modules."""
    counted = []
    monkeypatch.setattr(
        DeepDeltaForCausalLM, "num_parameters", lambda self, **_: counted.append(1) or 1
    )
    recipe = micro_recipe(micro_data, tmp_path, micro_batch_size=2, save_every=6)
    train(recipe)
    assert counted == []
    state = json.loads((recipe.run_folder / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["total_flos"] == pytest.approx(rows_of(recipe.run_folder, "flops")[-1]["flops"])


def test_on_a_gpu_a_batch_is_copied_without_waiting(micro_data, tmp_path, monkeypatch):
    """From pinned memory and not blocking: else every copy waits for the step before it."""
    made = mock.MagicMock(return_value=mock.MagicMock(n_gpu=1))
    monkeypatch.setattr(trainer, "TrainingArguments", made)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    trainer.training_arguments(micro_recipe(micro_data, tmp_path, precision="bf16"))
    assert made.call_args.kwargs["dataloader_pin_memory"]
    assert made.call_args.kwargs["accelerator_config"] == {"non_blocking": True}
