"""Times of the fused read for other launch options than `ops/launch.py` chooses; needs a GPU.

    python3 scripts/tune_kernels.py --width 768 --channels 4 --taps 1

tries numbers of warps, of programs for each processor, register limits, how many tokens ahead
memory is asked for, and both ways to cut d, and prints the fastest first. Kernels are replayed from
CUDA graphs, so that Python's overhead does not count. A choice for `launch.plan` should come from
here; results for others come from `ddl bench`.
"""

import argparse
import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also where nothing is installed

import torch

from deep_delta.bench.timing import copy_bandwidth
from deep_delta.ops import fused, fused_launch, launch

TOKENS, LENGTH, REPLAYS = 32_768, 1024, 5
PLAN, SHAPE = launch.plan, launch.shape_of


def microseconds(call) -> float:
    """Median time of a call, from a CUDA graph of five."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(REPLAYS):
            call()
    times = []
    for _ in range(7):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / REPLAYS)
    return sorted(times)[len(times) // 2]


def calls(width: int, channels: int, taps: int, trail: int, store: bool) -> dict:
    """The forward and the backward operator on random inputs."""

    def random(*shape, dtype=torch.float32):
        return torch.randn(shape, device="cuda", dtype=dtype)

    def state():
        return random(TOKENS, channels, width, dtype=torch.bfloat16).mT

    x, h = state(), random(TOKENS, width, dtype=torch.bfloat16)
    target, erase = random(TOKENS, channels), torch.rand(TOKENS, device="cuda") * 2
    kernel = random(taps, channels, width) if taps else None
    norm, gate, value = torch.rand(width, device="cuda"), random(1, width), random(channels, width)
    gate_bias, value_bias = random(1), random(channels)
    past = [torch.randn_like(h) for _ in range(trail)]
    rows = [random(TOKENS, channels) for _ in range(trail)]
    earlier = x if trail else None

    def forward():
        return fused.read_state(
            x, h, target, erase, 1e-5, kernel, norm, 1e-5, gate, gate_bias, value, value_bias,
            True, None, LENGTH, "stored" if store else "stand-in", True, torch.bfloat16, earlier,
            past, rows,
        )  # fmt: skip

    _, row, stats, x_in, context, d_gates, d_values = forward()
    dx_new = state()

    def backward():
        return fused.read_state_backward(
            x, past, rows, h, row, stats, x_in if x_in.numel() else None, target, erase, True,
            kernel, norm, gate, value, True, None, LENGTH, dx_new, context, d_gates, d_values,
        )  # fmt: skip

    return {"forward": forward, "backward": backward}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--channels", type=int, default=4)
    parser.add_argument("--taps", type=int, default=1, help="0 for d_v = 1")
    parser.add_argument("--trail", type=int, default=0, help="writes since the stored state")
    parser.add_argument("--leave", action="store_true", help="forward does not store the state")
    parser.add_argument("--ahead", type=int, nargs="+", default=[1])
    parser.add_argument("--kernel", choices=("forward", "backward"), default="forward")
    parser.add_argument("--warps", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--programs", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--registers", type=int, nargs="+", default=[0, 96, 128])
    options = parser.parse_args()
    unit = TOKENS * options.width * 2
    channels = options.channels
    window = options.taps > 1  # x_in; x_in, and dx_in in fp32 instead of dc
    bytes_moved = {
        "forward": ((1 if options.leave else 2) * channels + 2 + options.trail + window) * unit,
        "backward": (3 * channels + 3 + options.trail + 5 * window) * unit,
    }[options.kernel]
    copy = copy_bandwidth()
    call = calls(options.width, channels, options.taps, options.trail, not options.leave)[
        options.kernel
    ]
    rows = [(microseconds(call), "as launch.plan has it")]
    grid = itertools.product(
        options.warps, options.programs, options.registers, options.ahead, (False, True)
    )
    for warps, programs, registers, ahead, whole in grid:
        limit = {"maxnreg": registers} if registers else {}
        chosen = (programs, {"num_warps": warps, "AHEAD": ahead, **limit})
        fused_launch.plan = lambda kernel, *size, chosen=chosen, **how: (
            chosen if kernel == options.kernel else PLAN(kernel, *size, **how)
        )
        fused_launch.shape_of = lambda *tensors, cut=whole, **_: SHAPE(*tensors, cut)
        label = (
            f"warps {warps}, programs {programs}, registers {registers or '-'}, ahead {ahead}, "
            f"whole {whole}"
        )
        try:
            rows.append((microseconds(call), label))
        except Exception as error:  # more registers or warps than there are
            print(f"{label}: {str(error).splitlines()[0][:80]}", flush=True)
    for time, label in sorted(rows):
        print(f"{time:7.0f} µs  {bytes_moved / time * 1e6 / copy:.2f} of copy  {label}")


if __name__ == "__main__":
    main()
