"""How fast the arms train, measured in turn on one device: runs at different times are no measure.

Clocks, temperatures and neighbours change a device's speed from minute to minute. So each arm is
timed beside the baseline, a few steps of one and then of the other; two models at a time, since all
need not fit into the memory.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from deep_delta.accounting import PeakMemory
from deep_delta.bench.subject import graphs_apart
from deep_delta.checkpoint import quiet_transformers
from deep_delta.data import PackedSequences, TokenShards
from deep_delta.report.provenance import hardware
from deep_delta.train import Recipe, model_config
from deep_delta.train.devices import find_devices
from deep_delta.train.loop import Loop
from deep_delta.train.metrics import Metrics
from deep_delta.train.model import build_model, cross_entropy
from deep_delta.train.processes import of_torchrun
from deep_delta.train.progress import ProgressLine
from deep_delta.train.texts import find_data

ROUNDS = 5
STEADY = 0.05  # the middle rounds of an arm may differ by so much of their median
SECONDS = {"cuda": 20.0, "cpu": 4.0}  # all timed steps together, where a round is not one long step


def measure_speed(recipes: Mapping[str, Recipe], baseline: str | None) -> dict[str, Any] | None:
    """Tokens a second of each recipe's training steps, and their ratios to the baseline's.

    The steps are those of `train`, with its data, batch, precision, compilation and CUDA graphs;
    nothing is logged, evaluated or saved, and the run folders are left alone.

    Args:
        recipes: by the names of their arms.
        baseline: one of these names; None for no ratios.

    Returns:
        "hardware"; "steady", whether the rounds of every arm, without the fastest and the slowest,
        differ by STEADY at most (what disturbs one of five does no harm); "arms", by name:
        "tokens_per_s" (median over the rounds), "ratio" (likewise; None where it is not
        steady), "low" and "high" (of the ratios). None under torchrun, and with a line on stderr
        where two models at once do not fit on the GPU.

    Raises:
        UserError: what `train` raises before its first step.
    """
    if of_torchrun():
        return None
    quiet_transformers()
    others = [name for name in recipes if name != baseline]
    groups = [[name] if baseline is None else [baseline, name] for name in others]
    speeds: dict[str, list[float]] = {name: [] for name in recipes}
    ratios: dict[str, list[float]] = {}
    arms: dict[str, _Arm] = {}
    with tempfile.TemporaryDirectory() as folder, graphs_apart():
        torch.compiler.reset()
        try:
            for group in groups or [list(recipes)]:
                arms |= {
                    name: _Arm(recipes[name], Path(folder)) for name in group if name not in arms
                }
                rounds = _rounds([arms[name] for name in group], max(1, len(groups)))
                for name, own in zip(group, zip(*rounds, strict=True), strict=True):
                    speeds[name] += own
                if len(group) == 2:
                    ratios[group[1]] = [speed / of for of, speed in rounds]
                arms.pop(group[-1]).release()
        except torch.OutOfMemoryError:
            print("ddl: speeds are not compared: two models do not fit at once", file=sys.stderr)
            return None
        finally:
            for arm in arms.values():
                arm.release()
            torch.compiler.reset()
    steady = all(_spread(ratios.get(name, speeds[name])) <= STEADY for name in others or recipes)
    if baseline is not None:
        ratios[baseline] = [1.0]
    return {
        "hardware": hardware(),
        "steady": steady,
        "arms": {
            name: {
                "tokens_per_s": statistics.median(speeds[name]),
                "ratio": statistics.median(ratios[name]) if steady and name in ratios else None,
                "low": min(ratios[name]) if name in ratios else None,
                "high": max(ratios[name]) if name in ratios else None,
            }
            for name in recipes
        },
    }


def _spread(values: list[float]) -> float:
    middle = sorted(values)[1:-1]
    return (middle[-1] - middle[0]) / statistics.median(values)


class _Arm:
    """A recipe's loop, ready for its first step."""

    def __init__(self, recipe: Recipe, folder: Path):
        config, devices = model_config(recipe), find_devices(recipe)
        # The trainings have checked its hashes.
        shards = TokenShards.open(find_data(recipe), "train", verify=False)
        data = PackedSequences(shards, recipe.seq_len, mask_documents=recipe.mask_documents)
        self.tokens = recipe.batch_size * recipe.seq_len
        metrics = Metrics(
            folder / "metrics.jsonl",
            tokens_per_step=self.tokens,
            flops_per_token=0.0,
            resumed_at=0,
            devices=1,
            memory=PeakMemory(),
            progress=ProgressLine(recipe.label, recipe.steps),
            also=lambda row: None,
        )
        loss = cross_entropy(recipe, devices.device)
        model = build_model(recipe, config, devices.device, loss)
        self.loop = Loop(recipe, devices, model, data, data, metrics)  # nothing is evaluated
        if recipe.cuda_graphs:
            self.loop.capture()
        self.seconds(1)  # the optimizer makes its state
        self.step_seconds = self.seconds(1)

    def seconds(self, steps: int) -> float:
        """How long the first steps of the training take, from where the weights are."""
        self.loop.step = 0  # the same sequences and rates in every round
        self._wait()
        begun = time.perf_counter()
        for _ in range(steps):
            self.loop.train_step()
        self._wait()
        seconds = time.perf_counter() - begun
        self.loop.passes, self.loop.norms = [], []
        return seconds

    def release(self) -> None:
        """Give the memory back."""
        accelerator = self.loop.devices.accelerator
        del self.loop
        accelerator.free_memory()  # collects what is in cycles, too

    def _wait(self) -> None:
        if self.loop.devices.device.type == "cuda":
            torch.cuda.synchronize()


def _rounds(arms: list[_Arm], groups: int) -> list[list[float]]:
    """Tokens a second of each arm in each round; every other round goes backwards.

    groups: how many like this one share the time.
    """
    longest = max(arm.step_seconds for arm in arms)
    time_each = SECONDS["cuda" if torch.cuda.is_available() else "cpu"] / groups
    steps = max(1, int(time_each / (ROUNDS * len(arms) * longest)))
    found = []
    for number in range(ROUNDS):
        direction = 1 if number % 2 == 0 else -1
        speeds = [steps * arm.tokens / arm.seconds(steps) for arm in arms[::direction]]
        found.append(speeds[::direction])
    return found
