"""Many runs, one question: does a residual help, and what does it cost?"""

import dataclasses
import gc
import json
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

from deep_delta.compare.summary import summarise
from deep_delta.errors import UserError
from deep_delta.model.presets import VARIANTS, lookup
from deep_delta.report import print_table, write_report
from deep_delta.train import Diverged, Recipe, RunResult, read_metrics, read_result, train
from deep_delta.train.processes import lost_processes_named, on_main

DEFAULT_VARIANTS = ("additive", "additive-expanded", "write-only-cc", "ddl-cc", "ddl-scalar")
DEFAULT_SEEDS = (0, 1, 2)
BASELINE = "additive"


def compare(recipe: Recipe, variants: list[str], seeds: list[int], command: str) -> dict[str, Any]:
    """Train every variant with every seed by one recipe, and report.

    Runs that are finished in `recipe.out` are taken as they are, so an interrupted comparison goes
    on with those that are missing. Seeds are the outer loop: what an interruption leaves is paired.

    Args:
        recipe: everything but the variant and the seed.
        variants, seeds: without repeats; the pairs are trained in this order.
        command: how the comparison was started, for the report.

    Returns:
        The summary that is also in OUT/summary.json; OUT/report.html and its plots show it.

    Raises:
        UserError: unknown or repeated variants or seeds, or what `train` raises.
    """
    _check_choices(variants, seeds)
    results: list[RunResult] = []
    folders: dict[tuple[str, int], Path] = {}
    for seed in seeds:
        for variant in variants:
            run = dataclasses.replace(recipe, variant=variant, seed=seed)
            folders[variant, seed] = run.run_folder
            try:
                results.append(train(run))
            except Diverged:  # a result like others, and no reason to stop the rest
                results.append(read_result(run.run_folder))
            gc.collect()  # the next run's peak memory starts without this one's model
    with lost_processes_named():
        return on_main(lambda: _report(recipe, variants, seeds, command, results, folders))


def _report(
    recipe: Recipe,
    variants: list[str],
    seeds: list[int],
    command: str,
    results: list[RunResult],
    folders: dict[tuple[str, int], Path],
) -> dict[str, Any]:
    """Summarise the results, write the report and print the table."""
    out = Path(recipe.out)
    context = {"command": command, **made_with(results), "recipe": _shared_fields(recipe)}
    baseline = BASELINE if BASELINE in variants else None
    summary = summarise(results, folders, out, baseline, context)
    curves = {
        variant: {seed: read_metrics(folders[variant, seed] / "metrics.jsonl") for seed in seeds}
        for variant in variants
    }
    (out / "summary.json").write_text(
        json.dumps(summary, indent=1, allow_nan=False) + "\n", encoding="utf-8"
    )
    write_report(summary, curves, out)
    print_table(summary)
    print(f"\nreport: {out / 'report.html'}")
    return summary


def made_with(results: list[RunResult]) -> dict[str, Any]:
    """Commit, hardware and versions of the runs; what differs between them one after the other.

    Finished runs may have been made elsewhere than where they are reported.
    """

    def each(values: Iterable[str | None]) -> str:
        return "; ".join(dict.fromkeys(value or "unknown" for value in values))

    devices = each(run.hardware for run in results)
    several = len({run.hardware for run in results}) > 1
    used = [run.versions or {} for run in results]
    return {
        "commit": each(run.commit for run in results),
        "hardware": devices + (": speeds and memory may not compare" if several else ""),
        "versions": {
            name: each(own.get(name, "none") if own else None for own in used)
            for name in dict.fromkeys(chain(*used))
        },
    }


def _check_choices(variants: list[str], seeds: list[int]) -> None:
    if not variants or not seeds:
        raise UserError("compare needs at least one variant and one seed")
    for variant in variants:
        try:
            lookup("variant", variant, VARIANTS)
        except ValueError as error:
            raise UserError(str(error)) from None
    for name, chosen in (("variants", variants), ("seeds", seeds)):
        if len(set(chosen)) != len(chosen):
            raise UserError(f"{name} has repeats: {', '.join(map(str, chosen))}")


def _shared_fields(recipe: Recipe) -> dict[str, Any]:
    fields = dataclasses.asdict(recipe)
    for name in ("variant", "seed", "out", "resume"):
        del fields[name]
    return fields
