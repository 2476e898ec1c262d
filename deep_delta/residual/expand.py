"""From embeddings to the state, and from the last state to the width-d hidden vectors."""

import torch
from torch import Tensor, nn

from deep_delta.ops import expand_embeddings, reduce_state
from deep_delta.residual.compress import Compressor, current_token
from deep_delta.residual.contract import (
    CacheSlot,
    ResidualModule,
    State,
    TokenWindow,
    documents,
    flops_of,
    start_,
)


class Repeat(nn.Module):
    """X₀ = x 1ᵀ: every channel starts as the embedding. (B, T, d) -> State of (B, T, d, d_v)."""

    def __init__(self, value_channels: int, dtype: torch.dtype | None = None):
        super().__init__()
        self.value_channels, self.dtype = value_channels, dtype

    def flops(self) -> int:
        return 0

    def forward(self, embeddings: Tensor, window: TokenWindow | None = None) -> State:
        x = embeddings.to(self.dtype or embeddings.dtype).unsqueeze(-2)
        return State(x.expand(*x.shape[:-2], self.value_channels, -1))


class EmbeddingConv(ResidualModule):
    """EC: a depthwise causal convolution over tokens, d -> d·d_v, that starts as repetition.

    (B, T, d) -> State of (B, T, d, d_v). With d_v = 1 it is the control for EC (additive-ec).
    """

    def __init__(
        self,
        width: int,
        value_channels: int,
        kernel_size: int = 4,
        dtype: torch.dtype | None = None,
        slot: CacheSlot = (0, 0),
        backend: str = "auto",
    ):
        super().__init__()
        self.dtype, self.slot, self.backend = dtype, slot, backend
        self.weight = nn.Parameter(torch.empty(width, value_channels, kernel_size))
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        start_(self.weight, current_token(self.weight.shape[-1]))

    def flops(self) -> int:
        return 2 * self.weight.numel()

    def forward(self, embeddings: Tensor, window: TokenWindow | None = None) -> State:
        tokens, dtype = embeddings.shape[1], self.dtype or embeddings.dtype
        if window is not None:
            embeddings = window.visible(embeddings, self.weight.shape[-1], self.slot)
        segments = documents(window, embeddings)
        x = expand_embeddings(embeddings, self.weight, segments, dtype=dtype, backend=self.backend)
        if x.shape[1] > tokens:  # the gradient of a slice, of all of it too, would be a copy
            x = x[:, -tokens:]
        return State(x.mT)


class StateReadout(nn.Module):
    """The last read: settle the pending write and compress. State -> (B, T, d), for the norm."""

    def __init__(self, compressor: Compressor, slot: CacheSlot = (0, 0), backend: str = "auto"):
        super().__init__()
        self.compressor, self.slot, self.backend = compressor, slot, backend

    def flops(self) -> int:
        return flops_of(self.compressor)

    def forward(self, state: State, window: TokenWindow | None = None) -> Tensor:
        if self.compressor.looks_back(window):
            return self.compressor(state.settle(self.backend), window, self.slot)
        return reduce_state(
            state.x,
            *state[1:4],
            eps=state.eps,
            kernel=self.compressor(None),
            segments=documents(window, state.channels),
            trail=state.trail,
            backend=self.backend,
        )
