"""Many trainings, one question: does a residual help, and what does it cost?"""

import csv
import dataclasses
import io
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

from deep_delta.compare.arms import Arm
from deep_delta.compare.machines import train_all
from deep_delta.compare.rates import Choice, choose
from deep_delta.compare.speed import measure_speed
from deep_delta.compare.study import Study
from deep_delta.compare.summary import summarise
from deep_delta.compare.training import BUDGET, RATE, REPORTED, Training
from deep_delta.data.files import write_atomically, write_json_atomically
from deep_delta.report import print_table, write_report
from deep_delta.train import Recipe, RunResult, read_metrics
from deep_delta.train.processes import lost_processes_named, on_each, on_main


def compare(study: Study, command: str) -> dict[str, Any]:
    """Choose every arm's rate, train it with every seed, and report.

    Trainings that are finished in the study's folder are taken as they are, so an interrupted
    comparison goes on with those that are missing, on another machine too. Seeds are the outer
    loop: what an interruption leaves is paired.

    Args:
        study: what is asked.
        command: how the comparison was started, for the report.

    Returns:
        The summary that is also in OUT/summary.json; OUT/runs.csv has a row for every training,
        OUT/report.html and its plots show it.

    Raises:
        UserError: budgets longer than the data, no rate without divergence, or what `train` raises.
    """
    on_each(study.check_budgets)
    searched = _train(
        [
            (arm, RATE, _at_rate(study, arm, rate), seed)
            for seed in study.rate_seeds
            for arm in _searching(study)
            for rate in study.rates
        ]
    )
    choices = {arm.name: _choice(arm, searched) for arm in _searching(study)}
    recipes = {arm.name: _chosen(study, arm, choices.get(arm.name)) for arm in study.arms}
    reported = _train(
        [(arm, REPORTED, recipes[arm.name], seed) for seed in study.seeds for arm in study.arms]
    )
    baseline = study.baseline_arm
    shortened = [_with_budget(recipes[baseline.name], n) for n in study.budgets] if baseline else []
    budgets = _train(
        [
            (baseline, BUDGET, recipe, seed)
            for recipe in shortened
            for seed in study.seeds
            if baseline and recipe.steps != recipes[baseline.name].steps
        ]
    )
    speed = measure_speed(
        {arm.name: _quiet(recipes[arm.name], study) for arm in study.arms}, study.baseline
    )
    trainings = [*searched, *reported, *budgets]
    with lost_processes_named():
        return on_main(lambda: _report(study, command, trainings, choices, speed))


def _train(planned: list[tuple[Arm, str, Recipe, int]]) -> list[Training]:
    recipes = [dataclasses.replace(recipe, seed=seed) for _, _, recipe, seed in planned]
    results = train_all(recipes)
    return [
        Training(arm, purpose, recipe, result)
        for (arm, purpose, _, _), recipe, result in zip(planned, recipes, results, strict=True)
    ]


def _searching(study: Study) -> list[Arm]:
    return [arm for arm in study.arms if study.searches and "lr" not in arm.fields]


def _at_rate(study: Study, arm: Arm, rate: float) -> Recipe:
    recipe = study.recipe_of(arm)
    return dataclasses.replace(recipe, lr=rate, name=f"{recipe.name}/lr-{rate:g}")


def _choice(arm: Arm, searched: list[Training]) -> Choice:
    losses: dict[float, list[float]] = {}
    for training in searched:
        if training.arm == arm:
            losses.setdefault(training.recipe.lr, []).append(training.losses["val_loss"])
    return choose(arm.name, losses)


def _chosen(study: Study, arm: Arm, choice: Choice | None) -> Recipe:
    return _at_rate(study, arm, choice.rate) if choice else study.recipe_of(arm)


def _with_budget(recipe: Recipe, tokens: int) -> Recipe:
    """The recipe with a whole schedule of so many tokens; its warm-up stays as long as it is."""
    steps = round(tokens / (recipe.batch_size * recipe.seq_len))
    name = f"{recipe.name}/tokens-{steps * recipe.batch_size * recipe.seq_len}"
    return dataclasses.replace(recipe, steps=steps, name=name)


def _quiet(recipe: Recipe, study: Study) -> Recipe:
    return dataclasses.replace(recipe, seed=study.seeds[0], trackers="none")


def _report(
    study: Study,
    command: str,
    trainings: list[Training],
    choices: dict[str, Choice],
    speed: dict[str, Any] | None,
) -> dict[str, Any]:
    """Summarise the trainings, write the report and print the table."""
    out = Path(study.recipe.out)
    context = {
        "command": command,
        **made_with([training.result for training in trainings]),
        "recipe": _shared_fields(study.recipe),
    }
    rows = [_row(training, out) for training in trainings]
    summary = summarise(study, trainings, choices, speed, rows, context)
    write_json_atomically(out / "summary.json", summary)
    _write_csv(study, trainings, rows, out / "runs.csv")
    curves: dict[str, dict[int, Any]] = {arm.name: {} for arm in study.arms}
    for training in trainings:
        if training.purpose == REPORTED:
            found = read_metrics(training.recipe.run_folder / "metrics.jsonl")
            curves[training.arm.name][training.recipe.seed] = found
    write_report(summary, curves, out)
    print_table(summary)
    print(f"\nreport: {out / 'report.html'}")
    return summary


def _row(training: Training, out: Path) -> dict[str, Any]:
    """What summary.json and runs.csv say of one training."""
    recipe, result = training.recipe, training.result
    return {
        "arm": training.arm.name,
        "purpose": training.purpose,
        "seed": recipe.seed,
        "lr": recipe.lr,
        "path": recipe.run_folder.relative_to(out).as_posix(),
        "val_loss": result.val_loss,
        "test_loss": result.test_loss,
        "tokens": result.tokens,
        "flops": result.tokens * result.flops_per_token,
        "train_seconds": result.train_seconds,
        "tokens_per_s": result.tokens_per_s,
        "peak_memory_bytes": result.peak_memory_bytes,
        "hardware": result.hardware,
        "commit": result.commit,
        "diverged": result.diverged,
    }


def _write_csv(
    study: Study, trainings: list[Training], rows: list[dict[str, Any]], path: Path
) -> None:
    """A row a training: the row of summary.json, and every field in which arms differ."""
    fields = dict.fromkeys(chain(*(arm.fields for arm in study.arms)))
    lines = []
    for training, row in zip(trainings, rows, strict=True):
        values = dataclasses.asdict(training.recipe)
        own = {name: training.arm.fields.get(name, values.get(name, "")) for name in fields}
        lines.append({**{name: own[name] for name in fields if name not in row}, **row})
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]))
    writer.writeheader()
    writer.writerows(lines)
    write_atomically(path, text.getvalue().encode())


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


def _shared_fields(recipe: Recipe) -> dict[str, Any]:
    fields = dataclasses.asdict(recipe)
    for name in ("variant", "seed", "out", "name", "resume"):
        del fields[name]
    return fields
