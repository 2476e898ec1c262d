"""bitsandbytes' int8 weights: close to the model they come from, and LoRA trains on top of them."""

import pytest
import torch
from helpers import token_ids
from small_models import FOUR, FP32, logits, small_model, train
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs the extra ecosystem")
peft = pytest.importorskip("peft", reason="needs the extra ecosystem")


def in_int8(folder):
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True), device_map={"": "cpu"}
    )


@pytest.mark.parametrize("variant", FOUR)
def test_int8_is_close_and_takes_lora(variant, tmp_path):
    whole = small_model(variant)
    whole.save_pretrained(tmp_path / "model")
    model = in_int8(tmp_path / "model")
    quantised = {n for n, m in model.named_modules() if isinstance(m, bitsandbytes.nn.Linear8bitLt)}
    linear = {name for name, module in whole.named_modules() if isinstance(module, nn.Linear)}
    assert quantised == linear - {"lm_head"}
    expected = logits(whole)
    close = logits(model)
    # Seven bits a weight and an activation: a per cent or two, not zero.
    error = (close - expected).norm() / expected.norm()
    assert 1e-4 < error < 0.05

    model = peft.prepare_model_for_kbit_training(model)
    model = peft.get_peft_model(
        model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    )
    weights = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    losses = train(model.train(), steps=4)
    assert losses[-1] < losses[0]
    for name, weight in weights.items():
        assert torch.equal(model.get_parameter(name), weight), name
    trained = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(
        peft.prepare_model_for_kbit_training(in_int8(tmp_path / "model")), tmp_path / "adapter"
    )
    torch.testing.assert_close(logits(again), trained, atol=FP32, rtol=0)


@pytest.mark.parametrize("variant", FOUR)
def test_int8_decodes_with_a_cache_as_without(variant, tmp_path):
    small_model(variant).save_pretrained(tmp_path)
    model = in_int8(tmp_path).eval()
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    ids = token_ids(2, 5)
    cached = model.generate(ids, **options)
    assert cached.shape == (2, 13)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **options))
