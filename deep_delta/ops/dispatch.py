"""The delta rule for users: checks, and the choice of an implementation.

"auto" takes the fused kernels where they run (a CUDA device, triton installed, fp32, bf16 or fp16)
and the reference elsewhere. A backend that is named never falls back. Both compute the same
function; what they round, and where, is in `README.md` beside this file.
"""

import importlib.util
import math
from typing import NamedTuple

import torch
from torch import Tensor

from deep_delta.ops import reference
from deep_delta.ops.launch import INTERPRETED

BACKENDS = ("auto", "reference", "triton")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Asked once, here: torch.compile does not trace the question.
HAS_TRITON = importlib.util.find_spec("triton") is not None
if HAS_TRITON:
    from deep_delta.ops import flops, fused, fused_expand  # noqa: F401


class Trail(NamedTuple):
    """A stored state and the writes X + h rᵀ since: what X is rebuilt from where it is not stored.

    It holds no gradients. They pass through the tensor that stands in for X.
    """

    state: Tensor  # (B, T, d, d_v)
    directions: tuple[Tensor, ...]  # h, each (B, T, d)
    rows: tuple[Tensor, ...]  # r, each (B·T, d_v), fp32


class Reading(NamedTuple):
    """What one read of the state gives."""

    state: Tensor  # X with the write applied, (B, T, d, d_v); with a trail, what stands in for it
    context: Tensor  # c, (B, T, d)
    gate_logits: Tensor | None  # (B, T, G), at least fp32
    value_logits: Tensor | None  # (B, T, V), at least fp32
    trail: Trail | None  # what the next read rebuilds X from; None: `state` is X


def resolve_backend(backend: str, state: Tensor | None = None) -> str:
    """ "reference" or "triton": what `backend` stands for, for this state.

    Raises:
        ValueError: an unknown name, or "triton" where it cannot run; one line that says why.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is not available; use one of {', '.join(BACKENDS)}")
    if backend == "reference" or (backend == "auto" and state is None):
        return "reference"
    reason = _why_not_triton(state)
    if backend == "auto" and state is not None and state.device.type != "cuda":
        return "reference"  # also where the interpreter could run the kernels
    if reason and backend == "triton":
        raise ValueError(f"backend 'triton' {reason}; use backend 'auto' or 'reference'")
    return "reference" if reason else "triton"


def _why_not_triton(state: Tensor | None) -> str | None:
    if not HAS_TRITON:
        return "needs the package triton (pip install 'deep-delta-learning[triton]')"
    if torch.version.hip:
        return "has launch options for NVIDIA GPUs only"
    if state is None:
        return None
    if state.device.type != "cuda" and not INTERPRETED:
        return f"needs tensors on a CUDA device, these are on {state.device.type!r}"
    if state.dtype not in KERNEL_DTYPES:
        return f"takes states in fp32, bf16 and fp16, not {state.dtype}"
    return None


def _check_shape(name: str, tensor: Tensor | None, shape: tuple, state: Tensor) -> None:
    """ValueError for a shape that does not fit: a kernel would read somebody else's memory."""
    if tensor is not None and tuple(tensor.shape) != tuple(shape):
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}; a state of shape {tuple(state.shape)} "
            f"(..., d, d_v) needs {tuple(shape)}"
        )


def _check_write(
    state: Tensor, direction: Tensor | None, target: Tensor | None, erase: Tensor | None,
    names: tuple[str, str, str] = ("direction", "target", "erase"),
) -> None:  # fmt: skip
    if state.ndim < 2:
        raise ValueError(f"the state has shape {tuple(state.shape)}; it must be (..., d, d_v)")
    *lead, width, channels = state.shape
    _check_shape(names[0], direction, (*lead, width), state)
    _check_shape(names[1], target, (*lead, channels), state)
    _check_shape(names[2], erase, tuple(lead), state)


def _check_read(
    state: Tensor, kernel: Tensor | None, rows: dict[str, Tensor | None], segments: Tensor | None
) -> None:
    if state.ndim != 4:
        raise ValueError(f"the state has shape {tuple(state.shape)}; it must be (B, T, d, d_v)")
    *lead, width, channels = state.shape
    if kernel is None and channels != 1:
        raise ValueError(f"a state with {channels} channels needs a kernel (K, d_v, d)")
    if kernel is not None:
        _check_shape("kernel", kernel, (kernel.shape[0], channels, width), state)
    for name, weight in rows.items():
        if weight is not None:
            rows_of = () if name == "norm_weight" else weight.shape[:1]
            _check_shape(name, weight, (*rows_of, width), state)
    _check_shape("segments", segments, tuple(lead), state)


def _check_bias(name: str, bias: Tensor | None, weight: Tensor | None, state: Tensor) -> None:
    if bias is not None and weight is None:
        raise ValueError(f"{name} is given without rows to add it to")
    if weight is not None:
        _check_shape(name, bias, tuple(weight.shape[:1]), state)


def _check_trail(state: Tensor, trail: Trail | None) -> None:
    """A trail belongs to the whole state that was read with it, not to a part of it."""
    if trail is None:
        return
    *lead, width, channels = state.shape
    _check_shape("trail.state", trail.state, tuple(state.shape), state)
    for h, row in zip(trail.directions, trail.rows, strict=True):
        _check_shape("trail.directions", h, (*lead, width), state)
        _check_shape("trail.rows", row, (math.prod(lead), channels), state)


def apply_write(
    state: Tensor,
    direction: Tensor | None = None,
    target: Tensor | None = None,
    erase: Tensor | None = None,
    *,
    eps: float | None = None,
    trail: Trail | None = None,
    backend: str = "auto",
) -> Tensor:
    """Apply a pending write in its canonical form, X ← X + s·h (aᵀ − b·s·hᵀX).

    Args:
        state: X, (..., d, d_v).
        direction: h, (..., d); None leaves the state as it is.
        target: a, (..., d_v); None for a = 1.
        erase: b, (...); None for b = 0.
        eps: ε of s = 1/√(‖h‖² + ε²), §3.1; None for s = 1.
        trail: from the `Reading` that made `state`, if it has one.
        backend: "auto", "reference" or "triton".

    Returns:
        The new state, (..., d, d_v), in the state's dtype; computed in at least fp32.
    """
    _check_write(state, direction, target, erase)
    _check_trail(state, trail)
    if direction is None:
        if trail is None:
            return state
        target = erase = None
    if resolve_backend(backend, state) == "triton":
        return fused.apply_write(state, direction, target, erase, eps, trail)
    state = _stored(state, trail)
    if direction is None:
        return state
    return reference.apply_write(state, direction, target, erase, eps)


def _stored(state: Tensor, trail: Trail | None) -> Tensor:
    """X itself, for a reference that takes over from fused reads."""
    return state if trail is None else fused.apply_write(state, None, None, None, None, trail)


def delta_rewrite(
    state: Tensor,
    direction: Tensor,
    value: Tensor,
    gate: Tensor,
    *,
    erase: bool = True,
    eps: float = 1e-5,
    backend: str = "auto",
) -> Tensor:
    """Rewrite a state along a direction: X + β k (vᵀ − kᵀX), Deep Delta Learning's eq. 2.2.

    Args:
        state: X, (..., d, d_v), floating point.
        direction: k before normalisation, (..., d); k = direction/√(‖direction‖² + ε²).
        value: the target v, (..., d_v).
        gate: β, (...), meant to lie in (0, 2): 0 keeps the state, 1 overwrites, 2 reflects.
        erase: False gives the write-only control X + β k vᵀ.
        eps: ε, in units of ‖direction‖. A zero direction leaves the state as it is.
        backend: "auto", "reference" or "triton" (one fused kernel).

    Returns:
        The new state, (..., d, d_v), in the state's dtype; computed in at least fp32.

    Raises:
        ValueError: shapes that do not fit, or a backend that cannot run here.
    """
    if not state.is_floating_point():
        raise ValueError(f"the state is {state.dtype}; it must be floating point")
    if eps < 0:
        raise ValueError(f"eps is {eps}; it must not be negative")
    _check_write(state, direction, value, gate, names=("direction", "value", "gate"))
    target = gate.unsqueeze(-1) * value
    return apply_write(state, direction, target, gate if erase else None, eps=eps, backend=backend)


def read_state(
    state: Tensor,
    direction: Tensor | None = None,
    target: Tensor | None = None,
    erase: Tensor | None = None,
    *,
    eps: float | None = None,
    kernel: Tensor | None = None,
    norm_weight: Tensor,
    norm_eps: float,
    gate_weight: Tensor | None = None,
    gate_bias: Tensor | None = None,
    value_weight: Tensor | None = None,
    value_bias: Tensor | None = None,
    value_on_state: bool = False,
    segments: Tensor | None = None,
    context_dtype: torch.dtype | None = None,
    trail: Trail | None = None,
    rebuild: int = 0,
    backend: str = "auto",
) -> Reading:
    """One read: apply the pending write, compress (§A.3), normalise, gate and value logits.

    The fused form of `apply_write`, `compress`, RMSNorm and two products with the context: X is
    read once, and written once or not at all.

    Args:
        state, direction, target, erase, eps: X (B, T, d, d_v) and its pending write, as in
            `apply_write`.
        kernel: the compressor's taps (K, d_v, d), the last one for the current token; K = 1 is
            the channel compressor. None for d_v = 1, where the state is the input.
        norm_weight, norm_eps: g (d) and ε of the RMSNorm that makes the context.
        gate_weight, gate_bias: (G, d) rows whose products with the context, plus the bias (G), are
            the gates' logits.
        value_weight, value_bias: (V, d) and (V), the same for the value; with `value_on_state` the
            products are with the compressed state before the norm.
        segments: (B, T), the document number of each token, which never falls along T: the
            compressor looks at no other document.
        context_dtype: dtype of the context; by default the norm weight's.
        trail: from the Reading that made `state`, if it has one.
        rebuild: how many states between two stored ones are rebuilt instead: by the next read,
            which finds the last stored one and the writes since, and by the backward pass
            ("triton" only; the reference stores all). 0 stores this one. A plain x + h is always
            stored, because its rebuilding would save nothing.
        backend: "auto", "reference" or "triton".

    Raises:
        ValueError: shapes that do not fit, or a backend that cannot run here.
    """
    _check_write(state, direction, target, erase)
    rows = {"norm_weight": norm_weight, "gate_weight": gate_weight, "value_weight": value_weight}
    _check_read(state, kernel, rows, segments)
    _check_bias("gate_bias", gate_bias, gate_weight, state)
    _check_bias("value_bias", value_bias, value_weight, state)
    _check_trail(state, trail)
    if direction is None:
        target = erase = None
    context_dtype = context_dtype or norm_weight.dtype
    if resolve_backend(backend, state) == "reference":
        read = reference.read_state(
            _stored(state, trail), direction, target, erase, eps, kernel, norm_weight, norm_eps,
            gate_weight, gate_bias, value_weight, value_bias, value_on_state, segments,
        )  # fmt: skip
        return Reading(read[0], read[1].to(context_dtype), *read[2:], None)
    # Once, here: a copy made by each read that finds it in its trail would be kept by each.
    direction = None if direction is None else direction.contiguous()
    past = trail or Trail(state.detach(), (), ())
    store = (
        direction is None
        or len(past.directions) >= rebuild
        or fused.is_plain(state, direction, target, erase, eps)
    )
    new, context, gates, values, row = fused.read(
        state, direction, target, erase, eps, kernel, norm_weight, norm_eps, gate_weight,
        gate_bias, value_weight, value_bias, value_on_state, segments, context_dtype, trail, store,
    )  # fmt: skip
    if direction is None or store:
        return Reading(new, context, gates, values, None)
    past = Trail(past.state, (*past.directions, direction.detach()), (*past.rows, row.detach()))
    return Reading(new, context, gates, values, past)


def reduce_state(
    state: Tensor,
    direction: Tensor | None = None,
    target: Tensor | None = None,
    erase: Tensor | None = None,
    *,
    eps: float | None = None,
    kernel: Tensor | None = None,
    segments: Tensor | None = None,
    trail: Trail | None = None,
    backend: str = "auto",
) -> Tensor:
    """The last read: apply the pending write and compress, (B, T, d, d_v) -> (B, T, d), >= fp32.

    Arguments as in `read_state`.
    """
    _check_write(state, direction, target, erase)
    _check_read(state, kernel, {}, segments)
    _check_trail(state, trail)
    if direction is None:
        target = erase = None
    if resolve_backend(backend, state) == "reference":
        settled = reference.apply_write(_stored(state, trail), direction, target, erase, eps)
        return reference.compress(settled, kernel, segments)
    return fused.reduce(state, direction, target, erase, eps, kernel, segments, trail)


def expand_embeddings(
    embeddings: Tensor,
    kernel: Tensor,
    segments: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """The embedding convolution (EC, §A.3): X_tij = Σ_s c_ij,s x_t−s,i, causal in t.

    embeddings (B, T, d), kernel c (d, d_v, K) whose last tap is the current token
    -> (B, T, d, d_v) in `dtype`, by default at least fp32, in which it is computed.
    """
    if embeddings.ndim != 3 or kernel.ndim != 3 or kernel.shape[0] != embeddings.shape[-1]:
        raise ValueError(
            f"embeddings {tuple(embeddings.shape)} (B, T, d) and kernel {tuple(kernel.shape)} "
            "(d, d_v, K) do not fit"
        )
    if segments is not None and segments.shape != embeddings.shape[:2]:
        raise ValueError(
            f"segments {tuple(segments.shape)} do not fit embeddings {tuple(embeddings.shape)}: "
            f"they must be {tuple(embeddings.shape[:2])}"
        )
    if resolve_backend(backend, embeddings) == "reference":
        expanded = reference.expand_embeddings(embeddings, kernel, segments)
        return expanded if dtype is None else expanded.to(dtype)
    return fused_expand.expand(embeddings, kernel, segments, dtype or torch.float32)
