"""Forward: settle the pending write, compress, normalise, gate and value logits, in one pass.

Names as in `reference`: X (tokens, d_v, d) the state, h the direction, a the target, b the erase
gate, s the scale, r = s(a − b·s·hᵀX) the row of the rank-1 write X' = X + h rᵀ, x_in the compressed
state, g the norm's weight, c = x_in·rstd·g the context.

A program walks along neighbouring tokens. All of a token's sums over d are made in two reductions,
because a reduction costs more than the arithmetic around it; and the next token's memory is asked
for before this one's arithmetic, so that its loads find it in the second-level cache. An argument
that is None is not there: no pending write, no norm, nothing to store. Where X itself was not
stored, `x` is an earlier state and the trail holds the writes since.
"""

import triton
import triton.language as tl

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
    zero_numbers,
    zero_vectors,
)


@triton.jit
def fetch_piece(
    x,
    x_token,
    x_channel,
    x_feature,
    trail_h,
    h,
    token,
    p,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Piece p of what `fetch_state` gives; the pending direction is a tuple of one or none."""
    channels = load_state(x, x_token, x_channel, x_feature, token, p, D, DV, BLOCK)
    past = ()
    for i in tl.static_range(len(trail_h)):
        past = past + (load_vector(trail_h[i], token, p, D, BLOCK),)
    key = ()
    if h is not None:
        key = (load_vector(h, token, p, D, BLOCK),)
    return channels, past, key


@triton.jit
def fetch_state(
    x,
    x_token,
    x_channel,
    x_feature,
    trail_h,
    h,
    token,
    D: tl.constexpr,
    DV: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The stored state and the directions of the writes since and of the pending one."""
    channels = ()
    past_keys = ()
    keys = ()
    for p in tl.static_range(PIECES):
        loaded, past, key = fetch_piece(
            x, x_token, x_channel, x_feature, trail_h, h, token, p, D, DV, BLOCK
        )
        channels = channels + (loaded,)
        past_keys = past_keys + (past,)
        keys = keys + key
    return channels, past_keys, keys


@triton.jit
def fetch_write(trail_row, target, erase, token, DV: tl.constexpr):
    """The rows of the writes since the stored state, and target and gate of the pending one."""
    past_rows = ()
    for i in tl.static_range(len(trail_row)):
        past_rows = past_rows + (load_row(trail_row[i] + token * DV, DV),)
    entries = ()
    strength = ()
    if target is not None:
        entries = load_row(target + token * DV, DV)
    if erase is not None:
        strength = load_row(erase + token, 1)
    return past_rows, entries, strength


@triton.jit
def touch_token(
    x,
    x_token,
    x_channel,
    x_feature,
    trail_h,
    trail_row,
    h,
    target,
    erase,
    token,
    D: tl.constexpr,
    DV: tl.constexpr,
):
    """What `fetch_state` and `fetch_write` will read at a later token."""
    for j in tl.static_range(DV):
        touch_vector(x + token * x_token + j * x_channel, x_feature, D)
    for i in tl.static_range(len(trail_h)):
        touch_vector(trail_h[i] + token * D, 1, D)
        touch(trail_row[i] + token * DV)
    if h is not None:
        touch_vector(h + token * D, 1, D)
    if target is not None:
        touch(target + token * DV)
    if erase is not None:
        touch(erase + token)


@triton.jit
def compress(
    x,
    taps,
    carried,
    start,
    p,
    D: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Piece p of x_in, and what this token hands on: entry s − 1 belongs to the token s later."""
    if K == 0:
        x_in = x[0]
    else:
        pooled = ()
        for s in tl.static_range(K):
            total = load_weight(taps, (K - 1 - s) * len(x), p, D, BLOCK) * x[0]
            for j in tl.static_range(1, len(x)):
                total += load_weight(taps, (K - 1 - s) * len(x) + j, p, D, BLOCK) * x[j]
            pooled = pooled + (total,)
        x_in = pooled[0]
        if K > 1:
            handed = ()
            for s in tl.static_range(K - 1):
                handed = handed + (tl.where(start, 0.0, carried[s]),)
            x_in += handed[0]
            carried = ()
            for s in tl.static_range(K - 2):
                carried = carried + (handed[s + 1] + pooled[s + 1],)
            carried = carried + (pooled[K - 1],)
    return x_in, carried


@triton.jit(do_not_specialize=RUNTIME)
def forward(
    x,
    x_token,
    x_channel,
    x_feature,
    trail_h,
    trail_row,
    h,
    target,
    erase,
    starts,
    taps,
    norm,
    gate,
    gate_bias,
    value,
    value_bias,
    x_new,
    row_out,
    stats,
    x_in_out,
    context,
    gate_logits,
    value_logits,
    tokens,
    length,
    chunk,
    direction_eps,
    norm_eps,
    D: tl.constexpr,
    DV: tl.constexpr,
    K: tl.constexpr,
    GATES: tl.constexpr,
    VALUES: tl.constexpr,
    AHEAD: tl.constexpr,
    VALUE_ON_STATE: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """X' and r; x_in or, with a norm, the context and its logits; the numbers a token keeps.

    Those are, for the backward pass, s·hᵀX (d_v), s, rstd and Σ_i c_ij x_in,i h_i (d_v): with them
    it needs one reduction instead of two. With K > 1 what a token hands to the next K − 1 stays in
    registers, and a program starts K − 1 tokens early.
    """
    first = tl.program_id(0).to(tl.int64) * chunk
    halo: tl.constexpr = K - 1 if K > 1 else 0
    # Two passes back make dx_in first and need no product of it with h.
    crossing: tl.constexpr = (stats is not None) and (h is not None) and K <= 1
    gate_shift = ()
    value_shift = ()
    if gate_bias is not None:
        gate_shift = load_row(gate_bias, GATES)
    if value_bias is not None:
        value_shift = load_row(value_bias, VALUES)
    begin = tl.maximum(first - halo, 0)
    end = tl.minimum(first + chunk, tokens)
    carried = ()
    for _ in tl.static_range(PIECES):
        carried = carried + (zero_vectors(halo, BLOCK),)
    for token in range(begin, end):
        raw, past_keys, raw_keys = fetch_state(
            x, x_token, x_channel, x_feature, trail_h, h, token, D, DV, PIECES, BLOCK
        )
        past_rows, entries, strength = fetch_write(trail_row, target, erase, token, DV)
        if AHEAD > 0:
            touch_token(
                x, x_token, x_channel, x_feature, trail_h, trail_row, h, target, erase,
                tl.minimum(token + AHEAD, tokens - 1), D, DV,
            )  # fmt: skip
        own = token >= first

        state = ()
        keys = ()
        products = ()
        for p in tl.static_range(PIECES):
            channels = rebuild(raw[p], past_keys[p], past_rows, x.dtype.element_ty)
            state = state + (channels,)
            if h is not None:
                key = raw_keys[p].to(tl.float32)
                keys = keys + (key,)
                terms = ()
                if erase is not None:
                    for j in tl.static_range(DV):
                        terms = terms + (channels[j] * key,)
                if direction_eps is not None:
                    terms = terms + (key * key,)
                products = terms if p == 0 else accumulate(products, terms)
        scale = 1.0
        readouts = ()
        if h is not None:
            sums = sum_many(products)
            if direction_eps is not None:
                scale = tl.rsqrt(sums[len(sums) - 1] + direction_eps * direction_eps)
            row = ()
            for j in tl.static_range(DV):
                entry = 1.0
                if target is not None:
                    entry = entries[j]
                readout = 0.0
                if erase is not None:
                    readout = scale * sums[j]
                    entry -= strength[0] * readout
                row = row + (entry * scale,)
                readouts = readouts + (readout,)
            store_numbers(row_out + token * DV, row, own)

        if stats is not None:
            readouts = readouts if h is not None else zero_numbers(DV)
            store_numbers(stats + token * (2 * DV + 2), readouts + (scale,), own)

        start = is_start(starts, token, length)
        x_ins = ()
        products = ()
        handing = ()
        for p in tl.static_range(PIECES):
            channels = state[p]
            if h is not None:
                channels = add_outer(channels, keys[p], row, x.dtype.element_ty)
            if x_new is not None:
                for j in tl.static_range(DV):
                    store_vector(x_new, token * DV + j, channels[j], own, p, D, BLOCK)
            if context is not None:
                x_in, handed = compress(channels, taps, carried[p], start, p, D, K, BLOCK)
                handing = handing + (handed,)
                x_ins = x_ins + (x_in,)
                if x_in_out is not None:
                    store_vector(x_in_out, token, x_in, own, p, D, BLOCK)
                if norm is not None:
                    weighted = x_in * load_weight(norm, 0, p, D, BLOCK)
                    terms = (x_in * x_in,)
                    for q in tl.static_range(GATES):
                        terms = terms + (weighted * load_weight(gate, q, p, D, BLOCK),)
                    for j in tl.static_range(VALUES):
                        source = x_in if VALUE_ON_STATE else weighted
                        terms = terms + (source * load_weight(value, j, p, D, BLOCK),)
                    if crossing:
                        for j in tl.static_range(DV):
                            crossed = x_in * keys[p]
                            if K > 0:
                                crossed *= load_weight(taps, j, p, D, BLOCK)
                            terms = terms + (crossed,)
                    products = terms if p == 0 else accumulate(products, terms)
        rstd = 1.0
        crossings = zero_numbers(DV)
        if context is not None:
            carried = handing
            if norm is not None:
                sums = sum_many(products)
                rstd = tl.rsqrt(sums[0] / D + norm_eps)
                for q in tl.static_range(GATES):
                    logit = sums[1 + q] * rstd
                    if gate_bias is not None:
                        logit += gate_shift[q]
                    tl.store(gate_logits + token * GATES + q, logit, own)
                for j in tl.static_range(VALUES):
                    logit = sums[1 + GATES + j] * (1.0 if VALUE_ON_STATE else rstd)
                    if value_bias is not None:
                        logit += value_shift[j]
                    tl.store(value_logits + token * VALUES + j, logit, own)
                if crossing:
                    crossings = ()
                    for j in tl.static_range(DV):
                        crossings = crossings + (sums[1 + GATES + VALUES + j],)
            for p in tl.static_range(PIECES):
                out = x_ins[p]
                if norm is not None:
                    out = out * load_weight(norm, 0, p, D, BLOCK) * rstd
                store_vector(context, token, out, own, p, D, BLOCK)
        if stats is not None:
            store_numbers(stats + token * (2 * DV + 2) + DV + 1, (rstd,) + crossings, own)
