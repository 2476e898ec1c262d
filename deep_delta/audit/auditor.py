"""One model under audit: a batch goes in, statistics of it are added up."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from deep_delta.audit.directions import Overlaps
from deep_delta.audit.intervene import Intervention, intervening, interventions
from deep_delta.audit.observe import Write, observed, sublayers
from deep_delta.audit.streams import Means
from deep_delta.audit.sublayer import SublayerStatistics
from deep_delta.errors import UserError
from deep_delta.model import DeepDeltaForCausalLM

# Rounding of fp32 sums over a width of thousands stays below; a wrong write does not.
TOLERANCE = 1e-5


class Auditor:
    """Adds up the statistics of one model.

    positions: each position's bin (T,) and their number; frequencies: each id's bin (vocab,) and
    their number.
    """

    def __init__(
        self,
        name: str,
        model: DeepDeltaForCausalLM,
        positions: tuple[Tensor, int],
        frequencies: tuple[Tensor, int],
    ):
        config, device = model.config, model.device
        self.name, self.model = name, model
        self.sublayers = sublayers(model)
        self.positions, self.frequencies = positions[0].to(device), frequencies[0].to(device)
        self.statistics = [
            SublayerStatistics(
                config.hidden_size, config.value_channels, positions[1], frequencies[1], device
            )
            for _ in self.sublayers
        ]
        self.overlaps = Overlaps(len(self.sublayers), device)
        self.loss = Means(device=device)
        self.effects: dict[tuple[int, str, int | None], Means] = {}

    def interventions(self) -> list[tuple[int, Intervention]]:
        """(sublayer, intervention) of all that apply; known after the first `observe`."""
        channels = self.model.config.value_channels
        return [
            (index, intervention)
            for index, statistics in enumerate(self.statistics)
            for intervention in interventions(statistics.erases, channels)
        ]

    def observe(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Take in a batch as the model is; its losses, (B, 1), one a sequence.

        Errors: UserError if a write does not obey the law of `Write.fault` to TOLERANCE.
        """
        ids = batch["input_ids"]
        steps = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        places = self.positions[batch.get("position_ids", steps)]
        frequencies = self.frequencies[ids]
        directions: list[Tensor] = []

        def see(index: int, write: Write) -> None:
            self.statistics[index].add(write, places, frequencies)
            directions.append(write.direction.float())

        with observed(self.model, see):
            losses = sequence_losses(self.model, batch)
        self.overlaps.add(directions)
        self.loss.add(losses)
        for sublayer, statistics in zip(self.sublayers, self.statistics, strict=True):
            if not float(statistics.fault) <= TOLERANCE:  # a NaN is none either
                raise UserError(
                    f"the self-test failed in {sublayer} of {self.name}: the discrepancy after a "
                    f"write is not |1 − β| times that before it, but off by "
                    f"{float(statistics.fault):.1e} of ‖X‖ (tolerance {TOLERANCE:.0e}); nothing is "
                    "reported"
                )
        return losses

    def intervene(
        self, batch: Mapping[str, Tensor], losses: Tensor, done: Callable[[], None]
    ) -> None:
        """Add what every intervention changes in these losses (B, 1); calls `done` after each."""
        for index, intervention in self.interventions():
            key = index, intervention.name, intervention.channel
            with intervening(self.sublayers[index].residual, intervention.change):
                changed = sequence_losses(self.model, batch)
            means = self.effects.setdefault(key, Means(device=losses.device))
            means.add(changed - losses)
            done()

    def result(self) -> dict[str, Any]:
        """For JSON, without numbers that are none."""
        config = self.model.config
        return {
            "name": self.name,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "layers": config.num_hidden_layers,
            "width": config.hidden_size,
            "value_channels": config.value_channels,
            "loss": self.loss.entry(),
            "fault": max(float(statistics.fault) for statistics in self.statistics),
            "sublayers": [
                {
                    "layer": sublayer.layer,
                    "kind": sublayer.kind,
                    **statistics.result(),
                    "compressor": _weights(sublayer.compressor(None)),
                }
                for sublayer, statistics in zip(self.sublayers, self.statistics, strict=True)
            ],
            "readout_compressor": _weights(self.model.model.readout.compressor(None)),
            "overlap": self.overlaps.result([one.directions for one in self.statistics]),
            "interventions": [
                {
                    "layer": self.sublayers[index].layer,
                    "kind": self.sublayers[index].kind,
                    "name": name,
                    "channel": channel,
                    **means.entry(),
                }
                for (index, name, channel), means in self.effects.items()
            ],
        }


def _weights(taps: Tensor | None) -> dict[str, Any] | None:
    """Mean and root mean square over features of a compressor's taps (K, d_v, d)."""
    if taps is None:
        return None
    taps = taps.detach().double()
    return {"mean": taps.mean(-1).tolist(), "rms": taps.square().mean(-1).sqrt().tolist()}


@torch.no_grad()
def sequence_losses(model: DeepDeltaForCausalLM, batch: Mapping[str, Tensor]) -> Tensor:
    """The mean loss of every sequence in nats per token, (B, 1); logits of one at a time."""
    labels = batch["labels"]
    inputs = {name: batch[name] for name in ("input_ids", "position_ids") if name in batch}
    hidden = model.model(**inputs, use_cache=False).last_hidden_state
    losses = [
        model.lm_head(
            hidden[i : i + 1],
            functools.partial(
                model.linear_cross_entropy,
                labels=labels[i : i + 1],
                multiplier=model.config.logit_factor,
            ),
        )
        for i in range(len(labels))
    ]
    return torch.stack(losses).double().unsqueeze(-1)
