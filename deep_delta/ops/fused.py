"""The fused kernels as PyTorch operators: registered, differentiable, opaque to torch.compile.

Everything here sees flat tokens: X (N, d, d_v), h (N, d), a (N, d_v), b (N). `dispatch` has the
functions that users call.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from deep_delta.ops.fused_launch import Read, ReadBackward
from deep_delta.ops.kernels import backward, forward, wide
from deep_delta.ops.launch import document_starts, start

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
    inputs = Read(
        x, h, target, erase, direction_eps, taps, norm, norm_eps, gate, gate_bias, value,
        value_bias, value_on_state, starts, length, new_state, keep, context_dtype, trail_x,
        trail_h, trail_row,
    )  # fmt: skip
    out = inputs.outputs()
    start(forward.forward, *inputs.launch(out, x.shape[0]))
    return out  # type: ignore[return-value]


@read_state.register_fake
def _(*arguments):
    return Read(*arguments).outputs()


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
    inputs = ReadBackward(
        x, trail_h, trail_row, h, row, stats, x_in, target, erase, unit, taps, norm, gate, value,
        value_on_state, starts, length, dx_new, d_context, d_gates, d_values,
    )  # fmt: skip
    out, tokens, after = inputs.outputs(), x.shape[0], []
    if inputs.is_wide():
        call, pulls = inputs.wide_launch(out, tokens)
        start(wide.wide_backward, *call)
        if not inputs.rows:
            return out  # type: ignore[return-value]
        call, partial = inputs.weights_launch(pulls, tokens)
        start(wide.weights_backward, *call)
        return (*out[:-1], partial.sum(0))  # type: ignore[return-value]
    if inputs.needs_norm_first():
        dx_in = inputs.empty_dx_in()
        call, partial = inputs.norm_launch(dx_in, tokens)
        start(backward.norm_backward, *call)
        inputs, after = inputs.after_norm(dx_in), [partial.sum(0)]
    call, partial = inputs.launch(out, tokens)
    start(backward.backward, *call)
    sums = torch.cat([partial.sum(0), *after]) if after else partial.sum(0)
    return (*out[:-1], sums)  # type: ignore[return-value]


@read_state_backward.register_fake
def _(*arguments):
    return ReadBackward(*arguments).outputs()


def is_plain(x, h, target, erase, direction_eps) -> bool:
    """x + h: its backward needs X' and nothing else, and h and X share one gradient."""
    others = target is None and erase is None and direction_eps is None
    return h is not None and others and x.shape[-1] == 1


def _keep(ctx, inputs, output) -> None:
    read = Read(*inputs)
    x_new, row, stats, x_in = output[:4]
    ctx.value_on_state, ctx.length = read.value_on_state, read.length
    ctx.reads, ctx.unit = read.context_dtype, read.direction_eps is not None
    ctx.trail = len(read.trail_h)
    ctx.has_x = read.new_state != "none"
    ctx.biases = tuple(None if b is None else b.dtype for b in (read.gate_bias, read.value_bias))
    ctx.plain = None
    write, trail = (read.h, row), [*read.trail_h, *read.trail_row]
    source = read.x if read.trail_x is None else read.trail_x
    if read.new_state == "stored" and is_plain(*read[:5]):
        assert read.h is not None
        ctx.plain = read.h.dtype
        source, write, trail = x_new, (None, None), []
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        source,
        *write,
        stats,
        x_in if x_in.numel() else None,
        read.target,
        read.erase,
        read.taps,
        read.norm,
        read.gate,
        read.value,
        read.starts,
        *trail,
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
