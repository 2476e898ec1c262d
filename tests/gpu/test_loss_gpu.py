"""The losses at a size where memory matters: they agree, and hold what they say they hold."""

import importlib.util

import pytest
import torch
from helpers import close
from torch import Tensor

from deep_delta.model.loss import LOSSES

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
has_liger = importlib.util.find_spec("liger_kernel") is not None
needs_liger = pytest.mark.skipif(not has_liger, reason="needs liger-kernel")

TOKENS, WIDTH, VOCABULARY = 8192, 256, 50304
LOGITS = TOKENS * VOCABULARY * 2  # bytes in bf16


def run(function) -> tuple[list[Tensor], int]:
    """Loss and gradients under bf16 autocast, and the peak of memory beyond what was there."""
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(8, TOKENS // 8, WIDTH, device="cuda", generator=generator)
    weight = 0.1 * torch.randn(VOCABULARY, WIDTH, device="cuda", generator=generator)
    labels = torch.randint(VOCABULARY, (8, TOKENS // 8), device="cuda", generator=generator)
    labels[:, 100:300] = -100
    inputs = (hidden.requires_grad_(), weight.requires_grad_())
    for _ in range(2):  # compiled and tuned in the first pass
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", torch.bfloat16):
            loss = function(*inputs, labels, num_items_in_batch=7000, multiplier=1.5)
        results = [loss.detach(), *torch.autograd.grad(loss, inputs)]
        peak = torch.cuda.max_memory_allocated() - before
    return results, peak


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "compiled", "share"),
    [
        pytest.param("torch", True, 2.3, id="torch compiled"),  # logits, their gradient, the rest
        pytest.param("liger", False, 0.5, id="liger", marks=needs_liger),
    ],
)
def test_losses_agree_and_spare_memory(name, compiled, share):
    torch.compiler.reset()
    function = torch.compile(LOSSES[name], fullgraph=True) if compiled else LOSSES[name]
    actual, peak = run(function)
    expected, eager_peak = run(LOSSES["torch"])
    assert peak < share * LOGITS < eager_peak
    for tensor, other in zip(actual, expected, strict=True):
        assert tensor.dtype == torch.float32
        close(tensor, other, atol=0.01 * other.abs().max().item())
