"""Backward of `forward` for states too wide for the registers, whose compressor sees one token.

`backward` holds a token between its two walks over d, and the sums for the weights throughout. Here
`wide_backward` loads the token a second time, which by then is in a cache, and the sums are made by
`weights_backward`, a piece of d a program, which reads the state once more from memory.
"""

import triton
import triton.language as tl

from deep_delta.ops.kernels.forward import compress, fetch_piece, fetch_write, touch_token
from deep_delta.ops.kernels.gradients import (
    fetch_logits,
    store_gradients,
    through_logits,
    through_row,
    weight_terms,
)
from deep_delta.ops.kernels.tiles import (
    RUNTIME,
    accumulate,
    add_outer,
    load_row,
    load_state,
    load_vector,
    load_weight,
    rebuild,
    store_numbers,
    store_vector,
    sum_many,
    touch_vector,
    widen,
    zero_numbers,
    zero_vectors,
)


@triton.jit
def around(
    x,
    x_token,
    x_channel,
    x_feature,
    trail_h,
    past_rows,
    h,
    row,
    token,
    p,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Piece p of the state before and after the pending write, and of its direction, if any."""
    raw, past_keys, raw_key = fetch_piece(
        x, x_token, x_channel, x_feature, trail_h, h, token, p, D, DV, BLOCK
    )
    old = rebuild(raw, past_keys, past_rows, x.dtype.element_ty)
    new = old
    if h is not None:
        raw_key = widen(raw_key)
        new = add_outer(old, raw_key[0], row, x.dtype.element_ty)
    return old, new, raw_key


@triton.jit
def through_context(
    new,
    d_context,
    d_logits,
    numbers,
    taps,
    norm,
    gate,
    value,
    token,
    p,
    D: tl.constexpr,
    DV: tl.constexpr,
    K: tl.constexpr,
    GATES: tl.constexpr,
    VALUES: tl.constexpr,
    VALUE_ON_STATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Piece p of x_in, of the context's whole gradient, and of dx_in without the norm's pull."""
    dc = load_vector(d_context, token, p, D, BLOCK).to(tl.float32)
    x_in, _ = compress(new, taps, (), False, p, D, K, BLOCK)
    dx_in = dc
    if norm is not None:
        dc, direct = through_logits(
            dc, d_logits, gate, value, p, D, GATES, VALUES, VALUE_ON_STATE, BLOCK
        )
        dx_in = dc * load_weight(norm, 0, p, D, BLOCK) * numbers[DV + 1] + direct
    return x_in, dc, dx_in


@triton.jit
def gradient(
    x,
    x_token,
    x_channel,
    x_feature,
    trail_h,
    past_rows,
    h,
    row,
    dx_new,
    dx_token,
    dx_channel,
    dx_feature,
    d_context,
    d_logits,
    numbers,
    taps,
    norm,
    gate,
    value,
    pull,
    token,
    p,
    D: tl.constexpr,
    DV: tl.constexpr,
    K: tl.constexpr,
    GATES: tl.constexpr,
    VALUES: tl.constexpr,
    VALUE_ON_STATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Piece p of X, of h, of the gradient of X', and of what is summed for the norm's pull."""
    old, new, key = around(
        x, x_token, x_channel, x_feature, trail_h, past_rows, h, row, token, p, D, DV, BLOCK
    )
    grad = zero_vectors(DV, BLOCK)
    if dx_new is not None:
        grad = widen(load_state(dx_new, dx_token, dx_channel, dx_feature, token, p, D, DV, BLOCK))
    pulling = ()
    if d_context is not None:
        x_in, dc, dx_in = through_context(
            new, d_context, d_logits, numbers, taps, norm, gate, value, token, p, D, DV, K, GATES,
            VALUES, VALUE_ON_STATE, BLOCK,
        )  # fmt: skip
        if norm is not None:
            pulling = (dc * load_weight(norm, 0, p, D, BLOCK) * x_in,)
            dx_in -= pull * x_in
        shares = (dx_in,)
        if K > 0:
            shares = ()
            for j in tl.static_range(DV):
                shares = shares + (load_weight(taps, j, p, D, BLOCK) * dx_in,)
        grad = accumulate(grad, shares)
    return old, key, grad, pulling


@triton.jit(do_not_specialize=RUNTIME)
def wide_backward(
    x,
    x_token,
    x_channel,
    x_feature,
    trail_h,
    trail_row,
    h,
    row_in,
    stats,
    target,
    erase,
    taps,
    norm,
    gate,
    value,
    dx_new,
    dx_token,
    dx_channel,
    dx_feature,
    d_context,
    d_gates,
    d_values,
    dx,
    dh,
    d_target,
    d_erase,
    pulls,
    tokens,
    chunk,
    UNIT: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    K: tl.constexpr,
    GATES: tl.constexpr,
    VALUES: tl.constexpr,
    VALUE_ON_STATE: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of X and of the pending write; the norm's pull on each token (tokens,) for
    `weights_backward`. Without a norm `d_context` is dx_in.
    """
    first = tl.program_id(0).to(tl.int64) * chunk
    for token in range(first, tl.minimum(first + chunk, tokens)):
        past_rows, entries, strengths = fetch_write(trail_row, target, erase, token, DV)
        row = ()
        if h is not None:
            row = load_row(row_in + token * DV, DV)
        numbers = load_row(stats + token * (2 * DV + 2), 2 * DV + 2)
        d_logits = fetch_logits(d_gates, d_values, token, GATES, VALUES)
        later = tl.minimum(token + 1, tokens - 1)
        touch_token(
            x, x_token, x_channel, x_feature, trail_h, trail_row, h, target, erase, later, D, DV
        )
        if dx_new is not None:
            for j in tl.static_range(DV):
                touch_vector(dx_new + later * dx_token + j * dx_channel, dx_feature, D)
        if d_context is not None:
            touch_vector(d_context + later * D, 1, D)

        sums = ()
        if (norm is not None) or (h is not None):
            products = ()
            for p in tl.static_range(PIECES):
                _, key, grad, terms = gradient(
                    x, x_token, x_channel, x_feature, trail_h, past_rows, h, row, dx_new, dx_token,
                    dx_channel, dx_feature, d_context, d_logits, numbers, taps, norm, gate, value,
                    0.0, token, p, D, DV, K, GATES, VALUES, VALUE_ON_STATE, BLOCK,
                )  # fmt: skip
                if h is not None:
                    for j in tl.static_range(DV):
                        terms = terms + (grad[j] * key[0],)
                products = terms if p == 0 else accumulate(products, terms)
            sums = sum_many(products)
        pull, scale, d_scale, d_readout = through_row(
            sums, numbers, entries, strengths, norm, h, d_target, d_erase, token, D, DV
        )
        if norm is not None:
            tl.store(pulls + token, pull)

        for p in tl.static_range(PIECES):
            old, key, grad, _ = gradient(
                x, x_token, x_channel, x_feature, trail_h, past_rows, h, row, dx_new, dx_token,
                dx_channel, dx_feature, d_context, d_logits, numbers, taps, norm, gate, value, pull,
                token, p, D, DV, K, GATES, VALUES, VALUE_ON_STATE, BLOCK,
            )  # fmt: skip
            store_gradients(
                dx, dh, old, key, grad, row, d_readout, scale, d_scale, token, UNIT, p, D, DV, BLOCK
            )


@triton.jit(do_not_specialize=RUNTIME)
def weights_backward(
    x,
    x_token,
    x_channel,
    x_feature,
    trail_h,
    trail_row,
    h,
    row_in,
    stats,
    taps,
    norm,
    gate,
    value,
    d_context,
    d_gates,
    d_values,
    pulls,
    partial,
    tokens,
    chunk,
    D: tl.constexpr,
    DV: tl.constexpr,
    K: tl.constexpr,
    GATES: tl.constexpr,
    VALUES: tl.constexpr,
    VALUE_ON_STATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The program's share of the weights' gradients, one piece of d, in the order of `backward`."""
    norm_rows: tl.constexpr = 1 + GATES + VALUES if norm is not None else 0
    rows: tl.constexpr = K * DV + norm_rows
    logits: tl.constexpr = norm_rows - 1 if norm_rows > 0 else 0
    program = tl.program_id(0).to(tl.int64)
    p = tl.program_id(1)
    first = program * chunk
    own = partial + program * (rows * D + logits)
    biases = zero_numbers(logits)
    totals = zero_vectors(rows, BLOCK)
    for token in range(first, tl.minimum(first + chunk, tokens)):
        past_rows, _, _ = fetch_write(trail_row, None, None, token, DV)
        row = ()
        if h is not None:
            row = load_row(row_in + token * DV, DV)
        numbers = load_row(stats + token * (2 * DV + 2), 2 * DV + 2)
        d_logits = fetch_logits(d_gates, d_values, token, GATES, VALUES)
        if logits > 0:
            biases = accumulate(biases, d_logits)
        _, new, _ = around(
            x, x_token, x_channel, x_feature, trail_h, past_rows, h, row, token, p, D, DV, BLOCK
        )
        x_in, dc, dx_in = through_context(
            new, d_context, d_logits, numbers, taps, norm, gate, value, token, p, D, DV, K, GATES,
            VALUES, VALUE_ON_STATE, BLOCK,
        )  # fmt: skip
        terms = ()
        if norm is not None:
            dx_in -= tl.load(pulls + token) * x_in
        for j in tl.static_range(K * DV):
            terms = terms + (new[j] * dx_in,)
        if norm is not None:
            g = load_weight(norm, 0, p, D, BLOCK)
            rstd = numbers[DV + 1]
            terms = terms + weight_terms(x_in, dc, d_logits, g, rstd, GATES, VALUE_ON_STATE)
        totals = accumulate(totals, terms)
    for q in tl.static_range(rows):
        store_vector(own, q, totals[q], True, p, D, BLOCK)
    store_numbers(own + rows * D, biases, p == 0)
