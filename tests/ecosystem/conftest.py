"""Every test here runs what other people's tools do with the model: minutes, not seconds."""

import pytest


def pytest_ignore_collect(config):
    """Importing the tools takes long by itself."""
    return True if config.option.markexpr == "not slow" else None


def pytest_collection_modifyitems(items):
    for item in items:
        if "ecosystem" in item.path.parts:
            item.add_marker(pytest.mark.slow)
