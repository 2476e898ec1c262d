"""A made-up comparison: losses that fall, no model and no training."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from deep_delta.compare.statistics import judge, mean_and_spread

Losses = dict[str, dict[int, float]]

TOKENS = 64_000
FLOPS_PER_TOKEN = 8.6e8


def make_summary(
    losses: Losses,
    baseline: str | None = "additive",
    pairs: Sequence[tuple[str, str]] | None = None,
    tested: bool = False,
) -> dict[str, Any]:
    """The summary that compare would write for these final losses, by arm and seed.

    ``pairs``: the contrasts, by default all with the baseline. ``tested``: there is test text,
    whose losses are 0.1 above those of validation.
    """
    arms, runs = [], []
    if pairs is None:
        others = [name for name in losses if name != baseline]
        pairs = [(name, str(baseline)) for name in others] if baseline in losses else []
    judgement = judge(losses, pairs)
    for position, (name, by_seed) in enumerate(losses.items()):
        speed = 1000.0 / (1 + position)
        values = list(by_seed.values())
        arms.append(
            {
                "arm": name,
                "fields": {"variant": name},
                "parameters": 124_439_808,
                "flops_per_token": FLOPS_PER_TOKEN,
                "lr": 1e-3,
                "edge": None,
                "tries": 0,
                "val_loss": _measured(values),
                "test_loss": _measured([value + 0.1 for value in values]) if tested else None,
                "perplexity": _for_json(math.exp(_mean(values) + (0.1 if tested else 0.0))),
                "tokens_per_s": speed,
                "hardware": ["a CPU"],
                "peak_memory_bytes": 3 * 2**30,
            }
        )
        runs += [
            _run(name, "reported", seed, loss, loss + 0.1 if tested else None, speed)
            for seed, loss in by_seed.items()
        ]
    return {
        "schema": 3,
        "command": "ddl compare small.toml",
        "commit": None,
        "hardware": "a CPU",
        "versions": {"python": "3.11"},
        "recipe": {"width": 64, "betas": [0.9, 0.95], "name": "small"},
        "baseline": baseline,
        "level": 0.95,
        "judged_on": "test_loss" if tested else "val_loss",
        "residual": {
            "deviation": judgement.residual_deviation,
            "degrees_of_freedom": judgement.degrees_of_freedom,
        },
        "contrasts": [
            {key: _for_json(value) for key, value in dataclasses.asdict(contrast).items()}
            for contrast in judgement.contrasts
        ],
        "arms": arms,
        "rates": [],
        "curve": [],
        "costs": [],
        "speed": None,
        "runs": runs,
    }


def with_search(summary: dict[str, Any]) -> dict[str, Any]:
    """Every arm tried four rates with two seeds; the highest diverged, and the last arm took it.

    The last arm's best rate therefore is the highest that it tried.
    """
    arms, last = [], summary["arms"][-1]["arm"]
    rates, runs = [], []
    for entry in summary["arms"]:
        tried = (5e-4, 1e-3, 2e-3) if entry["arm"] == last else (5e-4, 1e-3, 2e-3, 4e-3)
        best = tried[-1] if entry["arm"] == last else 1e-3
        edge = "highest" if entry["arm"] == last else None
        arms.append({**entry, "lr": best, "edge": edge, "tries": 2 * len(tried)})
        for rate in tried:
            loss = None if rate == 4e-3 else 3.4 + abs(math.log2(rate / best)) / 20
            rates.append(
                {"arm": entry["arm"], "lr": rate, "n": 2, "val_loss": loss, "chosen": rate == best}
            )
            runs += [
                {**_run(entry["arm"], "rate", seed, loss, None, 1000.0), "lr": rate}
                for seed in (0, 1)
            ]
    return {**summary, "arms": arms, "rates": rates, "runs": [*summary["runs"], *runs]}


def with_budgets(summary: dict[str, Any]) -> dict[str, Any]:
    """The baseline was trained for half and twice the tokens as well: a line of log tokens.

    Its loss falls by 0.05 with every doubling, and the last training of its curve diverged.
    """
    baseline = next(one for one in summary["arms"] if one["arm"] == summary["baseline"])
    key = summary["judged_on"]
    own = baseline[key]["mean"]
    curve = [
        {"tokens": TOKENS * factor, "loss": own - 0.05 * math.log2(factor), "n": 2}
        for factor in (0.5, 1, 2)
    ]
    curve.append({"tokens": TOKENS * 4, "loss": None, "n": 2})
    costs = []
    for entry in summary["arms"]:
        cost = {"arm": entry["arm"], "tokens": TOKENS}
        loss = entry[key]["mean"]
        cost |= dict.fromkeys(("baseline_tokens", "beyond", "flops", "seconds"))
        if loss is not None:
            doublings = (own - loss) / 0.05
            if abs(doublings) > 1:
                cost["beyond"] = "below" if doublings > 0 else "above"
            else:
                cost["baseline_tokens"] = TOKENS * 2**doublings
                cost["flops"] = 2**-doublings
                cost["seconds"] = 1.1 * 2**-doublings
        costs.append(cost)
    runs = [{**_run(baseline["arm"], "budget", 0, point["loss"], None, 1000.0)} for point in curve]
    return {**summary, "curve": curve, "costs": costs, "runs": [*summary["runs"], *runs]}


def with_speed(summary: dict[str, Any], steady: bool = True) -> dict[str, Any]:
    """A benchmark by which the arm number i has 1 / (1 + i / 4) of the baseline's speed."""
    arms = {}
    for position, entry in enumerate(summary["arms"]):
        ratio = 1 / (1 + position / 4)
        arms[entry["arm"]] = {
            "tokens_per_s": 2000.0 * ratio,
            "ratio": ratio if steady else None,
            "low": 0.98 * ratio if steady else None,
            "high": 1.01 * ratio if steady else None,
        }
    return {**summary, "speed": {"hardware": "one GPU", "steady": steady, "arms": arms}}


def make_curves(losses: Losses, steps: int = 40) -> dict[str, dict[int, list[dict[str, Any]]]]:
    """Rows of metrics.jsonl that fall to the given final losses; seconds differ by arm."""
    curves: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for position, (name, by_seed) in enumerate(losses.items()):
        curves[name] = {}
        for seed, final in by_seed.items():
            rows: list[dict[str, Any]] = []
            for step in range(0, steps + 1, 2):
                tokens = 1600 * step
                at = {"step": step, "tokens": tokens, "seconds": (1 + position) * step * 1.5}
                at["flops"] = tokens * FLOPS_PER_TOKEN * (1 + position / 50)
                loss = final + 4.0 * (1.0 - step / steps)
                rows.append({**at, "loss": loss + 0.1, "lr": 1e-3, "tokens_per_s": 1000.0})
                if step % 8 == 0:
                    rows.append({**at, "val_loss": loss})
            curves[name][seed] = rows
    return curves


def _run(
    arm: str, purpose: str, seed: int, val: float | None, test: float | None, speed: float
) -> dict[str, Any]:
    known = val is not None and math.isfinite(val)
    return {
        "arm": arm,
        "purpose": purpose,
        "seed": seed,
        "lr": 1e-3,
        "path": f"runs/{arm}/{seed}",
        "val_loss": val if known else None,
        "test_loss": test if known else None,
        "tokens": TOKENS,
        "flops": TOKENS * FLOPS_PER_TOKEN,
        "train_seconds": TOKENS / speed,
        "tokens_per_s": speed,
        "peak_memory_bytes": 3 * 2**30,
        "hardware": "a CPU",
        "commit": None,
        "diverged": not known,
    }


def _mean(values: list[float]) -> float:
    return mean_and_spread(values)[0]


def _measured(values: list[float]) -> dict[str, Any]:
    mean, spread = mean_and_spread(values)
    return {"mean": _for_json(mean), "spread": spread, "n": len(values)}


def _for_json(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
