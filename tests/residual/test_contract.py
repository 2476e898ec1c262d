"""One suite over all residuals: what `state = residual(state, sublayer)` promises.

A `Stack` is a model without attention: expand, two residuals around pointwise sublayers, readout.
Everything is fp64 with noise on every parameter, so that a wrong term cannot hide behind a
neutral start or a tolerance.
"""

import copy
import functools

import pytest
import torch
from helpers import CASES, close, normal, one_line_error, shaken, tiny_config
from torch import Tensor, nn
from torch.nn import functional as F

from deep_delta import AdditiveResidual, DeltaResidual
from deep_delta.model.build import build_expand, build_readout, build_residual
from deep_delta.residual import ChannelCompressor, State

WIDTH = 8
TIGHT = 1e-10  # fp64, a few hundred roundings of numbers near 1

every_case = pytest.mark.parametrize("case", CASES)
local_cases = [c for c in CASES if tiny_config(c).compressor != "token"]
local_cases = [c for c in local_cases if not tiny_config(c).embedding_conv]
delta_cases = [c for c in CASES if tiny_config(c).residual == "delta"]


class Stack(nn.Module):
    """Two sublayers of one block, each behind its residual, between expansion and readout."""

    def __init__(self, case: str):
        super().__init__()
        self.config = tiny_config(case, hidden_size=WIDTH)
        self.expand = build_expand(self.config)
        self.residuals = nn.ModuleList(build_residual(self.config, 0, index) for index in range(2))
        self.sublayers = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(2)
        )
        self.readout = build_readout(self.config)

    def states(self, embeddings: Tensor, settle: bool = False) -> list[State]:
        """The state after the expansion and after each sublayer; `settle` writes at once."""
        states = [self.expand(embeddings)]
        for residual, sublayer in zip(self.residuals, self.sublayers, strict=True):
            new = residual(states[-1], sublayer, None, self.residuals[0].compressor)
            states.append(State(new.settle().mT) if settle else new)
        return states

    def forward(self, embeddings: Tensor, settle: bool = False) -> Tensor:
        return self.readout(self.states(embeddings, settle)[-1])


def stack(case: str) -> Stack:
    torch.manual_seed(0)
    return shaken(Stack(case).double())


@functools.cache
def embeddings(tokens: int = 6) -> Tensor:
    return normal(2, tokens, WIDTH, seed=3)


@every_case
def test_every_number_of_every_parameter_gets_a_gradient(case):
    model = stack(case)
    out = model(embeddings())
    (out * normal(*out.shape, seed=4)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert (parameter.grad != 0).all(), name


@every_case
def test_every_parameter_matters_as_much_as_its_gradient_says(case):
    """A small step in a random direction changes the output by the gradient along it."""
    model, step = stack(case), 1e-5
    weights = normal(*model(embeddings()).shape, seed=4)
    for seed, (name, parameter) in enumerate(model.named_parameters()):
        (gradient,) = torch.autograd.grad((model(embeddings()) * weights).sum(), parameter)
        direction = normal(*parameter.shape, seed=seed)
        outputs = []
        with torch.no_grad():
            for sign in (1, -2):
                parameter += sign * step * direction
                outputs.append((model(embeddings()) * weights).sum())
            parameter += step * direction
        slope = (outputs[0] - outputs[1]) / (2 * step)
        assert slope.abs() > 1e-6, name
        # The central difference is off by step² times a third derivative.
        close(slope, (gradient * direction).sum(), atol=1e-6, rtol=1e-6)


@every_case
def test_deferred_writes_equal_immediate_ones(case):
    model = stack(case)
    close(model(embeddings()), model(embeddings(), settle=True), atol=TIGHT)


@every_case
def test_state_is_a_flat_tuple_of_tensors_and_an_epsilon(case):
    states, config = stack(case).states(embeddings()), tiny_config(case)
    epsilon = None if config.residual == "additive" else config.direction_eps
    for state, eps in zip(states, [None, epsilon, epsilon], strict=True):
        assert isinstance(state, tuple)
        assert state.x.shape == (*embeddings().shape, config.value_channels)
        for name, rank in [("direction", 3), ("target", 3), ("erase", 2)]:
            field = getattr(state, name)
            assert field is None or (isinstance(field, Tensor) and field.ndim == rank)
        assert state.eps == eps
        assert state.trail is None  # autograd keeps the reference's states
    assert all(state.direction is not None for state in states[1:])


@every_case
def test_nothing_that_a_residual_learns_is_a_linear_or_convolution_layer(case):
    """Adapters and int8 wrap those by their type: gates, values and compressors stay exact."""
    model = stack(case)
    wrapped = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd)
    for module in (model.expand, *model.residuals, model.readout):
        assert [type(part) for part in module.modules() if isinstance(part, wrapped)] == []


def written(stack: Stack, index: int, state: State) -> Tensor:
    """The state after a sublayer by the paper's equations, from the parameters' own values."""
    config, residual, x = stack.config, stack.residuals[index], state.settle()
    x_in = residual.reader(stack.residuals[0].compressor)(x)
    c = x_in / (x_in.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()
    c = c * residual.norm.weight
    h = stack.sublayers[index](c)
    if config.residual == "additive":
        return x + h.unsqueeze(-1) * (1 if residual.spread is None else residual.spread)

    def gate(module: nn.Module) -> Tensor:
        if config.gate == "fixed":
            return torch.tensor(config.gate_init, dtype=torch.float64)
        if config.gate == "layer":
            return 2 / (1 + torch.exp(-module.bias))
        hidden = c if module.hidden is None else torch.tanh(c @ module.hidden.T)
        return 2 / (1 + torch.exp(-(hidden @ module.weight.T + module.bias)))

    from_mlp = config.direction_source == "mlp"
    source = h if from_mlp else {"context": c, "state": x_in}[config.value_source]
    if config.value_activation == "constant":
        v = residual.value.vector
    else:
        v = source @ residual.value.weight.T
        v = v + residual.value.bias if config.value_bias else v
        if config.value_activation == "sigmoid":
            v = config.value_scale / (1 + torch.exp(-v))
    if from_mlp:
        h = torch.tanh(x.mean(-1) @ residual.direction.inner.T) @ residual.direction.outer.T
    k = h / (h.square().sum(-1, keepdim=True) + config.direction_eps**2).sqrt()
    write, held = gate(residual.gate) * v, (k.unsqueeze(-2) @ x).squeeze(-2)
    erase = gate(residual.erase_gate or residual.gate) * held if config.erase else 0
    return x + k.unsqueeze(-1) @ (write - erase).unsqueeze(-2)


@every_case
def test_write_is_the_papers_equation(case):
    model = stack(case)
    states = model.states(embeddings())
    for index in range(2):
        close(states[index + 1].settle(), written(model, index, states[index]), atol=TIGHT)


@every_case
def test_sublayer_sees_the_normalised_read_once(case):
    model, seen = stack(case), []

    def spy(context: Tensor) -> Tensor:
        seen.append(context)
        return torch.zeros_like(context)

    state = model.expand(embeddings())
    new = model.residuals[0](state, spy)
    assert len(seen) == 1
    x_in = model.residuals[0].compressor(state.x)
    weight = model.residuals[0].norm.weight
    close(seen[0], F.rms_norm(x_in, (WIDTH,), weight, model.config.rms_norm_eps), atol=TIGHT)
    if model.config.direction_source == "sublayer":
        assert torch.equal(new.settle(), state.x)  # a sublayer that says nothing changes nothing


@every_case
def test_a_token_reaches_exactly_the_tokens_its_kernels_allow(case):
    """Nothing earlier, ever; itself only, where tokens are independent; else each kernel's reach.

    Three reads (two sublayers and the readout) compress, one expansion convolves.
    """
    model, at = stack(case), 2
    config = model.config
    kernels = [config.compressor_kernel_size or 4] * 3 if config.compressor == "token" else []
    kernels += [config.embedding_kernel_size] if config.embedding_conv else []
    reach = sum(kernel - 1 for kernel in kernels)
    x = embeddings(20)
    changed = x.clone()
    changed[:, at] += normal(2, WIDTH, seed=5)
    difference = (model(changed) - model(x)).abs().amax((0, 2))
    assert ((difference > 0).nonzero().flatten() == torch.arange(at, at + reach + 1)).all()
    assert (reach == 0) == (case in local_cases)


@pytest.mark.parametrize("case", delta_cases)
def test_gates_lie_between_zero_and_two(case):
    model = stack(case)
    context = 30 * embeddings()
    for residual in model.residuals:
        gate = residual.gate(context)
        assert gate.shape == context.shape[:2]
        assert ((gate >= 0) & (gate <= 2)).all()
        if model.config.gate == "token":
            assert gate.max() > 1.2  # a sigmoid without the factor 2 stays below 1


@every_case
def test_shared_compressor_has_one_owner(case):
    model = stack(case)
    first, second = model.residuals
    learned = list(first.compressor.parameters())
    names = [name for name in model.state_dict() if name.startswith("residuals.1.compressor")]
    if model.config.share_compressor:
        assert second.compressor is None
        assert second.reader(first.compressor) is first.compressor
        assert names == []
    else:
        assert second.reader(first.compressor) is second.compressor is not first.compressor
        assert len(names) == len(learned) > 0
    assert model.readout.compressor is not first.compressor


@pytest.mark.parametrize("case", ["ddl-cc", "ddl-tc", "additive-expanded"])
def test_compressor_replaced_by_its_owner_is_replaced_for_all(case):
    """As adapters replace it; a copy of the block has a compressor of its own."""
    model = stack(case)
    copied = copy.deepcopy(model)
    before = model(embeddings())
    other = shaken(copy.deepcopy(model.residuals[0].compressor), seed=7)
    calls = []
    other.register_forward_hook(lambda *_: calls.append(1))
    model.residuals[0].compressor = other
    assert not torch.equal(model(embeddings()), before)
    assert len(calls) == 2
    assert torch.equal(copied(embeddings()), before)


def test_residual_that_is_lent_nothing_says_so():
    residual = DeltaResidual(WIDTH, 2, owns_compressor=False)
    state = State(normal(1, 3, 2, WIDTH, dtype=torch.float32))
    one_line_error(lambda: residual(state, torch.tanh), "owns_compressor", "compressor of its own")


@every_case
def test_every_parameter_is_read_inside_its_own_module(case):
    """What offloading, sharding and adapters rely on: elsewhere a parameter may not be there."""
    model = stack(case)
    expected = model(embeddings()).detach()
    away = {}

    def fetch(module, _arguments):
        for name, parameter in away[module].items():
            module._parameters[name] = parameter

    def put_away(module, *_):
        for name, parameter in away[module].items():
            module._parameters[name] = nn.Parameter(parameter.detach().to("meta"))

    for module in model.modules():
        away[module] = dict(module.named_parameters(recurse=False))
        module.register_forward_pre_hook(fetch)
        module.register_forward_hook(put_away, always_call=True)
        put_away(module)
    assert torch.equal(model(embeddings()), expected)


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("kind", [DeltaResidual, AdditiveResidual])
def test_works_alone_around_anybodys_sublayer(kind, channels):
    torch.manual_seed(0)
    residual, linear, calls = kind(WIDTH, channels), nn.Linear(WIDTH, WIDTH), []
    linear.register_forward_hook(lambda *_: calls.append("sublayer"))
    residual.register_forward_hook(lambda *_: calls.append("residual"))
    state = State(normal(2, 3, channels, WIDTH, dtype=torch.float32))
    for _ in range(2):
        state = residual(state, linear)
    assert calls == ["sublayer", "residual"] * 2
    assert state.settle().shape == (2, 3, WIDTH, channels)
    state.settle().square().sum().backward()
    assert all(parameter.grad is not None for parameter in residual.parameters())
    assert linear.weight.grad.abs().max() > 0


def test_residuals_that_defer_differently_can_be_mixed():
    """The next read applies what is pending without knowing whose write it is."""
    torch.manual_seed(0)
    mixed = [AdditiveResidual(WIDTH, 3), DeltaResidual(WIDTH, 3), AdditiveResidual(WIDTH, 3)]
    mixed += [DeltaResidual(WIDTH, 3, erase=False), DeltaResidual(WIDTH, 3)]
    deferred = immediate = State(normal(1, 2, 3, WIDTH))
    for residual in mixed:
        residual.double()
        deferred = residual(deferred, torch.tanh)
        immediate = State(residual(immediate, torch.tanh).settle().mT)
    close(deferred.settle(), immediate.x, atol=TIGHT)


def test_several_channels_are_compressed_by_default_and_one_is_read_as_it_is():
    assert isinstance(DeltaResidual(WIDTH, 2).compressor, ChannelCompressor)
    x = normal(1, 2, WIDTH, 1)
    assert torch.equal(DeltaResidual(WIDTH).compressor(x), x.squeeze(-1))


def test_state_dtype_is_kept_and_gates_stay_fp32():
    torch.manual_seed(0)
    residual = DeltaResidual(WIDTH, 2)
    state = residual(State(normal(1, 3, 2, WIDTH, dtype=torch.bfloat16)), torch.tanh)
    assert state.x.dtype == state.settle().dtype == torch.bfloat16
    assert state.erase.dtype == state.target.dtype == torch.float32
