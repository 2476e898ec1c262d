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
from torch.nn import functional as F


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
        device = first.device.type
        if not torch.is_autocast_enabled(device):  # an exported program has no word for nothing
            return function(first, *args, **kwargs)
        with torch.autocast(device, enabled=False):
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
    target: Tensor | None = None,
    erase: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """Apply a deferred write in its canonical form, X ← X + s·h (aᵀ − b·s·hᵀX).

    state X (..., d, d_v); direction h (..., d); target a (..., d_v), None for 1; erase b (...),
    None for 0; s = 1/√(‖h‖² + ε²), or 1 without an ε. Without a direction nothing is pending and
    X is returned. The delta rule (eq. 2.2) is a = βv, b = β; the write-only control leaves out b;
    an additive stream has neither a, b nor ε.
    """
    if direction is None:
        return state
    dtype = _wide(state, direction, *(() if target is None else (target,)))
    channels, key = state.to(dtype).mT, direction.to(dtype)
    ones = (*key.shape[:-1], state.shape[-1])
    row = key.new_ones(ones) if target is None else target.to(dtype)
    scale = None if eps is None else unit_scale(key, eps)
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
    return apply_write(state, direction, gate.unsqueeze(-1) * value, gate if erase else None, eps)


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
    tokens = x.shape[1]
    shifted = F.pad(x, (0, 0) * (x.ndim - 2) + (steps, 0))[:, :tokens]
    if segments is not None:
        same = segments == F.pad(segments, (steps, 0), value=-1)[:, :tokens]
        shifted = shifted * same.view(same.shape + (1,) * (x.ndim - 2))
    return shifted


def compress_tokens(
    state: Tensor, kernel: Tensor, read: Tensor, segments: Tensor | None = None
) -> Tensor:
    """The token compressor (TC, §A.3): x_ti = Σ_j w_j Σ_s c_ij,s X_t−s,ij, causal in t.

    state (B, T, d, d_v), kernel c (d, d_v, K) whose last tap is the current token, read w (d_v)
    -> (B, T, d), at least fp32.
    """
    return compress(state, fold_taps(kernel, read), segments)


def fold_taps(kernel: Tensor, read: Tensor) -> Tensor:
    """The token compressor's kernel c (d, d_v, K) and read vector w (d_v) as taps (K, d_v, d)."""
    dtype = _wide(kernel)
    return (kernel.to(dtype) * read.to(dtype).unsqueeze(-1)).permute(2, 1, 0).contiguous()


@_exact
def compress(state: Tensor, taps: Tensor | None, segments: Tensor | None = None) -> Tensor:
    """Any compressor: x_ti = Σ_s Σ_j taps_sji X_t−s,ij, causal in t.

    state (B, T, d, d_v), taps (K, d_v, d) whose last one is the current token, or None for d_v = 1
    -> (B, T, d), at least fp32.
    """
    if taps is None:
        return state.squeeze(-1).to(_wide(state))
    dtype = _wide(state, taps)
    taps, channels, last = taps.to(dtype), state.to(dtype).mT, taps.shape[0] - 1
    # Pooling over d_v first leaves only (B, T, d) tensors to shift, d_v times less traffic.
    out = (channels * taps[last]).sum(-2)
    for step in range(1, taps.shape[0]):
        out = out + shift_tokens((channels * taps[last - step]).sum(-2), step, segments)
    return out


def read_state(
    state: Tensor,
    direction: Tensor | None,
    target: Tensor | None,
    erase: Tensor | None,
    eps: float | None,
    kernel: Tensor | None,
    norm_weight: Tensor,
    norm_eps: float,
    gate_weight: Tensor | None = None,
    gate_bias: Tensor | None = None,
    value_weight: Tensor | None = None,
    value_bias: Tensor | None = None,
    value_on_state: bool = False,
    segments: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """One read of the state, step by step: (X', context, gate logits, value logits).

    Arguments as in `ops.read_state`; the context in at least fp32.
    """
    new = apply_write(state, direction, target, erase, eps)
    x_in = compress(new, kernel, segments)
    dtype = _wide(x_in, norm_weight)
    context = rms_norm(x_in, norm_weight.to(dtype), norm_eps)
    source = x_in if value_on_state else context
    gates = None if gate_weight is None else linear(context, gate_weight, gate_bias)
    values = None if value_weight is None else linear(source, value_weight, value_bias)
    return new, context, gates, values


@_exact
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last axis, (..., d) -> (..., d), at least fp32."""
    dtype = _wide(x, weight)
    return F.rms_norm(x.to(dtype), x.shape[-1:], weight.to(dtype), eps)


@_exact
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b in at least fp32, under autocast too. x (..., n), weight (m, n) -> (..., m)."""
    dtype = _wide(x, weight)
    return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


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
    for step in range(1, taps.shape[0]):
        shifted = shift_tokens(x, step, segments)
        out = torch.addcmul(out, shifted.unsqueeze(-2), taps[last - step])
    return out.mT
