"""FLOPs against torch's own counter, and peak memory against a known allocation."""

import time

import pytest
import torch
from helpers import TINY, token_ids
from torch.utils.flop_counter import FlopCounterMode

from deep_delta import DeepDeltaConfig, DeepDeltaForCausalLM
from deep_delta.accounting import PeakMemory, flops_per_token, forward_flops, peak_flops
from deep_delta.model.presets import VARIANTS

MIB = 2**20


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
    ("name", "most"), [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA A100-SXM4", 312e12), ("X", None)]
)
def test_peak_of_a_gpu(name, most):
    assert peak_flops(name) == most


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


def test_peak_memory_sees_what_was_allocated_inside_and_freed():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with PeakMemory() as memory:
        block = torch.ones(64 * MIB // 4, device=device)
        time.sleep(0.1)  # the memory of a CPU is sampled every 10 ms
        del block
    assert 62 * MIB < memory.bytes < 96 * MIB


def test_peak_memory_of_nothing_is_almost_nothing():
    with PeakMemory() as memory:
        time.sleep(0.03)
    assert memory.bytes < 16 * MIB
