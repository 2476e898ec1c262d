"""One prepared data folder for all tests of training, and a look at the batches of a run."""

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
