"""How the kernels are launched: sizes of pieces and programs, and the compiler's options."""

import functools
import os
from typing import Any

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def channel_major(x: Tensor) -> Tensor:
    """An empty (N, d, d_v) tensor that lies as (N, d_v, d) in memory."""
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1]).mT


def block_size(width: int, whole: bool = False) -> int:
    """The pieces that d is cut into, at most 1024 features each.

    768 is three pieces of 256, of which nothing is idle; `whole`, or an odd 769, is one of 1024.
    """
    for block in (1024, 512, 256):
        if width % block == 0 and not whole:
            return block
    return max(min(1 << (width - 1).bit_length(), 1024), 2)  # numbers are rounded in pairs


@functools.cache
def processors(device: torch.device) -> int:
    """How many programs run side by side; 2 stands for the interpreter."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def warps_for(size: int, each: int) -> int:
    """The least power of two that leaves each warp at most `each` numbers, but at most 32."""
    return min(1 << max(-(-size // each) - 1, 0).bit_length(), 32)


def plan(
    kernel: str,
    width: int,
    channels: int,
    taps: int,
    *,
    stores: bool = True,
    writes: bool = True,
) -> tuple[int, dict]:
    """Programs for each processor, 0 for one a token, and the kernel's and compiler's options.

    kernel: "forward", "backward", "norm" for the first of two backward passes, or "wide" and
        "weights" for the two of a wide state.
    stores: whether the forward pass stores X'.
    writes: whether a write is pending.

    Measured on an H100. The backward pass fills the registers, 255 of each thread: its sums for
    d_v = 4 want 6 to 8 features of a thread, and eight warps are all that a processor then holds.
    AHEAD is how many tokens ahead memory is asked for: with one, most of its latency is gone; with
    more, what was asked for is thrown out of the second-level cache again before it is read.
    """
    if kernel == "norm":
        return 8, {"num_warps": 2}
    if kernel == "weights":  # a program for each 256 features: enough of them without many shares
        return max(8 // -(-width // 256), 1), {"num_warps": 2}
    if kernel == "wide":
        return 1, {"num_warps": 8}
    size = width * channels
    if kernel == "backward":
        # Sizes from 8,192 on spill either way, with 16 warps much more.
        warps = max(warps_for(size, 768 if size < 8192 else 1024), 2 if writes else 1)
        registers = {"maxnreg": 2048 // warps} if warps > 8 else {}
        return max(8 // warps, 1), {"num_warps": warps, "AHEAD": 1, **registers}
    # With more taps a program must walk; with more to hold it gains by it.
    if taps <= 1 and (channels == 1 or size <= 2048):
        return 0, {"num_warps": max(warps_for(width, 1024), 2), "AHEAD": 0}
    # A thread takes two features of a piece or more: single ones of 16 bits are slow to load.
    warps = min(warps_for(size, 1024 if stores else 2048), max(block_size(width) // 64, 1))
    limit = min(128 if taps <= 1 else 168, 2048 // warps)
    options = {"num_warps": warps, "AHEAD": 1, "maxnreg": limit}
    return max(2**16 // (32 * warps * limit), 1), options


def share_of(tokens: int, device: torch.device, per_processor: int, least: int = 1) -> int:
    """Tokens of one program when each processor gets `per_processor` programs."""
    programs = processors(device) * per_processor
    return max(-(-tokens // programs), least)


def shape_of(x, taps, gate, value, whole: bool = False) -> dict:
    """The sizes that a kernel is compiled for; `whole` as in `block_size`."""
    block = block_size(x.shape[1], whole)
    return {
        "D": x.shape[1],
        "DV": x.shape[2],
        "K": 0 if taps is None else taps.shape[0],
        "GATES": 0 if gate is None else gate.shape[0],
        "VALUES": 0 if value is None else value.shape[0],
        "BLOCK": block,
        "PIECES": -(-x.shape[1] // block),
    }


def strides_of(x: Tensor) -> tuple[int, int, int]:
    """Of a state (N, d, d_v), as the kernels take them: token, channel, feature.

    Those of a single token and a single channel mean nothing and may be anything; they are made
    what they usually are, since Triton compiles another kernel for a stride of 1.
    """
    tokens, width, channels = x.shape
    return (
        x.stride(0) if tokens > 1 else width * channels,
        x.stride(2) if channels > 1 else width,
        x.stride(1),
    )


def compact(x: Tensor) -> Tensor:
    """A state (N, d, d_v) of which a token's numbers lie within 2³¹ of each other.

    Within a token the kernels count in 32 bits. A state that lies otherwise, as one with the
    channels outermost may, is copied.
    """
    _, width, channels = x.shape
    reach = (width - 1) * x.stride(1) + (channels - 1) * x.stride(2)
    return x if reach < 2**31 else channel_major(x).copy_(x)


def partial_sums(programs: int, rows: int, x: Tensor, biases: int = 0) -> Tensor:
    """Room for each program's sums of the gradients of weights (rows of d) and then of biases."""
    numbers = rows * x.shape[1] + biases
    return torch.empty(programs, numbers, dtype=torch.float32, device=x.device)


def document_starts(segments: Tensor | None) -> Tensor | None:
    """(B·T,) bool: the tokens before which another document ends, from segments (B, T)."""
    if segments is None:
        return None
    starts = torch.ones_like(segments, dtype=torch.bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return starts.reshape(-1)


def start(kernel: Any, programs: tuple[int, ...], arguments: tuple, options: dict) -> None:
    """Launch a kernel where its tensors lie; the first launch of its kind compiles it.

    Here and nowhere earlier: threads that compiled while torch.compile traced, and that a launch
    waited for, saved seconds of a cold start, and one training in 41 never began.
    """
    first = next(value for value in arguments if isinstance(value, Tensor))
    with torch.cuda.device_of(first):  # Triton takes the current device and its stream otherwise
        kernel[programs](*arguments, **options)
