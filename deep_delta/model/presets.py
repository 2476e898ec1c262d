"""Named variants and sizes: the paper's rows, their controls, and the demo's size."""

import difflib
from collections.abc import Mapping
from typing import Any

_SCALAR = {"value_channels": 1, "compressor": None, "embedding_conv": False}
_CC = {"value_channels": 4, "compressor": "channel", "embedding_conv": True}
_TC = {"value_channels": 4, "compressor": "token", "embedding_conv": True}

VARIANTS: dict[str, dict[str, Any]] = {
    "additive": {"residual": "additive", **_SCALAR},
    "ddl-scalar": _SCALAR,
    "ddl-tc-no-ec": {**_TC, "embedding_conv": False},
    "ddl-cc-no-ec": {**_CC, "embedding_conv": False},
    "ddl-tc": _TC,
    "ddl-cc": _CC,
    "write-only-tc": {**_TC, "erase": False},
    "write-only-cc": {**_CC, "erase": False},
    "write-only-scalar": {**_SCALAR, "erase": False},
    "additive-expanded": {"residual": "additive", **_CC},
    "additive-ec": {"residual": "additive", **_SCALAR, "embedding_conv": True},
}

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 4096, "hidden_size": 96, "num_hidden_layers": 4,
        "num_attention_heads": 2, "head_dim": 48, "max_position_embeddings": 256,
        # So that an embedding is about as long as at 768, where 0.02 gives 0.55; with 0.02 the
        # additive baseline learned more slowly (0.26 nats higher after 80 steps).
        "initializer_range": 0.05,
    },
    "small": {
        "vocab_size": 50304, "hidden_size": 768, "num_hidden_layers": 12,
        "num_attention_heads": 6, "head_dim": 128, "max_position_embeddings": 1024,
    },
    "medium": {
        "vocab_size": 50304, "hidden_size": 1024, "num_hidden_layers": 24,
        "num_attention_heads": 8, "head_dim": 128, "max_position_embeddings": 1024,
    },
}  # fmt: skip

_PUBLISHED_DELTA = {"value_activation": "sigmoid", "value_source": "state", "value_bias": True}

PARAMETERIZATIONS: dict[str, dict[str, Any]] = {
    "paper": {},
    "published": {"residual_init": "published", "qk_norm": "after_rope"},
}


def lookup(kind: str, name: str, table: Mapping[str, Any]) -> Any:
    """table[name], or a ValueError of one line that gives the nearest name."""
    if name in table:
        return table[name]
    near = difflib.get_close_matches(name, table, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"unknown {kind} {name!r}; {hint}known: {', '.join(table)}")


def variant_of(config: Any) -> str | None:
    """The variant whose state, compressor, embedding convolution and erase a configuration has.

    Gates, targets and initialisation may differ from the variant's. None for another combination.
    """
    unsaid = {"residual": "delta", "erase": True}  # where variants have the default
    return _matching(config, {name: {**unsaid, **fields} for name, fields in VARIANTS.items()})


def size_of(config: Any) -> str | None:
    """The size whose depth, width and heads a configuration has; None for another combination."""
    shape = ("hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim")
    return _matching(
        config, {name: {key: fields[key] for key in shape} for name, fields in SIZES.items()}
    )


def _matching(config: Any, presets: Mapping[str, Mapping[str, Any]]) -> str | None:
    for name, fields in presets.items():
        if all(getattr(config, field) == value for field, value in fields.items()):
            return name
    return None


def preset_fields(variant: str, size: str, parameterization: str = "paper") -> dict[str, Any]:
    """The config fields of a variant at a size; ValueError for a name that does not exist."""
    fields = {**lookup("size", size, SIZES), **lookup("variant", variant, VARIANTS)}
    fields |= lookup("parameterization", parameterization, PARAMETERIZATIONS)
    if parameterization == "published" and fields.get("residual") != "additive":
        fields |= _PUBLISHED_DELTA
    return fields
