"""Weights of the authors' published code, loaded into this library's model.

The published code folds into ours exactly: its channel compressor (a kernel over the channels
and a read vector) is one matrix here, its key-rms-after-RoPE attention is `qk_norm="after_rope"`.
Exactly as a function, that is: two factors learn otherwise than their product.
Facts about it are in the paper's appendix A and its repository; the code below is our own.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from deep_delta.model.configuration import DeepDeltaConfig
from deep_delta.model.modeling import DeepDeltaForCausalLM
from deep_delta.model.published_options import (
    check_options,
    constant_value,
    logit_multiplier,
    value_fields,
)
from deep_delta.residual import fold_channel_kernel

Weights = dict[str, Tensor]

_ATTENTION = {
    "c_q": "q_proj", "c_k": "k_proj", "c_v": "v_proj", "c_proj": "o_proj", "o_proj": "o_proj",
    "q_rms": "q_norm", "k_rms": "k_norm",
}  # fmt: skip
_MLP = {"c_fc1": "gate_proj", "c_fc2": "up_proj", "c_proj": "down_proj", "o_proj": "down_proj"}
_NORMS = {"ln_1": "attn_residual.norm", "ln_2": "mlp_residual.norm"}
_RESIDUALS = {"ddl_attn": "attn_residual", "ddl_mlp": "mlp_residual"}
_GENERATORS = {
    "beta.weight": "gate.weight", "beta.bias": "gate.bias", "beta_in.weight": "gate.hidden",
    "beta_out.weight": "gate.weight", "beta_out.bias": "gate.bias",
    "v_proj.weight": "value.weight", "v_proj.bias": "value.bias",
}  # fmt: skip


def load_published(
    path_or_state_dict: str | Path | Mapping[str, Tensor],
    config: Mapping[str, Any] | None = None,
    **overrides,
) -> DeepDeltaForCausalLM:
    """A model that computes what the authors' published code computes with these weights.

    Args:
        path_or_state_dict: a folder with config.json and model.safetensors (or
            pytorch_model.bin, read with weights_only=True); one .safetensors file with the
            published configuration as JSON under the metadata key "config" and its tensors under
            "weights."; or a state dict.
        config: the published configuration; needed for a state dict, otherwise it replaces the
            one found beside the weights.
        overrides: `DeepDeltaConfig` fields to set on top, e.g. state_dtype.

    Returns:
        The model in evaluation mode, in the weights' dtype. The variant (d_v, compressor,
        embedding convolution, gate layers) is inferred from the tensor names.

    Raises:
        ValueError: files that are missing or unreadable, tensors of another architecture,
            published options this library does not have or know, or tensors left over; one line
            each.
    """
    weights, found = _read(path_or_state_dict)
    published = dict(config if config is not None else found or {})
    if not published:
        raise ValueError("a state dict needs the published configuration as well: config={...}")
    if "transformer.wte.weight" not in weights:
        raise ValueError(
            "these are not weights of the published code: no tensor transformer.wte.weight"
        )
    try:
        fields = _fields(weights, published)
        converted = _convert(weights, published, fields)
    except (KeyError, IndexError, TypeError, ZeroDivisionError) as error:
        raise ValueError(
            f"the published weights or their configuration are incomplete: {error!r}"
        ) from None
    # Made in the weights' dtype, none of which passes through another; `.to` would round RoPE's
    # frequencies as well.
    dtype = weights["transformer.wte.weight"].dtype
    model = AutoModelForCausalLM.from_config(
        DeepDeltaConfig(**{**fields, **overrides}), dtype=dtype
    )
    try:
        model.load_state_dict(converted)
    except RuntimeError as error:
        details = " ".join(str(error).split())
        raise ValueError(
            f"the published weights do not fit their configuration: {details}"
        ) from None
    return model.eval()


def _read(source: str | Path | Mapping[str, Tensor]) -> tuple[Weights, dict | None]:
    """The tensors under their published names, and the configuration found beside them."""
    if isinstance(source, Mapping):
        return _strip(dict(source)), None
    path = Path(source)
    if path.is_file() and path.suffix == ".safetensors":
        with _readable(path), safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            named = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            config = json.loads(metadata["config"]) if "config" in metadata else None
        inside = {name: t for name, t in named.items() if name.startswith("weights.")}
        return _strip(inside or named), config
    if not path.is_dir():
        raise ValueError(f"{path} is neither a folder nor a .safetensors file")
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} has no config.json: not a checkpoint folder")
    with _readable(path / "config.json"):
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    safe, pickled = path / "model.safetensors", path / "pytorch_model.bin"
    if safe.is_file():
        with _readable(safe):
            return _strip(load_file(safe)), config
    if pickled.is_file():
        with _readable(pickled):
            return _strip(torch.load(pickled, map_location="cpu", weights_only=True)), config
    raise ValueError(f"{path} has neither model.safetensors nor pytorch_model.bin")


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Whatever goes wrong inside becomes one line that names the file."""
    try:
        yield
    except Exception as error:
        details = str(error).strip().splitlines()
        reason = details[0] if details else type(error).__name__
        raise ValueError(f"{path} cannot be read: {reason}") from None


def _strip(weights: Mapping[str, Tensor]) -> Weights:
    """Names without the prefixes that files, torch.compile and DDP put in front of them."""
    stripped = {}
    for name, tensor in weights.items():
        for prefix in ("weights.", "_orig_mod.", "module."):
            name = name.removeprefix(prefix)
        stripped[name] = tensor
    return stripped


def _fields(weights: Weights, published: Mapping[str, Any]) -> dict[str, Any]:
    """The `DeepDeltaConfig` fields of a published model: sizes, options, and the variant."""
    vocab_size, width = weights["transformer.wte.weight"].shape
    heads = published.get("num_attention_heads", published.get("n_head"))
    if heads is None:
        raise ValueError("the published configuration has no num_attention_heads")
    numbers = [name.split(".")[2] for name in weights if name.startswith("transformer.h.")]
    if not numbers or not all(number.isdigit() for number in numbers):
        raise ValueError("these are not weights of the published code: no blocks transformer.h.N")
    layers = 1 + max(map(int, numbers))
    check_options(published, weights["transformer.wte.weight"].dtype, layers)
    fields: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "head_dim": weights["transformer.h.0.attn.c_q.weight"].shape[0] // heads,
        "intermediate_size": weights["transformer.h.0.mlp.c_fc1.weight"].shape[0],
        "max_position_embeddings": published.get("block_size", 1024),
        "rope_parameters": {
            "rope_type": "default", "rope_theta": float(published.get("rope_base", 10000.0)),
        },
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "qk_norm": "after_rope",
        "embedding_conv": False,
        "value_channels": 1,
        "compressor": None,
        "residual_init": "published",
        "logit_multiplier": logit_multiplier(published, width),
    }  # fmt: skip
    if "transformer.h.0.ddl_attn.v_proj.weight" not in weights:
        return {**fields, "residual": "additive"}

    inner = weights.get("transformer.h.0.ddl_attn.beta_in.weight")
    fields |= {
        "residual": "delta",
        "value_channels": weights["transformer.h.0.ddl_attn.v_proj.weight"].shape[0],
        **value_fields(published),
        "gate_hidden_size": None if inner is None else inner.shape[0],
        "gate_init": float(published.get("ddl_beta_init", 1.0)),
        "direction_eps": float(published.get("ddl_k_eps", 1e-5)),
    }
    kernel = _compressor_kernel(weights, "transformer.h.0.compress.")
    if kernel is not None:
        token = _is_token_kernel(weights)
        fields["compressor"] = "token" if token else "channel"
        if token:
            fields["compressor_kernel_size"] = kernel.shape[-1]
    expansion = _expansion_kernel(weights)
    if expansion is not None:
        fields |= {"embedding_conv": True, "embedding_kernel_size": expansion.shape[-1]}
    return fields


def _compressor_kernel(weights: Weights, prefix: str) -> Tensor | None:
    names = ("weight", "shortconv.weight", "shortconv.conv.weight")
    return next((weights[prefix + n] for n in names if prefix + n in weights), None)


def _expansion_kernel(weights: Weights) -> Tensor | None:
    names = ("input_embed.conv.weight", "input_embed.weight")
    return next((weights[name] for name in names if name in weights), None)


def _is_token_kernel(weights: Weights) -> bool:
    """A kernel over tokens has a row for every (feature, channel), one over channels does not."""
    kernel = _compressor_kernel(weights, "transformer.h.0.compress.")
    width = weights["transformer.wte.weight"].shape[1]
    return kernel is not None and kernel[..., 0].numel() != width


def _compressor(
    weights: Weights, source: str, target: str, fields: Mapping[str, Any], causal: bool
) -> Weights:
    kernel, read = _compressor_kernel(weights, source), weights.get(source + "read")
    if kernel is None or read is None:
        raise ValueError(f"the published weights lack the compressor {source.rstrip('.')}")
    shape = (fields["hidden_size"], fields["value_channels"], -1)
    if fields["compressor"] == "token":
        return {target + "weight": kernel.reshape(shape), target + "read": read}
    folded = fold_channel_kernel(kernel.reshape(fields["hidden_size"], -1), read, causal)
    return {target + "weight": folded}


def _block_name(part: str, rest: str) -> str | None:
    """This library's name, inside a block, of a published tensor `part.rest`; None if unknown."""
    leaf, _, kind = rest.partition(".")
    if part in _NORMS:
        return f"{_NORMS[part]}.{rest}"
    if part == "attn" and leaf in _ATTENTION:
        return f"self_attn.{_ATTENTION[leaf]}.{kind}"
    if part == "mlp" and leaf in _MLP:
        return f"mlp.{_MLP[leaf]}.{kind}"
    if part in _RESIDUALS and rest in _GENERATORS:
        return f"{_RESIDUALS[part]}.{_GENERATORS[rest]}"
    return None


def _convert(weights: Weights, published: Mapping[str, Any], fields: Mapping[str, Any]) -> Weights:
    """Published tensors under this library's names; ValueError for any that is left over."""
    causal = bool(published.get("ddl_state_dv_shortconv_causal", False))
    embeddings = weights["transformer.wte.weight"]
    if not torch.equal(weights.get("lm_head.weight", embeddings), embeddings):
        raise ValueError(
            "lm_head.weight is not transformer.wte.weight: the published code ties them"
        )
    out = {"model.embed_tokens.weight": embeddings, "lm_head.weight": embeddings}
    compressors, unknown = {}, []
    for name, tensor in weights.items():
        if name in ("transformer.wte.weight", "lm_head.weight"):
            continue
        if name == "ln_f.weight":
            out["model.norm.weight"] = tensor
        elif name.startswith("input_embed."):
            shape = (fields["hidden_size"], fields["value_channels"], -1)
            out["model.expand.weight"] = tensor.reshape(shape)
        elif name.startswith("readout."):
            compressors["readout."] = "model.readout.compressor."
        elif name.startswith("transformer.h."):
            _, _, layer, part, rest = name.split(".", 4)
            if part == "compress":
                lender = f"model.layers.{layer}.attn_residual.compressor."
                compressors[f"transformer.h.{layer}.compress."] = lender
            elif (inside := _block_name(part, rest)) is not None:
                out[f"model.layers.{layer}.{inside}"] = tensor
            else:
                unknown.append(name)
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(f"published tensors that deep_delta does not know: {', '.join(unknown)}")
    for source, target in compressors.items():
        out |= _compressor(weights, source, target, fields, causal)
    if fields.get("value_activation") == "constant":
        # The published code keeps its value projection beside the constant that replaces it.
        unused = [name for name in out if ".value." in name]
        vector = embeddings.new_full((fields["value_channels"],), constant_value(published))
        for name in unused:
            del out[name]
            out[name.rpartition(".")[0] + ".vector"] = vector
    return out
