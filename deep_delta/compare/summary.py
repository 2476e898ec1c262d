"""From the results of runs to the summary that table, report and summary.json share."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, median
from typing import Any

from deep_delta.compare.statistics import judge, mean_and_spread
from deep_delta.train import RunResult

LEVEL = 0.95


def summarise(
    results: list[RunResult],
    folders: Mapping[tuple[str, int], Path],
    out: Path,
    baseline: str | None,
    context: Mapping[str, Any],
) -> dict[str, Any]:
    """The summary of a comparison, ready for JSON.

    A variant's loss is mean and sample standard deviation over its seeds, its perplexity the
    exponential of that mean. A run that diverged has val_loss None; its variant then has no mean,
    spread and perplexity. "contrasts" are the fields of `Contrast`, one for each variant against
    the baseline, "residual" those of `Judgement` that say how large residuals are.
    """
    by_variant: dict[str, list[RunResult]] = {}
    for result in results:
        by_variant.setdefault(result.variant, []).append(result)
    losses = {variant: _losses(runs) for variant, runs in by_variant.items()}
    others = [variant for variant in by_variant if variant != baseline]
    pairs = [(variant, baseline) for variant in others] if baseline else []
    judgement = judge(losses, pairs, LEVEL)
    return {
        "schema": 2,
        **context,
        "baseline": baseline,
        "level": LEVEL,
        "residual": {
            "deviation": judgement.residual_deviation,
            "degrees_of_freedom": judgement.degrees_of_freedom,
        },
        "contrasts": [
            {name: _for_json(value) for name, value in asdict(contrast).items()}
            for contrast in judgement.contrasts
        ],
        "variants": [_variant(runs) for runs in by_variant.values()],
        "runs": [
            {
                "variant": run.variant,
                "seed": run.seed,
                "path": str(folders[run.variant, run.seed].relative_to(out)),
                "val_loss": run.val_loss,
                "train_seconds": run.train_seconds,
                "tokens": run.tokens,
                "tokens_per_s": run.tokens_per_s,
                "peak_memory_bytes": run.peak_memory_bytes,
            }
            for run in results
        ],
    }


def _variant(runs: list[RunResult]) -> dict[str, Any]:
    first = runs[0]
    mean, spread = mean_and_spread(list(_losses(runs).values()))
    return {
        "variant": first.variant,
        "parameters": first.parameters,
        "flops_per_token": first.flops_per_token,
        "tokens_per_s": fmean(run.tokens_per_s for run in runs),
        "hardware": sorted({run.hardware or "unknown hardware" for run in runs}),
        # The median: on a CPU the first run of a process also pays for what libraries load.
        "peak_memory_bytes": int(median(run.peak_memory_bytes for run in runs)),
        "val_loss": {"mean": _for_json(mean), "spread": spread, "n": len(runs)},
        "perplexity": _for_json(_exp(mean)),
    }


def _exp(loss: float) -> float:
    """e to the loss, and infinity for what is no loss of a language model any more."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def _losses(runs: list[RunResult]) -> dict[int, float]:
    return {run.seed: math.nan if run.val_loss is None else run.val_loss for run in runs}


def _for_json(value: Any) -> Any:
    """JSON has no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
