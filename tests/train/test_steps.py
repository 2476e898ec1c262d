"""What a training step does: its batch, its loss, its update."""

import json
import math

import pytest
import torch
from train.micro import equal_weights, losses, micro_recipe, rows_of, weights
from transformers import set_seed

from deep_delta import DeepDeltaForCausalLM
from deep_delta.data import PackedSequences, TokenShards
from deep_delta.train import model_config, train
from deep_delta.train.loop import Loop


@pytest.mark.parametrize("fields", [{}, {"mask_documents": True}], ids=["packed", "masked"])
def test_the_first_loss_is_the_models_own(micro_data, tmp_path, batches, fields):
    recipe = micro_recipe(micro_data, tmp_path, steps=1, **fields)
    train(recipe)
    set_seed(recipe.seed)
    model = DeepDeltaForCausalLM(model_config(recipe))
    shards = TokenShards.open(micro_data, "train")
    data = PackedSequences(shards, 16, mask_documents=recipe.mask_documents)
    by_ids = {tuple(item["input_ids"].tolist()): item for item in data}
    items = [by_ids[tuple(row)] for row in batches[0].tolist()]
    batch = {name: torch.stack([item[name] for item in items]) for name in items[0]}
    expected = model(**batch).loss.item()
    assert rows_of(recipe.run_folder, "loss")[0]["loss"] == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("fields", [{}, {"mask_documents": True}], ids=["packed", "masked"])
def test_gradient_accumulation_changes_nothing(micro_data, tmp_path, fields):
    whole = micro_recipe(micro_data, tmp_path / "whole", micro_batch_size=4, **fields)
    parts = micro_recipe(micro_data, tmp_path / "parts", micro_batch_size=1, **fields)
    train(whole)
    train(parts)
    for row, other in zip(losses(whole.run_folder), losses(parts.run_folder), strict=True):
        assert row[:2] == other[:2]
        assert row[2] == pytest.approx(other[2], abs=1e-5)
    equal_weights(whole.run_folder, parts.run_folder, atol=1e-5)


def test_every_step_has_a_whole_batch_across_epochs(micro_data, tmp_path, batches):
    """With accumulation too, where an epoch does not end on a batch's border."""
    sequences = len(TokenShards.open(micro_data, "train")) // 16
    size = 20
    assert sequences % size
    orders = []
    for micro in (10, 20):
        batches.clear()
        out = tmp_path / f"micro-{micro}"
        fields = {"steps": 6, "batch_size": size, "micro_batch_size": micro, "eval_sequences": 20}
        train(micro_recipe(micro_data, out, variant="additive", **fields))
        orders.append(torch.cat(batches))
        assert len(orders[-1]) == 6 * size
    assert torch.equal(*orders)


def test_variants_of_a_seed_see_the_same_data_in_the_same_order(micro_data, tmp_path, batches):
    orders = {}
    for variant, seed in [("ddl-tc", 0), ("additive", 0), ("additive", 1)]:
        batches.clear()
        train(micro_recipe(micro_data, tmp_path, variant=variant, seed=seed, steps=30))
        orders[variant, seed] = torch.stack(batches)
    assert torch.equal(orders["ddl-tc", 0], orders["additive", 0])
    assert not torch.equal(orders["additive", 0], orders["additive", 1])
    # An epoch is 24 steps: it is in another order than the data's, and the next in yet another.
    data = PackedSequences(TokenShards.open(micro_data, "train"), 16)
    first = torch.stack([item["input_ids"] for item in data])[: 4 * 6].view(6, 4, 16)
    assert not torch.equal(orders["additive", 0][:6], first)
    assert not torch.equal(orders["additive", 0][24:], orders["additive", 0][:6])


@pytest.mark.parametrize("decay_residual", [True, False])
def test_weight_decay_is_on_matrices_only(micro_data, tmp_path, decay_residual, monkeypatch):
    groups = {}
    step = Loop.train_step

    def recorded(self):
        names = {id(p): name for name, p in self.model.named_parameters()}
        for group in self.optimizer.param_groups:
            groups.update({names[id(p)]: group["weight_decay"] for p in group["params"]})
            assert group["betas"] == (0.8, 0.9)
        return step(self)

    monkeypatch.setattr(Loop, "train_step", recorded)
    fields = {"decay_residual": decay_residual, "weight_decay": 0.3, "beta1": 0.8, "beta2": 0.9}
    recipe = micro_recipe(micro_data, tmp_path, steps=1, **fields)
    train(recipe)
    listing = json.loads((recipe.run_folder / "weight_decay.json").read_text())
    model = DeepDeltaForCausalLM(model_config(recipe))
    shapes = {name: list(p.shape) for name, p in model.named_parameters()}
    assert listing["decayed"] | listing["not_decayed"] == shapes
    of_residual = ("expand.", "_residual.", "readout.")
    expected = {
        name
        for name, shape in shapes.items()
        if len(shape) >= 2 and (decay_residual or not any(part in name for part in of_residual))
    }
    assert {"model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"} <= expected
    assert any(part in name for name in shapes for part in of_residual)
    assert listing["decayed"].keys() == expected
    assert {name for name, decay in groups.items() if decay == 0.3} == expected
    assert {name for name, decay in groups.items() if decay == 0} == shapes.keys() - expected


def test_the_learning_rate_warms_up_and_falls_to_its_ratio(micro_data, tmp_path):
    fields = {"steps": 10, "lr": 0.01, "min_lr_ratio": 0.3, "warmup_steps": 4, "eval_every": 10}
    recipe = micro_recipe(micro_data, tmp_path, **fields)
    train(recipe)
    rates = [row["lr"] for row in rows_of(recipe.run_folder, "loss")]
    assert rates[:4] == pytest.approx([0.0025, 0.005, 0.0075, 0.01])
    cosine = [0.003 + 0.007 * 0.5 * (1 + math.cos(math.pi * step / 6)) for step in range(6)]
    assert rates[4:] == pytest.approx(cosine)


@pytest.mark.parametrize("warmup_steps", [0, 5])
def test_the_first_step_updates(micro_data, tmp_path, warmup_steps):
    recipe = micro_recipe(micro_data, tmp_path, steps=1, warmup_steps=warmup_steps)
    train(recipe)
    set_seed(recipe.seed)
    before = DeepDeltaForCausalLM(model_config(recipe)).state_dict()
    after = weights(recipe.run_folder)
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(before[name], after[name])


@pytest.mark.parametrize("variant", ["ddl-tc", "additive-expanded"])
def test_a_run_repeats_bit_by_bit(micro_data, tmp_path, variant):
    runs = [micro_recipe(micro_data, tmp_path / name, variant=variant) for name in "ab"]
    for recipe in runs:
        train(recipe)
    first, second = (recipe.run_folder for recipe in runs)
    assert losses(first) == losses(second)
    equal_weights(first, second)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_precision_and_checkpointing_train(micro_data, tmp_path, precision):
    recipe = micro_recipe(
        micro_data, tmp_path, precision=precision, gradient_checkpointing=True, lr=0.02, steps=12
    )
    train(recipe)
    rows = [row["loss"] for row in rows_of(recipe.run_folder, "loss")]
    assert rows[-1] < rows[0] - 1
    assert {tensor.dtype for tensor in weights(recipe.run_folder).values()} == {torch.float32}


@pytest.mark.parametrize("seed", [0, 2**32 - 1])
def test_dropout_is_the_steps_own(micro_data, tmp_path, seed):
    """What came before a step, and how often it was resumed, changes nothing of it."""
    fields = {"model": {"attention_dropout": 0.3}, "save_every": 3, "seed": seed}
    whole = micro_recipe(micro_data, tmp_path / "whole", **fields)
    train(whole)
    start = str(whole.run_folder / "checkpoint-3")
    rest = micro_recipe(micro_data, tmp_path / "rest", resume=start, **fields)
    train(rest)
    assert losses(rest.run_folder) == [row for row in losses(whole.run_folder) if row[0] > 3]
    plain = micro_recipe(micro_data, tmp_path / "plain", seed=seed)
    train(plain)
    assert losses(plain.run_folder) != losses(whole.run_folder)
