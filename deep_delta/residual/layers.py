"""The residuals: each reads the state, runs a sublayer on what it read, and leaves a write.

Both obey the contract `state = residual(state, sublayer)` for any callable (B, T, d) -> (B, T, d).
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from deep_delta.ops import Reading, read_state, reduce_state, rms_norm
from deep_delta.residual.compress import ChannelCompressor, Compressor, ScalarRead
from deep_delta.residual.contract import (
    CacheSlot,
    ResidualModule,
    State,
    Sublayer,
    TokenWindow,
    distinct_around,
    documents,
    flops_of,
    start_,
)
from deep_delta.residual.generators import (
    NO_ROWS,
    LinearValue,
    Rows,
    SublayerDirection,
    TokenGate,
    lends_rows,
    logit_rows,
    reads_source,
)

Lender = Callable[[], Compressor]
ValueSource = Literal["context", "state", "output"]


class RMSNorm(nn.RMSNorm):
    """RMSNorm in at least fp32, whatever comes in; what goes out has the weight's dtype.

    Called with None it lends its weight.
    """

    def forward(self, x: Tensor | None) -> Tensor:
        if x is None:
            return self.weight
        return rms_norm(x, self.weight, self.eps).to(self.weight.dtype)


class Residual(ResidualModule):
    """Settles the pending write, compresses and normalises: what all residuals have in common.

    Every subclass says what it costs a token beside the sublayer and its compressor: `flops_of`.

    Args:
        width: d.
        value_channels: d_v.
        compressor: reads X (B, T, d, d_v) as x_in (B, T, d); by default the state itself for
            d_v = 1 and the channel compressor above.
        norm_eps: ε of the RMSNorm that makes the context c from x_in.
        owns_compressor: False for a residual that reads by the compressor of another one, which
            each call then lends, as a function that gives it. So it has one owner: a checkpoint
            holds it once, and what replaces it there is used here too.
        slot: (layer, index) of the cache entry in which the token compressor keeps its history.
        backend: "auto", "reference" or "triton": see `ops`.
        rebuild: how many states between two stored ones are rebuilt ("triton"): see `read_state`.
    """

    compressor: Compressor | None
    # Set by transformers. A checkpointed block must leave a state that its successor, which runs
    # again by itself, can start from; one of its two reads need not store.
    gradient_checkpointing = False

    def __init__(
        self,
        width: int,
        value_channels: int = 1,
        *,
        compressor: Compressor | None = None,
        norm_eps: float = 1e-5,
        owns_compressor: bool = True,
        slot: CacheSlot = (0, 0),
        backend: str = "auto",
        rebuild: int = 0,
    ):
        super().__init__()
        self.width, self.value_channels = width, value_channels
        if compressor is None and owns_compressor:
            compressor = (
                ScalarRead() if value_channels == 1 else ChannelCompressor(width, value_channels)
            )
        self.compressor = compressor
        self.norm = RMSNorm(width, eps=norm_eps)
        self.slot, self.backend, self.rebuild = slot, backend, rebuild

    def reader(self, lender: Lender | None) -> Compressor:
        """The compressor of this call: its own, or the one that the call lends."""
        if self.compressor is not None:
            return self.compressor
        if lender is None:
            raise ValueError(
                "this residual has no compressor of its own (owns_compressor=False): call it with "
                "a function that gives the one it shares, residual(state, sublayer, window, lender)"
            )
        return lender()

    def read(
        self,
        state: State,
        window: TokenWindow | None,
        compressor: Compressor,
        *,
        gates: Rows = NO_ROWS,
        values: Rows = NO_ROWS,
        value_on_state: bool = False,
        exact: bool = False,
        store: bool = False,
    ) -> tuple[Reading, Tensor | None]:
        """The settled state, the context and the logits; and X as the compressor saw it, if stored.

        Under autocast the context has autocast's dtype, which the sublayer's matrices would give
        it anyway; with `exact` it keeps the norm's. With `store` the state is stored.
        """
        device = state.x.device.type
        rounded = torch.is_autocast_enabled(device) and not exact
        options: dict[str, Any] = {
            "kernel": compressor(None),
            "norm_weight": self.norm(None),
            "norm_eps": self.norm.eps,
            "gate_weight": gates[0],
            "gate_bias": gates[1],
            "value_weight": values[0],
            "value_bias": values[1],
            "value_on_state": value_on_state,
            "context_dtype": torch.get_autocast_dtype(device) if rounded else None,
            "backend": self.backend,
        }
        if not compressor.looks_back(window):
            reading = read_state(
                state.x,
                *state[1:4],
                eps=state.eps,
                trail=state.trail,
                segments=documents(window, state.channels),
                rebuild=0 if store else self._rebuild(),
                **options,
            )
            return reading, reading.state if reading.trail is None else None
        x = state.settle(self.backend)
        seen = compressor.see(x, window, self.slot)
        read = read_state(seen, segments=documents(window, seen), **options)
        own = slice(-x.shape[1], None)
        return Reading(
            x,
            read.context[:, own],
            None if read.gate_logits is None else read.gate_logits[:, own],
            None if read.value_logits is None else read.value_logits[:, own],
            None,
        ), seen

    def _rebuild(self) -> int:
        return min(self.rebuild, 1) if self.gradient_checkpointing else self.rebuild


class AdditiveResidual(Residual):
    """x ← x + F(x), and with d_v > 1 the capacity control X ← X + F(x_in) uᵀ.

    u ∈ R^{d_v} is learned, with mean 1 and distinct entries at the start; for d_v = 1 there is
    nothing to learn and u = 1.
    """

    def __init__(self, width: int, value_channels: int = 1, **read):
        super().__init__(width, value_channels, **read)
        self.spread = nn.Parameter(torch.empty(value_channels)) if value_channels > 1 else None
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        if self.spread is not None:
            start_(self.spread, distinct_around(1.0, self.spread.numel(), generator))

    def flops(self) -> int:
        return self.width if self.spread is None else 2 * self.width * self.value_channels

    def forward(
        self,
        state: State,
        sublayer: Sublayer,
        window: TokenWindow | None = None,
        lender: Lender | None = None,
    ) -> State:
        read, _ = self.read(state, window, self.reader(lender))
        output = sublayer(read.context)
        # Expanded because re-entrant checkpointing breaks on a parameter as an output.
        target = None if self.spread is None else self.spread.expand(*output.shape[:-1], -1)
        return State(read.state.mT, output, target, trail=read.trail)


class DeltaResidual(Residual):
    """X ← X + β k (vᵀ − kᵀX): read, compare with a target, write the gated correction (eq. 2.2).

    Args:
        width: d.
        value_channels: d_v. See `Residual` for the keywords that are not listed here.
        gate: context (B, T, d) -> β (B, T); by default a `TokenGate` that starts at 1.
        value: (B, T, d) -> the target v (B, T, d_v); by default a `LinearValue`.
        direction: (X, the sublayer's output h) -> k before normalisation, (B, T, d); by default
            h itself. One whose `reads_state` is False gets None for X, which need not be stored.
        value_source: what the value reads: the context c, the state's un-normalised x_in, or the
            sublayer's output h.
        erase: False is the write-only control X + β k vᵀ.
        erase_gate: a second gate for the erase term, X + k (β vᵀ − β_e kᵀX); None shares β.
        direction_eps: ε in k = k̃/√(‖k̃‖² + ε²).
        target_scale: factor on the target. A unit direction has entries of Θ(1/√d), so that a
            write keeps its size per feature where this grows like √d.
    """

    def __init__(
        self,
        width: int,
        value_channels: int = 1,
        *,
        gate: nn.Module | None = None,
        value: nn.Module | None = None,
        direction: nn.Module | None = None,
        value_source: ValueSource = "context",
        erase: bool = True,
        erase_gate: nn.Module | None = None,
        direction_eps: float = 1e-5,
        target_scale: float = 1.0,
        **read,
    ):
        super().__init__(width, value_channels, **read)
        self.gate = gate or TokenGate(width)
        self.value: Any = value or LinearValue(width, value_channels)
        self.direction = direction or SublayerDirection()
        self.erase_gate = erase_gate
        self.value_source, self.erase, self.direction_eps = value_source, erase, direction_eps
        self.target_scale = target_scale

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Nothing of its own: gate, value, direction and compressor know their starts."""

    def flops(self) -> int:
        gates = (self.gate,) if self.erase_gate is None else (self.gate, self.erase_gate)
        made = sum(flops_of(part) for part in (*gates, self.value))
        made += flops_of(self.direction, self.value_channels)
        normalised = 3 * self.width  # the length of k̃, and its scaling
        rank_one = 2 * self.width * self.value_channels  # the write, or the readout kᵀX
        return made + normalised + (2 if self.erase else 1) * rank_one

    def forward(
        self,
        state: State,
        sublayer: Sublayer,
        window: TokenWindow | None = None,
        lender: Lender | None = None,
    ) -> State:
        compressor = self.reader(lender)
        gates: list[Any] = [self.gate] if self.erase_gate is None else [self.gate, self.erase_gate]
        values = NO_ROWS if self.value_source == "output" else logit_rows([self.value])
        reads_state = getattr(self.direction, "reads_state", True)
        reads_x_in = self.value_source == "state" and values[0] is None and reads_source(self.value)
        read, seen = self.read(
            state,
            window,
            compressor,
            gates=logit_rows(gates),
            values=values,
            value_on_state=self.value_source == "state",
            exact=any(
                not lends_rows(generator) and reads_source(generator)
                for generator in (*gates, self.value)
            ),
            store=reads_state or reads_x_in,
        )
        output = sublayer(read.context)
        logits = iter(() if read.gate_logits is None else read.gate_logits.unbind(-1))
        strengths = [
            gate.from_logits(next(logits)) if lends_rows(gate) else gate(read.context)
            for gate in gates
        ]
        if values[0] is not None:
            value = self.value.from_logits(read.value_logits)
        elif reads_x_in:
            value = self.value(self._x_in(compressor, seen, window)[:, -output.shape[1] :])
        else:
            value = self.value(output if self.value_source == "output" else read.context)
        if self.target_scale != 1:
            value = self.target_scale * value
        return State(
            read.state.mT,
            self.direction(read.state if reads_state else None, output),
            strengths[0].unsqueeze(-1) * value,
            strengths[-1] if self.erase else None,
            self.direction_eps,
            read.trail,
        )

    def _x_in(self, compressor: Compressor, seen: Any, window: TokenWindow | None) -> Tensor:
        return reduce_state(
            seen,
            kernel=compressor(None),
            segments=documents(window, seen),
            backend=self.backend,
        )
