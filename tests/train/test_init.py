"""Fine-tuning: a run that begins with a checkpoint's weights, and all else anew."""

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from helpers import CASES, close
from tokenizers import Tokenizer, models
from train.group import together
from train.micro import (
    MODEL,
    as_options,
    equal_weights,
    losses,
    micro_recipe,
    rows_of,
    some_text,
    user_error,
    weights,
)
from train.test_processes import same_curve, sharded, watched

from deep_delta import DeepDeltaConfig, DeepDeltaForCausalLM
from deep_delta.data import PackedSequences, TokenShards, prepare
from deep_delta.train import Interrupted, Recipe, load_recipe, model_config, resolved, train
from deep_delta.train.batches import Order, collate, predictions
from deep_delta.train.groups import parameter_groups
from deep_delta.train.model import MAY_CHANGE
from deep_delta_cli import main


@pytest.fixture(scope="module")
def final(micro_data, tmp_path_factory):
    """What a run of ddl-cc left."""
    recipe = micro_recipe(micro_data, tmp_path_factory.mktemp("first"), lr=3e-2, seed=5)
    train(recipe)
    return recipe.run_folder / "final"


@pytest.fixture(scope="module")
def other_data(tmp_path_factory):
    """Text of other words."""
    folder = tmp_path_factory.mktemp("other")
    lines = [
        json.dumps({"text": some_text(10 + seed % 30, seed).replace("e", "io")})
        for seed in range(100, 160)
    ]
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n")
    prepare([str(folder / "text.jsonl")], folder / "shards", val_fraction=0.25)
    return folder / "shards"


def tuning(data, out, start, **fields):
    """A micro recipe that says nothing of the model, as shipped ones do not."""
    also = {"init": str(start), "precision": "fp32", "trackers": "none"}
    recipe = micro_recipe(data, out, **{**also, **fields})
    return dataclasses.replace(recipe, model=fields.get("model", {}))


def save_checkpoint(folder, case="ddl-cc", **fields):
    """A checkpoint of a micro model that nobody trained."""
    torch.manual_seed(3)
    variant, options = CASES[case]
    config = DeepDeltaConfig.from_preset(variant, "tiny", **{**options, **MODEL, **fields})
    DeepDeltaForCausalLM(config).save_pretrained(folder)
    return folder


def first_batch(recipe):
    data = PackedSequences(TokenShards.open(Path(recipe.data), "train"), recipe.seq_len)
    order = Order(len(data), recipe.batch_size, recipe.seed)
    return collate(data, order(0), torch.device("cpu"))


def loss_and_update(start, recipe):
    """A checkpoint's loss on a recipe's first batch, and its weights after AdamW's first step."""
    model = DeepDeltaForCausalLM.from_pretrained(start).train()
    batch = first_batch(recipe)
    loss = model(**batch, num_items_in_batch=predictions(batch), use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
    groups = parameter_groups(model, recipe.lr, recipe.weight_decay, recipe.decay_residual)
    torch.optim.AdamW(groups, betas=(recipe.beta1, recipe.beta2)).step()
    return loss.item(), model.state_dict()


def begins_as_its_checkpoint(start, data, out, **fields):
    """Both follow from the checkpoint's weights, new moments and the first rate alone."""
    recipe = tuning(data, out, start, steps=1, warmup_steps=1, **fields)
    train(recipe)
    folder = resolved(recipe).run_folder
    loss, updated = loss_and_update(start, recipe)
    assert rows_of(folder, "loss")[0]["loss"] == pytest.approx(loss, abs=1e-5)
    for name, tensor in weights(folder).items():
        close(tensor, updated[name], 1e-5)


FEW = ("additive", "ddl-tc", "two-channels")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in FEW else pytest.mark.slow) for case in CASES]
)
def test_any_model_begins_with_its_weights_and_a_new_optimizer(micro_data, tmp_path, case):
    start = save_checkpoint(tmp_path / "start", case)
    begins_as_its_checkpoint(start, micro_data, tmp_path)


@pytest.mark.slow
def test_a_trained_one_forgets_its_moments(final, micro_data, tmp_path):
    begins_as_its_checkpoint(final, micro_data, tmp_path)
    checkpoint = tuning(micro_data, tmp_path / "long", final, steps=2, save_every=2)
    train(checkpoint)
    start = checkpoint.run_folder / "checkpoint-2"
    begins_as_its_checkpoint(start, micro_data, tmp_path / "from a checkpoint")


@pytest.mark.parametrize(
    "fields",
    [{"mup_base_width": 8}, {"tie_word_embeddings": False}, {"rope_theta": 500.0}],
    ids=str,
)
def test_other_configurations_begin_so_too(micro_data, tmp_path, fields):
    start = save_checkpoint(tmp_path / "start", **fields)
    begins_as_its_checkpoint(start, micro_data, tmp_path)


def test_weights_in_half_precision_are_trained_in_single(final, micro_data, tmp_path):
    half = DeepDeltaForCausalLM.from_pretrained(final, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    recipe = tuning(micro_data, tmp_path, tmp_path / "half", steps=1)
    train(recipe)
    assert {x.dtype for x in weights(resolved(recipe).run_folder).values()} == {torch.float32}


@pytest.mark.slow
def test_a_compiled_one_too(final, micro_data, tmp_path):
    begins_as_its_checkpoint(final, micro_data, tmp_path, compile=True)


def test_on_other_data_the_loss_falls(final, other_data, tmp_path):
    recipe = tuning(other_data, tmp_path, final, steps=30, lr=1e-2, eval_every=1)
    result = train(recipe)
    before = rows_of(recipe.run_folder, "val_loss")[0]["val_loss"]
    assert result.val_loss < before - 0.5
    after = rows_of(recipe.run_folder, "lr")
    assert [row["lr"] for row in after[:2]] == pytest.approx([5e-3, 1e-2])  # a schedule of its own


@pytest.mark.parametrize("case", ["additive", "write-only-tc", "two-channels", "layer-gate"])
def test_the_recipe_says_which_model_it_is(micro_data, tmp_path, case):
    """By itself it would make the same; the folder has the name that such a run has anyway."""
    start = save_checkpoint(tmp_path / "start", case, num_key_value_heads=1)
    recipe = tuning(micro_data, tmp_path, start, steps=1)
    train(recipe)
    (folder,) = tmp_path.glob("*/seed-0")
    assert folder.parent.name == CASES[case][0]
    written = load_recipe(folder / "recipe.yaml")
    assert (written.variant, written.size, written.init) == (CASES[case][0], "tiny", str(start))
    assert written.parameterization == "paper"
    saved = DeepDeltaConfig.from_pretrained(start)
    assert model_config(written).changes_from(saved) == {}
    assert resolved(written) == written
    train(written)  # is finished


def test_the_model_may_differ_in_what_leaves_the_weights(final, micro_data, tmp_path):
    fields = {
        "rebuild": 0, "backend": "reference", "state_dtype": "bfloat16",
        "max_position_embeddings": 999, "attention_dropout": 0.1,
    }  # fmt: skip
    assert fields.keys() == MAY_CHANGE
    recipe = tuning(micro_data, tmp_path, final, model=fields, steps=1)
    train(recipe)
    config = DeepDeltaConfig.from_pretrained(recipe.run_folder / "final")
    assert {name: getattr(config, name) for name in fields} == fields
    longer = tuning(micro_data, tmp_path, final, seq_len=300)
    assert model_config(resolved(longer)).max_position_embeddings == 300


def press_ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupted_run_goes_on_from_its_own_checkpoint(final, micro_data, tmp_path, at_pass):
    whole = tuning(micro_data, tmp_path / "whole", final)
    train(whole)
    recipe = tuning(micro_data, tmp_path / "cut", final)
    at_pass(4, press_ctrl_c)
    with pytest.raises(Interrupted):
        train(recipe)
    train(recipe)
    assert losses(recipe.run_folder) == losses(whole.run_folder)
    equal_weights(recipe.run_folder, whole.run_folder)


def test_what_starts_over_begins_with_the_same_weights(final, micro_data, tmp_path):
    recipe = tuning(micro_data, tmp_path, final, steps=1, resume="never")
    train(recipe)
    train(recipe)
    assert losses(recipe.run_folder) == losses(recipe.run_folder.with_name("seed-0.old-1"))


def test_other_weights_are_another_run(final, micro_data, tmp_path, at_pass):
    start = shutil.copytree(final, tmp_path / "start")
    recipe = tuning(micro_data, tmp_path, start)
    at_pass(4, press_ctrl_c)
    with pytest.raises(Interrupted):
        train(recipe)
    path, again = f"{tmp_path}/./start", dataclasses.replace(recipe, init=None, model=MODEL)
    for other, named in (
        (dataclasses.replace(recipe, init=path), f"init: {start} -> {path}"),
        (again, f"init: {start} -> None"),
    ):
        assert named in user_error(train, other)
    model = DeepDeltaForCausalLM.from_pretrained(start)
    model.lm_head.weight.data[0, 0] += 1
    model.save_pretrained(start)
    line = user_error(train, recipe)
    assert f"(other weights in {start})" in line
    shutil.copytree(final, start, dirs_exist_ok=True)
    train(recipe)


def edit(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def other_tokenizer(folder):
    Tokenizer(models.WordLevel({"one": 0, "two": 1}, "one")).save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (shutil.rmtree, "there is no checkpoint folder"),
        (lambda start: (start / "config.json").unlink(), "it has no config.json"),
        (lambda start: (start / "model.safetensors").unlink(), "has no weights"),
        (lambda start: (start / "model.safetensors").write_bytes(b"?"), "can't load"),
        (lambda start: edit(start / "config.json", model_type="gpt2"), "model type 'gpt2'"),
        (lambda start: edit(start / "config.json", gate_init=5), "can't load"),
        (lambda start: edit(start / "config.json", num_hidden_layers=2), "lacks"),
        (lambda start: edit(start / "config.json", vocab_size=99), "of 4,096 ids"),
        (other_tokenizer, "has another tokenizer than the data"),
    ],
)
def test_what_cannot_be_begun_with_is_one_line(final, micro_data, tmp_path, spoil, expected):
    start = shutil.copytree(final, tmp_path / "start")
    spoil(start)
    line = user_error(train, tuning(micro_data, tmp_path / "out", start))
    assert expected in line
    assert not list((tmp_path / "out").glob("*/seed-*"))


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({"hidden_size": 32}, "hidden_size is 16, not 32"),
        ({"gate": "layer"}, "gate is token, not layer"),
        ({"rope_theta": 7.0}, "rope_parameters"),
        ({"hiden_size": 16}, "did you mean 'hidden_size'?"),
    ],
)
def test_a_recipe_of_another_model_is_refused(final, micro_data, tmp_path, model, expected):
    assert expected in user_error(train, tuning(micro_data, tmp_path, final, model=model))
    assert not list(tmp_path.iterdir())


def test_what_the_recipe_repeats_is_no_contradiction(final, micro_data, tmp_path):
    recipe = tuning(micro_data, tmp_path, final, model={**MODEL, "erase": True})
    assert resolved(recipe).run_folder == tmp_path / "ddl-cc" / "seed-0"


def test_a_run_does_not_write_over_what_it_begins_with(final, micro_data):
    recipe = tuning(micro_data, final.parents[2], final, seed=5)
    for resume in ("auto", "never"):
        line = user_error(train, dataclasses.replace(recipe, resume=resume))
        assert line == (
            f"{final} lies in {final.parent}, the folder of this run: choose another --out"
        )


def command(data, out, start, *more):
    fields = {"data": data, "out": out, "init": start, "steps": 1, "batch_size": 2, "seq_len": 16}
    return main(["train", "tiny", *as_options(**fields), *more])


def test_names_count_where_they_are_said(final, micro_data, tmp_path, capsys):
    start = save_checkpoint(tmp_path / "start", "additive")
    same = ("--variant", "additive", "--size", "tiny", "--parameterization", "paper")
    assert command(micro_data, tmp_path, start, *same) == 0  # tiny's model is ddl-cc
    folder = tmp_path / "additive" / "seed-0"
    assert capsys.readouterr().out.splitlines()[-1] == str(folder / "final")
    for word, own, said in (
        ("variant", "additive", "ddl-cc"),
        ("size", "tiny", "small"),
        ("parameterization", "paper", "published"),
    ):
        assert command(micro_data, tmp_path / "no", start, f"--{word}", said) == 1
        line = capsys.readouterr().err
        assert f"the model of {start}, whose {word} is {own}, not {said}: leave that out" in line
        assert not (tmp_path / "no").exists()
    assert main(["compare", "--init", str(start)]) == 1
    assert "compare takes no --init" in capsys.readouterr().err


@pytest.mark.slow
def test_what_cannot_be_resumed_can_be_begun_with(final, micro_data, tmp_path):
    first = micro_recipe(micro_data, tmp_path / "first", steps=2, save_every=1, trackers="none")
    train(first)
    lone = shutil.copytree(first.run_folder / "checkpoint-1", tmp_path / "lone" / "checkpoint-1")
    for start, why in ((final, "is not named checkpoint-STEP"), (lone, "seq_len are not known")):
        again = dataclasses.replace(first, out=str(tmp_path / "second"), resume=str(start))
        line = user_error(train, again)
        assert line.startswith(str(start))
        assert why in line
        assert line.endswith(f" by --init {start}")
        assert not again.run_folder.exists()
        train(dataclasses.replace(again, resume="auto", init=str(start), out=str(start.parent)))


@pytest.mark.slow
def test_from_a_path_a_run_keeps_what_it_began_with(final, micro_data, tmp_path):
    first = tuning(micro_data, tmp_path / "first", final, save_every=3)
    train(first)
    start = str(first.run_folder / "checkpoint-3")
    second = dataclasses.replace(first, out=str(tmp_path / "second"), resume=start)
    train(second)
    assert losses(second.run_folder) == losses(first.run_folder)[-4:]
    other = dataclasses.replace(second, out=str(tmp_path / "third"), init=start)
    assert "give --init or --resume, not both" in user_error(train, other)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="needs a CPU alone, or two GPUs")
@pytest.mark.parametrize(
    ("way", "wrapper", "parallel"),
    [(watched, "DistributedDataParallel", "ddp"), (sharded, "FSDPDeepDeltaForCausalLM", "fsdp2")],
    ids=["ddp", "fsdp2"],
)
def test_two_processes_begin_as_one(final, micro_data, tmp_path, way, wrapper, parallel):
    alone = tuning(micro_data, tmp_path / "alone", final)
    train(alone)
    both = tuning(micro_data, tmp_path / "both", final, parallel=parallel)
    results = together(way, both)
    assert [wrappers for wrappers, _ in results] == [{wrapper}] * 2
    same_curve(both.run_folder, alone.run_folder)


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="needs a CPU alone, or two GPUs")
@pytest.mark.slow
def test_two_processes_refuse_as_one(final, micro_data, tmp_path):
    broken = shutil.copytree(final, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"?")
    first, second = together(refused, tuning(micro_data, tmp_path / "none", broken))
    assert first == second
    assert "can't load" in first


def refused(recipe: Recipe) -> str:
    return user_error(train, recipe)
