"""A made-up comparison: losses that fall, no model and no training."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest

from deep_delta.compare.statistics import judge, mean_and_spread

Losses = dict[str, dict[int, float]]


def make_summary(losses: Losses, baseline: str | None = "additive") -> dict[str, Any]:
    """The summary that compare would write for these final losses, by variant and seed."""
    variants, runs = [], []
    others = [name for name in losses if name != baseline]
    judgement = judge(losses, [(name, baseline) for name in others] if baseline in losses else [])
    for position, (name, by_seed) in enumerate(losses.items()):
        speed = 1000.0 / (1 + position)
        mean, spread = mean_and_spread(list(by_seed.values()))
        variants.append(
            {
                "variant": name,
                "parameters": 124_439_808,
                "flops_per_token": 8.6e8,
                "tokens_per_s": speed,
                "hardware": ["a CPU"],
                "peak_memory_bytes": 3 * 2**30,
                "val_loss": {"mean": mean, "spread": spread, "n": len(by_seed)},
                "perplexity": math.exp(mean),
            }
        )
        runs += [
            {
                "variant": name,
                "seed": seed,
                "path": f"runs/{name}/{seed}",
                "val_loss": loss,
                "train_seconds": 64_000 / speed,
                "tokens": 64_000,
                "tokens_per_s": speed,
                "peak_memory_bytes": 3 * 2**30,
            }
            for seed, loss in by_seed.items()
        ]
    return {
        "schema": 2,
        "command": "ddl compare small.toml",
        "commit": None,
        "hardware": "a CPU",
        "versions": {"python": "3.11"},
        "recipe": {"width": 64, "betas": [0.9, 0.95], "name": "small"},
        "baseline": baseline,
        "level": 0.95,
        "residual": {
            "deviation": judgement.residual_deviation,
            "degrees_of_freedom": judgement.degrees_of_freedom,
        },
        "contrasts": [dataclasses.asdict(contrast) for contrast in judgement.contrasts],
        "variants": variants,
        "runs": runs,
    }


def make_curves(losses: Losses, steps: int = 40) -> dict[str, dict[int, list[dict[str, Any]]]]:
    """Rows of metrics.jsonl that fall to the given final losses; seconds differ by variant."""
    curves: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for position, (name, by_seed) in enumerate(losses.items()):
        curves[name] = {}
        for seed, final in by_seed.items():
            rows: list[dict[str, Any]] = []
            for step in range(0, steps + 1, 2):
                at = {"step": step, "tokens": 1600 * step, "seconds": (1 + position) * step * 1.5}
                loss = final + 4.0 * (1.0 - step / steps)
                rows.append({**at, "loss": loss + 0.1, "lr": 1e-3, "tokens_per_s": 1000.0})
                if step % 8 == 0:
                    rows.append({**at, "val_loss": loss})
            curves[name][seed] = rows
    return curves


@pytest.fixture
def summary_of() -> Callable[..., dict[str, Any]]:
    return make_summary


@pytest.fixture
def curves_of() -> Callable[..., dict[str, dict[int, list[dict[str, Any]]]]]:
    return make_curves
