"""The loss from hidden states against transformers' own loss from logits."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from helpers import REPO, VARIANTS, close, normal, one_line_error, shaken, tiny_model, token_ids
from torch import Tensor
from transformers.loss.loss_utils import ForCausalLMLoss

from deep_delta.model import loss as loss_module
from deep_delta.model.loss import LOSSES, linear_cross_entropy, resolve_loss

IDS = token_ids(3, 7)
PARTLY = torch.where(torch.arange(7) % 3 == 1, -100, IDS)
CASES = {
    "plain": {"labels": IDS},
    "ignored": {"labels": PARTLY},
    "another ignored label": {"labels": IDS, "ignore_index": int(IDS[1, 3])},
    "items": {"labels": PARTLY, "num_items_in_batch": torch.tensor(29)},
    "items as a number": {"labels": PARTLY, "num_items_in_batch": 29},
    "shifted": {"labels": None, "shift_labels": PARTLY},
    "shifted beside labels": {"labels": IDS, "shift_labels": PARTLY, "num_items_in_batch": 5.0},
    "multiplier": {"labels": PARTLY, "multiplier": 2.5},
}
every_case = pytest.mark.parametrize("case", CASES)


def tensors() -> tuple[Tensor, Tensor]:
    """Hidden states (3, 7, 16) and the weight (61, 16) of a head, with logits of size 4."""
    hidden = normal(3, 7, 16, seed=1, dtype=torch.float32)
    return hidden.requires_grad_(), normal(61, 16, seed=2, dtype=torch.float32).requires_grad_()


def from_logits(
    hidden: Tensor, weight: Tensor, labels: Tensor | None, *, multiplier: float = 1.0, **given
) -> Tensor:
    """What the model does without `skip_logits`: the logits, and transformers' loss."""
    logits = torch.nn.functional.linear(hidden, weight) * multiplier
    return ForCausalLMLoss(logits, labels, vocab_size=61, **given)


def with_gradients(function, case: str, dtype: torch.dtype | None = None) -> list[Tensor]:
    """The loss, and its gradients to hidden states and weight."""
    hidden, weight = tensors()
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        loss = function(hidden, weight, **CASES[case])
    return [loss, *torch.autograd.grad(loss, (hidden, weight))]


@every_case
def test_value_and_gradients_are_those_of_transformers(case):
    actual = with_gradients(linear_cross_entropy, case)
    for tensor, expected in zip(actual, with_gradients(from_logits, case), strict=True):
        close(tensor, expected, atol=2e-6)


@every_case
def test_bf16_autocast_rounds_the_logits_and_nothing_after_them(case):
    actual = with_gradients(linear_cross_entropy, case, torch.bfloat16)
    expected = with_gradients(from_logits, case, torch.bfloat16)
    assert actual[0].dtype == torch.float32
    close(actual[0], expected[0], atol=2e-6)
    for tensor, other in zip(actual[1:], expected[1:], strict=True):
        close(tensor, other, atol=1e-6, rtol=1e-2)  # one rounding of a product may fall elsewhere
    exact = with_gradients(linear_cross_entropy, case)
    assert not torch.equal(actual[0], exact[0])
    close(actual[0], exact[0], atol=0.1)


def test_a_model_in_bf16_sums_in_fp32():
    hidden, weight = (tensor.bfloat16() for tensor in tensors())
    loss = linear_cross_entropy(hidden, weight, PARTLY)
    assert loss.dtype == torch.float32
    close(loss, from_logits(hidden, weight, PARTLY), atol=2e-6)


def test_fp64_stays_fp64():
    hidden, weight = (tensor.double() for tensor in tensors())
    loss = linear_cross_entropy(hidden, weight, IDS)
    logits = (hidden @ weight.T)[:, :-1].flatten(0, 1)
    close(loss, torch.nn.functional.cross_entropy(logits, IDS[:, 1:].flatten()), atol=1e-12)


def test_the_last_tokens_and_ignored_ones_have_no_gradient():
    _, to_hidden, _ = with_gradients(linear_cross_entropy, "ignored")
    used = to_hidden.abs().sum(-1) > 0
    # Token t predicts token t + 1, and labels 1 and 4 are left out.
    assert torch.equal(
        used, torch.tensor([False, True, True, False, True, True, False]).expand(3, 7)
    )


def test_no_prediction_at_all():
    hidden, weight = tensors()
    nothing = torch.full_like(IDS, -100)
    assert linear_cross_entropy(hidden, weight, nothing).isnan()
    loss = linear_cross_entropy(hidden, weight, nothing, num_items_in_batch=4)
    assert loss == 0
    for gradient in torch.autograd.grad(loss, (hidden, weight)):
        assert (gradient == 0).all()


def test_labels_that_do_not_fit_are_one_line():
    hidden, weight = tensors()
    one_line_error(lambda: linear_cross_entropy(hidden, weight, None), "labels")
    one_line_error(lambda: linear_cross_entropy(hidden, weight, IDS[:2]), "(2, 7)", "(3, 7, 16)")


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_that_skips_its_logits_has_the_same_loss_and_gradients(variant):
    model = shaken(tiny_model(variant, logit_multiplier=0.5), 0.1).train()
    ids = token_ids(2, 8)
    labels = torch.where(ids % 5 == 0, -100, ids)
    assert (labels == -100).any()

    def gradients(**given) -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        out = model(ids, labels=labels, num_items_in_batch=torch.tensor(11), **given)
        assert (out.logits is None) == bool(given)
        out.loss.backward()
        return out.loss, {name: p.grad.clone() for name, p in model.named_parameters()}

    expected, plain = gradients()
    loss, skipping = gradients(skip_logits=True)
    close(loss, expected, atol=2e-6)
    for name, gradient in plain.items():
        close(skipping[name], gradient, atol=1e-6, rtol=1e-5)


def test_skipping_takes_shifted_labels_and_needs_labels():
    model, ids = shaken(tiny_model()), token_ids(2, 9)
    given = {"shift_labels": ids[:, 1:].contiguous()}
    out = model(ids[:, :-1], skip_logits=True, **given)
    assert out.logits is None
    close(out.loss, model(ids[:, :-1], **given).loss, atol=2e-6)
    assert torch.equal(model(ids, skip_logits=True).logits, model(ids).logits)


@pytest.mark.parametrize("skip_logits", [True, False])
def test_what_fsdp_gathers_together_runs(skip_logits):
    """Embeddings, last norm and head share a gathering, which ends when all three have run."""
    model, ids = tiny_model(), token_ids(1, 4)
    ran = []
    for name in ("model.embed_tokens", "model.norm", "lm_head"):
        module = model.get_submodule(name)
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    model(ids, labels=ids, skip_logits=skip_logits, use_cache=False)
    assert ran == ["model.embed_tokens", "model.norm", "lm_head"]


def test_the_models_loss_can_be_replaced():
    model, ids = tiny_model(), token_ids(1, 4)
    model.linear_cross_entropy = lambda hidden, weight, labels, **_: weight.sum() + labels.sum()
    expected = model.lm_head.weight.sum() + ids.sum()
    close(model(ids, labels=ids, skip_logits=True).loss, expected, atol=0)


def test_what_cannot_run_is_one_line(monkeypatch):
    cpu = torch.device("cpu")
    assert resolve_loss("torch", cpu) is linear_cross_entropy
    one_line_error(lambda: resolve_loss("ligr", cpu), "'ligr'", "torch, liger")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(loss_module.importlib.util, "find_spec", lambda name: True)
    one_line_error(lambda: resolve_loss("liger", cpu), "GPU")
    one_line_error(lambda: LOSSES["liger"](*tensors(), IDS), "GPU")
    monkeypatch.setattr(loss_module.importlib.util, "find_spec", lambda name: None)
    one_line_error(
        lambda: resolve_loss("liger", torch.device("cuda")), "deep-delta-learning[liger]"
    )


def compare_liger() -> None:
    """Every case by liger's kernels; run by the test below, in a process with the interpreter."""
    for case in CASES:
        actual = with_gradients(LOSSES["liger"], case)
        for tensor, expected in zip(actual, with_gradients(from_logits, case), strict=True):
            close(tensor, expected, atol=2e-6, rtol=1e-6)
        # The interpreter truncates to bf16 where it should round: a unit of the eighth bit.
        actual = with_gradients(LOSSES["liger"], case, torch.bfloat16)
        for tensor, expected in zip(actual, with_gradients(from_logits, case), strict=True):
            assert tensor.dtype == torch.float32
            close(tensor, expected, atol=0.02 * expected.abs().max().item())


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("liger_kernel"), reason="needs liger-kernel")
def test_liger_agrees_in_tritons_interpreter():
    code = "from model.test_loss import compare_liger; compare_liger()"
    paths = os.pathsep.join((str(REPO), str(REPO / "tests")))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=200)
