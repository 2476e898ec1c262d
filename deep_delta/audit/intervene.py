"""Other values of a and b in one sublayer's pending write, and nothing else changed.

X + s·h (aᵀ − b·s·hᵀX): each intervention maps a residual's output state to another one.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from deep_delta.audit.sublayer import LEAST_GATE
from deep_delta.ops import readout, unit_scale
from deep_delta.residual import Residual, State

Change = Callable[[State], State]


@dataclass(frozen=True)
class Intervention:
    """A change of one sublayer's write; `channel`, from 1, is the value channel it is about."""

    name: str
    change: Change
    channel: int | None = None


def erase_off(state: State) -> State:
    """b = 0: X ← X + k aᵀ. The gate still scales what is written."""
    return state._replace(erase=None)


def write_off(state: State) -> State:
    """a = b = 0: X stays as it is, and what the sublayer computed reaches nobody."""
    a = state.x.new_zeros(*state.x.shape[:2], state.x.shape[-1])
    return state._replace(target=a, erase=None)


def gate_one(state: State) -> State:
    """b = 1 and a = a/b: the readout becomes the target, kᵀX = vᵀ.

    Where β is 0 the target cannot be known, and the write stays as it is.
    """
    assert state.erase is not None
    assert state.target is not None
    known = state.erase > LEAST_GATE
    gate = torch.where(known, state.erase, 1.0)
    return state._replace(
        target=state.target / gate.unsqueeze(-1), erase=torch.where(known, 1.0, state.erase)
    )


def channel_off(channel: int) -> Change:
    """a_j = b·kᵀX_j for one value channel j (from 0): X_j stays, the other channels are written."""

    def change(state: State) -> State:
        state = state.stored()
        shape = (*state.x.shape[:2], state.x.shape[-1])
        a = torch.ones(shape, device=state.x.device) if state.target is None else state.target
        a = a.clone()
        a[..., channel] = 0
        if state.erase is not None:
            assert state.direction is not None
            scale = 1.0 if state.eps is None else unit_scale(state.direction, state.eps)
            held = readout(state.x[..., channel : channel + 1], state.direction).squeeze(-1)
            a[..., channel] = state.erase * scale * held
        return state._replace(target=a)

    return change


def interventions(erases: bool, channels: int) -> list[Intervention]:
    """Those that mean something: where something is erased, and where there are several channels.

    erases: whether the sublayer erases. channels: d_v.
    """
    erasing = [Intervention("erase off", erase_off), Intervention("gate at 1", gate_one)]
    single = [Intervention("channel off", channel_off(j), j + 1) for j in range(channels)]
    return [
        Intervention("write off", write_off),
        *(erasing if erases else []),
        *(single if channels > 1 else []),
    ]


@contextlib.contextmanager
def intervening(residual: Residual, change: Change) -> Iterator[None]:
    """Inside, the residual leaves the changed write pending instead of its own."""

    def hook(module: nn.Module, arguments: Any, state: State) -> State:
        return change(state)

    handle = residual.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
