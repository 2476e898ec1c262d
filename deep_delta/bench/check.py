"""What a benchmark checks before it reports a time: outputs and gradients against the reference.

The rules are in words in `benchmarks/README.md`.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deep_delta.bench.cases import OPS, Case, Tensors

GRADIENT = "gradient of "

# Tensors with tokens, by how many numbers are summed into each of theirs: next to none, or the d
# features. Everything else is a weight, whose gradient sums over the tokens.
PER_FEATURE = ("state", "direction", "embeddings", "context", "output")
PER_TOKEN = ("target", "erase", "gate logits", "value logits")
BIASES = ("gate_bias", "value_bias")


def errors(actual: Tensor, exact: Tensor, least: float = 0.0) -> dict[str, float]:
    """How far `actual` is off: the largest error over the largest value, and both as rms.

    Values below `least` count as it.
    """
    off = actual.to(exact.dtype) - exact
    return {
        "largest": float(off.abs().max() / exact.abs().max().clamp(min=least)),
        "rms": float(off.square().mean().sqrt() / exact.square().mean().sqrt().clamp(min=least)),
    }


def operation_difference(
    case: Case,
    operation: Callable[[Tensors], Tensors],
    inputs: Tensors,
    generator: torch.Generator,
) -> str | None:
    """Where an operation is off the fp64 reference by more than it may be; None if nowhere.

    It runs at its full shape. The first and the last sequence of the batch are compared; to the
    other sequences' outputs goes a gradient of zero. Call it under autocast to the case's dtype.
    """
    rows = sorted({0, case.shape[0] - 1})

    def reference(x: Tensors) -> Tensors:
        return OPS[case.op](x, "reference")

    outputs = operation(inputs)
    wanted = {name: torch.zeros_like(output) for name, output in outputs.items()}
    for gradient in wanted.values():
        shape = (len(rows), *gradient.shape[1:])
        some = torch.randn(shape, generator=generator, device=gradient.device)
        gradient[rows] = some.to(gradient.dtype)
    actual = _pick(_with_gradients(inputs, outputs, wanted), rows)

    wanted = {name: gradient[rows] for name, gradient in wanted.items()}
    part = {name: x.detach().requires_grad_() for name, x in _pick(inputs, rows).items()}
    rounded = _with_gradients(part, reference(part), wanted)
    part = {name: x.detach().double().requires_grad_() for name, x in part.items()}
    with torch.autocast(generator.device.type, enabled=False):
        exact = _with_gradients(part, reference(part), wanted)
    summed = dict.fromkeys(PER_FEATURE, 1) | dict.fromkeys(PER_TOKEN, case.width)
    for name, tensor in exact.items():
        terms = summed.get(_kind(name), len(rows) * case.shape[1])
        unit = torch.finfo(actual[name].dtype).eps / 2 * math.sqrt(terms)
        # A bias has few numbers, each the sum of as many as N(0, 1) as there are tokens: it may
        # come out near 0 by chance, and what rounding does to it depends on what was added.
        least = math.sqrt(terms) if _kind(name) in BIASES else 0.0
        own = errors(rounded[name], tensor, least)
        for kind, error in errors(actual[name], tensor, least).items():
            allowed = 2 * own[kind] + unit
            if not error <= allowed:  # so that NaN is refused too
                return f"{name}, {kind} error {error:.1e} (allowed {allowed:.1e})"
    return None


def _pick(tensors: Tensors, rows: list[int]) -> Tensors:
    """The chosen sequences of every tensor that has tokens; a state keeps its order in memory."""
    picked = {}
    for name, tensor in tensors.items():
        kind = _kind(name)
        if kind == "state":
            tensor = tensor.mT[rows].mT
        elif kind in (*PER_FEATURE, *PER_TOKEN):
            tensor = tensor[rows]
        picked[name] = tensor
    return picked


def _kind(name: str) -> str:
    """What a tensor is, be it a gradient or not, and whichever of two reads it belongs to."""
    return name.removeprefix(GRADIENT).removeprefix("first ").removeprefix("second ")


def _with_gradients(inputs: Tensors, outputs: Tensors, wanted: Tensors) -> Tensors:
    """The outputs, and the gradients of all inputs by the given gradients of the outputs."""
    asked = [wanted[name].to(output.dtype) for name, output in outputs.items()]
    found = torch.autograd.grad(list(outputs.values()), list(inputs.values()), asked)
    gradients = {f"{GRADIENT}{name}": x for name, x in zip(inputs, found, strict=True)}
    return {name: output.detach() for name, output in outputs.items()} | gradients


@dataclass
class Outcome:
    """What a model makes of a batch: the loss, the gradients by kind of parameter, the logits.

    gradients: all parameters of one name, layer numbers aside, are one kind. logits: of the last
    token of each sequence, (B, V), or None where nothing asked for them.
    """

    loss: float
    gradients: dict[str, list[Tensor]]
    logits: list[Tensor] = field(default_factory=list)


def gradients_by_kind(model: torch.nn.Module) -> dict[str, list[Tensor]]:
    """The model's present gradients, in the order of its parameters."""
    kinds: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            kinds.setdefault(re.sub(r"\.\d+\.", ".*.", name), []).append(parameter.grad)
    return kinds


def model_difference(actual: Outcome, rounded: Outcome, exact: Outcome) -> str | None:
    """Where a model is off the fp32 reference by more than it may be; None if nowhere.

    `rounded` is the reference under the same autocast and with the same state dtype: twice its
    own error is allowed, and 0.001 of loss, 0.05 of a gradient's norm, 0.01 of the logits'.
    """
    off, own = abs(actual.loss - exact.loss), abs(rounded.loss - exact.loss)
    if not off <= 2 * own + 1e-3:
        return f"loss {actual.loss:.5f}, in fp32 {exact.loss:.5f} (allowed ±{2 * own + 1e-3:.1e})"
    if actual.gradients.keys() != exact.gradients.keys():
        return f"gradients of {', '.join(sorted(actual.gradients.keys() ^ exact.gradients.keys()))}"
    compared = [
        (f"{GRADIENT}{kind}", actual.gradients[kind], rounded.gradients[kind], tensors, 0.05)
        for kind, tensors in exact.gradients.items()
    ]
    compared.append(("logits", actual.logits, rounded.logits, exact.logits, 0.01))
    for what, mine, theirs, true, margin in compared:
        error, allowed = distance(mine, true), 2 * distance(theirs, true) + margin
        if not error <= allowed:
            return f"{what}, error {error:.1e} of its norm (allowed {allowed:.1e})"
    return None


def distance(actual: list[Tensor], exact: list[Tensor]) -> float:
    """The norm of the difference over the norm of `exact`, all tensors taken as one vector."""
    off = sum(float((a - e).float().square().sum()) for a, e in zip(actual, exact, strict=True))
    size = sum(float(e.float().square().sum()) for e in exact)
    return math.sqrt(off / size) if size else math.inf if off else 0.0
