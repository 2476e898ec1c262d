"""What the tests of the fused kernels share: problems, and the rule by which a kernel is right.

Without a GPU the kernels run in Triton's interpreter (see conftest), with one its compiled code.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers import normal
from torch import Tensor

from deep_delta.ops import read_state, reduce_state

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
can_run = pytest.mark.skipif(
    DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1",
    reason="without a GPU the kernels need TRITON_INTERPRET=1",
)

# What is pending: (has a target, has an erase gate, ε).
WRITES: dict[str, tuple[bool, bool, float | None]] = {
    "plain": (False, False, None),  # additive
    "spread": (True, False, None),  # additive-expanded
    "write-only": (True, False, 0.3),
    "delta": (True, True, 0.3),
    "delta, no target": (False, True, 0.3),
    "delta, no length": (True, True, None),
    "length only": (False, False, 0.3),
}
NARROW = ("state", "direction", "embeddings")  # the other tensors are fp32 in every model
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 2, 2, 2, 2, 3, 3], [0, 1, 1, 1, 1, 1, 1, 1, 1, 1]])

Call = Callable[..., tuple[Tensor | None, ...]]


@dataclass(frozen=True)
class Case:
    """One read of a state (B, T, d, d_v)."""

    write: str | None = "delta"
    width: int = 63
    channels: int = 3
    taps: int | None = 1
    gates: int = 1
    values: bool = True
    biases: bool = True
    value_on_state: bool = False
    documents: bool = False
    layout: str = "features last"
    batch: int = 2
    tokens: int = 4
    context_dtype: torch.dtype | None = None

    def __str__(self) -> str:
        default = Case()
        changed = {n: v for n, v in vars(self).items() if v != getattr(default, n)}
        return " ".join(f"{name}={value}" for name, value in changed.items()) or "default"

    def tensors(self, seed: int = 0) -> dict[str, Tensor]:
        """The inputs in fp64, by name; what this case does not have is not there."""
        lead, (target, erase, _) = (self.batch, self.tokens), WRITES[self.write or "plain"]
        shapes: dict[str, tuple[int, ...]] = {"state": (*lead, self.width, self.channels)}
        if self.write:
            shapes["direction"] = (*lead, self.width)
            shapes |= {"target": (*lead, self.channels)} if target else {}
            shapes |= {"erase": lead} if erase else {}
        if self.taps:
            shapes["kernel"] = (self.taps, self.channels, self.width)
        shapes["norm_weight"] = (self.width,)
        shapes |= {"gate_weight": (self.gates, self.width)} if self.gates else {}
        shapes |= {"value_weight": (self.channels, self.width)} if self.values else {}
        if self.biases:
            shapes |= {"gate_bias": (self.gates,)} if self.gates else {}
            shapes |= {"value_bias": (self.channels,)} if self.values else {}
        return {n: normal(*s, seed=seed + i) for i, (n, s) in enumerate(shapes.items())}

    def fixed(self) -> dict[str, Any]:
        """What `read_state` and `reduce_state` take beside tensors that have gradients."""
        documents = DOCUMENTS[: self.batch, : self.tokens].to(DEVICE) if self.documents else None
        return {"eps": WRITES[self.write][2] if self.write else None, "segments": documents}

    def arranged(self, state: Tensor) -> Tensor:
        """The same numbers, in this case's memory layout; gradients pass."""
        if self.layout == "channel major":
            return state.mT.contiguous().mT
        if self.layout == "repeated":  # what `Repeat` makes: one vector, stride 0 over channels
            return state[..., :1].expand_as(state)
        if self.layout == "sliced":
            return torch.cat([state, state], 1)[:, self.tokens :]
        return state

    def read(self, backend: str, state: Tensor, **tensors: Tensor) -> tuple[Tensor | None, ...]:
        """X', context, gate logits and value logits."""
        return read_state(
            self.arranged(state), **tensors, **self.fixed(), norm_eps=1e-5, backend=backend,
            value_on_state=self.value_on_state,
            context_dtype=None if state.dtype == torch.float64 else self.context_dtype,
        )[:4]  # fmt: skip

    def reduce(self, backend: str, state: Tensor, **tensors: Tensor) -> tuple[Tensor]:
        """The compressed state."""
        for name in ("norm_weight", "gate_weight", "value_weight", "gate_bias", "value_bias"):
            tensors.pop(name, None)
        state = self.arranged(state)
        return (reduce_state(state, **tensors, **self.fixed(), backend=backend),)


def measure(
    call: Call,
    tensors: dict[str, Tensor],
    backend: str,
    dtype: torch.dtype = torch.float32,
    exact: bool = False,
    used: tuple[int, ...] | None = None,
    ones: bool = False,
) -> dict[str, Tensor]:
    """Every output of `call` and every gradient of the tensors it uses, by name.

    The numbers are rounded to `dtype`; `exact` computes with them in fp64. `used` are the outputs
    that have a gradient, all by default; with `ones` it is an expanded 1, as from a sum.
    """
    inputs = {}
    for name, tensor in tensors.items():
        rounded = tensor.to(dtype if name in NARROW else torch.float32)
        rounded = rounded.double() if exact else rounded
        inputs[name] = rounded.to(DEVICE).requires_grad_()
    outputs = {i: out for i, out in enumerate(call(backend, **inputs)) if out is not None}
    results = {f"output {i}": out.detach() for i, out in outputs.items()}
    kept = [outputs[i] for i in outputs if used is None or i in used]
    grads = []
    for i, out in enumerate(kept):
        if ones:
            grads.append(torch.ones((), device=DEVICE, dtype=out.dtype).expand_as(out))
        else:
            # Transposed in memory: a gradient may lie in any way.
            grad = normal(*reversed(out.shape), seed=90 + i).permute(*range(out.ndim)[::-1])
            grads.append(grad.to(dtype).to(out.dtype).to(DEVICE))
    found = torch.autograd.grad(kept, list(inputs.values()), grads, allow_unused=True)
    for name, gradient in zip(inputs, found, strict=True):
        if gradient is not None:
            assert gradient.shape == inputs[name].shape
            assert exact or gradient.dtype == inputs[name].dtype
            results[f"gradient of {name}"] = gradient
    return results


def right(call: Call, tensors: dict[str, Tensor], dtype=torch.float32, **options) -> None:
    """The rule of the house, for each output and each gradient.

    The error against the reference in fp64 is at most twice that of the reference in the same
    precision, plus one rounding of the result, plus what fp32 sums of d numbers may lose when
    they are added one after another, as the interpreter does. Weights' gradients have the state's
    rounding too, because a compressor that looks back keeps its x_in in the state's dtype.
    """
    exact = measure(call, tensors, "reference", dtype, exact=True, **options)
    reference = measure(call, tensors, "reference", dtype, **options)
    fused = measure(call, tensors, "triton", dtype, **options)
    judge(fused, reference, exact, tensors, dtype)


def judge(
    fused: dict[str, Tensor],
    reference: dict[str, Tensor],
    exact: dict[str, Tensor],
    tensors: dict[str, Tensor],
    dtype: torch.dtype,
) -> None:
    """The rule of `right`, for results that are there already."""
    width = next(tensors[name] for name in ("state", "embeddings") if name in tensors).shape[2]
    for name, true in exact.items():
        assert fused[name].dtype == reference[name].dtype, name
        assert fused[name].shape == true.shape, name
        weight = name.endswith("weight") and len(tensors.get("kernel", ())) > 1
        unit = torch.finfo(dtype if weight else fused[name].dtype).eps
        band = (unit + math.sqrt(width) * torch.finfo().eps) * true.abs().max()
        allowed = 2 * (reference[name].double() - true).abs().max() + band
        error = (fused[name].double() - true).abs().max()
        assert error <= allowed, f"{name} is off by {error:.2e}, not by {allowed:.2e}"
    # A weight that the reference's graph does not reach may have a gradient of zeros.
    for name in fused.keys() - exact.keys():
        assert (fused[name] == 0).all(), name


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert not tensor.isnan().any(), name
        assert torch.equal(tensor, second[name]), name


READS = 5


def chain(
    rebuild: int,
    dtype: torch.dtype,
    taps: int | None,
    wide: bool,
    trails: list,
    states: list | None = None,
    **size: int,
) -> dict[str, Tensor]:
    """Five reads, each of the state the last one left, and a last one: a model without layers.

    `measure`'s results; `trails` gets what each read leaves to rebuild its state from, `states`
    copies of these states.
    """
    case = Case(taps=taps, **{"channels": 2 if wide else 1, "batch": 1, "tokens": 3, **size})

    def run(backend, state, norm_weight, kernel=None, **writes):
        pending, trail, outputs = {}, None, []
        options = {"kernel": kernel, "backend": backend}
        for i in range(READS):
            read = read_state(
                state, **pending, **options, norm_weight=norm_weight, norm_eps=1e-5,
                trail=trail, rebuild=rebuild,
            )  # fmt: skip
            state, trail = read.state, read.trail
            trails.append(trail)
            if states is not None:
                states.append(state.detach().clone())
            outputs.append(read.context)
            pending = {name: writes[f"{name}_{i}"] for name in ("direction", "target", "erase")}
            pending |= {"direction": pending["direction"].to(state.dtype), "eps": 0.3}
        return (*outputs, reduce_state(state, **pending, **options, trail=trail))

    tensors = {n: t for n, t in case.tensors().items() if n in ("state", "norm_weight", "kernel")}
    for i in range(READS):
        write = case.tensors(seed=10 * i)
        tensors |= {f"{name}_{i}": write[name] for name in ("direction", "target", "erase")}
    return measure(run, tensors, "triton", dtype)
