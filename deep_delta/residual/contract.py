"""The residual contract: what replaces x + F(x).

    state = expand(embeddings)                  # (B, T, d) -> state, once per model
    for residual, sublayer in sublayers:
        state = residual(state, sublayer)       # read -> sublayer(context) -> write
    hidden = readout(state)                     # (B, T, d), once per model

A residual does not write into the state at once. It leaves its write pending, in one canonical
form that every design shares, and the next read applies it: so the big tensor X is read once and
written at most once per sublayer, and nobody needs to know whose write is pending.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deep_delta.ops import Trail, apply_write

Sublayer = Callable[[Tensor], Tensor]
CacheSlot = tuple[int, int]


class State(NamedTuple):
    """The residual stream: X and a pending write, X + s·h (aᵀ − b·s·hᵀX).

    A flat tuple, because re-entrant gradient checkpointing does not carry nested ones. s is
    1/√(‖h‖² + ε²), or 1 without an ε. None stands for "nothing pending" (direction), a = 1
    (target) and b = 0 (erase).
    """

    channels: Tensor  # Xᵀ of every token, (B, T, d_v, d): X as it lies in memory, or a stand-in
    direction: Tensor | None = None  # h, (B, T, d)
    target: Tensor | None = None  # a, (B, T, d_v)
    erase: Tensor | None = None  # b, (B, T)
    eps: float | None = None
    trail: Trail | None = None  # what X is rebuilt from if nobody stored it

    @property
    def x(self) -> Tensor:
        """X before the pending write, (B, T, d, d_v), a view; with a trail, what stands in for X.

        A stand-in has X's shape and takes its gradient, but its numbers mean nothing: `settle`
        and `stored` give X.
        """
        return self.channels.mT

    def settle(self, backend: str = "auto") -> Tensor:
        """X with the pending write applied, (B, T, d, d_v)."""
        return apply_write(self.x, *self[1:4], eps=self.eps, trail=self.trail, backend=backend)

    def shown(self, backend: str = "auto") -> tuple[Tensor, "State"]:
        """The mean over channels of the settled X, (B, T, d), and the state to go on from.

        With one channel the mean is the stream itself: it lies on the way of the gradients. With
        more it is a view from the side, which gets none.
        """
        x = self.settle(backend)
        if x.shape[-1] > 1:
            return x.mean(-1), self
        hidden = x.squeeze(-1)
        return hidden, State(hidden.unsqueeze(-2))

    def stored(self, backend: str = "auto") -> "State":
        """The same state without a trail: X is in memory, the pending write still pending."""
        if self.trail is None:
            return self
        x = apply_write(self.x, trail=self.trail, backend=backend)
        return self._replace(channels=x.mT, trail=None)


@dataclass
class TokenWindow:
    """What a convolution over tokens may see of a batch: padding, documents, earlier tokens.

    mask: (B, T), 0 for padding, or None. Padded tokens count as zeros.
    segments: (B, T), the document number of each token, which never falls along T, or None for
        one document.
    cache: a transformers cache whose `update_conv_state` keeps the last tokens, or None.
    """

    mask: Tensor | None = None
    segments: Tensor | None = None
    cache: Any = None

    def to(self, *device: Any, **options: Any) -> "TokenWindow":
        """On another device, as `Tensor.to`; a cache keeps each layer's tensors where they are."""
        mask, segments = (
            None if t is None else t.to(*device, **options) for t in (self.mask, self.segments)
        )
        return TokenWindow(mask, segments, self.cache)

    def visible(self, x: Tensor, kernel_size: int, slot: CacheSlot) -> Tensor:
        """x (B, T, ...) without padding, preceded by the cached tokens: (B, H + T, ...)."""
        if self.mask is not None:
            x = x * self.mask.view(self.mask.shape + (1,) * (x.ndim - 2)).to(x.dtype)
        if self.cache is None:
            return x
        if _is_exporting():
            raise ValueError(
                "an exported model cannot keep what its convolutions saw in a cache: export it "
                "with use_cache=False"
            )
        layer, index = slot
        channels_first = x.flatten(2).transpose(1, 2)
        seen = self.cache.update_conv_state(
            channels_first, layer, index, conv_kernel_size=kernel_size
        )
        return seen.transpose(1, 2).unflatten(2, x.shape[2:])


# Before, dynamo took every graph that it traced for one that is exported.
_DYNAMO_KNOWS_EXPORT = torch.__version__ >= "2.13"  # compared as versions


def _is_exporting() -> bool:
    is_traced_by_dynamo = torch.compiler.is_dynamo_compiling() and not _DYNAMO_KNOWS_EXPORT
    return torch.compiler.is_exporting() and not is_traced_by_dynamo


def documents(window: TokenWindow | None, x: Tensor) -> Tensor | None:
    """The document numbers of x (B, H + T, ...) as `TokenWindow.visible` gave it, if there are any.

    The H tokens in front belong to none.
    """
    segments = None if window is None else window.segments
    before = 0 if segments is None else x.shape[1] - segments.shape[1]
    return segments if segments is None or not before else F.pad(segments, (before, 0), value=-1)


class ResidualModule(nn.Module):
    """A module with parameters of its own that knows how they start.

    The model's initialisation pass calls `reset_parameters` and hands over a generator, so that
    the backbone's random numbers do not depend on which residual is used.

    Parameters are read inside their own module's forward and nowhere else: offloading, sharding
    and adapters work by what they hook to that call. So a module whose weights a fused read
    multiplies lends them when it is called with None in place of its input.

    `reads_width` names its matrices (m, d), whose products sum over the whole width: what µP lets
    learn more slowly in a wider model.
    """

    reads_width: tuple[str, ...] = ()
    init_seed: int  # of that generator, set by the model

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        raise NotImplementedError  # every subclass says how its parameters start


def flops_of(part: nn.Module, *sizes: int) -> int:
    """What a part adds to a token's forward pass, in FLOPs: its own `flops`, asked for here alone.

    A multiply-add counts as two. Every part of a residual, and a residual itself, has this method;
    `sizes` are what the part cannot know by itself.

    Raises:
        NotImplementedError: it has none; one line.
    """
    count = getattr(part, "flops", None)
    if count is None:
        raise NotImplementedError(
            f"{type(part).__name__} does not say what it costs: define flops(), the floating-point "
            "operations that it adds to a token's forward pass (a multiply-add counts as two)"
        )
    return count(*sizes)


def gate_bias(gate: float) -> float:
    """The bias x with 2σ(x) = gate, which is logit(gate/2).

    The gate is clamped by 2e-6 at both ends so that x is finite.
    """
    share = min(max(gate / 2, 1e-6), 1 - 1e-6)
    return math.log(share) - math.log1p(-share)


@torch.no_grad()
def start_(parameter: Tensor, values: Tensor) -> None:
    """Copy starting values into a parameter, unless transformers has filled it from a checkpoint.

    The values are drawn on the CPU, so a seed means the same numbers on every device.
    """
    if not getattr(parameter, "_is_hf_initialized", False):
        parameter.copy_(values.expand_as(parameter))


def normal(shape: torch.Size, std: float, generator: torch.Generator | None) -> Tensor:
    """A CPU tensor of N(0, std²) entries."""
    return torch.randn(shape, generator=generator, device="cpu") * std


def uniform(shape: torch.Size, bound: float, generator: torch.Generator | None) -> Tensor:
    """A CPU tensor of entries that are uniform between −bound and bound."""
    return (2 * torch.rand(shape, generator=generator, device="cpu") - 1) * bound


def distinct_around(mean: float, size: int, generator: torch.Generator | None) -> Tensor:
    """A vector (size,) with the given mean and distinct entries, spread by half the mean.

    Channels that start equal and are written equally stay equal for ever; this is the start that
    keeps them apart. A single entry is the mean itself.
    """
    if size == 1:
        return torch.full((1,), mean, device="cpu")
    noise = normal(torch.Size((size,)), 1.0, generator)
    noise = noise - noise.mean()
    return mean * (1 + 0.5 * noise / noise.square().mean().sqrt())
