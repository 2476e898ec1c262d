"""The fused kernels as PyTorch operators: registered, differentiable, opaque to torch.compile.

Everything here sees flat tokens: X (N, d, d_v), h (N, d), a (N, d_v), b (N). `dispatch` has the
functions that users call.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from deep_delta.ops.kernels import backward, forward
from deep_delta.ops.launch import (
    channel_major,
    compact,
    document_starts,
    partial_sums,
    plan,
    shape_of,
    share_of,
    strides_of,
)

Grads = tuple[Tensor | None, ...]


@torch.library.custom_op("deep_delta::read_state", mutates_args=())
def read_state(
    x: Tensor,
    h: Tensor | None,
    target: Tensor | None,
    erase: Tensor | None,
    direction_eps: float | None,
    taps: Tensor | None,
    norm: Tensor | None,
    norm_eps: float,
    gate: Tensor | None,
    gate_bias: Tensor | None,
    value: Tensor | None,
    value_bias: Tensor | None,
    value_on_state: bool,
    starts: Tensor | None,
    length: int,
    new_state: str,
    keep: bool,
    context_dtype: torch.dtype | None,
    trail_x: Tensor | None,
    trail_h: Sequence[Tensor],
    trail_row: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Settle, compress, normalise: (X', r, stats, x_in, context, gate logits, value logits).

    With a trail X is rebuilt from it, here and in the backward pass, and `x` has X's shape and
    gradient but is not read. `new_state` says what X' is: "stored", such a "stand-in" too (memory
    that nobody writes), or "none".

    Outputs that are not asked for are empty: X' with "none", what only a backward pass needs
    (stats, and x_in for K > 1) without `keep`, the context without `context_dtype`.
    """
    out = _empty_outputs(x, h, taps, norm, gate, value, new_state, keep, context_dtype)
    x_new, row, stats, x_in, context, gates, values = out
    tokens, taps_count = x.shape[0], 0 if taps is None else taps.shape[0]
    stores = new_state == "stored"
    per_processor, options = plan("forward", x.shape[1], x.shape[2], taps_count, stores)
    walk = per_processor > 0
    shape = shape_of(x, taps, gate, value, whole=not walk)  # alone, a token gains by longer loads
    chunk = share_of(tokens, x.device, per_processor, least=4 * taps_count) if walk else 1
    source = compact(x if trail_x is None else trail_x)
    forward.forward[(-(-tokens // chunk),)](
        source,
        *strides_of(source),
        tuple(trail_h),
        tuple(trail_row),
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
        x_new if stores else None,
        row,
        stats if keep else None,
        x_in if x_in.numel() else None,
        context if context_dtype else None,
        gates,
        values,
        tokens,
        length,
        chunk,
        direction_eps,
        norm_eps,
        VALUE_ON_STATE=value_on_state,
        **options,
        **shape,
    )
    return out


def _empty_outputs(x, h, taps, norm, gate, value, new_state, keep, context_dtype):
    tokens, width, channels = x.shape
    fp32 = {"dtype": torch.float32}
    keep_x_in = keep and norm is not None and taps is not None and taps.shape[0] > 1
    return (
        x.new_empty(0) if new_state == "none" else channel_major(x),
        x.new_empty((tokens, channels) if h is not None else (0,), **fp32),
        x.new_empty((tokens, 2 * channels + 2) if keep else (0,), **fp32),
        x.new_empty((tokens, width) if keep_x_in else (0,)),
        x.new_empty((tokens, width) if context_dtype else (0,), dtype=context_dtype or x.dtype),
        x.new_empty(tokens, gate.shape[0] if gate is not None else 0, **fp32),
        x.new_empty(tokens, value.shape[0] if value is not None else 0, **fp32),
    )


@read_state.register_fake
def _(x, h, target, erase, direction_eps, taps, norm, norm_eps, gate, gate_bias, value, value_bias,
      value_on_state, starts, length, new_state, keep, context_dtype, trail_x, trail_h,
      trail_row):  # fmt: skip
    return _empty_outputs(x, h, taps, norm, gate, value, new_state, keep, context_dtype)


@torch.library.custom_op("deep_delta::read_state_backward", mutates_args=())
def read_state_backward(
    x: Tensor,
    trail_h: Sequence[Tensor],
    trail_row: Sequence[Tensor],
    h: Tensor | None,
    row: Tensor | None,
    stats: Tensor | None,
    x_in: Tensor | None,
    target: Tensor | None,
    erase: Tensor | None,
    unit: bool,
    taps: Tensor | None,
    norm: Tensor | None,
    gate: Tensor | None,
    value: Tensor | None,
    value_on_state: bool,
    starts: Tensor | None,
    length: int,
    dx_new: Tensor | None,
    d_context: Tensor | None,
    d_gates: Tensor | None,
    d_values: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of X, h, a, b, and those of all weights in one row of numbers.

    Taps, norm, gate and value rows, then the biases of gates and values, whether there are any.
    """
    dx, dh, d_target, d_erase, _ = out = _empty_gradients(
        x, h, target, erase, taps, norm, gate, value
    )
    x, dx_new = compact(x), None if dx_new is None else compact(dx_new)
    shape = shape_of(x, taps, gate, value)
    tokens, after = x.shape[0], []
    if norm is not None and shape["K"] > 1:  # needs dx_in of later tokens, so that is made first
        d_context, d_norm = _norm_backward(
            x_in, stats, norm, gate, value, value_on_state, d_context, d_gates, d_values, shape
        )
        after = [d_norm]
        norm = gate = value = None
        shape |= {"GATES": 0, "VALUES": 0}
    logits = 0 if norm is None else shape["GATES"] + shape["VALUES"]
    rows = shape["K"] * shape["DV"] + (0 if norm is None else 1 + logits)
    per_processor, options = plan("backward", x.shape[1], x.shape[2], shape["K"])
    chunk = share_of(tokens, x.device, per_processor)
    partial = partial_sums(-(-tokens // chunk), rows, x, logits)
    backward.backward[(partial.shape[0],)](
        x,
        *strides_of(x),
        tuple(trail_h),
        tuple(trail_row),
        h,
        row,
        stats,
        target,
        erase,
        starts,
        taps,
        norm,
        gate,
        value,
        dx_new,
        *((0, 0, 0) if dx_new is None else strides_of(dx_new)),
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
        UNIT=unit,
        VALUE_ON_STATE=value_on_state,
        **shape,
        **options,
    )
    sums = torch.cat([partial.sum(0), *after]) if after else partial.sum(0)
    return (*out[:-1], sums)


def _norm_backward(
    x_in, stats, norm, gate, value, value_on_state, d_context, d_gates, d_values, shape
):
    """dx_in (N, d) and the gradients of norm, gate and value rows and biases, as one row."""
    tokens = x_in.shape[0]
    per_processor, options = plan("norm", shape["D"], 1, shape["K"])
    chunk = share_of(tokens, x_in.device, per_processor)
    dx_in = torch.empty_like(d_context, dtype=torch.float32)  # the taps' gradient is a sum of it
    logits = shape["GATES"] + shape["VALUES"]
    partial = partial_sums(-(-tokens // chunk), 1 + logits, x_in, logits)
    backward.norm_backward[(partial.shape[0],)](
        x_in,
        stats,
        norm,
        gate,
        value,
        d_context,
        d_gates,
        d_values,
        dx_in,
        partial,
        tokens,
        chunk,
        STATS=2 * shape["DV"] + 2,
        RSTD=shape["DV"] + 1,
        VALUE_ON_STATE=value_on_state,
        **{key: shape[key] for key in ("D", "GATES", "VALUES", "PIECES", "BLOCK")},
        **options,
    )
    return dx_in, partial.sum(0)


def _empty_gradients(x, h, target, erase, taps, norm, gate, value):
    shape = shape_of(x, taps, gate, value)
    logits = shape["GATES"] + shape["VALUES"]
    rows = shape["K"] * shape["DV"] + (0 if norm is None else 1 + logits)
    none = x.new_empty(0)
    return (
        channel_major(x),
        none if h is None else torch.empty_like(h),
        none.clone() if target is None else torch.empty_like(target),
        none.clone() if erase is None else torch.empty_like(erase),
        x.new_empty(rows * x.shape[1] + (0 if norm is None else logits), dtype=torch.float32),
    )


@read_state_backward.register_fake
def _(x, trail_h, trail_row, h, row, stats, x_in, target, erase, unit, taps, norm, gate, value,
      value_on_state, starts, length, dx_new, d_context, d_gates, d_values):  # fmt: skip
    return _empty_gradients(x, h, target, erase, taps, norm, gate, value)


def is_plain(x, h, target, erase, direction_eps) -> bool:
    """x + h: its backward needs X' and nothing else, and h and X share one gradient."""
    others = target is None and erase is None and direction_eps is None
    return h is not None and others and x.shape[-1] == 1


def _keep(ctx, inputs, output) -> None:
    (x, h, target, erase, eps, taps, norm, _, gate, gate_bias, value, value_bias,
     ctx.value_on_state, starts, ctx.length, new_state, _, context_dtype, trail_x, trail_h,
     trail_row) = inputs  # fmt: skip
    x_new, row, stats, x_in = output[:4]
    ctx.reads, ctx.unit, ctx.trail = context_dtype, eps is not None, len(trail_h)
    ctx.has_x = new_state != "none"
    ctx.biases = tuple(None if b is None else b.dtype for b in (gate_bias, value_bias))
    ctx.plain = None
    write, trail = (h, row), [*trail_h, *trail_row]
    source = x if trail_x is None else trail_x
    if new_state == "stored" and is_plain(x, h, target, erase, eps):
        ctx.plain = h.dtype
        source, write, trail = x_new, (None, None), []
    x_in = x_in if x_in.numel() else None
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        source, *write, stats, x_in, target, erase, taps, norm, gate, value, starts, *trail
    )


def _differentiate(ctx, dx_new, _row, _stats, _x_in, d_context, d_gates, d_values) -> Grads:
    x, h, row, stats, x_in, target, erase, taps, norm, gate, value, starts, *trail = (
        ctx.saved_tensors
    )
    if not stats.numel():
        raise RuntimeError("read_state kept nothing for a backward pass: give it keep=True")
    tokens = x.shape[0]
    if ctx.reads is not None and d_context is None:
        d_context = x.new_zeros(tokens, x.shape[1], dtype=ctx.reads)
    if gate is not None and d_gates is None:
        d_gates = x.new_zeros(tokens, gate.shape[0], dtype=torch.float32)
    if value is not None and d_values is None:
        d_values = x.new_zeros(tokens, value.shape[0], dtype=torch.float32)
    dx, dh, d_target, d_erase, sums = read_state_backward(
        x,
        trail[: len(trail) // 2],
        trail[len(trail) // 2 :],
        h,
        row if h is not None else None,
        stats,
        x_in,
        target,
        erase,
        ctx.unit,
        taps,
        norm,
        gate,
        value,
        ctx.value_on_state,
        starts,
        ctx.length,
        dx_new if ctx.has_x else None,
        *(None if g is None else g.contiguous() for g in (d_context, d_gates, d_values)),
    )
    if ctx.plain is not None:
        dh = dx.squeeze(-1).to(ctx.plain)
    elif h is None:
        dh = None
    weights, rows = (taps, norm, gate, value), (gate, value)
    sizes = [weight.numel() for weight in weights if weight is not None]
    pieces = iter(sums.split([*sizes, *(row.shape[0] for row in rows if row is not None)]))
    d_taps, d_norm, d_gate, d_value = (
        None if weight is None else next(pieces).view_as(weight).to(weight.dtype)
        for weight in weights
    )
    d_biases = [None if row is None else next(pieces) for row in rows]
    d_gate_bias, d_value_bias = (
        None if d_bias is None or dtype is None else d_bias.to(dtype)
        for d_bias, dtype in zip(d_biases, ctx.biases, strict=True)
    )
    return (
        dx,
        dh,
        None if target is None else d_target,
        None if erase is None else d_erase,
        None,
        d_taps,
        d_norm,
        None,
        d_gate,
        d_gate_bias,
        d_value,
        d_value_bias,
        *[None] * 7,
        [None] * ctx.trail,
        [None] * ctx.trail,
    )


read_state.register_autograd(_differentiate, setup_context=_keep)


def _training() -> bool:
    """Whether a backward pass may come, which needs what is kept for it."""
    return torch.is_grad_enabled()


def _flat(state, direction, target, erase):
    """The write and its state over flat tokens, contiguous where the kernels want it."""
    tokens = state.shape[:-2].numel()
    return (
        state.reshape(tokens, *state.shape[-2:]),
        None if direction is None else direction.reshape(tokens, -1).contiguous(),
        None if target is None else target.reshape(tokens, -1).contiguous(),
        None if erase is None else erase.reshape(tokens).contiguous(),
    )


def _packed(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.contiguous()


def _starts(taps: Tensor | None, segments: Tensor | None) -> Tensor | None:
    """Document starts, if the compressor looks back at all."""
    return document_starts(segments) if taps is not None and taps.shape[0] > 1 else None


def _trail_arguments(trail) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
    if trail is None:
        return None, [], []
    flat = trail.state.reshape(-1, *trail.state.shape[-2:])
    directions = [h.reshape(flat.shape[0], -1).contiguous() for h in trail.directions]
    return flat, directions, list(trail.rows)


def apply_write(state, direction, target, erase, eps, trail) -> Tensor:
    """See `dispatch.apply_write`."""
    flat = _flat(state, direction, target, erase)
    read = (None, None, 0.0, *[None] * 4, False, None, 1)  # it compresses and normalises nothing
    asked = ("stored", _training(), None)
    return read_state(*flat, eps, *read, *asked, *_trail_arguments(trail))[0].view(state.shape)


def read(
    state, direction, target, erase, eps, taps, norm, norm_eps, gate, gate_bias, value, value_bias,
    value_on_state, segments, context_dtype, trail, store,
):  # fmt: skip
    """See `dispatch.read_state`; also gives r.

    Without `store` X' is not written: while training there is a stand-in for it, which takes its
    gradient, otherwise the old state.
    """
    training = _training()
    # While training a state without a write is copied too: its two gradients, through this read
    # and through the next, would cost more to add afterwards.
    writes = store and (direction is not None or trail is not None or training)
    new_state = "stored" if writes else "stand-in" if training else "none"
    x_new, row, _, _, context, gates, values = read_state(
        *_flat(state, direction, target, erase), eps, _packed(taps), _packed(norm), norm_eps,
        _packed(gate), _packed(gate_bias), _packed(value), _packed(value_bias), value_on_state,
        _starts(taps, segments), state.shape[-3], new_state, training, context_dtype,
        *_trail_arguments(trail),
    )  # fmt: skip
    lead = state.shape[:-2]
    return (
        state.detach() if new_state == "none" else x_new.view(state.shape),
        context.view(*lead, -1),
        None if gate is None else gates.view(*lead, -1),
        None if value is None else values.view(*lead, -1),
        row,
    )


def reduce(state, direction, target, erase, eps, taps, segments, trail) -> Tensor:
    """See `dispatch.reduce_state`."""
    out = read_state(
        *_flat(state, direction, target, erase),
        eps,
        _packed(taps),
        None,
        0.0,
        *[None] * 4,
        False,
        _starts(taps, segments),
        state.shape[-3],
        "none",
        _training(),
        torch.float32,
        *_trail_arguments(trail),
    )
    return out[4].view(state.shape[:-1])
