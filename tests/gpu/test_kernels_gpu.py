"""The fused kernels as they are compiled: every result, long runs of tokens, large addresses.

The interpreter's tests (tests/ops/test_fused*.py) try every option; these try every dtype and the
real widths, because a kernel takes seconds to compile.
"""

import dataclasses
from collections.abc import Callable, Iterator

import pytest
import torch
from fused_cases import (
    DEVICE,
    DOCUMENTS,
    READS,
    Case,
    chain,
    judge,
    measure,
    right,
    same,
)
from helpers import normal, shaken, tiny_config, token_ids
from torch import Tensor

from deep_delta import DeepDeltaForCausalLM
from deep_delta.model.compile import compile_layers
from deep_delta.ops import apply_write, expand_embeddings, launch

pytest.importorskip("triton", reason="the fused kernels need triton")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
PLAIN = Case("plain", channels=1, taps=None, gates=0, values=False)
SCALAR = Case(channels=1, taps=None)

# Two or three kernels each. Under autocast the context is bf16 too.
KERNELS = [
    (BF16, dataclasses.replace(PLAIN, width=768, context_dtype=BF16)),
    (BF16, dataclasses.replace(SCALAR, width=1024, context_dtype=BF16)),
    (BF16, Case(width=768, channels=4, context_dtype=BF16)),
    (BF16, Case(width=768, channels=4, taps=4, context_dtype=BF16)),
    (BF16, Case(width=63, taps=4)),
    (BF16, Case(width=769, channels=4)),
    (BF16, Case(width=1024, channels=8)),
    (BF16, Case(width=4096, channels=8)),
    (FP32, dataclasses.replace(SCALAR, width=63)),
    (FP32, Case(width=63)),
    (FP32, Case(width=768, channels=4)),
    (FP32, Case(width=1024, taps=4, value_on_state=True)),
    (FP32, Case(width=768, channels=8, taps=4)),
    (FP16, dataclasses.replace(SCALAR, width=768)),
    (FP16, Case(width=1024, channels=4)),
    (FP16, Case(width=63, channels=8, taps=4)),
]
every_kernel = pytest.mark.parametrize(
    ("dtype", "case"), KERNELS, ids=lambda value: str(value).removeprefix("torch.")
)


def longer(case: Case, batch: int = 3, tokens: int = 37) -> Case:
    return dataclasses.replace(case, batch=batch, tokens=tokens)


@every_kernel
def test_read_is_the_reference(dtype, case):
    right(longer(case).read, longer(case).tensors(), dtype)


@every_kernel
def test_programs_that_walk_along_many_tokens_are_the_reference(dtype, case, monkeypatch):
    """With two processors each program gets many tokens, and the last one fewer."""
    monkeypatch.setattr(launch, "processors", lambda device: 2)
    right(longer(case).read, longer(case).tensors(), dtype)


def test_more_tokens_than_programs_are_the_reference():
    case = longer(Case(width=768, channels=4, context_dtype=BF16), 4, 700)
    right(case.read, case.tensors(), BF16)


@pytest.mark.parametrize(("dtype", "taps"), [(BF16, 4), (FP32, 1)])
def test_last_read_and_documents_are_the_reference(dtype, taps):
    case = Case(width=768, channels=4, taps=taps, documents=True, tokens=10)
    right(case.reduce, case.tensors(), dtype)
    right(case.read, case.tensors(), dtype)


def expand(backend, embeddings, kernel):
    segments = DOCUMENTS.to(DEVICE)[:, : embeddings.shape[1]]
    return (expand_embeddings(embeddings, kernel, segments, dtype=BF16, backend=backend),)


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_embedding_convolution_is_the_reference(dtype):
    tensors = {"embeddings": normal(2, 10, 768), "kernel": normal(768, 4, 4, seed=1)}

    def convolve(backend, embeddings, kernel):
        segments = DOCUMENTS.to(DEVICE)
        return (expand_embeddings(embeddings, kernel, segments, backend=backend),)

    right(convolve, tensors, dtype)


@pytest.mark.parametrize("case", [SCALAR, Case(channels=4), Case(channels=4, taps=4)], ids=str)
def test_asking_for_memory_ahead_changes_no_number(case, monkeypatch):
    """Up to the end of the tokens, where nothing more is to be asked for."""
    from deep_delta.ops import fused_launch

    case, results = longer(case), []
    for ahead in (0, 1, 5):

        def plan(kernel, *size, ahead=ahead, **how):
            programs, options = launch.plan(kernel, *size, **how)
            return programs, options | ({"AHEAD": ahead} if kernel != "norm" else {})

        monkeypatch.setattr(fused_launch, "plan", plan)
        results.append(measure(case.read, case.tensors(), "triton", BF16))
    same(*results[:2])
    same(*results[1:])


@every_kernel
def test_two_runs_agree_bit_for_bit(dtype, case):
    case = longer(case, 4, 300)
    same(*(measure(case.read, case.tensors(), "triton", dtype) for _ in range(2)))


@pytest.mark.parametrize("wide", [True, False])
def test_gradients_from_rebuilt_states_are_those_from_kept_ones_bit_for_bit(wide, monkeypatch):
    """With as many warps whether X' is stored or not, so that readouts are summed in one order."""
    from deep_delta.ops import fused_launch

    def plan(*size, stores=True, **how):
        return launch.plan(*size, **how)

    monkeypatch.setattr(fused_launch, "plan", plan)
    size = {"width": 768, "channels": 4 if wide else 1, "batch": 2, "tokens": 300}
    kept, trails = [], []
    expected = chain(0, BF16, 1 if wide else None, wide, kept, **size)
    same(chain(3, BF16, 1 if wide else None, wide, trails, **size), expected)
    assert kept == [None] * READS
    assert [0 if trail is None else len(trail.directions) for trail in trails] == [0, 1, 2, 3, 0]


@pytest.mark.parametrize("channels", [1, 4])
def test_rebuilt_state_is_the_stored_one_plus_its_writes_bit_for_bit(channels):
    size = {"width": 768, "channels": channels, "batch": 2, "tokens": 300}
    trails, states = [], []
    chain(3, BF16, 1 if channels > 1 else None, channels > 1, trails, states, **size)
    x = trails[3].state
    for h, r in zip(trails[3].directions, trails[3].rows, strict=True):
        r = r.double().unflatten(0, h.shape[:2])
        # One rounding to fp32, as a fused multiply-add has, and one to the state's dtype.
        x = (x.double() + h.double()[..., None] * r[..., None, :]).float().to(BF16)
    assert torch.equal(apply_write(states[3], trail=trails[3], backend="triton"), x)


def batches(case: Case, count: int, dtype: torch.dtype) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Inputs made on the device, and gradients of X' and of the context."""
    shapes = {n: t.shape for n, t in dataclasses.replace(case, batch=1).tensors().items()}
    generator, inputs = torch.Generator(DEVICE).manual_seed(0), {}
    for name, shape in shapes.items():
        weight = name.endswith(("kernel", "weight"))
        shape = shape if weight else (count, *shape[1:])
        kind = dtype if name in ("state", "direction") else FP32
        inputs[name] = torch.randn(shape, device=DEVICE, dtype=kind, generator=generator)
    grads = [
        torch.randn(*inputs["state"].shape[:n], device=DEVICE, dtype=dtype, generator=generator)
        for n in (4, 3)
    ]
    return inputs, grads


def results(
    case: Case, backend: str, inputs: dict[str, Tensor], grads: list[Tensor]
) -> dict[str, Tensor]:
    """X', the context and the gradients of all that belongs to a token, by name."""
    inputs = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    outputs = case.read(backend, **inputs)[:2]
    names = [name for name in inputs if not name.endswith(("kernel", "weight"))]
    grads = [grad.to(out.dtype) for grad, out in zip(grads, outputs, strict=True)]
    found = torch.autograd.grad(outputs, [inputs[name] for name in names], grads)
    values = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
    return values | {f"gradient of {n}": g for n, g in zip(names, found, strict=True)}


def ends_are_the_reference(case: Case, count: int, dtype: torch.dtype) -> None:
    """Of `count` sequences the first and the last eight, by the rule of the house."""
    inputs, grads = batches(case, count, dtype)
    fused = results(case, "triton", inputs, grads)
    for ends in (slice(0, 8), slice(-8, None)):
        part = {
            name: tensor if name.endswith(("kernel", "weight")) else tensor[ends].clone()
            for name, tensor in inputs.items()
        }
        few = [grad[ends].clone() for grad in grads]
        reference = results(case, "reference", part, few)
        part = {name: tensor.double() for name, tensor in part.items()}
        exact = results(case, "reference", part, [grad.double() for grad in few])
        judge({n: t[ends] for n, t in fused.items()}, reference, exact, inputs, dtype)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "count"),
    [
        (dataclasses.replace(SCALAR, width=768, tokens=8, gates=0, values=False), 375_000),
        (Case(width=768, channels=4, taps=4, tokens=8, gates=0, values=False), 100_000),
    ],
    ids=str,
)
def test_addresses_may_need_64_bits(case, count):
    case = dataclasses.replace(case, context_dtype=BF16)
    assert count * case.tokens * case.width * case.channels > 2**31
    free, _ = torch.cuda.mem_get_info()
    if free < 60e9:
        pytest.skip("needs 60 GB of free memory")
    ends_are_the_reference(case, count, BF16)
    torch.cuda.empty_cache()


def compiled_kernels() -> int:
    """How many kernels Triton holds, of all kinds and on all devices."""
    from deep_delta.ops.kernels import backward, embedding, forward

    kernels = (
        forward.forward,
        backward.norm_backward,
        backward.backward,
        embedding.expand_forward,
        embedding.expand_backward,
    )
    return sum(len(found[0]) for kernel in kernels for found in kernel.device_caches.values())


@pytest.mark.parametrize(
    "case", [Case(channels=4), Case(channels=4, taps=4), Case(channels=1, taps=None)], ids=str
)
def test_other_batch_sizes_need_no_other_kernels(case):
    def every_result(batch: int, tokens: int) -> None:
        size = longer(dataclasses.replace(case, width=768), batch, tokens)
        measure(size.read, size.tensors(), "triton", BF16, ones=True)  # all lie alike in memory
        embeddings = {"embeddings": normal(2, min(tokens, 10), 768)}
        kernel = {"kernel": normal(768, 4, 4, seed=1)}
        measure(expand, embeddings | kernel, "triton", BF16)

    every_result(2, 8)
    before = compiled_kernels()
    assert before >= 4
    for batch, tokens in ((1, 1), (1, 2), (3, 5), (2, 16), (7, 33), (4, 400)):
        every_result(batch, tokens)
        assert compiled_kernels() == before, (batch, tokens)


def model_of(backend: str, **options) -> DeepDeltaForCausalLM:
    torch.manual_seed(0)
    model = DeepDeltaForCausalLM(tiny_config("ddl-cc", backend=backend, **options))
    return shaken(model, 0.1).train().to(DEVICE)


def step(
    model: Callable, parameters: Iterator[tuple[str, Tensor]], autocast: bool = False
) -> dict[str, Tensor]:
    """The loss and all gradients of one step."""
    ids = token_ids(2, 16).to(DEVICE)
    with torch.autocast(DEVICE, BF16, enabled=autocast):
        loss = model(ids, labels=ids, skip_logits=True, use_cache=False).loss
    loss.backward()
    return {"loss": loss.detach()} | {n.replace("_orig_mod.", ""): p.grad for n, p in parameters}


def agree(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    floor = 1e-3 * max(tensor.abs().max() for tensor in expected.values())
    for name, tensor in expected.items():
        error = (actual[name] - tensor).abs().max() / max(tensor.abs().max(), floor)
        assert error <= 1e-4, f"{name} is off by {error:.1e} of its largest entry"


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "by layer"])
def test_compiled_model_is_the_eager_one(whole, fresh_compiler):
    eager, model = model_of("triton"), model_of("triton")
    compiled = torch.compile(model, fullgraph=True) if whole else compile_layers(model)
    expected = step(eager, eager.named_parameters())
    agree(step(compiled, model.named_parameters()), expected)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("state_dtype", [None, "bfloat16"])
def test_model_is_the_reference_with_and_without_autocast(autocast, state_dtype):
    """As near to the fp32 model as the reference in the same precision, to a factor of two.

    All gradients together: those of single parameters differ more, by chance.
    """
    exact = model_of("reference")
    exact = step(exact, exact.named_parameters())
    size = torch.stack([tensor.square().sum() for tensor in exact.values()]).sum().sqrt()
    errors, losses = [], []
    for backend in ("reference", "triton"):
        model = model_of(backend, state_dtype=state_dtype)
        results = step(model, model.named_parameters(), autocast)
        squares = [(results[name] - tensor).square().sum() for name, tensor in exact.items()]
        errors.append(torch.stack(squares).sum().sqrt() / size)
        losses.append(results["loss"])
    rounding = 1e-2 if autocast or state_dtype else 1e-5
    assert errors[0] < 10 * rounding
    assert errors[1] <= 2 * errors[0] + rounding / 10
    assert abs(losses[1] - losses[0]) <= rounding
