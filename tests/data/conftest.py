"""Small real documents for the data tests."""

import json
import lzma
from pathlib import Path

import pytest
from data_helpers import write_jsonl

from deep_delta.data import bundled_text


@pytest.fixture(scope="session")
def documents() -> list[str]:
    """40 short real documents, and one that holds characters the tokenizer never saw."""
    with lzma.open(bundled_text(), "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"][:600] for line in lines][:40]
    return [*texts, "Ω ≈ 𝄞 — ünïcode\r\nand a <|endoftext|> in the text"]


@pytest.fixture
def jsonl(tmp_path: Path, documents: list[str]) -> Path:
    """The documents as a .jsonl file."""
    return write_jsonl(tmp_path / "documents.jsonl", documents)
