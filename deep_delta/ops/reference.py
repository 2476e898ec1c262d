"""The delta rule in plain PyTorch: the specification every fast path is tested against.

Shapes are written (B, T, d, d_v); any leading dimensions work. Sums, norms and targets are
computed in at least fp32 (fp64 inputs stay fp64); a new state has the dtype of the old one.
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
    return torch.matmul(direction.to(dtype).unsqueeze(-2), state.to(dtype)).squeeze(-2)


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
    key = direction.to(dtype)
    if scale is not None:
        key = key * scale.unsqueeze(-1)
    row = target.to(dtype)
    if erase is not None:
        row = row - erase.unsqueeze(-1) * readout(state, key)
    new = torch.baddbmm(  # one pass over X; a product and a sum would be two
        state.to(dtype).reshape(-1, *state.shape[-2:]),
        key.reshape(-1, key.shape[-1], 1),
        row.reshape(-1, 1, row.shape[-1]),
    )
    return new.view(state.shape).to(state.dtype)


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
    return torch.linalg.vecdot(state.to(dtype), kernel.to(dtype))


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
    taps = kernel.to(dtype) * read.to(dtype).unsqueeze(-1)
    # Pooling over d_v first leaves only (B, T, d) tensors to shift, d_v times less traffic.
    pooled = torch.einsum("btij,ijk->kbti", state.to(dtype), taps)
    last = taps.shape[-1] - 1
    out = pooled[last]
    for step in range(1, min(taps.shape[-1], state.shape[1])):
        out = out + shift_tokens(pooled[last - step], step, segments)
    return out


@_exact
def expand_embeddings(embeddings: Tensor, kernel: Tensor, segments: Tensor | None = None) -> Tensor:
    """The embedding convolution (EC, §A.3): X_tij = Σ_s c_ij,s x_t−s,i, causal in t.

    embeddings (B, T, d), kernel c (d, d_v, K) whose last tap is the current token
    -> (B, T, d, d_v), at least fp32.
    """
    dtype = _wide(embeddings, kernel)
    x, taps = embeddings.to(dtype), kernel.to(dtype)
    last = taps.shape[-1] - 1
    out = x.unsqueeze(-1) * taps[..., last]
    for step in range(1, min(taps.shape[-1], x.shape[1])):
        shifted = shift_tokens(x, step, segments)
        out = torch.addcmul(out, shifted.unsqueeze(-1), taps[..., last - step])
    return out
