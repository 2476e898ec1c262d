"""Compressors: from the expanded state X (B, T, d, d_v) to the width-d input of a sublayer (§A.3).

All share one call, `compressor(x, window, slot) -> (B, T, d)`, in at least fp32 where anything is
summed; only the token compressor looks at its `TokenWindow`, and keeps its history in the cache
slot of the read.
"""

import torch
from torch import Tensor, nn

from deep_delta.ops import compress_channels, compress_tokens
from deep_delta.residual.contract import (
    CacheSlot,
    ResidualModule,
    TokenWindow,
    normal,
    start_,
)


class ScalarRead(nn.Module):
    """d_v = 1: the state is the input. X (B, T, d, 1) -> (B, T, d)."""

    def forward(
        self, x: Tensor, window: TokenWindow | None = None, slot: CacheSlot = (0, 0)
    ) -> Tensor:
        return x.squeeze(-1)


class ChannelCompressor(ResidualModule):
    """CC: x_i = Σ_j c_ij X_ij with a learned c ∈ R^{d×d_v} that starts as the channels' mean.

    `std` starts it the published way instead: a "same"-padded kernel over the channels with
    N(0, std) entries, then an averaging read vector, folded into one c.
    """

    def __init__(self, width: int, value_channels: int, std: float | None = None):
        super().__init__()
        self.std = std
        self.weight = nn.Parameter(torch.empty(width, value_channels))
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        average = torch.full((self.weight.shape[1],), 1 / self.weight.shape[1], device="cpu")
        if self.std is None:
            start_(self.weight, average)
        else:
            kernel = normal(self.weight.shape, self.std, generator)
            start_(self.weight, fold_channel_kernel(kernel, average))

    def forward(
        self, x: Tensor, window: TokenWindow | None = None, slot: CacheSlot = (0, 0)
    ) -> Tensor:
        return compress_channels(x, self.weight)


class TokenCompressor(ResidualModule):
    """TC: a causal kernel over tokens per (feature, channel), then a read vector over channels.

    Starts as the current token alone, averaged over channels; `std` starts the kernel the
    published way instead, N(0, std).
    """

    def __init__(
        self, width: int, value_channels: int, kernel_size: int = 4, std: float | None = None
    ):
        super().__init__()
        self.std = std
        self.weight = nn.Parameter(torch.empty(width, value_channels, kernel_size))
        self.read = nn.Parameter(torch.empty(value_channels))
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        start_(self.read, torch.tensor(1 / self.read.numel(), device="cpu"))
        if self.std is None:
            start_(self.weight, current_token(self.weight.shape[-1]))
        else:
            start_(self.weight, normal(self.weight.shape, self.std, generator))

    def forward(
        self, x: Tensor, window: TokenWindow | None = None, slot: CacheSlot = (0, 0)
    ) -> Tensor:
        tokens = x.shape[1]
        segments = None
        if window is not None:
            x = window.visible(x, self.weight.shape[-1], slot)
            segments = window.segments
        return compress_tokens(x, self.weight, self.read, segments)[:, -tokens:]


def current_token(kernel_size: int) -> Tensor:
    """The causal kernel (K,), last tap the current token, that passes this token through."""
    taps = torch.zeros(kernel_size, device="cpu")
    taps[-1] = 1
    return taps


def fold_channel_kernel(kernel: Tensor, read: Tensor, causal: bool = False) -> Tensor:
    """Fold the published channel compressor into one c ∈ R^{d×d_v}.

    kernel (d, K) slides over the d_v channels with zero padding ("same", or all on the left if
    `causal`), read (d_v,) then pools its d_v outputs: c_ij = Σ_m read_m kernel_i,j−m+left.
    """
    width, taps = kernel.shape
    channels = read.numel()
    left = taps - 1 if causal else (taps - 1) // 2
    folded = kernel.new_zeros(width, channels)
    for output in range(channels):
        for tap in range(taps):
            source = output + tap - left
            if 0 <= source < channels:
                folded[:, source] += read[output] * kernel[:, tap]
    return folded
