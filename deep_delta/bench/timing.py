"""Time on a device, and the copy bandwidth that memory traffic is measured against."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

# Gets everything ready and returns the call whose time counts.
Work = Callable[[], Callable[[], object]]

WARM_UP = 3
CPU_LEAD = 1_000_000  # GPU cycles of waiting a repeat, about half a millisecond
COPY_BYTES = {"cuda": 2**30, "cpu": 2**27}


def device() -> torch.device:
    """The GPU if there is one, otherwise the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def times(works: Sequence[Work], repeats: int, warm_up: int = WARM_UP) -> list[float]:
    """Seconds of each of `repeats` calls, made in turn on every one of `works`.

    Before that, `warm_up` rounds over all of them do not count.

    On a GPU the time is between two events around the call, with the calls queued beforehand, so
    that it holds no waiting for Python unless a call takes longer to launch than to run.
    """
    for _ in range(warm_up):
        for work in works:
            work()()
    if not torch.cuda.is_available():
        return [_seconds(works[turn % len(works)]()) for turn in range(repeats)]
    torch.cuda.synchronize()
    # The GPU waits while Python queues the first calls, and Python stays ahead from there.
    torch.cuda._sleep(repeats * CPU_LEAD)
    marks = []
    for turn in range(repeats):
        call = works[turn % len(works)]()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        marks.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in marks]


def replayed(works: Sequence[Work], count: int) -> tuple[Work, Any]:
    """`count` calls, in turn of every one of `works`, as a work of one call: a CUDA graph.

    Also what the last of these calls returns, which every replay overwrites.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # a backward pass runs on the stream of its forward pass
        calls = [work() for work in works]
    graph, result = torch.cuda.CUDAGraph(), None
    with torch.cuda.graph(graph, stream=stream):
        for turn in range(count):
            result = calls[turn % len(calls)]()

    def work(made=calls) -> Callable[[], object]:  # must live as long: the graph reads from them
        return graph.replay

    return work, result


def host_time(work: Work, repeats: int = 5) -> float | None:
    """Median seconds that the host needs to queue one call on an idle GPU; None on a CPU.

    Where that is longer than the call takes on the GPU, the GPU waits for the host. A call of more
    kernels than the GPU's queue holds (about a thousand) can last as long on the host as there.
    """
    if not torch.cuda.is_available():
        return None
    found = []
    for _ in range(repeats):
        call = work()
        torch.cuda.synchronize()
        found.append(_seconds(call))
    torch.cuda.synchronize()
    return statistics.median(found)


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def copy_bandwidth(repeats: int = 30) -> float:
    """Bytes a second, read plus written, of a large copy within the device's memory."""
    where = device()
    # Random bytes: a GPU moves zeros with less power, and so faster.
    source = torch.randint(256, (COPY_BYTES[where.type],), dtype=torch.uint8, device=where)
    target = torch.empty_like(source)
    seconds = statistics.median(times([lambda: lambda: target.copy_(source)], repeats))
    return 2 * source.numel() / seconds


def sets_beyond_cache(bytes_moved: int) -> int:
    """How many input sets to take turns with so that 8 × L2 pass before one comes round again.

    bytes_moved: what one call reads and writes. On a CPU one set is enough: its figures show that
    a command works, and are no claim about speed.
    """
    if not torch.cuda.is_available():
        return 1
    return -(-8 * torch.cuda.get_device_properties(0).L2_cache_size // bytes_moved)
