"""The made-up comparison as fixtures."""

from collections.abc import Callable
from typing import Any

import pytest
from report.comparison_helpers import make_curves, make_summary


@pytest.fixture
def summary_of() -> Callable[..., dict[str, Any]]:
    return make_summary


@pytest.fixture
def curves_of() -> Callable[..., dict[str, dict[int, list[dict[str, Any]]]]]:
    return make_curves
