"""What an arm's loss is worth: the tokens that the baseline needs for it, and their price."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Cost:
    """An arm beside the baseline's curve.

    tokens: of the arm's training. baseline_tokens: that the baseline needs for the arm's loss, in
        between by a line over the logarithm of tokens; None beyond the curve.
    beyond: "below" or "above" where all of the curve is worse or better.
    flops, seconds: of the arm's training over those of the baseline's for the same loss; seconds
        by the speeds of one interleaved benchmark. None where that is not known.
    """

    arm: str
    tokens: int
    baseline_tokens: float | None
    beyond: str | None
    flops: float | None
    seconds: float | None


def cost(
    arm: str,
    loss: float,
    tokens: int,
    curve: Mapping[int, float],
    flops_ratio: float,
    speed_ratio: float | None,
) -> Cost:
    """Read an arm's loss off the curve {tokens: loss} of at least two finite points.

    flops_ratio: FLOPs of a token, the arm's over the baseline's. speed_ratio: likewise of tokens a
    second. A curve that rises somewhere, by noise, is taken for flat there.
    """
    lengths = sorted(curve)
    losses = np.minimum.accumulate([curve[length] for length in lengths])
    if not losses[-1] <= loss <= losses[0]:
        beyond = "below" if loss < losses[-1] else "above"
        return Cost(arm, tokens, None, beyond, None, None)
    # np.interp wants what it looks up to rise.
    needed = float(np.exp(np.interp(-loss, -losses, np.log(lengths))))
    share = tokens / needed
    seconds = None if speed_ratio is None else share / speed_ratio
    return Cost(arm, tokens, needed, None, share * flops_ratio, seconds)
