"""The model as transformers' tools see it: loss, gradient checkpointing, saving, dtypes."""

import pytest
import torch
from helpers import CASES, VARIANTS, close, one_line_error, shaken, tiny_model, token_ids
from safetensors import safe_open
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from deep_delta import DeepDeltaConfig, DeepDeltaForCausalLM, DeepDeltaModel

every_variant = pytest.mark.parametrize("variant", VARIANTS)


@every_variant
def test_loss_predicts_the_next_token(variant):
    model, ids = tiny_model(variant), token_ids(2, 8)
    out = model(ids, labels=ids)
    expected = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    close(out.loss, expected, atol=1e-6)


def test_loss_ignores_minus_100_and_divides_by_num_items_in_batch():
    model, ids = shaken(tiny_model()), token_ids(2, 8)
    labels = ids.clone()
    labels[0, :5] = -100
    logits = model(ids).logits
    sums = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    counted = (labels[:, 1:] != -100).sum()
    assert counted == 10
    close(model(ids, labels=labels).loss, sums / counted, atol=1e-6)
    # Gradient accumulation: the sum over all micro-batches' items, not a mean of means.
    accumulated = model(ids, labels=labels, num_items_in_batch=torch.tensor(37)).loss
    close(accumulated, sums / 37, atol=1e-6)


def test_labels_that_are_already_shifted():
    model, ids = shaken(tiny_model()), token_ids(2, 9)
    out = model(ids[:, :-1], shift_labels=ids[:, 1:].contiguous())
    close(out.loss, F.cross_entropy(out.logits.flatten(0, 1), ids[:, 1:].flatten()), atol=1e-6)


@every_variant
def test_hidden_states_have_the_models_width_and_end_in_the_last(variant):
    model, ids = shaken(tiny_model(variant)), token_ids(2, 5)
    out = model.model(ids, output_hidden_states=True)
    assert len(out.hidden_states) == model.config.num_hidden_layers + 1
    assert {hidden.shape for hidden in out.hidden_states} == {(2, 5, 32)}
    assert torch.equal(out.hidden_states[-1], out.last_hidden_state)
    close(model(ids).logits, model.lm_head(out.last_hidden_state), atol=1e-6)
    if not model.config.embedding_conv:
        close(out.hidden_states[0], model.model.embed_tokens(ids), atol=1e-6)


def test_inputs_embeds_stand_for_input_ids():
    model, ids = shaken(tiny_model()), token_ids(2, 5)
    embeds = model.model.embed_tokens(ids)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(ids).logits)
    one_line_error(lambda: model(), "input_ids", "inputs_embeds")
    one_line_error(lambda: model(ids, inputs_embeds=embeds), "input_ids", "inputs_embeds")


def test_logits_to_keep():
    model, ids = shaken(tiny_model()), token_ids(2, 7)
    full = model(ids).logits
    close(model(ids, logits_to_keep=2).logits, full[:, -2:], atol=1e-6)
    kept = torch.tensor([0, 3])
    close(model(ids, logits_to_keep=kept).logits, full[:, kept], atol=1e-6)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_gradient_checkpointing_changes_no_gradient(case, reentrant):
    model, ids = shaken(tiny_model(case), 0.1).train(), token_ids(2, 6)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    calls = []
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    checkpointed = gradients()
    assert len(calls) == 2  # forward, and again in the backward pass: it was really checkpointed
    for name, gradient in plain.items():
        # The same operations; autograd may add up the terms of a shared tensor in another order.
        close(checkpointed[name], gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_saved_model_comes_back_the_same(case, tmp_path):
    model, ids = shaken(tiny_model(case)), token_ids(2, 6)
    model.save_pretrained(tmp_path)
    again, info = DeepDeltaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    expected = {**model.config.to_dict(), "dtype": "float32", "_name_or_path": str(tmp_path)}
    assert again.config.to_dict() == expected
    assert again.lm_head.weight is again.model.embed_tokens.weight
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    close(again(ids).logits, model(ids).logits, atol=1e-5)  # loaded weights lie differently aligned


@pytest.mark.parametrize("case", CASES)
def test_checkpoint_holds_every_tensor_once(case, tmp_path):
    model = tiny_model(case)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
        size = sum(file.get_tensor(name).numel() for name in names)
    assert names == {name for name, _ in model.named_parameters()}
    assert "lm_head.weight" not in names
    assert size == model.num_parameters()


def test_auto_classes_know_the_family(tmp_path):
    model = tiny_model("ddl-tc")
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is DeepDeltaConfig
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is DeepDeltaForCausalLM
    assert type(AutoModel.from_pretrained(tmp_path)) is DeepDeltaModel


def test_untied_head_is_saved_too(tmp_path):
    model, ids = shaken(tiny_model(tie_word_embeddings=False)), token_ids(1, 5)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    again = DeepDeltaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    close(again(ids).logits, model(ids).logits, atol=1e-5)


@every_variant
def test_bf16_autocast_is_close_to_fp32(variant):
    model, ids = tiny_model(variant), token_ids(2, 8)
    expected = model(ids, labels=ids)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(ids, labels=ids)
    out.loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    assert all(p.grad.isfinite().all() for p in model.parameters())
    # bf16 has 8 bits: a fraction of a per cent a product, for logits of size 0.2 at the start.
    close(out.logits.float(), expected.logits, atol=0.02)
    close(out.loss, expected.loss, atol=0.005)


@every_variant
def test_state_dtype_is_the_dtype_of_the_stream(variant):
    """And of nothing else: what is read from it is normalised in fp32, the last read too."""
    model, ids = tiny_model(variant, state_dtype="bfloat16"), token_ids(2, 8)
    streams, contexts, norms = [], [], []
    for layer in model.model.layers:
        layer.mlp_residual.register_forward_pre_hook(lambda _, args: streams.append(args[0]))
        layer.mlp.register_forward_pre_hook(lambda _, args: contexts.append(args[0]))
    model.model.norm.register_forward_hook(lambda _, args, out: norms.append((args[0], out)))
    logits = model(ids).logits
    assert [state.x.dtype for state in streams] == [torch.bfloat16] * 2
    reads = zip(model.model.layers, streams, strict=True)
    inputs = [layer.attn_residual.compressor(state.settle()) for layer, state in reads]
    assert len(norms) == 1
    for x, out in (*zip(inputs, contexts, strict=True), *norms):
        assert out.dtype == torch.float32
        exact = F.rms_norm(x.double(), (32,), eps=model.config.rms_norm_eps)
        close(out.double(), exact, atol=2e-6)  # bf16 would be off by up to 1e-2
    expected = tiny_model(variant, state_dtype="float32")(ids).logits
    assert not torch.equal(logits, expected)
    close(logits, expected, atol=0.02)  # eight bits of mantissa, logits of size 0.2


@every_variant
def test_whole_model_runs_in_bf16(variant):
    model, ids = tiny_model(variant).to(torch.bfloat16), token_ids(2, 8)
    out = model(ids, labels=ids)
    assert out.logits.dtype == torch.bfloat16
    out.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
