"""The fused kernels compute what the reference does: outputs and every gradient, in any shape."""

import math

import pytest
import torch
from fused_cases import DEVICE, DOCUMENTS, WRITES, Case, can_run, measure, right
from helpers import normal

from deep_delta import delta_rewrite
from deep_delta.ops import apply_write, expand_embeddings, read_state

pytest.importorskip("triton", reason="the fused kernels need triton")
pytestmark = can_run


def cases(*each: Case, rarer: tuple[Case, ...] = ()) -> pytest.MarkDecorator:
    """One test for each case; those of the rarer ones are slow."""
    slow = [pytest.param(case, marks=pytest.mark.slow) for case in rarer]
    return pytest.mark.parametrize("case", [*each, *slow], ids=str)


@cases(
    *(Case(write) for write in (None, "plain", "delta", "delta, no length")),
    *(Case(write, channels=1, taps=None) for write in (None, "plain", "write-only", "delta")),
    *(Case(write, taps=4, channels=2) for write in (None, "delta")),
    Case(channels=8, tokens=3),
    Case(channels=1, taps=4),
    rarer=(
        *(Case(write) for write in WRITES if write not in ("plain", "delta", "delta, no length")),
        *(
            Case(write, channels=1, taps=None)
            for write in WRITES
            if write not in ("plain", "write-only", "delta")
        ),
        *(Case(write, taps=2, channels=2) for write in WRITES),
        *(Case(write, taps=4, channels=2) for write in WRITES if write != "delta"),
        *(Case(channels=channels, taps=2, tokens=3) for channels in (1, 8)),
        Case(channels=1, tokens=3),
        Case(channels=8, taps=4),
        Case(channels=8, gates=2),
    ),
)
def test_read_is_the_reference_for_every_write_and_compressor(case):
    right(case.read, case.tensors())


@cases(
    *(Case(width=width, channels=2, batch=1, tokens=2) for width in (2, 769, 768, 1100)),
    Case(width=1100, channels=2, batch=1, tokens=2, taps=2),
    *(Case("plain", width=w, channels=1, taps=None, batch=1, tokens=2) for w in (1, 1100, 5120)),
    rarer=(
        *(Case(width=width, channels=2, batch=1, taps=2) for width in (100, 768)),
        Case("plain", width=769, channels=1, taps=None, batch=1),
        Case(width=100, channels=2, batch=1),
    ),
)
def test_read_is_the_reference_at_any_width(case):
    """In one piece or several, all of whose features are used (768) or not (1100)."""
    right(case.read, case.tensors())


def logits(gates: int, values: bool, on_state: bool) -> Case:
    return Case(gates=gates, values=values, value_on_state=on_state, channels=2, tokens=3)


@cases(
    logits(0, False, False),
    logits(0, True, False),
    logits(2, False, False),
    logits(1, True, True),
    Case(gates=2, value_on_state=True, taps=4, channels=2, tokens=3),
    Case(gates=0, taps=2, channels=2, values=False, tokens=3),
    Case(channels=2, biases=False, tokens=3),
    Case(channels=16, gates=2, tokens=2),  # more sums than fit one reduction
    rarer=(
        logits(0, True, True),
        logits(1, False, False),
        logits(1, True, False),
        logits(2, True, False),
        logits(2, True, True),
        Case(gates=2, taps=4, channels=2),
        *(
            Case(channels=1, taps=None, gates=2, value_on_state=on_state)
            for on_state in (True, False)
        ),
    ),
)
def test_read_is_the_reference_with_any_logits(case):
    right(case.read, case.tensors())


@cases(
    Case(taps=2, documents=True, tokens=10, channels=1),
    Case(None, taps=4, documents=True, tokens=10, channels=2, batch=1),
    Case(taps=9, documents=False, tokens=3, channels=1),  # longer than the sequence
    rarer=tuple(Case(taps=taps, documents=True, tokens=10, channels=1) for taps in (1, 4)),
)
@pytest.mark.slow
def test_compressor_looks_at_no_other_document_or_sequence(case):
    right(case.read, case.tensors())
    right(case.reduce, case.tensors())


@pytest.mark.parametrize("layout", ["features last", "channel major", "repeated", "sliced"])
@pytest.mark.parametrize("write", [pytest.param(None, marks=pytest.mark.slow), "delta"])
def test_state_may_lie_in_any_way(layout, write):
    case = Case(write, layout=layout, tokens=2)
    right(case.read, case.tensors())
    right(case.reduce, case.tensors())


@cases(
    Case(batch=1, tokens=1),
    Case(batch=1, tokens=1, taps=4),
    Case(batch=1, tokens=1, channels=1, taps=None),
    Case(batch=3, tokens=1, taps=2),
)
def test_one_token_is_enough(case):
    right(case.read, case.tensors())
    right(case.reduce, case.tensors())


@cases(
    *(Case(write, channels=1, taps=None, tokens=2) for write in ("plain", "delta")),
    Case(taps=4, tokens=2, channels=2),
    rarer=(Case(None, channels=1, taps=None, tokens=2), Case(tokens=2, channels=2)),
)
@pytest.mark.parametrize(
    "used", [(0,), (1,), (2,), pytest.param((3,), marks=pytest.mark.slow)], ids=str
)
def test_outputs_that_nobody_uses_need_no_gradient(case, used):
    right(case.read, case.tensors(), used=used)


@cases(Case(), Case(taps=4, channels=2), Case("plain", channels=1, taps=None))
def test_gradient_may_be_one_expanded_number(case):
    right(case.read, case.tensors(), ones=True)
    right(case.reduce, case.tensors(), ones=True)


@cases(
    Case(),
    *(Case(write, taps=4, channels=2) for write in (None, "delta")),
    *(Case(write, channels=1, taps=None) for write in ("plain", "delta")),
    rarer=(
        *(Case(write) for write in (None, "spread", "write-only")),
        Case(None, channels=1, taps=None),
    ),
)
def test_last_read_is_the_reference(case):
    right(case.reduce, case.tensors())


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("channels", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_settled_write_is_the_reference(write, channels):
    case = Case(write, channels=channels, gates=0, values=False, taps=None)
    tensors = case.tensors()
    del tensors["norm_weight"]

    def settle(backend, state, direction, target=None, erase=None):
        eps = case.fixed()["eps"]
        return (apply_write(state, direction, target, erase, eps=eps, backend=backend),)

    right(settle, tensors)


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("erase", [True, False])
def test_rewrite_is_the_reference(lead, erase):
    tokens, shapes = math.prod(lead), {"state": (63, 3), "direction": (63,), "value": (3,)}
    shapes["gate"] = ()
    tensors = {n: normal(1, tokens, *s, seed=i) for i, (n, s) in enumerate(shapes.items())}

    def rewrite(backend, **inputs):
        shaped = {name: tensor.reshape((*lead, *shapes[name])) for name, tensor in inputs.items()}
        return (delta_rewrite(**shaped, erase=erase, backend=backend),)

    right(rewrite, tensors)


@pytest.mark.parametrize(
    "taps", [1, *(pytest.param(taps, marks=pytest.mark.slow) for taps in (2, 3)), 4]
)
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["one document", "packed"])
@pytest.mark.parametrize(
    ("width", "channels"), [pytest.param(63, 1, marks=pytest.mark.slow), (63, 3), (300, 2)]
)
def test_embedding_convolution_is_the_reference(taps, documents, width, channels):
    tensors = {
        "embeddings": normal(2, 10, width),  # 300 is two pieces
        "kernel": normal(width, channels, taps, seed=1),
    }
    segments = None if documents is None else documents.to(DEVICE)

    def expand(backend, embeddings, kernel):
        return (expand_embeddings(embeddings, kernel, segments, backend=backend),)

    right(expand, tensors)


@pytest.mark.parametrize("batch", [1, 3])
def test_kernel_of_the_embedding_convolution_may_be_longer_than_the_sequence(batch):
    tensors = {"embeddings": normal(batch, 2, 63), "kernel": normal(63, 2, 4, seed=1)}

    def expand(backend, embeddings, kernel):
        return (expand_embeddings(embeddings, kernel, backend=backend),)

    right(expand, tensors)


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e4])
@pytest.mark.parametrize("length", [1e-6, 1e4])
@pytest.mark.parametrize("taps", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_numbers_may_be_large_or_small(size, length, taps):
    case = Case(taps=taps, tokens=2, channels=2)
    tensors = case.tensors()
    for name, factor in (("state", size), ("direction", length), ("target", size)):
        tensors[name] = tensors[name] * factor
    right(case.read, tensors)


def test_gradients_that_are_one_number_are_judged_by_the_terms_they_sum():
    """Over many draws, since a sum that cancels by chance makes any single error look large."""
    errors = {"reference": [], "triton": []}
    for seed in range(32):
        tensors = {
            "state": normal(1, 63, 1, seed=seed),
            "direction": normal(1, 63, seed=seed + 100) * 1e4,
            "value": normal(1, 1, seed=seed + 200),
            "gate": normal(1, seed=seed + 300),
        }

        def rewrite(backend, **inputs):
            return (delta_rewrite(**inputs, backend=backend),)

        exact = measure(rewrite, tensors, "reference", exact=True)
        key = tensors["direction"] / tensors["direction"].norm()
        grad = normal(1, 63, 1, seed=90)  # about `measure`'s: only its size matters
        terms = (key[..., None] * grad).abs().sum()
        read = (key[..., None] * tensors["state"]).abs().sum()
        sizes = {
            "gradient of value": tensors["gate"].abs().max() * terms,
            "gradient of gate": (tensors["value"].abs().max() + read) * terms,
        }
        for backend, found in errors.items():
            got = measure(rewrite, tensors, backend)
            found.append(
                [((got[n].cpu() - exact[n].cpu()).abs().max() / size) for n, size in sizes.items()]
            )
    reference, fused = (torch.tensor(found).amax(0) for found in errors.values())
    assert (fused <= 2 * reference + torch.finfo().eps).all()


@cases(
    Case(channels=2, tokens=3),
    Case("plain", channels=1, taps=None, tokens=3),
    Case(context_dtype=torch.float16, taps=4, channels=2, tokens=3),
    rarer=(
        Case("spread", channels=2),
        Case(channels=1, taps=None),
        Case(taps=4, channels=2),
        Case(context_dtype=torch.float16, channels=2),
    ),
)
def test_narrow_states_are_computed_in_fp32_and_rounded_once(case):
    right(case.read, case.tensors(), torch.float16)
    right(case.reduce, case.tensors(), torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("write", [pytest.param("write-only", marks=pytest.mark.slow), "delta"])
def test_zero_direction_leaves_the_state_and_gives_no_nan(write, dtype):
    case = Case(write, taps=2, channels=2, tokens=2)
    tensors = case.tensors()
    tensors["direction"][:, 1] = 0
    results = measure(case.read, tensors, "triton", dtype)
    assert torch.equal(results["output 0"][:, 1], tensors["state"].to(dtype).to(DEVICE)[:, 1])
    assert not torch.equal(results["output 0"][:, 0], tensors["state"].to(dtype).to(DEVICE)[:, 0])
    for name, tensor in results.items():
        assert tensor.isfinite().all(), name
    right(case.read, tensors, dtype)


@pytest.mark.parametrize("taps", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_without_gradients_the_outputs_are_the_same(taps):
    case = Case(taps=taps)
    expected = measure(case.read, case.tensors(), "triton")
    inputs = {name: t.float().to(DEVICE) for name, t in case.tensors().items()}
    with torch.no_grad():
        outputs = case.read("triton", **inputs)
    for i, out in enumerate(outputs):
        assert torch.equal(out, expected[f"output {i}"])


@pytest.mark.parametrize("taps", [1, 2])
def test_epsilon_without_a_pending_write_means_nothing(taps):
    case = Case(None, taps=taps, channels=2, tokens=2)
    inputs = {name: t.float().to(DEVICE).requires_grad_() for name, t in case.tensors().items()}
    options = {"norm_eps": 1e-5, "backend": "triton"}
    gradients = [
        torch.autograd.grad(read_state(**inputs, eps=eps, **options).context.sum(), inputs["state"])
        for eps in (None, 0.3)
    ]
    assert torch.equal(*(gradient for (gradient,) in gradients))


@pytest.mark.parametrize("training", [True, False])
def test_nothing_pending_leaves_the_state(training):
    """Without a backward pass to come it is not even copied."""
    case = Case(None)
    inputs = {name: t.float().to(DEVICE) for name, t in case.tensors().items()}
    with torch.set_grad_enabled(training):
        state = case.read("triton", **inputs)[0]
    assert torch.equal(state, inputs["state"])
    assert training or state.data_ptr() == inputs["state"].data_ptr()
