"""Markers that transformers' tests carry, which pytest would not know here."""

import re

import pytest
import transformers_source
from transformers.utils import logging


@pytest.fixture(autouse=True)
def _as_loud_as_ever():
    """They read what is logged; our commands, tested in the same process, quiet transformers."""
    before = logging.get_verbosity()
    logging.set_verbosity_warning()
    yield
    logging.set_verbosity(before)


def pytest_configure(config):
    names = set()
    source = transformers_source.FOLDER
    for file in (*source.glob("tests/*.py"), *source.glob("src/transformers/testing_utils.py")):
        names |= set(re.findall(r"\bmark\.(\w+)", file.read_text(encoding="utf-8")))
    for name in names - {"parametrize", "skip", "skipif"}:
        config.addinivalue_line("markers", f"{name}: transformers' own")


def pytest_ignore_collect(config):
    """Importing transformers' tests takes long by itself."""
    return True if config.option.markexpr == "not slow" else None
