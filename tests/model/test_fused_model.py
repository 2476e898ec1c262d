"""A whole model on the fused kernels is the model on the reference: loss and every gradient."""

import pytest
import torch
from fused_cases import DEVICE, can_run
from helpers import CASES, TINY, shaken, tiny_config, token_ids

from deep_delta import DeepDeltaConfig, DeepDeltaForCausalLM
from deep_delta.residual import AdditiveResidual, DeltaResidual, State

pytest.importorskip("triton", reason="the fused kernels need triton")
pytestmark = can_run

SIZE = {**TINY, "num_attention_heads": 1}
VARIANTS = (
    "additive", "ddl-scalar", "ddl-cc", "ddl-tc", "write-only-cc", "additive-expanded",
)  # fmt: skip
# ddl-tc has a quick test of its own, with a cache.
QUICK = ("additive", "ddl-scalar", "ddl-cc")
OPTIONS = ("separate-gates", "layer-gate", "fixed-gate", "two-layer-gate", "constant-value",
           "mlp-direction", "value-from-state")  # fmt: skip


def step(config: DeepDeltaConfig, backend: str, checkpoint: dict | None = None, **inputs):
    """The loss and all gradients of one step, from the same shaken parameters in every call."""
    config = DeepDeltaConfig.from_dict({**config.to_dict(), "backend": backend})
    torch.manual_seed(0)
    model = shaken(DeepDeltaForCausalLM(config), 0.1).train().to(DEVICE)
    if checkpoint:
        model.gradient_checkpointing_enable(checkpoint)
    ids = token_ids(1, 4).to(DEVICE)
    loss = model(ids, labels=ids, use_cache=False, **inputs).loss
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters()}


def agree(config: DeepDeltaConfig, **options) -> None:
    expected, actual = step(config, "reference", **options), step(config, "triton", **options)
    # A bias sums terms that almost cancel: its own size is no measure of them.
    floor = 1e-3 * max(tensor.abs().max() for tensor in expected.values())
    for name, tensor in expected.items():
        assert tensor.abs().max() > 0, name
        error = (actual[name] - tensor).abs().max() / max(tensor.abs().max(), floor)
        assert error <= 1e-4, f"{name} is off by {error:.1e} of its largest entry"


slow = pytest.mark.slow


@pytest.mark.parametrize("parameterization", ["paper", pytest.param("published", marks=slow)])
@pytest.mark.parametrize(
    "variant", [*QUICK, *(pytest.param(name, marks=slow) for name in VARIANTS if name not in QUICK)]
)
@pytest.mark.slow
def test_variant_is_the_reference(variant, parameterization):
    agree(DeepDeltaConfig.from_preset(variant, "tiny", parameterization=parameterization, **SIZE))


@slow
@pytest.mark.parametrize("case", OPTIONS)
def test_option_is_the_reference(case):
    assert case in CASES
    agree(tiny_config(case))


def same_numbers(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Bit for bit; compiled, up to fp32 rounding in sums over d.

    The state is the same bit for bit there too (tests/gpu), but a kernel that rebuilds it is
    another kernel, and the compiler may lay its sums out in another order.
    """
    if DEVICE == "cpu":
        return torch.equal(actual, expected)
    return (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


@slow
@pytest.mark.parametrize("variant", ["ddl-cc", "ddl-tc", "additive-expanded"])
def test_rebuilding_changes_no_gradient(variant):
    stored = step(tiny_config(variant, rebuild=0), "triton")
    for rebuild in (1, 3):
        for name, gradient in step(tiny_config(variant, rebuild=rebuild), "triton").items():
            assert same_numbers(gradient, stored[name]), name


@pytest.mark.parametrize("variant", ["ddl-cc", pytest.param("additive-expanded", marks=slow)])
@pytest.mark.slow
def test_rebuilding_changes_no_logit_and_no_hidden_state(variant):
    ids, outputs = token_ids(1, 4).to(DEVICE), []
    for rebuild in (0, 1, "memory"):
        torch.manual_seed(0)
        config = tiny_config(variant, rebuild=rebuild, backend="triton")
        model = shaken(DeepDeltaForCausalLM(config), 0.1).eval().to(DEVICE)
        with torch.no_grad():
            outputs.append(model(ids, use_cache=False, output_hidden_states=True))
    for other in outputs[1:]:
        assert same_numbers(other.logits, outputs[0].logits)
        for actual, expected in zip(other.hidden_states, outputs[0].hidden_states, strict=True):
            assert same_numbers(actual, expected)


@pytest.mark.parametrize("channels", [1, pytest.param(3, marks=slow)])
@pytest.mark.slow
def test_residuals_of_all_kinds_follow_each_other(channels):
    """Whatever is pending, and whether the state is stored: delta, twice additive, write-only."""
    results = []
    for rebuild in (0, 1, 5):
        torch.manual_seed(0)
        how = {"backend": "triton", "rebuild": rebuild}
        stack = [
            DeltaResidual(63, channels, **how),
            AdditiveResidual(63, channels, **how),
            AdditiveResidual(63, channels, **how),
            DeltaResidual(63, channels, erase=False, **how),
            DeltaResidual(63, channels, **how),
        ]
        x = torch.randn(1, 3, channels, 63).to(DEVICE).requires_grad_()
        state = State(x)
        for residual in stack:
            state = residual.to(DEVICE)(state, torch.tanh)
        out = state.settle("triton")
        parameters = [p for residual in stack for p in residual.parameters()]
        gradients = torch.autograd.grad(out.square().sum(), [x, *parameters], allow_unused=True)
        results.append([out, *(g for g in gradients if g is not None)])
    for other in results[1:]:
        for actual, expected in zip(other, results[0], strict=True):
            assert same_numbers(actual, expected)


@slow
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("variant", ["ddl-cc", "ddl-tc"])
def test_gradient_checkpointing_is_the_reference(variant, reentrant):
    agree(tiny_config(variant, rebuild=3), checkpoint={"use_reentrant": reentrant})


@slow
def test_packed_documents_are_the_reference():
    position_ids = torch.tensor([[0, 1, 0, 1]], device=DEVICE)
    agree(tiny_config("ddl-tc"), position_ids=position_ids)


@pytest.mark.parametrize("variant", [pytest.param("ddl-cc", marks=slow), "ddl-tc"])
@pytest.mark.slow
def test_decoding_with_a_cache_is_the_reference(variant):
    """Token by token, with a padded beginning: the compressor sees more than the state."""
    ids, mask = token_ids(2, 5).to(DEVICE), torch.ones(2, 5, dtype=torch.long, device=DEVICE)
    mask[0, :2] = 0
    logits = []
    for backend in ("reference", "triton"):
        torch.manual_seed(0)
        model = shaken(DeepDeltaForCausalLM(tiny_config(variant, backend=backend)), 0.1)
        model = model.eval().to(DEVICE)
        with torch.no_grad():
            first = model(ids[:, :4], attention_mask=mask[:, :4], use_cache=True)
            cache = {"past_key_values": first.past_key_values, "attention_mask": mask}
            logits.append((first.logits, model(ids[:, 4:], **cache).logits))
    for actual, expected in zip(*reversed(logits), strict=True):
        kept = mask[:, : actual.shape[1]].bool() if actual.shape[1] > 1 else ...
        assert (actual - expected)[kept].abs().max() <= 1e-5 * expected.abs().max()
