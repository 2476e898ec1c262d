"""The decoder: expand -> blocks of (residual, sublayer) -> read out -> norm -> head.

Attention, MLP and rotary embedding are transformers' own (Qwen3's), so every attention backend
works; the residual is whatever the configuration says, and nothing here asks which one it is.
"""

import functools
import math
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3Attention,
    Qwen3MLP,
    Qwen3RotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from deep_delta.model import inputs
from deep_delta.model.build import build_expand, build_readout, build_residual, matrix_std
from deep_delta.model.cache import prepare_histories
from deep_delta.model.configuration import DeepDeltaConfig
from deep_delta.model.loading import CompleteLoading
from deep_delta.model.loss import LinearCrossEntropy, linear_cross_entropy
from deep_delta.model.versions import CACHE, output_keyword
from deep_delta.residual import ResidualModule, RMSNorm, State, TokenWindow, flops_of


class AttentionNormAfterRope(Qwen3Attention):
    """The published code's order: RoPE first, then the learned norm of queries and keys."""

    def forward(  # type: ignore[override]  # a cache has one of two names: see `versions`
        self, hidden_states, position_embeddings, attention_mask, **kwargs
    ):
        cache = kwargs.pop(CACHE, None)
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(shape).transpose(1, 2)
        key = self.k_proj(hidden_states).view(shape).transpose(1, 2)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        query, key = self.q_norm(query), self.k_norm(key)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx, kwargs=kwargs)
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=None,
            **kwargs,
        )
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1).contiguous()), weights


ATTENTION = {"before_rope": Qwen3Attention, "after_rope": AttentionNormAfterRope}


def linear_flops(*layers: nn.Linear) -> int:
    """FLOPs of a token in linear layers."""
    return sum(2 * layer.in_features * layer.out_features for layer in layers)


class DeepDeltaBlock(GradientCheckpointingLayer):
    """Attention and MLP, each behind a residual. The fields of a `State` in, a `State` out."""

    def __init__(self, config: DeepDeltaConfig, layer: int):
        super().__init__()
        self.attn_residual = build_residual(config, layer, 0)
        attention: Any = ATTENTION[config.qk_norm]  # reads only the fields our config has too
        self.self_attn = attention(config, layer)
        self.mlp_residual = build_residual(config, layer, 1)
        self.mlp = Qwen3MLP(config)
        for linear in (self.self_attn.o_proj, self.mlp.down_proj):
            linear.feeds_stream = True  # see `_init_weights`

    def flops(self, seq_len: int) -> dict[str, float]:
        """FLOPs of a token by component: its part of `model.flops.forward_flops`."""
        attention, mlp = self.self_attn, self.mlp
        residuals: tuple[Any, Any] = (self.attn_residual, self.mlp_residual)
        readers = [each.reader for each in residuals if hasattr(each, "reader")]

        def shared() -> Any:
            return self.attn_residual.compressor

        return {
            "projections": linear_flops(
                attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj
            ),
            "scores": 2 * 2 * attention.o_proj.in_features * (seq_len + 1) / 2,
            "mlp": linear_flops(mlp.gate_proj, mlp.up_proj, mlp.down_proj),
            "read": sum(flops_of(reader(shared)) for reader in readers),
            "write": sum(flops_of(residual) for residual in residuals),
        }

    def forward(self, *state, window: TokenWindow, **attention) -> State:
        def attend(context: Tensor) -> Tensor:
            return self.self_attn(context, **attention)[0]

        def feed(context: Tensor) -> Tensor:
            return self.mlp(context)

        def shared() -> Any:
            return self.attn_residual.compressor

        # Functions and no modules: tools that spread a model over devices move what they find in
        # a call's arguments, modules too.
        new = self.attn_residual(State(*state), attend, window)
        return self.mlp_residual(new, feed, window, shared)


class DeepDeltaPreTrainedModel(CompleteLoading):
    config: DeepDeltaConfig
    config_class = DeepDeltaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DeepDeltaBlock"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"attentions": Qwen3Attention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Matrices N(0, factor/√d), √layers smaller where they feed the stream; see the config."""
        if isinstance(module, ResidualModule):
            # Residuals draw from generators of their own: the backbone's numbers are then the
            # same in every variant of a seed.
            module.reset_parameters(torch.Generator().manual_seed(module.init_seed))
        elif isinstance(module, nn.Linear):
            std = matrix_std(self.config)
            if getattr(module, "feeds_stream", False):
                std /= math.sqrt(self.config.num_hidden_layers)
            init.normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        else:
            super()._init_weights(module)


class DeepDeltaModel(DeepDeltaPreTrainedModel):
    """The decoder without a head.

    Its hidden states are the state's channel mean, (B, T, d): with one channel the stream itself,
    with more a view from the side, which gets no gradient.
    """

    def __init__(self, config: DeepDeltaConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.expand = build_expand(config)
        self.layers = nn.ModuleList(
            DeepDeltaBlock(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.readout = build_readout(config)
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen3RotaryEmbedding(config)
        self.gradient_checkpointing = False
        self._prepare_initialisation()
        self.post_init()

    def _prepare_initialisation(self) -> None:
        # One draw from the global generator, made by every variant alike.
        seed = int(torch.randint(2**62, (), device="cpu"))
        for index, module in enumerate(self.modules()):
            if isinstance(module, ResidualModule):
                module.init_seed = seed + index

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | Collection[int] | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """input_ids (B, T) or inputs_embeds (B, T, d) -> last_hidden_state (B, T, d), normalised.

        `past_key_values` and `cache` are two names of one thing; transformers uses the second since
        5.24. Positions count what is not padding, from the mask where there are no position_ids.
        Packed documents are found from position_ids that restart, where no mask and no cache is
        given, and from a mask (B, 1, T, T): neither attention nor convolutions cross them.
        `output_hidden_states` is a bool or the numbers of those asked for, with None for the rest.

        Raises:
            TypeError: a keyword that nobody is known to send.
            ValueError: input_ids and inputs_embeds, or neither; a mask or a cache that the
                convolutions over tokens cannot follow.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        asked = inputs.hidden_states_asked(self.config, output_hidden_states)
        attention = inputs.for_attention(kwargs)
        cache = inputs.one_of(past_key_values, cache)
        if self.gradient_checkpointing and self.training:
            use_cache, cache = False, None
        seen = inputs.what_is_seen(
            self.config, inputs_embeds, attention_mask, position_ids, cache, kwargs
        )
        if use_cache and cache is None and seen.may_be_continued:
            cache = DynamicCache(config=self.config)
        if isinstance(cache, Cache):
            prepare_histories(cache, self.config, inputs_embeds)
        window = TokenWindow(seen.tokens, seen.segments, cache)
        position_embeddings = self.rotary_emb(inputs_embeds, seen.positions)
        attention |= inputs.cache_keyword(cache)

        state = self.expand(inputs_embeds, window)
        hidden_states: list[Any] = []
        for index, layer in enumerate(self.layers):
            hidden = None
            if index in asked:
                hidden, state = state.shown(self.config.backend)
            hidden_states.append(hidden)
            if self.gradient_checkpointing and self.training:
                # A block that runs again must find its input.
                state = state.stored(self.config.backend)
            state = State(
                *layer(
                    *state,
                    window=window,
                    attention_mask=seen.mask,
                    position_embeddings=position_embeddings,
                    position_ids=position_ids,
                    **attention,
                )
            )
        hidden = self.norm(self.readout(state, window))
        hidden_states.append(hidden if len(self.layers) in asked else None)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            hidden_states=tuple(hidden_states) if asked else None,
            **output_keyword(cache if use_cache else None),
        )


class LanguageHead(nn.Linear):
    """Logits of hidden states, or what `function` makes of them and of the weight.

    Whatever reads the weight does so in here, because FSDP gathers it for this call alone.
    """

    def forward(
        self, hidden: Tensor, function: Callable[[Tensor, Tensor], Tensor] | None = None
    ) -> Tensor:
        return super().forward(hidden) if function is None else function(hidden, self.weight)


class DeepDeltaForCausalLM(DeepDeltaPreTrainedModel, GenerationMixin):
    """The language model: `DeepDeltaModel` and a head tied to the embeddings.

    `linear_cross_entropy` computes the loss of a call with `skip_logits=True`; assign another
    function of `loss.LOSSES` to change how.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: DeepDeltaConfig):
        super().__init__(config)
        self.model = DeepDeltaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = LanguageHead(config.hidden_size, config.vocab_size, bias=False)
        self.linear_cross_entropy: LinearCrossEntropy = linear_cross_entropy
        self.post_init()

    def init_continuous_batching(self, *args, **kwargs) -> Any:
        """As transformers', whose pages keep keys and values only.

        Raises:
            ValueError: the model has convolutions over tokens.
        """
        if self.config.convolves:
            raise ValueError(
                "continuous batching keeps no history for convolutions over tokens: use generate, "
                "or a model without token compressor and embedding convolution"
            )
        return super().init_continuous_batching(*args, **kwargs)

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """As transformers', which replaces an untied head by a plain Linear when it is resized."""
        if type(new_embeddings) is nn.Linear:
            new_embeddings.__class__ = LanguageHead
        super().set_output_embeddings(new_embeddings)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        skip_logits: bool = False,
        cache: Cache | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, vocabulary) and, with labels (B, T), the mean loss in nats per token.

        Labels are shifted here: pass the input ids themselves, −100 where nothing is predicted.
        `num_items_in_batch` replaces the mean by sum / num_items_in_batch (gradient
        accumulation); `shift_labels` takes labels that are already shifted. With labels of either
        kind and `skip_logits`, the same loss comes from `self.linear_cross_entropy`, and `logits`
        is None: for training, where the logits would take more memory than the model.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cache=cache,
            **kwargs,
        )
        loss: Any = None
        logits = None
        has_labels = labels is not None or kwargs.get("shift_labels") is not None
        # A head that somebody wrapped (adapters, quantisation) must be called to have its effect.
        if has_labels and skip_logits and isinstance(self.lm_head, LanguageHead):
            given = ("num_items_in_batch", "shift_labels", "ignore_index")
            loss_of = functools.partial(
                self.linear_cross_entropy,
                labels=labels,
                multiplier=self.config.logit_factor,
                **{name: kwargs[name] for name in given if name in kwargs},
            )
            loss = self.lm_head(outputs.last_hidden_state, loss_of)
        else:
            keep = (
                slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            )
            logits = self.lm_head(outputs.last_hidden_state[:, keep, :])
            if self.config.logit_factor != 1:
                logits = logits * self.config.logit_factor
            if has_labels:
                loss = self.loss_function(
                    logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
                )
                if skip_logits:
                    logits = None
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **output_keyword(outputs.get(CACHE)),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
