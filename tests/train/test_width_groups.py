"""µP in training: parameter groups, their record, their schedule and a resumed run."""

import json

import pytest
import torch
from train.micro import equal_weights, losses, micro_recipe, rows_of

from deep_delta import DeepDeltaForCausalLM
from deep_delta.train import model_config, train
from deep_delta.train.groups import decayed_names, parameter_groups, width_scaled_names
from deep_delta.train.loop import Loop

HALF = {"mup_base_width": 8}  # the micro model has 16 features: m = 2


@pytest.fixture
def optimizers(monkeypatch):
    """The optimizer and model of every run, and the groups' highest rates."""
    made = []
    run = Loop.run

    def recorded(self, stop):
        made.append((self.optimizer, self.model, self.peaks))
        return run(self, stop)

    monkeypatch.setattr(Loop, "run", recorded)
    return made


def by_name(optimizer, model, values: list[float]) -> dict[str, float]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = zip(optimizer.param_groups, values, strict=True)
    return {names[id(p)]: value for group, value in groups for p in group["params"]}


@pytest.mark.parametrize("decay_residual", [True, False])
def test_wider_models_learn_their_matrices_more_slowly(
    micro_data, tmp_path, optimizers, decay_residual
):
    recipe = micro_recipe(
        micro_data, tmp_path, model=HALF, lr=4e-3, weight_decay=0.1, decay_residual=decay_residual
    )
    train(recipe)
    (optimizer, model, peaks), *_ = optimizers
    scaled, decayed = set(width_scaled_names(model)), set(decayed_names(model, decay_residual))
    assert "model.layers.0.mlp.up_proj.weight" in scaled
    assert "model.layers.0.attn_residual.value.weight" in scaled
    rates = by_name(optimizer, model, peaks)
    decays = by_name(optimizer, model, [group["weight_decay"] for group in optimizer.param_groups])
    assert rates.keys() == decays.keys() == dict(model.named_parameters()).keys()
    for name, rate in rates.items():
        assert rate == (2e-3 if name in scaled else 4e-3), name
        # AdamW takes rate · decay off a weight: the same share at every width.
        share = 4e-3 * 0.1 if name in decayed else 0
        assert rate * decays[name] == pytest.approx(share), name
    listing = json.loads((recipe.run_folder / "weight_decay.json").read_text())
    assert set(listing["width_scaled"].pop("tensors")) == scaled
    assert listing["width_scaled"] == {"learning_rate": 0.5, "weight_decay": 2.0}
    assert listing["decayed"].keys() == decayed


def test_schedule_keeps_the_ratio_and_the_log_has_the_recipes_rate(
    micro_data, tmp_path, optimizers
):
    train(micro_recipe(micro_data, tmp_path / "half", model=HALF, lr=4e-3))
    train(micro_recipe(micro_data, tmp_path / "plain", lr=4e-3))
    rates = [
        [row["lr"] for row in rows_of(tmp_path / name / "ddl-cc" / "seed-0", "loss")]
        for name in ("half", "plain")
    ]
    assert rates[0] == rates[1]
    assert max(rates[0]) == 4e-3
    last = [group["lr"] for group in optimizers[0][0].param_groups]
    assert last == pytest.approx([last[0], last[0], last[0] / 2])
    assert last[0] < 4e-3  # the cosine has moved all of them


def test_groups_without_it_are_two(micro_data, tmp_path, optimizers):
    recipe = micro_recipe(micro_data, tmp_path, steps=1)
    train(recipe)
    (optimizer, model, peaks), *_ = optimizers
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert peaks == [recipe.lr, recipe.lr]
    names = {id(p): name for name, p in model.named_parameters()}
    order = [names[id(p)] for p in optimizer.param_groups[0]["params"]]
    assert order == decayed_names(model)
    listing = json.loads((recipe.run_folder / "weight_decay.json").read_text())
    assert listing.keys() == {"decayed", "not_decayed"}


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(micro_data, tmp_path):
    whole = micro_recipe(micro_data, tmp_path / "whole", model=HALF, save_every=3)
    train(whole)
    rest = micro_recipe(
        micro_data,
        tmp_path / "rest",
        model=HALF,
        save_every=3,
        resume=str(whole.run_folder / "checkpoint-3"),
    )
    train(rest)
    assert losses(rest.run_folder) == [row for row in losses(whole.run_folder) if row[0] > 3]
    equal_weights(whole.run_folder, rest.run_folder)


def test_no_tensor_is_left_out_or_taken_twice(micro_data, tmp_path):
    model = DeepDeltaForCausalLM(model_config(micro_recipe(micro_data, tmp_path, model=HALF)))
    groups = parameter_groups(model, 1e-3, 0.1, decay_residual=False)
    taken = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(taken) == len(set(taken))
    assert set(taken) == {id(parameter) for parameter in model.parameters()}
    assert len(groups) == 4
    torch.optim.AdamW(groups)
