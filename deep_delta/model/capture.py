"""CUDA graphs: the GPU repeats a step by itself, whatever the host can do in that time."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def captured(
    call: Callable[..., Tensor], *examples: Tensor, pool: Any = None
) -> Callable[..., Tensor]:
    """`call` as a CUDA graph: queued by the host as one launch instead of one for each kernel.

    A training step of a small model has about a thousand kernels, and where the processor needs
    longer to launch them than the GPU to run them, the GPU waits. A model of this package reads
    nothing back from the GPU and allocates in the same order in every step, so its forward and
    backward pass can be captured whole. Gradients that are there when it is captured are added to
    where they lie; those that are None will lie in the graph's memory and are replaced:

        def forward_backward(ids):
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(ids, labels=ids, skip_logits=True, use_cache=False).loss
            loss.backward()
            return loss.detach()

        forward_backward(ids)                       # compiles
        model.zero_grad(set_to_none=True)           # gradients are to lie in the graph's memory
        forward_backward = captured(forward_backward, ids)
        for ids in batches:
            loss = forward_backward(ids)            # replaces every .grad: never set it to None
            optimizer.step()

    Args:
        call: takes tensors on the GPU and returns one. It must have run once with these shapes, so
            that nothing is left to compile, and may not look at values on the host.
        examples: shape and dtype of all that will come.
        pool: `torch.cuda.graph_pool_handle()`, shared by graphs of which none is replayed before
            what the one before has made was used; memory of its own by default.

    Returns:
        A function like `call`. Each of its calls overwrites the tensor that the last one returned.

    Raises:
        ValueError: an example is not on a CUDA device.
    """
    for example in examples:
        if example.device.type != "cuda":
            where = example.device
            raise ValueError(f"CUDA graphs need a tensor on a CUDA device, this is {where}")
    given = [example.clone() for example in examples]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        result = call(*given)

    def replay(*tensors: Tensor) -> Tensor:
        for place, tensor in zip(given, tensors, strict=True):
            place.copy_(tensor)
        graph.replay()
        return result

    return replay
