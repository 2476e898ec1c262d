"""torch.export, pipelines and lm-eval: the model's own numbers, from outside."""

import logging

import pytest
import torch
from helpers import close, token_ids
from small_models import FOUR, FP32, logits, small_model, text_checkpoint, text_model, tokenizer
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


def complaints(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was logged about a kind of model that a tool does not know."""
    messages = [record.getMessage() for record in caplog.records]
    return [m for m in messages if "not supported for" in m or "neither marked" in m]


@pytest.mark.parametrize("variant", FOUR)
def test_pipeline_generates_what_the_model_does(variant, tmp_path, caplog):
    model, words = text_checkpoint(tmp_path, variant), tokenizer()
    options = {"max_new_tokens": 6, "do_sample": False}
    logger = logging.getLogger("transformers")  # which hands nothing on to the root
    logger.addHandler(caplog.handler)
    generate = pipeline("text-generation", model=str(tmp_path), device="cpu")
    logger.removeHandler(caplog.handler)
    assert not complaints(caplog)
    prompts = ["The river runs", "A light"]
    for prompt in prompts:
        (row,) = generate(prompt, return_full_text=False, **options)
        ids = words(prompt, return_tensors="pt").input_ids
        expected = model.generate(ids, **options)[0, ids.shape[1] :]
        assert row["generated_text"] == words.decode(expected, skip_special_tokens=True)
    # Several prompts at a time are padded on the left.
    batch = generate(prompts, batch_size=2, return_full_text=False, **options)
    alone = [generate(prompt, return_full_text=False, **options) for prompt in prompts]
    assert batch == alone


@pytest.mark.parametrize("variant", FOUR)
def test_lm_eval_knows_the_model_and_scores_it(variant, caplog):
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model, words = text_model(variant), tokenizer()
    with caplog.at_level(logging.WARNING):
        harness = HFLM(pretrained=model, tokenizer=words, batch_size=3)
    assert not complaints(caplog)
    pairs = [("The river runs", " over the stone"), ("A", " light"), ("She said that", " it was")]
    requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    answers = harness.loglikelihood(requests, disable_tqdm=True)
    for (context, continuation), (score, _) in zip(pairs, answers, strict=True):
        start, whole = words(context)["input_ids"], words(context + continuation)["input_ids"]
        ids = torch.tensor([whole])
        scores = logits(model, ids)[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
        assert score == pytest.approx(scores[len(start) - 1 :].sum().item(), abs=1e-4)
