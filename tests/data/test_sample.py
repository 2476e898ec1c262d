"""The bundled text and tokenizer."""

import json
import lzma
from collections import Counter

import pytest
from data_helpers import read_split
from tokenizers import Tokenizer

from deep_delta.data import Manifest, bundled_text, bundled_tokenizer, prepare_bundled

FREE_SOURCES = {"classics-nonfiction", "classics-fiction", "medquad", "plos", "opensource-guide"}


@pytest.fixture(scope="module")
def records():
    with lzma.open(bundled_text(), "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(bundled_tokenizer() / "tokenizer.json"))


def test_size_is_one_to_two_megabytes():
    assert 1_000_000 <= bundled_text().stat().st_size <= 2_000_000


def test_every_source_is_free_of_share_alike_and_named_in_the_notice(records):
    counts = Counter(record["source"] for record in records)
    assert set(counts) == FREE_SOURCES
    notice = bundled_text().with_name("NOTICE").read_text(encoding="utf-8")
    for source in FREE_SOURCES:
        assert source in notice
    for record in records:
        if record["source"] == "plos":
            assert record["text"].split("\n", 1)[0] in notice
    assert "BY-SA" not in notice


def test_documents_are_distinct_and_mixed(records):
    assert len({record["text"] for record in records}) == len(records)
    half = len(records) // 2
    assert {record["source"] for record in records[:half]} == FREE_SOURCES


def test_tokenizer_has_4096_ids_and_gives_any_text_back(records, tokenizer):
    assert sorted(tokenizer.get_vocab().values()) == list(range(4096))
    assert tokenizer.token_to_id("<|endoftext|>") is not None
    texts = [record["text"] for record in records[::10]]
    texts += ["", " \r\n\t ", "𝄞 Ω \x00 é e\u0301 中文 \ufeff", "  two  spaces  "]
    for text, encoding in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert tokenizer.decode(encoding.ids) == text


def test_prepare_bundled_is_done_once(tmp_path, capsys):
    out = prepare_bundled(tmp_path / "sample")
    manifest = Manifest.load(out)
    assert manifest.splits["val"].tokens >= 60_000
    assert manifest.splits["train"].tokens >= 1_000_000
    assert (manifest.dtype, manifest.vocab_size) == ("uint16", 4096)
    assert read_split(out, "train")[-1] == manifest.eot_id
    capsys.readouterr()
    written = (out / "manifest.json").stat().st_mtime_ns
    assert prepare_bundled(out) == out
    assert capsys.readouterr().err == ""
    assert (out / "manifest.json").stat().st_mtime_ns == written
