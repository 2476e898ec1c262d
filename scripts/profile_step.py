"""Where the time of a training step goes: kernels, and the gaps between them; needs a GPU.

    python3 scripts/profile_step.py --variants additive,ddl-cc

prints for each model the time of a step without a profiler (with the clock and the power it ran
at), the time that the host needs to queue one, and from a profile the time in kernels by name and
the time between kernels: behind which kernel, and whether the GPU waited for the host or not.
"""

import argparse
import collections
import contextlib
import functools
import gc
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also where nothing is installed

import torch
from torch.profiler import ProfilerActivity, profile

from deep_delta.bench.subject import Setup, Subject, graphs_apart
from deep_delta.bench.timing import host_time, times

STEPS, PROFILED = 30, 2
LEAD = 400_000_000  # GPU cycles that the host gets ahead: more than it needs for a profiled step


@contextlib.contextmanager
def sensors() -> Iterator[dict[str, float]]:
    """Medians of the SM clock (MHz) and the power (W) while the block runs; empty without them."""
    found: dict[str, float] = {}
    query = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits"]
    try:
        watcher = subprocess.Popen([*query, "-lms", "50"], stdout=subprocess.PIPE, text=True)
    except OSError:
        yield found
        return
    try:
        yield found
    finally:
        watcher.terminate()
        rows = [line.split(",") for line in watcher.communicate()[0].splitlines()]
        numbers = [(float(row[0]), float(row[1])) for row in rows if len(row) == 2]
        if numbers:
            clocks, watts = zip(*numbers, strict=True)
            found |= {"MHz": statistics.median(clocks), "W": statistics.median(watts)}


def profiled_kernels(subject: Subject) -> list[tuple[int, int, str, int]]:
    """(start, end, name, when the host launched it), ns, of the kernels of a few steps."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        torch.cuda._sleep(LEAD)
        for _ in range(PROFILED):
            subject.work("train")()
        torch.cuda.synchronize()
    launched, kernels = {}, []
    assert profiler.profiler is not None
    for event in profiler.profiler.kineto_results.events():
        start, length = event.start_ns(), event.duration_ns()
        if event.device_type() == torch.autograd.DeviceType.CUDA:
            kernels.append((start, start + length, event.name(), event.correlation_id()))
        elif "aunch" in event.name() or "emset" in event.name() or "emcpy" in event.name():
            launched[event.correlation_id()] = start
    kernels.sort()
    found = [(start, end, name, launched.get(i, 0)) for start, end, name, i in kernels]
    return [kernel for kernel in found if "spin_kernel" not in kernel[2]]


def report(kernels: list[tuple[int, int, str, int]]) -> None:
    def ms(nanoseconds: float) -> str:
        return f"{nanoseconds / PROFILED / 1e6:7.3f} ms"

    by_name: dict[str, list[int]] = collections.defaultdict(list)
    behind: dict[str, list[int]] = collections.defaultdict(list)
    waited = idle = 0
    end = kernels[0][0]
    previous = ""
    for start, stop, name, launch in kernels:
        by_name[name].append(stop - start)
        if start > end and previous:
            idle += start - end
            behind[f"{previous[:44]} -> {name[:44]}"].append(start - end)
            if launch > end - 5_000:  # it had hardly been launched when the GPU was free
                waited += start - end
        end, previous = max(end, stop), name
    whole = kernels[-1][1] - kernels[0][0]
    print(
        f"  profiled: step {ms(whole)}, in kernels {ms(whole - idle)}, between them {ms(idle)} "
        f"(of which the host was late {ms(waited)}), {len(kernels) // PROFILED} kernels"
    )
    print("  kernels:")
    for name, spans in sorted(by_name.items(), key=lambda item: -sum(item[1]))[:14]:
        print(f"  {ms(sum(spans))} {len(spans) // PROFILED:5} × {name[:90]}")
    print("  gaps:")
    for name, spans in sorted(behind.items(), key=lambda item: -sum(item[1]))[:10]:
        print(f"  {ms(sum(spans))} {len(spans) // PROFILED:5} × {name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", default="additive,ddl-scalar,ddl-cc")
    parser.add_argument("--size", default="small")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--rebuild", default="speed")
    options = parser.parse_args()
    where = torch.device("cuda")
    setup = Setup(
        where,
        options.size,
        options.batch,
        options.seq_len,
        "bfloat16",
        False,
        False,
        "torch",
        ("train",),
    )
    rebuild = int(options.rebuild) if options.rebuild.isdecimal() else options.rebuild
    with graphs_apart():
        for variant in options.variants.split(","):
            subject = Subject(variant, "triton", rebuild, setup)
            subject.begin()
            with sensors() as seen:
                work = functools.partial(subject.work, "train")
                seconds = statistics.median(times([work], STEPS))
            shown = ", ".join(f"{value:.0f} {unit}" for unit, value in seen.items())
            print(f"{subject}: step {seconds * 1e3:.2f} ms ({shown})")
            print(f"  queued by the host in {(host_time(work) or 0) * 1e3:.1f} ms")
            report(profiled_kernels(subject))
            subject.release()
            gc.collect()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
