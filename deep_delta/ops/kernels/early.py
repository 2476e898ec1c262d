"""Arguments that a kernel can be compiled for before there are any."""

from triton.runtime.jit import MockTensor


def stand_in(argument):
    """For a tensor its dtype, in the form that `warmup` takes; tuples likewise, numbers as is."""
    if isinstance(argument, tuple):
        return tuple(map(stand_in, argument))
    return MockTensor(argument.dtype) if hasattr(argument, "data_ptr") else argument
