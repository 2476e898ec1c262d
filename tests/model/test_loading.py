"""`from_pretrained` stops where a checkpoint and its configuration do not fit."""

import json

import pytest
import torch
from helpers import close, one_line_error, shaken, tiny_config, tiny_model, token_ids
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM
from transformers.modeling_layers import GenericForSequenceClassification

from deep_delta import DeepDeltaConfig, DeepDeltaForCausalLM, DeepDeltaModel
from deep_delta.model.modeling import DeepDeltaPreTrainedModel

CLASSES = [DeepDeltaForCausalLM, DeepDeltaModel, AutoModelForCausalLM, AutoModel]


class Classifier(GenericForSequenceClassification, DeepDeltaPreTrainedModel):
    """A head that a language model lacks."""


def rewrite(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def drop(folder, name):
    weights = load_file(folder / "model.safetensors")
    del weights[name]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("loader", CLASSES, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"num_hidden_layers": 1}, ["holds", "no place", "layers.1."]),
        ({"num_hidden_layers": 3}, ["lacks", "layers.2."]),
        ({"embedding_conv": False}, ["holds 1 ", "expand.weight"]),
        ({"share_compressor": False}, ["lacks 2 ", "mlp_residual.compressor.weight"]),
        ({"gate": "fixed"}, ["holds", "gate."]),
    ],
    ids=str,
)
def test_configuration_that_does_not_fit_the_weights(loader, fields, says, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    one_line_error(lambda: loader.from_pretrained(tmp_path, **fields), str(tmp_path), *says)
    rewrite(tmp_path, **fields)
    one_line_error(lambda: loader.from_pretrained(tmp_path), str(tmp_path), *says)


@pytest.mark.parametrize("base", [False, True])
@pytest.mark.parametrize("loader", CLASSES, ids=lambda cls: cls.__name__)
def test_weight_that_is_missing(loader, base, tmp_path):
    model = tiny_model()
    (model.model if base else model).save_pretrained(tmp_path)
    drop(tmp_path, ("" if base else "model.") + "layers.1.mlp_residual.gate.bias")
    one_line_error(
        lambda: loader.from_pretrained(tmp_path), "lacks 1 ", "layers.1.mlp_residual.gate.bias"
    )


def test_own_head_must_be_there(tmp_path):
    tiny_model(tie_word_embeddings=False).save_pretrained(tmp_path)
    drop(tmp_path, "lm_head.weight")
    one_line_error(lambda: DeepDeltaForCausalLM.from_pretrained(tmp_path), "lacks 1 ", "lm_head")
    Classifier(tiny_config()).save_pretrained(tmp_path)
    drop(tmp_path, "score.weight")
    one_line_error(lambda: Classifier.from_pretrained(tmp_path), "lacks 1 ", "score.weight")


@pytest.mark.parametrize("tied", [True, False])
def test_heads_may_differ_between_classes(tied, tmp_path):
    model, ids = shaken(tiny_model(tie_word_embeddings=tied)), token_ids(2, 5)
    expected = model.model(ids).last_hidden_state
    model.save_pretrained(tmp_path / "lm")
    model.model.save_pretrained(tmp_path / "base")
    classifier = Classifier.from_pretrained(tmp_path / "lm")
    classifier.save_pretrained(tmp_path / "classifier")
    for folder in ("lm", "base", "classifier"):
        for loader in (DeepDeltaModel, DeepDeltaForCausalLM, Classifier):
            body = loader.from_pretrained(tmp_path / folder).base_model
            close(body(ids).last_hidden_state, expected, atol=1e-6)
    again = Classifier.from_pretrained(tmp_path / "classifier")
    assert torch.equal(again.score.weight, classifier.score.weight)


def test_who_asks_for_the_loading_info_judges_it_himself(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    _, info = DeepDeltaForCausalLM.from_pretrained(
        tmp_path, num_hidden_layers=1, output_loading_info=True
    )
    assert all(".layers.1." in name for name in info["unexpected_keys"])
    assert info["unexpected_keys"]


def test_a_state_dict_of_ones_own_may_be_partial():
    model = DeepDeltaForCausalLM.from_pretrained(None, config=tiny_config(), state_dict={})
    assert isinstance(model, DeepDeltaForCausalLM)


def test_fields_given_while_loading_are_checked(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    for loader in (DeepDeltaConfig, DeepDeltaForCausalLM):
        one_line_error(lambda of=loader: of.from_pretrained(tmp_path, rebuild=-1), "rebuild is -1")
    changed = DeepDeltaForCausalLM.from_pretrained(tmp_path, state_dtype="bfloat16", rebuild=2)
    assert (changed.config.state_dtype, changed.config.rebuild) == ("bfloat16", 2)
