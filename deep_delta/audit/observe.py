"""Every write to the state, seen from outside, on any backend.

A residual returns its state with its own write still pending, X + s·h (aᵀ − b·s·hᵀX), and the
next read applies it. That is all there is to know about a sublayer: a forward hook on the
residual finds X and (h, s, a, b), and the hook on the next one finds the X that came of them. So
nothing in block, model or residual need record anything, and a new residual that keeps the
contract is audited without a line written for it.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deep_delta.model import DeepDeltaForCausalLM
from deep_delta.ops import unit_scale
from deep_delta.residual import Compressor, Residual, State

KINDS = ("attention", "MLP")


class Sublayer(NamedTuple):
    """A sublayer by its place: layer counts from 1, kind is one of KINDS.

    compressor: what its residual reads by, its own or the one that its block lends it.
    """

    layer: int
    kind: str
    residual: Residual
    compressor: Compressor

    def __str__(self) -> str:
        return f"layer {self.layer} {self.kind}"


def sublayers(model: DeepDeltaForCausalLM) -> list[Sublayer]:
    """The model's sublayers in the order in which they write."""
    return [
        Sublayer(layer, kind, residual, residual.reader(block.attn_residual.compressor))
        for layer, block in enumerate(model.model.layers, start=1)
        for kind, residual in zip(KINDS, (block.attn_residual, block.mlp_residual), strict=True)
    ]


@dataclass(frozen=True)
class Write:
    """One sublayer's write at every token, X ← X + k (aᵀ − b·kᵀX), in fp64.

    before: Xᵀ as the sublayer found it, (B, T, d_v, d); after: as the next read found it.
    direction: k = s·h, (B, T, d); of unit length but for ε, and h/‖h‖ where there is no s, as in
        an additive stream.
    written: a, (B, T, d_v), βv of a delta residual.
    gate: b, (B, T), β of a delta residual; None where nothing is ever erased.
    """

    before: Tensor
    after: Tensor
    direction: Tensor
    written: Tensor
    gate: Tensor | None

    @cached_property
    def squared_length(self) -> Tensor:
        """‖k‖², (B, T): 1 − ε²/(‖h‖² + ε²), or 0 for h = 0."""
        return self.direction.square().sum(-1)

    @cached_property
    def readout(self) -> Tensor:
        """kᵀX before the write, (B, T, d_v)."""
        return torch.einsum("btjd,btd->btj", self.before, self.direction)

    @cached_property
    def readout_after(self) -> Tensor:
        """kᵀX after the write, (B, T, d_v)."""
        return torch.einsum("btjd,btd->btj", self.after, self.direction)

    @cached_property
    def erased(self) -> Tensor:
        """b·kᵀX, what is taken away along k, (B, T, d_v)."""
        if self.gate is None:
            return torch.zeros_like(self.readout)
        return self.gate.unsqueeze(-1) * self.readout

    @cached_property
    def change(self) -> Tensor:
        """a − b·kᵀX, what is written less what is erased, (B, T, d_v)."""
        return self.written - self.erased

    @cached_property
    def size(self) -> Tensor:
        """‖X‖ before the write, (B, T)."""
        return self.before.flatten(2).norm(dim=-1)

    @cached_property
    def size_after(self) -> Tensor:
        """‖X‖ after the write, (B, T)."""
        return self.after.flatten(2).norm(dim=-1)

    @property
    def fault(self) -> Tensor:
        """How far the write is from the law it must obey, (B, T), as share of ‖X‖ + ‖X_new‖.

        The law is v − kᵀX_new = (1 − β‖k‖²)(v − kᵀX), that is |after| = |1 − β|·|before|. With
        βv = a the difference of its two sides is kᵀX_new − kᵀX − ‖k‖²(a − b·kᵀX): no division by
        β, so that it holds at β = 0 and without an erase too.
        """
        expected = self.readout + self.squared_length.unsqueeze(-1) * self.change
        scale = (self.size + self.size_after).clamp(min=torch.finfo(torch.float64).tiny)
        return (self.readout_after - expected).norm(dim=-1) / scale


def write_of(state: State, after: Tensor) -> Write:
    """The write that is pending in a stored state, and the X that came of it, (B, T, d, d_v)."""
    x = state.channels.double()
    direction, target, gate = state.direction, state.target, state.erase
    if direction is None:
        raise ValueError("this state has no pending write: its residual wrote at once")
    h = direction.double()
    a = x.new_ones(x.shape[:-1]) if target is None else target.double()
    b = None if gate is None else gate.double()
    if state.eps is not None:
        k = h * unit_scale(h, state.eps).unsqueeze(-1)
    else:  # h (aᵀ − b·hᵀX) = k (‖h‖a − ‖h‖²b·kᵀX)ᵀ
        k, length = F.normalize(h, dim=-1), h.norm(dim=-1)
        a, b = length.unsqueeze(-1) * a, None if b is None else length.square() * b
    return Write(x, after.double().mT, k, a, b)


@contextlib.contextmanager
def observed(model: DeepDeltaForCausalLM, see: Callable[[int, Write], None]) -> Iterator[None]:
    """Inside, every forward pass calls `see(index, write)` for all sublayers, in their order.

    A pass must be whole: without a cache of earlier tokens.
    """
    waiting: tuple[int, State] | None = None

    def settled(after: Tensor) -> None:
        nonlocal waiting
        if waiting is not None:
            index, state = waiting
            waiting = None
            see(index, write_of(state, after))

    def wrote(index: int, backend: str) -> Callable[..., None]:
        def hook(residual: nn.Module, arguments: Any, state: State) -> None:
            nonlocal waiting
            state = state.stored(backend)
            settled(state.x)  # what this sublayer read is what the one before left
            waiting = index, state

        return hook

    def ends(readout: nn.Module, arguments: Any) -> None:
        settled(arguments[0].settle(model.config.backend))

    handles = [
        sublayer.residual.register_forward_hook(wrote(index, model.config.backend))
        for index, sublayer in enumerate(sublayers(model))
    ]
    handles.append(model.model.readout.register_forward_pre_hook(ends))
    try:
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
