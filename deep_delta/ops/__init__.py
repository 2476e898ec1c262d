"""The delta rule as functions of tensors. Imports torch and nothing else of this library.

`reference` is the specification in plain PyTorch; `delta_rewrite` adds checks and the choice of
a backend.
"""

from deep_delta.ops.dispatch import BACKENDS, delta_rewrite, resolve_backend
from deep_delta.ops.reference import (
    apply_write,
    compress_channels,
    compress_tokens,
    expand_embeddings,
    readout,
    shift_tokens,
    unit_scale,
)

__all__ = [
    "BACKENDS",
    "apply_write",
    "compress_channels",
    "compress_tokens",
    "delta_rewrite",
    "expand_embeddings",
    "readout",
    "resolve_backend",
    "shift_tokens",
    "unit_scale",
]
