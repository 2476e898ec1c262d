"""A run that is killed, or loses its power, ends as if nothing had happened."""

import multiprocessing
import os
import pathlib
import random
import time

import pytest
import torch
from train.micro import equal_weights, losses, micro_recipe

from deep_delta.train import Recipe, train
from deep_delta.train.checkpoint import checkpoints, fault

KILLS = 20
FIELDS = {"steps": 60, "save_every": 2, "keep_checkpoints": 2, "eval_every": 20}


def train_alike(recipe: Recipe, threads: int) -> None:
    """Train as the test's own process does: sums over several threads round differently."""
    torch.set_num_threads(threads)
    train(recipe)


@pytest.mark.slow
def test_twenty_kills_lose_nothing(micro_data, tmp_path):
    whole = micro_recipe(micro_data, tmp_path / "whole", **FIELDS)
    began = time.monotonic()
    train(whole)
    length = time.monotonic() - began
    # Children that start from a server which has loaded everything: most of their time is training.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["deep_delta.train"])
    kills = finished = 0
    random.seed(0)
    while kills < KILLS or not finished:
        recipe = micro_recipe(micro_data, tmp_path / f"run-{finished}", **FIELDS)
        child = context.Process(target=train_alike, args=(recipe, torch.get_num_threads()))
        child.start()
        child.join(random.uniform(0, length) if kills < KILLS else None)
        if child.is_alive():
            child.kill()
            child.join()
            kills += 1
            # Those that are there are whole at any moment, but for one that was being deleted.
            assert [fault(path) for path in checkpoints(recipe.run_folder)[-2:]] in (
                [], [None], [None, None],
            )  # fmt: skip
            continue
        assert child.exitcode == 0
        assert losses(recipe.run_folder) == losses(whole.run_folder)
        equal_weights(recipe.run_folder, whole.run_folder)
        finished += 1


def test_what_a_checkpoint_needs_is_on_the_disk_before_it_is_there(
    micro_data, tmp_path, monkeypatch
):
    """All its files and the rows before it, then the rename, then the folder it is in."""
    events, fsync, rename = [], os.fsync, pathlib.Path.rename

    def recorded_fsync(descriptor):
        events.append(pathlib.Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        return fsync(descriptor)

    def recorded_rename(self, target):
        events.append(("rename", self.name, pathlib.Path(target).name))
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(pathlib.Path, "rename", recorded_rename)
    recipe = micro_recipe(micro_data, tmp_path, save_every=6)
    train(recipe)
    folder = recipe.run_folder
    for staged, name in ((folder / "unfinished" / "checkpoint-6", "checkpoint-6"),
                         (folder / "final.tmp", "final")):  # fmt: skip
        renamed = events.index(("rename", staged.name, name))
        before = set(events[:renamed])
        assert {staged / path.name for path in (folder / name).iterdir()} <= before
        assert {staged, folder / "metrics.jsonl"} <= before
        assert events[renamed + 1] == folder
