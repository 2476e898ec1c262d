"""FLOPs against torch's own counter and counts by hand; a part that names no cost is refused."""

import time

import pytest
import torch
from helpers import CASES, TINY, tiny_config, tiny_model, token_ids
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from deep_delta import DeepDeltaConfig, DeepDeltaForCausalLM
from deep_delta.model import build
from deep_delta.model.flops import flops_per_token, forward_flops
from deep_delta.model.presets import VARIANTS
from deep_delta.residual import Compressor, Residual


def config(variant, **overrides):
    return DeepDeltaConfig.from_preset(variant, "tiny", **{**TINY, **overrides})


def cost(variant, seq_len=32, **overrides):
    return flops_per_token(config(variant, **overrides), seq_len)


@pytest.mark.parametrize("length", [8, 24])
def test_the_additive_model_costs_what_torch_counts(length):
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12}
    cfg = config("additive", **sizes)
    model = DeepDeltaForCausalLM(cfg)
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        model(input_ids=token_ids(3, length))
    counts = counter.get_flop_counts()
    matmuls = {str(op): n for op, n in counts["Global"].items() if not str(op).endswith("baddbmm")}
    rotary = sum(sum(n.values()) for name, n in counts.items() if name.endswith("rotary_emb"))
    counted = (sum(matmuls.values()) - rotary) / (3 * length)
    # Eager attention scores all `length` keys, where causal attention needs (length + 1)/2 of them;
    # the additions of d numbers, two in a block, happen in baddbmm, at one write of d_v = 1.
    unmasked = 2 * 2 * 4 * 12 * (length - (length + 1) / 2)
    additions = 2 * cfg.hidden_size
    forward = counted - cfg.num_hidden_layers * (unmasked - additions)
    assert flops_per_token(cfg, length) == 3 * forward


def test_the_parts_of_a_delta_residual_are_counted():
    """By hand for d = 32, d_v = 4, two blocks of two sublayers; with backward, thrice."""
    d, dv, sublayers = 32, 4, 4
    write, erase, compress = 2 * d * dv, 2 * d * dv, 2 * d * dv
    gate_and_value = 2 * d + 2 * d * dv
    assert cost("ddl-cc") - cost("write-only-cc") == 3 * sublayers * erase
    assert cost("ddl-cc") - cost("ddl-cc-no-ec") == 3 * 2 * d * dv * 4
    reads = sublayers + 1  # and the readout
    assert cost("ddl-tc") - cost("ddl-cc") == 3 * reads * (4 - 1) * compress
    direction = 3 * d
    scalar_write, scalar_erase, scalar_value = 2 * d, 2 * d, 2 * d
    delta = 2 * d + scalar_value + direction + scalar_write + scalar_erase
    assert cost("ddl-scalar") - cost("additive") == 3 * sublayers * (delta - d)
    mine = gate_and_value + direction + write + erase + compress
    theirs = write + compress
    expanded = cost("additive-expanded")
    assert cost("ddl-cc") - expanded == 3 * sublayers * (mine - theirs)


COUNTED = {"projections": "self_attn", "mlp": "mlp", "head": "lm_head"}


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_components_of_the_backbone_are_what_torch_counts_in_every_variant(variant):
    cfg, length = config(variant), 16
    model = DeepDeltaForCausalLM(cfg)
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        model(input_ids=token_ids(3, length))
    modules = {name: sum(n.values()) for name, n in counter.get_flop_counts().items()}
    parts = forward_flops(cfg, length)
    # Eager attention scores all `length` keys of `length` queries.
    parts["projections"] += parts["scores"] * length / ((length + 1) / 2)
    for part, module in COUNTED.items():
        counted = sum(n for name, n in modules.items() if name.rpartition(".")[2] == module)
        assert counted / (3 * length) == parts[part], part


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_components_add_up(variant):
    parts = forward_flops(config(variant), 16)
    assert 3 * sum(parts.values()) == flops_per_token(config(variant), 16)
    assert min(parts.values()) >= 0
    assert bool(parts["expand"]) is bool(config(variant).embedding_conv)
    assert bool(parts["read"]) is (config(variant).compressor is not None)


@pytest.mark.parametrize(
    ("cheaper", "dearer"),
    [
        ("additive", "additive-ec"),
        ("additive", "ddl-scalar"),
        ("additive-ec", "additive-expanded"),
        ("write-only-scalar", "ddl-scalar"),
        ("additive-expanded", "write-only-cc"),
        ("write-only-cc", "ddl-cc"),
        ("ddl-scalar", "ddl-cc-no-ec"),
        ("ddl-cc", "ddl-tc"),
        ("write-only-tc", "ddl-tc"),
    ],
)
def test_more_work_costs_more(cheaper, dearer):
    assert cost(cheaper) < cost(dearer)


@pytest.mark.parametrize(
    ("cheaper", "dearer"),
    [
        ({"gate": "fixed"}, {}),
        ({}, {"separate_gates": True}),
        ({}, {"gate_hidden_size": 64}),
        ({"value_activation": "constant"}, {}),
        ({}, {"direction_source": "mlp"}),
        ({}, {"value_channels": 5}),
        ({}, {"num_hidden_layers": 3}),
    ],
)
def test_options_are_counted(cheaper, dearer):
    assert cost("ddl-cc", **cheaper) < cost("ddl-cc", **dearer)


def test_longer_sequences_cost_more_attention_only():
    layers, heads = 2, 2 * 16
    assert cost("ddl-cc", 64) - cost("ddl-cc", 32) == 3 * layers * 2 * 2 * heads * 32 / 2


D, CHANNELS, SUBLAYERS = 32, 4, 4  # of TINY


@pytest.mark.parametrize(
    ("variant", "options", "more"),
    [
        ("ddl-cc", {"gate": "fixed"}, {"write": -SUBLAYERS * 2 * D}),
        ("ddl-cc", {"gate": "layer"}, {"write": -SUBLAYERS * 2 * D}),
        ("ddl-cc", {"separate_gates": True}, {"write": SUBLAYERS * 2 * D}),
        # 5 rows of d and one of 5 in place of one row of d.
        ("ddl-cc", {"gate_hidden_size": 5}, {"write": SUBLAYERS * 2 * (4 * D + 5)}),
        (
            "ddl-cc",
            {"gate_hidden_size": 5, "separate_gates": True},
            {"write": SUBLAYERS * 2 * (9 * D + 2 * 5)},
        ),
        ("ddl-cc", {"value_activation": "constant"}, {"write": -SUBLAYERS * 2 * D * CHANNELS}),
        ("ddl-cc", {"value_activation": "sigmoid", "value_bias": True}, {}),
        ("ddl-cc", {"value_source": "state"}, {}),
        # The mean of the channels, and two matrices of 7 rows.
        (
            "ddl-cc",
            {"direction_source": "mlp", "direction_hidden_size": 7},
            {"write": SUBLAYERS * (D * CHANNELS + 4 * D * 7)},
        ),
        ("ddl-cc", {"share_compressor": False}, {}),
        ("ddl-tc", {"compressor_kernel_size": 3}, {"read": -(SUBLAYERS + 1) * 2 * D * CHANNELS}),
        ("ddl-cc", {"embedding_kernel_size": 3}, {"expand": -2 * D * CHANNELS}),
        (
            "ddl-cc",
            {"value_channels": 5},
            {"read": (SUBLAYERS + 1) * 2 * D, "write": SUBLAYERS * 6 * D, "expand": 2 * D * 4},
        ),
        (
            "additive-expanded",
            {"value_channels": 5},
            {"read": 10 * D, "write": 8 * D, "expand": 8 * D},
        ),
        ("ddl-cc", {"vocab_size": 71}, {"head": 2 * D * 10}),
        ("ddl-cc", {"attention_bias": True, "qk_norm": "after_rope", "rebuild": "memory"}, {}),
    ],
)
def test_an_option_costs_what_it_costs_by_hand(variant, options, more):
    before, after = (
        forward_flops(config(variant), 16),
        forward_flops(config(variant, **options), 16),
    )
    assert {
        part: after[part] - before[part] for part in after if after[part] != before[part]
    } == more


@pytest.mark.parametrize("case", CASES)
def test_a_model_costs_what_its_configuration_says(case):
    assert forward_flops(tiny_model(case), 24) == forward_flops(tiny_config(case), 24)


def test_a_resized_vocabulary_is_counted():
    model = tiny_model("ddl-cc")
    model.resize_token_embeddings(71)
    parts = forward_flops(model, 16)
    assert parts["head"] == 2 * D * 71
    assert parts == forward_flops(model.config, 16)


def test_counting_is_quick_and_draws_no_random_numbers():
    medium = DeepDeltaConfig.from_preset("ddl-tc", "medium")
    state = torch.random.get_rng_state()
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        flops_per_token(medium, 1024)
        seconds.append(time.perf_counter() - start)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert min(seconds) < 0.1


class Part(nn.Module):
    """A gate, a target, ... of somebody's own."""

    def flops(self, *_) -> int:
        return 1000


class FreePart(nn.Module):
    """One that does not say what it costs."""


class OwnCompressor(Compressor):
    flops = Part.flops


class FreeCompressor(Compressor):
    pass


class OwnResidual(Residual):
    flops = Part.flops


class FreeResidual(Residual):
    pass


PLACES = ["gate", "value", "direction", "erase_gate"]


@pytest.mark.parametrize("place", PLACES)
def test_a_new_part_of_one_sublayer_is_counted_or_refused(place):
    model = tiny_model("separate-gates")
    before = forward_flops(model, 16)
    cost = {"value": 2 * D * CHANNELS, "direction": 0}.get(place, 2 * D)
    setattr(model.model.layers[1].mlp_residual, place, Part())
    after = forward_flops(model, 16)
    assert after == {**before, "write": before["write"] - cost + 1000}
    setattr(model.model.layers[1].mlp_residual, place, FreePart())
    refused(model, "FreePart")


def test_a_new_residual_is_counted_or_refused():
    model = tiny_model("ddl-cc")
    cost = model.model.layers[0].attn_residual.flops()
    before = forward_flops(model, 16)
    model.model.layers[0].attn_residual = OwnResidual(D, CHANNELS)
    assert forward_flops(model, 16) == {**before, "write": before["write"] - cost + 1000}
    model.model.layers[0].attn_residual = FreeResidual(D, CHANNELS)
    refused(model, "FreeResidual")


def test_a_residual_that_shares_nothing_with_ours_is_counted_or_refused():
    model = tiny_model("ddl-cc")
    block = model.model.layers[0]
    cost, read = block.mlp_residual.flops(), block.attn_residual.compressor.flops()
    before = forward_flops(model, 16)
    block.mlp_residual = Part()
    write = before["write"] - cost + 1000
    assert forward_flops(model, 16) == {**before, "write": write, "read": before["read"] - read}
    block.mlp_residual = FreePart()
    refused(model, "FreePart")


def test_a_new_compressor_is_counted_where_it_reads_or_refused():
    model = tiny_model("ddl-cc")
    before = forward_flops(model, 16)
    model.model.layers[0].attn_residual.compressor = OwnCompressor()  # the block's, by both reads
    model.model.readout.compressor = OwnCompressor()
    more = 3 * (1000 - 2 * D * CHANNELS)
    assert forward_flops(model, 16) == {**before, "read": before["read"] + more}
    model.model.readout.compressor = FreeCompressor()
    refused(model, "FreeCompressor")


def test_a_new_expansion_is_counted_or_refused():
    model = tiny_model("ddl-cc")
    model.model.expand = Part()
    assert forward_flops(model, 16)["expand"] == 1000
    model.model.expand = FreePart()
    refused(model, "FreePart")


def test_a_new_gate_that_a_configuration_builds_is_counted_or_refused(monkeypatch):
    ddl = tiny_config("ddl-cc")
    before = forward_flops(ddl, 16)
    monkeypatch.setattr(build, "build_gate", lambda _: Part())
    more = SUBLAYERS * (1000 - 2 * D)
    assert forward_flops(ddl, 16) == {**before, "write": before["write"] + more}
    monkeypatch.setattr(build, "build_gate", lambda _: FreePart())
    refused(ddl, "FreePart")


def refused(model, name: str) -> None:
    """The count must end with one line that names the class and what it lacks."""
    with pytest.raises(NotImplementedError) as caught:
        flops_per_token(model, 16)
    message = str(caught.value)
    assert message.startswith(f"{name} does not say what it costs: define flops()")
    assert "\n" not in message
