"""accelerate's offload: weights that are only there while their own module's forward runs."""

from pathlib import Path

import pytest
import torch
from helpers import close, token_ids
from small_models import FOUR, FP32, logits, small_model

from deep_delta import DeepDeltaForCausalLM

accelerate = pytest.importorskip("accelerate", reason="needs the extra train")

# Options that move or add parameters, beside the four.
CASES = (*FOUR, "separate-gates", "constant-value", "mlp-direction", "own-token-compressors")


def on_meta(model: torch.nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.device.type == "meta"}


def same_answers(case: str, model: DeepDeltaForCausalLM) -> None:
    """Logits and cached decoding, of a model whose weights lie elsewhere."""
    expected = small_model(case)
    close(logits(model), logits(expected), atol=FP32)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    ids = token_ids(2, 5)
    assert torch.equal(model.generate(ids, **options), expected.generate(ids, **options))
    assert on_meta(model)  # and there they are again


@pytest.mark.parametrize("case", CASES)
def test_weights_on_the_cpu_until_their_module_runs(case):
    model = small_model(case)
    everything = {name for name, _ in model.named_parameters()}
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert everything <= on_meta(model)
    same_answers(case, model)


@pytest.mark.parametrize("case", CASES)
def test_weights_on_disk_until_their_module_runs(case, tmp_path):
    model = small_model(case)
    everything = {name for name, _ in model.named_parameters()}
    accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    assert everything <= on_meta(model)
    same_answers(case, model)


@pytest.mark.parametrize("case", FOUR)
def test_a_device_map_with_layers_on_disk(case, tmp_path: Path):
    small_model(case).save_pretrained(tmp_path / "model")
    places = {
        "model.embed_tokens": "cpu", "lm_head": "cpu", "model.expand": "cpu",
        "model.layers.0": "cpu", "model.layers.1": "disk", "model.readout": "disk",
        "model.norm": "cpu", "model.rotary_emb": "cpu",
    }  # fmt: skip
    model = DeepDeltaForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload"
    ).eval()
    assert {name for name in on_meta(model) if "layers.1" in name}
    assert not {name for name in on_meta(model) if "layers.0" in name}
    same_answers(case, model)
