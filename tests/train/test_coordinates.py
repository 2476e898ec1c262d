"""µP's coordinate check: what a model computes keeps its size over widths while it learns."""

import importlib.util

import pytest
from helpers import REPO

LR, STEPS = 1e-2, 5
# The largest over the smallest of widths 128, 256, 512. At finite widths sizes are not equal yet:
# the sublayers' outputs fall from 0.42 through 0.32 and 0.28 to 0.27 at 1024.
LIMITS = {"output": 1.6}
LIMIT = 1.4


@pytest.fixture(scope="module")
def check():
    path = REPO / "scripts" / "coordinate_check.py"
    spec = importlib.util.spec_from_file_location("coordinate_check", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def spread(check, variant: str, mup: bool, **fields) -> dict[str, float]:
    configs = {width: check.config_of(variant, width, mup, **fields) for width in check.WIDTHS}
    return check.spread({w: check.measure(c, STEPS, LR)[-1] for w, c in configs.items()})


@pytest.mark.parametrize(
    ("variant", "fields"),
    [
        ("additive", {}),
        ("ddl-scalar", {}),
        ("ddl-cc", {}),
        # Its targets start near zero and are learned: that they grow alike shows the rates right.
        ("ddl-cc", {"parameterization": "paper"}),
    ],
    ids=str,
)
def test_coordinates_keep_their_size(check, variant, fields):
    found = spread(check, variant, True, **fields)
    assert {"state", "context", "output", "write", "logits"} <= found.keys()
    assert ("gate" in found) == (variant != "additive")
    assert {n: s for n, s in found.items() if s > LIMITS.get(n, LIMIT)} == {}


@pytest.mark.parametrize(
    ("variant", "moving"),
    [
        ("additive", ["state", "output", "write", "logits"]),
        ("ddl-scalar", ["output", "gate", "logits"]),
        ("ddl-cc", ["state", "output", "write", "gate", "logits"]),
    ],
)
def test_without_it_they_do_not(check, variant, moving):
    found = spread(check, variant, False)
    assert {n: s for n, s in found.items() if n in moving and s < LIMITS.get(n, LIMIT)} == {}


def test_a_write_starts_at_the_same_size_only_with_scaled_targets(check):
    """β k v with v = O(1) is O(1/√d) a feature: half as much at four times the width."""
    for mup, ratio in ((True, 1.0), (False, 0.5)):
        sizes = [check.measure(check.config_of("ddl-cc", w, mup), 0, LR)[0] for w in (128, 512)]
        assert sizes[1]["write"] / sizes[0]["write"] == pytest.approx(ratio, rel=0.05)
