"""What the operators of `fused` allocate, and how they launch their kernels.

`outputs` also runs on fake tensors, while torch.compile traces a model.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deep_delta.ops.launch import (
    channel_major,
    compact,
    partial_sums,
    plan,
    shape_of,
    share_of,
    strides_of,
)

WIDE = 8192  # a token with more numbers of state has the backward pass of `kernels.wide`
Launch = tuple[tuple[int, ...], tuple, dict[str, Any]]  # programs, arguments, options


class Read(NamedTuple):
    """The arguments of `fused.read_state`."""

    x: Tensor
    h: Tensor | None
    target: Tensor | None
    erase: Tensor | None
    direction_eps: float | None
    taps: Tensor | None
    norm: Tensor | None
    norm_eps: float
    gate: Tensor | None
    gate_bias: Tensor | None
    value: Tensor | None
    value_bias: Tensor | None
    value_on_state: bool
    starts: Tensor | None
    length: int
    new_state: str
    keep: bool
    context_dtype: torch.dtype | None
    trail_x: Tensor | None
    trail_h: Sequence[Tensor]
    trail_row: Sequence[Tensor]

    def outputs(self) -> tuple[Tensor, ...]:
        """X', r, stats, x_in, context, gate and value logits; empty what is not asked for."""
        x, dtype = self.x, self.context_dtype
        tokens, width, channels = x.shape
        fp32: dict[str, Any] = {"dtype": torch.float32}
        keeps_x_in = (
            self.keep and self.norm is not None and self.taps is not None and self.taps.shape[0] > 1
        )
        return (
            x.new_empty(0) if self.new_state == "none" else channel_major(x),
            x.new_empty((tokens, channels) if self.h is not None else (0,), **fp32),
            x.new_empty((tokens, 2 * channels + 2) if self.keep else (0,), **fp32),
            x.new_empty((tokens, width) if keeps_x_in else (0,)),
            x.new_empty((tokens, width) if dtype else (0,), dtype=dtype or x.dtype),
            x.new_empty(tokens, 0 if self.gate is None else self.gate.shape[0], **fp32),
            x.new_empty(tokens, 0 if self.value is None else self.value.shape[0], **fp32),
        )

    def launch(self, outputs: tuple[Tensor, ...], tokens: int) -> Launch:
        """Of `kernels.forward.forward` on so many tokens."""
        x_new, row, stats, x_in, context, gates, values = outputs
        _, width, channels = self.x.shape
        taps = 0 if self.taps is None else self.taps.shape[0]
        stores = self.new_state == "stored"
        per_processor, options = plan("forward", width, channels, taps, stores=stores)
        walk = per_processor > 0
        # A token alone gains by longer loads.
        shape = shape_of(self.x, self.taps, self.gate, self.value, whole=not walk)
        chunk = share_of(tokens, self.x.device, per_processor, least=4 * taps) if walk else 1
        source = compact(self.x if self.trail_x is None else self.trail_x)
        arguments = (
            source,
            *strides_of(source),
            tuple(self.trail_h),
            tuple(self.trail_row),
            self.h,
            self.target,
            self.erase,
            self.starts,
            self.taps,
            self.norm,
            self.gate,
            self.gate_bias,
            self.value,
            self.value_bias,
            x_new if stores else None,
            row,
            stats if self.keep else None,
            x_in if x_in.numel() else None,
            context if self.context_dtype else None,
            gates,
            values,
            tokens,
            self.length,
            chunk,
            self.direction_eps,
            self.norm_eps,
        )
        options = {"VALUE_ON_STATE": self.value_on_state, **options, **shape}
        return (-(-tokens // chunk),), arguments, options


class ReadBackward(NamedTuple):
    """The arguments of `fused.read_state_backward`."""

    x: Tensor
    trail_h: Sequence[Tensor]
    trail_row: Sequence[Tensor]
    h: Tensor | None
    row: Tensor | None
    stats: Tensor | None
    x_in: Tensor | None
    target: Tensor | None
    erase: Tensor | None
    unit: bool
    taps: Tensor | None
    norm: Tensor | None
    gate: Tensor | None
    value: Tensor | None
    value_on_state: bool
    starts: Tensor | None
    length: int
    dx_new: Tensor | None
    d_context: Tensor | None
    d_gates: Tensor | None
    d_values: Tensor | None

    @property
    def logits(self) -> int:
        weights = (self.gate, self.value)
        return sum(0 if weight is None else weight.shape[0] for weight in weights)

    @property
    def rows(self) -> int:
        """Rows of d numbers among the weights' gradients."""
        taps = 0 if self.taps is None else self.taps.shape[0] * self.x.shape[2]
        return taps + (0 if self.norm is None else 1 + self.logits)

    def outputs(self) -> tuple[Tensor, ...]:
        """Gradients of X, h, a and b, and one row of those of all weights and biases."""
        none = self.x.new_empty(0)
        numbers = self.rows * self.x.shape[1] + (0 if self.norm is None else self.logits)
        return (
            channel_major(self.x),
            none if self.h is None else torch.empty_like(self.h),
            none.clone() if self.target is None else torch.empty_like(self.target),
            none.clone() if self.erase is None else torch.empty_like(self.erase),
            self.x.new_empty(numbers, dtype=torch.float32),
        )

    def needs_norm_first(self) -> bool:
        """Whether dx_in of later tokens is needed, so that it must be made before the rest."""
        return self.norm is not None and self.taps is not None and self.taps.shape[0] > 1

    def empty_dx_in(self) -> Tensor:
        """(N, d) in fp32, since the taps' gradient is a sum of it."""
        assert self.d_context is not None
        return torch.empty_like(self.d_context, dtype=torch.float32)

    def after_norm(self, dx_in: Tensor) -> "ReadBackward":
        """What is left to do with dx_in (N, d)."""
        return self._replace(d_context=dx_in, norm=None, gate=None, value=None)

    def norm_launch(self, dx_in: Tensor, tokens: int) -> tuple[Launch, Tensor]:
        """Of `kernels.backward.norm_backward`, and its programs' sums for norm, gates, values."""
        width, channels = self.x.shape[1:]
        per_processor, options = plan("norm", width, 1, 1)
        chunk = share_of(tokens, self.x.device, per_processor)
        partial = partial_sums(-(-tokens // chunk), 1 + self.logits, self.x, self.logits)
        shape = shape_of(self.x, self.taps, self.gate, self.value)
        arguments = (
            self.x_in,
            self.stats,
            self.norm,
            self.gate,
            self.value,
            self.d_context,
            self.d_gates,
            self.d_values,
            dx_in,
            partial,
            tokens,
            chunk,
        )
        options = {
            "STATS": 2 * channels + 2,
            "RSTD": channels + 1,
            "VALUE_ON_STATE": self.value_on_state,
            **{key: shape[key] for key in ("D", "GATES", "VALUES", "PIECES", "BLOCK")},
            **options,
        }
        return ((partial.shape[0],), arguments, options), partial

    def given_state(self, x: Tensor) -> tuple:
        """What the kernels take first: X (compact), the writes since, and what forward kept."""
        trail = tuple(self.trail_h), tuple(self.trail_row)
        return (x, *strides_of(x), *trail, self.h, self.row, self.stats)

    def weights(self) -> tuple[Tensor | None, ...]:
        return (self.taps, self.norm, self.gate, self.value)

    def gradients(self, outputs: tuple[Tensor, ...]) -> tuple:
        """Those that come in, and where those of X, h, a and b go."""
        dx_new = None if self.dx_new is None else compact(self.dx_new)
        strides = (0, 0, 0) if dx_new is None else strides_of(dx_new)
        return (dx_new, *strides, self.d_context, self.d_gates, self.d_values, *outputs[:4])

    def is_wide(self) -> bool:
        """Whether a token and the weights' sums do not fit in registers: see `kernels.wide`."""
        _, width, channels = self.x.shape
        taps = 0 if self.taps is None else self.taps.shape[0]
        return taps <= 1 < channels and width * channels > WIDE

    def wide_launch(self, outputs: tuple[Tensor, ...], tokens: int) -> tuple[Launch, Tensor]:
        """Of `kernels.wide.wide_backward`, and the norm's pulls that it writes."""
        x = compact(self.x)
        shape = shape_of(x, self.taps, self.gate, self.value)
        per_processor, options = plan("wide", shape["D"], shape["DV"], shape["K"])
        chunk = share_of(tokens, x.device, per_processor)
        pulls = x.new_empty(0 if self.norm is None else tokens, dtype=torch.float32)
        arguments = (
            *self.given_state(x),
            self.target,
            self.erase,
            *self.weights(),
            *self.gradients(outputs),
            pulls,
            tokens,
            chunk,
        )
        options = {"UNIT": self.unit, "VALUE_ON_STATE": self.value_on_state, **shape, **options}
        return ((-(-tokens // chunk),), arguments, options), pulls

    def weights_launch(self, pulls: Tensor, tokens: int) -> tuple[Launch, Tensor]:
        """Of `kernels.wide.weights_backward`, and its programs' sums for the weights."""
        x = compact(self.x)
        shape = shape_of(x, self.taps, self.gate, self.value)
        shape["BLOCK"] = min(shape["BLOCK"], 256)
        per_processor, options = plan("weights", shape["D"], shape["DV"], shape["K"])
        chunk = share_of(tokens, x.device, per_processor)
        logits = 0 if self.norm is None else self.logits
        partial = partial_sums(-(-tokens // chunk), self.rows, x, logits)
        programs = (partial.shape[0], -(-shape["D"] // shape["BLOCK"]))
        arguments = (
            *self.given_state(x),
            *self.weights(),
            self.d_context,
            self.d_gates,
            self.d_values,
            pulls,
            partial,
            tokens,
            chunk,
        )
        shape.pop("PIECES")
        options = {"VALUE_ON_STATE": self.value_on_state, **shape, **options}
        return (programs, arguments, options), partial

    def launch(self, outputs: tuple[Tensor, ...], tokens: int) -> tuple[Launch, Tensor]:
        """Of `kernels.backward.backward`, and its programs' sums for the weights."""
        x = compact(self.x)
        shape = shape_of(x, self.taps, self.gate, self.value)
        logits = 0 if self.norm is None else self.logits
        per_processor, options = plan(
            "backward", shape["D"], shape["DV"], shape["K"], writes=self.h is not None
        )
        chunk = share_of(tokens, x.device, per_processor)
        partial = partial_sums(-(-tokens // chunk), self.rows, x, logits)
        arguments = (
            *self.given_state(x),
            self.target,
            self.erase,
            self.starts,
            *self.weights(),
            *self.gradients(outputs),
            partial,
            tokens,
            self.length,
            chunk,
        )
        options = {"UNIT": self.unit, "VALUE_ON_STATE": self.value_on_state, **shape, **options}
        return ((partial.shape[0],), arguments, options), partial
