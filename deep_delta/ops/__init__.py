"""The delta rule as functions of tensors. Imports torch, and triton where its kernels run.

`reference` is the specification in plain PyTorch, `kernels` and `fused` are the fast path; the
functions here add checks and the choice between them.
"""

from deep_delta.ops.dispatch import (
    BACKENDS,
    Reading,
    Trail,
    apply_write,
    delta_rewrite,
    expand_embeddings,
    read_state,
    reduce_state,
    resolve_backend,
)
from deep_delta.ops.reference import (
    compress,
    compress_channels,
    compress_tokens,
    fold_taps,
    linear,
    readout,
    rms_norm,
    shift_tokens,
    unit_scale,
)

__all__ = [
    "BACKENDS",
    "Reading",
    "Trail",
    "apply_write",
    "compress",
    "compress_channels",
    "compress_tokens",
    "delta_rewrite",
    "expand_embeddings",
    "fold_taps",
    "linear",
    "read_state",
    "readout",
    "reduce_state",
    "resolve_backend",
    "rms_norm",
    "shift_tokens",
    "unit_scale",
]
