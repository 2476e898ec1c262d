"""From embeddings to the state, and from the last state to the width-d hidden vectors."""

import torch
from torch import Tensor, nn

from deep_delta.ops import expand_embeddings
from deep_delta.residual.compress import current_token
from deep_delta.residual.contract import CacheSlot, ResidualModule, State, TokenWindow, start_


class Repeat(nn.Module):
    """X₀ = x 1ᵀ: every channel starts as the embedding. (B, T, d) -> State of (B, T, d, d_v)."""

    def __init__(self, value_channels: int, dtype: torch.dtype | None = None):
        super().__init__()
        self.value_channels, self.dtype = value_channels, dtype

    def forward(self, embeddings: Tensor, window: TokenWindow | None = None) -> State:
        x = embeddings.to(self.dtype or embeddings.dtype).unsqueeze(-1)
        return State(x.expand(*embeddings.shape, self.value_channels))


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
    ):
        super().__init__()
        self.dtype, self.slot = dtype, slot
        self.weight = nn.Parameter(torch.empty(width, value_channels, kernel_size))
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        start_(self.weight, current_token(self.weight.shape[-1]))

    def forward(self, embeddings: Tensor, window: TokenWindow | None = None) -> State:
        tokens, dtype = embeddings.shape[1], self.dtype or embeddings.dtype
        segments = None
        if window is not None:
            embeddings = window.visible(embeddings, self.weight.shape[-1], self.slot)
            segments = window.segments
        return State(expand_embeddings(embeddings, self.weight, segments)[:, -tokens:].to(dtype))


class StateReadout(nn.Module):
    """The last read: settle the pending write and compress. State -> (B, T, d), for the norm."""

    def __init__(self, compressor: nn.Module, slot: CacheSlot = (0, 0)):
        super().__init__()
        self.compressor, self.slot = compressor, slot

    def forward(self, state: State, window: TokenWindow | None = None) -> Tensor:
        return self.compressor(state.settle(), window, self.slot)
