"""The delta rule in plain PyTorch: the specification every fast path is tested against.

Shapes are written (B, T, d, d_v); any leading dimensions work. Sums, norms and targets are
computed in at least fp32 (fp64 inputs stay fp64); a new state has the dtype of the old one.

Inside, the state is seen as (..., d_v, d), and so are the results in memory: element-wise work
along a contiguous d is up to eight times faster on a CPU than along d_v = 4.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor


def _wide(*tensors: Tensor) -> torch.dtype:
    """The dtype to compute in: the widest of the inputs, and never narrower than fp32."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _exact(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Switch autocast off inside: its matrix products would round the state to bf16."""

    @functools.wraps(function)
    def exact(first: Tensor, *args, **kwargs) -> Tensor:
        with torch.autocast(first.device.type, enabled=False):
            return function(first, *args, **kwargs)

    return exact


def unit_scale(direction: Tensor, eps: float) -> Tensor:
    """The factor s that makes k = s·direction a unit vector, s = 1/√(‖direction‖² + ε²) (§3.1).

    direction (..., d) -> s (...), at least fp32. A zero direction gets s = 1/ε and stays zero.
    """
    wide = direction.to(_wide(direction))
    return torch.rsqrt(wide.square().sum(-1) + eps**2)


@_exact
def readout(state: Tensor, direction: Tensor) -> Tensor:
    """What the state (..., d, d_v) holds along the direction (..., d): kᵀX, shape (..., d_v)."""
    dtype = _wide(state, direction)
    return _readout(state.to(dtype).mT, direction.to(dtype))


def _readout(channels: Tensor, direction: Tensor) -> Tensor:
    """channels Xᵀ (..., d_v, d), direction (..., d) -> (..., d_v)."""
    return (channels * direction.unsqueeze(-2)).sum(-1)


@_exact
def apply_write(
    state: Tensor,
    direction: Tensor | None = None,
    scale: Tensor | None = None,
    target: Tensor | None = None,
    erase: Tensor | None = None,
) -> Tensor:
    """Apply a deferred write in its canonical form, X ← X + s·h (aᵀ − b·s·hᵀX).

    state X (..., d, d_v); direction h (..., d); scale s (...), None for 1; target a (..., d_v);
    erase b (...), None for 0. Without a direction nothing is pending and X is returned.
    The delta rule (eq. 2.2) is s = 1/√(‖h‖² + ε²), a = βv, b = β; the write-only control leaves
    out b; an additive stream is s = 1, a = 1 and no b.
    """
    if direction is None or target is None:
        return state
    dtype = _wide(state, direction, target)
    channels, key, row = state.to(dtype).mT, direction.to(dtype), target.to(dtype)
    # s scales the few numbers of a row instead of the d of the direction.
    if erase is not None:
        share = erase if scale is None else erase * scale
        row = row - share.unsqueeze(-1) * _readout(channels, key)
    if scale is not None:
        row = row * scale.unsqueeze(-1)
    return torch.addcmul(channels, row.unsqueeze(-1), key.unsqueeze(-2)).mT.to(state.dtype)


def delta_rewrite(
    state: Tensor,
    direction: Tensor,
    value: Tensor,
    gate: Tensor,
    *,
    erase: bool = True,
    eps: float = 1e-5,
) -> Tensor:
    """X + β k (vᵀ − kᵀX), k = direction/√(‖direction‖² + ε²) (eq. 2.2); see `ops.delta_rewrite`."""
    return apply_write(
        state,
        direction,
        unit_scale(direction, eps),
        gate.unsqueeze(-1) * value,
        gate if erase else None,
    )


@_exact
def compress_channels(state: Tensor, kernel: Tensor) -> Tensor:
    """The channel compressor (CC, §A.3): x_i = Σ_j c_ij X_ij.

    state (..., d, d_v), kernel c (d, d_v) -> (..., d), at least fp32.
    """
    dtype = _wide(state, kernel)
    return (state.to(dtype).mT * kernel.to(dtype).mT.contiguous()).sum(-2)


def shift_tokens(x: Tensor, steps: int, segments: Tensor | None = None) -> Tensor:
    """Move x (B, T, ...) `steps` tokens later; zeros come in from the left.

    With segments (B, T), the document number of every token, nothing crosses a document's start.
    """
    if steps == 0:
        return x
    shifted = torch.zeros_like(x)
    shifted[:, steps:] = x[:, :-steps]
    if segments is not None:
        same = torch.zeros_like(segments, dtype=torch.bool)
        same[:, steps:] = segments[:, steps:] == segments[:, :-steps]
        shifted = shifted * same.view(same.shape + (1,) * (x.ndim - 2))
    return shifted


@_exact
def compress_tokens(
    state: Tensor, kernel: Tensor, read: Tensor, segments: Tensor | None = None
) -> Tensor:
    """The token compressor (TC, §A.3): x_ti = Σ_j w_j Σ_s c_ij,s X_t−s,ij, causal in t.

    state (B, T, d, d_v), kernel c (d, d_v, K) whose last tap is the current token, read w (d_v)
    -> (B, T, d), at least fp32.
    """
    dtype = _wide(state, kernel)
    taps = (kernel.to(dtype) * read.to(dtype).unsqueeze(-1)).permute(2, 1, 0).contiguous()
    channels, last = state.to(dtype).mT, taps.shape[0] - 1
    # Pooling over d_v first leaves only (B, T, d) tensors to shift, d_v times less traffic.
    out = (channels * taps[last]).sum(-2)
    for step in range(1, min(taps.shape[0], state.shape[1])):
        out = out + shift_tokens((channels * taps[last - step]).sum(-2), step, segments)
    return out


@_exact
def expand_embeddings(embeddings: Tensor, kernel: Tensor, segments: Tensor | None = None) -> Tensor:
    """The embedding convolution (EC, §A.3): X_tij = Σ_s c_ij,s x_t−s,i, causal in t.

    embeddings (B, T, d), kernel c (d, d_v, K) whose last tap is the current token
    -> (B, T, d, d_v), at least fp32.
    """
    dtype = _wide(embeddings, kernel)
    x, taps = embeddings.to(dtype), kernel.to(dtype).permute(2, 1, 0).contiguous()
    last = taps.shape[0] - 1
    out = x.unsqueeze(-2) * taps[last]
    for step in range(1, min(taps.shape[0], x.shape[1])):
        shifted = shift_tokens(x, step, segments)
        out = torch.addcmul(out, shifted.unsqueeze(-2), taps[last - step])
    return out.mT
