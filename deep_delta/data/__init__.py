"""Data: text to token shards (`prepare`), shards to sequences, and a bundled sample.

What needs torch loads when first used, so that importing this package does not import torch.
"""

from typing import TYPE_CHECKING, Any

from deep_delta.data.manifest import Manifest, ShardInfo, SplitInfo

# Not lazily: the submodule of the same name, once imported, would take the function's place.
from deep_delta.data.prepare import prepare
from deep_delta.data.sample import bundled_text, bundled_tokenizer, prepare_bundled

if TYPE_CHECKING:
    from deep_delta.data.shards import (
        PackedSequences,
        TokenShards,
        check_same_tokenizer,
        check_tokenizer,
    )

__all__ = [
    "Manifest",
    "PackedSequences",
    "ShardInfo",
    "SplitInfo",
    "TokenShards",
    "bundled_text",
    "bundled_tokenizer",
    "check_same_tokenizer",
    "check_tokenizer",
    "prepare",
    "prepare_bundled",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from deep_delta.data import shards

    return getattr(shards, name)
