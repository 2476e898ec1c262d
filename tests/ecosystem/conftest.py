"""Every test here runs what other people's tools do with the model: minutes, not seconds."""

import pytest


def pytest_collection_modifyitems(items):
    for item in items:
        if "ecosystem" in item.path.parts:
            item.add_marker(pytest.mark.slow)
