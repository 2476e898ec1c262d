"""Several processes that form one group, as torchrun starts them, for tests."""

import faulthandler
import multiprocessing
import os
import socket
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

SECONDS = 200


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def _member(
    rank: int, count: int, port: int, pipe: Any, stack: Path, function: Callable, arguments: Any
):
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
        "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    file = stack.open("w")
    faulthandler.dump_traceback_later(SECONDS - 5, file=file)
    try:
        pipe.send((True, function(*arguments)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
    pipe.close()


def together(function: Callable[..., Any], *arguments: Any, count: int = 2) -> list[Any]:
    """Call a function in every process of a new group; what each returned, by rank.

    None for a process that ended without returning.
    """
    # Children of a server that has loaded everything start within a second.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["deep_delta.train"])
    port, members, pipes = _free_port(), [], []
    folder = tempfile.TemporaryDirectory()
    stacks = [Path(folder.name) / str(rank) for rank in range(count)]
    for rank in range(count):
        ours, theirs = context.Pipe()
        given = (rank, count, port, theirs, stacks[rank], function, arguments)
        members.append(context.Process(target=_member, args=given))
        members[-1].start()
        theirs.close()
        pipes.append(ours)
    results = []
    try:
        for rank, pipe in enumerate(pipes):
            if not pipe.poll(SECONDS):
                where = "\n".join(f"rank {n}: {stacks[n].read_text()}" for n in range(count))
                pytest.fail(f"rank {rank} said nothing in {SECONDS} s\n{where}")
            try:
                done, result = pipe.recv()
            except EOFError:
                done, result = True, None
            assert done, f"rank {rank}:\n{result}"
            results.append(result)
    finally:
        for member in members:
            member.join(10)
            member.kill()
        folder.cleanup()
    return results
