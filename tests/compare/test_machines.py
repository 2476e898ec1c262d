"""Many trainings at once: two workers, on made-up devices, train micro runs on the CPU."""

import contextlib
import dataclasses
import os
import signal
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from helpers import REPO
from train.micro import equal_weights, losses, micro_recipe, user_error

from deep_delta.compare import machines
from deep_delta.compare.machines import train_all, visible_devices
from deep_delta.train import Interrupted, read_result, train
from deep_delta.train.folder import RESULT, Hold
from deep_delta.train.recipe import save_recipe

LONG = {"steps": 100_000, "eval_every": 100_000, "log_every": 5}  # until somebody stops it
MEASURED = ("train_seconds", "tokens_per_s", "peak_memory_bytes")


@pytest.fixture
def two_devices(monkeypatch):
    """Two made-up GPUs; no process is left behind, whatever happened."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # sums over several threads round differently
    monkeypatch.setattr(machines, "visible_devices", lambda: ["first", "second"])
    yield
    assert workers() == []


def workers():
    """The worker processes of this one."""
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if "--multiprocessing-fork" in child.cmdline():
                found.append(child)
    return found


def grid(data, out, count=4, **fields):
    """The recipes of `count` runs, two variants in turn."""
    names = [("additive", "ddl-cc")[place % 2] for place in range(count)]
    return [
        micro_recipe(data, out, variant=name, seed=place // 2, **fields)
        for place, name in enumerate(names)
    ]


def logged(recipe):
    """Whether a run has rows: it is in its steps then."""
    return (recipe.run_folder / "metrics.jsonl").exists() and bool(losses(recipe.run_folder))


@contextlib.contextmanager
def meanwhile(condition, action):
    """Another thread does something as soon as a condition holds."""
    done = threading.Event()

    def watch():
        while not done.is_set():
            if condition():
                action()
                return
            time.sleep(0.05)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def figures(result):
    """What must repeat bit by bit."""
    return {k: v for k, v in dataclasses.asdict(result).items() if k not in MEASURED}


def trained_by(recipe):
    """The process that trained a run: TensorBoard's files are named by it."""
    return {path.name.split(".")[-2] for path in recipe.run_folder.rglob("*tfevents*")}


@pytest.fixture
def in_turn(monkeypatch):
    """No GPUs, and quick looks at what others hold."""
    monkeypatch.setattr(machines, "visible_devices", list)
    monkeypatch.setattr(machines, "PATIENCE", 0.2)
    monkeypatch.setattr(machines, "TICK", 0.05)


@pytest.mark.slow
def test_workers_train_what_one_process_would(micro_data, tmp_path, two_devices, monkeypatch):
    recipes = grid(micro_data, tmp_path / "together", 2, steps=3)
    recipes.insert(1, micro_recipe(  # a result like others
        micro_data, tmp_path / "diverges", variant="additive", lr=1e30, clip=1e30, warmup_steps=0,
    ))  # fmt: skip
    together = train_all(recipes)
    pids = [trained_by(recipe) for recipe in recipes]
    assert {len(own) for own in pids} == {1}
    assert len(set.union(*pids)) == 2, "both workers had work, and one of them twice"
    assert str(os.getpid()) not in set.union(*pids)
    assert together[1].diverged
    # A second call has nothing to train, and so needs no workers.
    monkeypatch.setattr(machines, "_in_workers", None)
    assert train_all(recipes) == together
    monkeypatch.setattr(machines, "visible_devices", list)
    alone = grid(micro_data, tmp_path / "alone", 2, steps=3, trackers="none")
    for here, there in zip(recipes[:1] + recipes[2:], alone, strict=True):
        (result,) = train_all([there])
        assert figures(result) == figures(read_result(here.run_folder))
        assert losses(here.run_folder) == losses(there.run_folder)
        equal_weights(here.run_folder, there.run_folder)


@pytest.mark.slow
def test_what_sigterm_stopped_goes_on(micro_data, tmp_path, two_devices):
    fields = {"steps": 200, "eval_every": 100, "log_every": 1, "trackers": "none"}
    recipes = grid(micro_data, tmp_path / "stopped", 3, **fields)

    def running():
        return all(map(logged, recipes[:2]))

    with (
        pytest.raises(Interrupted) as stop,
        meanwhile(running, lambda: os.kill(os.getpid(), signal.SIGTERM)),
    ):
        train_all(recipes)
    assert stop.value.signal == signal.SIGTERM
    for recipe in recipes[:2]:
        assert list(recipe.run_folder.glob("checkpoint-*"))
        assert not (recipe.run_folder / RESULT).exists()
    assert not recipes[2].run_folder.exists()
    train_all(recipes)
    for recipe in recipes:
        whole = dataclasses.replace(recipe, out=str(tmp_path / "whole"))
        train(whole)
        assert losses(recipe.run_folder) == losses(whole.run_folder)
        equal_weights(recipe.run_folder, whole.run_folder)


@pytest.mark.slow
def test_a_killed_worker_is_named_and_stops_the_others(
    micro_data, tmp_path, two_devices, monkeypatch
):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    recipes = grid(micro_data, tmp_path, 3, **LONG)
    seen = {}

    def kill():
        victim = str(trained_by(recipes[1]).pop())
        for worker in workers():
            seen[worker.environ()["CUDA_VISIBLE_DEVICES"]] = worker.environ()
            if str(worker.pid) == victim:
                worker.kill()

    with meanwhile(lambda: all(map(logged, recipes[:2])), kill):
        line = user_error(train_all, recipes)
    assert f"trained in {recipes[1].run_folder} was ended by SIGKILL" in line
    assert "device second" in line
    assert list(recipes[0].run_folder.glob("checkpoint-*")), "the other one stopped in order"
    # Each had its device, and its own caches under the given ones.
    assert seen.keys() == {"first", "second"}
    for device, environment in seen.items():
        for name, folder in (
            ("TORCHINDUCTOR_CACHE_DIR", "inductor"),
            ("TRITON_CACHE_DIR", "triton"),
        ):
            assert environment[name] == str(tmp_path / folder / f"device-{device}")
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "triton")
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


@pytest.mark.slow
def test_an_error_in_a_worker_stops_the_others_and_is_raised(micro_data, tmp_path, two_devices):
    good = micro_recipe(micro_data, tmp_path, **LONG)
    short = micro_recipe(micro_data, tmp_path, variant="additive", steps=200, eval_every=200)
    bad = dataclasses.replace(short, data=str(tmp_path / "nowhere"), seed=1)
    line = user_error(train_all, [good, short, bad])
    assert line == user_error(train, bad)
    assert list(good.run_folder.glob("checkpoint-*"))
    assert (short.run_folder / RESULT).exists()


@pytest.mark.slow
def test_workers_leave_a_held_run_for_later(micro_data, tmp_path, two_devices, capsys):
    recipes = grid(micro_data, tmp_path, 4)
    others = [recipe for recipe in recipes if recipe is not recipes[0]]
    hold = Hold(recipes[0].run_folder)
    hold.take()
    time_of_release = []

    def release():
        time.sleep(1)
        time_of_release.append(time.time())
        hold.__exit__()

    with meanwhile(lambda: all((r.run_folder / RESULT).exists() for r in others), release):
        results = train_all(recipes)
    assert [(result.variant, result.seed) for result in results] == [
        (recipe.variant, recipe.seed) for recipe in recipes
    ]
    assert (recipes[0].run_folder / RESULT).stat().st_mtime > time_of_release[0]
    assert capsys.readouterr().err.count("waiting for") == 1


@pytest.mark.slow
def test_a_held_run_is_left_for_later(micro_data, tmp_path, in_turn, capsys):
    """Another machine, say, trains the first run, and is done in a while."""
    recipes = grid(micro_data, tmp_path, 3, trackers="none", steps=2)
    elsewhere = dataclasses.replace(recipes[0], out=str(tmp_path / "elsewhere"))
    theirs = train(elsewhere)
    hold = Hold(recipes[0].run_folder)
    hold.take()

    def finish():
        time.sleep(0.5)  # some looks
        elsewhere.run_folder.rename(recipes[0].run_folder)
        hold.__exit__()

    capsys.readouterr()
    with meanwhile(lambda: all((r.run_folder / RESULT).exists() for r in recipes[1:]), finish):
        results = train_all(recipes)
    assert results[0] == theirs
    assert [(result.variant, result.seed) for result in results] == [
        (recipe.variant, recipe.seed) for recipe in recipes
    ]
    waits = [line for line in capsys.readouterr().err.splitlines() if "waiting for" in line]
    assert len(waits) == 1
    assert str(recipes[0].run_folder) in waits[0]
    assert str(recipes[1].run_folder) not in waits[0]


SCRIPT = """
import sys
from pathlib import Path
import torch
from deep_delta.compare import machines
from deep_delta.train import Interrupted, load_recipe

if __name__ == "__main__":
    machines.visible_devices = lambda: ["first", "second"]
    try:
        machines.train_all([load_recipe(path) for path in sys.argv[1:]])
    except Interrupted as stop:
        sys.exit(100 + stop.signal)
"""


@pytest.mark.slow
@pytest.mark.parametrize("blow", ["Ctrl-C", "Ctrl-C on import", "SIGHUP", "kill the parent"])
def test_no_process_is_left_behind(micro_data, tmp_path, blow):
    recipes = grid(micro_data, tmp_path / "out", 3, **LONG)
    script, files = tmp_path / "script.py", []
    script.write_text(SCRIPT, encoding="utf-8")
    for place, recipe in enumerate(recipes):
        files.append(str(tmp_path / f"{place}.yaml"))
        save_recipe(recipe, Path(files[-1]))
    environment = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    errors = tmp_path / "stderr"
    with errors.open("w") as file:
        parent = psutil.Popen(
            [sys.executable, str(script), *files],
            env=environment, start_new_session=True, stderr=file,
        )  # fmt: skip

    def until(condition):
        begun = time.monotonic()
        while not condition():
            assert time.monotonic() - begun < 120
            time.sleep(0.05)

    def begun():
        if blow == "Ctrl-C on import":
            return len(parent.children()) >= 3  # with the one that multiprocessing has for itself
        return all(map(logged, recipes[:2]))

    until(begun)
    family = parent.children(recursive=True)
    if blow == "SIGHUP":
        parent.send_signal(signal.SIGHUP)
    elif blow == "kill the parent":
        parent.kill()
    else:
        os.killpg(parent.pid, signal.SIGINT)
    status = parent.wait(120)
    _, alive = psutil.wait_procs(family, 120)
    assert alive == []
    expected = {"SIGHUP": 100 + signal.SIGHUP, "kill the parent": -signal.SIGKILL}
    assert status == expected.get(blow, 100 + signal.SIGINT)
    if blow != "Ctrl-C on import":
        for recipe in recipes[:2]:
            assert list(recipe.run_folder.glob("checkpoint-*"))
    assert "Traceback" not in errors.read_text(encoding="utf-8")


def test_visible_devices_are_called_as_they_were_given(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_devices() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8f2a, GPU-11c0")
    assert visible_devices() == ["GPU-8f2a", "GPU-11c0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,2,-1,3")  # CUDA ends the list at what is none
    assert visible_devices() == ["5", "2"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_devices() == []


def test_under_torchrun_a_run_has_all_devices(micro_data, tmp_path, two_devices, monkeypatch):
    monkeypatch.setattr(machines, "_in_workers", None)
    monkeypatch.setattr(machines, "_in_turn", lambda recipes: "in turn")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert train_all(grid(micro_data, tmp_path)) == "in turn"


def test_a_bug_keeps_its_trace_on_the_way_to_the_parent(micro_data, tmp_path, monkeypatch):
    def broken(recipe):
        raise ZeroDivisionError("by design")

    monkeypatch.setattr(machines, "train", broken)
    recipe = micro_recipe(micro_data, tmp_path)
    kind, error = machines._answer(recipe)
    assert kind == "failed"
    assert "in broken" in str(error)
    assert "ZeroDivisionError: by design" in str(error)
    assert str(recipe.run_folder) in str(error)


def test_the_bundled_text_is_prepared_once(tmp_path, in_turn, monkeypatch):
    """While another process prepares it, nobody else begins."""
    prepared = []
    monkeypatch.setattr(machines, "prepare_bundled", prepared.append)
    monkeypatch.setattr(machines, "_in_turn", lambda recipes: [])
    hold = Hold(tmp_path / "data")
    hold.take()

    def release():
        time.sleep(0.3)
        assert prepared == []
        hold.__exit__()

    with meanwhile(lambda: True, release):
        train_all([micro_recipe("bundled", tmp_path, seed=seed) for seed in (0, 1)])
    assert prepared == [tmp_path / "data"]
