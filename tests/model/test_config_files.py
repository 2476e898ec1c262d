"""A configuration in a file: foreign keys stay, near misses and fields left out are errors."""

import copy
import dataclasses
import importlib
import inspect
import json

import pytest
from helpers import one_line_error, tiny_config, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig

from deep_delta import DeepDeltaConfig, DeepDeltaForCausalLM, __version__
from deep_delta.model import config_keys
from deep_delta.model.config_keys import near_miss

FIELDS = [name for name in DeepDeltaConfig.__annotations__ if name != "deep_delta_version"]

# Found in files of other tools and tuners, or set by transformers' own tests.
FOREIGN = {
    "note": "x", "date": "2026-01-01", "is_decoder": True, "tokenizer_class": "GPT2Tokenizer",
    "transformers.js_config": {"dtype": "q4"}, "unsloth_version": "2026.1", "batch_norm_eps": 1e-3,
    "hidden_dropout": 0.1, "layer_norm_eps": 1e-6, "num_hidden_layers_decoder": 2, "hidden_dim": 3,
    "attention_probs_dropout_prob": 0.1, "boi_token_id": 5, "pooler_hidden_act": "tanh",
}  # fmt: skip

NEAR_MISSES = {
    "value_chanels": "value_channels", "value_channel": "value_channels",
    "vlaue_channels": "value_channels", "valueChannels": "value_channels",
    "value-channels": "value_channels", "embeding_conv": "embedding_conv",
    "gate_initial": "gate_init", "gates": "gate", "residuals": "residual",
    "seperate_gates": "separate_gates", "compresor": "compressor", "hiden_size": "hidden_size",
    "num_hidden_layer": "num_hidden_layers", "rms_norm_epsilon": "rms_norm_eps",
    "state_dtyp": "state_dtype", "QK_norm": "qk_norm",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    return tmp_path


def edit(folder, *, drop=(), **keys):
    path = folder / "config.json"
    saved = {**json.loads(path.read_text()), **keys}
    path.write_text(json.dumps({key: value for key, value in saved.items() if key not in drop}))


def readers(folder):
    """Every way to a configuration from a file or what was in one."""
    path = folder / "config.json"
    return {
        "from_pretrained": lambda: DeepDeltaConfig.from_pretrained(folder),
        "AutoConfig": lambda: AutoConfig.from_pretrained(folder),
        "from_json_file": lambda: DeepDeltaConfig.from_json_file(path),
        "from_dict": lambda: DeepDeltaConfig.from_dict(json.loads(path.read_text())),
        "the model": lambda: DeepDeltaForCausalLM.from_pretrained(folder),
        "the Auto model": lambda: AutoModelForCausalLM.from_pretrained(folder),
    }


def test_foreign_keys_are_kept_through_files_and_change_nothing(tmp_path):
    plain, config = tiny_config(), DeepDeltaConfig(**{**tiny_config().to_dict(), **FOREIGN})
    set_later = tiny_config()
    for key, value in FOREIGN.items():
        setattr(set_later, key, value)
    for each in (config, set_later):
        each.save_pretrained(tmp_path)
        again = AutoConfig.from_pretrained(tmp_path)
        assert {key: getattr(again, key) for key in FOREIGN} == FOREIGN
        assert {field: getattr(again, field) for field in FIELDS} == {
            field: getattr(plain, field) for field in FIELDS
        }


def test_model_with_a_foreign_key_saves_and_loads(tmp_path):
    model = tiny_model()
    model.config.note = "x"
    model.save_pretrained(tmp_path)
    assert DeepDeltaForCausalLM.from_pretrained(tmp_path).config.note == "x"


@pytest.mark.parametrize(("key", "field"), NEAR_MISSES.items())
def test_near_miss_of_a_field_is_refused_wherever_it_is_set(key, field, folder):
    def assign():
        setattr(tiny_config(), key, 1)

    says = (repr(key), f"did you mean {field!r}")
    one_line_error(assign, *says)
    one_line_error(lambda: DeepDeltaConfig(**{key: 1}), *says)
    one_line_error(lambda: DeepDeltaConfig.from_preset("ddl-cc", **{key: 1}), repr(key))
    one_line_error(lambda: DeepDeltaConfig.from_pretrained(folder, **{key: 1}), *says)
    one_line_error(lambda: DeepDeltaForCausalLM.from_pretrained(folder, **{key: 1}), *says)
    edit(folder, **{key: 1})
    for read in readers(folder).values():
        one_line_error(read, *says)


# Those with names closest to ours are among them.
FAMILIES = (
    "bert", "chameleon", "deepseek_v3", "falcon_h1", "gemma2", "gpt2", "gpt_oss",
    "granitemoehybrid", "jamba", "layoutlmv3", "levit", "lfm2", "llama", "mamba2", "mixtral",
    "mobilebert", "mpt", "nemotron", "olmo2", "opt", "phi3", "qwen3", "qwen3_next", "rwkv",
    "seamless_m4t", "segformer", "t5", "vit", "whisper", "zamba2",
)  # fmt: skip


def test_no_key_of_transformers_is_a_near_miss():
    keys = {name for name in dir(PreTrainedConfig) if not name.startswith("_")}
    keys |= set(vars(GenerationConfig()))
    for family in FAMILIES:
        module = importlib.import_module(f"transformers.models.{family}.configuration_{family}")
        for config in vars(module).values():
            if inspect.isclass(config) and issubclass(config, PreTrainedConfig):
                keys |= {field.name for field in dataclasses.fields(config)}
                keys |= set(config.attribute_map)
    assert len(keys) > 400
    assert not {key: field for key in keys if (field := near_miss(key, FIELDS))}


@pytest.mark.parametrize("field", FIELDS)
def test_field_that_is_gone_from_a_file_is_missed(field, folder):
    edit(folder, drop=[field])
    for read in readers(folder).values():
        one_line_error(read, repr(field), "default")


def test_files_from_before_versions_need_the_fields_they_always_had(folder):
    later = ["rebuild", "mup_base_width"]
    edit(folder, drop=["deep_delta_version", *later])
    for name, read in readers(folder).items():
        if "model" not in name:  # there are no weights
            assert read().rebuild == "speed"
    edit(folder, drop=["gate_init"])
    one_line_error(lambda: AutoConfig.from_pretrained(folder), "'gate_init'")


def test_a_later_version_may_add_a_field_with_a_default(folder, monkeypatch):
    monkeypatch.setitem(config_keys.FIRST_WRITTEN, "value_scale", "99.1")
    monkeypatch.setattr(config_keys, "__version__", "99.2")
    edit(folder, drop=["value_scale"])
    assert AutoConfig.from_pretrained(folder).value_scale == 4.0
    edit(folder, deep_delta_version="99.2")
    one_line_error(lambda: AutoConfig.from_pretrained(folder), "'value_scale'")


def test_fields_of_the_first_version_that_named_itself():
    """A field that is not in this list is new: `FIRST_WRITTEN` says since when."""
    later = {name for name, version in config_keys.FIRST_WRITTEN.items() if version != "0.1.0"}
    assert sorted(set(FIELDS) - later) == [
        "attention_bias", "attention_dropout", "backend", "bos_token_id", "compressor",
        "compressor_kernel_size", "direction_eps", "direction_hidden_size", "direction_source",
        "embedding_conv", "embedding_kernel_size", "eos_token_id", "erase", "gate",
        "gate_hidden_size", "gate_init", "head_dim", "hidden_act", "hidden_init_std_factor",
        "hidden_size", "initializer_range", "intermediate_size", "layer_types", "logit_multiplier",
        "max_position_embeddings", "mup_base_width", "num_attention_heads", "num_hidden_layers",
        "num_key_value_heads", "pad_token_id", "qk_norm", "rebuild", "residual", "residual_init",
        "rms_norm_eps", "rope_parameters", "separate_gates", "share_compressor", "state_dtype",
        "tie_word_embeddings", "use_cache", "value_activation", "value_bias", "value_channels",
        "value_constant", "value_scale", "value_source", "vocab_size",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "rope", [None, {}, {"rope_type": "default"}, {"rope_type": "default", "rope_teta": 500.0}]
)
def test_rotation_that_is_gone_from_a_file_is_missed(rope, folder):
    edit(folder, rope_parameters=rope)
    for read in readers(folder).values():
        one_line_error(read, "rope_theta")


@pytest.mark.parametrize("version", ["99.0", "soon", 3])
def test_version_that_this_one_cannot_know(version, folder):
    edit(folder, deep_delta_version=version)
    one_line_error(lambda: AutoConfig.from_pretrained(folder), str(version), "deep_delta")


def test_every_field_is_written_whatever_its_value(tmp_path):
    DeepDeltaConfig().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert set(FIELDS) <= set(saved)
    assert saved["deep_delta_version"] == __version__
    assert "auto_map" not in saved  # no code lies beside the weights


def test_copies_and_round_trips_stay_the_same():
    config = tiny_config()
    config.note = "x"
    through_json = DeepDeltaConfig.from_dict(json.loads(config.to_json_string()))
    for again in (
        copy.deepcopy(config), DeepDeltaConfig.from_dict(config.to_dict()), through_json,
        DeepDeltaConfig(**config.to_diff_dict()),
    ):  # fmt: skip
        assert again.to_dict() == config.to_dict()
        assert again.note == "x"


def test_tools_that_look_for_code_beside_the_weights_find_none(folder):
    """TRL reads `config.auto_map` of a class that is not in transformers."""
    config = AutoConfig.from_pretrained(folder)
    assert config.auto_map == {}
    config.auto_map["AutoConfig"] = "mine.Config"
    assert AutoConfig.from_pretrained(folder).auto_map == {}
    assert config.to_dict()["auto_map"] == {"AutoConfig": "mine.Config"}
