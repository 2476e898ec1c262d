"""A score for a whole text: read at its last token, whatever pads it."""

import pytest
import torch
from helpers import VARIANTS, close, shaken, tiny_config, token_ids
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification

from deep_delta import DeepDeltaForCausalLM, DeepDeltaForSequenceClassification

PAD = 0


def tiny_classifier(variant: str, labels: int = 3) -> DeepDeltaForSequenceClassification:
    config = tiny_config(variant, pad_token_id=PAD)
    config.num_labels = labels
    return shaken(DeepDeltaForSequenceClassification(config), 0.1).eval()


def padded(texts: list[torch.Tensor], side: str) -> dict[str, torch.Tensor]:
    longest = max(len(text) for text in texts)
    ids = torch.full((len(texts), longest), PAD)
    for row, text in zip(ids, texts, strict=True):
        row[slice(len(text)) if side == "right" else slice(-len(text), None)] = text
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_scores_are_those_of_each_text_alone(variant, side):
    model = tiny_classifier(variant)
    texts = [1 + token_ids(1, length, 60, seed=length)[0] for length in (9, 1, 4)]
    scores = torch.stack(
        [model.score(model.model(text[None]).last_hidden_state[0, -1]) for text in texts]
    )
    labels = torch.tensor([2, 0, 1])
    out = model(**padded(texts, side), labels=labels)
    close(out.logits, scores, atol=2e-5)
    close(out.loss, F.cross_entropy(scores, labels), atol=2e-5)


@pytest.mark.parametrize("variant", ["additive", "ddl-cc", "ddl-tc"])
def test_saved_classifier_comes_back_and_starts_from_a_language_model(variant, tmp_path):
    model = tiny_classifier(variant, labels=1)
    model.save_pretrained(tmp_path / "classifier")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier")
    assert type(again) is DeepDeltaForSequenceClassification
    assert again.config.num_labels == 1
    text = 1 + token_ids(1, 6, 60)
    close(again(text).logits, model(text).logits, atol=1e-5)

    language = shaken(DeepDeltaForCausalLM(tiny_config(variant)), 0.1)
    language.save_pretrained(tmp_path / "language")
    started = DeepDeltaForSequenceClassification.from_pretrained(
        tmp_path / "language", num_labels=2
    )
    assert started.score.weight.shape == (2, 32)
    for name, parameter in language.model.named_parameters():
        assert torch.equal(started.model.get_parameter(name), parameter), name
