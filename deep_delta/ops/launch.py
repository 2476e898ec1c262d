"""How the kernels are launched: sizes of pieces and programs, and the compiler's options."""

import functools

import torch
from torch import Tensor


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
    return min(1 << (width - 1).bit_length(), 1024)


@functools.cache
def processors(device: torch.device) -> int:
    """How many programs run side by side; 2 stands for the interpreter."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def plan(kernel: str, width: int, channels: int, taps: int) -> tuple[int, dict]:
    """Programs for each processor, 0 for one a token, and the kernel's and compiler's options.

    kernel: "forward", "backward", or "norm" for the first of two backward passes.

    Measured on an H100: the backward pass fills the registers, 255 of each thread: its sums for
    d_v = 4 want 6 to 8 features of a thread, and eight warps are all that a processor then holds.
    Not measured yet, but chosen by what the compiler spills: from d·d_v = 6144 on (forward: above
    8192) one token keeps the memory busy, and the registers for the next are needed: no AHEAD.
    """
    if kernel == "norm":
        return 8, {"num_warps": 2}
    size, warps = width * channels, 1
    while warps < min(size / 768, 32):
        warps *= 2
    if kernel == "backward":
        registers = {"maxnreg": 2048 // warps} if warps > 8 else {}
        return max(8 // warps, 1), {"num_warps": warps, "AHEAD": size < 6144, **registers}
    if channels == 1 and taps <= 1:  # with more taps a program must walk
        return 0, {"num_warps": 2 * warps, "AHEAD": False}
    registers = {"maxnreg": min(128, 2048 // warps)}
    return max(16 // warps, 1), {"num_warps": warps, "AHEAD": size <= 8192, **registers}


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
    """Of a state (N, d, d_v), as the kernels take them: token, channel, feature."""
    return x.stride(0), x.stride(2), x.stride(1)


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
