"""The configuration of a Deep Delta language model, in Hugging Face conventions."""

import dataclasses
import difflib
import functools
import itertools
import json
import warnings
from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import RopeParameters

from deep_delta.model.config_keys import VERSION_KEY, check_complete, near_miss
from deep_delta.model.presets import (
    PARAMETERIZATIONS,
    SIZES,
    VARIANTS,
    preset_fields,
    size_of,
    variant_of,
)
from deep_delta.ops import resolve_backend
from deep_delta.version import __version__


@strict
class DeepDeltaConfig(PreTrainedConfig):
    """A Llama-style decoder (RMSNorm, RoPE, QK-norm, SwiGLU) and the residual it uses.

    The fields down to `rms_norm_eps` are transformers' own; the rest say what replaces x + F(x).
    The defaults are DDL-CC at the size "small". `from_preset` names the combinations that the
    paper and its controls use.

    Keys that are no fields are kept as attributes, saved and ignored, as in every configuration of
    transformers; but a near miss of a field is an error wherever it is set. A saved configuration
    names the version that wrote it and has every field, so that no default is silently taken.

    Args:
        residual: "delta" rewrites (eq. 2.2), "additive" adds.
        value_channels: d_v, the channels per feature of the state X (d, d_v).
        compressor: "channel" (CC) or "token" (TC) for d_v > 1, None for d_v = 1.
        compressor_kernel_size: K of the token compressor, in tokens; None means 4 there.
        share_compressor: one compressor for both sublayers of a block, or one each.
        embedding_conv: start the state by the embedding convolution (EC) instead of repetition.
        embedding_kernel_size: K of the embedding convolution, in tokens.
        erase: False is the write-only control X + β k vᵀ.
        gate: "token" (a function of the context), "layer" (one learned number a sublayer) or
            "fixed" (β₀ stays).
        separate_gates: erase and write by a gate each.
        gate_hidden_size: width of a two-layer token gate; None for one layer.
        gate_init: β₀ in [0, 2], where the gate starts.
        direction_source: "sublayer" (k̃ is the sublayer's output, the paper's) or "mlp" (k̃ from a
            two-layer MLP on the state's channel mean; the value then reads the sublayer's output).
        direction_hidden_size: hidden width of that MLP.
        direction_eps: ε in k = k̃/√(‖k̃‖² + ε²).
        value_source: what the value reads: "context" (c, normalised) or "state" (x_in).
        value_activation: "linear", "sigmoid" (value_scale·σ) or "constant" (a learned vector).
        value_scale: the factor of the sigmoid value.
        value_constant: where a constant value starts.
        value_bias: add a bias to the value.
        qk_norm: normalise queries and keys "before_rope" (Qwen3's order) or "after_rope" (the
            published code's).
        residual_init: "neutral" (compressors start as an average) or "published" (they start
            like every other matrix, the value's bias as U(±1/√d)).
        hidden_init_std_factor: matrices start as N(0, factor/√d), the two projections that write
            into the residual stream smaller by √layers; embeddings as N(0, initializer_range).
        logit_multiplier: factor on the logits.
        mup_base_width: the width at which the learning rate was found. Initialisation, target,
            logits and learning rates then scale with hidden_size / mup_base_width so that it holds
            at other widths (µP, `docs/mup.md`); at that width itself, or with None, nothing does.
        state_dtype: dtype of X, e.g. "bfloat16"; None for the embeddings' dtype.
        backend: "auto", "reference" or "triton": which implementation of the delta rule runs.
        rebuild: how many states between two stored ones are rebuilt where they are needed
            ("triton"; a rebuilt state is the one the forward pass had, bit for bit): "speed" trains
            fastest, "memory" needs hardly more than an additive model, or a number (each more is
            one more kernel to compile); see `states_rebuilt`.

    Raises:
        ValueError: a misspelt field, or a combination that has no meaning; one line each.
        StrictDataclassError: a value of the wrong type.
    """

    model_type = "deep_delta"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 50304
    hidden_size: int = 768
    intermediate_size: int | None = None
    num_hidden_layers: int = 12
    num_attention_heads: int = 6
    num_key_value_heads: int | None = None
    head_dim: int = 128
    hidden_act: str = "silu"
    max_position_embeddings: int = 1024
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    tie_word_embeddings: bool = True
    rope_parameters: RopeParameters | dict | None = None
    attention_bias: bool = False
    attention_dropout: float | int = 0.0
    layer_types: list[str] | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    residual: Literal["delta", "additive"] = "delta"
    value_channels: int = 4
    compressor: Literal["channel", "token"] | None = "channel"
    compressor_kernel_size: int | None = None
    share_compressor: bool = True
    embedding_conv: bool = True
    embedding_kernel_size: int = 4
    erase: bool = True
    gate: Literal["token", "layer", "fixed"] = "token"
    separate_gates: bool = False
    gate_hidden_size: int | None = None
    gate_init: float | int = 1.0
    direction_source: Literal["sublayer", "mlp"] = "sublayer"
    direction_hidden_size: int = 128
    direction_eps: float = 1e-5
    value_source: Literal["context", "state"] = "context"
    value_activation: Literal["linear", "sigmoid", "constant"] = "linear"
    value_scale: float | int = 4.0
    value_constant: float | int = 2.0
    value_bias: bool = False
    qk_norm: Literal["before_rope", "after_rope"] = "before_rope"
    residual_init: Literal["neutral", "published"] = "neutral"
    hidden_init_std_factor: float | int = 0.5
    logit_multiplier: float | int = 1.0
    mup_base_width: int | None = None
    state_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    backend: str = "auto"
    rebuild: int | Literal["speed", "memory"] = "speed"

    deep_delta_version: str | None = None  # that wrote the file this was read from

    def __post_init__(self, **kwargs):
        if self.intermediate_size is None:
            self.intermediate_size = 8 * self.hidden_size // 3
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        kept = [self.histories(layer) for layer in range(self.num_hidden_layers)]
        self.layer_types = ["hybrid" if slots else "full_attention" for slots in kept]
        kwargs.pop("sliding_window", None)
        # Tools that find the class outside transformers look for code beside the weights here.
        kwargs.setdefault("auto_map", {})
        super().__post_init__(**kwargs)
        _check_state(self)
        _check_delta(self)

    # What transformers' attention, caches and masks look up and this family does not have.
    sliding_window = None

    def __setattr__(self, key: str, value: Any) -> None:
        _refuse_near_misses([key])
        super().__setattr__(key, value)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """The configuration that `to_dict` or a config.json describes; it must be complete.

        kwargs: fields to set in place of its own, which are checked like them; and transformers'.

        Raises:
            ValueError: a field that is missing or misspelt, a combination without a meaning.
        """
        check_complete(config_dict, _own_fields())
        _refuse_near_misses(kwargs)
        changes = {field: kwargs.pop(field) for field in _own_fields() if field in kwargs}
        return super().from_dict({**config_dict, **changes}, **kwargs)

    @classmethod
    def from_json_file(cls, json_file: str | PathLike) -> "DeepDeltaConfig":
        """`from_dict` of a file."""
        check_complete(json.loads(Path(json_file).read_text(encoding="utf-8")), _own_fields())
        return super().from_json_file(json_file)

    def to_dict(self) -> dict[str, Any]:
        """Every field and foreign key, and the version of deep_delta that wrote them."""
        written = {**super().to_dict(), VERSION_KEY: __version__}
        if not written["auto_map"]:
            del written["auto_map"]
        return written

    def to_diff_dict(self) -> dict[str, Any]:
        """What `save_pretrained` writes: of transformers' keys the changed ones, of ours all."""
        written = self.to_dict()
        kept = super().to_diff_dict()
        return {**kept, **{field: written[field] for field in (*_own_fields(), VERSION_KEY)}}

    def histories(self, layer: int) -> tuple[int, ...]:
        """The slots of the histories that a layer keeps in a cache, for convolutions over tokens.

        The token compressor keeps one for each of its reads: 0 attention, 1 MLP, and 3, the
        readout's, in the last layer. The embedding convolution's, in the first, is 2, or 0 where
        there is no other.
        """
        first, last = layer == 0, layer == self.num_hidden_layers - 1
        if self.compressor != "token":
            return (0,) if self.embedding_conv and first else ()
        return (0, 1, *((2,) if self.embedding_conv and first else ()), *((3,) if last else ()))

    @property
    def convolves(self) -> bool:
        """Whether anything looks at earlier tokens beside attention."""
        return any(self.histories(layer) for layer in (0, self.num_hidden_layers - 1))

    @property
    def number_of_conv_states(self) -> int:
        """Slots of a "hybrid" layer, one number for all layers, as transformers wants it."""
        return 4 if self.compressor == "token" else 1

    @property
    def width_ratio(self) -> float:
        """m = hidden_size / mup_base_width, by which µP scales everything; 1 without it."""
        return self.hidden_size / (self.mup_base_width or self.hidden_size)

    @property
    def logit_factor(self) -> float:
        """What the logits are multiplied by: `logit_multiplier`, and 1/m under µP."""
        return self.logit_multiplier / self.width_ratio

    @property
    def states_rebuilt(self) -> int:
        """`rebuild` as a number.

        From three channels on every second state is cheaper to rebuild twice, forward and
        backward, than to write and read; below it is not. A token compressor also keeps x_in, so
        that "memory" has more to save there.
        """
        named = {
            "speed": 1 if self.value_channels > 2 else 0,
            "memory": 7 if self.compressor == "token" else 5,
        }
        return named[self.rebuild] if isinstance(self.rebuild, str) else self.rebuild

    @classmethod
    def from_preset(
        cls,
        variant: str,
        size: str = "small",
        *,
        parameterization: Literal["paper", "published"] = "paper",
        **overrides,
    ) -> "DeepDeltaConfig":
        """The configuration of a named variant at a named size.

        Args:
            variant: one of `presets.VARIANTS`, e.g. "ddl-cc".
            size: "tiny", "small" (123.6 M parameters) or "medium" (353 M).
            parameterization: "paper" (the value is linear in the context) or "published" (what
                the authors' code does: 4·σ of the un-normalised x_in with a bias, its
                initialisation, QK-norm after RoPE).
            overrides: fields to set on top.

        Raises:
            ValueError: an unknown variant, size, parameterization or field, with the nearest name.
        """
        _refuse_unknown(overrides)
        try:
            return cls(**{**preset_fields(variant, size, parameterization), **overrides})
        except StrictDataclassError as error:  # two lines, of which the second says it
            raise ValueError(str(error).splitlines()[-1].partition(": ")[2]) from None

    def as_preset(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What `from_preset` takes to give this configuration: the three names, and overrides.

        A combination that has no name gets the names that leave the fewest overrides.
        """
        variant, size = variant_of(self), size_of(self)
        options = itertools.product(
            [variant] if variant else VARIANTS, [size] if size else SIZES, PARAMETERIZATIONS
        )
        kinds = ("variant", "size", "parameterization")
        found: list[dict[str, Any]] = [dict(zip(kinds, each, strict=True)) for each in options]
        names = min(found, key=lambda names: len(self.changes_from(self.from_preset(**names))))
        overrides = self.changes_from(self.from_preset(**names))
        # A field that follows from another one does so from the overridden one now.
        return names, overrides | self.changes_from(self.from_preset(**names, **overrides))

    def changes_from(self, other: "DeepDeltaConfig") -> dict[str, Any]:
        """The fields, with this configuration's values, in which it differs from another one."""
        return {
            name: getattr(self, name)
            for name in _own_fields()
            # The layers' types follow from the rest.
            if name != "layer_types" and getattr(self, name) != getattr(other, name)
        }


# What every configuration of transformers takes beside its fields.
_TRANSFORMERS_KEYWORDS = {
    "attn_implementation", "num_labels", "output_attentions", "rope_scaling", "rope_theta",
    "torch_dtype",
}  # fmt: skip


def _own_fields() -> tuple[str, ...]:
    """The fields declared above, without those that every configuration has."""
    return tuple(name for name in DeepDeltaConfig.__annotations__ if name != VERSION_KEY)


def _refuse_unknown(keys: Iterable[str]) -> None:
    """What a person types is no foreign key: every name must be a field's."""
    fields = {field.name for field in dataclasses.fields(DeepDeltaConfig)} - {VERSION_KEY}
    for key in keys:
        if key not in fields | _TRANSFORMERS_KEYWORDS:
            raise ValueError(f"DeepDeltaConfig has no field {key!r}{_nearest(key, fields)}")


def _refuse_near_misses(keys: Iterable[str]) -> None:
    """A misspelt field must not become an attribute that nobody reads."""
    for key in keys:
        meant = None if key.startswith("_") else _field_meant(key)
        if meant:
            raise ValueError(f"DeepDeltaConfig has no field {key!r}; did you mean {meant!r}?")


@functools.lru_cache(maxsize=1024)
def _field_meant(key: str) -> str | None:
    return near_miss(key, _own_fields())


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _generation_keys() -> set[str]:
    from transformers import GenerationConfig

    return set(GenerationConfig._get_default_generation_params())


_AT_LEAST_ONE = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "compressor_kernel_size",
    "embedding_kernel_size", "direction_hidden_size", "mup_base_width",
)  # fmt: skip


def _check_state(config: DeepDeltaConfig) -> None:
    if config.value_channels < 1:
        raise ValueError(f"value_channels is {config.value_channels}; it must be at least 1")
    if config.value_channels == 1 and config.compressor is not None:
        raise ValueError(
            f"value_channels=1 has nothing to compress: set compressor=None instead of "
            f"{config.compressor!r}, or value_channels to 2 or more"
        )
    if config.value_channels > 1 and config.compressor is None:
        raise ValueError(
            f"value_channels={config.value_channels} needs a compressor: 'channel' or 'token'"
        )
    if config.compressor_kernel_size is not None and config.compressor != "token":
        raise ValueError(
            "compressor_kernel_size is the token compressor's: leave it out, or set "
            "compressor='token'"
        )
    for name in _AT_LEAST_ONE:
        size = getattr(config, name)
        if size is not None and size < 1:
            raise ValueError(f"{name} is {size}; it must be at least 1")
    if config.head_dim % 2:
        raise ValueError(f"head_dim is {config.head_dim}; RoPE needs an even number")
    if config.num_attention_heads % (config.num_key_value_heads or 1):
        raise ValueError(
            f"num_attention_heads={config.num_attention_heads} is not a multiple of "
            f"num_key_value_heads={config.num_key_value_heads}"
        )
    if config.hidden_act not in ACT2FN:
        raise ValueError(
            f"hidden_act is {config.hidden_act!r}{_nearest(config.hidden_act, ACT2FN)}"
        )
    if not 0 <= config.attention_dropout < 1:
        raise ValueError(f"attention_dropout is {config.attention_dropout}; it must lie in 0 to 1")
    if config.mup_base_width is not None and not config.tie_word_embeddings:
        raise ValueError(
            "mup_base_width needs tie_word_embeddings=True: an untied head starts wrong"
        )
    if config.states_rebuilt < 0:
        raise ValueError(f"rebuild is {config.rebuild}; it must be 0 or more")
    resolve_backend(config.backend)


def _check_delta(config: DeepDeltaConfig) -> None:
    if config.residual == "additive":
        if not config.erase or config.separate_gates:
            raise ValueError("erase and separate_gates need residual='delta'")
        return
    if not 0 <= config.gate_init <= 2:
        raise ValueError(f"gate_init is {config.gate_init}; β₀ must lie between 0 and 2")
    if config.direction_eps < 0:
        raise ValueError(f"direction_eps is {config.direction_eps}; it must not be negative")
    if config.gate_hidden_size is not None and config.gate != "token":
        raise ValueError(f"gate_hidden_size needs gate='token', not {config.gate!r}")
    if config.gate_hidden_size is not None and config.gate_hidden_size < 1:
        raise ValueError(f"gate_hidden_size is {config.gate_hidden_size}; it must be at least 1")
    if config.separate_gates and not config.erase:
        raise ValueError("separate_gates=True has an erase gate, but erase=False erases nothing")
    if config.direction_source == "mlp" and config.value_source == "state":
        raise ValueError(
            "direction_source='mlp' takes the value from the sublayer's output: leave out "
            "value_source='state'"
        )
    if config.gate != "fixed" and min(config.gate_init, 2 - config.gate_init) < 0.05:
        warnings.warn(
            f"gate_init={config.gate_init}: the gate starts dead, its gradient is almost zero "
            "this close to 0 or 2; use a value between 0.05 and 1.95, such as 0.1 or 1.0",
            stacklevel=2,
        )
