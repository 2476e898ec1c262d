"""Regional compilation: how many graphs, the same numbers, the same names, little memory."""

import copy
import re

import pytest
import torch
from helpers import close, shaken, tiny_model, token_ids
from torch._inductor.utils import run_and_get_code

from deep_delta.model.compile import compile_layers, compiled_alone
from deep_delta.model.loss import linear_cross_entropy

# Expansion, first layer (nothing pending), the other layers, readout, norm, loss.
GRAPHS = 6


def loss_of(model, ids, **given):
    return model(ids, labels=ids, skip_logits=True, use_cache=False, **given).loss


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["ddl-tc", "additive"])
def test_all_layers_share_their_graphs(variant, quick_compile):
    plain = shaken(tiny_model(variant, num_hidden_layers=5), 0.1).train()
    model = shaken(tiny_model(variant, num_hidden_layers=5), 0.1).train()
    names = list(model.state_dict())
    assert compile_layers(model) is model
    assert list(model.state_dict()) == names
    ids = token_ids(3, 8)
    for each in (plain, model):
        loss_of(each, ids).backward()
    assert quick_compile() == GRAPHS
    close(loss_of(model, ids), loss_of(plain, ids), atol=2e-6)
    for (name, parameter), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert parameter.grad is not None, name
        close(parameter.grad, other.grad, atol=1e-6, rtol=1e-5)
    assert quick_compile() == GRAPHS

    model.eval()
    counts = []
    with torch.no_grad():
        for batch in (3, 2, 5):
            items = 8.0 * batch
            loss = loss_of(model, token_ids(batch, 8), num_items_in_batch=items)
            expected = loss_of(plain, token_ids(batch, 8), num_items_in_batch=items)
            close(loss, expected, atol=2e-6)
            counts.append(quick_compile())
    # Evaluation has graphs of its own; the first other batch size makes one for every size.
    assert counts == [2 * GRAPHS] + 2 * [3 * GRAPHS]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rebuild", "checkpointing", "graphs"),
    [(1, False, GRAPHS), (3, False, GRAPHS + 1), (3, True, GRAPHS)],
)
def test_fused_layers_compile_whole(rebuild, checkpointing, graphs, quick_compile):
    """No graph break around the kernels; a layer with a longer trail is one graph more."""
    pytest.importorskip("triton", reason="the fused kernels need triton")
    options = {"backend": "triton", "rebuild": rebuild, "num_hidden_layers": 3}
    try:
        plain, model = (shaken(tiny_model("ddl-cc", **options), 0.1).train() for _ in range(2))
        if checkpointing:
            model.gradient_checkpointing_enable()
        ids = token_ids(2, 3)
        loss_of(plain, ids).backward()
    except ValueError as refused:
        pytest.skip(str(refused))  # neither a GPU nor the interpreter
    compile_layers(model)
    loss_of(model, ids).backward()
    assert quick_compile() == graphs
    for parameter, other in zip(model.parameters(), plain.parameters(), strict=True):
        close(parameter.grad, other.grad, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_checkpointed_layers_compile_too(quick_compile):
    plain, model = (shaken(tiny_model("ddl-cc"), 0.1).train() for _ in range(2))
    compile_layers(model)
    for each in (plain, model):
        each.gradient_checkpointing_enable()
        loss_of(each, token_ids(2, 6)).backward()
    assert quick_compile() == GRAPHS
    for parameter, other in zip(model.parameters(), plain.parameters(), strict=True):
        close(parameter.grad, other.grad, atol=1e-6, rtol=1e-5)


def dynamo_options():
    config = torch._dynamo.config
    return config.recompile_limit, config.optimize_ddp


@pytest.mark.slow
def test_more_than_eight_graphs_and_dynamo_as_it_was(quick_compile):
    """Dynamo's options hold for the model's calls alone, whenever the first one comes."""
    before, seen, ids = dynamo_options(), [], token_ids(2, 4)
    models = [tiny_model(variant, num_hidden_layers=9) for variant in ("ddl-cc", "ddl-tc")]
    for model in models:
        compile_layers(model)
    assert dynamo_options() == before
    for model in models:
        loss_of(model.train(), ids).backward()
        with torch.no_grad():
            loss_of(model.eval(), ids)
        assert dynamo_options() == before
    # Expansion, norm and loss serve both; the layers' and the readout's differ.
    assert quick_compile() == 2 * (GRAPHS + 3)

    def somebody_elses(graph, inputs):
        seen.append(dynamo_options())
        return graph.forward

    torch.compile(lambda x: x + 1, backend=somebody_elses)(torch.ones(2))
    assert seen == [before]


def test_options_hold_for_a_call_and_lower_no_limit():
    options = compiled_alone(dynamo_options)
    before = dynamo_options()
    assert options() == (64, False)
    with torch._dynamo.config.patch(recompile_limit=100):
        assert options() == (100, False)
    assert dynamo_options() == before


@pytest.mark.slow
def test_copy_of_a_compiled_model_computes_with_its_own_weights():
    model = compile_layers(tiny_model())
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.model.norm.weight.zero_()
        assert not copied(token_ids(1, 3)).logits.any()


def test_another_loss_is_left_alone():
    model = tiny_model()
    model.linear_cross_entropy = other = lambda *_, **__: None
    assert compile_layers(model).linear_cross_entropy is other


@pytest.mark.slow
def test_the_compiled_loss_holds_no_logits_in_fp32():
    """Under autocast nothing of the logits' size is made but bf16: the logits, their gradient."""
    torch.compiler.reset()
    width, vocabulary, labels = 24, 1009, token_ids(2, 16, 1009)
    hidden = torch.randn(2, 16, width, requires_grad=True)
    weight = torch.randn(vocabulary, width, requires_grad=True)

    def gradients(function):
        with torch.autocast("cpu", torch.bfloat16):
            loss = function(hidden, weight, labels)
        return loss, *torch.autograd.grad(loss, (hidden, weight))

    compiled = torch.compile(linear_cross_entropy, fullgraph=True)
    actual, codes = run_and_get_code(lambda: gradients(compiled))
    assert len(codes) == 2  # forward and backward
    buffers = re.findall(r"= empty_strided\w*\(\((\d+), (\d+)\), .*(torch\.\w+)\)", "".join(codes))
    large = [dtype for *shape, dtype in buffers if shape == ["32", str(vocabulary)]]
    assert 1 <= len(large) <= 2
    assert set(large) == {"torch.bfloat16"}
    for tensor, expected in zip(actual, gradients(linear_cross_entropy), strict=True):
        close(tensor, expected, atol=1e-6, rtol=0.02)  # bf16 gradients, rounded in another order
