"""Encoding chunks in several processes, with the results in the order of the chunks."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, cast

from deep_delta.data.encode import Chunk, Encoded, Fractions, encode
from deep_delta.data.tokenizer import TextTokenizer
from deep_delta.errors import UserError

# Chunks that may be under way or done before their turn, for each process: bounds the memory.
AHEAD = 4


def encode_all(
    chunks: Iterator[Chunk], tokenizer: TextTokenizer, fractions: Fractions, processes: int
) -> Generator[tuple[Chunk, Encoded], None, None]:
    """Every chunk with its tokens, in order. Close it to end the processes.

    processes: 1 encodes here, where the tokenizer uses threads.
    Errors: UserError from reading, or when a process ended.
    """
    if processes == 1:
        return ((chunk, encode(chunk, tokenizer, fractions)) for chunk in chunks)
    return _encode_in_processes(chunks, tokenizer, fractions, processes)


def _encode_in_processes(
    chunks: Iterator[Chunk], tokenizer: TextTokenizer, fractions: Fractions, processes: int
) -> Generator[tuple[Chunk, Encoded], None, None]:
    with _started(tokenizer, fractions, processes) as workers:
        idle = list(workers)
        busy: dict[Connection, int] = {}
        sent: dict[int, Chunk] = {}  # by number, until their turn comes
        done: dict[int, Encoded | UserError] = {}
        next_sent = next_yielded = 0
        while True:
            while idle and len(sent) < AHEAD * processes:
                chunk = next(chunks, None)
                if chunk is None:
                    break
                worker = idle.pop()
                with _alive(workers[worker]):
                    worker.send(chunk)
                sent[next_sent] = chunk
                busy[worker] = next_sent
                next_sent += 1
            if next_yielded in done:
                result = done.pop(next_yielded)
                if isinstance(result, UserError):
                    raise result
                yield sent.pop(next_yielded), result
                next_yielded += 1
            elif busy:
                for ready in cast(list[Connection], wait(list(busy))):
                    with _alive(workers[ready]):
                        done[busy.pop(ready)] = ready.recv()
                    idle.append(ready)
            else:
                return


@contextmanager
def _started(
    tokenizer: TextTokenizer, fractions: Fractions, processes: int
) -> Iterator[dict[Connection, BaseProcess]]:
    """Processes by the connections to them; ended when the context is left."""
    workers: dict[Connection, BaseProcess] = {}
    try:
        try:
            with _ctrl_c_later():
                context = _context()
                for _ in range(processes):
                    here, there = context.Pipe()
                    with there:  # when only the process holds its end, its end is noticed here
                        arguments = (there, tokenizer, fractions)
                        process = context.Process(target=_work, args=arguments, daemon=True)
                        process.start()
                    workers[here] = process
        except OSError as error:  # too many of them, or out of memory
            reason = error.strerror or type(error).__name__
            raise UserError(f"can't start {processes} processes: {reason}") from error
        yield workers
    finally:
        for connection, process in workers.items():
            process.terminate()  # it writes nothing, so it can end anywhere
            process.join()
            connection.close()


def _context() -> Any:
    """How processes start: not by a plain fork, which threads of the libraries don't survive."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    # Imported once, there, instead of for seconds in every process.
    multiprocessing.set_forkserver_preload([__name__])
    return multiprocessing.get_context("forkserver")


@contextmanager
def _ctrl_c_later() -> Iterator[None]:
    """Keeps Ctrl-C from what starts processes, and for good from the processes themselves.

    It would leave one half started, which then says so in many lines.
    """
    if sys.platform == "win32":
        yield
        return
    resource_tracker.ensure_running()  # started later it would undo the next line
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _alive(process: BaseProcess) -> Iterator[None]:
    """Turns the errors of a connection whose other end is gone into a UserError."""
    try:
        yield
    except (EOFError, OSError) as error:
        process.join()
        raise UserError(
            f"a process that tokenizes ended (exit code {process.exitcode}), out of memory perhaps:"
            " run the same command again, with fewer --processes if it happens again"
        ) from error


def _work(connection: Connection, tokenizer: TextTokenizer, fractions: Fractions) -> None:
    """What a process does: encode the chunks it is sent until the sender is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that has the shards
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads, once for every process
    while True:
        try:
            chunk = connection.recv()
        except (EOFError, OSError):
            return
        result: Encoded | UserError
        try:
            result = encode(chunk, tokenizer, fractions)
        except UserError as error:
            result = error
        try:
            connection.send(result)
        except OSError:
            return
