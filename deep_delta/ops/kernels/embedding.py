"""The embedding convolution: x (tokens, d) -> X (tokens, d_v, d), and back.

A program takes one piece of d and walks along neighbouring tokens, forward in time for X and
backward for the gradient, so that everything is read once; what K − 1 neighbours share stays in
registers.
"""

import triton
import triton.language as tl

from deep_delta.ops.kernels.tiles import RUNTIME, accumulate, is_start, widen, zero_vectors


@triton.jit
def pool(vectors, rows, offset, D: tl.constexpr, features, mask):
    """Σ_j rows[offset + j]·vectors[j]."""
    total = tl.zeros_like(vectors[0])
    for j in tl.static_range(len(vectors)):
        tap = tl.load(rows + (offset + j) * D + features, mask, 0.0).to(tl.float32)
        total += tap * vectors[j]
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
    first = tl.program_id(0).to(tl.int64) * chunk
    window = zero_vectors(K - 1, BLOCK)  # x of the token before, of the one before that, …
    for token in range(tl.maximum(first - (K - 1), 0), tl.minimum(first + chunk, tokens)):
        start = is_start(starts, token, length)
        seen = (tl.load(x + token * D + features, mask, 0.0).to(tl.float32),)
        for s in tl.static_range(K - 1):
            seen = seen + (tl.where(start, 0.0, window[s]),)
        for j in tl.static_range(DV):
            total = tl.zeros_like(seen[0])
            for s in tl.static_range(K):
                at = ((K - 1 - s) * DV + j) * D + features
                total += tl.load(taps + at, mask, 0.0).to(tl.float32) * seen[s]
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
    program = tl.program_id(0).to(tl.int64)
    first = program * chunk
    end = tl.minimum(first + chunk, tokens)
    last = tl.minimum(end + (K - 1), tokens) - 1
    handed = zero_vectors(K - 1, BLOCK)  # what later tokens give to this one, the one before, …
    d_taps = zero_vectors(K * DV, BLOCK)
    for back in range(last - first + 1):
        token = last - back
        own = token < end
        grads = ()
        for j in tl.static_range(DV):
            grads = grads + (tl.load(d_out + (token * DV + j) * D + features, mask, 0.0),)
        grads = widen(grads)
        total = pool(grads, taps, (K - 1) * DV, D, features, mask)
        if K > 1:
            total += handed[0]
        tl.store(dx + token * D + features, total, mask & own)
        terms = ()
        seen = own
        for s in tl.static_range(K):
            if s > 0:
                seen = seen & (is_start(starts, tl.maximum(token - s + 1, 0), length) == 0)
            earlier = tl.maximum(token - s, 0) * D + features
            past = tl.load(x + earlier, mask & seen, 0.0).to(tl.float32)
            for j in tl.static_range(DV):
                terms = terms + (grads[j] * past,)
        d_taps = accumulate(d_taps, terms)
        start = is_start(starts, token, length)
        moved = ()
        for s in tl.static_range(1, K):
            give = pool(grads, taps, (K - 1 - s) * DV, D, features, mask)
            if s < K - 1:
                give += handed[s]
            moved = moved + (tl.where(start, 0.0, give),)
        handed = moved
    for q in tl.static_range(K * DV):
        at = (K - 1 - q // DV) * DV + q % DV
        tl.store(partial + (program * (K * DV) + at) * D + features, d_taps[q], mask)
