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
# The interpreter runs no assembly.
COMPILED = tl.constexpr(not triton.knobs.runtime.interpret)


@triton.jit
def piece(p, D: tl.constexpr, BLOCK: tl.constexpr):
    """The features of piece p, and which of them exist."""
    features = p * BLOCK + tl.arange(0, BLOCK)
    return features, features < D


@triton.jit
def load_vector(rows, index, p, D: tl.constexpr, BLOCK: tl.constexpr):
    """Piece p of row `index` of a (tokens, D) matrix, in its own dtype."""
    features, mask = piece(p, D, BLOCK)
    return tl.load(rows + index * D + features, mask, 0.0, cache_modifier=STREAM)


@triton.jit
def load_weight(rows, index, p, D: tl.constexpr, BLOCK: tl.constexpr):
    """Piece p of row `index` of a (rows, D) parameter, in fp32."""
    features, mask = piece(p, D, BLOCK)
    return tl.load(rows + index * D + features, mask, 0.0).to(tl.float32)


@triton.jit
def store_vector(rows, index, vector, keep, p, D: tl.constexpr, BLOCK: tl.constexpr):
    features, mask = piece(p, D, BLOCK)
    tl.store(rows + index * D + features, vector, mask & keep)


@triton.jit
def store_numbers(base, numbers, keep):
    """Neighbouring scalars, if `keep`."""
    for i in tl.static_range(len(numbers)):
        tl.store(base + i, numbers[i], keep)


@triton.jit
def load_state(
    x,
    token_stride,
    channel_stride,
    feature_stride,
    token,
    p,
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
def touch(pointers):
    """Ask for lines of memory to come into the second-level cache; nothing waits for them."""
    if COMPILED:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
            "=r,l",
            [pointers],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def touch_vector(vector, stride, D: tl.constexpr):
    """A vector of d features: a pointer or more into every 128 bytes, up to d = 32,768."""
    lanes: tl.constexpr = 128 if D <= 4096 else (256 if D <= 8192 else 1024)
    step: tl.constexpr = (D + lanes - 1) // lanes
    touch(vector + tl.minimum(tl.arange(0, lanes) * step, D - 1) * stride)


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
        new = new + (rounded(tl.fma(h, tl.zeros_like(h) + row[j], x[j]), DTYPE),)
    return new


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """An fp32 vector with the precision of DTYPE.

    Two numbers at a time where the compiler would round one by one, at a quarter of the speed.
    """
    if COMPILED and tl.bfloat16 == DTYPE:
        x = tl.inline_asm_elementwise(
            "{ .reg .b32 pair; cvt.rn.bf16x2.f32 pair, $3, $2; "
            "shl.b32 $0, pair, 16; and.b32 $1, pair, 0xffff0000; }",
            "=r,=r,r,r",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )
    else:
        x = x.to(DTYPE).to(tl.float32)
    return x


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
def zero_numbers(COUNT: tl.constexpr):
    numbers = ()
    for _ in tl.static_range(COUNT):
        numbers = numbers + (tl.full([], 0.0, tl.float32),)
    return numbers


@triton.jit
def is_start(starts, token, length):
    """Whether nothing before this token may be seen: a sequence's or a document's first token."""
    start = token % length == 0
    if starts is not None:
        start = start | (tl.load(starts + token) != 0)
    return start


@triton.jit
def sum_all(vectors):
    """The sums of up to 32 vectors, as one reduction: one round of barriers instead of one each.

    They are joined pairwise into one tensor, summed, and split again; the zeros that fill up to a
    power of two cost nothing, because the compiler sees them.
    """
    count: tl.constexpr = len(vectors)
    levels: tl.constexpr = (count > 1) + (count > 2) + (count > 4) + (count > 8) + (count > 16)
    joined = vectors
    for _ in tl.static_range((1 << levels) - count):
        joined = joined + (tl.zeros_like(vectors[0]),)
    for _ in tl.static_range(levels):
        pairs = ()
        for i in tl.static_range(len(joined) // 2):
            pairs = pairs + (tl.join(joined[i], joined[i + len(joined) // 2]),)
        joined = pairs
    sums = (tl.sum(joined[0], 0),)
    for _ in tl.static_range(levels):
        first = ()
        second = ()
        for i in tl.static_range(len(sums)):
            one, other = tl.split(sums[i])
            first = first + (one,)
            second = second + (other,)
        sums = first + second
    wanted = ()
    for i in tl.static_range(count):
        wanted = wanted + (sums[i],)
    return wanted


@triton.jit
def sum_many(vectors):
    """The sums of any number of vectors, 32 at a time."""
    count: tl.constexpr = len(vectors)
    sums = ()
    for first in tl.static_range(0, count, 32):
        group = ()
        for i in tl.static_range(min(32, count - first)):
            group = group + (vectors[first + i],)
        sums = sums + sum_all(group)
    return sums
