"""Input and settings that `prepare` must refuse with one line."""

import gzip
import lzma
import sys

import pyarrow
import pyarrow.parquet
import pytest
from data_helpers import user_error, write_jsonl
from tokenizers import Tokenizer, models

from deep_delta.data import prepare

BAD_FILES = {
    "cut.jsonl": (b'{"text": "a"}\n{"text": "b', "cut.jsonl, line 2: not a JSON object"),
    "list.jsonl": (b'["a"]\n', 'list.jsonl, line 1: the record has no "text"'),
    "notext.jsonl": (b'\n{"txt": "a"}\n', 'notext.jsonl, line 2: the record has no "text"'),
    "number.jsonl": (b'{"text": 3}\n', 'line 1: the record has no "text" string'),
    "bytes.jsonl": (b'{"text": "\xff"}\n', "line 1: not a JSON object"),
    "surrogate.jsonl": (b'{"text": "\\ud800"}\n', "line 1: the text is not valid Unicode"),
    "latin.txt": (b"caf\xe9", "is not UTF-8 text (byte 3)"),
    "empty.jsonl": (b"", "the input has no text"),
    "blank.txt": (b" \n ", "the input has no text"),
    "bad.jsonl.gz": (b"no gzip", "is damaged"),
    "cut.jsonl.gz": (gzip.compress(b'{"text": "a"}\n' * 99)[:-9], "is damaged"),
    "cut.jsonl.xz": (lzma.compress(b'{"text": "a"}\n' * 99)[:-30], "is damaged"),
    "bad.jsonl.xz": (b"no xz", "is damaged"),
    "bad.jsonl.zst": (b"no zst", "is damaged"),
    "bad.parquet": (b"no parquet", "is damaged"),
    "table.csv": (b"text\n", "it must be one of .txt, .jsonl"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_named_in_one_line(name, tmp_path):
    data, expected = BAD_FILES[name]
    (tmp_path / name).write_bytes(data)
    message = user_error(lambda: prepare([str(tmp_path / name)], tmp_path / "out", val_fraction=0))
    assert expected in message
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_parquet_file_needs_a_text_column(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), tmp_path / "a.parquet")
    message = user_error(lambda: prepare([str(tmp_path / "a.parquet")], tmp_path / "out"))
    assert 'no column "text"' in message


@pytest.mark.parametrize(
    "name", ["missing.jsonl", "./missing", "/no/such/folder", "some/dir.txt", "my_txt/"]
)
def test_a_missing_path_is_not_taken_for_a_data_set(name, tmp_path):
    assert (
        user_error(lambda: prepare([name], tmp_path / "out")) == f"no such file or folder: {name}"
    )


def test_a_slip_of_the_pen_does_not_bind_the_folder(tmp_path):
    (tmp_path / "bad.jsonl").write_text("not json\n")
    (tmp_path / "good.jsonl").write_text('{"text": "some words"}\n{"text": "and more"}\n')
    user_error(lambda: prepare([str(tmp_path / "bad.jsonl")], tmp_path / "out"))
    manifest = prepare([str(tmp_path / "good.jsonl")], tmp_path / "out", val_fraction=0.0)
    assert manifest.splits["train"].documents == 2


def test_a_folder_without_text_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    message = user_error(lambda: prepare([str(tmp_path / "empty")], tmp_path / "out"))
    assert "no readable file" in message
    assert "no input given" in user_error(lambda: prepare([], tmp_path / "out"))


def test_an_unreachable_data_set_and_missing_extras_are_one_line(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")

    def fail(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset_builder", fail)
    message = user_error(lambda: prepare(["someone/text"], tmp_path / "out"))
    assert message == "can't load the data set someone/text: no route"

    for name in ("a.parquet", "a.jsonl.zst"):
        (tmp_path / name).write_bytes(b"")
    for package, name in (
        ("datasets", "someone/text"),
        ("pyarrow", str(tmp_path / "a.parquet")),
        ("zstandard", str(tmp_path / "a.jsonl.zst")),
    ):
        monkeypatch.setitem(sys.modules, package, None)
        message = user_error(lambda name=name, out=tmp_path / package: prepare([name], out))
        assert message.endswith("needs the extra 'train': pip install 'deep-delta-learning[train]'")


def test_a_tokenizer_that_cannot_be_used_is_one_line(jsonl, tmp_path, monkeypatch):
    def message_for(tokenizer: str) -> str:
        return user_error(lambda: prepare([str(jsonl)], tmp_path / "out", tokenizer=tokenizer))

    (tmp_path / "folder").mkdir()
    (tmp_path / "broken.json").write_text("{}")
    Tokenizer(models.WordLevel({"None": 0}, unk_token="None")).save(str(tmp_path / "noend.json"))
    assert "no such tokenizer" in message_for("./missing")
    assert "has no tokenizer.json" in message_for(str(tmp_path / "folder"))
    assert "can't be read" in message_for(str(tmp_path / "broken.json"))
    assert "no end-of-text token" in message_for(str(tmp_path / "noend.json"))

    class Unreachable:
        @staticmethod
        def from_pretrained(_: str) -> None:
            raise OSError("offline\nor not there")

    monkeypatch.setattr("deep_delta.data.tokenizer.Tokenizer", Unreachable)
    assert message_for("someone/model") == "can't load the tokenizer someone/model: offline"
    assert not (tmp_path / "out").exists()


def test_an_empty_split_says_what_to_change_and_leaves_the_folder_usable(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    out = tmp_path / "out"
    assert "raise --val-fraction" in user_error(
        lambda: prepare([str(path)], out, val_fraction=1e-9)
    )
    assert "lower --val-fraction" in user_error(
        lambda: prepare([str(path)], out, val_fraction=1 - 1e-9)
    )
    assert prepare([str(path)], out, val_fraction=0).splits["train"].documents == 2


@pytest.mark.parametrize(
    "settings",
    [
        {"val_fraction": 1},
        {"val_fraction": -1},
        {"shard_tokens": 0},
        {"max_tokens": 0},
        {"processes": 0},
    ],
)
def test_settings_out_of_range_are_refused(settings, jsonl, tmp_path):
    assert user_error(lambda: prepare([str(jsonl)], tmp_path / "out", **settings)).startswith("--")


def test_an_out_that_is_a_file_is_refused(jsonl):
    assert "can't write" in user_error(lambda: prepare([str(jsonl)], jsonl))
