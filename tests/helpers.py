"""What the tests of ops, residuals and models share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from deep_delta import DeepDeltaConfig, DeepDeltaForCausalLM
from deep_delta.model.presets import VARIANTS as PRESETS

REPO = Path(__file__).resolve().parents[1]
PARITY = REPO.parent / "shared" / "parity"

VARIANTS = tuple(PRESETS)
EXPANDED = tuple(name for name, fields in PRESETS.items() if fields["value_channels"] > 1)
TINY: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "initializer_range": 0.02,
}

# Every option of the residual at least once, beside the named variants: (variant, overrides).
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "separate-gates": ("ddl-cc", {"separate_gates": True}),
    "layer-gate": ("ddl-cc", {"gate": "layer"}),
    "layer-gates-apart": ("ddl-scalar", {"gate": "layer", "separate_gates": True}),
    "fixed-gate": ("ddl-cc-no-ec", {"gate": "fixed", "gate_init": 0.7}),
    "two-layer-gate": ("ddl-cc-no-ec", {"gate_hidden_size": 5}),
    "late-gate": ("ddl-scalar", {"gate_init": 0.3}),
    "value-from-state": ("ddl-tc", {"value_source": "state"}),
    "sigmoid-value": ("ddl-cc", {"value_activation": "sigmoid", "value_scale": 3.0}),
    "constant-value": ("ddl-cc-no-ec", {"value_activation": "constant"}),
    "value-bias": ("ddl-scalar", {"value_bias": True}),
    "mlp-direction": ("ddl-cc", {"direction_source": "mlp", "direction_hidden_size": 7}),
    "mlp-direction-scalar": ("ddl-scalar", {"direction_source": "mlp", "direction_hidden_size": 7}),
    "own-compressors": ("ddl-cc", {"share_compressor": False}),
    "own-token-compressors": ("ddl-tc-no-ec", {"share_compressor": False}),
    "two-channels": ("ddl-cc", {"value_channels": 2}),
    "three-channels-kernels-of-3": (
        "ddl-tc",
        {"value_channels": 3, "compressor_kernel_size": 3, "embedding_kernel_size": 3},
    ),
    "large-epsilon": ("ddl-scalar", {"direction_eps": 2.0}),
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in VARIANTS} | OPTIONS


def tiny_config(case: str = "ddl-cc", **overrides) -> DeepDeltaConfig:
    """A case of CASES at a size that runs in milliseconds."""
    variant, options = CASES[case]
    return DeepDeltaConfig.from_preset(variant, "tiny", **{**TINY, **options, **overrides})


def tiny_model(case: str = "ddl-cc", seed: int = 0, **overrides) -> DeepDeltaForCausalLM:
    torch.manual_seed(seed)
    return DeepDeltaForCausalLM(tiny_config(case, **overrides)).eval()


def shaken(module: nn.Module, size: float = 0.3, seed: int = 1) -> Any:
    """The module with noise on every parameter: neutral starts (identities, averages) hide bugs."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter += size * noise.to(parameter.dtype)
    return module


def token_ids(batch: int, length: int, vocab_size: int = 61, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (batch, length), generator=generator)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def close(actual: Tensor, expected: Tensor, atol: float, rtol: float = 0.0) -> None:
    """torch.testing.assert_close, with the tolerance always said."""
    torch.testing.assert_close(actual, expected, atol=atol, rtol=rtol)


def one_line_error(call: Callable[[], object], *fragments: str) -> None:
    """`call` must raise a ValueError of one line that says all the fragments."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the fragments below are the match
        call()
    message = str(caught.value)
    assert message
    assert "\n" not in message.strip()
    for fragment in fragments:
        assert fragment in message


WAITS = ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero")


class Waits(TorchDispatchMode):
    """The operators that read a number back from the device."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in WAITS:
            self.found.append(func._schema.name)
        return func(*args, **(kwargs or {}))
