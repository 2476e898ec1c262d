"""Splits: which documents go where, folders of two splits and of three, and what is refused."""

import hashlib
import json
import sys
from contextlib import nullcontext
from itertools import chain

import pytest
from data_helpers import decoded, read_split, shard_bytes, user_error, write_jsonl
from tokenizers import Tokenizer

import deep_delta_cli
from deep_delta.data import Manifest, TokenShards, bundled_tokenizer, prepare
from deep_delta.data import encode as encode_module
from deep_delta.data.encode import Fractions
from deep_delta.data.writer import ShardWriter
from deep_delta.evaluate.bootstrap import FEWEST

# The package's name `prepare` is the function.
prepare_module = sys.modules["deep_delta.data.prepare"]
TOKENIZER = Tokenizer.from_file(str(bundled_tokenizer() / "tokenizer.json"))
WORDS = ("the", "river", "ran", "by", "an", "old", "stone", "house", "where", "nobody", "lived")
NAMES = ("train", "val", "test")


@pytest.fixture
def texts() -> list[str]:
    """Forty documents that no file has to be read for."""
    count = len(WORDS)
    return [" ".join(WORDS[n * k % count] for k in range(1, 20 + n)) for n in range(40)]


@pytest.fixture
def named(texts, tmp_path) -> str:
    """A file of them, each with a source."""
    sources = [f"book {number // 4}" for number in range(len(texts))]
    return str(write_jsonl(tmp_path / "a.jsonl", texts, sources))


def test_folders_of_two_splits_are_what_they_were_before_there_were_three(texts, tmp_path):
    """The digest is of the version before `test_fraction`, of every file with its name."""
    records = [{"text": text, "source_file": f"book {n // 4}"} for n, text in enumerate(texts)]
    path = tmp_path / "a.jsonl"
    path.write_bytes("".join(json.dumps(record) + "\n" for record in records).encode())
    prepare([str(path)], tmp_path / "out", val_fraction=0.2, shard_tokens=500)
    digest = hashlib.sha256()
    for name, data in shard_bytes(tmp_path / "out").items():
        digest.update(name.encode() + data)
    assert digest.hexdigest() == "050ee7b5e08d791d29c79f7e0c20e6b777588c8a1d8181c35d49a057c2b36599"


def test_a_split_depends_on_its_own_fraction_alone(named, texts, tmp_path):
    def made(**fractions):
        out = tmp_path / "-".join(map(str, fractions.values()))
        manifest = prepare([named], out, **fractions)
        found = {name: decoded(out, name, TOKENIZER) for name in manifest.splits}
        assert sorted(chain(*found.values())) == sorted(texts)
        counts = {name: split.documents for name, split in manifest.splits.items()}
        assert counts == {name: len(documents) for name, documents in found.items()}
        return found

    two = made(val_fraction=0.3)
    three = made(val_fraction=0.3, test_fraction=0.2)
    other = made(val_fraction=0.1, test_fraction=0.2)
    larger = made(val_fraction=0.3, test_fraction=0.4)
    assert list(two) == ["train", "val"]
    assert list(three) == list(NAMES)
    assert all(len(three[name]) >= 5 for name in NAMES)
    assert two["val"] == three["val"] == larger["val"]
    assert len(other["val"]) < len(three["val"])
    assert three["test"] == other["test"]
    assert set(three["test"]) < set(larger["test"])
    assert set(three["test"]) < set(two["train"])


def test_fractions_are_shares_of_the_documents():
    fractions = Fractions(0.2, 0.3)
    splits = [fractions.split_of(str(number).encode()) for number in range(10_000)]
    # Three standard errors of the largest share are 0.015.
    for name, share in zip(NAMES, (0.5, 0.2, 0.3), strict=True):
        assert splits.count(name) / 10_000 == pytest.approx(share, abs=0.015)


def test_test_documents_have_their_sources_beside_them(named, texts, tmp_path):
    prepare([named], tmp_path / "out", val_fraction=0.3, test_fraction=0.3)
    for name in ("val", "test"):
        found = decoded(tmp_path / "out", name, TOKENIZER)
        lines = (tmp_path / "out" / f"{name}.sources.txt").read_text().splitlines()
        assert lines == [f"book {texts.index(text) // 4}" for text in found]
    assert not (tmp_path / "out" / "train.sources.txt").exists()


@pytest.mark.parametrize(
    ("max_tokens", "processes"), [(600, 1), pytest.param(None, 2, marks=pytest.mark.slow)]
)
def test_three_splits_are_the_same_bytes_after_stops_and_in_processes(
    max_tokens, processes, named, tmp_path, monkeypatch
):
    settings = {
        "val_fraction": 0.1,
        "test_fraction": 0.3,
        "shard_tokens": 200,
        "max_tokens": max_tokens,
    }
    monkeypatch.setattr(prepare_module, "LEAST_TEST_TOKENS", 0)
    whole = prepare([named], tmp_path / "whole", **settings)
    if max_tokens is not None:
        everything = prepare([named], tmp_path / "all", **{**settings, "max_tokens": None})
        train, test = (read_split(tmp_path / "whole", name) for name in ("train", "test"))
        ends = (train == whole.eot_id).nonzero()[0] + 1
        assert len(train) >= max_tokens > ends[-2]
        assert 0 < len(test) < everything.splits["test"].tokens
        assert test.tolist() == read_split(tmp_path / "all", "test")[: len(test)].tolist()

    monkeypatch.setattr(encode_module, "CHUNK_DOCUMENTS", 3)
    monkeypatch.setattr(prepare_module, "CHECKPOINT_CHUNKS", 2)
    add, left = ShardWriter.add, 0

    def stopping(*arguments):
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        add(*arguments)

    monkeypatch.setattr(ShardWriter, "add", stopping)
    for stop in (7, 8):  # the second goes on from what the first recorded
        left = stop
        with pytest.raises(KeyboardInterrupt):
            prepare([named], tmp_path / "out", **settings)
    monkeypatch.setattr(ShardWriter, "add", add)
    prepare([named], tmp_path / "out", **settings, processes=processes)
    assert shard_bytes(tmp_path / "out") == shard_bytes(tmp_path / "whole")


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize(("first", "second"), [(0, 0.3), (0.3, 0), (0.3, 0.2)])
def test_a_test_split_is_neither_added_to_a_folder_nor_taken_away(
    begun, first, second, named, tmp_path, monkeypatch
):
    def run(test_fraction):
        return prepare([named], out, val_fraction=0.2, test_fraction=test_fraction)

    def stop(*_):
        raise KeyboardInterrupt

    out = tmp_path / "out"
    monkeypatch.setattr(prepare_module, "CHECKPOINT_CHUNKS", 1)
    with monkeypatch.context() as patch:
        if begun:
            patch.setattr(ShardWriter, "finish", stop)
        with pytest.raises(KeyboardInterrupt) if begun else nullcontext():
            run(first)
    before = shard_bytes(out)
    assert "different settings (test_fraction)" in user_error(lambda: run(second))
    assert shard_bytes(out) == before
    assert run(first) == Manifest.load(out)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"test_fraction": 1}, "--test-fraction must be"),
        ({"test_fraction": -0.1}, "--test-fraction must be"),
        ({"val_fraction": 0.7, "test_fraction": 0.3}, "leave nothing to train on"),
        ({"val_fraction": 0.9, "test_fraction": 0.9}, "leave nothing to train on"),
        ({"test_fraction": 1e-5, "max_tokens": 10**7}, "a test split of about 101 tokens"),
    ],
)
def test_fractions_that_cannot_be_are_refused_before_anything_is_read(settings, expected, tmp_path):
    message = user_error(lambda: prepare(["no/such.txt"], tmp_path / "out", **settings))
    assert message.startswith("--")
    assert expected in message


def test_a_test_split_of_few_documents_says_so_and_leaves_the_folder_usable(named, tmp_path):
    out = tmp_path / "out"
    message = user_error(lambda: prepare([named], out, val_fraction=0.2, test_fraction=1e-9))
    assert message.startswith("0 of the 40 documents fell into the test split")
    message = user_error(lambda: prepare([named], out, val_fraction=0.2, test_fraction=0.05))
    assert "it needs 5: raise --test-fraction" in message
    assert not list(out.glob("*.bin"))
    assert not list(out.glob("*.sources.txt"))
    message = user_error(lambda: prepare([named], out, val_fraction=0.5, test_fraction=0.5 - 1e-9))
    assert "lower --val-fraction or --test-fraction" in message
    assert list(prepare([named], out, val_fraction=0.2).splits) == ["train", "val"]
    assert prepare_module.LEAST_TEST_DOCUMENTS == FEWEST  # with that many there is an interval


def test_the_command_makes_three_splits_that_open(named, tmp_path, capsys):
    words = ["prepare", named, "--out", str(tmp_path / "out")]
    fractions = ["--val-fraction", "0.3", "--test-fraction", "0.2"]
    assert deep_delta_cli.main([*words, *fractions]) == 0
    summary = capsys.readouterr().err
    for name in NAMES:
        opened = TokenShards.open(tmp_path / "out", name)
        ids = read_split(tmp_path / "out", name)
        assert opened.tokens(0, len(opened)).tolist() == ids.tolist()
        documents = opened.manifest.splits[name].documents
        assert f"{name} {documents:,} documents, {len(ids):,} tokens" in summary
    assert deep_delta_cli.main([*words, "--val-fraction", "0.6", "--test-fraction", "0.4"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_a_split_that_is_not_there_is_named_with_those_that_are(named, tmp_path):
    prepare([named], tmp_path / "two", val_fraction=0.2)
    message = user_error(lambda: TokenShards.open(tmp_path / "two", "test"))
    assert 'no tokens in the split "test", only in "train" and "val":' in message
    assert "--test-fraction" in message
    prepare([named], tmp_path / "other", val_fraction=0, test_fraction=0.2)
    message = user_error(lambda: TokenShards.open(tmp_path / "other", "val"))
    assert 'no tokens in the split "val", only in "train" and "test":' in message
