"""Caches: what the convolutions over tokens keep there, beside keys and values.

transformers has layers for both ("hybrid"), with one number of histories for all layers and no way
to repeat or select the sequences of a batch. `DeepDeltaConfig.histories` says who keeps what.
"""

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, LinearAttentionAndFullAttentionLayer

from deep_delta.model.configuration import DeepDeltaConfig


class HistoryLayer(LinearAttentionAndFullAttentionLayer):
    """Keys, values and histories of one layer, whose sequences can be repeated and selected."""

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        for slot, history in self.conv_states.items():
            if history is not None:
                self.conv_states[slot] = history.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        for slot, history in self.conv_states.items():
            if history is not None:
                self.conv_states[slot] = history[indices.to(history.device)]


def prepare_histories(cache: Cache, config: DeepDeltaConfig, embeddings: Tensor) -> None:
    """Make a cache that has seen nothing yet ready for the histories of this model's layers.

    One that was made without a configuration gets its layers; layers of transformers' own are
    replaced by `HistoryLayer`; and slots that a layer has and does not use are filled with a
    token without numbers, since `crop` and others expect to find them all.

    Args:
        cache: changed in place.
        embeddings: (B, T, d) of the call, for batch, dtype and device.

    Raises:
        ValueError: a cache whose layers keep no histories.
    """
    if not config.convolves:
        return
    kept = [config.histories(layer) for layer in range(config.num_hidden_layers)]
    if not cache.layers and cache.layer_class_to_replicate is not None:
        plain = cache.layer_class_to_replicate
        cache.layers.extend(
            HistoryLayer(config.number_of_conv_states) if slots else plain() for slots in kept
        )
    for layer, slots in enumerate(kept):
        if not slots:
            continue
        found: Any = cache.layers[layer]
        if type(found) is LinearAttentionAndFullAttentionLayer and not found.is_initialized:
            ours = HistoryLayer(config.number_of_conv_states)
            ours.record_past = found.record_past
            cache.layers[layer] = ours
        elif not hasattr(found, "update_conv_state"):
            raise ValueError(
                f"layer {layer} of this cache ({type(found).__name__}) keeps no history for the "
                "convolutions over tokens: use DynamicCache(config=model.config) or a StaticCache"
            )
        for slot in set(range(config.number_of_conv_states)) - set(slots):
            if not cache.has_previous_state(layer, slot):
                nothing = embeddings.new_empty(len(embeddings), 0, 1)
                cache.update_conv_state(nothing, layer, slot, conv_kernel_size=1)
