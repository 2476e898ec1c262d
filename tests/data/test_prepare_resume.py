"""Interrupted runs of `prepare` go on where they were."""

import errno
import json
import random
import sys
from pathlib import Path

import pytest
from data_helpers import shard_bytes, user_error, write_jsonl

from deep_delta.data import encode as encode_module
from deep_delta.data import prepare
from deep_delta.data.writer import ShardWriter

# The package's name `prepare` is the function.
prepare_module = sys.modules["deep_delta.data.prepare"]


class Interrupted(BaseException):
    """Stands for Ctrl-C or a kill."""


def add_rubbish_to_unfinished_files(out: Path, rng: random.Random) -> None:
    """What a kill may leave after the recorded end; finished shards are never written again."""
    progress = out / "progress.json"
    splits = json.loads(progress.read_text())["splits"] if progress.exists() else {}
    finished = {shard["name"] for split in splits.values() for shard in split["finished"]}
    for path in [*out.glob("*.bin"), *out.glob("*.sources.txt")]:
        if path.name not in finished:
            with path.open("ab") as file:
                file.write(rng.randbytes(rng.randint(0, 99)))


@pytest.mark.parametrize("seed", range(6))
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    seed, jsonl, documents, tmp_path, monkeypatch
):
    """Stops at random documents, several times, also right before progress is recorded."""
    names = [f"book {number // 4}" for number in range(len(documents))]
    second = write_jsonl(tmp_path / "second.jsonl", documents[::-1], names)
    inputs = [str(jsonl), str(second)] if seed % 2 else [str(second), str(jsonl)]
    monkeypatch.setattr(encode_module, "CHUNK_DOCUMENTS", 3)
    monkeypatch.setattr(prepare_module, "CHECKPOINT_CHUNKS", 2)
    prepare(inputs, tmp_path / "whole", val_fraction=0.2, shard_tokens=700)
    assert (tmp_path / "whole" / "val.sources.txt").read_text().count("book") > 3

    rng = random.Random(seed)
    add, save = ShardWriter.add, prepare_module.Progress.save
    left = 0

    def stopping(function):
        def call(*args):
            nonlocal left
            left -= 1
            if left < 0:
                raise Interrupted
            return function(*args)

        return call

    monkeypatch.setattr(ShardWriter, "add", stopping(add))
    monkeypatch.setattr(prepare_module.Progress, "save", stopping(save))
    out = tmp_path / "resumed"
    for _ in range(4):
        left = rng.randint(0, 25)
        with pytest.raises(Interrupted):
            prepare(inputs, out, val_fraction=0.2, shard_tokens=700)
        assert not (out / "manifest.json").exists()
        add_rubbish_to_unfinished_files(out, rng)
    left = sys.maxsize
    prepare(inputs, out, val_fraction=0.2, shard_tokens=700)
    assert shard_bytes(out) == shard_bytes(tmp_path / "whole")


def test_resume_does_not_encode_finished_documents_again(jsonl, tmp_path, monkeypatch):
    monkeypatch.setattr(encode_module, "CHUNK_DOCUMENTS", 2)
    monkeypatch.setattr(prepare_module, "CHECKPOINT_CHUNKS", 1)
    encode, seen = encode_module.TextTokenizer.encode, []

    def counting(tokenizer, texts):
        if len(seen) == limit:
            raise Interrupted
        seen.extend(texts)
        return encode(tokenizer, texts)

    monkeypatch.setattr(encode_module.TextTokenizer, "encode", counting)
    limit = 20
    with pytest.raises(Interrupted):
        prepare([str(jsonl)], tmp_path / "out", val_fraction=0.2)
    first, seen[:] = list(seen), []
    user_error(lambda: prepare([str(jsonl)], tmp_path / "out", val_fraction=0.2, shard_tokens=9))
    limit = None
    prepare([str(jsonl)], tmp_path / "out", val_fraction=0.2)
    assert len(seen) == 41 - 20
    assert not set(first) & set(seen)


def test_a_full_disk_keeps_progress(jsonl, tmp_path, monkeypatch):
    monkeypatch.setattr(encode_module, "CHUNK_DOCUMENTS", 4)
    monkeypatch.setattr(prepare_module, "CHECKPOINT_CHUNKS", 1)
    prepare([str(jsonl)], tmp_path / "whole", val_fraction=0.2)
    add, calls = ShardWriter.add, []

    def full(*args):
        calls.append(args)
        if len(calls) > 9:
            raise OSError(errno.ENOSPC, "No space left on device")
        add(*args)

    monkeypatch.setattr(ShardWriter, "add", full)
    out = tmp_path / "out"
    assert "disk is full" in user_error(lambda: prepare([str(jsonl)], out, val_fraction=0.2))
    assert json.loads((out / "progress.json").read_text())["document"] == 16
    monkeypatch.setattr(ShardWriter, "add", add)
    prepare([str(jsonl)], out, val_fraction=0.2)
    assert shard_bytes(out) == shard_bytes(tmp_path / "whole")


def test_a_damaged_progress_file_or_lost_shard_is_one_line(jsonl, tmp_path, monkeypatch):
    monkeypatch.setattr(encode_module, "CHUNK_DOCUMENTS", 4)
    monkeypatch.setattr(prepare_module, "CHECKPOINT_CHUNKS", 1)

    def stop(*_):
        raise Interrupted

    out = tmp_path / "out"
    monkeypatch.setattr(ShardWriter, "finish", stop)
    with pytest.raises(Interrupted):
        prepare([str(jsonl)], out, val_fraction=0.2)
    (out / "train-00000.bin").unlink()
    assert "missing or shorter" in user_error(lambda: prepare([str(jsonl)], out, val_fraction=0.2))
    (out / "progress.json").write_text("{")
    assert "is damaged" in user_error(lambda: prepare([str(jsonl)], out, val_fraction=0.2))
