"""What a model costs, in floating-point operations: the sum of what its parts say they cost."""

from typing import Any

import torch
from transformers import PreTrainedConfig

from deep_delta.model.build import build_expand, build_readout
from deep_delta.model.modeling import (
    DeepDeltaBlock,
    DeepDeltaForCausalLM,
    LanguageHead,
    linear_flops,
)
from deep_delta.residual import flops_of


def flops_per_token(model: PreTrainedConfig | DeepDeltaForCausalLM, seq_len: int) -> float:
    """FLOPs of one training token: `forward_flops`, and twice as many for the backward pass."""
    return 3 * sum(forward_flops(model, seq_len).values())


def forward_flops(model: PreTrainedConfig | DeepDeltaForCausalLM, seq_len: int) -> dict[str, float]:
    """FLOPs of one token's forward pass in a sequence of seq_len tokens, by component.

    "projections" (q, k, v, o), "scores" (and their product with the values), "mlp", "head", "read"
    (the compressors, also the readout's), "write" (gates, targets, directions, rank-1 writes) and
    "expand" (the embedding convolution), over all layers.

    A multiply-add counts as two, causal attention at its average of (seq_len + 1)/2 keys.
    Element-wise work that every variant shares (norms, RoPE, SwiGLU, softmax) is left out, as
    usual; what the residual adds is counted in full.

    Args:
        model: a model, whatever was put into it; or its configuration, whose layers are all alike:
            one is built for this, without memory, in some milliseconds.
        seq_len: tokens of a sequence.

    Raises:
        NotImplementedError: a part does not say what it costs; one line names it.
    """
    blocks: list[Any]
    if isinstance(model, DeepDeltaForCausalLM):
        decoder, head = model.model, model.lm_head
        expand, blocks, readout = decoder.expand, list(decoder.layers), decoder.readout
    else:
        config: Any = model
        with torch.device("meta"):
            expand, readout = build_expand(config), build_readout(config)
            blocks = [DeepDeltaBlock(config, 0)] * config.num_hidden_layers
            head = LanguageHead(config.hidden_size, config.vocab_size, bias=False)
    costs = [block.flops(seq_len) for block in blocks]
    layers = {component: sum(cost[component] for cost in costs) for component in costs[0]}
    return {
        **layers,
        "head": linear_flops(head),
        "read": layers["read"] + flops_of(readout),
        "expand": flops_of(expand),
    }
