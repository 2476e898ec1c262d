"""From the trainings of a comparison to the summary that table, report and summary.json share."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import fmean, median
from typing import Any

from deep_delta.compare.costs import cost
from deep_delta.compare.rates import Choice
from deep_delta.compare.statistics import judge, mean_and_spread
from deep_delta.compare.study import Study
from deep_delta.compare.training import RATE, REPORTED, Training

SCHEMA = 3
LEVEL = 0.95


def summarise(
    study: Study,
    trainings: Sequence[Training],
    choices: Mapping[str, Choice],
    speed: Mapping[str, Any] | None,
    rows: Sequence[Mapping[str, Any]],
    context: Mapping[str, Any],
) -> dict[str, Any]:
    """The summary of a comparison, ready for JSON; docs/comparing.md has every key.

    Contrasts, perplexities and costs are of the test text if every run has such a loss, else of
    the validation text. A run that diverged has no loss; its arm then has no mean and spread.
    """
    reported = [training for training in trainings if training.purpose == REPORTED]
    steady = [training for training in reported if not training.result.diverged]
    tested = bool(steady) and all(run.result.test_loss is not None for run in steady)
    judged_on = "test_loss" if tested else "val_loss"
    losses = {
        arm.name: {
            run.recipe.seed: run.losses[judged_on] for run in reported if run.arm.name == arm.name
        }
        for arm in study.arms
    }
    judgement = judge(losses, study.pairs, LEVEL)
    by_arm = {arm.name: [run for run in reported if run.arm.name == arm.name] for arm in study.arms}
    curve = _curve(study, trainings, judged_on)
    summary = {
        "schema": SCHEMA,
        **context,
        "baseline": study.baseline,
        "level": LEVEL,
        "judged_on": judged_on,
        "residual": {
            "deviation": judgement.residual_deviation,
            "degrees_of_freedom": judgement.degrees_of_freedom,
        },
        "contrasts": [asdict(contrast) for contrast in judgement.contrasts],
        "arms": [_arm(runs, choices.get(name), judged_on) for name, runs in by_arm.items()],
        "rates": [
            {
                "arm": name,
                "lr": rate,
                "n": choice.runs // len(choice.tried),
                "val_loss": loss,
                "chosen": rate == choice.rate,
            }
            for name, choice in choices.items()
            for rate, loss in choice.tried.items()
        ],
        "curve": curve,
        "speed": speed,
        "runs": rows,
    }
    summary["costs"] = _costs(summary, by_arm)
    return _for_json(summary)


def _arm(runs: Sequence[Training], choice: Choice | None, judged_on: str) -> dict[str, Any]:
    first, results = runs[0], [run.result for run in runs]
    losses = {
        name: _spread([run.losses[name] for run in runs]) for name in ("val_loss", "test_loss")
    }
    untested = judged_on == "val_loss" and all(result.test_loss is None for result in results)
    return {
        "arm": first.arm.name,
        "fields": dict(first.arm.fields),
        "parameters": first.result.parameters,
        "flops_per_token": first.result.flops_per_token,
        "lr": first.recipe.lr,
        "edge": choice.edge if choice else None,
        "tries": choice.runs if choice else 0,
        "val_loss": losses["val_loss"],
        "test_loss": None if untested else losses["test_loss"],
        "perplexity": _perplexity(losses[judged_on]["mean"]),
        "tokens_per_s": fmean(result.tokens_per_s for result in results),
        "hardware": sorted({result.hardware or "unknown hardware" for result in results}),
        # The median: on a CPU the first run of a process also pays for what libraries load.
        "peak_memory_bytes": int(median(result.peak_memory_bytes for result in results)),
    }


def _curve(study: Study, trainings: Sequence[Training], judged_on: str) -> list[dict[str, Any]]:
    """The baseline's loss after schedules of several lengths, its own among them."""
    if not study.budgets:
        return []
    by_length: dict[int, list[float]] = {}
    for training in trainings:
        if training.arm.name == study.baseline and training.purpose != RATE:
            tokens = training.recipe.steps * training.recipe.batch_size * training.recipe.seq_len
            by_length.setdefault(tokens, []).append(training.losses[judged_on])
    return [
        {"tokens": tokens, "loss": fmean(losses), "n": len(losses)}
        for tokens, losses in sorted(by_length.items())
    ]


def _costs(
    summary: Mapping[str, Any], by_arm: Mapping[str, Sequence[Training]]
) -> list[dict[str, Any]]:
    curve = {
        point["tokens"]: point["loss"] for point in summary["curve"] if math.isfinite(point["loss"])
    }
    if len(curve) < 2:
        return []
    entries = {entry["arm"]: entry for entry in summary["arms"]}
    own = entries[summary["baseline"]]["flops_per_token"]
    speeds = (summary["speed"] or {}).get("arms", {})
    return [
        asdict(
            cost(
                name,
                entry[summary["judged_on"]]["mean"],
                by_arm[name][0].result.tokens,
                curve,
                entry["flops_per_token"] / own,
                speeds.get(name, {}).get("ratio"),
            )
        )
        for name, entry in entries.items()
        if name != summary["baseline"] and math.isfinite(entry[summary["judged_on"]]["mean"])
    ]


def _spread(losses: Sequence[float]) -> dict[str, Any]:
    mean, spread = mean_and_spread(losses)
    return {"mean": mean, "spread": spread, "n": len(losses)}


def _perplexity(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def _for_json(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {name: _for_json(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_for_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
