"""One prepared data folder for all tests of training, and hooks into the passes of a run."""

from pathlib import Path

import pytest
from train.micro import make_data

from deep_delta.train.trainer import DeltaTrainer


@pytest.fixture(scope="session")
def micro_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("micro"))


@pytest.fixture
def batches(monkeypatch):
    """The input ids of every training pass, in order."""
    seen = []
    step = DeltaTrainer.training_step

    def recorded(self, model, inputs, *rest):
        seen.append(inputs["input_ids"].clone())
        return step(self, model, inputs, *rest)

    monkeypatch.setattr(DeltaTrainer, "training_step", recorded)
    return seen


@pytest.fixture
def at_pass(monkeypatch):
    """Call something before the training pass of a number, counted from 1."""

    def plan(number, action):
        passes = 0
        step = DeltaTrainer.training_step

        def planned(self, *arguments):
            nonlocal passes
            passes += 1
            if passes == number:
                action()
            return step(self, *arguments)

        monkeypatch.setattr(DeltaTrainer, "training_step", planned)

    return plan
