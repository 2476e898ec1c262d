"""`prepare` from data sets by name; here they are folders, which `datasets` reads like a hub's."""

import shutil
from types import SimpleNamespace

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
from data_helpers import read_split, user_error, write_jsonl

from deep_delta.data import prepare
from deep_delta.data.hub import data_files

datasets = pytest.importorskip("datasets")

CARD = """---
configs:
- config_name: default
  data_files: [{split: train, path: "data/*/*"}]
- config_name: sample-1M
  data_files: [{split: train, path: "sample/1M/*"}]
---
"""


@pytest.fixture
def hub(tmp_path, documents, monkeypatch):
    """A data set with FineWeb-Edu's layout, "someone/text"; the folder that it is."""
    folder = tmp_path / "hub"
    for name, texts in {
        "data/CC-2/000.parquet": documents[20:],
        "sample/1M/000.parquet": documents[:9],
        "sample/1M/001.parquet": documents[9:20],
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), folder / name)
    (folder / "README.md").write_text(CARD)
    load = datasets.load_dataset_builder

    def load_dataset_builder(name, configuration):
        assert name == "someone/text"
        return load(str(folder), configuration, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
    return folder


def test_a_configuration_is_its_parquet_files(hub, documents, tmp_path):
    manifest = prepare(["someone/text:sample-1M"], tmp_path / "named", val_fraction=0.2)
    write_jsonl(tmp_path / "same.jsonl", documents[:20])
    prepare([str(tmp_path / "same.jsonl")], tmp_path / "plain", val_fraction=0.2)
    assert read_split(tmp_path / "named", "train").tolist() == (
        read_split(tmp_path / "plain", "train").tolist()
    )
    assert [name for name, _ in manifest.settings["inputs"]] == [
        "someone/text:sample-1M/sample/1M/000.parquet",
        "someone/text:sample-1M/sample/1M/001.parquet",
    ]
    default = prepare(["someone/text"], tmp_path / "default", val_fraction=0)
    assert default.splits["train"].documents == len(documents) - 20


def test_a_changed_file_is_noticed_and_a_wrong_name_is_one_line(hub, documents, tmp_path):
    prepare(["someone/text:sample-1M"], tmp_path / "out", val_fraction=0)
    (hub / "README.md").write_text(CARD + "Another revision with the same files.\n")
    prepare(["someone/text:sample-1M"], tmp_path / "out", val_fraction=0)
    table = pyarrow.table({"text": documents[:3]})
    pyarrow.parquet.write_table(table, hub / "sample/1M/001.parquet")
    message = user_error(
        lambda: prepare(["someone/text:sample-1M"], tmp_path / "out", val_fraction=0)
    )
    assert "inputs" in message
    message = user_error(lambda: prepare(["someone/text:sample-2M"], tmp_path / "other"))
    assert message.startswith("can't load the data set someone/text:sample-2M: ")
    assert "sample-1M" in message


def test_other_files_are_read_row_by_row(hub, documents, tmp_path):
    shutil.rmtree(hub)
    hub.mkdir()
    write_jsonl(hub / "train.jsonl", documents[:20])
    manifest = prepare(["someone/text"], tmp_path / "out", val_fraction=0)
    assert manifest.splits["train"].documents == 20
    assert [name for name, _ in manifest.settings["inputs"]] == ["someone/text"]


def test_files_are_read_by_url(documents, tmp_path, monkeypatch):
    with fsspec.open("memory://text/a.parquet", "wb") as file:
        pyarrow.parquet.write_table(pyarrow.table({"text": documents}), file)
    urls = ["memory://text/a.parquet"]
    builder = SimpleNamespace(
        config=SimpleNamespace(data_files={"train": urls}), base_path="memory://text"
    )
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_: builder)
    manifest = prepare(["someone/text"], tmp_path / "out", val_fraction=0)
    assert manifest.splits["train"].documents == len(documents)
    assert [file.name for file in data_files("someone/text")] == ["a.parquet"]
    urls[0] = "memory://text/b.parquet"
    assert "b.parquet" in user_error(lambda: prepare(["someone/text"], tmp_path / "other"))
    urls.clear()
    assert "no files" in user_error(lambda: prepare(["someone/text"], tmp_path / "other"))
