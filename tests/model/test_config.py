"""The configuration is checked and has the sizes that the paper reports."""

import json
import warnings

import pytest
import torch
from helpers import CASES, TINY, VARIANTS, one_line_error, tiny_config
from huggingface_hub.errors import StrictDataclassError

from deep_delta import DeepDeltaConfig, DeepDeltaForCausalLM
from deep_delta.model.presets import PARAMETERIZATIONS, SIZES


@pytest.mark.parametrize("case", CASES)
def test_json_round_trip(case, tmp_path):
    config = tiny_config(case)
    config.save_pretrained(tmp_path)
    again = DeepDeltaConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "deep_delta"
    assert saved["value_channels"] == config.value_channels


@pytest.mark.parametrize(
    ("fields", "fragments"),
    [
        ({"value_channels": 1}, ["value_channels=1", "compressor"]),
        ({"value_channels": 1, "compressor": "token"}, ["value_channels=1", "compressor"]),
        ({"compressor": None}, ["value_channels=4", "compressor"]),
        ({"value_channels": 0, "compressor": None}, ["value_channels"]),
        ({"compressor_kernel_size": 4}, ["compressor_kernel_size", "token"]),
        (
            {"compressor_kernel_size": 4, "compressor": None, "value_channels": 1},
            ["compressor_kernel_size", "token"],
        ),
        ({"compressor_kernel_size": 0, "compressor": "token"}, ["compressor_kernel_size"]),
        ({"embedding_kernel_size": 0}, ["embedding_kernel_size"]),
        ({"direction_hidden_size": 0}, ["direction_hidden_size"]),
        ({"gate_hidden_size": 8, "gate": "layer"}, ["gate_hidden_size", "layer"]),
        ({"gate_hidden_size": 0}, ["gate_hidden_size"]),
        ({"gate_init": -0.1}, ["gate_init"]),
        ({"gate_init": 2.1}, ["gate_init"]),
        ({"direction_eps": -1.0}, ["direction_eps"]),
        ({"separate_gates": True, "erase": False}, ["separate_gates", "erase"]),
        ({"residual": "additive", "erase": False}, ["erase", "additive"]),
        (
            {"direction_source": "mlp", "value_source": "state"},
            ["direction_source", "value_source"],
        ),
        ({"backend": "fastest"}, ["fastest", "auto"]),
        ({"rebuild": -1}, ["rebuild", "0 or more"]),
        ({"value_chanels": 4}, ["value_chanels", "did you mean", "value_channels"]),
        ({"embeding_conv": True}, ["embeding_conv", "embedding_conv"]),
    ],
    ids=str,
)
def test_combination_without_a_meaning_is_one_line(fields, fragments):
    fragments = ["delta" if f == "additive" else f for f in fragments]
    one_line_error(lambda: DeepDeltaConfig(**{**TINY, **fields}), *fragments)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("residual", "subtract"),
        ("compressor", "tokens"),
        ("gate", "tokn"),
        ("value_activation", "tanh"),
        ("value_source", "contxt"),
        ("direction_source", "attention"),
        ("qk_norm", "never"),
        ("state_dtype", "float8"),
        ("value_channels", "four"),
        ("erase", "yes"),
    ],
)
def test_unknown_choice_is_refused_by_name(field, value):
    one_line_error(lambda: tiny_config(**{field: value}), field)
    with pytest.raises(StrictDataclassError, match=field):  # transformers' own strict fields
        DeepDeltaConfig(**{**TINY, field: value})


@pytest.mark.parametrize(
    ("call", "fragments"),
    [
        (lambda: DeepDeltaConfig.from_preset("ddl-ccc"), ["ddl-ccc", "'ddl-cc'", "additive"]),
        (lambda: DeepDeltaConfig.from_preset("writeonly-cc"), ["'write-only-cc'"]),
        (lambda: DeepDeltaConfig.from_preset("zzz"), ["zzz", "ddl-scalar"]),
        (lambda: DeepDeltaConfig.from_preset("ddl-cc", "smal"), ["smal", "'small'"]),
        (
            lambda: DeepDeltaConfig.from_preset("ddl-cc", parameterization="publish"),
            ["publish", "'published'"],
        ),
        (lambda: DeepDeltaConfig.from_preset("ddl-cc", gate_initial=1), ["'gate_init'"]),
        (lambda: DeepDeltaConfig.from_preset("ddl-cc", nonsense=1), ["no field 'nonsense'"]),
        (lambda: DeepDeltaConfig.from_preset("ddl-cc", temperature=1), ["no field 'temperature'"]),
    ],
)
def test_preset_with_a_wrong_name_gets_the_nearest(call, fragments):
    one_line_error(call, *fragments)


@pytest.mark.parametrize("start", [0.0, 0.04, 1.96, 2.0])
def test_gate_that_starts_dead_warns_and_says_what_to_use(start):
    with pytest.warns(UserWarning, match=r"gate_init.*dead.*0\.05") as caught:
        tiny_config(gate_init=start)
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)


@pytest.mark.parametrize("fields", [{"gate_init": 0.06}, {"gate_init": 1.94}, {"gate_init": 1}])
def test_gate_that_can_learn_does_not_warn(fields):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny_config(**fields)
        tiny_config(gate="fixed", gate_init=2.0)  # nothing is learned: nothing can be dead


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_preset_exists_in_every_size_and_parameterisation(variant, size):
    config = DeepDeltaConfig.from_preset(variant, size)
    assert config.erase == (not variant.startswith("write-only"))
    assert config.residual == ("additive" if variant.startswith("additive") else "delta")
    assert config.value_activation == "linear"
    assert config.value_source == "context"
    assert config.tie_word_embeddings
    published = DeepDeltaConfig.from_preset(variant, size, parameterization="published")
    assert published.qk_norm == "after_rope"
    if config.residual == "delta":
        assert published.value_activation == "sigmoid"
        assert published.value_source == "state"
        assert published.value_bias


def test_presets_are_the_papers_rows():
    def row(variant: str) -> tuple:
        config = DeepDeltaConfig.from_preset(variant)
        return config.value_channels, config.compressor, config.embedding_conv

    assert row("additive") == row("ddl-scalar") == row("write-only-scalar") == (1, None, False)
    assert row("ddl-cc") == row("write-only-cc") == row("additive-expanded") == (4, "channel", True)
    assert row("ddl-tc") == row("write-only-tc") == (4, "token", True)
    assert row("ddl-cc-no-ec") == (4, "channel", False)
    assert row("ddl-tc-no-ec") == (4, "token", False)
    assert row("additive-ec") == (1, None, True)


def parameters(variant: str, size: str) -> int:
    with torch.device("meta"):
        return DeepDeltaForCausalLM(DeepDeltaConfig.from_preset(variant, size)).num_parameters()


@pytest.mark.parametrize(
    ("size", "layers", "d", "heads", "millions"),
    [("small", 12, 768, 6, 123.6), ("medium", 24, 1024, 8, 353.5)],
)
def test_sizes_are_the_papers(size, layers, d, heads, millions):
    """By the architecture's own arithmetic, and in the round numbers of the paper."""
    block = 4 * d * heads * 128 + 3 * d * (8 * d // 3) + 2 * d + 2 * 128
    total = parameters("additive", size)
    assert total == 50304 * d + layers * block + d
    assert total / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.mark.parametrize(
    ("variant", "extra"),
    [
        # Per sublayer: a gate (d + 1) and a value (d·d_v); compressors: one a block, one to read.
        ("ddl-scalar", 24 * (768 + 1 + 768)),
        ("ddl-cc-no-ec", 24 * (768 + 1 + 4 * 768) + 13 * 4 * 768),
        ("ddl-cc", 24 * (768 + 1 + 4 * 768) + 13 * 4 * 768 + 4 * 4 * 768),
        ("ddl-tc", 24 * (768 + 1 + 4 * 768) + 13 * (4 * 4 * 768 + 4) + 4 * 4 * 768),
        ("write-only-cc", 24 * (768 + 1 + 4 * 768) + 13 * 4 * 768 + 4 * 4 * 768),
        ("additive-expanded", 24 * 4 + 13 * 4 * 768 + 4 * 4 * 768),
        ("additive-ec", 4 * 768),
    ],
)
def test_residual_adds_the_parameters_it_should(variant, extra):
    assert parameters(variant, "small") - parameters("additive", "small") == extra


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_preset_knows_its_names(variant, size, parameterization):
    names = {"variant": variant, "size": size, "parameterization": parameterization}
    assert DeepDeltaConfig.from_preset(**names).as_preset() == (names, {})


@pytest.mark.parametrize(
    "odd",
    [
        {},
        {"parameterization": "published"},
        # As the preset has them, where they would follow from what is overridden.
        {"num_attention_heads": 4, "num_key_value_heads": 2},
        {"hidden_size": 48, "intermediate_size": 256},
        {"direction_source": "mlp"},
        {"value_channels": 3, "compressor": "token", "embedding_conv": False, "erase": True},
        {"rope_theta": 500.0, "tie_word_embeddings": False, "qk_norm": "after_rope"},
    ],
    ids=str,
)
@pytest.mark.parametrize("case", ["additive-expanded", "two-channels", "layer-gate"])
def test_any_configuration_is_a_preset_and_overrides(case, odd):
    config = tiny_config(case, **odd)
    names, overrides = config.as_preset()
    assert DeepDeltaConfig.from_preset(**names, **overrides).to_dict() == config.to_dict()
    assert set(overrides) <= set(DeepDeltaConfig.__annotations__)
