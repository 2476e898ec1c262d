"""Loss, perplexity and bits per byte against a loop by hand; windows and intervals."""

import dataclasses
import json
import math
import shutil

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from train.micro import some_text, user_error

from deep_delta.data import Manifest, prepare
from deep_delta.evaluate.bootstrap import FEWEST, ratio_intervals
from deep_delta.evaluate.checkpoint import load_checkpoint
from deep_delta.evaluate.text_loss import text_loss
from deep_delta.evaluate.windows import windows


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return load_checkpoint(checkpoint)


def documents_of(folder):
    """The ids of each validation document, read without the code under test."""
    manifest = Manifest.load(folder)
    ids = np.fromfile(folder / "val-00000.bin", manifest.dtype).astype(np.int64)
    ends = np.flatnonzero(ids == manifest.eot_id)
    starts = [0, *(ends[:-1] + 1)]
    return [ids[a:b].tolist() for a, b in zip(starts, ends, strict=True)], manifest.eot_id


@torch.no_grad()
def nats_by_hand(model, ids, eot, context):
    """One token at a time, with the context that its window gives it."""
    total, done = 0.0, 0
    given = [eot, *ids]
    while done < len(ids):
        stop = min(len(ids), context if done == 0 else done + context // 2)
        start = max(0, stop - context)
        for token in range(done, stop):
            logits = model(torch.tensor([given[start : token + 1]])).logits[0, -1].double()
            total -= float(logits.log_softmax(-1)[ids[token]])
        done = stop
    return total


@pytest.mark.parametrize("context", [48, 7])
def test_loss_is_that_of_a_loop_by_hand(loaded, data, context):
    documents, eot = documents_of(data)
    result = text_loss(loaded, data, "val", context, batch_size=3, limit=6)
    nats = [nats_by_hand(loaded.model, ids, eot, context) for ids in documents[:6]]
    tokens = sum(len(ids) for ids in documents[:6])
    tokenizer = Tokenizer.from_file(str(data / "tokenizer.json"))
    text = "".join(tokenizer.decode(ids) for ids in documents[:6])
    assert result["loss"]["mean"] == pytest.approx(sum(nats) / tokens, rel=1e-6)
    assert result["perplexity"]["mean"] == pytest.approx(math.exp(sum(nats) / tokens), rel=1e-5)
    bits = sum(nats) / math.log(2) / len(text.encode())
    assert result["bits_per_byte"]["mean"] == pytest.approx(bits, rel=1e-6)
    assert (result["documents"], result["tokens"]) == (6, tokens)
    assert result["bytes"] == len(text.encode())
    assert result["loss"]["low"] < result["loss"]["mean"] < result["loss"]["high"]


def test_everything_is_counted_and_batches_change_nothing(loaded, data):
    split = Manifest.load(data).splits["val"]
    one, many = (
        text_loss(loaded, data, "val", 16, batch_size=size, limit=None) for size in (1, 64)
    )
    assert one["documents"] == split.documents
    assert one["tokens"] == split.tokens - split.documents
    assert one["bytes"] == split.text_bytes
    assert one["loss"]["mean"] == pytest.approx(many["loss"]["mean"], rel=1e-6)


@pytest.mark.parametrize("context", [2, 5, 8])
@pytest.mark.parametrize("tokens", [0, 1, 5, 8, 9, 31])
def test_windows_count_each_token_once_and_look_back_far_enough(tokens, context):
    cut = list(windows(3, tokens, context))
    counted = [token for window in cut for token in range(window.first, window.stop)]
    assert counted == list(range(tokens))
    for window in cut:
        assert window.document == 3
        assert 0 <= window.start <= window.first < window.stop
        assert window.stop - window.start <= context
        seen = window.first + 1 - window.start  # inputs that its first counted token sees
        assert window.start == 0 or seen > context - context // 2 - 1


def test_intervals_cover_what_they_should():
    generator = np.random.default_rng(1)
    hits = 0
    for seed in range(60):
        sizes = generator.integers(1, 50, 80).astype(float)
        sums = sizes * 3 + generator.normal(0, 1, 80) * np.sqrt(sizes)
        (interval,) = ratio_intervals(sums, [sizes], 0.95, seed)
        assert interval is not None
        hits += interval[0] < 3 < interval[1]
    assert hits >= 50
    few = np.ones(FEWEST - 1)
    assert ratio_intervals(few, [few, few], 0.95) == [None, None]


def test_sources_are_resampled_whole(loaded, data, tmp_path):
    folder = shutil.copytree(data, tmp_path / "named")
    plain = text_loss(loaded, folder, "val", 16, 16, None)
    assert (plain["grouped_by"], plain["groups"]) == ("document", plain["documents"])
    names = [f"book-{number % 6}" for number in range(plain["documents"])]
    (folder / "val.sources.txt").write_text("\n".join(names) + "\n")
    grouped = text_loss(loaded, folder, "val", 16, 16, None)
    assert (grouped["grouped_by"], grouped["groups"]) == ("source", 6)
    assert grouped["loss"]["mean"] == plain["loss"]["mean"]
    assert grouped["loss"]["low"] != plain["loss"]["low"]
    (folder / "val.sources.txt").write_text("one\n")
    assert "needs a line each" in user_error(lambda: text_loss(loaded, folder, "val", 16, 16, None))


def test_sources_come_from_prepare(loaded, tmp_path):
    records = [
        {"text": some_text(20, seed), "source": "books", "source_file": f"book {seed % 7}"}
        for seed in range(40)
    ]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "books.jsonl").write_text(lines, encoding="utf-8")
    prepare([str(tmp_path / "books.jsonl")], tmp_path / "out", val_fraction=0.7)
    result = text_loss(loaded, tmp_path / "out", "val", 16, 16, None)
    assert (result["grouped_by"], result["groups"]) == ("source", 7)
    assert result["documents"] > 20
    assert result["loss"]["low"] < result["loss"]["mean"] < result["loss"]["high"]
    (tmp_path / "out" / "val.sources.txt").unlink()
    assert text_loss(loaded, tmp_path / "out", "val", 16, 16, None)["grouped_by"] == "document"


def test_the_test_split_is_read_when_it_is_asked_for(loaded, tmp_path):
    records = [{"text": some_text(20, seed), "source_file": f"{seed}"} for seed in range(40)]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    out = tmp_path / "out"
    prepare([str(tmp_path / "a.jsonl")], out, val_fraction=0.3, test_fraction=0.4)
    (out / "val.sources.txt").unlink()
    found = text_loss(loaded, out, "test", 16, 16, None)
    assert (found["grouped_by"], found["groups"]) == ("source", found["documents"])
    assert found["documents"] == Manifest.load(out).splits["test"].documents
    # The same documents as the validation split of a folder give the same.
    for kind in (".sources.txt", "-00000.bin"):
        (out / f"test{kind}").replace(out / f"val{kind}")
    record = json.loads((out / "manifest.json").read_text())
    record["splits"]["val"] = record["splits"].pop("test")
    record["splits"]["val"]["shards"][0]["name"] = "val-00000.bin"
    (out / "manifest.json").write_text(json.dumps(record))
    assert text_loss(loaded, out, "val", 16, 16, None) == found


def test_another_tokenizer_is_refused(loaded, data, tmp_path):
    Tokenizer(models.WordLevel({"one": 0}, "one")).save(str(tmp_path / "tokenizer.json"))
    other = dataclasses.replace(loaded, folder=tmp_path)
    assert "another tokenizer" in user_error(lambda: text_loss(other, data, "val", 16, 16, 1))


def test_a_diverged_model_is_one_line(checkpoint, data):
    broken = load_checkpoint(checkpoint)
    broken.model.model.norm.weight.data.fill_(math.nan)
    assert "no numbers" in user_error(lambda: text_loss(broken, data, "val", 16, 16, 2))
