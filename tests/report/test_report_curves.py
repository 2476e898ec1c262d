import math
from typing import Any

import numpy as np
import pytest

from deep_delta.report.curves import diverged, over_seeds, smoothed, spread_apart
from deep_delta.report.style import (
    DARK_BACKGROUND,
    INK,
    KNOWN_VARIANTS,
    LIGHT_BACKGROUND,
    arm_styles,
    variant_style,
)

ARMS = [f"arm {i}" for i in range(12)]


def rows(*points: tuple[int, float, float]) -> list[dict[str, Any]]:
    return [{"step": s, "tokens": 10 * s, "seconds": t, "val_loss": v} for s, t, v in points]


def test_over_seeds_aligns_by_step_and_averages_time() -> None:
    runs = {
        0: rows((1, 1.0, 4.0), (2, 2.0, 3.0), (3, 3.0, 2.0)),
        1: rows((1, 3.0, 5.0), (2, 4.0, math.nan), (3, 5.0, 1.0)),
        2: [],
    }
    curve = over_seeds(runs, "seconds", "val_loss")
    assert curve.x.tolist() == [2.0, 4.0]
    assert curve.mean.tolist() == [4.5, 1.5]
    assert curve.low.tolist() == [4.0, 1.0]
    assert curve.high.tolist() == [5.0, 2.0]
    assert over_seeds(runs, "tokens", "val_loss").x.tolist() == [10.0, 30.0]
    assert len(over_seeds(runs, "tokens", "loss").x) == 0
    assert len(over_seeds({0: rows((1, 1, 1)), 1: rows((2, 1, 1))}, "tokens", "val_loss").x) == 0
    assert diverged(runs)
    assert not diverged({0: runs[0]})


@pytest.mark.parametrize("points", [0, 1, 39, 80, 5000])
def test_smoothing_keeps_a_straight_line(points: int) -> None:
    x = np.arange(points, dtype=np.float64)
    xs, ys = smoothed(x, 2.0 * x)
    assert len(xs) == len(ys) <= 310
    # An even window is centred between two points: half a step off, at most.
    assert np.all(np.abs(ys - 2.0 * xs) <= 1.0 + 1e-9)


@pytest.mark.parametrize(
    "wanted", [[], [0.5], [0.5, 0.5, 0.5], [0.0, 0.01, 0.99, 1.0], [1.0, 0.98, 0.97], [3.0, -2.0]]
)
def test_labels_are_spread_within_the_axes(wanted: list[float]) -> None:
    placed = spread_apart(wanted, 0.1)
    assert len(placed) == len(wanted)
    assert all(-1e-9 <= position <= 1 + 1e-9 for position in placed)
    assert all(
        b - a >= 0.1 - 1e-9 for a, b in zip(sorted(placed), sorted(placed)[1:], strict=False)
    )
    assert sorted(range(len(wanted)), key=lambda i: wanted[i]) == sorted(
        range(len(wanted)), key=lambda i: placed[i]
    )


def test_labels_that_do_not_fit_share_the_room() -> None:
    assert spread_apart([0.5] * 5, 1.0) == pytest.approx([0, 0.25, 0.5, 0.75, 1])


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("variant", [*KNOWN_VARIANTS, *(f"unknown-{i}" for i in range(20))])
def test_colours_are_legible_on_white_and_on_dark(variant: str) -> None:
    check_legible(variant_style(variant).colour)


def check_legible(colour: str) -> None:
    assert contrast(colour, LIGHT_BACKGROUND) >= 3.0
    assert contrast(colour, DARK_BACKGROUND) >= 3.0
    assert colour != INK


def test_twelve_arms_are_all_different_and_legible() -> None:
    styles = list(arm_styles(ARMS).values())
    assert len({style.colour for style in styles}) == 12
    assert len({style.marker for style in styles}) == 12
    for style in styles:
        check_legible(style.colour)


def test_arms_beside_variants() -> None:
    styles = arm_styles(["ddl-cc", *ARMS, "additive"])
    assert styles["ddl-cc"] == variant_style("ddl-cc")
    assert styles["additive"] == variant_style("additive")
    assert len({(style.colour, style.marker) for style in styles.values()}) == 14
    # What is added at the end changes no other arm's look.
    assert {arm: arm_styles([*ARMS, "another"])[arm] for arm in ARMS} == arm_styles(ARMS)
    many = arm_styles([f"arm {i}" for i in range(48)])
    looks = {(style.colour, style.marker, style.dash) for style in many.values()}
    assert len(looks) == 48


def test_known_variants_are_all_different() -> None:
    styles = [variant_style(name) for name in KNOWN_VARIANTS]
    assert len(KNOWN_VARIANTS) == 11
    assert len({style.colour for style in styles}) == 11
    assert len({style.marker for style in styles}) == 11


def test_unknown_style_is_the_same_in_every_process() -> None:
    # Written down, because a style drawn from hash() would agree with itself within one process.
    style = variant_style("mine")
    assert (style.colour, style.marker, style.label) == ("#1f9098", "8", "mine")
