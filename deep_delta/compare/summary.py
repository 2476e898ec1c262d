"""From the results of runs to the summary that table, report and summary.json share."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, median
from typing import Any

from deep_delta.report import mean_and_spread, paired_difference
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

    A variant's loss and perplexity are mean and sample standard deviation over its seeds; its
    difference is that of pairs of runs with the same seed, with a Student t interval at LEVEL. A
    run that diverged has val_loss None; its variant then has no mean, spread and difference.
    """
    by_variant: dict[str, list[RunResult]] = {}
    for result in results:
        by_variant.setdefault(result.variant, []).append(result)
    reference = _losses(by_variant[baseline]) if baseline else None
    return {
        "schema": 1,
        **context,
        "baseline": baseline,
        "level": LEVEL,
        "variants": [
            _variant(runs, None if variant == baseline else reference)
            for variant, runs in by_variant.items()
        ],
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


def _variant(runs: list[RunResult], reference: dict[int, float] | None) -> dict[str, Any]:
    losses = _losses(runs)
    first = runs[0]
    return {
        "variant": first.variant,
        "parameters": first.parameters,
        "flops_per_token": first.flops_per_token,
        "tokens_per_s": fmean(run.tokens_per_s for run in runs),
        "hardware": sorted({run.hardware or "unknown hardware" for run in runs}),
        # The median: on a CPU the first run of a process also pays for what libraries load.
        "peak_memory_bytes": int(median(run.peak_memory_bytes for run in runs)),
        "val_loss": _mean_and_spread(list(losses.values())) | {"n": len(runs)},
        "perplexity": _mean_and_spread([math.exp(loss) for loss in losses.values()]),
        "difference": None if reference is None else _difference(losses, reference),
    }


def _losses(runs: list[RunResult]) -> dict[int, float]:
    return {run.seed: math.nan if run.val_loss is None else run.val_loss for run in runs}


def _mean_and_spread(values: list[float]) -> dict[str, float | None]:
    mean, spread = mean_and_spread(values)
    return {"mean": _finite(mean), "spread": _finite(spread)}


def _difference(losses: dict[int, float], reference: dict[int, float]) -> dict[str, Any]:
    difference = asdict(paired_difference(losses, reference, LEVEL))
    return {
        key: _finite(value) if isinstance(value, float) else value
        for key, value in difference.items()
    }


def _finite(value: float | None) -> float | None:
    """JSON has no NaN."""
    return value if value is not None and math.isfinite(value) else None
