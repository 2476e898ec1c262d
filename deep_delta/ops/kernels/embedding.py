"""The embedding convolution: x (tokens, d) -> X (tokens, d_v, d), and back.

A program takes one piece of d and walks along neighbouring tokens, forward in time for X and
backward for the gradient, so that everything is read once; what K − 1 neighbours share stays in
registers. The next token's memory is asked for before this one's arithmetic.
"""

import triton
import triton.language as tl

from deep_delta.ops.kernels.tiles import (
    RUNTIME,
    accumulate,
    is_start,
    touch,
    widen,
    zero_vectors,
)


@triton.jit
def load_rows(rows, features, mask, COUNT: tl.constexpr, D: tl.constexpr):
    """A piece of COUNT rows of a (rows, D) parameter, in fp32."""
    loaded = ()
    for i in tl.static_range(COUNT):
        loaded = loaded + (tl.load(rows + i * D + features, mask, 0.0).to(tl.float32),)
    return loaded


@triton.jit
def load_past(x, token, features, mask, D: tl.constexpr):
    """A piece of x at a token; before the first one that of the first, which nobody uses."""
    return tl.load(x + tl.maximum(token, 0) * D + features, mask, 0.0).to(tl.float32)


@triton.jit
def pool(vectors, rows, offset: tl.constexpr):
    """Σ_j rows[offset + j]·vectors[j]."""
    total = tl.zeros_like(vectors[0])
    for j in tl.static_range(len(vectors)):
        total += rows[offset + j] * vectors[j]
    return total


@triton.jit(do_not_specialize=RUNTIME)
def expand_forward(
    x,
    starts,
    taps,
    out,
    tokens,
    length,
    chunk,
    D: tl.constexpr,
    DV: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    features = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = features < D
    lanes: tl.constexpr = max(BLOCK // 32, 1)  # a pointer into every 128 bytes of fp32
    lines = tl.minimum(tl.program_id(1) * BLOCK + tl.arange(0, lanes) * 32, D - 1)
    first = tl.program_id(0).to(tl.int64) * chunk
    rows = load_rows(taps, features, mask, K * DV, D)
    window = zero_vectors(K - 1, BLOCK)  # x of the token before, of the one before that, …
    for token in range(tl.maximum(first - (K - 1), 0), tl.minimum(first + chunk, tokens)):
        start = is_start(starts, token, length)
        seen = (tl.load(x + token * D + features, mask, 0.0).to(tl.float32),)
        touch(x + tl.minimum(token + 1, tokens - 1) * D + lines)
        for s in tl.static_range(K - 1):
            seen = seen + (tl.where(start, 0.0, window[s]),)
        for j in tl.static_range(DV):
            total = tl.zeros_like(seen[0])
            for s in tl.static_range(K):
                total += rows[(K - 1 - s) * DV + j] * seen[s]
            tl.store(out + (token * DV + j) * D + features, total, mask & (token >= first))
        window = ()
        for s in tl.static_range(K - 1):
            window = window + (seen[s],)


@triton.jit(do_not_specialize=RUNTIME)
def expand_backward(
    x,
    starts,
    taps,
    d_out,
    dx,
    partial,
    tokens,
    length,
    chunk,
    D: tl.constexpr,
    DV: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    features = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = features < D
    lanes: tl.constexpr = max(BLOCK // 32, 1)  # a pointer into every 128 bytes of fp32
    lines = tl.minimum(tl.program_id(1) * BLOCK + tl.arange(0, lanes) * 32, D - 1)
    program = tl.program_id(0).to(tl.int64)
    first = program * chunk
    end = tl.minimum(first + chunk, tokens)
    last = tl.minimum(end + (K - 1), tokens) - 1
    rows = load_rows(taps, features, mask, K * DV, D)
    handed = zero_vectors(K - 1, BLOCK)  # what later tokens give to this one, the one before, …
    d_taps = zero_vectors(K * DV, BLOCK)
    past = ()  # x of the token, of the one before, …
    cuts = ()  # whether it starts a document, whether the one before does, …
    for s in tl.static_range(K - 1):
        past = past + (load_past(x, last - s, features, mask, D),)
    for s in tl.static_range(K - 2):
        cuts = cuts + (is_start(starts, tl.maximum(last - s, 0), length),)
    for back in range(last - first + 1):
        token = last - back
        own = token < end
        grads = ()
        for j in tl.static_range(DV):
            grads = grads + (tl.load(d_out + (token * DV + j) * D + features, mask, 0.0),)
        past = past + (load_past(x, token - (K - 1), features, mask, D),)
        next_one = tl.maximum(token - 1, 0)
        for j in tl.static_range(DV):
            touch(d_out + (next_one * DV + j) * D + lines)
        touch(x + tl.maximum(token - K, 0) * D + lines)
        grads = widen(grads)
        total = pool(grads, rows, (K - 1) * DV)
        if K > 1:
            total += handed[0]
            cuts = cuts + (is_start(starts, tl.maximum(token - (K - 2), 0), length),)
        tl.store(dx + token * D + features, total, mask & own)
        terms = ()
        seen = own
        for s in tl.static_range(K):
            if s > 0:
                seen = seen & (cuts[s - 1] == 0)
            for j in tl.static_range(DV):
                terms = terms + (grads[j] * tl.where(seen, past[s], 0.0),)
        d_taps = accumulate(d_taps, terms)
        moved = ()
        earlier = ()
        for s in tl.static_range(1, K):
            give = pool(grads, rows, (K - 1 - s) * DV)
            if s < K - 1:
                give += handed[s]
            moved = moved + (tl.where(cuts[0], 0.0, give),)
            earlier = earlier + (past[s],)
        handed = moved
        past = earlier
        later_cuts = cuts
        cuts = ()
        for s in tl.static_range(1, K - 1):
            cuts = cuts + (later_cuts[s],)
    for q in tl.static_range(K * DV):
        at = (K - 1 - q // DV) * DV + q % DV
        tl.store(partial + (program * (K * DV) + at) * D + features, d_taps[q], mask)
