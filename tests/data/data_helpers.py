"""What the data tests share: reading shards without the code under test, and catching errors."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deep_delta.data import Manifest
from deep_delta.errors import UserError


def write_jsonl(path: Path, texts: list[str], sources: list[object] | None = None) -> Path:
    """One record a line; with `sources`, the field "source_file" where it is not None."""
    records = [{"text": text} for text in texts]
    if sources is not None:
        for record, source in zip(records, sources, strict=True):
            record.update({} if source is None else {"source_file": source})
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def read_split(folder: Path, split: str) -> np.ndarray:
    """All ids of a split, read without the code under test."""
    manifest = json.loads((folder / "manifest.json").read_text())
    shards = manifest["splits"][split]["shards"]
    dtype = {"uint16": "<u2", "uint32": "<u4"}[manifest["dtype"]]
    return np.concatenate(
        [np.fromfile(folder / shard["name"], dtype) for shard in shards] or [np.array([], dtype)]
    )


def shard_bytes(folder: Path) -> dict[str, bytes]:
    """Every file that a run leaves, by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def decoded(folder: Path, split: str, tokenizer: Any) -> list[str]:
    """The documents of a split, decoded, without their end-of-text tokens."""
    eot = Manifest.load(folder).eot_id
    ids = read_split(folder, split)
    parts = np.split(ids, np.flatnonzero(ids == eot) + 1)
    assert len(parts[-1]) == 0, "the last document must end with an end-of-text token"
    return [tokenizer.decode(part[:-1].tolist(), skip_special_tokens=False) for part in parts[:-1]]


def user_error(call: Callable[[], object]) -> str:
    """The message of the UserError that `call` must raise; one line, as people see it."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message
