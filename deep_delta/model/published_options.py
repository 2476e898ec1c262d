"""The options of the authors' published code: those this library has, and no others in silence.

Every key of a published configuration is read, says what the tensors say as well, or is known to
leave the function of the weights as it is; any other stops the import.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig

# Options with the values that mean what this library computes.
_ONLY: dict[str, tuple] = {
    "use_k_shift": (False,),
    "use_v_shift": (False,),
    "using_groupnorm": (False,),
    "use_output_gate": (False,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "rope_ratio": (1, 1.0),
    "residual_branch_mult": (None, 1, 1.0),
    "bias": (False,),
    "use_qk_rmsnorm": (True,),
    "q_activation": (None, "identity"),
    "k_activation": (None, "identity"),
    "v_activation": (None, "identity"),
    "rms_norm_eps": (1e-5,),
    "tie_word_embeddings": (True,),
    # The order in which a batch's gradients are summed; version 1 is the only one there is.
    "ddl_sequence_reduction_version": (1,),
    "parameterization": (
        None, "widthmuP", "widthmup", "completeP", "completep", "spectralP", "SpectralP",
        "spectralp",
    ),
}  # fmt: skip

_READ = {
    "num_attention_heads", "n_head", "block_size", "rope_base", "mup", "hidden_size_base",
    "num_hidden_layers_base", "attention_dtype", "ddl_k_eps", "ddl_beta_init", "ddl_v_sigmoid",
    "ddl_v_sigmoid_scale", "ddl_v_constant", "ddl_v_constant_value", "ddl_v_dim1_constant",
    "ddl_v_dim1_constant_value", "ddl_state_dv_shortconv_causal",
}  # fmt: skip

# Names and shapes of the tensors say the same.
_SHAPES = {
    "vocab_size", "hidden_size", "n_embd", "num_hidden_layers", "n_layer", "head_dim",
    "intermediate_size", "mlp_hidden_mult", "variant", "ddl_value_channels",
    "ddl_state_shortconv_kernel_size", "input_embed_shortconv_kernel_size",
    "ddl_beta_hidden_size", "ddl_beta_single_linear",
}  # fmt: skip

_HARMLESS = {
    "embedding_init_std", "hidden_init_std_factor", "ddl_state_read_init",  # where training began
    "dropout",  # the published models have none, whatever it says
    "kv_cache_slot_size", "validate_cached_position_ids", "use_cache",  # how decoding is stored
    "is_decoder", "add_cross_attention", "torchscript", "torch_dtype", "model_type", "auto_map",
    "tokenizer_class",  # what transformers notes about any model
}  # fmt: skip


def check_options(published: Mapping[str, Any], dtype: torch.dtype, layers: int) -> None:
    """ValueError for an option that changes the function of weights of this dtype and depth."""
    transformers_own = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    transformers_own |= set(GenerationConfig().to_dict())
    known = _ONLY.keys() | _READ | _SHAPES | _HARMLESS | transformers_own
    for name, value in published.items():
        if name not in known and not name.startswith("_"):
            raise ValueError(
                f"the published option {name}={value!r} is not known to deep_delta: leave it out "
                "of the configuration if it does not change the model"
            )
        if name in _ONLY and value not in _ONLY[name]:
            raise _unsupported(name, value)
    precision = published.get("attention_dtype")
    if precision not in (None, "auto", str(dtype).removeprefix("torch.")):
        raise _unsupported("attention_dtype", precision)
    by_depth = "residual_branch_mult" not in published and _parameterization(published) in (
        "completep", "spectralp",
    )  # fmt: skip
    base = published.get("num_hidden_layers_base", layers)
    if by_depth and base != layers:
        raise _unsupported("num_hidden_layers_base", base)


def _unsupported(name: str, value: Any) -> ValueError:
    return ValueError(
        f"the published option {name}={value!r} changes the model in a way that deep_delta does "
        "not implement"
    )


def _parameterization(published: Mapping[str, Any]) -> str:
    return str(published.get("parameterization") or "").lower()


def logit_multiplier(published: Mapping[str, Any], width: int) -> float:
    """The factor on the logits of a model of this width: 1 without µP."""
    scaled = published.get("mup") or _parameterization(published)
    return published.get("hidden_size_base", 1024) / width if scaled else 1.0


def constant_value(published: Mapping[str, Any]) -> float:
    """The target that replaces the value projection, where the options ask for one."""
    return float(
        published.get("ddl_v_constant_value", published.get("ddl_v_dim1_constant_value", 2.0))
    )


def value_fields(published: Mapping[str, Any]) -> dict[str, Any]:
    """The `DeepDeltaConfig` fields of the target v.

    Raises:
        ValueError: a sigmoid without its scale, which the first published code did not have.
    """
    constant = published.get("ddl_v_constant", published.get("ddl_v_dim1_constant", False))
    activation = "sigmoid" if published.get("ddl_v_sigmoid", True) else "linear"
    if activation == "sigmoid" and not constant and "ddl_v_sigmoid_scale" not in published:
        raise ValueError(
            "the published configuration has no ddl_v_sigmoid_scale: set it to 1.0 for the first "
            "published code, 4.0 for the later"
        )
    return {
        "value_activation": "constant" if constant else activation,
        "value_source": "state",
        "value_bias": True,
        "value_scale": float(published.get("ddl_v_sigmoid_scale", 4.0)),
        "value_constant": constant_value(published),
    }
