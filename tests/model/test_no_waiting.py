"""A step queues its work and never waits for the GPU: a wait leaves the GPU idle afterwards."""

import pytest
import torch
from helpers import WAITS, Waits, tiny_config, token_ids

from deep_delta import DeepDeltaForCausalLM


@pytest.mark.parametrize("variant", ["additive", "ddl-cc", "ddl-tc"])
def test_a_training_step_reads_nothing_back(variant):
    model = DeepDeltaForCausalLM(tiny_config(variant)).train()
    ids = token_ids(2, 8)
    with Waits() as waits:
        model(ids, labels=ids, skip_logits=True, use_cache=False).loss.backward()
        assert waits.found == []
        int(ids.sum())
    assert waits.found == [WAITS[0]]  # it would have been seen


def test_attention_gets_no_mask_while_a_cuda_graph_is_captured(monkeypatch):
    """It would be another graph for the compiler, and another kernel for attention."""
    model = DeepDeltaForCausalLM(tiny_config("ddl-cc"))
    ids, found = token_ids(2, 8), []
    model.model.layers[0].register_forward_pre_hook(
        lambda layer, args, kwargs: found.append(kwargs["attention_mask"]), with_kwargs=True
    )
    expected = model(ids, use_cache=False).logits
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert torch.equal(model(ids, use_cache=False).logits, expected)
    model(ids, attention_mask=torch.ones_like(ids), use_cache=False)
    assert found[:2] == [None, None]
    assert found[2] is not None
