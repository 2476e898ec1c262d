"""Which keys a configuration may have: ours, foreign ones, and near misses of ours.

A file may hold keys of other tools: they are kept and ignored. A misspelt field of ours would be
ignored as well, and a field that is left out would become its default; both make another model,
so both are errors.
"""

import functools
from collections.abc import Collection, Mapping
from typing import Any

from packaging.version import InvalidVersion, Version

from deep_delta.version import __version__

VERSION_KEY = "deep_delta_version"

# The first version whose files have a field; the others were always written. Files without a
# version are older than 0.1.0. A new field needs a line here, and its default must be the model
# that older files meant.
FIRST_WRITTEN = {"rebuild": "0.1.0", "mup_base_width": "0.1.0"}

# Fields that no misspelling can change the model by: names of the same form abound
# ("boi_token_id"), and layer types are worked out from the other fields.
_NOT_MISTAKEN = {"bos_token_id", "eos_token_id", "pad_token_id", "layer_types"}

# What other model families call their own fields, each close to one of ours.
_OTHER_FAMILIES = {"compress", "hidden_activation", "hidden_sizes", "max_pos_emb"}


def check_complete(given: Mapping[str, Any], fields: Collection[str]) -> None:
    """Of a configuration's fields, those that the version which wrote it had must be `given`.

    Raises:
        ValueError: a field that is missing, a version that is newer than this one or none.
    """
    written = given.get(VERSION_KEY)
    try:
        version = Version(written or "0")
    except (InvalidVersion, TypeError):
        raise ValueError(f"{VERSION_KEY} of the configuration is {written!r}, no version") from None
    if version > Version(__version__):
        raise ValueError(
            f"the configuration was written by deep_delta {written}, which may have fields that "
            f"{__version__} does not know: upgrade deep_delta"
        )
    for field in fields:
        if field not in given and version >= Version(FIRST_WRITTEN.get(field, "0")):
            raise ValueError(
                f"the configuration lacks {field!r}, and a default could be another model: put the "
                f"value back that was saved (DeepDeltaConfig(...) makes a new one from defaults)"
            )
    rope = given.get("rope_parameters")
    if written and not (isinstance(rope, Mapping) and "rope_theta" in rope):
        raise ValueError(
            "the configuration's rope_parameters lack 'rope_theta', and a default could be another "
            "model: put the value back that was saved"
        )


def near_miss(key: str, fields: Collection[str]) -> str | None:
    """The field that `key` is a misspelling of; None for a field, and for a foreign key.

    One letter more, less, other or swapped, two in names of more than 12 letters (none in names
    of up to five: "date" is no "gate"); or the same words, one of them cut short or spelt out.
    Capitals and hyphens count as letters, so that "valueChannels" is found as well.
    """
    if key in fields or key in _OTHER_FAMILIES:
        return None
    return next((name for name in sorted(fields) if _mistaken(key, name)), None)


def _mistaken(key: str, field: str) -> bool:
    if field in _NOT_MISTAKEN:
        return False
    slips = 0 if len(field) <= 5 else 1 if len(field) <= 12 else 2
    close = abs(len(key) - len(field)) <= slips and _edits(key.lower(), field) <= slips
    return close or _abbreviated(key.lower(), field)


def _abbreviated(key: str, field: str) -> bool:
    """The same words up to their ends: gate_initial and gate_init, value_chan, rms_norm_epsilon."""
    words, others = key.split("_"), field.split("_")
    return len(words) == len(others) and all(
        a == b or (min(len(a), len(b)) >= 3 and (a.startswith(b) or b.startswith(a)))
        for a, b in zip(words, others, strict=True)
    )


def _edits(one: str, other: str) -> int:
    """Letters inserted, dropped, replaced or swapped with their neighbour between two names."""

    @functools.cache
    def between(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        replaced = between(i - 1, j - 1) + (one[i - 1] != other[j - 1])
        fewest = min(between(i - 1, j) + 1, between(i, j - 1) + 1, replaced)
        if i > 1 and j > 1 and one[i - 2 : i] == other[j - 2 : j][::-1]:
            fewest = min(fewest, between(i - 2, j - 2) + 1)
        return fewest

    return between(len(one), len(other))
