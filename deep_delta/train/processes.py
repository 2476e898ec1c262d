"""Several processes that train one model: what only the main one does, and how they agree.

With one process, everything here does what it says without any communication. With several, what
is said here travels between the hosts, whatever the GPUs have among themselves: there it shows at
once that a process is gone, while a GPU would wait for it, and its own process with it.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, ParamSpec, TypeVar

from torch import Tensor, tensor
from torch import distributed as dist

from deep_delta.errors import UserError

P = ParamSpec("P")
T = TypeVar("T")
# For a machine that vanished without closing its connections: in a step, and where the main process
# checks data or saves and the others wait.
PATIENCE, LONG_PATIENCE = timedelta(minutes=10), timedelta(minutes=30)
# What the libraries below say when the other side is gone.
CLOSED = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket closed")
SILENT = "Timed out waiting"  # what gloo says after the patience is over


class LostProcess(UserError):
    """Another process of the run ended; this one can't go on alone."""

    in_all = False  # every process that is left has to say it: who is left is not known


def processes() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's number among them, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def of_torchrun() -> bool:
    """Whether torchrun started this process: its group is there only from the first run on."""
    return processes() > 1 or "LOCAL_RANK" in os.environ


def is_main() -> bool:
    """Whether this is the process that writes the run folder."""
    return rank() == 0


def _hosts(patience: timedelta) -> Any:
    """The group of all processes that communicates between hosts; all must ask for it together."""
    return _host_group(dist.group.WORLD, patience)


@functools.cache  # one is enough for all runs of a comparison
def _host_group(world: Any, patience: timedelta) -> Any:
    return dist.new_group(backend="gloo", timeout=patience)


def on_main(action: Callable[[], T]) -> T:
    """Run the action in the main process; its result, or its UserError or OSError, in all."""
    if processes() == 1:
        return action()
    told: list[Any] = _tried(action) if is_main() else [None, None]
    dist.broadcast_object_list(told, src=0, group=_hosts(LONG_PATIENCE))
    result, failure = told
    _raise_in_all(failure)
    return result


def in_main(function: Callable[P, T]) -> Callable[P, T]:
    """Decorator: every process calls it, the main one runs it: see `on_main`."""

    @functools.wraps(function)
    def called(*arguments: P.args, **named: P.kwargs) -> T:
        return on_main(lambda: function(*arguments, **named))

    return called


def on_each(action: Callable[[], T]) -> T:
    """Run the action in every process; its own result, or in all the first UserError or OSError."""
    result, failure = _tried(action)
    for one in everyones(failure):
        _raise_in_all(one)
    return result


def _tried(action: Callable[[], Any]) -> list[Any]:
    """The action's result and None, or None and the UserError or OSError it raised."""
    try:
        return [action(), None]
    except (UserError, OSError) as error:
        return [None, error]


def _raise_in_all(failure: Any) -> None:
    if failure is not None:
        failure.in_all = True  # one process need say it
        raise failure


def everyones(value: T) -> list[T]:
    """The value of every process, in the order of ranks."""
    values: list[Any] = [value] * processes()
    if len(values) > 1:
        dist.all_gather_object(values, value, group=_hosts(LONG_PATIENCE))
    return values


def wait_for_all() -> None:
    """Return when every process has come here."""
    everyones(None)


class Agreement:
    """A number that all processes agree on, at every step, without waiting for a GPU."""

    def __init__(self) -> None:
        self._group = _hosts(PATIENCE) if processes() > 1 else None

    def highest(self, number: int) -> int:
        """The highest of all processes' numbers."""
        if self._group is None:
            return number
        box: Tensor = tensor(number)
        dist.all_reduce(box, dist.ReduceOp.MAX, group=self._group)
        return int(box)


@contextlib.contextmanager
def lost_processes_named() -> Iterator[None]:
    """Turn the error by which a process learns that another one is gone into a LostProcess."""
    try:
        yield
    except RuntimeError as error:
        text = " ".join(str(error).split())
        closed = any(word in text for word in CLOSED)
        if processes() == 1 or not (closed or isinstance(error, dist.DistError) or SILENT in text):
            raise
        # NCCL fails in the same way over what is wrong with this process itself.
        cause = "" if closed else f": {text}"
        raise LostProcess(
            f"rank {dist.get_rank()} stops, because another process of this run is gone (it may "
            f"have said why above); the same command goes on from the newest checkpoint{cause}"
        ) from error


def leave() -> None:
    """Take this process out of its group, at the end of the program."""
    if dist.is_initialized():
        _host_group.cache_clear()
        dist.destroy_process_group()
