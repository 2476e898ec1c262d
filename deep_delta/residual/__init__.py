"""Residual interfaces: what replaces x + F(x). See `contract` for the rules they share."""

from deep_delta.residual.compress import (
    ChannelCompressor,
    Compressor,
    ScalarRead,
    TokenCompressor,
    fold_channel_kernel,
)
from deep_delta.residual.contract import ResidualModule, State, TokenWindow, flops_of
from deep_delta.residual.expand import EmbeddingConv, Repeat, StateReadout
from deep_delta.residual.generators import (
    ConstantValue,
    FixedGate,
    LayerGate,
    LinearValue,
    StateDirection,
    SublayerDirection,
    TokenGate,
)
from deep_delta.residual.layers import AdditiveResidual, DeltaResidual, Residual, RMSNorm

__all__ = [
    "AdditiveResidual",
    "ChannelCompressor",
    "Compressor",
    "ConstantValue",
    "DeltaResidual",
    "EmbeddingConv",
    "FixedGate",
    "LayerGate",
    "LinearValue",
    "RMSNorm",
    "Repeat",
    "Residual",
    "ResidualModule",
    "ScalarRead",
    "State",
    "StateDirection",
    "StateReadout",
    "SublayerDirection",
    "TokenCompressor",
    "TokenGate",
    "TokenWindow",
    "flops_of",
    "fold_channel_kernel",
]
