"""Attention, MLP and rotary embedding are transformers': the additive model is Qwen3, or Llama."""

import pytest
import torch
from helpers import close, shaken, tiny_model, token_ids
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from deep_delta import DeepDeltaForCausalLM

# fp32; the same operations in the same order, so only fused kernels may round differently.
FP32 = 1e-5
NORMS = {"attn_residual.norm": "input_layernorm", "mlp_residual.norm": "post_attention_layernorm"}


def theirs(model: DeepDeltaForCausalLM, config_class: type, model_class: type) -> nn.Module:
    """transformers' model of the same size with the same weights."""
    ours = model.config
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim")
    names += ("num_attention_heads", "num_key_value_heads", "rms_norm_eps", "rope_parameters")
    config = config_class(
        **{name: getattr(ours, name) for name in names},
        max_position_embeddings=64,
        tie_word_embeddings=True,
        attention_bias=False,
    )
    weights = {}
    for name, tensor in model.state_dict().items():
        for mine, other in NORMS.items():
            name = name.replace(mine, other)
        if model_class is Qwen3ForCausalLM or (".q_norm." not in name and ".k_norm." not in name):
            weights[name] = tensor
    other = model_class(config)
    other.load_state_dict(weights)
    return other.eval()


@pytest.mark.parametrize("kv_heads", [2, 1], ids=["multi-head", "grouped-query"])
def test_additive_model_is_qwen3(kv_heads):
    model = shaken(tiny_model("additive", num_key_value_heads=kv_heads), 0.1)
    other = theirs(model, Qwen3Config, Qwen3ForCausalLM)
    ids = token_ids(2, 12)
    ours, expected = model(ids, labels=ids), other(ids, labels=ids)
    assert expected.logits.std() > 0.1
    close(ours.logits, expected.logits, atol=FP32)
    close(ours.loss, expected.loss, atol=FP32)


@pytest.mark.parametrize("order", ["before_rope", "after_rope"])
def test_additive_model_without_the_norms_of_queries_and_keys_is_llama(order):
    model = shaken(tiny_model("additive", qk_norm=order), 0.1)
    other = theirs(model, LlamaConfig, LlamaForCausalLM)
    for layer in model.model.layers:
        layer.self_attn.q_norm = layer.self_attn.k_norm = nn.Identity()
    ids = token_ids(2, 12)
    close(model(ids).logits, other(ids).logits, atol=FP32)


def test_order_of_rope_and_norm_matters_only_when_norm_weights_differ_from_one():
    before, after = (tiny_model("ddl-cc", qk_norm=o) for o in ("before_rope", "after_rope"))
    ids = token_ids(1, 12)
    close(before(ids).logits, after(ids).logits, atol=FP32)
    for model in (before, after):
        for layer in model.model.layers:
            layer.self_attn.q_norm.weight.data = torch.linspace(0.2, 3, 16)
            layer.self_attn.q_proj.weight.data *= 20
    assert (before(ids).logits - after(ids).logits).abs().max() > 1e-3


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("order", ["before_rope", "after_rope"])
def test_attention_backends_agree(implementation, order):
    model = shaken(tiny_model("ddl-cc", qk_norm=order), 0.1)
    ids, mask = token_ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    expected = model(ids, attention_mask=mask).logits
    model.set_attn_implementation(implementation)
    actual = model(ids, attention_mask=mask).logits
    close(actual[mask.bool()], expected[mask.bool()], atol=FP32)


def test_attention_weights_are_returned_on_request():
    model = tiny_model("ddl-tc")
    model.set_attn_implementation("eager")
    attentions = model(token_ids(1, 5), output_attentions=True).attentions
    assert [weights.shape for weights in attentions] == [(1, 2, 5, 5)] * 2
    close(attentions[0].sum(-1), torch.ones(1, 2, 5), atol=1e-6)


def test_logit_multiplier_scales_the_logits():
    ids = token_ids(1, 5)
    plain, scaled = tiny_model("ddl-cc"), tiny_model("ddl-cc", logit_multiplier=0.5)
    assert torch.equal(scaled(ids).logits, plain(ids).logits * 0.5)
