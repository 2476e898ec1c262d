"""What a model costs: floating-point operations in closed form, and peak memory. A leaf."""

import contextlib
import ctypes
import threading
import time
from typing import Any

import psutil
import torch

# Dense bf16 matrix products, FLOP/s, by the makers' data sheets.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a GPU by its name; None for one that is not in PEAK_FLOPS."""
    return next((most for name, most in PEAK_FLOPS.items() if name in device_name), None)


def forward_flops(config: Any, seq_len: int) -> dict[str, float]:
    """FLOPs of one token's forward pass in a sequence of seq_len tokens, by component.

    "projections" (q, k, v, o), "scores" (and their product with the values), "mlp", "head", "read"
    (the compressors, also the readout's), "write" (gates, targets, directions, rank-1 writes) and
    "expand" (the embedding convolution), over all layers.

    A multiply-add counts as two, causal attention at its average of (seq_len + 1)/2 keys.
    Element-wise work that every variant shares (norms, RoPE, SwiGLU, softmax) is left out, as
    usual; what the residual adds is counted in full.
    """
    d, layers, dv = config.hidden_size, config.num_hidden_layers, config.value_channels
    heads = config.num_attention_heads * config.head_dim
    key_value = config.num_key_value_heads * config.head_dim
    return {
        "projections": layers * 2 * d * (2 * heads + 2 * key_value),
        "scores": layers * 2 * 2 * heads * (seq_len + 1) / 2,
        "mlp": layers * 2 * 3 * d * config.intermediate_size,
        "head": 2 * d * config.vocab_size,
        "read": (2 * layers + 1) * _read_flops(config),
        "write": 2 * layers * _write_flops(config),
        "expand": 2 * d * dv * config.embedding_kernel_size if config.embedding_conv else 0,
    }


def flops_per_token(config: Any, seq_len: int) -> float:
    """FLOPs of one training token: `forward_flops`, and twice as many for the backward pass."""
    return 3 * sum(forward_flops(config, seq_len).values())


def _read_flops(config: Any) -> float:
    """Compressing X (d, d_v) into the width-d input of a sublayer."""
    taps = {None: 0, "channel": 1, "token": config.compressor_kernel_size or 4}
    return 2 * config.hidden_size * config.value_channels * taps[config.compressor]


def _write_flops(config: Any) -> float:
    """Gate, target, direction and the rank-1 write of one sublayer."""
    d, dv = config.hidden_size, config.value_channels
    if config.residual == "additive":
        return d if dv == 1 else 2 * d * dv
    gate = {"fixed": 0, "layer": 0, "token": 2 * d}[config.gate]
    if config.gate_hidden_size:
        gate = 2 * config.gate_hidden_size * (d + 1)
    gates = gate * (2 if config.separate_gates else 1)
    value = 0 if config.value_activation == "constant" else 2 * d * dv
    direction = 2 * d + d  # the norm of k̃, and its scaling
    if config.direction_source == "mlp":
        direction += d * dv + 4 * d * config.direction_hidden_size
    readout = 2 * d * dv if config.erase else 0
    return gates + value + direction + readout + 2 * d * dv


class PeakMemory:
    """Context manager: `bytes` is the highest memory use inside, over what was there before.

    On a GPU that is the allocator's peak. On a CPU it is the growth of the process's resident
    memory, sampled every 10 ms, after memory that earlier work freed went back to the system.
    """

    bytes: int = 0

    def __enter__(self) -> "PeakMemory":
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            return self
        _return_freed_memory()
        self._process = psutil.Process()
        self._before = self._process.memory_info().rss
        self._stop = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._sampler.start()
        return self

    def _sample(self) -> None:
        while not self._stop.is_set():
            self.bytes = max(self.bytes, self._process.memory_info().rss - self._before)
            time.sleep(0.01)

    def __exit__(self, *exc: object) -> None:
        if torch.cuda.is_available():
            self.bytes = torch.cuda.max_memory_allocated()
            return
        self._stop.set()
        self._sampler.join()


def _return_freed_memory() -> None:
    # Without glibc the growth is measured from a little higher up.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
