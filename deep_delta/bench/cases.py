"""What `ddl bench op` runs: one operation at one shape, its inputs, and the bytes it must move."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from deep_delta import ops

Tensors = dict[str, Tensor]

SEQUENCE = 1024  # tokens of a sequence
EPS = 1e-5
EMBEDDING_TAPS = 4


@dataclass(frozen=True)
class Case:
    """One operation at one shape.

    op: a key of OPS. width: d. value_channels: d_v. kernel_size: K in tokens; 0 for an operation
    without a kernel. tokens: B·T, a multiple of SEQUENCE. dtype: of the state, the direction and
    the context; gates, targets and weights are fp32.
    """

    op: str
    width: int
    value_channels: int
    kernel_size: int
    tokens: int
    dtype: torch.dtype
    shape: tuple[int, int] = field(init=False)  # B, T

    def __post_init__(self):
        object.__setattr__(self, "shape", (self.tokens // SEQUENCE, SEQUENCE))

    def __str__(self) -> str:
        kernel = f" K={self.kernel_size}" if self.kernel_size else ""
        return f"d={self.width} d_v={self.value_channels}{kernel} tokens={self.tokens}"


def cases(
    chosen: list[str], widths: list[int], channels: list[int], kernel_sizes: list[int],
    tokens: int, dtype: torch.dtype,
) -> list[Case]:  # fmt: skip
    """Every combination that exists: one channel needs no compressor, addition has one channel."""
    found = []
    for op in chosen:
        for width in widths:
            for count in channels if op != "additive" else [1]:
                for kernel in _kernel_sizes(op, count, kernel_sizes):
                    found.append(Case(op, width, count, kernel, tokens, dtype))
    return found


def _kernel_sizes(op: str, value_channels: int, asked: list[int]) -> list[int]:
    if op == "expand":
        return [EMBEDDING_TAPS]
    return asked if op in ("read", "reads", "reduce") and value_channels > 1 else [0]


def minimum_bytes(case: Case) -> tuple[int, int]:
    """Bytes that the forward and the backward pass at least read and write.

    Only tensors of (tokens, d) and more are counted: gates, targets and weights are less than a
    hundredth. A kernel over K tokens needs no more bytes than one over a single token, so its
    share of the copy bandwidth shows what the convolution costs.
    """
    x = case.value_channels * case.dtype.itemsize  # X, a token and feature
    h = case.dtype.itemsize  # the direction or the context
    fp32 = torch.float32.itemsize
    forward, backward = {
        # X, h -> X'; X, h, dX' -> dX, dh
        "rewrite": (2 * x + h, 3 * x + 2 * h),
        # X, h -> X', c; X, h, dX', dc -> dX, dh
        "read": (2 * x + 2 * h, 3 * x + 3 * h),
        # X, h -> c; X, h, h₂ -> X'', c₂; X, h, h₂, dX'', dc₂ -> dX', dh₂; X, h, dX', dc -> dX, dh
        "reads": (3 * x + 5 * h, 6 * x + 7 * h),
        # X', dX', dc -> dX, which is dh as well
        "additive": (2 * x + 2 * h, 3 * x + h),
        # X, h -> x_in in fp32; X, h, dx_in -> dX, dh
        "reduce": (x + h + fp32, 2 * x + 2 * h + fp32),
        # Embeddings in fp32 -> X; embeddings, dX -> their gradient
        "expand": (fp32 + x, x + 2 * fp32),
    }[case.op]
    return case.tokens * case.width * forward, case.tokens * case.width * backward


def make_inputs(case: Case, device: torch.device, generator: torch.Generator) -> Tensors:
    """Fresh random inputs by name, all of which take part in the gradient.

    The state is (B, T, d, d_v) and lies in memory as (B, T, d_v, d), as in a model.
    """
    lead, d, dv, taps = case.shape, case.width, case.value_channels, case.kernel_size

    def normal(*shape: int, std: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
        values = torch.randn(shape, generator=generator, device=device)
        return values.mul_(std).to(dtype)

    if case.op == "expand":
        made = {"embeddings": normal(*lead, d), "kernel": normal(d, dv, taps)}
    else:
        made = {
            "state": normal(*lead, dv, d, dtype=case.dtype).mT,
            "direction": normal(*lead, d, dtype=case.dtype),
        }
    if case.op in ("rewrite", "read", "reads", "reduce"):
        made["target"] = normal(*lead, dv, std=math.sqrt(d))
        made["erase"] = 2 * torch.rand(lead, generator=generator, device=device)
    if case.op == "reads":
        made["second direction"] = normal(*lead, d, dtype=case.dtype)
        made["second target"] = normal(*lead, dv, std=math.sqrt(d))
        made["second erase"] = 2 * torch.rand(lead, generator=generator, device=device)
    if case.op in ("read", "reads", "reduce") and taps:
        made["kernel"] = normal(taps, dv, d, std=1 / math.sqrt(taps * dv))
    if case.op in ("read", "reads", "additive"):
        made["norm_weight"] = 1 + normal(d, std=0.1)
    if case.op in ("read", "reads"):
        made["gate_weight"] = normal(1, d, std=1 / math.sqrt(d))
        made["value_weight"] = normal(dv, d, std=1 / math.sqrt(d))
        made["gate_bias"], made["value_bias"] = normal(1), normal(dv)
    return {name: tensor.requires_grad_() for name, tensor in made.items()}


def _rewrite(x: Tensors, backend: str) -> Tensors:
    new = ops.apply_write(
        x["state"], x["direction"], x["target"], x["erase"], eps=EPS, backend=backend
    )
    return {"state": new}


def _read(x: Tensors, backend: str) -> Tensors:
    return _outputs(_reading(x, backend))


def _reads(x: Tensors, backend: str) -> Tensors:
    """Two reads as a model with channels makes them: the state between them is not stored."""
    first = _reading(x, backend, rebuild=1)
    write = {name: x[f"second {name}"] for name in ("direction", "target", "erase")}
    second = _reading({**x, "state": first.state, **write}, backend, trail=first.trail)
    seen = {f"first {name}": output for name, output in _outputs(first).items() if name != "state"}
    return {**seen, **_outputs(second)}


def _reading(x: Tensors, backend: str, **options: Any) -> ops.Reading:
    return ops.read_state(
        x["state"],
        x["direction"],
        x.get("target"),
        x.get("erase"),
        eps=EPS if "target" in x else None,  # an additive stream has no unit length
        kernel=x.get("kernel"),
        norm_weight=x["norm_weight"],
        norm_eps=EPS,
        gate_weight=x.get("gate_weight"),
        gate_bias=x.get("gate_bias"),
        value_weight=x.get("value_weight"),
        value_bias=x.get("value_bias"),
        context_dtype=x["direction"].dtype,
        backend=backend,
        **options,
    )


def _outputs(reading: ops.Reading) -> Tensors:
    found = {
        "state": reading.state,
        "context": reading.context,
        "gate logits": reading.gate_logits,
        "value logits": reading.value_logits,
    }
    return {name: output for name, output in found.items() if output is not None}


def _reduce(x: Tensors, backend: str) -> Tensors:
    reduced = ops.reduce_state(
        x["state"],
        x["direction"],
        x["target"],
        x["erase"],
        eps=EPS,
        kernel=x.get("kernel"),
        backend=backend,
    )
    return {"output": reduced}


def _expand(x: Tensors, backend: str) -> Tensors:
    embeddings = x["embeddings"]
    device = embeddings.device.type
    # What stands for the state's dtype here is autocast's: no input has it.
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return {"state": ops.expand_embeddings(embeddings, x["kernel"], dtype=dtype, backend=backend)}


# Inputs by name and a backend -> the differentiable outputs by name.
OPS: dict[str, Callable[[Tensors, str], Tensors]] = {
    "read": _read,
    "reads": _reads,
    "reduce": _reduce,
    "rewrite": _rewrite,
    "expand": _expand,
    "additive": _read,
}
