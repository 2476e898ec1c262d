"""Between two logs the loop must not wait for the GPU."""

from unittest import mock

import pytest
import torch
from helpers import Waits
from train.micro import micro_recipe

from deep_delta.data import PackedSequences, TokenShards
from deep_delta.train import train
from deep_delta.train.batches import collate
from deep_delta.train.loop import Loop


@pytest.mark.parametrize("passes", [1, 2])
def test_steps_between_two_logs_read_nothing_back(micro_data, tmp_path, monkeypatch, passes):
    one_pass, log = Loop.forward_backward, Loop.log
    waits = Waits()

    def marked_step(self, *arguments):
        waits.found.append("pass")
        return one_pass(self, *arguments)

    def marked_log(self, *arguments):
        log(self, *arguments)
        waits.found.append("log")

    monkeypatch.setattr(Loop, "forward_backward", marked_step)
    monkeypatch.setattr(Loop, "log", marked_log)
    fields = {"steps": 9, "log_every": 4, "eval_every": 9, "micro_batch_size": 4 // passes}
    with waits:
        train(micro_recipe(micro_data, tmp_path, **fields))
    # An interval is from one log's end to the next pass, ..., the last pass, and the log's own.
    steps = "".join({"pass": "p", "log": "L"}.get(name, "w") for name in waits.found)
    first, second, *_ = steps[steps.index("p") :].split("L")
    assert first.rstrip("w") == second.rstrip("w") == "p" * 4 * passes
    assert first.endswith("w")  # a log reads: it would have been seen


def test_on_a_gpu_a_batch_is_copied_without_waiting(micro_data, monkeypatch):
    """From pinned memory and not blocking: else every copy waits for the step before it."""
    copies = []

    def pinned(self):
        copy = mock.Mock()
        copy.to = lambda *where, **how: copies.append((where, how)) or self
        return copy

    monkeypatch.setattr(torch.Tensor, "pin_memory", pinned)
    data = PackedSequences(TokenShards.open(micro_data, "train"), 16)
    gpu = torch.device("cuda")
    batch = collate(data, [3, 1], gpu)
    assert copies == [((gpu,), {"non_blocking": True})] * 2
    assert torch.equal(batch["input_ids"], torch.stack([data[i]["input_ids"] for i in (3, 1)]))
