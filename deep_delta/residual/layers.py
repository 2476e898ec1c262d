"""The residuals: each reads the state, runs a sublayer on what it read, and leaves a write.

Both obey the contract `state = residual(state, sublayer)` for any callable (B, T, d) -> (B, T, d).
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deep_delta.ops import unit_scale
from deep_delta.residual.compress import ChannelCompressor, ScalarRead
from deep_delta.residual.contract import (
    CacheSlot,
    ResidualModule,
    State,
    Sublayer,
    TokenWindow,
    distinct_around,
    start_,
)
from deep_delta.residual.generators import LinearValue, SublayerDirection, TokenGate

ValueSource = Literal["context", "state", "output"]


class RMSNorm(nn.RMSNorm):
    """RMSNorm in at least fp32, whatever comes in; what goes out has the weight's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        weight = self.weight.to(dtype)
        return F.rms_norm(x.to(dtype), self.normalized_shape, weight, self.eps).to(
            self.weight.dtype
        )


class Residual(ResidualModule):
    """Settles the pending write, compresses and normalises: what all residuals have in common.

    Args:
        width: d.
        value_channels: d_v.
        compressor: reads X (B, T, d, d_v) as x_in (B, T, d); by default the state itself for
            d_v = 1 and the channel compressor above.
        norm_eps: ε of the RMSNorm that makes the context c from x_in.
        owns_compressor: False borrows the compressor of another residual of the same block: it
            is used here, but stays a parameter of the other, so that a checkpoint holds it once.
        slot: (layer, index) of the cache entry in which the token compressor keeps its history.
    """

    compressor: nn.Module

    def __init__(
        self,
        width: int,
        value_channels: int = 1,
        *,
        compressor: nn.Module | None = None,
        norm_eps: float = 1e-5,
        owns_compressor: bool = True,
        slot: CacheSlot = (0, 0),
    ):
        super().__init__()
        if compressor is None:
            compressor = (
                ScalarRead() if value_channels == 1 else ChannelCompressor(width, value_channels)
            )
        if owns_compressor:
            self.compressor = compressor
        else:  # past nn.Module's own __setattr__, which would register it a second time
            object.__setattr__(self, "compressor", compressor)
        self.norm = RMSNorm(width, eps=norm_eps)
        self.slot = slot

    def read(self, state: State, window: TokenWindow | None) -> tuple[Tensor, Tensor, Tensor]:
        """The settled X (B, T, d, d_v), x_in (B, T, d) and the context c = RMSNorm(x_in)."""
        x = state.settle()
        x_in = self.compressor(x, window, self.slot)
        return x, x_in, self.norm(x_in)


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

    def forward(self, state: State, sublayer: Sublayer, window: TokenWindow | None = None) -> State:
        x, _, context = self.read(state, window)
        output = sublayer(context)
        target = output.new_ones(1) if self.spread is None else self.spread
        # Expanded also because re-entrant checkpointing breaks on a parameter as an output.
        return State(x, output, None, target.expand(*output.shape[:-1], -1))


class DeltaResidual(Residual):
    """X ← X + β k (vᵀ − kᵀX): read, compare with a target, write the gated correction (eq. 2.2).

    Args:
        width: d.
        value_channels: d_v. See `Residual` for the keywords that are not listed here.
        gate: context (B, T, d) -> β (B, T); by default a `TokenGate` that starts at 1.
        value: (B, T, d) -> the target v (B, T, d_v); by default a `LinearValue`.
        direction: (X, the sublayer's output h) -> k before normalisation, (B, T, d); by default
            h itself.
        value_source: what the value reads: the context c, the state's un-normalised x_in, or the
            sublayer's output h.
        erase: False is the write-only control X + β k vᵀ.
        erase_gate: a second gate for the erase term, X + k (β vᵀ − β_e kᵀX); None shares β.
        direction_eps: ε in k = k̃/√(‖k̃‖² + ε²).
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
        **read,
    ):
        super().__init__(width, value_channels, **read)
        self.gate = gate or TokenGate(width)
        self.value = value or LinearValue(width, value_channels)
        self.direction = direction or SublayerDirection()
        self.erase_gate = erase_gate
        self.value_source, self.erase, self.direction_eps = value_source, erase, direction_eps

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Nothing of its own: gate, value, direction and compressor know their starts."""

    def forward(self, state: State, sublayer: Sublayer, window: TokenWindow | None = None) -> State:
        x, x_in, context = self.read(state, window)
        output = sublayer(context)
        direction = self.direction(x, output)
        sources = {"context": context, "state": x_in, "output": output}
        value = self.value(sources[self.value_source])
        write_gate = self.gate(context)
        erase_gate = write_gate if self.erase_gate is None else self.erase_gate(context)
        return State(
            x,
            direction,
            unit_scale(direction, self.direction_eps),
            write_gate.unsqueeze(-1) * value,
            erase_gate if self.erase else None,
        )
