"""One prepared data folder for all tests of training, and hooks into the passes of a run."""

from pathlib import Path

import pytest
from train.micro import make_data

from deep_delta.train.loop import Loop


@pytest.fixture(scope="session")
def micro_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("micro"))


@pytest.fixture
def batches(monkeypatch):
    """The input ids of every training pass, in order."""
    seen = []
    one_pass = Loop.forward_backward

    def recorded(self, batch, count):
        seen.append(batch["input_ids"].clone())
        return one_pass(self, batch, count)

    monkeypatch.setattr(Loop, "forward_backward", recorded)
    return seen


@pytest.fixture
def at_pass(monkeypatch):
    """Call something before the training pass of a number, counted from 1."""

    def plan(number, action):
        passes = 0
        one_pass = Loop.forward_backward

        def planned(self, batch, count):
            nonlocal passes
            passes += 1
            if passes == number:
                action()
            return one_pass(self, batch, count)

        monkeypatch.setattr(Loop, "forward_backward", planned)

    return plan
