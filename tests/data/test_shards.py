"""Token shards in, sequences out: reading, document masking, and what is checked on opening."""

import json
import os
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from data_helpers import read_split, user_error, write_jsonl

from deep_delta.data import Manifest, PackedSequences, TokenShards, check_tokenizer, prepare, shards


@pytest.fixture
def folder(jsonl, tmp_path):
    """A prepared folder with several shards in both splits."""
    prepare([str(jsonl)], tmp_path / "out", val_fraction=0.2, shard_tokens=500)
    return tmp_path / "out"


def edit_manifest(folder, edit):
    path = folder / "manifest.json"
    record = json.loads(path.read_text())
    edit(record)
    path.write_text(json.dumps(record))


def test_tokens_are_read_across_shard_borders(folder):
    opened = TokenShards.open(folder, "train")
    expected = read_split(folder, "train").astype(np.int64)
    assert len(opened) == len(expected)
    assert opened.manifest == Manifest.load(folder)
    for start, stop in [(0, 1), (499, 501), (500, 1000), (123, 2345), (7, 7), (0, len(expected))]:
        tokens = opened.tokens(start, stop)
        assert tokens.dtype == np.int64
        np.testing.assert_array_equal(tokens, expected[start:stop])
    assert opened.tokens(len(expected), len(expected)).size == 0
    for start, stop in [(-1, 3), (3, 2), (0, len(expected) + 1)]:
        with pytest.raises(IndexError):
            opened.tokens(start, stop)


def test_sequences_are_consecutive_and_drop_the_rest(folder):
    opened = TokenShards.open(folder, "train")
    sequences = PackedSequences(opened, 64)
    assert len(sequences) == len(opened) // 64
    joined = torch.cat([item["input_ids"] for item in sequences])
    assert joined.dtype == torch.int64
    np.testing.assert_array_equal(joined.numpy(), opened.tokens(0, 64 * len(sequences)))
    item = sequences[3]
    assert item.keys() == {"input_ids", "labels"}
    assert torch.equal(item["labels"], item["input_ids"])
    with pytest.raises(IndexError):
        sequences[len(sequences)]


def test_data_loader_workers_read_the_same_sequences(folder):
    sequences = PackedSequences(TokenShards.open(folder, "train"), 64)
    first = sequences[5]["input_ids"]
    copy = pickle.loads(pickle.dumps(sequences))
    assert torch.equal(copy[5]["input_ids"], first)
    assert len(pickle.dumps(sequences)) < 10_000, "the shards themselves must not be pickled"
    loader = torch.utils.data.DataLoader(sequences, batch_size=4, num_workers=1)
    assert torch.equal(next(iter(loader))["labels"][1], sequences[1]["labels"])


def test_masked_documents_restart_positions_and_hide_their_first_label(tmp_path):
    # Bytes of one letter each, so that the ids are known: a document a line.
    path = write_jsonl(tmp_path / "a.jsonl", ["q", "zq", "qzx", "zzzzz"])
    prepare([str(path)], tmp_path / "out", val_fraction=0)
    opened = TokenShards.open(tmp_path / "out", "train")
    eot = opened.manifest.eot_id
    ids = opened.tokens(0, len(opened)).tolist()
    sequences = PackedSequences(opened, 6, mask_documents=True)
    seen_inside = 0
    for number, item in enumerate(sequences):
        tokens = ids[number * 6 : number * 6 + 6]
        positions, labels = [], []
        for place, token in enumerate(tokens):
            starts = place == 0 or tokens[place - 1] == eot
            positions.append(0 if starts else positions[-1] + 1)
            labels.append(-100 if starts else token)
            seen_inside += starts and place > 0
        assert item["input_ids"].tolist() == tokens
        assert item["position_ids"].tolist() == positions
        assert item["labels"].tolist() == labels
        # Every end-of-text token inside the sequence is a target of its own document.
        assert [label == eot for label in labels[1:]] == [
            token == eot and place > 0
            for place, token in zip(positions[1:], tokens[1:], strict=True)
        ]
    assert seen_inside >= 2


def test_too_little_data_for_one_sequence(folder):
    opened = TokenShards.open(folder, "val")
    assert len(PackedSequences(opened, len(opened))) == 1
    message = user_error(lambda: PackedSequences(opened, len(opened) + 1))
    assert "fewer than one sequence" in message
    assert "at least 2" in user_error(lambda: PackedSequences(opened, 1))


@pytest.mark.parametrize(("count", "total"), [(0, 9), (1, 1), (3, 10), (7, 8), (960, 123_457)])
def test_indices_are_spread_evenly(count, total):
    chosen = shards.spread(count, total)
    assert len(chosen) == count
    assert chosen == sorted(set(chosen) & set(range(total)))
    steps = set(np.diff([*chosen, total]))
    assert count == 0 or steps <= {total // count, -(-total // count)}


def test_all_indices_are_taken_where_there_are_fewer_than_asked_for():
    for count in (8, 9, 1000):
        assert shards.spread(count, 8) == list(range(8))
    assert shards.spread(5, 0) == []


def test_uint32_shards_are_read(folder):
    """Rewrites a folder with the wider type; the ids stay the same."""
    before = read_split(folder, "train")
    for path in folder.glob("*.bin"):
        path.write_bytes(np.fromfile(path, "<u2").astype("<u4").tobytes())
    edit_manifest(folder, lambda record: record.update(dtype="uint32"))
    opened = TokenShards.open(folder, "train", verify=False)
    np.testing.assert_array_equal(opened.tokens(0, len(opened)), before)


def test_folders_that_are_not_prepared(folder, tmp_path):
    assert "no such data folder" in user_error(lambda: TokenShards.open(tmp_path / "no", "train"))
    message = user_error(lambda: TokenShards.open(tmp_path, "train"))
    assert message == f"{tmp_path} is not a prepared data folder: run ddl prepare"
    assert 'split "test"' in user_error(lambda: TokenShards.open(folder, "test"))
    edit_manifest(folder, lambda record: record.update(format_version=99))
    assert "format version 99" in user_error(lambda: TokenShards.open(folder, "train"))
    edit_manifest(folder, lambda record: record.pop("format_version"))
    assert "is damaged" in user_error(lambda: TokenShards.open(folder, "train"))
    (folder / "manifest.json").write_text("{")
    assert "is damaged" in user_error(lambda: TokenShards.open(folder, "train"))


def test_a_folder_prepared_without_validation_has_no_such_split(jsonl, tmp_path):
    prepare([str(jsonl)], tmp_path / "a", val_fraction=0)
    assert 'no tokens in the split "val"' in user_error(
        lambda: TokenShards.open(tmp_path / "a", "val")
    )


def test_a_missing_or_cut_shard_is_named(folder):
    path = folder / "train-00002.bin"
    data = path.read_bytes()
    path.write_bytes(data[:-2])
    message = user_error(lambda: TokenShards.open(folder, "train", verify=False))
    assert str(path) in message
    assert "998 bytes instead of 1,000" in message
    path.unlink()
    message = user_error(lambda: TokenShards.open(folder, "train", verify=False))
    assert f"{path} is missing" in message


def test_a_flipped_bit_is_found(folder):
    path = folder / "train-00001.bin"
    TokenShards.open(folder, "train")
    data = bytearray(path.read_bytes())
    data[77] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(1, 1))  # a clock too coarse to tell the two writes apart
    message = user_error(lambda: TokenShards.open(folder, "train"))
    assert str(path) in message
    assert "corrupt" in message
    TokenShards.open(folder, "train", verify=False)
    TokenShards.open(folder, "val")


def test_parts_of_a_split_are_verified_by_themselves(folder):
    path = folder / "train-00001.bin"
    data = bytearray(path.read_bytes())
    data[78] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(2, 2))
    opened = TokenShards.open(folder, "train", verify=False)
    opened.verify(0, 2)
    opened.verify(2, 3)
    assert f"the shard {path} is corrupt" in user_error(lambda: opened.verify(1, 2))
    assert f"the shard {path} is corrupt" in user_error(lambda: opened.verify(1, 3))


def test_a_shard_is_hashed_once_while_it_stays_the_same(folder, monkeypatch):
    TokenShards.open(folder, "train")
    monkeypatch.setattr(shards, "_hash_and_largest", lambda *_: pytest.fail("hashed again"))
    TokenShards.open(folder, "train")


def test_ids_beyond_the_vocabulary_are_found(folder):
    edit_manifest(folder, lambda record: record.update(vocab_size=300))
    message = user_error(lambda: TokenShards.open(folder, "train"))
    assert "a token file larger than the vocabulary" in message


def test_another_tokenizer_in_the_folder_is_found(folder):
    path = folder / "tokenizer.json"
    path.write_text(path.read_text() + " ")
    assert "a tokenizer that does not match the shards" in user_error(
        lambda: TokenShards.open(folder, "train")
    )
    path.unlink()
    assert "no tokenizer.json" in user_error(lambda: TokenShards.open(folder, "train"))


def test_a_model_needs_at_least_as_many_ids_as_the_tokenizer(folder):
    manifest = Manifest.load(folder)
    check_tokenizer(manifest, 4096)
    check_tokenizer(manifest, 4160)
    message = user_error(lambda: check_tokenizer(replace(manifest, vocab_size=50_257), 4096))
    assert "the tokenizer does not match" in message
    assert "50,257" in message
    assert "4,096" in message
