"""A model under FSDP2 is the plain model: the fused kernels get along with its hooks."""

import pytest
import torch
from fused_cases import DEVICE, can_run
from helpers import shaken, tiny_config, token_ids
from torch import Tensor

from deep_delta import DeepDeltaConfig, DeepDeltaForCausalLM

pytest.importorskip("triton", reason="the fused kernels need triton")
pytestmark = can_run


@pytest.fixture
def process_group(tmp_path):
    """One process, alone in its group."""
    from torch import distributed

    backend = "nccl" if DEVICE == "cuda" else "gloo"
    file = f"file://{tmp_path / 'store'}"
    distributed.init_process_group(backend, init_method=file, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def one_step(config: DeepDeltaConfig, sharded: bool) -> dict[str, Tensor]:
    """The loss and all gradients of one step."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = shaken(DeepDeltaForCausalLM(config), 0.1).train().to(DEVICE)
    if sharded:
        mesh = init_device_mesh(DEVICE, (1,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    ids = token_ids(1, 4).to(DEVICE)
    loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    gradients = {name: whole(p.grad) for name, p in model.named_parameters()}
    return {"loss": loss.detach()} | gradients


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["ddl-cc", "ddl-tc"])
def test_fully_sharded_model_is_the_plain_one(variant, process_group):
    config = tiny_config(variant, backend="triton", rebuild=3)
    expected, actual = one_step(config, sharded=False), one_step(config, sharded=True)
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        error = (actual[name] - tensor).abs().max()
        # Sums in another order, by cuBLAS or in the embedding's gradient.
        assert error <= 1e-5 * max(tensor.abs().max(), 1e-3), f"{name} is off by {error:.1e}"
