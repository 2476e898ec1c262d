"""`val.sources.txt`: the sources that records name, a line for each validation document."""

import json
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from data_helpers import decoded, shard_bytes, write_jsonl
from tokenizers import Tokenizer

from deep_delta.data import bundled_tokenizer, prepare
from deep_delta.data import encode as encode_module
from deep_delta.data import parquet as parquet_module
from deep_delta.data.writer import ShardWriter

# The package's name `prepare` is the function.
prepare_module = sys.modules["deep_delta.data.prepare"]
TOKENIZER = Tokenizer.from_file(str(bundled_tokenizer() / "tokenizer.json"))
FILE = "val.sources.txt"
SETTINGS = {"val_fraction": 0.5, "shard_tokens": 2000}


def lines(out: Path) -> list[str]:
    data = (out / FILE).read_bytes().decode()
    assert data.endswith("\n")
    return data[:-1].split("\n")


@pytest.fixture
def names(documents) -> dict[str, str]:
    """Each document's source."""
    return {text: f"Ünter {number // 5}" for number, text in enumerate(documents)}


@pytest.fixture
def inputs(tmp_path, documents, names) -> list[str]:
    """Records with sources: half in a .jsonl file, half in the row groups of a parquet file."""
    half = documents[:20] + [" " * number for number in range(8)]  # empty ones get no line
    jsonl = write_jsonl(tmp_path / "a.jsonl", half, [names.get(text, "none") for text in half])
    rest = documents[20:]
    # Another order of the columns than they are asked for in.
    table = pyarrow.table({"source_file": [names[text] for text in rest], "text": rest})
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet", row_group_size=4)
    return [str(jsonl), str(tmp_path / "b.parquet")]


def test_each_validation_document_has_the_line_of_its_record(inputs, names, tmp_path, monkeypatch):
    made = prepare(inputs, tmp_path / "one", **SETTINGS)
    val = decoded(tmp_path / "one", "val", TOKENIZER)
    assert lines(tmp_path / "one") == [names[text] for text in val]
    assert len(val) == made.splits["val"].documents > 10
    assert not (tmp_path / "one" / "train.sources.txt").exists()
    assert FILE not in (tmp_path / "one" / "manifest.json").read_text()

    monkeypatch.setattr(encode_module, "CHUNK_DOCUMENTS", 3)
    prepare(inputs, tmp_path / "two", **SETTINGS, processes=2)
    monkeypatch.setattr(parquet_module, "GROUP_BYTES", 0)  # every row group is a large one
    prepare(inputs, tmp_path / "streamed", **SETTINGS)
    whole = shard_bytes(tmp_path / "one")
    assert shard_bytes(tmp_path / "two") == shard_bytes(tmp_path / "streamed") == whole


@pytest.mark.parametrize("stops", [(9, 16), (2, 25), (0, 0)])
def test_a_run_that_was_stopped_gives_the_same_lines(stops, inputs, tmp_path, monkeypatch):
    """Also where some lines are lost, or some were written that no progress speaks of."""
    prepare(inputs, tmp_path / "whole", **SETTINGS)
    monkeypatch.setattr(encode_module, "CHUNK_DOCUMENTS", 2)
    monkeypatch.setattr(prepare_module, "CHECKPOINT_CHUNKS", 3)
    out, add, left = tmp_path / "out", ShardWriter.add, 0

    def stopping(*arguments):
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        add(*arguments)

    for stop in stops:
        left = stop
        monkeypatch.setattr(ShardWriter, "add", stopping)
        with pytest.raises(KeyboardInterrupt):
            prepare(inputs, out, **SETTINGS)
        with (out / FILE).open("a") as file:
            file.write("half a li" * 300)
    monkeypatch.setattr(ShardWriter, "add", add)
    prepare(inputs, out, **SETTINGS, processes=2)
    assert shard_bytes(out) == shard_bytes(tmp_path / "whole")


def test_max_tokens_cuts_the_lines_too(inputs, tmp_path):
    everything = prepare(inputs, tmp_path / "all", **SETTINGS)
    wanted = everything.splits["train"].tokens // 2
    made = prepare(inputs, tmp_path / "some", **SETTINGS, max_tokens=wanted)
    count = made.splits["val"].documents
    assert 0 < count < everything.splits["val"].documents
    assert lines(tmp_path / "some") == lines(tmp_path / "all")[:count]


def test_records_without_sources_give_no_file(jsonl, documents, tmp_path):
    prepare([str(jsonl)], tmp_path / "none", **SETTINGS)
    others = write_jsonl(tmp_path / "others.jsonl", documents, [7, None, " \n", {}] * 10 + [[]])
    table = pyarrow.table({"text": documents, "source_file": range(len(documents))})
    pyarrow.parquet.write_table(table, tmp_path / "numbers.parquet")
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / FILE).write_text("left over\n")
    prepare([str(others), str(tmp_path / "numbers.parquet")], tmp_path / "others", **SETTINGS)
    for out in ("none", "others"):
        assert not (tmp_path / out / FILE).exists()


def test_a_document_without_a_source_is_one_of_its_own(jsonl, documents, tmp_path, monkeypatch):
    monkeypatch.setattr(encode_module, "CHUNK_DOCUMENTS", 2)
    sources = ["A"] * 20 + [None] * 10 + ["B"] * 11
    named = write_jsonl(tmp_path / "named.jsonl", documents, sources)
    prepare([str(jsonl)], tmp_path / "none", **SETTINGS)
    prepare([str(jsonl), str(named)], tmp_path / "out", **SETTINGS)
    val = decoded(tmp_path / "none", "val", TOKENIZER)
    source_of = dict(zip(documents, sources, strict=True))
    expected = [None] * len(val) + [source_of[text] for text in val]
    assert {None, "A", "B"} == set(expected[len(val) :])
    assert lines(tmp_path / "out") == [
        source or f"document\t{number}" for number, source in enumerate(expected, start=1)
    ]


def test_a_source_is_one_line_whatever_it_holds(documents, tmp_path):
    bad = "A\r\nlong\u2028  title\x85\tby\v\x1c\ud800 Ω "
    path = write_jsonl(tmp_path / "a.jsonl", documents, [bad] * len(documents))
    made = prepare([str(path)], tmp_path / "out", **SETTINGS)
    count = made.splits["val"].documents
    assert lines(tmp_path / "out") == ["A long title by \\ud800 Ω"] * count
    assert len((tmp_path / "out" / FILE).read_text(encoding="utf-8").splitlines()) == count


def test_progress_of_an_older_version_goes_on_without_the_file(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "CHECKPOINT_CHUNKS", 1)

    def stop(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "finish", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(inputs, tmp_path / "out", **SETTINGS)
    (tmp_path / "out" / FILE).unlink()
    progress = json.loads((tmp_path / "out" / "progress.json").read_text())
    for split in progress["splits"].values():
        del split["source_bytes"]
    (tmp_path / "out" / "progress.json").write_text(json.dumps(progress))
    prepare(inputs, tmp_path / "out", **SETTINGS)
    prepare(inputs, tmp_path / "whole", **SETTINGS)
    whole = shard_bytes(tmp_path / "whole")
    del whole[FILE]
    assert shard_bytes(tmp_path / "out") == whole
