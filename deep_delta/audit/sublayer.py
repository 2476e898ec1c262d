"""What one sublayer does to the state, over all tokens: docs/audit.md defines every number."""

from typing import Any

import torch
from torch import Tensor

from deep_delta.audit.observe import Write
from deep_delta.audit.streams import Histogram, Means, SecondMoments

# Share of tokens by what a write does to the discrepancy: multiply it by 1 − β.
REGIMES = ("skip", "contraction", "target match", "over-relaxed", "saturated")
BORDERS = (0.1, 0.9, 1.1, 1.9)  # β below 0.1 skips, from 0.9 up to 1.1 matches, above 1.9 saturates
GATE_BINS, GATE_TOP = 200, 2.0
QUANTILES = (0.1, 0.5, 0.9)
# Below this β a write says nothing about its target: a = βv, and a / β is noise, or 0 / 0.
LEAST_GATE = 1e-6


class SublayerStatistics:
    """Adds up one sublayer's writes.

    width, channels: d, d_v. positions, frequencies: how many bins tokens have by position in
    their sequence and by how frequent they are.
    """

    def __init__(
        self, width: int, channels: int, positions: int, frequencies: int, device: torch.device
    ):
        self.width, self.channels, self.erases = width, channels, False
        self.histogram = Histogram(GATE_BINS, GATE_TOP, device)
        self.by_position = Means(positions, device)
        self.by_frequency = Means(frequencies, device)
        self.directions = SecondMoments(width, device)
        self.state = SecondMoments(channels, device)  # over tokens and features, after the write
        self.change = SecondMoments(channels, device)
        self.means: dict[str, Means] = {}
        self.fault = torch.zeros((), dtype=torch.float64, device=device)
        self.device = device

    def add(self, write: Write, positions: Tensor, frequencies: Tensor) -> None:
        """positions, frequencies (B, T): the bin of every token."""
        self.fault = torch.maximum(self.fault, write.fault.max())  # keeps a NaN
        length = write.squared_length.sqrt()
        size = write.size.clamp(min=torch.finfo(torch.float64).tiny)
        change = write.change.norm(dim=-1)
        self._mean("rms", write.size / (self.width * self.channels) ** 0.5)
        self._mean("rms_after", write.size_after / (self.width * self.channels) ** 0.5)
        self._mean("written", write.written.norm(dim=-1) * length / size)
        self._mean("changed", change * length / size)
        # ⟨k δᵀ, X⟩ = δᵀ(kᵀX) for a write k δᵀ; without a write there is no angle.
        along = (write.change * write.readout).sum(-1)
        moved = change * length > 0
        self._mean("cosine", along / (change * length * size), where=moved)
        self.directions.add(write.direction)
        self.state.add(write.after.mT)
        self.change.add(write.change)
        if write.gate is not None:
            self._add_gate(write, write.gate, length / size, positions, frequencies)

    def _add_gate(
        self, write: Write, gate: Tensor, relative: Tensor, positions: Tensor, frequencies: Tensor
    ) -> None:
        self.erases = True
        self.histogram.add(gate)
        self._mean("gate", gate)
        self.by_position.add(gate, positions)
        self.by_frequency.add(gate, frequencies)
        skip, contraction, match, saturated = BORDERS
        inside = (
            gate < skip,
            (gate >= skip) & (gate < contraction),
            (gate >= contraction) & (gate <= match),
            (gate > match) & (gate <= saturated),
            gate > saturated,
        )
        for regime, tokens in zip(REGIMES, inside, strict=True):
            self._mean(regime, tokens.double())
        self._mean("erased", write.erased.norm(dim=-1) * relative)
        known = gate > LEAST_GATE
        target = write.written / gate.unsqueeze(-1)
        per_channel = self.channels**0.5
        before = (target - write.readout).norm(dim=-1) / per_channel
        after = (target - write.readout_after).norm(dim=-1) / per_channel
        self._mean("discrepancy_before", before, where=known)
        self._mean("discrepancy_after", after, where=known)
        self._mean("discrepancy_ratio", after / before, where=known & (before > 0))

    def _mean(self, name: str, values: Tensor, where: Tensor | None = None) -> None:
        self.means.setdefault(name, Means(device=self.device)).add(values, where=where)

    def result(self) -> dict[str, Any]:
        """For JSON. What the residual does not have is None: a gate, several channels."""
        entries = {name: means.entry() for name, means in self.means.items()}
        result: dict[str, Any] = {
            name: entries[name] for name in ("rms", "rms_after", "written", "changed", "cosine")
        }
        result["direction_rank"] = self.directions.effective_rank()
        result["gate"] = result["discrepancy"] = result["erased"] = result["channels"] = None
        if self.erases:
            result["erased"] = entries["erased"]
            result["gate"] = {
                **entries["gate"],
                "quantiles": {f"{q:g}": self.histogram.quantile(q) for q in QUANTILES},
                "regimes": {name: entries[name] for name in REGIMES},
                "histogram": [int(count) for count in self.histogram.counts.tolist()],
                "by_position": self.by_position.entries(),
                "by_frequency": self.by_frequency.entries(),
            }
            result["discrepancy"] = {
                "before": entries["discrepancy_before"],
                "after": entries["discrepancy_after"],
                "ratio": entries["discrepancy_ratio"],
            }
        if self.channels > 1:
            result["channels"] = {
                "state_share": _shares(self.state.total),
                "change_share": _shares(self.change.total),
                "correlation": _cosines(self.state.total),
                "effective_rank": self.state.effective_rank(),
            }
        return result


def _shares(moments: Tensor) -> list[float]:
    """Each channel's share of Σ‖x‖², (d_v,)."""
    energy = moments.diagonal()
    return (energy / energy.sum().clamp(min=torch.finfo(torch.float64).tiny)).tolist()


def _cosines(moments: Tensor) -> list[list[float]]:
    """Cosine of every pair of channels, (d_v, d_v): over tokens and features, not centred."""
    scale = moments.diagonal().clamp(min=torch.finfo(torch.float64).tiny).sqrt()
    return (moments / scale.unsqueeze(-1) / scale).tolist()
