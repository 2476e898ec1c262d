"""What a delta residual generates at every token: the gate β, the target v and the direction k.

Weights are plain parameters, not Linear layers: the fused read multiplies them with the context
while it has it in registers, and tools that wrap every Linear layer (adapters, int8) leave them
alone. All logits are computed in fp32.

A generator whose first step is a product with its source says so by `lends_rows`: called with None
it lends that step's rows and bias, and it goes on from the logits in `from_logits`. Any other is
called with the source itself.
`reads_source` is False where only the source's shape matters, a direction's `reads_state` where X
does not: it need not be stored then.
Each says what it costs a token (`flops_of`): `flops()`, a direction, which may read all of X,
`flops(value_channels)`.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deep_delta.ops import linear
from deep_delta.residual.contract import (
    ResidualModule,
    distinct_around,
    gate_bias,
    normal,
    start_,
    uniform,
)

Rows = tuple[Tensor | None, Tensor | None]  # (m, d) and what is added to the products, (m,)
NO_ROWS: Rows = (None, None)


def lends_rows(generator: nn.Module) -> bool:
    """Whether a fused read multiplies this generator's rows."""
    return getattr(generator, "lends_rows", False)


def reads_source(generator: nn.Module) -> bool:
    """Whether the source's numbers matter to this generator, and not only its shape."""
    return getattr(generator, "reads_source", True)


def logit_rows(generators: Sequence[nn.Module]) -> Rows:
    """The rows of all generators that lend rows, in their order, and their biases."""
    lent = [generator(None) for generator in generators if lends_rows(generator)]
    if len(lent) < 2:
        return lent[0] if lent else NO_ROWS
    added = [row.new_zeros(len(row)) if bias is None else bias for row, bias in lent]
    return torch.cat([row for row, _ in lent]), torch.cat(added)


class TokenGate(ResidualModule):
    """β = 2σ(W c + b), or 2σ(W₂ tanh(W₁ c) + b) with `hidden_size` (§A.2).

    context c (B, T, d) -> β (B, T) in (0, 2), fp32. The bias starts at logit(β₀/2), the matrix
    that reads the context as N(0, std), W₂ behind a W₁ as N(0, outer_std), std too by default.
    """

    def __init__(
        self,
        width: int,
        start: float = 1.0,
        hidden_size: int | None = None,
        std: float = 0.02,
        outer_std: float | None = None,
    ):
        super().__init__()
        self.start, self.std = start, std
        self.outer_std = std if outer_std is None else outer_std
        self.reads_width = ("hidden",) if hidden_size else ("weight",)
        self.hidden = nn.Parameter(torch.empty(hidden_size, width)) if hidden_size else None
        self.weight = nn.Parameter(torch.empty(1, hidden_size or width))
        self.bias = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        if self.hidden is not None:
            start_(self.hidden, normal(self.hidden.shape, self.std, generator))
        std = self.std if self.hidden is None else self.outer_std
        start_(self.weight, normal(self.weight.shape, std, generator))
        start_(self.bias, torch.tensor(gate_bias(self.start), device="cpu"))

    def flops(self) -> int:
        return 2 * (self.weight.numel() + (0 if self.hidden is None else self.hidden.numel()))

    @property
    def lends_rows(self) -> bool:
        return self.hidden is None

    def from_logits(self, logits: Tensor) -> Tensor:
        """Logits (B, T) -> β (B, T)."""
        return 2 * torch.sigmoid(logits)

    def forward(self, context: Tensor | None) -> Any:
        if context is None:
            return self.weight, self.bias
        if self.hidden is not None:
            context = torch.tanh(linear(context, self.hidden))
        return self.from_logits(linear(context, self.weight, self.bias).squeeze(-1))


class LayerGate(ResidualModule):
    """β = 2σ(b): one learned number for all tokens. context (B, T, d) -> β (B, T), fp32."""

    reads_source = False

    def __init__(self, start: float = 1.0):
        super().__init__()
        self.start = start
        self.bias = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        start_(self.bias, torch.tensor(gate_bias(self.start), device="cpu"))

    def flops(self) -> int:
        return 0

    def forward(self, context: Tensor) -> Tensor:
        dtype = torch.promote_types(context.dtype, torch.float32)
        return 2 * torch.sigmoid(self.bias.to(dtype)).expand(context.shape[:-1])


class FixedGate(nn.Module):
    """β = β₀ everywhere, nothing learned. context (B, T, d) -> β (B, T), fp32."""

    reads_source = False

    def __init__(self, start: float = 1.0):
        super().__init__()
        self.start = start

    def flops(self) -> int:
        return 0

    def forward(self, context: Tensor) -> Tensor:
        dtype = torch.promote_types(context.dtype, torch.float32)
        return torch.full(context.shape[:-1], self.start, dtype=dtype, device=context.device)


class LinearValue(ResidualModule):
    """v = W x + b, or scale·σ(W x + b) with a `scale` (the published code's target).

    x (B, T, d) -> v (B, T, d_v), at least fp32. W starts as N(0, std), b uniform in ±bias_range.
    """

    reads_width = ("weight",)
    lends_rows = True

    def __init__(
        self,
        width: int,
        value_channels: int,
        bias: bool = False,
        scale: float | None = None,
        std: float = 0.02,
        bias_range: float = 0.0,
    ):
        super().__init__()
        self.scale, self.std, self.bias_range = scale, std, bias_range
        self.weight = nn.Parameter(torch.empty(value_channels, width))
        self.bias = nn.Parameter(torch.empty(value_channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        start_(self.weight, normal(self.weight.shape, self.std, generator))
        if self.bias is not None:
            start_(self.bias, uniform(self.bias.shape, self.bias_range, generator))

    def flops(self) -> int:
        return 2 * self.weight.numel()

    def from_logits(self, logits: Tensor) -> Tensor:
        """Logits (B, T, d_v) -> v (B, T, d_v)."""
        return logits if self.scale is None else self.scale * torch.sigmoid(logits)

    def forward(self, x: Tensor | None) -> Any:
        if x is None:
            return self.weight, self.bias
        return self.from_logits(linear(x, self.weight, self.bias))


class ConstantValue(ResidualModule):
    """v is one learned vector for all tokens, starting around `start` with distinct entries.

    x (B, T, d) -> v (B, T, d_v).
    """

    reads_source = False

    def __init__(self, value_channels: int, start: float = 2.0):
        super().__init__()
        self.start = start
        self.vector = nn.Parameter(torch.empty(value_channels))
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        start_(self.vector, distinct_around(self.start, self.vector.numel(), generator))

    def flops(self) -> int:
        return 0

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        return self.vector.to(dtype).expand(*x.shape[:-1], -1)


class SublayerDirection(nn.Module):
    """k̃ = h, the sublayer's output (the paper's choice). None, h (B, T, d) -> (B, T, d)."""

    reads_state = False

    def flops(self, value_channels: int) -> int:
        return 0

    def forward(self, x: None, output: Tensor) -> Tensor:
        return output


class StateDirection(ResidualModule):
    """k̃ = W₂ tanh(W₁ x̄) with x̄ the mean of X over its channels (§A.1, the first version's).

    X (B, T, d, d_v), h unused -> (B, T, d), at least fp32. W₁ starts as N(0, std), std by default
    1/√d.
    """

    reads_width = ("inner",)

    def __init__(self, width: int, hidden_size: int = 128, std: float | None = None):
        super().__init__()
        self.std = 1 / math.sqrt(width) if std is None else std
        self.inner = nn.Parameter(torch.empty(hidden_size, width))
        self.outer = nn.Parameter(torch.empty(width, hidden_size))
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        # The usual fan-in scale: the direction's length is divided out, its angle is not.
        start_(self.inner, normal(self.inner.shape, self.std, generator))
        start_(self.outer, normal(self.outer.shape, 1 / math.sqrt(self.outer.shape[1]), generator))

    def flops(self, value_channels: int) -> int:
        pooled = self.inner.shape[1] * value_channels
        return pooled + 2 * (self.inner.numel() + self.outer.numel())

    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        pooled = x.mean(-1, dtype=torch.promote_types(x.dtype, torch.float32))
        return linear(torch.tanh(linear(pooled, self.inner)), self.outer)
