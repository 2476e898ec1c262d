"""One training run: what it leaves behind, and what it refuses."""

import dataclasses
import hashlib
import itertools
import json
import math
import shutil
import time
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
from train.micro import micro_recipe, rows_of, some_text, user_error
from transformers import AutoModelForCausalLM, AutoTokenizer

from deep_delta import DeepDeltaForCausalLM
from deep_delta.data import PackedSequences, TokenShards, prepare
from deep_delta.data.shards import spread
from deep_delta.train import load_recipe, loop, metrics, read_metrics, read_result, train
from deep_delta.train.loop import Loop
from deep_delta.train.metrics import Metrics
from deep_delta.train.progress import ProgressLine


def test_a_run_folder_is_complete(micro_data, tmp_path):
    recipe = micro_recipe(micro_data, tmp_path)
    result = train(recipe)
    folder = tmp_path / "ddl-cc" / "seed-0"
    assert {path.name for path in folder.iterdir()} == {
        "recipe.yaml", "data.json", "metrics.jsonl", "weight_decay.json", "result.json", "final",
        "tensorboard",
    }  # fmt: skip
    assert load_recipe(folder / "recipe.yaml") == recipe
    assert read_result(folder) == result
    model = AutoModelForCausalLM.from_pretrained(folder / "final")
    assert isinstance(model, DeepDeltaForCausalLM)
    assert (model.config.value_channels, model.config.hidden_size) == (4, 16)
    assert result.parameters == sum(p.numel() for p in model.parameters())
    tokenizer = AutoTokenizer.from_pretrained(folder / "final")
    assert tokenizer.eos_token_id == TokenShards.open(micro_data, "val").manifest.eot_id
    assert tokenizer.decode(tokenizer("the quiet river")["input_ids"]) == "the quiet river"


def test_metrics_are_complete_and_in_order(micro_data, tmp_path):
    recipe = micro_recipe(micro_data, tmp_path, log_every=2)
    result = train(recipe)
    rows, evaluated = rows_of(recipe.run_folder, "loss"), rows_of(recipe.run_folder, "val_loss")
    # An evaluation is preceded by a row of the same step, so that it is not timed.
    assert [row["step"] for row in rows] == [2, 3, 4, 6]
    assert [row["step"] for row in evaluated] == [3, 6]
    keys = {"step", "tokens", "flops", "seconds", "loss", "lr", "grad_norm", "tokens_per_s"}
    assert all(row.keys() == keys for row in rows)
    assert all(
        row.keys() == {"step", "tokens", "flops", "seconds", "val_loss"} for row in evaluated
    )
    assert all(row["tokens"] == row["step"] * 4 * 16 for row in rows + evaluated)
    assert all(row["flops"] == row["tokens"] * result.flops_per_token for row in rows + evaluated)
    seconds = [row["seconds"] for row in rows]
    assert all(later > earlier > 0 for earlier, later in itertools.pairwise(seconds))
    assert evaluated[-1]["seconds"] == seconds[-1] == result.train_seconds
    assert (result.tokens, result.val_loss) == (rows[-1]["tokens"], evaluated[-1]["val_loss"])
    # Without the first interval, which warms up.
    speed = (6 - 2) * 4 * 16 / (seconds[-1] - seconds[0])
    assert result.tokens_per_s == pytest.approx(speed)


@pytest.mark.parametrize(("name", "known"), [("NVIDIA H100 80GB HBM3", True), ("Another", False)])
def test_a_gpus_memory_and_utilisation_are_logged(tmp_path, monkeypatch, name, known):
    cuda = SimpleNamespace(is_available=lambda: True, get_device_name=lambda: name)
    monkeypatch.setattr(metrics, "torch", SimpleNamespace(cuda=cuda))
    memory = SimpleNamespace(so_far=lambda: 7)
    writer = Metrics(tmp_path / "rows", 100, 1e9, 0, 2, memory, ProgressLine("x", 9), also=print)
    writer.start_clock()
    writer.trained(3, loss=1.0, lr=1e-3, grad_norm=1.0)
    (row,) = read_metrics(tmp_path / "rows")
    assert (row["flops"], row["memory_bytes"]) == (300e9, 7)
    assert ("mfu" in row) is known
    if known:  # two GPUs share the work
        assert row["mfu"] == pytest.approx(row["tokens_per_s"] * 1e9 / 2 / 989e12, rel=1e-3)


def test_a_cut_off_last_line_of_metrics_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 2}]
    assert read_metrics(tmp_path / "none.jsonl") == []


# In batches of 4: 7 sequences leave a smaller batch, which must weigh less; 3 are less than one.
@pytest.mark.parametrize("sequences", [7, 3])
@pytest.mark.parametrize("mask_documents", [False, True], ids=["packed", "masked"])
def test_validation_loss_is_the_mean_over_predicted_tokens(
    micro_data, tmp_path, mask_documents, sequences
):
    fields = {"mask_documents": mask_documents, "eval_sequences": sequences}
    recipe = micro_recipe(micro_data, tmp_path, **fields)
    result = train(recipe)
    model = AutoModelForCausalLM.from_pretrained(recipe.run_folder / "final").eval()
    shards = TokenShards.open(micro_data, "val")
    data = PackedSequences(shards, 16, mask_documents=mask_documents)
    total, tokens = 0.0, 0
    for index in spread(sequences, len(data)):
        item = {name: tensor[None] for name, tensor in data[index].items()}
        labels = item.pop("labels")[0, 1:]
        with torch.no_grad():
            logits = model(**item).logits[0, :-1].double()
        total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        tokens += int((labels != -100).sum())
    assert result.val_loss == pytest.approx(total / tokens, abs=2e-6)


def test_a_diverged_run_stops_and_says_where(micro_data, tmp_path, monkeypatch, batches):
    one_pass = Loop.forward_backward

    def overflowing(self, batch, count):
        return one_pass(self, batch, count) * (math.inf if self.step == 4 else 1)

    monkeypatch.setattr(Loop, "forward_backward", overflowing)
    # Rows are logged every third step only: the step is found all the same.
    fields = {"micro_batch_size": 2, "log_every": 3, "save_every": 2, "eval_every": 6}
    recipe = micro_recipe(micro_data, tmp_path, **fields)
    message = user_error(train, recipe)
    folder = recipe.run_folder
    assert message.startswith("the loss is ")
    assert " at step 5; its batch: " in message
    assert message.endswith(f"last good checkpoint: {folder / 'checkpoint-4'}")
    report = json.loads((folder / "diverged.json").read_text())
    assert (report["step"], report["checkpoint"]) == (5, "checkpoint-4")
    shards = TokenShards.open(micro_data, "train")
    seen = torch.cat(batches[8:10])  # two passes of two sequences
    for place, ids in zip(report["sequences"], seen, strict=True):
        start = place["sequence"] * recipe.seq_len
        assert (place["shard"], place["token"]) == shards.place(start)
        assert shards.tokens(start, start + recipe.seq_len).tolist() == ids.tolist()
        assert f"{place['shard']} from token {place['token']:,}" in message
    assert rows_of(folder, "loss")[-1]["loss"] is None
    assert read_result(folder).val_loss is None
    monkeypatch.undo()
    assert user_error(train, recipe) == message, "it is not trained again"


def test_a_gradient_that_is_no_number_is_found_before_the_loss_it_spoils(
    micro_data, tmp_path, monkeypatch
):
    one_pass = Loop.forward_backward

    def poisonous(self, batch, count):
        loss = one_pass(self, batch, count)
        if self.step == 3:
            weight = next(p for p in self.model.parameters() if p.grad is not None)
            weight.grad.view(-1)[0] = math.inf
            poisoned.extend(self.order(3))
        return loss

    poisoned: list[int] = []
    monkeypatch.setattr(Loop, "forward_backward", poisonous)
    recipe = micro_recipe(micro_data, tmp_path, log_every=6, eval_every=6)
    assert user_error(train, recipe).startswith("the gradient norm is inf at step 4; its batch: ")
    report = json.loads((recipe.run_folder / "diverged.json").read_text())
    assert report["gradient norm"] == "inf"
    assert [place["sequence"] for place in report["sequences"]] == poisoned


@pytest.mark.slow
def test_waiting_for_data_is_training_time_and_saving_is_not(micro_data, tmp_path, monkeypatch):
    collate, save = loop.collate, loop.save_checkpoint

    def slow_collate(data, sequences, device):
        time.sleep(0.02 * len(sequences))
        return collate(data, sequences, device)

    def slow_save(*arguments):
        time.sleep(3)
        return save(*arguments)

    monkeypatch.setattr(loop, "collate", slow_collate)
    monkeypatch.setattr(loop, "save_checkpoint", slow_save)
    recipe = micro_recipe(micro_data, tmp_path, save_every=3)
    assert 6 * 4 * 0.02 < train(recipe).train_seconds < 3


def test_a_gradient_that_is_no_number_stops_before_it_is_saved(micro_data, tmp_path):
    recipe = micro_recipe(micro_data, tmp_path, lr=1e30, clip=1e30, warmup_steps=0, save_every=1)
    assert " is nan at step 2" in user_error(train, recipe)
    assert [path.name for path in recipe.run_folder.glob("checkpoint-*")] == ["checkpoint-1"]


def test_a_full_disk_is_one_line_before_training(micro_data, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2**40, 2**40, 1000))
    recipe = micro_recipe(micro_data, tmp_path)
    assert "MiB free" in user_error(train, recipe)
    assert not (recipe.run_folder / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"micro_batch_size": 3}, "micro_batch_size"),
        ({"batch_size": 1000}, "fewer than one batch"),
        ({"seq_len": 5000}, "fewer than one sequence"),
        ({"model": {"vocab_size": 100}}, "vocabulary of 100"),
        ({"model": {"num_attention_heads": 0}}, "num_attention_heads"),
        ({"model": {"value_channels": 1}}, "compressor"),
        ({"size": "smal"}, "did you mean 'small'"),
        ({"cuda_graphs": True}, "cuda_graphs needs one process and a GPU"),
    ],
)
def test_what_does_not_fit_is_one_line_and_can_be_mended(micro_data, tmp_path, fields, expected):
    recipe = micro_recipe(micro_data, tmp_path, **fields)
    assert expected in user_error(train, recipe)
    assert train(micro_recipe(micro_data, tmp_path)).tokens == 6 * 4 * 16


@pytest.fixture(scope="module")
def other_text(tmp_path_factory):
    """Prepared text of its own, with a test split and without."""
    folder = tmp_path_factory.mktemp("other")
    lines = [json.dumps({"text": some_text(10 + seed % 30, seed)}) for seed in range(200, 260)]
    source = folder / "documents.jsonl"
    source.write_text("\n".join(lines) + "\n", encoding="utf-8")
    for name, test in (("with", 0.3), ("without", 0.0)):
        prepare([str(source)], folder / name, val_fraction=0.2, test_fraction=test)
    return folder


def loss_on(folder, shards):
    model = AutoModelForCausalLM.from_pretrained(folder / "final").eval()
    rows = torch.stack([item["input_ids"] for item in PackedSequences(shards, 16)])
    with torch.no_grad():
        return model(rows, labels=rows).loss.item()


@pytest.mark.parametrize(
    ("data", "test_data", "read"),
    [
        ("with", None, ("with", "test")),
        ("without", None, None),
        ("without", "with", ("with", "test")),
        ("with", "without", ("without", "val")),
    ],
)
def test_test_text_is_evaluated_whole_at_the_end(other_text, tmp_path, data, test_data, read):
    named = None if test_data is None else str(other_text / test_data)
    recipe = micro_recipe(other_text / data, tmp_path, test_data=named, eval_sequences=2)
    result = train(recipe)
    if read is None:
        assert result.test_loss is None
        return
    shards = TokenShards.open(other_text / read[0], read[1])
    assert result.test_loss == pytest.approx(loss_on(recipe.run_folder, shards), abs=2e-6)
    assert read_result(recipe.run_folder).test_loss == result.test_loss


def test_another_test_text_is_another_run(other_text, tmp_path):
    recipe = micro_recipe(other_text / "without", tmp_path, test_data=str(other_text / "with"))
    train(recipe)
    other = dataclasses.replace(recipe, test_data=str(other_text / "without"))
    assert "other data" in user_error(train, other)


def test_test_text_must_be_there_and_of_the_same_tokenizer(other_text, tmp_path):
    recipe = micro_recipe(other_text / "without", tmp_path, test_data=str(tmp_path / "nowhere"))
    assert "nowhere" in user_error(train, recipe)
    foreign = tmp_path / "foreign"
    shutil.copytree(other_text / "with", foreign)
    manifest = json.loads((foreign / "manifest.json").read_text())
    text = (foreign / "tokenizer.json").read_text() + " "
    (foreign / "tokenizer.json").write_text(text)
    manifest["tokenizer_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (foreign / "manifest.json").write_text(json.dumps(manifest))
    line = user_error(train, dataclasses.replace(recipe, test_data=str(foreign)))
    assert "another tokenizer" in line
