"""µP: what `mup_base_width` changes in a model, and that nothing changes without it."""

import json
import math

import pytest
import torch
from helpers import CASES, close, one_line_error, shaken, tiny_config, tiny_model, token_ids

from deep_delta import DeepDeltaConfig, DeepDeltaForCausalLM
from deep_delta.residual import DeltaResidual, LinearValue, StateDirection, TokenCompressor
from deep_delta.train.groups import width_scaled_names

every_case = pytest.mark.parametrize("case", CASES)


def widened(case: str, ratio: int = 4, **fields) -> DeepDeltaForCausalLM:
    """A case at 32·ratio features with as many more heads of the same size, base width 32."""
    heads = 2 * ratio
    sizes = {"hidden_size": 32 * ratio, "num_attention_heads": heads, "num_key_value_heads": heads}
    return tiny_model(case, mup_base_width=32, **sizes, **fields)


@every_case
def test_at_its_base_width_a_model_is_the_same_bit_for_bit(case):
    ids = token_ids(2, 9)
    plain, based = tiny_model(case), tiny_model(case, mup_base_width=32)
    assert based.config.width_ratio == plain.config.width_ratio == 1
    for name, tensor in plain.state_dict().items():
        assert torch.equal(based.state_dict()[name], tensor), name
    assert torch.equal(based(ids).logits, plain(ids).logits)
    assert width_scaled_names(based) == []


@every_case
def test_matrices_that_learn_more_slowly_are_those_that_sum_over_the_width(case):
    """By shapes alone: two dimensions, of which the last grows with the width; no embedding."""
    narrow, wide = widened(case, 2), widened(case, 4)
    shapes = {name: p.shape for name, p in narrow.named_parameters()}
    growing = {
        name
        for name, p in wide.named_parameters()
        if p.ndim == 2 and p.shape[-1] > 1.5 * shapes[name][-1] and "embed_tokens" not in name
    }
    assert len(growing) >= 2 * 7
    assert set(width_scaled_names(wide)) == growing


def std_of(case: str, kind: type, name: str, **fields) -> list[float]:
    """Of the first such module's tensor, at one, four and sixteen times the base width."""
    models = [widened(case, ratio, num_hidden_layers=1, **fields) for ratio in (1, 4, 16)]
    modules = [next(m for m in model.modules() if isinstance(m, kind)) for model in models]
    return [getattr(module, name).std().item() for module in modules]


PUBLISHED = {"residual_init": "published", "value_channels": 32}


@pytest.mark.parametrize(
    ("kind", "name", "case", "fields", "power"),
    [
        (torch.nn.Linear, "weight", "ddl-cc", {}, -0.5),
        (torch.nn.Embedding, "weight", "ddl-cc", {}, 0),
        (LinearValue, "weight", "ddl-cc", PUBLISHED, -1),
        (TokenCompressor, "weight", "ddl-tc", PUBLISHED, 0),
        (StateDirection, "inner", "mlp-direction", {"direction_hidden_size": 64}, -1),
        (StateDirection, "outer", "mlp-direction", {"direction_hidden_size": 64}, 0),
    ],
)
def test_starts_scale_with_the_width(kind, name, case, fields, power):
    case_fields = {"compressor_kernel_size": 4} if case == "ddl-tc" else {}
    stds = std_of(case, kind, name, **fields, **case_fields)
    assert stds == pytest.approx([stds[0] * ratio**power for ratio in (1, 4, 16)], rel=0.1)


def test_two_layer_gate_scales_where_it_reads_the_width():
    first, second = (
        next(m for m in widened("two-layer-gate", r, gate_hidden_size=256).modules()
             if isinstance(m, DeltaResidual)).gate
        for r in (1, 16)
    )  # fmt: skip
    assert second.hidden.std().item() == pytest.approx(first.hidden.std().item() / 16, rel=0.1)
    assert second.weight.std().item() == pytest.approx(first.weight.std().item(), rel=0.15)


@pytest.mark.parametrize("case", ["ddl-cc", "ddl-scalar", "sigmoid-value", "constant-value"])
def test_target_grows_like_the_root_of_the_width(case):
    """A write is β k v √m: with the erase off, four times the width writes twice as far."""
    model = widened(case, 4)
    residual = model.model.layers[0].attn_residual
    plain = tiny_model(case, **{n: getattr(model.config, n) for n in (
        "hidden_size", "num_attention_heads", "num_key_value_heads")})  # fmt: skip
    other = plain.model.layers[0].attn_residual
    other.load_state_dict(shaken(residual, 0.1).state_dict())
    state = model.model.expand(torch.randn(1, 3, 128))
    targets = [r(state, torch.nn.Identity()).target for r in (residual, other)]
    close(targets[0], 2 * targets[1], atol=1e-6)


def test_logits_shrink_with_the_width_on_both_ways_to_the_loss():
    model, ids = widened("additive", 4, logit_multiplier=3.0), token_ids(2, 9)
    hidden = model.model(ids).last_hidden_state
    close(model(ids).logits, 0.75 * hidden @ model.lm_head.weight.T, atol=1e-6)
    loss = model(ids, labels=ids).loss
    close(model(ids, labels=ids, skip_logits=True).loss, loss, atol=1e-6)


def test_saved_model_comes_back_with_its_scaling(tmp_path):
    model, ids = shaken(widened("ddl-cc", 4), 0.05), token_ids(2, 9)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["mup_base_width"] == 32
    again = DeepDeltaForCausalLM.from_pretrained(tmp_path).eval()
    assert again.config.width_ratio == 4
    assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("fields", "fragments"),
    [
        ({"mup_base_width": 0}, ["mup_base_width", "at least 1"]),
        ({"mup_base_width": 64, "tie_word_embeddings": False}, ["mup_base_width", "tie_word"]),
        ({"mup_base_width": 64.5}, ["mup_base_width"]),
        ({"mup_base": 64}, ["did you mean", "mup_base_width"]),
    ],
    ids=str,
)
def test_wrong_base_width_is_one_line(fields, fragments):
    one_line_error(lambda: tiny_config(**fields), *fragments)


def test_ratio_is_width_over_base():
    config = DeepDeltaConfig.from_preset("ddl-cc", "small", mup_base_width=256)
    assert config.width_ratio == 3
    assert config.logit_factor == pytest.approx(1 / 3)
    assert math.isclose(DeepDeltaConfig(logit_multiplier=2).logit_factor, 2)
