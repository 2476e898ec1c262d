"""The embedding convolution's kernels as PyTorch operators, over flat tokens."""

import torch
from torch import Tensor

from deep_delta.ops.kernels import embedding
from deep_delta.ops.launch import (
    block_size,
    document_starts,
    partial_sums,
    share_of,
    start,
    warps_for,
)


@torch.library.custom_op("deep_delta::expand", mutates_args=())
def expand_embeddings(
    x: Tensor, taps: Tensor, starts: Tensor | None, length: int, dtype: torch.dtype
) -> Tensor:
    """x (N, d), taps (K, d_v, d) -> X (N, d_v, d)."""
    tokens, (_, channels, width) = x.shape[0], taps.shape
    out = x.new_empty(tokens, channels, width, dtype=dtype)
    chunk, shape = _expand_plan(tokens, taps, x.device)
    programs = (-(-tokens // chunk), -(-width // shape["BLOCK"]))
    arguments = (x, starts, taps, out, tokens, length, chunk)
    start(embedding.expand_forward, programs, arguments, shape)
    return out


@expand_embeddings.register_fake
def _(x, taps, starts, length, dtype):
    return x.new_empty(x.shape[0], taps.shape[1], taps.shape[2], dtype=dtype)


def _expand_plan(tokens: int, taps: Tensor, device: torch.device) -> tuple[int, dict]:
    taps_count, channels, width = taps.shape
    block = min(block_size(width), 256)
    # The kernel and the sums for its gradient stay in registers, K·d_v numbers of a feature each.
    warps = min(max(warps_for(taps_count * channels, 8), 2), 8)
    shape = {"D": width, "DV": channels, "K": taps_count, "BLOCK": block, "num_warps": warps}
    return share_of(tokens, device, 4, least=4 * taps_count), shape


@torch.library.custom_op("deep_delta::expand_backward", mutates_args=())
def expand_embeddings_backward(
    x: Tensor, taps: Tensor, starts: Tensor | None, length: int, d_out: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of x and of the taps."""
    dx, tokens = torch.empty_like(x), x.shape[0]
    chunk, shape = _expand_plan(tokens, taps, x.device)
    partial = partial_sums(-(-tokens // chunk), taps.shape[0] * taps.shape[1], x)
    programs = (partial.shape[0], -(-x.shape[1] // shape["BLOCK"]))
    arguments = (x, starts, taps, d_out, dx, partial, tokens, length, chunk)
    start(embedding.expand_backward, programs, arguments, shape)
    return dx, partial.sum(0).view_as(taps)


@expand_embeddings_backward.register_fake
def _(x, taps, starts, length, d_out):
    return torch.empty_like(x), torch.empty_like(taps, dtype=torch.float32)


def _keep_embeddings(ctx, inputs, output) -> None:
    x, taps, starts, ctx.length, _ = inputs
    ctx.save_for_backward(x, taps, starts)


def _differentiate_expansion(ctx, d_out) -> tuple[Tensor | None, ...]:
    x, taps, starts = ctx.saved_tensors
    dx, d_taps = expand_embeddings_backward(x, taps, starts, ctx.length, d_out.contiguous())
    return dx, d_taps.to(taps.dtype), None, None, None


expand_embeddings.register_autograd(_differentiate_expansion, setup_context=_keep_embeddings)


def expand(embeddings, kernel, segments, dtype) -> Tensor:
    """See `dispatch.expand_embeddings`."""
    batch, length, width = embeddings.shape
    taps = kernel.permute(2, 1, 0).contiguous()
    flat = embeddings.reshape(batch * length, width).contiguous()
    out = expand_embeddings(flat, taps, document_starts(segments), length, dtype)
    return out.view(batch, length, -1, width).mT
