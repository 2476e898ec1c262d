"""Regional compilation: each part of the decoder by itself, so that equal layers share one graph.

Compiling the model as a whole would take minutes for a deep one and unroll its layers; this takes
the time of one layer, whatever the depth.
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from deep_delta.model.loss import linear_cross_entropy
from deep_delta.model.modeling import DeepDeltaForCausalLM


def compile_layers(model: DeepDeltaForCausalLM) -> DeepDeltaForCausalLM:
    """Compile the expansion, every layer, the readout, the last norm and the loss, in place.

    For training and evaluation: call the model with `use_cache=False`, because with a cache every
    layer would need a graph of its own. The loss is compiled unless the model has another one than
    `linear_cross_entropy`. Names of parameters and saved files stay as they are. Nothing is
    compiled before the first call; a graph that cannot be compiled whole raises there.

    Two graphs serve all layers, since the first finds no pending write in the state, or four where
    states are rebuilt over several layers; training and evaluation each have theirs. The first
    other batch shape costs one more, which then serves every shape (torch's default for `dynamic`).

    Returns:
        The model it was given.
    """
    decoder = model.model
    for part in (decoder.expand, *decoder.layers, decoder.readout, decoder.norm):
        part.compile(fullgraph=True)
        part._compiled_call_impl = _under_options(part._compiled_call_impl)
    if model.linear_cross_entropy is linear_cross_entropy:
        compiled = torch.compile(linear_cross_entropy, fullgraph=True)
        model.linear_cross_entropy = _under_options(compiled)
    return model


def _under_options(compiled: Callable) -> Callable:
    """`compiled` with the options of dynamo that it needs, which hold for its own calls alone."""

    @functools.wraps(compiled)
    def call(*args, **kwargs) -> Any:
        with _options(max(torch._dynamo.config.recompile_limit, 64)):
            return compiled(*args, **kwargs)

    return call


@functools.cache  # entering one is three times cheaper than making one
def _options(limit: int) -> AbstractContextManager:
    return torch._dynamo.config.patch(
        # All modules that `Module.compile` has compiled count against one limit, 8 by default.
        recompile_limit=limit,
        # DDP need not split the graphs for early gradients: a layer's come when it is done.
        optimize_ddp=False,
    )
