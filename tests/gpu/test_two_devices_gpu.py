"""A model whose layers lie on two GPUs, and one that is copied to both: the numbers of one GPU."""

import copy

import pytest
import torch
from helpers import close, shaken, tiny_model, token_ids
from torch import nn

accelerate = pytest.importorskip("accelerate", reason="models are spread by accelerate")

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

VARIANTS = ("additive", "ddl-scalar", "ddl-cc", "ddl-tc")


def halves(variant: str, rebuild: int | str = "speed"):
    """The model on the first GPU, and the same with layers 3 and 4 and the readout on the second."""
    model = shaken(tiny_model(variant, num_hidden_layers=4, rebuild=rebuild), 0.1)
    places = {"model.embed_tokens": 0, "model.expand": 0, "model.rotary_emb": 0, "lm_head": 0}
    places |= {f"model.layers.{layer}": int(layer > 1) for layer in range(4)}
    places |= {"model.readout": 1, "model.norm": 1}
    spread = accelerate.dispatch_model(copy.deepcopy(model), places)
    return model.to("cuda:0"), spread


@pytest.mark.parametrize("rebuild", ["speed", 5])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_layers_on_two_devices(variant, rebuild):
    """Padding, packed documents and a cache travel with the state."""
    one, two = halves(variant, rebuild)
    assert {p.device.index for p in two.parameters()} == {0, 1}
    ids = token_ids(2, 12).to("cuda:0")
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    packed = {
        "position_ids": torch.tensor([[*range(5), *range(7)]] * 2, device="cuda:0"),
        "use_cache": False,
    }
    for given in ({}, {"attention_mask": mask}, packed):
        actual = two(ids, **given).logits.to("cuda:0")
        close(actual, one(ids, **given).logits, atol=1e-4)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    assert torch.equal(two.generate(ids, **options), one.generate(ids, **options))


@pytest.mark.parametrize("variant", VARIANTS)
def test_replicas_have_compressors_of_their_own(variant):
    """nn.DataParallel copies modules shallowly: a hidden reference would read the first GPU's."""
    model = shaken(tiny_model(variant), 0.1).to("cuda:0")
    ids = token_ids(4, 8).to("cuda:0")
    expected = model(ids, use_cache=False).logits
    replicas = nn.DataParallel(model, [0, 1])
    close(replicas(ids, use_cache=False).logits, expected, atol=1e-4)
