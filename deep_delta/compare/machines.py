"""Many trainings on what there is: one device or all of a machine, and several machines.

Machines share a comparison by one file system: whoever holds a run folder trains there, and the
others take the next one.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from deep_delta.data import prepare_bundled
from deep_delta.errors import UserError
from deep_delta.train import Diverged, Interrupted, Recipe, RunResult, read_result, train
from deep_delta.train.folder import RESULT, Held, Hold
from deep_delta.train.processes import lost_processes_named, of_torchrun, on_main
from deep_delta.train.stop import SIGNALS, StopOnSignal

TICK = 0.5  # seconds between looks at signals
PATIENCE = 5.0  # seconds between looks at folders that others hold
GRACE = 30.0  # seconds that an idle worker may take to leave its device


def train_all(recipes: Sequence[Recipe]) -> list[RunResult]:
    """Train by every recipe; the results in their order, those of diverged runs among them.

    Finished runs are not repeated. With several visible GPUs each has a worker process, which takes
    one training after the other; else, and under torchrun, they are trained in this process. A
    script that calls this needs the usual `if __name__ == "__main__":`.

    Raises:
        UserError: what `train` raises, or a worker that was killed. The other workers stop after
            their step, with a checkpoint.
        Interrupted: after Ctrl-C, SIGTERM or SIGHUP, likewise; the same call goes on.
    """
    for out in dict.fromkeys(recipe.out for recipe in recipes if recipe.data == "bundled"):
        _prepare_once(Path(out) / "data")
    devices = [] if of_torchrun() else visible_devices()
    missing = sum(not (recipe.run_folder / RESULT).is_file() for recipe in recipes)
    if min(len(devices), missing) > 1:
        return _in_workers(recipes, devices[:missing])
    return _in_turn(recipes)


def visible_devices() -> list[str]:
    """The GPUs that this process sees, each as CUDA_VISIBLE_DEVICES calls it; takes none of them.

    Numbers and UUIDs that are given there stay what they are.
    """
    count = torch.cuda.device_count()  # asks the driver's library: no context, no memory
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = list(map(str, range(count))) if given is None else given.split(",")
    return [name.strip() for name in names[:count]]


def _prepare_once(folder: Path) -> None:
    """The bundled text, by one process while the others wait: each would begin it."""
    with Hold(folder) as hold:
        while True:
            try:
                hold.take()
                break
            except Held:
                time.sleep(TICK)
        prepare_bundled(folder)


class _Queue:
    """Trainings to be done, by their places in `recipes`; false when nothing is left."""

    def __init__(self, recipes: Sequence[Recipe]):
        self.recipes, self.todo = recipes, deque(range(len(recipes)))
        self.held: list[int] = []
        self._look_at, self._said = 0.0, set[int]()

    def __bool__(self) -> bool:
        return bool(self.todo or self.held)

    def take(self) -> int | None:
        """The next one; None while all that are left are held by others."""
        if self.held and not self.todo:
            with lost_processes_named():
                freed = on_main(self._freed)
            self.held = [place for place in self.held if place not in freed]
            self.todo += freed
        return self.todo.popleft() if self.todo else None

    def put_back(self, place: int) -> None:
        """Another process holds it: it comes back when that one is done, or gone."""
        self.held.append(place)

    def _freed(self) -> list[int]:
        if time.monotonic() < self._look_at:
            return []
        self._look_at = time.monotonic() + PATIENCE
        freed = [place for place in self.held if not _is_held(self.recipes[place].run_folder)]
        new = [place for place in self.held if place not in {*freed, *self._said}]
        if new:
            self._said |= set(new)
            folders = ", ".join(str(self.recipes[place].run_folder) for place in new)
            print(f"ddl: waiting for other processes, which train in {folders}", file=sys.stderr)
        return freed


def _is_held(folder: Path) -> bool:
    with Hold(folder) as hold:
        try:
            hold.take()
        except Held:
            return True
    return False


def _trained(recipe: Recipe) -> RunResult:
    try:
        return train(recipe)
    except Diverged:  # a result like others, and no reason to stop the rest
        return read_result(recipe.run_folder)


def _in_turn(recipes: Sequence[Recipe]) -> list[RunResult]:
    queue, results = _Queue(recipes), dict[int, RunResult]()
    while queue:
        place = queue.take()
        if place is None:
            time.sleep(TICK)
            continue
        try:
            results[place] = _trained(recipes[place])
        except Held:
            queue.put_back(place)
    return [results[place] for place in range(len(recipes))]


@dataclass
class _Worker:
    """A process that has one device, and the place of the training it is at, if any."""

    device: str
    process: BaseProcess
    connection: Connection
    place: int | None = None

    def death(self, recipe: Recipe | None) -> UserError:
        """Why it said nothing more, in a line."""
        self.process.join()
        code = self.process.exitcode or 0
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        memory = ", out of memory perhaps" if code == -signal.SIGKILL else ""
        work = f" that trained in {recipe.run_folder}" if recipe else ""
        return UserError(
            f"the process on device {self.device}{work} {how}{memory}; the same command goes on"
        )


def _in_workers(recipes: Sequence[Recipe], devices: list[str]) -> list[RunResult]:
    queue, results = _Queue(recipes), dict[int, RunResult]()
    failure: Exception | None = None
    with StopOnSignal() as stop, _started(devices) as workers:
        alive, told = list(workers), False
        while True:
            ends = failure is not None or stop.requested is not None
            if ends and not told:
                told = True
                for worker in alive:  # after Ctrl-C too, which may have come to this process alone
                    if worker.place is None:  # it has nothing to save
                        worker.process.kill()
                    else:
                        worker.process.terminate()
            for worker in [] if ends else alive:
                if worker.place is None and (place := queue.take()) is not None:
                    worker.place = place
                    with contextlib.suppress(OSError):  # it is gone, and so its next answer says
                        worker.connection.send(recipes[place])
            if all(worker.place is None for worker in alive) and (ends or not queue):
                break
            for ready in wait([worker.connection for worker in alive], TICK):
                worker = next(worker for worker in alive if worker.connection is ready)
                place, worker.place = worker.place, None
                try:
                    kind, value = worker.connection.recv()
                except (EOFError, OSError):
                    alive.remove(worker)
                    if not ends:
                        recipe = None if place is None else recipes[place]
                        failure = failure or worker.death(recipe)
                    continue
                if kind == "stopped":  # a signal that may have come to it alone
                    failure = failure or (None if ends else Interrupted(value))
                elif kind == "failed":
                    failure = failure or value
                elif kind == "held" and place is not None:
                    queue.put_back(place)
                elif place is not None:
                    results[place] = value
    if failure is not None:
        raise failure
    if stop.requested is not None:
        raise Interrupted(stop.requested)
    return [results[place] for place in range(len(recipes))]


@contextlib.contextmanager
def _started(devices: list[str]) -> Iterator[list[_Worker]]:
    """A worker for each device; none is left when the context is."""
    workers: list[_Worker] = []
    context = multiprocessing.get_context("spawn")
    try:
        with _signals_later():
            for device in devices:
                here, there = context.Pipe()
                # When only the worker holds its end, its death is noticed here.
                with there, _environment(device):
                    process = context.Process(target=_work, args=(there,))
                    process.start()
                workers.append(_Worker(device, process, here))
        yield workers
    except BaseException:  # a second Ctrl-C, for example
        for worker in workers:
            worker.process.kill()
        raise
    finally:
        for worker in workers:
            worker.connection.close()  # which ends an idle one
        for worker in workers:
            worker.process.join(GRACE)
            worker.process.kill()
            worker.process.join()


@contextlib.contextmanager
def _environment(device: str) -> Iterator[None]:
    """What a worker is started with: its device, and folders of its own for what compilers keep.

    Two processes that share them can wait for each other for good: one start in 35 did.
    """
    triton = Path(os.environ.get("TRITON_HOME", Path.home()), ".triton", "cache")
    caches = {"TORCHINDUCTOR_CACHE_DIR": default_cache_dir(), "TRITON_CACHE_DIR": str(triton)}
    own = {
        name: str(Path(os.environ.get(name, folder), f"device-{device}"))
        for name, folder in caches.items()
    }
    before = dict(os.environ)
    os.environ.update(own, CUDA_VISIBLE_DEVICES=device)
    try:
        yield
    finally:
        for name in (*own, "CUDA_VISIBLE_DEVICES"):
            if name in before:
                os.environ[name] = before[name]
            else:
                del os.environ[name]


@contextlib.contextmanager
def _signals_later() -> Iterator[None]:
    """Signals wait until the workers are started, and in a worker until it can handle them."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # started later it would undo the next line
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Leave:
    """What a signal does to a worker outside of a run's steps, where nothing is to be saved."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __call__(self, number: int, *_: object) -> None:
        repeated, self.signal = self.signal is not None, self.signal or number
        if not repeated or number == signal.SIGINT:
            raise KeyboardInterrupt


def _work(connection: Connection) -> None:
    """What a worker does: train what it is sent, until the sender is gone or a signal comes."""
    leave = _Leave()
    try:
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup's
                signal.signal(number, leave)
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        threading.Thread(target=_stop_without_parent, daemon=True).start()
        while leave.signal is None:
            connection.send(_answer(connection.recv()))
    except (EOFError, OSError):
        return
    except KeyboardInterrupt:
        pass
    with contextlib.suppress(OSError, KeyboardInterrupt):
        connection.send(("stopped", leave.signal or signal.SIGINT))


def _answer(recipe: Recipe) -> tuple[str, Any]:
    """How a training went: done, held, stopped or failed, with its result, signal or exception."""
    try:
        return "done", _trained(recipe)
    except Interrupted as stop:
        return "stopped", stop.signal
    except Held:
        return "held", None
    except (UserError, OSError) as error:
        return "failed", error
    except Exception:  # a bug, whose trace no exception takes along
        return "failed", RuntimeError(f"in {recipe.run_folder}:\n{traceback.format_exc()}")


def _stop_without_parent() -> None:
    """When the process that sends is killed, this one stops with a checkpoint like others."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
