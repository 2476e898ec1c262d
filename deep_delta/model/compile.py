"""Regional compilation: each part of the decoder by itself, so that equal layers share one graph.

Compiling the model as a whole would take minutes for a deep one and unroll its layers; this takes
the time of one layer, whatever the depth.
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

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
        part.forward = Compiled(part)
    if model.linear_cross_entropy is linear_cross_entropy:
        model.linear_cross_entropy = compiled_alone(linear_cross_entropy)
    return model


class Compiled:
    """The forward of a module, compiled; equal modules share their graphs.

    A copy of the module, and one that was pickled, has a `Compiled` of its own.
    """

    def __init__(self, module: nn.Module):
        self.module, self.call = module, compiled_alone(type(module).forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(self.module, *args, **kwargs)

    def __reduce__(self) -> tuple:
        return Compiled, (self.module,)


def compiled_alone(function: Callable) -> Callable:
    """`function` compiled, with options of dynamo that hold for its own calls alone."""
    compiled = torch.compile(function, fullgraph=True)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with _options(max(torch._dynamo.config.recompile_limit, 64)):
            return compiled(*args, **kwargs)

    return call


@functools.cache  # entering one is three times cheaper than making one
def _options(limit: int) -> AbstractContextManager:
    return torch._dynamo.config.patch(
        # First and later layers, training and evaluation, and shapes have graphs of their own.
        recompile_limit=limit,
        # DDP need not split the graphs for early gradients: a layer's come when it is done.
        optimize_ddp=False,
    )
