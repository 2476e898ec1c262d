"""Compressors: from the expanded state X (B, T, d, d_v) to the width-d input of a sublayer (§A.3).

A compressor is its taps, (K, d_v, d), the last one for the current token: it lends them to a fused
read, which takes them together with the pending write.
"""

import torch
from torch import Tensor, nn

from deep_delta.ops import compress, fold_taps
from deep_delta.residual.contract import (
    CacheSlot,
    ResidualModule,
    TokenWindow,
    documents,
    normal,
    start_,
)


class Compressor(ResidualModule):
    """What compressors share: X (B, T, d, d_v) -> (B, T, d), at least fp32.

    Called with None it lends its taps (K, d_v, d), at least fp32, or None where it passes X on.
    Every subclass says what a read by it costs a token: see `flops_of`.
    """

    def taps(self) -> Tensor | None:
        """What it lends; read inside its forward."""
        raise NotImplementedError  # every subclass has its own

    def looks_back(self, window: TokenWindow | None) -> bool:
        """Whether it must see more than the state: padding as zeros, or tokens from a cache."""
        return False

    def see(self, x: Tensor, window: TokenWindow | None, slot: CacheSlot) -> Tensor:
        """X as the compressor sees it, preceded by H cached tokens: (B, H + T, d, d_v)."""
        return x

    def forward(
        self, x: Tensor | None, window: TokenWindow | None = None, slot: CacheSlot = (0, 0)
    ) -> Tensor | None:
        if x is None:
            return self.taps()
        seen = self.see(x, window, slot)
        return compress(seen, self.taps(), documents(window, seen))[:, -x.shape[1] :]


class ScalarRead(Compressor):
    """d_v = 1: the state is the input."""

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """It has none."""

    def flops(self) -> int:
        return 0

    def taps(self) -> None:
        return None


class ChannelCompressor(Compressor):
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

    def flops(self) -> int:
        return 2 * self.weight.numel()

    def taps(self) -> Tensor:
        return self.weight.mT.unsqueeze(0).contiguous()


class TokenCompressor(Compressor):
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

    def flops(self) -> int:
        return 2 * self.weight.numel()  # the read vector is folded into it, once for all tokens

    def taps(self) -> Tensor:
        return fold_taps(self.weight, self.read)

    def looks_back(self, window: TokenWindow | None) -> bool:
        return window is not None and (window.mask is not None or window.cache is not None)

    def see(self, x: Tensor, window: TokenWindow | None, slot: CacheSlot) -> Tensor:
        if window is None or not self.looks_back(window):
            return x
        return window.visible(x, self.weight.shape[-1], slot)


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
