"""The delta rule X + β k (vᵀ − kᵀX) has the properties that the paper proves of it (§2 and §3.1).

Properties are checked in fp64 over random shapes, gates and lengths of the direction, so that
their tolerances can be near rounding: 1e-10, for values up to about 1e3 and sums of up to 12.
"""

from typing import NamedTuple

import pytest
import torch
from helpers import close, normal, one_line_error
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from deep_delta import delta_rewrite
from deep_delta.ops import apply_write, compress_channels, readout, unit_scale

TIGHT = 1e-10


class Problem(NamedTuple):
    state: Tensor
    direction: Tensor
    value: Tensor
    gate: Tensor

    @property
    def key(self) -> Tensor:
        """k, exactly of length one."""
        return self.direction / self.direction.norm(dim=-1, keepdim=True)


@st.composite
def problems(draw) -> Problem:
    lead = draw(st.sampled_from([(), (3,), (2, 3)]))
    width, channels = draw(st.integers(2, 12)), draw(st.integers(1, 4))
    seed, length = draw(st.integers(0, 10**6)), 10 ** draw(st.floats(-3, 3))
    return Problem(
        normal(*lead, width, channels, seed=seed),
        normal(*lead, width, seed=seed + 1) * length,
        normal(*lead, channels, seed=seed + 2),
        2 * torch.sigmoid(normal(*lead, seed=seed + 3)) if lead else torch.tensor(0.7).double(),
    )


def written_out(problem: Problem, eps: float, erase: bool = True) -> Tensor:
    """X + β k (vᵀ − kᵀX), one token after the other."""
    state, direction, value, gate = (
        tensor.reshape(-1, *tensor.shape[problem.gate.ndim :]) for tensor in problem
    )
    rows = []
    for x, h, v, beta in zip(state, direction, value, gate, strict=True):
        k = h / (h @ h + eps * eps) ** 0.5
        rows.append(x + beta * torch.outer(k, v - (k @ x if erase else 0)))
    return torch.stack(rows).view_as(problem.state)


@given(problems(), st.sampled_from([0.0, 1e-5, 1.0]), st.booleans())
def test_is_the_equation(problem, eps, erase):
    close(
        delta_rewrite(*problem, erase=erase, eps=eps), written_out(problem, eps, erase), atol=TIGHT
    )


@given(problems())
def test_closed_gate_is_the_identity(problem):
    closed = problem._replace(gate=torch.zeros_like(problem.gate))
    assert torch.equal(delta_rewrite(*closed), problem.state)


@given(problems())
def test_gate_of_one_overwrites_the_readout_with_the_value(problem):
    new = delta_rewrite(*problem._replace(gate=torch.ones_like(problem.gate)), eps=0.0)
    close(readout(new, problem.key), problem.value, atol=TIGHT)


@given(problems(), st.sampled_from([0.0, 0.5]))
def test_error_shrinks_by_exactly_one_minus_gate_times_squared_length(problem, eps):
    """|1 − β‖k‖²|, which is |1 − β| where ε does not matter."""
    key = problem.direction * unit_scale(problem.direction, eps).unsqueeze(-1)
    before = problem.value - readout(problem.state, key)
    after = problem.value - readout(delta_rewrite(*problem, eps=eps), key)
    shrink = 1 - problem.gate * key.square().sum(-1)
    close(after.norm(dim=-1), shrink.abs() * before.norm(dim=-1), atol=TIGHT)
    if eps == 0:
        close(shrink, 1 - problem.gate, atol=TIGHT)


@given(problems())
def test_orthogonal_complement_is_untouched(problem):
    probe = normal(*problem.direction.shape, seed=9)
    probe = probe - problem.key * (probe * problem.key).sum(-1, keepdim=True)
    close(readout(delta_rewrite(*problem), probe), readout(problem.state, probe), atol=TIGHT)


@given(problems(), st.floats(0, 2))
def test_frozen_operator_has_eigenvalues_one_and_one_minus_gate(problem, gate):
    """With v = 0 the update is linear; applied to the identity it shows its matrix I − β k kᵀ."""
    direction = problem.direction.flatten()[: problem.direction.shape[-1]]
    width = direction.numel()
    operator = delta_rewrite(
        torch.eye(width, dtype=torch.float64),
        direction,
        torch.zeros(width, dtype=torch.float64),
        torch.tensor(gate, dtype=torch.float64),
        eps=0.0,
    )
    expected = torch.ones(width, dtype=torch.float64)
    expected[0] = 1 - gate
    close(torch.linalg.eigvalsh(operator), expected.sort().values, atol=TIGHT)


@given(problems())
def test_write_only_differs_by_exactly_the_erase_term(problem):
    difference = delta_rewrite(*problem, erase=False, eps=0.0) - delta_rewrite(*problem, eps=0.0)
    held = readout(problem.state, problem.key)
    erase = problem.gate[..., None, None] * problem.key[..., None] * held[..., None, :]
    close(difference, erase, atol=TIGHT)


@pytest.mark.parametrize("erase", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_zero_direction_does_nothing_and_stays_finite(erase, dtype):
    inputs = [normal(2, 5, 3), torch.zeros(2, 5), normal(2, 3), torch.ones(2)]
    inputs = [tensor.to(dtype).requires_grad_() for tensor in inputs]
    new = delta_rewrite(*inputs, erase=erase)
    assert torch.equal(new, inputs[0])
    for gradient in torch.autograd.grad(new.sum(), inputs):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("length", [1e-15, 1e-6, 1.0, 1e6, 1e18])
@pytest.mark.parametrize("size", [1e-15, 1.0, 1e15])
def test_extreme_magnitudes_are_exact_and_have_finite_gradients(length, size):
    """In fp32, against fp64: nothing overflows or underflows before it has to."""
    inputs = [normal(4, 6, 2) * size, normal(4, 6, seed=1) * length, normal(4, 2) * size]
    inputs = [tensor.float().requires_grad_() for tensor in (*inputs, torch.full((4,), 1.3))]
    new = delta_rewrite(*inputs)
    exact = written_out(Problem(*(tensor.detach().double() for tensor in inputs)), 1e-5)
    # A few fp32 roundings of numbers of this size.
    close(new.double(), exact, atol=2e-6 * size)
    for gradient in torch.autograd.grad(new.sum(), inputs):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_new_state_keeps_the_states_dtype_and_is_rounded_once(dtype):
    """Computed in fp32 or wider: the only rounding that shows is the last one."""
    state = normal(3, 64, 2).to(dtype)
    direction, value = normal(3, 64, seed=1).to(dtype), normal(3, 2, seed=2).to(dtype)
    gate = torch.tensor([0.3, 1.0, 1.7])
    new = delta_rewrite(state, direction, value, gate)
    assert new.dtype == dtype
    problem = Problem(state.double(), direction.double(), value.double(), gate.double())
    # Half a unit in the last place of `dtype`, and fp32's own error of a sum of 64.
    rounding = torch.finfo(dtype).eps / 2
    fp32 = 1e-6 if dtype != torch.float64 else 1e-14
    close(new.double(), written_out(problem, 1e-5), atol=fp32, rtol=rounding)


def test_fp64_is_not_computed_in_fp32():
    assert unit_scale(normal(2, 3), 1e-5).dtype == torch.float64
    assert compress_channels(normal(2, 3, 2), normal(3, 2)).dtype == torch.float64
    for narrow in (torch.bfloat16, torch.float16):
        assert unit_scale(normal(2, 3).to(narrow), 1e-5).dtype == torch.float32
        assert readout(normal(2, 3, 2).to(narrow), normal(2, 3).to(narrow)).dtype == torch.float32


def test_autocast_does_not_round_the_state():
    """Its matrix products would; the state is the one tensor that every sublayer rounds again."""
    inputs = [t.float() for t in (normal(3, 64, 2), normal(3, 64), normal(3, 2), torch.ones(3))]
    kernel = normal(64, 2).float()
    with torch.autocast("cpu", torch.bfloat16):
        rewritten, compressed = delta_rewrite(*inputs), compress_channels(inputs[0], kernel)
    assert torch.equal(rewritten, delta_rewrite(*inputs))
    assert torch.equal(compressed, compress_channels(inputs[0], kernel))


@pytest.mark.parametrize("eps", [None, 0.0, 0.5])
@pytest.mark.parametrize("targeted", [True, False])
@pytest.mark.parametrize("erases", [True, False])
def test_deferred_write_is_its_canonical_form(eps, targeted, erases):
    """X + s·h (aᵀ − b·s·hᵀX), with None for s = 1, a = 1 and b = 0, token by token."""
    shapes = [(2, 3, 5, 4), (2, 3, 5), (2, 3, 4), (2, 3)]
    x, h, a, b = (normal(*shape, seed=i) for i, shape in enumerate(shapes))
    new = apply_write(x, h, a if targeted else None, b if erases else None, eps=eps)
    for i in range(2):
        for t in range(3):
            scale = 1.0 if eps is None else (h[i, t] @ h[i, t] + eps**2) ** -0.5
            key = scale * h[i, t]
            row = a[i, t] if targeted else torch.ones(4, dtype=torch.float64)
            row = row - (b[i, t] * (key @ x[i, t]) if erases else 0)
            close(new[i, t], x[i, t] + torch.outer(key, row), atol=TIGHT)


def test_nothing_pending_returns_the_state_itself():
    state = normal(2, 3, 4)
    assert apply_write(state, None) is state


def test_deferred_delta_write_is_the_immediate_rewrite():
    x, h, v, beta = normal(2, 5, 3), normal(2, 5, seed=1), normal(2, 3, seed=2), normal(2, seed=3)
    for erase in (True, False):
        deferred = apply_write(x, h, beta.unsqueeze(-1) * v, beta if erase else None, eps=1e-5)
        close(deferred, written_out(Problem(x, h, v, beta), 1e-5, erase), atol=TIGHT)


@pytest.mark.parametrize(
    ("shapes", "name"),
    [
        (((2, 5, 3), (2, 4), (2, 3), (2,)), "direction"),
        (((2, 5, 3), (2, 5), (2, 5), (2,)), "value"),
        (((2, 5, 3), (2, 5), (2, 3), (2, 1)), "gate"),
        (((2, 5, 3), (5,), (3,), ()), "direction"),
        (((5,), (5,), (1,), ()), "the state"),
    ],
)
def test_shapes_that_do_not_fit_are_one_line(shapes, name):
    one_line_error(lambda: delta_rewrite(*(torch.ones(shape) for shape in shapes)), name, "shape")


def test_whole_numbers_and_a_negative_epsilon_are_one_line():
    arguments = [torch.ones(2, 3), torch.ones(2), torch.ones(3), torch.tensor(1.0)]
    one_line_error(lambda: delta_rewrite(*arguments, eps=-1.0), "eps")
    arguments[0] = torch.ones(2, 3, dtype=torch.long)
    one_line_error(lambda: delta_rewrite(*arguments), "floating point")


def gradient_inputs(channels: int) -> list[Tensor]:
    shapes = [(2, 3, channels), (2, 3), (2, channels), (2,)]
    return [normal(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("erase", [True, False])
@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
class TestGradients:
    def test_delta_rewrite(self, check, erase, channels):
        def rewrite(*inputs):
            return delta_rewrite(*inputs, erase=erase, eps=0.1)

        assert check(rewrite, gradient_inputs(channels))

    @pytest.mark.parametrize("eps", [None, 0.3])
    @pytest.mark.parametrize("targeted", [True, False])
    def test_apply_write(self, check, erase, channels, eps, targeted):
        state, direction, target, gate = gradient_inputs(channels)

        def write(*inputs):
            rest = list(inputs[2:])
            a = rest.pop(0) if targeted else None
            return apply_write(*inputs[:2], a, rest.pop(0) if erase else None, eps=eps)

        inputs = (state, direction, *([target] * targeted), *([gate] * erase))
        assert check(write, inputs)
