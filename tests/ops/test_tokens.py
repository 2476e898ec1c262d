"""Channel compressor, token compressor and embedding convolution against sums written as loops."""

import pytest
import torch
from helpers import close, normal
from torch import Tensor

from deep_delta.ops import compress_channels, compress_tokens, expand_embeddings, shift_tokens

B, T, D, V = 2, 6, 3, 2
SEGMENTS = torch.tensor([[0, 0, 0, 1, 1, 2], [0, 1, 1, 1, 1, 1]])
KERNELS = [1, 2, 4, 9]  # the last one is longer than the sequence
ROUNDING = 1e-12  # fp64, sums of at most 18 products of numbers near 1


def allowed(b: int, t: int, source: int, segments: Tensor | None) -> bool:
    """May token t see token `source`? Not before the start, nor in another document."""
    if source < 0:
        return False
    return segments is None or bool(segments[b, source] == segments[b, t])


def tokens_by_loops(state: Tensor, kernel: Tensor, read: Tensor, segments: Tensor | None) -> Tensor:
    out = torch.zeros(B, T, D, dtype=state.dtype)
    taps = kernel.shape[-1]
    for b in range(B):
        for t in range(T):
            for lag in range(taps):
                if allowed(b, t, t - lag, segments):
                    mixed = kernel[:, :, taps - 1 - lag] * state[b, t - lag]
                    out[b, t] += mixed @ read
    return out


def expand_by_loops(embeddings: Tensor, kernel: Tensor, segments: Tensor | None) -> Tensor:
    out = torch.zeros(B, T, D, V, dtype=embeddings.dtype)
    taps = kernel.shape[-1]
    for b in range(B):
        for t in range(T):
            for lag in range(taps):
                if allowed(b, t, t - lag, segments):
                    for j in range(V):
                        out[b, t, :, j] += kernel[:, j, taps - 1 - lag] * embeddings[b, t - lag]
    return out


@pytest.mark.parametrize("taps", KERNELS)
@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["one document", "packed"])
def test_token_compressor_is_its_sum(taps, segments):
    state, kernel, read = normal(B, T, D, V), normal(D, V, taps, seed=1), normal(V, seed=2)
    close(
        compress_tokens(state, kernel, read, segments),
        tokens_by_loops(state, kernel, read, segments),
        atol=ROUNDING,
    )


@pytest.mark.parametrize("taps", KERNELS)
@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["one document", "packed"])
def test_embedding_convolution_is_its_sum(taps, segments):
    embeddings, kernel = normal(B, T, D), normal(D, V, taps, seed=1)
    close(
        expand_embeddings(embeddings, kernel, segments),
        expand_by_loops(embeddings, kernel, segments),
        atol=ROUNDING,
    )


def test_channel_compressor_is_its_sum():
    state, kernel = normal(B, T, D, V), normal(D, V, seed=1)
    expected = sum(state[..., j] * kernel[:, j] for j in range(V))
    close(compress_channels(state, kernel), expected, atol=ROUNDING)


@pytest.mark.parametrize("at", range(T))
def test_nothing_looks_ahead(at):
    """A change at token t reaches t … t + K − 1 and nothing else."""
    taps = 3
    kernel, read = normal(D, V, taps, seed=1), normal(V, seed=2)
    reached = [at <= t < at + taps for t in range(T)]
    for call, x in (
        (lambda x: compress_tokens(x, kernel, read), normal(1, T, D, V)),
        (lambda x: expand_embeddings(x, kernel), normal(1, T, D)),
    ):
        changed = x.clone()
        changed[:, at] += 1
        difference = (call(changed) - call(x)).flatten(2).abs().amax(-1)[0]
        assert (difference > 0).tolist() == reached


def test_shift_moves_later_and_fills_with_zeros():
    x = torch.arange(1.0, 5.0).view(1, 4)
    assert torch.equal(shift_tokens(x, 0), x)
    assert shift_tokens(x, 1).tolist() == [[0, 1, 2, 3]]
    assert shift_tokens(x, 3).tolist() == [[0, 0, 0, 1]]
    documents = torch.tensor([[0, 0, 1, 1]])
    assert shift_tokens(x, 1, documents).tolist() == [[0, 1, 0, 3]]


@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
@pytest.mark.parametrize("segments", [None, SEGMENTS[:, :3]], ids=["one document", "packed"])
def test_gradients(check, segments):
    state, embeddings, read = normal(B, 3, D, V), normal(B, 3, D), normal(V)
    channels, taps = normal(D, V), normal(D, V, 3)
    for tensor in (state, embeddings, read, channels, taps):
        tensor.requires_grad_()
    assert check(compress_channels, (state, channels))
    assert check(compress_tokens, (state, taps, read, segments))
    assert check(expand_embeddings, (embeddings, taps, segments))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_of_narrow_states_are_fp32(dtype):
    state, taps, read = normal(B, T, D, V).to(dtype), normal(D, V, 2).float(), normal(V).float()
    for result, exact in (
        (compress_tokens(state, taps, read), compress_tokens(state.double(), taps, read)),
        (compress_channels(state, taps[..., 0]), compress_channels(state.double(), taps[..., 0])),
        (expand_embeddings(state[..., 0], taps), expand_embeddings(state[..., 0].double(), taps)),
    ):
        assert result.dtype == torch.float32
        close(result.double(), exact, atol=2e-6)  # fp32 roundings of sums of at most 4
