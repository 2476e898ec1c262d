"""What `torch.utils.flop_counter` counts for the fused operators."""

import torch
from torch.utils.flop_counter import register_flop_formula

from deep_delta.ops import fused, fused_expand  # noqa: F401 - they register the operators


def _work(state, h, erase, taps, gate, value) -> int:
    """FLOPs of one read; a multiply-add counts as two, as in a matrix product."""
    tokens, width, channels = state
    work = 0
    if h is not None:
        work += 2 * channels * (2 if erase is not None else 1)
    if taps is not None:
        work += 2 * channels * taps[0]
    work += sum(2 * rows[0] for rows in (gate, value) if rows is not None)
    return tokens * width * work


def _rebuilding(state, trail_h) -> int:
    tokens, width, channels = state
    return 2 * tokens * width * channels * len(trail_h)


@register_flop_formula(torch.ops.deep_delta.read_state)
def _forward_flops(
    x, h, target, erase, eps, taps, norm, norm_eps, gate, gate_bias, value, value_bias, *rest, **__
) -> int:  # fmt: skip
    return _work(x, h, erase, taps, gate, value) + _rebuilding(x, rest[-2])


@register_flop_formula(torch.ops.deep_delta.read_state_backward)
def _backward_flops(
    x, trail_h, trail_row, h, row, stats, x_in, target, erase, unit, taps, norm, gate, value, *_,
    **__,
) -> int:  # fmt: skip
    """Twice the forward, as usual; rebuilding X comes on top."""
    return 2 * _work(x, h, erase, taps, gate, value) + _rebuilding(x, trail_h)


@register_flop_formula(torch.ops.deep_delta.expand)
def _expand_flops(x, taps, *_, **__) -> int:
    return 2 * x[0] * taps[0] * taps[1] * taps[2]


@register_flop_formula(torch.ops.deep_delta.expand_backward)
def _expand_backward_flops(x, taps, *_, **__) -> int:
    return 4 * x[0] * taps[0] * taps[1] * taps[2]
