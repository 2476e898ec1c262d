"""Several processes train the model that one would: same data, same losses, same checkpoints."""

import contextlib
import errno
import functools
import hashlib
import io
import json
import os
import signal
import time
from datetime import timedelta

import pytest
import torch
from accelerate.state import AcceleratorState, DistributedType
from helpers import close
from safetensors.torch import load_file
from torch import distributed as dist
from train.group import together
from train.micro import losses, micro_recipe, rows_of, some_text, user_error, weights

from deep_delta.compare import compare, make_study
from deep_delta.compare import run as compare_run
from deep_delta.data import prepare, shards
from deep_delta.errors import UserError
from deep_delta.train import Interrupted, devices, processes, train
from deep_delta.train.loop import Loop
from deep_delta.train.processes import Agreement, everyones, is_main, leave, on_main
from deep_delta.train.recipe import save_recipe
from deep_delta_cli import main

pytestmark = pytest.mark.skipif(
    torch.cuda.device_count() == 1, reason="needs a CPU alone, or two GPUs"
)
FIELDS = {
    "steps": 20, "eval_every": 10, "eval_sequences": 7, "save_every": 10, "precision": "fp32",
}  # fmt: skip


def watched(recipe, action=None):
    """Train; the wrapper's name, and the sequences of every pass. `action` runs before each."""
    wrappers, passes = set(), []
    one_pass, step = Loop.forward_backward, Loop.train_step

    def forward_backward(self, batch, count):
        wrappers.add(type(self.model).__name__)
        if action is not None:
            action(self)
        return one_pass(self, batch, count)

    def train_step(self):
        found = step(self)
        passes.extend((at, numbers) for at, numbers, _ in self.passes if at == self.step)
        return found

    Loop.forward_backward, Loop.train_step = forward_backward, train_step
    try:
        train(recipe)
    except (UserError, Interrupted) as stop:
        return type(stop).__name__, str(stop), passes
    finally:
        Loop.forward_backward, Loop.train_step = one_pass, step
    return wrappers, passes


@pytest.fixture(scope="module")
def alone(micro_data, tmp_path_factory):
    """The run of one process, and the sequences of each of its steps."""
    recipe = micro_recipe(micro_data, tmp_path_factory.mktemp("alone"), **FIELDS)
    _, passes = watched(recipe)
    return recipe.run_folder, dict(passes)


def same_curve(folder, expected, atol=1e-5):
    actual, expected = losses(folder), losses(expected)
    assert [row[:2] for row in actual] == [row[:2] for row in expected]
    for (step, kind, value), (_, _, other) in zip(actual, expected, strict=True):
        assert value == pytest.approx(other, abs=atol), f"{kind} at step {step}"


def same_end(folder, expected):
    same_curve(folder, expected)
    actual, expected = weights(folder), weights(expected)
    for name, tensor in actual.items():
        close(tensor, expected[name], 1e-4)


@pytest.mark.parametrize(
    "micro", [None, pytest.param(1, marks=pytest.mark.slow)], ids=["one pass", "two passes"]
)
def test_two_processes_train_as_one(micro_data, tmp_path, alone, micro):
    recipe = micro_recipe(micro_data, tmp_path, micro_batch_size=micro, **FIELDS)
    (wrappers, first), (_, second) = together(watched, recipe)
    assert wrappers == {"DistributedDataParallel"}
    folder, sequences = alone
    same_end(recipe.run_folder, folder)
    for step, expected in sequences.items():
        ours, theirs = (
            [number for at, numbers in passes if at == step for number in numbers]
            for passes in (first, second)
        )
        assert len(ours) == len(theirs) == len(expected) / 2
        assert sorted(ours + theirs) == sorted(expected)


def sharded(recipe):
    """Train by FSDP2 on a CPU, which accelerate has no way to ask for: it would take DDP."""
    begin = AcceleratorState.__init__

    def begin_sharded(self, *arguments, fsdp_plugin=None, **options):
        begin(self, *arguments, fsdp_plugin=fsdp_plugin, **options)
        self.fsdp_plugin = fsdp_plugin or self.fsdp_plugin
        self.distributed_type = DistributedType.FSDP

    AcceleratorState.__init__ = begin_sharded
    return asking_for_shards(recipe)


def asking_for_shards(recipe):
    devices.can_shard = lambda devices: True
    return watched(recipe)


def quickly_compiled(recipe):
    """Tracing and guards as ever, without generating code."""
    torch.compile = functools.partial(torch.compile, backend="aot_eager")
    return sharded(recipe) if recipe.parallel == "fsdp2" else watched(recipe)


@pytest.mark.parametrize("variant", ["ddl-cc", "ddl-tc"])
@pytest.mark.slow
def test_two_processes_with_shards_train_as_one(micro_data, tmp_path, variant):
    recipe = micro_recipe(micro_data, tmp_path / "alone", variant=variant, **FIELDS)
    train(recipe)
    shards = micro_recipe(
        micro_data, tmp_path / "shards", variant=variant, parallel="fsdp2", **FIELDS
    )
    (wrappers, _), _ = together(sharded, shards)
    assert wrappers == {"FSDPDeepDeltaForCausalLM"}
    same_end(shards.run_folder, recipe.run_folder)
    saved = {path.name for path in (shards.run_folder / "checkpoint-20").iterdir()}
    assert saved == {
        "config.json", "generation_config.json", "model.safetensors", "optimizer.pt",
        "data_order.json", "contents.json",
    }  # fmt: skip
    expected = load_file(recipe.run_folder / "final" / "model.safetensors")
    assert load_file(shards.run_folder / "final" / "model.safetensors").keys() == expected.keys()
    # From its checkpoint two go on in shards, and one goes on by itself.
    start = str(shards.run_folder / "checkpoint-10")
    tail = [row for row in losses(recipe.run_folder) if row[0] > 10]
    for parallel, go_on in (("fsdp2", sharded), ("ddp", None)):
        rest = micro_recipe(
            micro_data, tmp_path / parallel, variant=variant, parallel=parallel, resume=start,
            **FIELDS,
        )  # fmt: skip
        together(go_on, rest) if go_on else train(rest)
        assert losses(rest.run_folder) == [
            (step, kind, pytest.approx(value, abs=1e-5)) for step, kind, value in tail
        ]


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_compiled_layers_train_alike(micro_data, tmp_path, alone, parallel):
    recipe = micro_recipe(micro_data, tmp_path, compile=True, parallel=parallel, **FIELDS)
    together(quickly_compiled, recipe)
    same_end(recipe.run_folder, alone[0])


@pytest.mark.skipif(torch.cuda.is_available(), reason="GPUs can do what is asked for here")
def test_another_wrapper_than_the_recipes_is_refused(micro_data, tmp_path):
    """As accelerate would take one on a CPU without a word."""
    recipe = micro_recipe(micro_data, tmp_path, parallel="fsdp2", **FIELDS)
    assert "torchrun" in user_error(train, recipe)
    for kind, line, _ in together(asking_for_shards, recipe):
        assert kind == "UserError"
        assert "parallel: fsdp2" in line
        assert "DistributedDataParallel" in line


@pytest.mark.slow
def test_a_comparison_is_reported_once(micro_data, tmp_path):
    recipe = micro_recipe(micro_data, tmp_path)
    study = make_study(recipe, {"arms": ["additive", "ddl-cc"], "seeds": [0]})
    first, second = together(compare, study, "ddl compare")
    assert first == second == json.loads((tmp_path / "summary.json").read_text())
    assert (tmp_path / "report.html").is_file()


def preempt_second(loop):
    if loop.step == 12 and not is_main():
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.slow
def test_a_signal_in_one_stops_all_and_any_number_goes_on(micro_data, tmp_path, alone):
    recipe = micro_recipe(micro_data, tmp_path, **FIELDS)
    stops = together(watched, recipe, preempt_second)
    assert {stop[0] for stop in stops} == {"Interrupted"}
    assert (recipe.run_folder / "checkpoint-13").is_dir()
    train(recipe)  # by one process
    same_end(recipe.run_folder, alone[0])


@pytest.mark.slow
def test_two_go_on_from_a_checkpoint_of_one(micro_data, tmp_path, alone):
    start = alone[0] / "checkpoint-10"
    recipe = micro_recipe(micro_data, tmp_path, resume=str(start), **FIELDS)
    together(watched, recipe)
    same = [row for row in losses(alone[0]) if row[0] > 10]
    assert losses(recipe.run_folder) == [
        (step, kind, pytest.approx(value, abs=1e-5)) for step, kind, value in same
    ]


def kill_second(loop):
    if loop.step == 12 and not is_main():
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_dead_process_ends_the_others_and_restart_goes_on(micro_data, tmp_path, alone):
    recipe = micro_recipe(micro_data, tmp_path, **FIELDS)
    began = time.monotonic()
    (kind, line, _), dead = together(watched, recipe, kill_second)
    assert time.monotonic() - began < 60
    assert (kind, dead) == ("LostProcess", None)
    assert line.startswith("rank 0 stops, because another process of this run is gone")
    together(watched, recipe)
    same_end(recipe.run_folder, alone[0])


def poison_second(loop):
    if loop.step == 2 and not is_main():
        with torch.no_grad():
            loop.bare.model.norm.weight.fill_(float("nan"))


@pytest.mark.slow
def test_a_loss_that_is_no_number_in_one_stops_all(micro_data, tmp_path, alone):
    recipe = micro_recipe(micro_data, tmp_path, **FIELDS)
    stops = together(watched, recipe, poison_second)
    assert {stop[0] for stop in stops} == {"Diverged"}
    assert stops[0][1] == stops[1][1]
    report = json.loads((recipe.run_folder / "diverged.json").read_text())
    assert report["step"] == 3
    assert sorted(place["sequence"] for place in report["sequences"]) == sorted(alone[1][3])
    assert [row["loss"] is None for row in rows_of(recipe.run_folder, "loss")] == [0, 0, 1]
    assert "diverged" in json.loads((recipe.run_folder / "result.json").read_text())


def refused(recipe):
    return user_error(train, recipe)


def test_what_the_main_process_refuses_all_refuse(micro_data, tmp_path, alone):
    recipe = micro_recipe(micro_data, alone[0].parent.parent, **{**FIELDS, "steps": 25})
    first, second = together(refused, recipe)
    assert first == second
    assert "steps: 20 -> 25" in first


def misuse_gpu(loop):
    if loop.step == 2 and not is_main():
        raise dist.DistBackendError("NCCL error:\nDuplicate GPU detected")


@pytest.mark.slow
def test_an_error_of_the_network_layer_is_not_hidden(micro_data, tmp_path):
    recipe = micro_recipe(micro_data, tmp_path, **FIELDS)
    (_, other, _), (_, own, _) = together(watched, recipe, misuse_gpu)
    assert own.endswith(": NCCL error: Duplicate GPU detected")
    assert other.endswith("newest checkpoint")


def silent_second(recipe):
    processes.PATIENCE = timedelta(seconds=2)
    highest = Agreement.highest
    steps = 0

    def late(self, number):
        nonlocal steps
        steps += 1
        if steps == 3 and not is_main():
            time.sleep(6)
        return highest(self, number)

    Agreement.highest = late
    return watched(recipe)


@pytest.mark.slow
def test_a_silent_process_is_given_up(micro_data, tmp_path):
    recipe = micro_recipe(micro_data, tmp_path, **FIELDS)
    (kind, line, _), _ = together(silent_second, recipe)
    assert kind == "LostProcess"
    assert "Timed out waiting" in line


def said(arguments):
    """What this process prints on stderr for a command; the disk is full for the second one."""
    one_pass = Loop.forward_backward

    def forward_backward(self, batch, count):
        if self.step == 2 and not is_main():
            raise OSError(errno.ENOSPC, "No space left on device")
        return one_pass(self, batch, count)

    Loop.forward_backward = forward_backward
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        status = main(arguments)
    return status, [line for line in stderr.getvalue().splitlines() if line.startswith("ddl: ")]


@pytest.mark.slow
def test_what_fails_in_one_process_alone_is_said(micro_data, tmp_path):
    recipe = micro_recipe(micro_data, tmp_path, **FIELDS)
    save_recipe(recipe, tmp_path / "recipe.yaml")
    (_, first), (_, second) = together(said, ["train", str(tmp_path / "recipe.yaml")])
    assert "another process" in "".join(first)
    assert "no disk space left" in "".join(second)


@pytest.mark.slow
def test_what_all_refuse_is_said_once(micro_data, tmp_path, alone):
    recipe = micro_recipe(micro_data, alone[0].parent.parent, **{**FIELDS, "steps": 25})
    save_recipe(recipe, tmp_path / "recipe.yaml")
    (_, first), (_, second) = together(said, ["train", str(tmp_path / "recipe.yaml")])
    assert len(first) == 1
    assert second == []


def ending(recipe):
    return watched(recipe, poison_second)[0], signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.slow
def test_a_comparison_hears_signals_after_a_diverged_run(micro_data, tmp_path):
    recipe = micro_recipe(micro_data, tmp_path, **FIELDS)
    assert together(ending, recipe) == [("Diverged", True)] * 2


def checking(recipe):
    hashed, of_shard = [], shards._hash_and_largest
    shards._hash_and_largest = lambda path, dtype: hashed.append(path.name) or of_shard(path, dtype)
    return user_error(train, recipe), hashed


def test_processes_share_the_check_of_the_data(tmp_path):
    """What one of them finds, all raise."""
    source = tmp_path / "documents.jsonl"
    source.write_text("".join(json.dumps({"text": some_text(30, n)}) + "\n" for n in range(60)))
    data = tmp_path / "data"
    prepare([str(source)], data, val_fraction=0.1, shard_tokens=300)
    path = data / "train-00001.bin"
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    recipe = micro_recipe(data, tmp_path / "out")
    (first, ours), (second, theirs) = together(checking, recipe)
    assert first == second
    assert f"{path} is corrupt" in first
    assert {"train-00000.bin", "train-00002.bin"} <= set(ours)
    assert path.name in theirs
    assert not set(ours) & set(theirs)


def over_hosts():
    from torch.testing._internal.distributed import fake_pg  # its groups send nothing

    dist.Backend.register_backend("mute", fake_pg._create_fake_pg, True, devices=["cpu"])
    dist.init_process_group("mute")
    found = on_main(os.getpid), everyones(dist.get_rank()), Agreement().highest(dist.get_rank())
    leave()
    return found


def test_what_is_said_travels_between_hosts():
    """Whatever the GPUs have among themselves: there, who waits for a lost process waits on."""
    first, second = together(over_hosts)
    assert first == second == (first[0], [0, 1], 1)
    assert isinstance(first[0], int)


def in_two_groups(folder):
    found = []
    for number in range(2):
        meeting = {"init_method": f"file://{folder}/{number}", "rank": int(os.environ["RANK"])}
        dist.init_process_group("gloo", world_size=2, **meeting)
        found.append(everyones(dist.get_rank()))
        dist.destroy_process_group()  # as a program of somebody else's would, without `leave`
    return found


def test_processes_may_meet_in_another_group(tmp_path):
    assert together(in_two_groups, tmp_path) == [[[0, 1], [0, 1]]] * 2


def failing_report(recipe):
    if is_main():
        compare_run._report = None  # calling it is a TypeError
    try:
        compare(make_study(recipe, {"arms": ["additive"], "seeds": [0]}), "ddl compare")
    except (TypeError, UserError) as error:
        return type(error).__name__


@pytest.mark.slow
def test_a_report_that_fails_names_the_lost_process(micro_data, tmp_path):
    assert together(failing_report, micro_recipe(micro_data, tmp_path)) == [
        "TypeError", "LostProcess",
    ]  # fmt: skip


def plain(arguments):
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        main(arguments)
    return stderr.getvalue()


@pytest.mark.slow
def test_a_planted_file_is_said_once(micro_data, tmp_path):
    recipe = micro_recipe(micro_data, tmp_path, **FIELDS)
    together(watched, recipe, preempt_second)
    checkpoint = recipe.run_folder / "checkpoint-13"
    name = "optimizer.pt"
    torch.save({"python": io.StringIO("not numbers")}, checkpoint / name)
    contents = json.loads((checkpoint / "contents.json").read_text())
    data = (checkpoint / name).read_bytes()
    contents[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (checkpoint / "contents.json").write_text(json.dumps(contents))
    save_recipe(recipe, tmp_path / "recipe.yaml")
    first, second = together(plain, ["train", str(tmp_path / "recipe.yaml")])
    assert "more than numbers" in first
    assert "more than numbers" not in second
