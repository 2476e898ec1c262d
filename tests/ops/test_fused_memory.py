"""What the fused kernels keep, write and add up: nothing unwritten, nothing by chance.

How tokens are shared out must not matter, two runs must agree bit for bit, and a state that is
rebuilt must be the one that was kept.
"""

import functools

import pytest
import torch
from fused_cases import DEVICE, DOCUMENTS, READS, Case, can_run, chain, measure, right, same
from helpers import normal
from torch.utils.flop_counter import FlopCounterMode

from deep_delta.ops import (
    Reading,
    apply_write,
    expand_embeddings,
    launch,
    read_state,
    reduce_state,
)

pytest.importorskip("triton", reason="the fused kernels need triton")
pytestmark = can_run

KINDS = [
    Case("plain", channels=1, taps=None),
    Case(channels=1, taps=None, gates=2),
    Case(channels=2),
    Case(channels=2, taps=4),
]


def expand(backend, embeddings, kernel):
    segments = DOCUMENTS.to(DEVICE)[:, : embeddings.shape[1]]
    return (expand_embeddings(embeddings, kernel, segments, backend=backend),)


def embedding_tensors(tokens: int = 5) -> dict[str, torch.Tensor]:
    return {"embeddings": normal(2, tokens, 63), "kernel": normal(63, 2, 4, seed=1)}


@pytest.fixture
def poison(monkeypatch):
    """A function that makes fresh memory NaN from then on; gives the list of what was made."""
    made: list[torch.Tensor] = []

    def spoiled(function):
        def fresh(*args, **kwargs):
            tensor = function(*args, **kwargs)
            if tensor.is_floating_point():
                made.append(tensor.fill_(float("nan")))
            return tensor

        return fresh

    def begin() -> list[torch.Tensor]:
        for place, name in (
            (torch, "empty"),
            (torch, "empty_like"),
            (torch.Tensor, "new_empty"),
        ):
            monkeypatch.setattr(place, name, spoiled(getattr(place, name)))
        return made

    return begin


@pytest.mark.parametrize(
    "case",
    [*(pytest.param(c, marks=pytest.mark.slow) for c in KINDS[1:3]), KINDS[0], KINDS[3]],
    ids=str,
)
@pytest.mark.slow
def test_every_number_of_a_result_is_written(case, poison):
    expected = [measure(call, case.tensors(), "triton") for call in (case.read, case.reduce)]
    made = poison()
    for call, results in zip((case.read, case.reduce), expected, strict=True):
        same(measure(call, case.tensors(), "triton"), results)
    assert len(made) > 5


def test_every_number_of_an_expansion_is_written(poison):
    expected = measure(expand, embedding_tensors(), "triton")
    made = poison()
    same(measure(expand, embedding_tensors(), "triton"), expected)
    assert len(made) >= 3


@pytest.mark.parametrize(
    "tokens", [1, 5, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 23))]
)
@pytest.mark.parametrize("processors", [1, 3])
def test_tokens_need_not_divide_among_programs(tokens, processors, monkeypatch):
    monkeypatch.setattr(launch, "processors", lambda device: processors)
    for taps in (1, 4):
        case = Case(batch=1, tokens=tokens, taps=taps, channels=1)
        right(case.read, case.tensors())


@pytest.mark.parametrize(
    "chunk", [1, 2, *(pytest.param(chunk, marks=pytest.mark.slow) for chunk in (3, 100))]
)
@pytest.mark.slow
def test_chunks_may_be_shorter_than_a_compressor_and_end_inside_a_document(chunk, monkeypatch):
    from deep_delta.ops import fused_launch

    monkeypatch.setattr(fused_launch, "share_of", lambda *_, **__: chunk)
    case = Case(tokens=5, taps=4, channels=1, documents=True)
    for call in (case.read, case.reduce):
        right(call, case.tensors())
    right(expand, embedding_tensors())


@pytest.mark.parametrize("case", KINDS[-1:], ids=str)  # tests/gpu tries every kind
@pytest.mark.slow
def test_two_runs_agree_bit_for_bit(case):
    same(*(measure(case.read, case.tensors(), "triton") for _ in range(2)))


@pytest.mark.parametrize(
    ("rebuild", "dtype", "taps", "wide"),
    [
        pytest.param(1, torch.float32, 1, True, marks=pytest.mark.slow),
        (2, torch.float32, None, False),
        pytest.param(3, torch.float32, 1, True, marks=pytest.mark.slow),
        pytest.param(3, torch.float32, 2, True, marks=pytest.mark.slow),
        (3, torch.float16, 1, True),
        pytest.param(3, torch.bfloat16, 1, True, marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.slow
def test_gradients_from_rebuilt_states_are_those_from_kept_ones_bit_for_bit(
    rebuild, dtype, taps, wide
):
    kept, trails = [], []
    expected = chain(0, dtype, taps, wide, kept)
    assert kept == [None] * READS
    same(chain(rebuild, dtype, taps, wide, trails), expected)
    lengths = [0 if trail is None else len(trail.directions) for trail in trails]
    # Nothing is pending at the first read; then a state is kept after every `rebuild` others.
    assert lengths == [0, *(i % (rebuild + 1) for i in range(1, READS))]


@pytest.mark.parametrize("rebuild", [1, 3])
@pytest.mark.slow
def test_what_stands_in_for_a_state_is_never_read(rebuild, poison):
    """Neither by the next read nor by a backward pass; a state that is stored is whole."""
    expected = chain(0, torch.float32, 1, True, [])
    states: list[torch.Tensor] = []
    trails: list = []
    poison()
    same(chain(rebuild, torch.float32, 1, True, trails, states=states), expected)
    for state, trail in zip(states, trails, strict=True):
        assert state.isnan().all() if trail else not state.isnan().any()


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_a_state_that_was_not_stored_can_be_asked_for(backend):
    case = Case(taps=1, channels=2)
    inputs = {name: t.float().to(DEVICE) for name, t in case.tensors().items()}
    options = {**case.fixed(), "norm_eps": 1e-5}
    stored = read_state(**inputs, **options, backend="triton")
    left = read_state(**inputs, **options, backend="triton", rebuild=1)
    assert stored.trail is None
    assert left.trail is not None
    assert torch.equal(apply_write(left.state, trail=left.trail, backend=backend), stored.state)
    # Whatever comes next finds the same state: another write, or a read by the other backend.
    write = {name: inputs[name] for name in ("direction", "target", "erase")}
    for call in (apply_write, functools.partial(reduce_state, kernel=inputs["kernel"])):
        then = call(left.state, **write, eps=0.3, trail=left.trail, backend=backend)
        assert torch.equal(then, call(stored.state, **write, eps=0.3, backend=backend))
    inputs["state"] = left.state
    again = read_state(**inputs, **options, trail=left.trail, backend=backend)
    inputs["state"] = stored.state
    whole = read_state(**inputs, **options, backend=backend)
    for actual, expected in zip(again, whole, strict=True):
        assert actual is expected is None or torch.equal(actual, expected)


def left_behind(channels: int = 1, **changed) -> tuple[dict, Reading]:
    """Inputs of a read, and what it gives without storing the state."""
    case = Case(taps=1 if channels > 1 else None, channels=channels)
    inputs = {name: t.float().to(DEVICE) for name, t in case.tensors().items()} | changed
    return inputs, read_state(**inputs, **case.fixed(), norm_eps=1e-5, backend="triton", rebuild=1)


def test_a_plain_write_may_follow_a_trail():
    """A mixed stack: its backward pass needs no trail, the forward pass does."""
    gradients = []
    for rebuild in (0, 1):
        case = Case(taps=None, channels=1)
        inputs = {n: t.float().to(DEVICE).requires_grad_() for n, t in case.tensors().items()}
        read = read_state(**inputs, **case.fixed(), norm_eps=1e-5, backend="triton",
                          rebuild=rebuild)  # fmt: skip
        h = normal(2, 4, 63, seed=7).float().to(DEVICE)
        apply_write(read.state, h, trail=read.trail, backend="triton").square().sum().backward()
        gradients.append({name: x.grad for name, x in inputs.items() if x.grad is not None})
    same(*gradients)


def test_no_gradient_passes_a_read_without_one():
    """A frozen part of a model, whose state nobody stored, in the middle of one that learns."""
    state = normal(2, 4, 63, 1).float().to(DEVICE).requires_grad_()
    with torch.no_grad():
        inputs, read = left_behind(state=state)
    assert read.trail is not None
    after = apply_write(read.state, inputs["direction"], trail=read.trail, backend="triton")
    assert not read.state.requires_grad
    assert not after.requires_grad


def test_a_trail_is_that_of_the_whole_state():
    _, read = left_behind()
    with pytest.raises(ValueError, match=r"trail\.state has shape \(2, 4, 63, 1\)"):
        apply_write(read.state[1:], trail=read.trail, backend="triton")
    rows = (read.trail.rows[0][1:],)
    with pytest.raises(ValueError, match=r"trail\.rows has shape \(7, 1\)"):
        apply_write(read.state, trail=read.trail._replace(rows=rows), backend="triton")


def test_a_write_without_a_direction_is_none():
    """A target and a gate alone change nothing, and nothing comes back to them."""
    case = Case(taps=None, channels=1)
    inputs = {n: t.float().to(DEVICE).requires_grad_() for n, t in case.tensors().items()}
    read = read_state(**{**inputs, "direction": None}, norm_eps=1e-5, backend="triton")
    assert torch.equal(read.state, inputs["state"])
    given = inputs["target"], inputs["erase"]
    assert torch.autograd.grad(read.context.sum(), given, allow_unused=True) == (None, None)


def test_a_trail_keeps_no_second_copy_of_a_direction():
    h = normal(2, 63, 4, seed=3).float().to(DEVICE).mT
    _, read = left_behind(direction=h)
    assert read.trail.directions[0].is_contiguous()


def test_a_state_spread_too_far_for_32_bits_is_copied():
    near = torch.empty_strided((2, 63, 3), (189, 1, 63), device="meta")
    far = torch.empty_strided((2, 63, 3), (63, 1, 2**30), device="meta")
    assert launch.compact(near) is near
    assert launch.compact(far).stride() == (189, 1, 63)


def states_kept(rebuild: int) -> int:
    shapes = {}

    def pack(tensor):
        shapes[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        chain(rebuild, torch.float32, 1, True, [])
    return sum(numel == 3 * 63 * 2 for numel in shapes.values())


@pytest.mark.slow
def test_rebuilding_keeps_fewer_states():
    """The first, and of the five that are written all, every second, every fourth."""
    assert [states_kept(rebuild) for rebuild in (0, 1, 3)] == [1 + 5, 1 + 3, 1 + 2]


def test_a_plain_sum_keeps_its_new_state_and_nothing_else():
    """x + h: what the additive model keeps of its stream, and no trail."""
    case, shapes = Case("plain", channels=1, taps=None, gates=0, values=False), []
    inputs = {n: t.float().to(DEVICE).requires_grad_() for n, t in case.tensors().items()}

    def pack(tensor):
        if tensor.numel() >= 63:  # a token's few sums are small change
            shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        read = read_state(**inputs, norm_eps=1e-5, rebuild=3, backend="triton")
    assert sorted(shapes) == [(8, 63, 1), (63,)]
    assert read.trail is None


def flat(*names: str, case: Case) -> list[torch.Tensor]:
    """Tensors as the operators take them: tokens flattened, with gradients."""
    tensors, lead = case.tensors(), case.batch * case.tokens
    weights = ("kernel", "norm_weight", "gate_weight", "value_weight", "gate_bias", "value_bias")
    return [
        (t if name in weights else t.reshape(lead, *t.shape[2:])).float().to(DEVICE)
        .detach().requires_grad_()
        for name in names if (t := tensors.get(name)) is not None
    ]  # fmt: skip


def operator_arguments() -> dict[str, list[tuple]]:
    """Arguments of each operator: with everything, and with as little as it takes."""
    case, small = Case(taps=2, tokens=2), Case(taps=None, channels=1, tokens=2)
    x, h, a, b, taps, g, gate, gate_bias, value, value_bias = flat(
        "state", "direction", "target", "erase", "kernel", "norm_weight", "gate_weight",
        "gate_bias", "value_weight", "value_bias", case=case,
    )  # fmt: skip
    (scalar,) = flat("state", case=small)
    starts = torch.tensor([True, False, True, False], device=DEVICE)
    d_context, d_gates, d_values = (torch.randn(4, n, device=DEVICE) for n in (63, 1, 3))
    row, x_in = torch.randn(4, 3, device=DEVICE), torch.randn(4, 63, device=DEVICE)
    stats = torch.rand(4, 2 * 3 + 2, device=DEVICE)
    none, plain = x.detach(), [tensor.detach() for tensor in (h, a, b)]
    weights = [tensor.detach() for tensor in (taps, g)]
    rows = [tensor.detach() for tensor in (gate, value)]
    expansion = torch.randn(4, 63, device=DEVICE), torch.randn(2, 3, 63, device=DEVICE)
    return {
        "read_state": [
            (x, h, a, b, 0.3, taps, g, 1e-5, gate, gate_bias, value, value_bias, True, starts, 2,
             "stored", True, torch.float32, None, [], []),
            (x, h, a, b, 0.3, taps, g, 1e-5, gate, None, value, None, False, None, 2, "stored",
             True, torch.float16, none, [plain[0]], [row]),
            (scalar, *[None] * 6, 0.0, *[None] * 4, False, None, 2, "none",
             True, torch.float32, None, [], []),
        ],
        "read_state_backward": [
            (none, [plain[0]], [row], plain[0], row, stats, x_in, *plain[1:], True, *weights, *rows,
             True, starts, 2, none, d_context, d_gates, d_values),
            (scalar.detach(), [], [], None, None, None, None, None, None, False, None, None, None,
             None, False, None, 2, None, d_context, None, None),
        ],
        "expand": [
            (*(t.clone().requires_grad_() for t in expansion), starts, 2, torch.float32),
            (*expansion, None, 2, torch.float16),
        ],
        "expand_backward": [(*expansion, starts, 2, torch.randn(4, 3, 63, device=DEVICE))],
    }  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("read_state", marks=pytest.mark.slow),  # whole models run through it too
        "read_state_backward",
        pytest.param("expand", marks=pytest.mark.slow),
        "expand_backward",
    ],
)
def test_operator_keeps_the_rules_of_pytorch(name):
    """Schema, fake tensors, autograd registration and tracing: what torch.compile relies on."""
    from deep_delta.ops import fused  # noqa: F401 - registers the operators

    for arguments in operator_arguments()[name]:
        result = torch.library.opcheck(getattr(torch.ops.deep_delta, name).default, arguments)
        assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", ["read_state", "read_state_backward"])
def test_what_an_operator_returns_is_written_whole(name, poison):
    from deep_delta.ops import fused  # noqa: F401 - registers the operators

    cases = operator_arguments()[name]
    poison()
    with torch.no_grad():
        for arguments in cases:
            for output in getattr(torch.ops.deep_delta, name).default(*arguments):
                assert output.isfinite().all()


def test_what_was_not_kept_is_asked_for_in_one_line():
    (x,) = flat("state", case=Case(taps=None, channels=1, tokens=2))
    read = torch.ops.deep_delta.read_state
    out = read(x, *[None] * 6, 0.0, *[None] * 4, False, None, 2, "none",
               False, torch.float32, None, [], [])  # fmt: skip
    with pytest.raises(RuntimeError, match="keep=True"):
        out[4].sum().backward()


def test_flops_of_a_read_are_counted():
    """2 for each multiply-add: readout and write 2·d_v, the taps K·d_v, rows of logits, by d."""
    from deep_delta.ops import fused  # noqa: F401 - a counter knows what is registered before it

    case = Case(taps=2, gates=2)
    inputs = {name: tensor.float().to(DEVICE) for name, tensor in case.tensors().items()}
    with FlopCounterMode(display=False) as counter:
        case.read("triton", **inputs)
    assert counter.get_total_flops() == 8 * 63 * 2 * (2 * 3 + 2 * 3 + 2 + 3)
    _, read = left_behind()
    with FlopCounterMode(display=False) as counter:
        apply_write(read.state, trail=read.trail, backend="triton")
    assert counter.get_total_flops() == 8 * 63 * 2
