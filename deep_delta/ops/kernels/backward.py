"""Backward of `forward`: one pass over the state, two for a compressor that looks at K > 1 tokens.

`../README.md` derives it; names and habits are those of `forward`. Each program keeps the sums of
its own tokens for the weights' gradients: added up afterwards in one order, they are the same
in every run.
"""

import triton
import triton.language as tl

from deep_delta.ops.kernels.forward import compress, fetch_state, fetch_write, touch_token
from deep_delta.ops.kernels.gradients import (
    fetch_logits,
    fetch_vectors,
    store_gradients,
    through_logits,
    through_row,
    weight_terms,
)
from deep_delta.ops.kernels.tiles import (
    RUNTIME,
    accumulate,
    add_outer,
    is_start,
    load_row,
    load_state,
    load_vector,
    load_weight,
    rebuild,
    store_numbers,
    store_vector,
    sum_many,
    touch,
    touch_vector,
    widen,
    zero_numbers,
    zero_vectors,
)


@triton.jit(do_not_specialize=RUNTIME)
def norm_backward(
    x_in,
    stats,
    norm,
    gate,
    value,
    d_context,
    d_gates,
    d_values,
    dx_in_out,
    partial,
    tokens,
    chunk,
    D: tl.constexpr,
    STATS: tl.constexpr,
    RSTD: tl.constexpr,
    GATES: tl.constexpr,
    VALUES: tl.constexpr,
    VALUE_ON_STATE: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """First of two passes for K > 1: dx_in, of which `backward` needs later tokens' too."""
    rows: tl.constexpr = 1 + GATES + VALUES
    program = tl.program_id(0).to(tl.int64)
    first = program * chunk
    end = tl.minimum(first + chunk, tokens)
    own = partial + program * (rows * D + GATES + VALUES)
    biases = zero_numbers(GATES + VALUES)
    weights = ()
    for _ in tl.static_range(PIECES):
        weights = weights + (zero_vectors(rows, BLOCK),)
    for token in range(first, end):
        d_contexts = fetch_vectors(d_context, token, D, PIECES, BLOCK)
        d_logits = fetch_logits(d_gates, d_values, token, GATES, VALUES)
        if GATES + VALUES > 0:
            biases = accumulate(biases, d_logits)
        rstd = tl.load(stats + token * STATS + RSTD)
        held = ()
        added = ()
        products = ()
        for p in tl.static_range(PIECES):
            source = load_vector(x_in, token, p, D, BLOCK).to(tl.float32)
            dc, direct = through_logits(
                d_contexts[p].to(tl.float32), d_logits, gate, value, p, D, GATES, VALUES,
                VALUE_ON_STATE, BLOCK,
            )  # fmt: skip
            g = load_weight(norm, 0, p, D, BLOCK)
            terms = (dc * g * source,)
            products = terms if p == 0 else accumulate(products, terms)
            held = held + ((source, dc * g * rstd + direct),)
            shares = weight_terms(source, dc, d_logits, g, rstd, GATES, VALUE_ON_STATE)
            added = added + (accumulate(weights[p], shares),)
        weights = added
        pull = rstd * rstd * rstd * (sum_many(products)[0] / D)
        for p in tl.static_range(PIECES):
            source, base = held[p]
            store_vector(dx_in_out, token, base - source * pull, True, p, D, BLOCK)
    for p in tl.static_range(PIECES):
        for q in tl.static_range(rows):
            store_vector(own, q, weights[p][q], True, p, D, BLOCK)
    store_numbers(own + rows * D, biases, True)


@triton.jit(do_not_specialize=RUNTIME)
def backward(
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
    starts,
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
    partial,
    tokens,
    length,
    chunk,
    AHEAD: tl.constexpr,
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
    """Gradients of X and of the pending write, and this program's share of the weights'.

    Without a norm (and for K > 1, where `norm_backward` ran before) `d_context` is dx_in.
    """
    program = tl.program_id(0).to(tl.int64)
    first = program * chunk
    end = tl.minimum(first + chunk, tokens)
    halo: tl.constexpr = K - 1 if K > 1 else 0
    norm_rows: tl.constexpr = 1 + GATES + VALUES if norm is not None else 0
    rows: tl.constexpr = K * DV + norm_rows
    logits: tl.constexpr = norm_rows - 1 if norm_rows > 0 else 0
    own = partial + program * (rows * D + logits)
    biases = zero_numbers(logits)
    d_taps = ()  # counted from the current token back
    d_weights = ()  # norm, gates, values
    window = ()  # dx_in of this token and of the K − 2 after it
    for p in tl.static_range(PIECES):
        d_taps = d_taps + (zero_vectors(K * DV, BLOCK),)
        d_weights = d_weights + (zero_vectors(norm_rows, BLOCK),)
        opening = ()
        for s in tl.static_range(halo):
            nearest = tl.minimum(first + s, tokens - 1)
            opening = opening + (load_vector(d_context, nearest, p, D, BLOCK),)
        window = window + (opening,)
    for token in range(first, end):
        raw, past_keys, raw_keys = fetch_state(
            x, x_token, x_channel, x_feature, trail_h, h, token, D, DV, PIECES, BLOCK
        )
        grads = ()
        if dx_new is not None:
            for p in tl.static_range(PIECES):
                grads = grads + (
                    load_state(dx_new, dx_token, dx_channel, dx_feature, token, p, D, DV, BLOCK),
                )
        d_contexts = ()
        if d_context is not None:
            d_contexts = fetch_vectors(
                d_context, tl.minimum(token + halo, tokens - 1), D, PIECES, BLOCK
            )
        past_rows, entries, strengths = fetch_write(trail_row, target, erase, token, DV)
        row = ()
        if h is not None:
            row = load_row(row_in + token * DV, DV)
        numbers = ()
        if stats is not None:
            numbers = load_row(stats + token * (2 * DV + 2), 2 * DV + 2)
        d_logits = fetch_logits(d_gates, d_values, token, GATES, VALUES)
        if AHEAD > 0:
            later = tl.minimum(token + AHEAD, tokens - 1)
            touch_token(
                x, x_token, x_channel, x_feature, trail_h, trail_row, h, target, erase, later, D,
                DV,
            )  # fmt: skip
            if dx_new is not None:
                for j in tl.static_range(DV):
                    touch_vector(dx_new + later * dx_token + j * dx_channel, dx_feature, D)
            if d_context is not None:
                read_later = tl.minimum(later + halo, tokens - 1)
                touch_vector(d_context + read_later * D, 1, D)
            if stats is not None:
                touch(stats + later * (2 * DV + 2))
            if h is not None:
                touch(row_in + later * DV)
            if GATES > 0:
                touch(d_gates + later * GATES)
            if VALUES > 0:
                touch(d_values + later * VALUES)
        if logits > 0:
            biases = accumulate(biases, d_logits)

        # Which tokens after this one saw it: all, unless a document ends between them.
        seen = (True,)
        for s in tl.static_range(1, K):
            later = tl.minimum(token + s, tokens - 1)
            ends = is_start(starts, later, length) | (token + s >= tokens)
            seen = seen + (seen[s - 1] & (ends == 0),)

        # The state around the write, and the gradient of X' as far as it is known before the
        # sum over d that the norm needs; the part that is missing is −pull·c_j·x_in.
        held = ()
        weight_sums = ()
        tap_sums = ()
        sliding = ()
        products = ()
        for p in tl.static_range(PIECES):
            old = rebuild(raw[p], past_keys[p], past_rows, x.dtype.element_ty)
            new = old
            key = old[0]
            if h is not None:
                key = raw_keys[p].to(tl.float32)
                new = add_outer(old, key, row, x.dtype.element_ty)
            grad = zero_vectors(DV, BLOCK)
            if dx_new is not None:
                grad = widen(grads[p])
            x_in = old[0]
            base = old[0]
            terms = ()
            if d_context is not None:
                if norm is not None:
                    x_in, _ = compress(new, taps, (), False, p, D, K, BLOCK)
                    dc, direct = through_logits(
                        d_contexts[p].to(tl.float32), d_logits, gate, value, p, D, GATES, VALUES,
                        VALUE_ON_STATE, BLOCK,
                    )  # fmt: skip
                    g = load_weight(norm, 0, p, D, BLOCK)
                    rstd = numbers[DV + 1]
                    shares = weight_terms(x_in, dc, d_logits, g, rstd, GATES, VALUE_ON_STATE)
                    weight_sums = weight_sums + (accumulate(d_weights[p], shares),)
                    terms = (dc * g * x_in,)
                    base = dc * g * rstd + direct
                    dx_ins = (base,)
                else:
                    dx_ins = window[p] + (d_contexts[p],)
                if K == 0:
                    grad = (grad[0] + dx_ins[0].to(tl.float32),)
                tap_terms = ()
                for s in tl.static_range(K):
                    dx_in = dx_ins[s].to(tl.float32)
                    if s > 0:
                        dx_in = tl.where(seen[s], dx_in, 0.0)
                    shares = ()
                    for j in tl.static_range(DV):
                        tap = load_weight(taps, (K - 1 - s) * DV + j, p, D, BLOCK)
                        shares = shares + (tap * dx_in,)
                        if norm is None:
                            tap_terms = tap_terms + (new[j] * dx_in,)
                    grad = accumulate(grad, shares)
                if (norm is None) and K > 0:
                    tap_sums = tap_sums + (accumulate(d_taps[p], tap_terms),)
                if K > 1:
                    moved = ()
                    for s in tl.static_range(1, K):
                        moved = moved + (dx_ins[s],)
                    sliding = sliding + (moved,)
            if h is not None:
                for j in tl.static_range(DV):
                    terms = terms + (grad[j] * key,)
            products = terms if p == 0 else accumulate(products, terms)
            held = held + ((old, new, key, x_in, base, grad),)
        sums = sum_many(products)
        if norm is not None:
            d_weights = weight_sums
        elif K > 0:
            d_taps = tap_sums
        if K > 1:
            window = sliding

        pull, scale, d_scale, d_readout = through_row(
            sums, numbers, entries, strengths, norm, h, d_target, d_erase, token, D, DV
        )

        # The gradients of X, of h and, below a norm, of the taps.
        tap_sums = ()
        for p in tl.static_range(PIECES):
            old, new, key, x_in, base, grad = held[p]
            if norm is not None:
                missing = -pull * x_in
                shares = ()
                tap_terms = ()
                for j in tl.static_range(DV):
                    if K == 0:
                        shares = shares + (missing,)
                    else:
                        shares = shares + (load_weight(taps, j, p, D, BLOCK) * missing,)
                        tap_terms = tap_terms + (new[j] * (base + missing),)
                grad = accumulate(grad, shares)
                if K > 0:
                    tap_sums = tap_sums + (accumulate(d_taps[p], tap_terms),)
            keys = ()
            if h is not None:
                keys = (key,)
            store_gradients(
                dx, dh, old, keys, grad, row, d_readout, scale, d_scale, token, UNIT, p, D, DV,
                BLOCK,
            )  # fmt: skip
        if (norm is not None) and K > 0:
            d_taps = tap_sums
    for p in tl.static_range(PIECES):
        for q in tl.static_range(K * DV):
            # The parameter's taps end with the current token.
            at = (K - 1 - q // DV) * DV + q % DV
            store_vector(own, at, d_taps[p][q], True, p, D, BLOCK)
        for q in tl.static_range(norm_rows):
            store_vector(own, K * DV + q, d_weights[p][q], True, p, D, BLOCK)
    store_numbers(own + rows * D, biases, True)
