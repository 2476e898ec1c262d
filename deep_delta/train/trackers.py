"""Trackers: the rows of metrics.jsonl, as they are written, to TensorBoard, W&B and Trackio.

accelerate's own are not used: with them a resumed run would begin a new curve or repeat a piece of
the old one.
"""

import contextlib
import dataclasses
import importlib
import os
import secrets
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from deep_delta.errors import UserError
from deep_delta.model import DeepDeltaConfig
from deep_delta.train.metrics import Row, read_metrics
from deep_delta.train.processes import in_main
from deep_delta.train.recipe import Recipe

PROJECT = "deep-delta"


class Tracker(NamedTuple):
    """What is needed of a tracker: take a row's numbers at their step, and come to an end."""

    log: Callable[[int, dict[str, float]], None]
    close: Callable[[bool], None]  # True: the run was interrupted or failed


class Trackers:
    """The trackers of a run by their names; leaving it as a context closes them.

    One that fails in between gets one line on stderr and no more rows: neither the training nor
    metrics.jsonl depends on it. UserError for one that is not installed.
    """

    def __init__(self, names: Sequence[str]):
        for name in names:
            try:
                importlib.import_module(name)
            except ImportError:
                extra = "train" if name == "tensorboard" else name
                raise UserError(
                    f"the tracker {name} is not installed: pip install "
                    f"'deep-delta-learning[{extra}]', or choose others (--trackers none)"
                ) from None
        self.names = names
        self.opened: dict[str, Tracker] = {}

    @in_main
    def open(self, recipe: Recipe, config: DeepDeltaConfig, start: int) -> None:
        """Begin the run at every tracker, or take it up at step `start` (rows after it are gone).

        UserError if one does not start.
        """
        for name in self.names:
            try:
                self.opened[name] = OPEN[name](recipe, config, start)
            except Exception as error:
                raise UserError(
                    f"the tracker {name} does not start: {_line(error)} (--trackers none goes "
                    "without)"
                ) from error

    def log(self, row: Row) -> None:
        """Give a row of metrics.jsonl to every tracker."""
        for name, tracker in list(self.opened.items()):
            try:
                tracker.log(row["step"], _numbers(row))
            except Exception as error:
                del self.opened[name]
                _warn(f"{name} gets no more rows, metrics.jsonl does: {_line(error)}")

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        for name, tracker in self.opened.items():
            try:
                tracker.close(kind is not None)
            except Exception as error:
                _warn(f"{name} did not end well: {_line(error)}")


def _tensorboard(recipe: Recipe, config: DeepDeltaConfig, start: int) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(recipe.run_folder / "tensorboard", purge_step=start + 1)

    def log(step: int, numbers: dict[str, float]) -> None:
        if "val_loss" in numbers:  # the row before it, of the same step, had the rest
            numbers = {"val_loss": numbers["val_loss"]}
        for name, number in numbers.items():
            writer.add_scalar(name, number, step)
        writer.flush()  # a killed run loses no row that metrics.jsonl has

    return Tracker(log, lambda failed: writer.close())


def _wandb(recipe: Recipe, config: DeepDeltaConfig, start: int) -> Tracker:
    import wandb

    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        id=_identity("wandb", recipe, start),
        name=f"{recipe.label}-seed-{recipe.seed}",
        config=_choices(recipe, config),
        dir=recipe.run_folder,
        resume="allow",  # W&B keeps the rows that it has and ignores them when they come again
    )
    return Tracker(
        lambda step, numbers: run.log(numbers, step=step),
        lambda failed: run.finish(exit_code=int(failed)),
    )


def _trackio(recipe: Recipe, config: DeepDeltaConfig, start: int) -> Tracker:
    import trackio

    name = _identity("trackio", recipe, start)
    # Resuming, Trackio appends, and would show twice what is trained again after a checkpoint. So
    # the run is written anew, with the rows that stayed.
    with contextlib.suppress(ValueError):  # no project here: it is new, or in a Space
        for earlier in trackio.Api().runs(PROJECT):
            if earlier.name == name:
                earlier.delete()
    run = trackio.init(PROJECT, name=name, config=_choices(recipe, config))
    for row in read_metrics(recipe.run_folder / "metrics.jsonl"):
        run.log(_numbers(row), step=row["step"])
    return Tracker(
        lambda step, numbers: run.log(numbers, step=step), lambda failed: trackio.finish()
    )


OPEN = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}


def _identity(tracker: str, recipe: Recipe, start: int) -> str:
    """By what a tracker knows the run: made when it begins, kept in its folder for its resumes."""
    path = recipe.run_folder / f"{tracker}.id"
    if not start or not path.is_file():
        unique = secrets.token_hex(4)
        label = recipe.label.replace("/", "-")
        path.write_text(f"{label}-seed-{recipe.seed}-{unique}\n", encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


def _choices(recipe: Recipe, config: DeepDeltaConfig) -> dict[str, object]:
    return {**dataclasses.asdict(recipe), "model": config.to_dict()}


def _numbers(row: Row) -> dict[str, float]:
    return {name: value for name, value in row.items() if name != "step"}


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _warn(text: str) -> None:
    print(f"ddl: {text}", file=sys.stderr)
