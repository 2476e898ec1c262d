"""transformers' versions: up to which one this was tested, and what it calls the cache."""

import warnings
from typing import Any

import transformers
from packaging.version import Version
from transformers.modeling_outputs import BaseModelOutputWithPast

NEWEST_TESTED = "5.24"

# `past_key_values` is called `cache` since 5.24: in calls, in outputs and for attention.
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


def output_keyword(cache: Any) -> dict[str, Any]:
    """The cache under its name in an output."""
    return {CACHE: cache}


def warn_if_untested(installed: str = transformers.__version__) -> None:
    """One line for a transformers that is newer than what was tested: it may rename things."""
    if Version(installed).release[:2] > Version(NEWEST_TESTED).release:
        warnings.warn(
            f"transformers {installed} is newer than {NEWEST_TESTED}, the newest that this "
            "deep_delta was tested with: compare a cached `generate` with use_cache=False, or "
            f"pip install 'transformers<={NEWEST_TESTED}.99'",
            stacklevel=2,
        )
