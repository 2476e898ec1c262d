"""How a model starts: the same backbone in every variant, neutral residuals, channels apart."""

import math

import pytest
import torch
from helpers import CASES, EXPANDED, VARIANTS, close, normal, tiny_config, tiny_model, token_ids

from deep_delta import DeepDeltaConfig, DeepDeltaForCausalLM, DeepDeltaModel
from deep_delta.model.build import build_value
from deep_delta.residual import (
    AdditiveResidual,
    ChannelCompressor,
    ConstantValue,
    DeltaResidual,
    EmbeddingConv,
    Residual,
    TokenCompressor,
    TokenGate,
)

RESIDUAL_PARTS = ("_residual.", "model.expand.", "model.readout.")
every_case = pytest.mark.parametrize("case", CASES)


def backbone(model: DeepDeltaForCausalLM) -> dict[str, torch.Tensor]:
    """What is no part of the residual: embeddings, attention, MLP, and all norms."""
    state = model.state_dict()
    kept = {n: t for n, t in state.items() if not any(part in n for part in RESIDUAL_PARTS)}
    return kept | {n: t for n, t in state.items() if n.endswith("_residual.norm.weight")}


def of_type(model, kind: type) -> list:
    return [module for module in model.modules() if isinstance(module, kind)]


@every_case
def test_backbone_of_a_seed_is_the_same_in_every_variant(case):
    expected, actual = backbone(tiny_model("additive", seed=5)), backbone(tiny_model(case, seed=5))
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


@every_case
def test_building_leaves_the_generator_where_every_variant_leaves_it(case):
    """What is drawn next (dropout, data order) does not depend on the residual either."""
    tiny_model("additive", seed=5)
    expected = torch.rand(3)
    tiny_model(case, seed=5)
    assert torch.equal(torch.rand(3), expected)


@every_case
def test_seeds_repeat_and_differ(case):
    first, again, other = (tiny_model(case, seed=seed).state_dict() for seed in (1, 1, 2))
    random = [name for name, tensor in first.items() if tensor.ndim > 1 and tensor.std() > 0]
    random = [name for name in random if not name.endswith(("compressor.weight", "expand.weight"))]
    assert any(".mlp." in name for name in random)
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name]), name
    for name in random:
        assert not torch.equal(first[name], other[name]), name


def test_residuals_of_different_layers_start_differently():
    gates = [gate.weight for gate in of_type(tiny_model("ddl-cc"), TokenGate)]
    assert len({tuple(weight.flatten().tolist()) for weight in gates}) == 4


@pytest.mark.parametrize("start", [0.1, 1.0, 1.7])
@pytest.mark.parametrize("options", [{}, {"gate": "layer"}, {"gate_hidden_size": 6}], ids=str)
def test_gate_starts_at_its_value(start, options):
    """The bias survives transformers' blanket initialisation: it is logit(β₀/2)."""
    model = tiny_model("ddl-cc", gate_init=start, separate_gates=True, **options)
    for residual in of_type(model, DeltaResidual):
        for gate in (residual.gate, residual.erase_gate):
            assert gate.bias.item() == pytest.approx(math.log(start / (2 - start)), abs=1e-6)
            beta = gate(torch.zeros(1, 1, 32))
            assert beta.item() == pytest.approx(start, abs=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_residual_starts_neutral(variant):
    model = tiny_model(variant)
    for module in of_type(model, ChannelCompressor):
        assert (module.weight == 1 / 4).all()
    for module in of_type(model, TokenCompressor):
        assert (module.weight[..., -1] == 1).all()
        assert (module.weight[..., :-1] == 0).all()
        assert (module.read == 1 / 4).all()
    for module in of_type(model, EmbeddingConv):
        assert (module.weight[..., -1] == 1).all()
        assert (module.weight[..., :-1] == 0).all()
    ids, channels = token_ids(1, 5), model.config.value_channels
    embeddings = model.model.embed_tokens(ids)
    state = model.model.expand(embeddings).x
    assert torch.equal(state, embeddings.unsqueeze(-1).expand(-1, -1, -1, channels))
    close(model.model.readout.compressor(state), embeddings, atol=1e-7)


@every_case
def test_context_has_unit_length_in_every_block(case):
    """RMS between 0.9 and 1.1, also 24 layers deep: compressors and ε must not shrink it."""
    model, rms = tiny_model(case, num_hidden_layers=24, hidden_size=48), []
    for layer in model.model.layers:
        for sublayer in (layer.self_attn, layer.mlp):
            sublayer.register_forward_pre_hook(
                lambda _, args: rms.append(args[0].square().mean().sqrt().item())
            )
    with torch.no_grad():
        model(token_ids(2, 16))
    assert len(rms) == len(of_type(model, Residual)) == 48
    assert 0.9 < min(rms) <= max(rms) < 1.1


@pytest.mark.parametrize("variant", ["additive-expanded"])
def test_additive_channels_are_written_apart_with_mean_one(variant):
    for residual in of_type(tiny_model(variant), AdditiveResidual):
        assert residual.spread.mean().item() == pytest.approx(1, abs=1e-6)
        assert residual.spread.unique().numel() == 4
        assert residual.spread.std() > 0.2


def test_constant_value_starts_apart_around_its_value():
    for value in of_type(tiny_model("constant-value", value_constant=3.0), ConstantValue):
        assert value.vector.mean().item() == pytest.approx(3, abs=1e-6)
        assert value.vector.unique().numel() == 4
    (scalar, *_) = of_type(tiny_model("ddl-scalar", value_activation="constant"), ConstantValue)
    assert scalar.vector.tolist() == [2.0]


def effective_rank(states: torch.Tensor) -> float:
    """exp of the entropy of the normalised singular values of X (d, d_v), the tokens' mean."""
    values = torch.linalg.svdvals(states.flatten(0, 1).double())
    shares = values / values.sum(-1, keepdim=True)
    return torch.exp(-(shares * shares.clamp_min(1e-30).log()).sum(-1)).mean().item()


def test_effective_rank_counts_directions():
    column = normal(1, 1, 8, 1)
    assert effective_rank(column.expand(-1, -1, -1, 3)) == pytest.approx(1, abs=1e-6)
    assert effective_rank(torch.eye(3).view(1, 1, 3, 3)) == pytest.approx(3, abs=1e-6)


@pytest.mark.parametrize("case", [*EXPANDED, "constant-value", "layer-gate", "mlp-direction"])
def test_channels_do_not_stay_equal_in_training(case):
    model, states = tiny_model(case).train(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(50):
        ids = token_ids(4, 16, seed=step)
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    model.model.readout.register_forward_pre_hook(lambda _, args: states.append(args[0].settle()))
    with torch.no_grad():
        model(token_ids(4, 16, seed=99))
    assert states[0].shape == (4, 16, 32, model.config.value_channels)
    assert effective_rank(states[0]) > 1.2


@pytest.mark.parametrize("variant", ["ddl-cc", "ddl-tc", "additive-expanded", "ddl-scalar"])
def test_published_parameterisation_starts_like_the_published_code(variant):
    """Every matrix N(0, 0.5/√d), compressors, gates and values included; EC stays the identity.

    Vectors keep nn.Linear's start: a value's bias is uniform in ±1/√d.
    """
    torch.manual_seed(0)
    config = DeepDeltaConfig.from_preset(
        variant, "tiny", parameterization="published", hidden_size=256, vocab_size=61
    )
    model = DeepDeltaModel(config)
    std = 0.5 / math.sqrt(256)
    assert config.qk_norm == "after_rope"
    for module in of_type(model, TokenCompressor):
        assert module.weight.std().item() == pytest.approx(std, rel=0.05)
        assert (module.read == 1 / 4).all()
    for module in of_type(model, ChannelCompressor):
        # c_ij = Σ_m k_i,j−m+1 / 4 sums the entries of the kernel that "same" padding leaves.
        terms = torch.tensor([2, 3, 4, 3])
        close(module.weight.std(0), std * terms.sqrt() / 4, atol=0, rtol=0.15)
    biases: list[torch.Tensor] = []
    for residual in of_type(model, DeltaResidual):
        assert residual.value_source == "state"
        assert residual.value.scale == 4.0
        biases.append(residual.value.bias)
        assert residual.value.weight.std().item() == pytest.approx(std, rel=0.15)
        assert residual.gate.bias.item() == 0
    if biases:
        bias = torch.cat(biases)
        assert bias.unique().numel() == bias.numel()  # every sublayer draws its own
        assert bias.abs().max().item() <= 1 / 16
    for module in of_type(model, EmbeddingConv):
        assert (module.weight[..., -1] == 1).all()


@pytest.mark.parametrize(("width", "base"), [(64, None), (256, None), (256, 64)])
def test_published_value_bias_is_uniform(width, base):
    """In ±1/√d, as nn.Linear leaves it; under µP in ±1/√(base width) at every width."""
    fields = {"residual_init": "published", "value_bias": True, "value_channels": 500}
    config = tiny_config("ddl-cc", hidden_size=width, mup_base_width=base, **fields)
    bias = build_value(config).bias.detach()
    bound = 1 / math.sqrt(base or width)
    assert -bound <= bias.min().item() < -0.95 * bound
    assert 0.95 * bound < bias.max().item() <= bound
    assert bias.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert (build_value(tiny_config("ddl-cc", value_bias=True)).bias == 0).all()


def test_matrices_start_by_their_place():
    """N(0, 0.5/√d), √layers smaller where they feed the stream, embeddings N(0, 0.02)."""
    torch.manual_seed(0)
    model = DeepDeltaForCausalLM(tiny_config(hidden_size=256, num_hidden_layers=4))
    std = 0.5 / math.sqrt(256)
    for layer in model.model.layers:
        for feeding in (layer.self_attn.o_proj, layer.mlp.down_proj):
            assert feeding.weight.std().item() == pytest.approx(std / 2, rel=0.05)
        for other in (layer.self_attn.q_proj, layer.self_attn.v_proj, layer.mlp.gate_proj):
            assert other.weight.std().item() == pytest.approx(std, rel=0.05)
        assert (layer.self_attn.q_norm.weight == 1).all()
        assert (layer.attn_residual.norm.weight == 1).all()
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.lm_head.weight is model.model.embed_tokens.weight
