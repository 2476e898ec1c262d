"""Stopping and going on: the run ends as if nothing had happened, and nothing is lost."""

import dataclasses
import errno
import hashlib
import itertools
import json
import os
import pathlib
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file
from train.micro import (
    equal_weights,
    losses,
    micro_recipe,
    rows_of,
    some_text,
    user_error,
    weights,
)

from deep_delta.data import prepare
from deep_delta.train import Interrupted, load_recipe, read_result, train
from deep_delta.train.checkpoint import fault
from deep_delta.train.folder import Hold
from deep_delta.train.recipe import save_recipe
from deep_delta_cli import main


@pytest.fixture(scope="module")
def whole(micro_data, tmp_path_factory):
    """The folder of a run of 6 steps that was never stopped."""
    recipe = micro_recipe(micro_data, tmp_path_factory.mktemp("whole"))
    train(recipe)
    return recipe.run_folder


def same_run(folder, whole):
    """The same rows, none of them twice and none missing, and the same weights."""
    assert losses(folder) == losses(whole)
    for row, after in itertools.pairwise(rows_of(folder, "loss")):
        # The seconds go on too, so that speeds agree with them; they are rounded to 0.1 ms.
        tokens, seconds = after["tokens"] - row["tokens"], after["seconds"] - row["seconds"]
        assert tokens / after["tokens_per_s"] == pytest.approx(seconds, abs=2e-4)
    equal_weights(folder, whole)


def crash():
    raise RuntimeError("the machine is gone")


def press_ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


def preempt():
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)  # schedulers send it to a job's every process, or again


# Checkpoints are at 2 and 4; 6 steps; log rows after the checkpoint are written before the crash.
@pytest.mark.parametrize("crash_at", [2, 3, 4, 6])
def test_a_crashed_run_goes_on_from_its_checkpoint(micro_data, tmp_path, at_pass, whole, crash_at):
    recipe = micro_recipe(micro_data, tmp_path, save_every=2)
    at_pass(crash_at, crash)
    with pytest.raises(RuntimeError, match="gone"):
        train(recipe)
    assert len(rows_of(recipe.run_folder, "loss")) == crash_at - 1
    train(recipe)
    same_run(recipe.run_folder, whole)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("spoil", "name", "reason"),
    [
        (cut, "optimizer.pt", "bytes instead of"),
        (flip, "model.safetensors", "model.safetensors is corrupt"),
        (pathlib.Path.unlink, "config.json", "it has no config.json"),
        (pathlib.Path.unlink, "contents.json", "it has no contents.json"),
        (cut, "contents.json", "cannot be read"),
    ],
    ids=["cut", "flipped", "missing", "without contents", "cut contents"],
)
def test_a_broken_checkpoint_is_put_aside_for_the_one_before(
    micro_data, tmp_path, at_pass, whole, capsys, spoil, name, reason
):
    recipe = micro_recipe(micro_data, tmp_path, save_every=2)
    at_pass(6, crash)
    with pytest.raises(RuntimeError, match="gone"):
        train(recipe)
    folder = recipe.run_folder
    if name == "contents.json" and spoil is cut:
        (folder / "checkpoint-4" / name).write_text("{")
    else:
        spoil(folder / "checkpoint-4" / name)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "los')
    train(recipe)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "not whole" in line]
    assert line.startswith(f"ddl: {folder / 'checkpoint-4'} is not whole (")
    assert reason in line
    assert (folder / "broken-checkpoint-4").is_dir()
    same_run(folder, whole)


@pytest.mark.parametrize("told_by", ["system", "torch"])
def test_a_full_disk_while_saving_leaves_the_checkpoint_before(
    micro_data, tmp_path, monkeypatch, whole, told_by
):
    save = torch.save

    def full(value, path, *rest):
        if "checkpoint-4" in str(path):
            pathlib.Path(path).write_bytes(b"half of it")
            if told_by == "torch":  # whose error names no disk
                save(value, "/dev/full")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(value, path, *rest)

    recipe = micro_recipe(micro_data, tmp_path, save_every=2)
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        train(recipe)
    monkeypatch.undo()
    names = {path.name for path in recipe.run_folder.iterdir() if path.is_dir()}
    assert names == {"checkpoint-2", "tensorboard"}
    assert fault(recipe.run_folder / "checkpoint-2") is None
    train(recipe)
    same_run(recipe.run_folder, whole)


class Planted:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path(self.path),)


def test_nothing_in_a_checkpoint_is_executed(micro_data, tmp_path, at_pass):
    recipe = micro_recipe(micro_data, tmp_path, save_every=2)
    at_pass(4, crash)
    with pytest.raises(RuntimeError, match="gone"):
        train(recipe)
    checkpoint = recipe.run_folder / "checkpoint-2"
    name = "optimizer.pt"
    torch.save({"state": Planted(tmp_path / "executed")}, checkpoint / name)
    contents = json.loads((checkpoint / "contents.json").read_text())
    data = (checkpoint / name).read_bytes()
    contents[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (checkpoint / "contents.json").write_text(json.dumps(contents))
    assert str(checkpoint) in user_error(train, recipe)
    assert not (tmp_path / "executed").exists()


def close_terminal():
    os.kill(os.getpid(), signal.SIGHUP)


@pytest.mark.parametrize("fields", [{}, {"micro_batch_size": 2}], ids=["one pass", "two passes"])
@pytest.mark.parametrize(
    ("stop", "number"),
    [
        (press_ctrl_c, signal.SIGINT),
        (preempt, signal.SIGTERM),
        (close_terminal, signal.SIGHUP),
    ],
)
def test_a_signal_saves_and_the_same_call_goes_on(
    micro_data, tmp_path, at_pass, whole, stop, number, fields
):
    recipe = micro_recipe(micro_data, tmp_path, **fields)
    before = signal.getsignal(number)
    at_pass(4 * (1 if not fields else 2), stop)
    with pytest.raises(Interrupted) as stopped:
        train(recipe)
    assert stopped.value.signal == number
    assert signal.getsignal(number) is before
    assert [path.name for path in recipe.run_folder.glob("checkpoint-*")] == ["checkpoint-4"]
    assert not (recipe.run_folder / "result.json").exists()
    train(recipe)
    if not fields:
        same_run(recipe.run_folder, whole)
    assert [row["step"] for row in rows_of(recipe.run_folder, "loss")] == [1, 2, 3, 4, 5, 6]


def test_a_closed_terminal_does_not_stop_what_was_told_to_go_on(micro_data, tmp_path, at_pass):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        at_pass(3, close_terminal)
        assert train(micro_recipe(micro_data, tmp_path)).tokens == 6 * 4 * 16
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    "fields",
    [
        {"micro_batch_size": 2},
        {"gradient_checkpointing": True},
        {"model": {"rebuild": "memory"}},
        {"model": {"backend": "reference"}},
    ],
    ids=str,
)
def test_what_only_reorders_sums_may_change(micro_data, tmp_path, at_pass, whole, fields):
    at_pass(5, press_ctrl_c)
    with pytest.raises(Interrupted):
        train(micro_recipe(micro_data, tmp_path))
    recipe = micro_recipe(micro_data, tmp_path, **fields)
    train(recipe)
    for row, other in zip(losses(recipe.run_folder), losses(whole), strict=True):
        assert row[:2] == other[:2]
        assert row[2] == pytest.approx(other[2], abs=1e-5)
    assert load_recipe(recipe.run_folder / "recipe.yaml") == recipe


def test_what_would_start_over_is_not_advised(micro_data, tmp_path, at_pass, capsys):
    save_recipe(micro_recipe(micro_data, tmp_path, resume="never"), tmp_path / "recipe.yaml")
    at_pass(3, press_ctrl_c)
    assert main(["train", str(tmp_path / "recipe.yaml")]) == 128 + signal.SIGINT
    assert "the same command without --resume never goes on" in capsys.readouterr().err


def test_a_second_ctrl_c_ends_the_run_at_once(micro_data, tmp_path, at_pass):
    def twice():
        press_ctrl_c()
        press_ctrl_c()

    recipe = micro_recipe(micro_data, tmp_path)
    at_pass(3, twice)
    with pytest.raises(KeyboardInterrupt):
        train(recipe)
    assert len(rows_of(recipe.run_folder, "loss")) == 2


def test_ctrl_c_in_the_last_step_is_not_lost(micro_data, tmp_path, at_pass, whole):
    """A comparison would otherwise go on with its next run."""
    recipe = micro_recipe(micro_data, tmp_path)
    at_pass(6, press_ctrl_c)
    with pytest.raises((Interrupted, KeyboardInterrupt)):
        train(recipe)
    train(recipe)
    same_run(recipe.run_folder, whole)


def test_resume_from_a_path(micro_data, tmp_path, whole):
    first = micro_recipe(micro_data, tmp_path / "first", save_every=2)
    train(first)
    checkpoint = first.run_folder / "checkpoint-4"
    second = micro_recipe(micro_data, tmp_path / "second", resume=str(checkpoint))
    train(second)
    equal_weights(second.run_folder, whole)
    assert [row[:2] for row in losses(second.run_folder)] == [
        (5, "loss"), (6, "loss"), (6, "val_loss"),
    ]  # fmt: skip
    assert losses(second.run_folder) == losses(whole)[-3:]


def test_a_run_from_a_path_goes_on_by_the_same_command(micro_data, tmp_path, at_pass, whole):
    first = micro_recipe(micro_data, tmp_path / "first", save_every=2, keep_checkpoints=3)
    train(first)
    start = first.run_folder / "checkpoint-2"
    second = micro_recipe(micro_data, tmp_path / "second", resume=str(start))
    at_pass(3, press_ctrl_c)
    with pytest.raises(Interrupted):
        train(second)
    shutil.rmtree(start)  # as the run has begun, it is no longer needed
    for _ in range(2):
        train(second)
        assert losses(second.run_folder) == [row for row in losses(whole) if row[0] > 2]
        equal_weights(second.run_folder, whole)


@pytest.mark.slow
def test_from_a_path_other_checkpoints_are_not_taken(micro_data, tmp_path, at_pass, whole, capsys):
    """Neither those of another beginning nor, back in the same folder, the later ones."""
    recipe = micro_recipe(micro_data, tmp_path / "run", save_every=1, keep_checkpoints=4)
    at_pass(6, crash)
    with pytest.raises(RuntimeError, match="gone"):
        train(recipe)
    other = micro_recipe(micro_data, tmp_path / "other", save_every=2, keep_checkpoints=3)
    train(other)
    back = recipe.run_folder / "checkpoint-2"
    for start, aside in ((back, {3, 4, 5}), (other.run_folder / "checkpoint-2", {2, 3, 4})):
        at_pass(3, crash)
        again = dataclasses.replace(recipe, resume=str(start))
        with pytest.raises(RuntimeError, match="gone"):
            train(again)
        names = {f"other-checkpoint-{step}" for step in aside}
        assert names <= {path.name for path in recipe.run_folder.iterdir()}
        assert names == {
            line.split()[-1] for line in capsys.readouterr().err.splitlines() if "aside" in line
        }
    train(again)
    same_run(recipe.run_folder, whole)


def test_another_rate_counts_from_a_path(micro_data, tmp_path):
    """Weights, moments and the place in the schedule come with it, the rest is the recipe's."""
    first = micro_recipe(micro_data, tmp_path / "first", save_every=2)
    train(first)
    start = str(first.run_folder / "checkpoint-4")
    second = micro_recipe(micro_data, tmp_path / "second", resume=start, lr=first.lr / 2)
    train(second)
    rates = {row["step"]: row["lr"] for row in rows_of(first.run_folder, "lr")}
    for row in rows_of(second.run_folder, "lr"):
        assert row["lr"] == pytest.approx(rates[row["step"]] / 2)
    moved, expected = (weights(recipe.run_folder) for recipe in (second, first))
    assert any(not torch.equal(tensor, expected[name]) for name, tensor in moved.items())


def test_the_speed_counts_from_the_checkpoint(micro_data, tmp_path):
    """Also where the rest of the run is a single row."""
    first = micro_recipe(micro_data, tmp_path / "first", save_every=4)
    train(first)
    start = str(first.run_folder / "checkpoint-4")
    second = micro_recipe(micro_data, tmp_path / "second", resume=start, log_every=9, eval_every=6)
    result = train(second)
    (row,) = rows_of(second.run_folder, "loss")
    assert row["step"] == 6
    assert result.tokens_per_s == row["tokens_per_s"]
    assert result.tokens_per_s == pytest.approx(2 * 4 * 16 / row["seconds"], rel=1e-2)


@pytest.mark.parametrize("before", [True, False])
def test_other_parameter_groups_go_on_from_a_path(micro_data, tmp_path, before):
    """Without decay decay_residual only sorts parameters, so that nothing else may change."""
    wide = {"mup_base_width": 8}
    fields = {"weight_decay": 0.0, "model": wide, "decay_residual": before}
    first = micro_recipe(micro_data, tmp_path / "first", save_every=4, **fields)
    train(first)
    fields |= {"resume": str(first.run_folder / "checkpoint-4"), "decay_residual": not before}
    second = micro_recipe(micro_data, tmp_path / "second", **fields)
    train(second)
    assert losses(second.run_folder) == losses(first.run_folder)[-3:]
    equal_weights(second.run_folder, first.run_folder)


@pytest.mark.parametrize(
    "kind", ["missing", "empty", "without weights", "not numbered", "another variant", "later step"]
)
def test_what_is_not_a_checkpoint_of_this_run_is_one_line(micro_data, tmp_path, kind):
    variant = "additive" if kind == "another variant" else "ddl-cc"
    other = micro_recipe(micro_data, tmp_path / "other", variant=variant, save_every=2)
    train(other)
    checkpoint = other.run_folder / "checkpoint-4"
    if kind == "missing":
        checkpoint = checkpoint.with_name("checkpoint-7")
    elif kind == "empty":
        shutil.rmtree(checkpoint)
        checkpoint.mkdir()
    elif kind == "without weights":
        (checkpoint / "model.safetensors").unlink()
    elif kind == "not numbered":
        checkpoint = checkpoint.rename(tmp_path / "mine")
    steps = 3 if kind == "later step" else 6
    recipe = micro_recipe(micro_data, tmp_path / "run", resume=str(checkpoint), steps=steps)
    assert str(checkpoint) in user_error(train, recipe)
    assert not (recipe.run_folder / "result.json").exists()


def test_a_checkpoint_of_another_data_order_is_refused(micro_data, tmp_path, at_pass):
    """Those of versions that trained by transformers' Trainer do not say theirs."""
    recipe = micro_recipe(micro_data, tmp_path)
    at_pass(4, press_ctrl_c)
    with pytest.raises(Interrupted):
        train(recipe)
    checkpoint = recipe.run_folder / "checkpoint-4"
    contents = json.loads((checkpoint / "contents.json").read_text())
    (checkpoint / "data_order.json").unlink()
    del contents["data_order.json"]
    (checkpoint / "contents.json").write_text(json.dumps(contents))
    for start in ("auto", str(checkpoint)):
        line = user_error(train, dataclasses.replace(recipe, resume=start))
        assert f"{checkpoint} was left by another version" in line
    assert checkpoint.is_dir()


def test_other_batches_from_a_path_are_refused(micro_data, tmp_path):
    """A checkpoint's step is its place in the data."""
    first = micro_recipe(micro_data, tmp_path / "first", save_every=3)
    train(first)
    start = str(first.run_folder / "checkpoint-3")
    other = micro_recipe(micro_data, tmp_path / "second", resume=start, batch_size=8)
    line = user_error(train, other)
    assert f"{start} is of batches of 4 × 16 tokens, the recipe's are 8 × 16" in line
    train(dataclasses.replace(other, batch_size=4, micro_batch_size=1))


def test_a_folder_is_trained_in_by_one_at_a_time(micro_data, tmp_path):
    recipe = micro_recipe(micro_data, tmp_path)
    with Hold(recipe.run_folder) as other:
        other.take()
        assert user_error(train, recipe) == (
            f"{recipe.run_folder} is being trained by another process: wait for its end, or choose "
            "another --out"
        )
        assert not recipe.run_folder.exists()
    train(recipe)


@pytest.mark.slow
def test_resume_never_starts_over_and_keeps_the_earlier_run(micro_data, tmp_path, whole):
    recipe = micro_recipe(micro_data, tmp_path, save_every=2)
    train(recipe)
    for number in (1, 2):
        marker = recipe.run_folder / f"mark-{number}"
        marker.touch()
        train(micro_recipe(micro_data, tmp_path, resume="never"))
        same_run(recipe.run_folder, whole)
        aside = recipe.run_folder.with_name(f"seed-0.old-{number}")
        assert (aside / marker.name).exists()
        same_run(aside, whole)


def test_a_finished_run_is_not_trained_again(micro_data, tmp_path, at_pass):
    recipe = micro_recipe(micro_data, tmp_path)
    result = train(recipe)
    files = {path: path.stat().st_mtime_ns for path in recipe.run_folder.rglob("*.js*")}
    at_pass(1, crash)
    assert train(recipe) == result
    assert {path: path.stat().st_mtime_ns for path in files} == files


def test_a_checkpoint_of_the_last_step_only_needs_its_end(micro_data, tmp_path):
    """What is left when a run is killed while it saves its final model."""
    recipe = micro_recipe(micro_data, tmp_path, save_every=3)
    result = train(recipe)
    before = (recipe.run_folder / "metrics.jsonl").read_text()
    final = load_file(recipe.run_folder / "final" / "model.safetensors")
    shutil.rmtree(recipe.run_folder / "final")
    (recipe.run_folder / "result.json").unlink()
    again = train(recipe)
    assert (again.val_loss, again.tokens) == (result.val_loss, result.tokens)
    assert (recipe.run_folder / "metrics.jsonl").read_text() == before
    saved = load_file(recipe.run_folder / "final" / "model.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in final.items())


def test_other_data_under_the_same_path_is_refused(micro_data, tmp_path):
    shards = tmp_path / "shards"
    shutil.copytree(micro_data, shards)
    recipe = micro_recipe(shards, tmp_path)
    train(recipe)
    moved = tmp_path / "moved"
    shards.rename(moved)
    assert train(dataclasses.replace(recipe, data=str(moved))) == read_result(recipe.run_folder)
    source = tmp_path / "other.jsonl"
    lines = [json.dumps({"text": some_text(40, seed)}) for seed in range(100, 160)]
    source.write_text("\n".join(lines) + "\n")
    prepare([str(source)], shards, val_fraction=0.25)
    assert "other data" in user_error(train, recipe)


def test_a_resumed_run_keeps_the_intervals_it_is_given(micro_data, tmp_path):
    recipe = micro_recipe(micro_data, tmp_path, save_every=2, eval_every=6)
    train(recipe)
    for name in ("checkpoint-6", "final"):
        shutil.rmtree(recipe.run_folder / name)
    (recipe.run_folder / "result.json").unlink()
    train(dataclasses.replace(recipe, eval_every=1))
    assert [row["step"] for row in rows_of(recipe.run_folder, "val_loss")] == [5, 6]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"steps": 8}, "steps: 6 -> 8"),
        ({"lr": 0.1}, "lr: 0.003 -> 0.1"),
        ({"model": {"head_dim": 8}}, "head_dim"),
        ({"compile": True}, "compile: False -> True"),  # it rounds otherwise
    ],
)
def test_another_recipe_in_the_same_folder_is_refused(micro_data, tmp_path, fields, named):
    recipe = micro_recipe(micro_data, tmp_path)
    train(recipe)
    before = json.loads((recipe.run_folder / "result.json").read_text())
    message = user_error(train, micro_recipe(micro_data, tmp_path, **fields))
    assert named in message
    assert str(recipe.run_folder) in message
    assert json.loads((recipe.run_folder / "result.json").read_text()) == before
    assert train(recipe).val_loss == before["val_loss"]


def test_only_the_newest_checkpoints_are_kept(micro_data, tmp_path):
    recipe = micro_recipe(micro_data, tmp_path, save_every=1, keep_checkpoints=2)
    train(recipe)
    names = {path.name for path in recipe.run_folder.glob("checkpoint-*")}
    assert names == {"checkpoint-5", "checkpoint-6"}
