"""Text in, token shards out: kinds of input, determinism, split."""

import gzip
import json
import lzma
import random
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from data_helpers import decoded, read_split, shard_bytes, user_error, write_jsonl
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from deep_delta.data import Manifest, bundled_tokenizer, prepare

TOKENIZER = Tokenizer.from_file(str(bundled_tokenizer() / "tokenizer.json"))


def write_as(kind: str, jsonl: Path, documents: list[str]) -> Path:
    """The documents as another kind of input."""
    data = jsonl.read_bytes()
    path = jsonl.with_name(f"input{kind}")
    if kind == ".jsonl.gz":
        path.write_bytes(gzip.compress(data))
    elif kind == ".jsonl.xz":
        path.write_bytes(lzma.compress(data))
    elif kind == ".jsonl.zst":
        half = data.index(b"\n", len(data) // 2) + 1
        compress = zstandard.ZstdCompressor().compress
        path.write_bytes(compress(data[:half]) + compress(data[half:]))  # two frames
    elif kind == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": documents}), path)
    elif kind == "-folder":
        (path / "b").mkdir(parents=True)
        write_jsonl(path / "a.jsonl", documents[:20])
        write_jsonl(path / "b" / "c.jsonl", documents[20:-1])
        (path / "d.txt").write_bytes(documents[-1].encode())
        (path / "ignored.csv").write_text("text\n")
    return path


@pytest.mark.parametrize(
    "kind", [".jsonl.gz", ".jsonl.xz", ".jsonl.zst", ".parquet", "-folder"], ids=lambda kind: kind
)
def test_every_kind_of_input_gives_the_same_shards(kind, jsonl, documents, tmp_path):
    prepare([str(jsonl)], tmp_path / "plain", val_fraction=0.2)
    prepare([str(write_as(kind, jsonl, documents))], tmp_path / "other", val_fraction=0.2)
    for split in ("train", "val"):
        np.testing.assert_array_equal(
            read_split(tmp_path / "plain", split), read_split(tmp_path / "other", split)
        )


def test_documents_round_trip_and_are_counted(jsonl, documents, tmp_path):
    out = tmp_path / "out"
    manifest = prepare([str(jsonl)], out, val_fraction=0.2)
    train, val = decoded(out, "train", TOKENIZER), decoded(out, "val", TOKENIZER)
    assert train + val == sorted(documents, key=(train + val).index)
    assert len(train) > len(val) > 0
    for name, texts in (("train", train), ("val", val)):
        split = manifest.splits[name]
        assert split.documents == len(texts)
        assert split.text_bytes == sum(len(text.encode()) for text in texts)
        assert split.tokens == len(read_split(out, name)) == sum(s.tokens for s in split.shards)
    assert Manifest.load(out) == manifest
    assert json.loads((out / "manifest.json").read_text())["format_version"] == 1
    assert not (out / "progress.json").exists()


def test_text_files_are_one_document_each_and_empty_ones_are_skipped(tmp_path):
    for name, text in (("a", "one\r\ntwo\n"), ("b", " \n\t"), ("c", "three")):
        (tmp_path / f"{name}.txt").write_bytes(text.encode())
    manifest = prepare([str(tmp_path)], tmp_path / "out", val_fraction=0)
    assert decoded(tmp_path / "out", "train", TOKENIZER) == ["one\r\ntwo\n", "three"]
    assert manifest.empty_documents == 1
    assert manifest.splits["val"].shards == ()


def test_transformers_loads_the_tokenizer_copy(jsonl, tmp_path):
    manifest = prepare([str(jsonl)], tmp_path / "out", val_fraction=0.2)
    copy = PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    assert copy.eos_token == "<|endoftext|>"
    assert copy.eos_token_id == manifest.eot_id


def test_split_of_a_document_does_not_depend_on_order_or_shards(jsonl, documents, tmp_path):
    prepare([str(jsonl)], tmp_path / "a", val_fraction=0.2)
    shuffled = random.Random(1).sample(documents, len(documents))
    other = write_jsonl(tmp_path / "shuffled.jsonl", shuffled)
    prepare([str(other)], tmp_path / "b", val_fraction=0.2, shard_tokens=500)
    for split in ("train", "val"):
        first, second = (decoded(tmp_path / name, split, TOKENIZER) for name in "ab")
        assert sorted(first) == sorted(second)
    # A larger fraction only moves documents from train to val.
    prepare([str(jsonl)], tmp_path / "c", val_fraction=0.5)
    larger = decoded(tmp_path / "c", "val", TOKENIZER)
    assert set(decoded(tmp_path / "a", "val", TOKENIZER)) < set(larger)


def test_shards_have_exactly_the_size_asked_for(jsonl, tmp_path):
    manifest = prepare([str(jsonl)], tmp_path / "small", val_fraction=0.2, shard_tokens=500)
    prepare([str(jsonl)], tmp_path / "big", val_fraction=0.2)
    sizes = [shard.tokens for shard in manifest.splits["train"].shards]
    assert len(sizes) > 3
    assert set(sizes[:-1]) == {500}
    assert 0 < sizes[-1] <= 500
    np.testing.assert_array_equal(
        read_split(tmp_path / "small", "train"), read_split(tmp_path / "big", "train")
    )


def test_a_finished_folder_is_left_alone_and_other_settings_are_refused(
    jsonl, documents, tmp_path, capsys
):
    out = tmp_path / "out"
    manifest = prepare([str(jsonl)], out, val_fraction=0.2)
    before = shard_bytes(out)
    assert prepare([str(jsonl)], out, val_fraction=0.2) == manifest
    assert "already prepared" in capsys.readouterr().err
    assert "val_fraction" in user_error(lambda: prepare([str(jsonl)], out, val_fraction=0.3))
    write_jsonl(jsonl, documents[1:])
    message = user_error(lambda: prepare([str(jsonl)], out, val_fraction=0.2))
    assert str(out) in message
    assert "inputs" in message
    assert shard_bytes(out) == before


def test_more_than_65536_ids_are_stored_as_uint32(tmp_path):
    words = {f"w{number}": number for number in range(70_000)}
    tokenizer = Tokenizer(models.WordLevel({**words, "[END]": 70_000}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": {"content": "[END]"}}')
    (tmp_path / "a.txt").write_text("w1 w69999")
    manifest = prepare(
        [str(tmp_path / "a.txt")], tmp_path / "out", tokenizer=str(folder), val_fraction=0
    )
    assert (manifest.dtype, manifest.vocab_size, manifest.eot_id) == ("uint32", 70_001, 70_000)
    assert (tmp_path / "out" / "train-00000.bin").stat().st_size == 12
    assert read_split(tmp_path / "out", "train").tolist() == [1, 69_999, 70_000]


def test_truncation_and_padding_of_a_tokenizer_are_not_applied(jsonl, tmp_path):
    limited = Tokenizer.from_file(str(bundled_tokenizer() / "tokenizer.json"))
    limited.enable_truncation(8)
    limited.enable_padding(length=9)
    limited.save(str(tmp_path / "limited.json"))
    prepare([str(jsonl)], tmp_path / "a", val_fraction=0.2)
    prepare(
        [str(jsonl)], tmp_path / "b", tokenizer=str(tmp_path / "limited.json"), val_fraction=0.2
    )
    np.testing.assert_array_equal(
        read_split(tmp_path / "a", "train"), read_split(tmp_path / "b", "train")
    )
