"""From a configuration to the modules of its residual: the one place that knows the options."""

import functools
import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from deep_delta.model.configuration import DeepDeltaConfig
from deep_delta.residual import (
    AdditiveResidual,
    ChannelCompressor,
    Compressor,
    ConstantValue,
    DeltaResidual,
    EmbeddingConv,
    FixedGate,
    LayerGate,
    LinearValue,
    Repeat,
    Residual,
    ScalarRead,
    StateDirection,
    StateReadout,
    SublayerDirection,
    TokenCompressor,
    TokenGate,
)

M = TypeVar("M", bound=nn.Module)


def matrix_std(config: DeepDeltaConfig) -> float:
    """The standard deviation that hidden matrices, width to width, start with."""
    return config.hidden_init_std_factor / math.sqrt(config.hidden_size)


def rows_std(config: DeepDeltaConfig) -> float:
    """That of rows that make a few numbers of a whole width: 1/√m of a matrix's under µP."""
    return matrix_std(config) / math.sqrt(config.width_ratio)


def kernel_std(config: DeepDeltaConfig) -> float:
    """That of weights that sum over no width: what a matrix has at the base width under µP."""
    return matrix_std(config) * math.sqrt(config.width_ratio)


def build_compressor(config: DeepDeltaConfig) -> Compressor:
    width, channels = config.hidden_size, config.value_channels
    std = kernel_std(config) if config.residual_init == "published" else None
    if config.compressor == "token":
        return TokenCompressor(width, channels, config.compressor_kernel_size or 4, std)
    if config.compressor == "channel":
        return ChannelCompressor(width, channels, std)
    return ScalarRead()


def build_gate(config: DeepDeltaConfig) -> nn.Module:
    start = float(config.gate_init)
    if config.gate == "fixed":
        return FixedGate(start)
    if config.gate == "layer":
        return LayerGate(start)
    return TokenGate(
        config.hidden_size, start, config.gate_hidden_size, rows_std(config), kernel_std(config)
    )


def build_value(config: DeepDeltaConfig) -> nn.Module:
    if config.value_activation == "constant":
        return ConstantValue(config.value_channels, float(config.value_constant))
    scale = float(config.value_scale) if config.value_activation == "sigmoid" else None
    # The published initialisation skips vectors: the bias keeps nn.Linear's U(±1/√d), which is
    # 1/√(base width) at every width under µP, where logits keep their size.
    published = config.residual_init == "published"
    bias_range = math.sqrt(config.width_ratio / config.hidden_size) if published else 0.0
    return LinearValue(
        config.hidden_size,
        config.value_channels,
        config.value_bias,
        scale,
        rows_std(config),
        bias_range,
    )


def _own_randomness(build: Callable[..., M]) -> Callable[..., M]:
    """Leave the global generator as it was: the backbone draws the same numbers in any variant."""

    @functools.wraps(build)
    def isolated(*args, **kwargs) -> M:
        with torch.random.fork_rng(devices=[]):
            return build(*args, **kwargs)

    return isolated


@_own_randomness
def build_residual(config: DeepDeltaConfig, layer: int, index: int) -> Residual:
    """The residual of sublayer `index` (0 attention, 1 MLP) of a block.

    With `share_compressor` the second has no compressor: it is lent the first one's.
    """
    owns = index == 0 or not config.share_compressor
    read = {
        "compressor": build_compressor(config) if owns else None,
        "owns_compressor": owns,
        "norm_eps": config.rms_norm_eps,
        "slot": (layer, index),
        "backend": config.backend,
        "rebuild": config.states_rebuilt,
    }
    width, channels = config.hidden_size, config.value_channels
    if config.residual == "additive":
        return AdditiveResidual(width, channels, **read)
    from_mlp = config.direction_source == "mlp"
    inner_std = 1 / math.sqrt(width * config.width_ratio)
    return DeltaResidual(
        width,
        channels,
        gate=build_gate(config),
        value=build_value(config),
        direction=(
            StateDirection(width, config.direction_hidden_size, inner_std)
            if from_mlp
            else SublayerDirection()
        ),
        value_source="output" if from_mlp else config.value_source,
        erase=config.erase,
        erase_gate=build_gate(config) if config.separate_gates else None,
        direction_eps=config.direction_eps,
        target_scale=math.sqrt(config.width_ratio),
        **read,
    )


@_own_randomness
def build_expand(config: DeepDeltaConfig) -> nn.Module:
    dtype = getattr(torch, config.state_dtype) if config.state_dtype else None
    if config.embedding_conv:
        index = 2 if config.compressor == "token" else 0  # after the two reads of layer 0
        return EmbeddingConv(
            config.hidden_size,
            config.value_channels,
            config.embedding_kernel_size,
            dtype,
            slot=(0, index),
            backend=config.backend,
        )
    return Repeat(config.value_channels, dtype)


@_own_randomness
def build_readout(config: DeepDeltaConfig) -> StateReadout:
    slot = (config.num_hidden_layers - 1, 3)
    return StateReadout(build_compressor(config), slot, config.backend)
