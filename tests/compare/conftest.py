"""One prepared data folder for all tests of comparing."""

from pathlib import Path

import pytest
from train.micro import make_data


@pytest.fixture(scope="session")
def micro_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("micro"))
