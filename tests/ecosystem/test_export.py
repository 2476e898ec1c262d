"""torch.export, pipelines and lm-eval: the model's own numbers, from outside."""

import logging
import warnings

import pytest
import torch
from helpers import close, token_ids
from small_models import FOUR, FP32, logits, small_model, text_model, tokenizer
from torch.export import Dim, export
from transformers import pipeline


class Logits(torch.nn.Module):
    """Tensors in, a tensor out, as exported programs are used."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(ids, use_cache=False).logits


@pytest.mark.parametrize("variant", FOUR)
def test_exported_program_of_any_length_is_the_model(variant, tmp_path):
    model = small_model(variant)
    length = Dim("length", min=2, max=64)
    program = export(Logits(model), (token_ids(2, 10),), dynamic_shapes={"ids": {1: length}})
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for tokens in (10, 3, 17):
        ids = token_ids(2, tokens, seed=tokens)
        close(loaded(ids).detach(), logits(model, ids), atol=FP32)


@pytest.mark.parametrize("variant", FOUR)
def test_pipeline_generates_what_the_model_does_without_a_warning(variant, caplog):
    model, words = text_model(variant), tokenizer()
    options = {"max_new_tokens": 6, "do_sample": False}
    logging.getLogger("transformers").addHandler(caplog.handler)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate = pipeline("text-generation", model=model, tokenizer=words, device="cpu")
    logging.getLogger("transformers").removeHandler(caplog.handler)
    assert not [r.getMessage() for r in caplog.records if "not supported" in r.getMessage()]
    prompts = ["The river runs", "A light"]
    for prompt in prompts:
        (row,) = generate(prompt, return_full_text=False, **options)
        ids = words(prompt, return_tensors="pt").input_ids
        expected = model.generate(ids, **options)[0, ids.shape[1] :]
        assert row["generated_text"] == words.decode(expected, skip_special_tokens=True)
    # Several prompts at a time are padded on the left.
    words.padding_side = "left"
    batch = generate(prompts, batch_size=2, return_full_text=False, **options)
    alone = [generate(prompt, return_full_text=False, **options) for prompt in prompts]
    assert batch == alone


@pytest.mark.parametrize("variant", FOUR)
def test_lm_eval_scores_a_live_model_without_a_warning(variant, caplog):
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model, words = text_model(variant), tokenizer()
    with caplog.at_level(logging.WARNING):
        harness = HFLM(pretrained=model, tokenizer=words, backend="causal", batch_size=3)
    assert not [r.getMessage() for r in caplog.records if "not supported" in r.getMessage()]
    pairs = [("The river runs", " over the stone"), ("A", " light"), ("She said that", " it was")]
    requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    answers = harness.loglikelihood(requests, disable_tqdm=True)
    for (context, continuation), (score, _) in zip(pairs, answers, strict=True):
        start, whole = words(context)["input_ids"], words(context + continuation)["input_ids"]
        ids = torch.tensor([whole])
        scores = logits(model, ids)[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
        assert score == pytest.approx(scores[len(start) - 1 :].sum().item(), abs=1e-4)
