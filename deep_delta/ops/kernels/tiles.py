"""What the kernels share.

A token's d features are cut into pieces of BLOCK, a power of two; for d = 768 three pieces of 256
waste nothing. A piece of the state is a tuple of d_v vectors, one for each channel. Tuples instead
of two-dimensional tiles: any d_v works without padding, sums over channels never leave a thread,
and all vectors have one layout, so that only the sums over d go through shared memory.
"""

import triton
import triton.language as tl

# Arguments that must not compile another kernel when the batch size changes.
RUNTIME = ["tokens", "length", "chunk"]
# Loads of what is read once go past the first-level cache and leave it to the weights.
STREAM = tl.constexpr(".cg")


@triton.jit
def piece(p: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """The features of piece p, and which of them exist."""
    features = p * BLOCK + tl.arange(0, BLOCK)
    return features, features < D


@triton.jit
def load_vector(rows, index, p: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """Piece p of row `index` of a (tokens, D) matrix, in its own dtype."""
    features, mask = piece(p, D, BLOCK)
    return tl.load(rows + index * D + features, mask, 0.0, cache_modifier=STREAM)


@triton.jit
def load_weight(rows, index, p: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """Piece p of row `index` of a (rows, D) parameter, in fp32."""
    features, mask = piece(p, D, BLOCK)
    return tl.load(rows + index * D + features, mask, 0.0).to(tl.float32)


@triton.jit
def store_vector(rows, index, vector, keep, p: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    features, mask = piece(p, D, BLOCK)
    tl.store(rows + index * D + features, vector, mask & keep)


@triton.jit
def load_state(
    x,
    token_stride,
    channel_stride,
    feature_stride,
    token,
    p: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Piece p of one token's state: d_v vectors in its own dtype."""
    features, mask = piece(p, D, BLOCK)
    loaded = ()
    for j in tl.static_range(DV):
        at = x + token * token_stride + j * channel_stride + features * feature_stride
        loaded = loaded + (tl.load(at, mask, 0.0, cache_modifier=STREAM),)
    return loaded


@triton.jit
def load_row(base, COUNT: tl.constexpr):
    """COUNT neighbouring scalars in fp32."""
    loaded = ()
    for j in tl.static_range(COUNT):
        loaded = loaded + (tl.load(base + j).to(tl.float32),)
    return loaded


@triton.jit
def widen(vectors):
    wide = ()
    for j in tl.static_range(len(vectors)):
        wide = wide + (vectors[j].to(tl.float32),)
    return wide


@triton.jit
def add_outer(x, h, row, DTYPE: tl.constexpr):
    """X + h rᵀ, rounded to the state's dtype: the one place where a state is rounded.

    Forward and backward share it, so that a rebuilt state is the forward's bit for bit; `fma`
    leaves the compiler no choice of rounding.
    """
    new = ()
    for j in tl.static_range(len(x)):
        new = new + (tl.fma(h, tl.zeros_like(h) + row[j], x[j]).to(DTYPE).to(tl.float32),)
    return new


@triton.jit
def rebuild(channels, keys, rows, DTYPE: tl.constexpr):
    """A piece of X from a stored state and the writes since, with the roundings they had."""
    channels = widen(channels)
    for i in tl.static_range(len(keys)):
        channels = add_outer(channels, keys[i].to(tl.float32), rows[i], DTYPE)
    return channels


@triton.jit
def accumulate(totals, terms):
    """totals + terms, vector by vector. Both have the same length, above zero: Triton names a
    specialisation by the types in its tuples and would take two of one and none for one of each.
    """
    tl.static_assert(len(totals) == len(terms))
    sums = ()
    for i in tl.static_range(len(terms)):
        sums = sums + (totals[i] + terms[i],)
    return sums


@triton.jit
def zero_vectors(COUNT: tl.constexpr, BLOCK: tl.constexpr):
    vectors = ()
    for _ in tl.static_range(COUNT):
        vectors = vectors + (tl.zeros([BLOCK], tl.float32),)
    return vectors


@triton.jit
def is_start(starts, token, length):
    """Whether nothing before this token may be seen: a sequence's or a document's first token."""
    start = token % length == 0
    if starts is not None:
        start = start | (tl.load(starts + token) != 0)
    return start


@triton.jit
def sum_all(vectors):
    """The sums of up to eight vectors, as one reduction: one barrier round instead of eight."""
    count: tl.constexpr = len(vectors)
    tl.static_assert(count <= 8)
    v = vectors
    for _ in tl.static_range(8 - count):
        v = v + (tl.zeros_like(vectors[0]),)
    if count > 4:
        even = tl.join(tl.join(v[0], v[4]), tl.join(v[2], v[6]))
        odd = tl.join(tl.join(v[1], v[5]), tl.join(v[3], v[7]))
        even, odd = tl.split(tl.sum(tl.join(even, odd), 0))
        v04, v26 = tl.split(even)
        v15, v37 = tl.split(odd)
        v0, v4 = tl.split(v04)
        v2, v6 = tl.split(v26)
        v1, v5 = tl.split(v15)
        v3, v7 = tl.split(v37)
        padded = (v0, v1, v2, v3, v4, v5, v6, v7)
    elif count > 2:
        joined = tl.join(tl.join(v[0], v[2]), tl.join(v[1], v[3]))
        v02, v13 = tl.split(tl.sum(joined, 0))
        v0, v2 = tl.split(v02)
        v1, v3 = tl.split(v13)
        padded = (v0, v1, v2, v3)
    elif count == 2:
        v0, v1 = tl.split(tl.sum(tl.join(v[0], v[1]), 0))
        padded = (v0, v1)
    else:
        padded = (tl.sum(v[0], 0),)
    sums = ()
    for i in tl.static_range(count):
        sums = sums + (padded[i],)
    return sums


@triton.jit
def sum_many(vectors):
    """The sums of any number of vectors, eight at a time."""
    count: tl.constexpr = len(vectors)
    sums = ()
    for first in tl.static_range(0, count, 8):
        group = ()
        for i in tl.static_range(min(8, count - first)):
            group = group + (vectors[first + i],)
        sums = sums + sum_all(group)
    return sums
