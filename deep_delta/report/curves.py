"""From the rows of several runs to the lines of a chart; numpy only."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from deep_delta.report.numbers import is_finite

Row = Mapping[str, Any]
Curves = Mapping[str, Mapping[int, Sequence[Row]]]
Axis = Literal["tokens", "flops", "seconds"]
Array = NDArray[np.float64]

SMOOTHED_POINTS = 300


@dataclass(frozen=True)
class SeedCurve:
    """Mean over seeds at the steps that all of them have; four arrays of shape (points,)."""

    x: Array
    mean: Array
    low: Array
    high: Array


def over_seeds(runs: Mapping[int, Sequence[Row]], x: Axis, value: str) -> SeedCurve:
    """Align runs by step and reduce ``value`` ("val_loss" or "loss") to mean, minimum, maximum.

    Seeds differ in wall-clock at the same step, so ``x`` is averaged over seeds too. Steps that
    some run lacks, or where its value is not finite, are left out: a mean over the survivors
    would jump. Runs without a single such row do not count. The result may have no points.
    """
    found = [
        {
            int(row["step"]): (float(row[x]), float(row[value]))
            for row in rows
            if value in row and is_finite(row[value])
        }
        for rows in runs.values()
    ]
    by_run = [points for points in found if points]
    if not by_run:
        empty = np.empty(0)
        return SeedCurve(empty, empty, empty, empty)
    steps = sorted(set.intersection(*(set(points) for points in by_run)))
    grid = np.array([[points[step] for step in steps] for points in by_run], dtype=np.float64)
    grid = grid.reshape(len(by_run), len(steps), 2)
    values = grid[:, :, 1]
    return SeedCurve(grid[:, :, 0].mean(0), values.mean(0), values.min(0), values.max(0))


def diverged(runs: Mapping[int, Sequence[Row]]) -> bool:
    """Whether any row of any run holds a loss that is not finite."""
    return any(
        not is_finite(row[key])
        for rows in runs.values()
        for row in rows
        for key in ("loss", "val_loss")
        if key in row
    )


def smoothed(x: Array, y: Array) -> tuple[Array, Array]:
    """Centred moving average over 2.5 % of the points, thinned to about 300 of them.

    Ends where the window does not fit are cut, so that no edge is bent. Two arrays of equal
    shape (points,) in and out.
    """
    window = max(1, len(y) // 40)
    mean = np.convolve(y, np.full(window, 1.0 / window), mode="valid") if len(y) else y
    start = (window - 1) // 2
    stride = max(1, -(-len(mean) // SMOOTHED_POINTS))
    return x[start : start + len(mean)][::stride], mean[::stride]


def spread_apart(wanted: Sequence[float], gap: float) -> list[float]:
    """Positions in [0, 1] at least ``gap`` apart, in the order of ``wanted`` and close to it.

    Least squares: with ``q_i = p_i - i * gap`` the gaps become "q does not fall", which is an
    isotonic regression, solved by pooling neighbours that violate it. If the labels do not fit,
    the gap shrinks until they do.
    """
    count = len(wanted)
    if count == 0:
        return []
    gap = min(gap, 1.0 / max(1, count - 1))
    order = sorted(range(count), key=lambda index: wanted[index])
    pools: list[tuple[float, int]] = []  # (mean, size)
    for rank, index in enumerate(order):
        mean, size = wanted[index] - rank * gap, 1
        while pools and pools[-1][0] > mean:
            other, other_size = pools.pop()
            mean = (mean * size + other * other_size) / (size + other_size)
            size += other_size
        pools.append((mean, size))
    shifted = [mean for mean, size in pools for _ in range(size)]
    top = max(0.0, 1.0 - (count - 1) * gap)
    positions = [0.0] * count
    for rank, index in enumerate(order):
        positions[index] = min(max(shifted[rank], 0.0), top) + rank * gap
    return positions
