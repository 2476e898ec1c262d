"""PEFT: adapters train what they shall and nothing else, and survive merging, saving, loading."""

import copy

import pytest
import torch
from helpers import close, token_ids
from small_models import FOUR, FP32, logits, small_model, train

from deep_delta import DeepDeltaForCausalLM

peft = pytest.importorskip("peft", reason="needs the extra ecosystem")

LORA = {
    "query-value": {"target_modules": ["q_proj", "v_proj"]},
    "all-linear": {"target_modules": "all-linear"},
    "dora": {"target_modules": ["q_proj", "v_proj", "down_proj"], "use_dora": True},
    "compressor": {"target_modules": ["q_proj"], "modules_to_save": ["compressor"]},
}
CASES = [
    (variant, method)
    for variant in FOUR
    for method in LORA
    if method != "compressor" or variant in ("ddl-cc", "ddl-tc")
]


@pytest.mark.parametrize(("variant", "method"), CASES)
def test_lora_trains_merges_saves_and_loads(variant, method, tmp_path):
    base = small_model(variant)
    untouched = copy.deepcopy(base)
    before = logits(untouched)
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", r=4, **LORA[method]))
    close(logits(model), before, atol=FP32)  # LoRA's B starts at zero

    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = train(model.train())
    assert losses[-1] < losses[0]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, start[name]) == (not parameter.requires_grad), name
    trained = logits(model)
    assert (trained - before).abs().max() > 1e-2

    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(untouched, tmp_path / "adapter")
    close(logits(again), trained, atol=FP32)

    merged = model.merge_and_unload()
    close(logits(merged), trained, atol=1e-4)  # W + BA is rounded once more
    merged.save_pretrained(tmp_path / "merged")
    loaded, info = DeepDeltaForCausalLM.from_pretrained(
        tmp_path / "merged", output_loading_info=True
    )
    assert not any(info.values()), info
    close(logits(loaded), logits(merged), atol=FP32)


@pytest.mark.parametrize("variant", ["ddl-cc", "ddl-tc"])
def test_every_read_of_a_saved_compressor_is_the_trained_copy(variant):
    """As if the copy had been put into the model itself; switched off, nothing has changed."""
    base = small_model(variant)
    expected = copy.deepcopy(base)
    before = logits(base)
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["compressor"])
    model = peft.get_peft_model(base, config)
    copies = {}
    for name, parameter in model.named_parameters():
        if "modules_to_save.default" in name:
            torch.nn.init.normal_(parameter)
            name = name.removeprefix("base_model.model.").replace("modules_to_save.default.", "")
            copies[name] = parameter
    assert len(copies) >= 3  # one a block, and the last read's
    assert not expected.load_state_dict(copies, strict=False).unexpected_keys
    close(logits(model), logits(expected), atol=FP32)
    assert (logits(expected) - before).abs().max() > 1e-2
    with model.disable_adapter():
        close(logits(model), before, atol=FP32)


@pytest.mark.parametrize("variant", FOUR)
def test_prompt_tuning_is_a_learned_prefix(variant, tmp_path):
    base = small_model(variant)
    untouched = copy.deepcopy(base)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = peft.get_peft_model(base, config)
    ids = token_ids(2, 10)
    losses = train(model.train(), lr=0.05, attention_mask=torch.ones_like(ids))
    assert losses[-1] < losses[0]

    model.eval()
    with torch.no_grad():
        prompt = model.get_prompt(batch_size=2)
        embedded = torch.cat([prompt, untouched.model.embed_tokens(ids)], 1)
        labels = torch.cat([torch.full((2, 4), -100), ids], 1)
        expected = untouched(inputs_embeds=embedded, labels=labels)
        out = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)
    close(out.loss, expected.loss, atol=FP32)
    close(out.logits[:, -10:], expected.logits[:, -10:], atol=FP32)

    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    generated = model.generate(input_ids=ids, attention_mask=mask, **options)
    mask = torch.ones(embedded.shape[:2], dtype=torch.long)
    other = untouched.generate(inputs_embeds=embedded, attention_mask=mask, **options)
    assert torch.equal(generated[:, 10:], other)

    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(untouched, tmp_path).eval()
    with torch.no_grad():
        close(again(input_ids=ids, labels=ids).loss, out.loss, atol=FP32)


@pytest.mark.parametrize("variant", ["additive", "ddl-cc"])
def test_lora_on_the_head_keeps_the_loss_that_makes_no_logits(variant):
    model = small_model(variant, tie_word_embeddings=False)
    config = peft.LoraConfig(target_modules=["lm_head"], init_lora_weights=False)
    model = peft.get_peft_model(model, config).eval()
    ids = token_ids(2, 10)
    plain = model(input_ids=ids, labels=ids)
    lean = model(input_ids=ids, labels=ids, skip_logits=True)
    assert lean.loss.shape == ()
    close(lean.loss, plain.loss, atol=FP32)
    weight = next(p for name, p in model.named_parameters() if "lora_A" in name)
    expected = torch.autograd.grad(plain.loss, weight)[0]
    close(torch.autograd.grad(lean.loss, weight)[0], expected, atol=FP32)
    assert expected.abs().max() > 1e-3
