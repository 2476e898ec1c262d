"""What the kernels of the backward pass share. Names and habits are those of `forward`."""

import triton
import triton.language as tl

from deep_delta.ops.kernels.tiles import load_row, load_vector, load_weight, store_vector


@triton.jit
def fetch_vectors(rows, token, D: tl.constexpr, PIECES: tl.constexpr, BLOCK: tl.constexpr):
    """All pieces of one row of a (tokens, D) matrix."""
    pieces = ()
    for p in tl.static_range(PIECES):
        pieces = pieces + (load_vector(rows, token, p, D, BLOCK),)
    return pieces


@triton.jit
def fetch_logits(d_gates, d_values, token, GATES: tl.constexpr, VALUES: tl.constexpr):
    """The gradients of the logits at one token."""
    d_logits = ()
    if GATES > 0:
        d_logits = load_row(d_gates + token * GATES, GATES)
    if VALUES > 0:
        d_logits = d_logits + load_row(d_values + token * VALUES, VALUES)
    return d_logits


@triton.jit
def through_logits(
    dc,
    d_logits,
    gate,
    value,
    p,
    D: tl.constexpr,
    GATES: tl.constexpr,
    VALUES: tl.constexpr,
    VALUE_ON_STATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Piece p of the context's whole gradient, and of what reaches x_in past the norm."""
    direct = tl.zeros_like(dc)
    for q in tl.static_range(GATES):
        dc += d_logits[q] * load_weight(gate, q, p, D, BLOCK)
    for j in tl.static_range(VALUES):
        through = d_logits[GATES + j] * load_weight(value, j, p, D, BLOCK)
        if VALUE_ON_STATE:
            direct += through
        else:
            dc += through
    return dc, direct


@triton.jit
def weight_terms(x_in, dc, d_logits, g, rstd, GATES: tl.constexpr, VALUE_ON_STATE: tl.constexpr):
    """Piece of the gradients of norm, gate and value weights at one token."""
    terms = (dc * x_in * rstd,)
    for q in tl.static_range(len(d_logits)):
        source = x_in if (VALUE_ON_STATE and q >= GATES) else x_in * rstd * g
        terms = terms + (d_logits[q] * source,)
    return terms


@triton.jit
def through_row(
    sums,
    numbers,
    entries,
    strengths,
    norm,
    h,
    d_target,
    d_erase,
    token,
    D: tl.constexpr,
    DV: tl.constexpr,
):
    """Stores the gradients of a and b; the pull of the norm, s, and the gradients of s and hᵀX.

    sums: over d, of dc·g·x_in if there is a norm, then of the gradient of X' times h.
    """
    known: tl.constexpr = 0 if norm is None else 1
    pull = 0.0
    if norm is not None:
        rstd = numbers[DV + 1]
        pull = rstd * rstd * rstd * (sums[0] / D)
    d_readout = ()
    d_scale = 0.0
    scale = 1.0
    if h is not None:
        scale = numbers[DV]
        d_strength = 0.0
        for j in tl.static_range(DV):
            d_row = sums[known + j]
            if norm is not None:
                d_row -= pull * numbers[DV + 2 + j]
            inner = 1.0
            if len(entries) > 0:
                inner = entries[j]
                tl.store(d_target + token * DV + j, scale * d_row)
            if len(strengths) > 0:
                readout = numbers[j]
                inner -= 2 * strengths[0] * readout
                d_strength -= readout * d_row * scale
                d_readout = d_readout + (-strengths[0] * scale * scale * d_row,)
            d_scale += d_row * inner
        if len(strengths) > 0:
            tl.store(d_erase + token, d_strength)
    return pull, scale, d_scale, d_readout


@triton.jit
def store_gradients(
    dx,
    dh,
    old,
    keys,
    grad,
    row,
    d_readout,
    scale,
    d_scale,
    token,
    UNIT: tl.constexpr,
    p,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Piece p of the gradients of X and h, from that of X'."""
    if len(keys) > 0:
        key = keys[0]
        d_key = grad[0] * row[0]
        for j in tl.static_range(1, DV):
            d_key += grad[j] * row[j]
        if len(d_readout) > 0:
            kept = ()
            for j in tl.static_range(DV):
                d_key += old[j] * d_readout[j]
                kept = kept + (grad[j] + key * d_readout[j],)
            grad = kept
        if UNIT:
            d_key -= (scale * key) * (scale * scale * d_scale)
        store_vector(dh, token, d_key, True, p, D, BLOCK)
    for j in tl.static_range(DV):
        store_vector(dx, token * DV + j, grad[j], True, p, D, BLOCK)
