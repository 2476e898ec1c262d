"""Compile the kernels for GPUs that are not here, in a process without Triton's interpreter.

Prints one JSON object: {"name sm_90": bytes of registers spilled to local memory}. H100s get
every kind of read, the others one of each kernel: a kind takes seconds.
"""

import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from deep_delta.ops import launch
from deep_delta.ops.fused_launch import WIDE as WIDE_FROM
from deep_delta.ops.kernels import backward, embedding, forward, wide

PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
STATE, WIDE = "*bf16", "*fp32"
RUNTIME = {"tokens": "i32", "length": "i32", "chunk": "i32", "norm_eps": "fp32"}


def spilled(kernel: Any, types: dict[str, Any], constants: dict[str, Any], options: dict, cap: int):
    """Compile to PTX and on to machine code; the bytes that ptxas spills."""
    signature, constexprs, attributes = {}, {}, {}
    options = dict(options)
    constants = constants | {"AHEAD": options.pop("AHEAD", False)}
    for i, name in enumerate(kernel.arg_names):
        kind = types.get(name)
        if name in constants or kind is None:  # what is not there is a constant None
            signature[name], constexprs[(i,)] = "constexpr", constants.get(name)
        else:
            signature[name] = kind
            aligned = [["tt.divisibility", 16]]
            if isinstance(kind, tuple):
                attributes |= {(i, k): aligned for k in range(len(kind))}
            elif kind[0] == "*" or name.endswith(("_token", "_channel")):
                attributes[(i,)] = aligned
    source = ASTSource(kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    target = GPUTarget("cuda", cap, 32)
    compiled = triton.compile(source, target=target, options=options)
    assert compiled.asm["cubin"]
    # The one for Blackwell has a name of its own and knows the older ones too.
    ptxas = max(PTXAS.glob("ptxas*"))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.ptx")
        file.write_text(compiled.asm["ptx"])
        arch = f"sm_{cap}" + ("a" if cap >= 90 else "")
        command = [ptxas, "-v", f"-arch={arch}", file, "-o", Path(folder, "kernel.cubin")]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    stores, loads = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said).groups()
    return max(int(stores), int(loads))


def shape(width: int, channels: int, taps: int, gates: int, whole: bool) -> dict[str, Any]:
    block = launch.block_size(width, whole)
    values = channels if gates else 0
    return {
        "D": width, "DV": channels, "K": taps, "GATES": gates, "VALUES": values, "BLOCK": block,
        "PIECES": -(-width // block), "VALUE_ON_STATE": bool(gates), "x_feature": 1,
        "dx_feature": 1, "STATS": 2 * channels + 2, "RSTD": channels + 1,
    }  # fmt: skip


def plan(kernel: str, *size: int, **how: bool) -> dict[str, int]:
    return launch.plan(kernel, *size, **how)[1]


def read(width, channels, taps, gates, write, norm=True, store=True, reads=True, trail=0):
    """The signatures of forward and backward for one kind of read, and of the first pass."""
    given = {"h": STATE, "target": WIDE, "erase": WIDE, "direction_eps": "fp32"}
    common = RUNTIME | {"x": STATE, "x_token": "i32", "x_channel": "i32"}
    common |= {name: given[name] for name in write}
    weights = {"norm": WIDE} if norm else {}
    weights |= {"gate": WIDE, "value": WIDE} if gates else {}
    biases = {"gate_bias": WIDE, "value_bias": WIDE} if gates else {}
    taps_given = {"taps": WIDE} if taps else {}
    walks = launch.plan("forward", width, channels, taps)[0] > 0
    sizes = shape(width, channels, taps, gates, whole=not walks)
    forward_types = common | weights | biases | taps_given | {"row_out": WIDE}
    forward_types |= {"stats": WIDE, "x_new": STATE} if store else {"stats": WIDE}
    forward_types |= {"x_in_out": STATE} if taps > 1 else {}
    forward_types |= {"gate_logits": WIDE, "value_logits": WIDE}
    forward_types |= {"context": STATE} if reads else {}
    past: dict[str, Any] = {"trail_h": (STATE,) * trail, "trail_row": (WIDE,) * trail}
    past_types, past_none = (past, {}) if trail else ({}, past)
    options = plan("forward", width, channels, taps, stores=store)
    yield "forward", forward.forward, forward_types | past_types, sizes | past_none, options

    sizes = shape(width, channels, taps, gates, whole=False)
    logits = {"d_gates": WIDE, "d_values": WIDE} if gates else {}
    if taps > 1 and norm:
        first = RUNTIME | weights | logits
        first |= {
            "x_in": STATE,
            "stats": WIDE,
            "d_context": STATE,
            "dx_in_out": WIDE,
            "partial": WIDE,
        }
        options = plan("norm", width, 1, 1)
        yield "norm_backward", backward.norm_backward, first, sizes, options
        weights, logits = {}, {}
        sizes = shape(width, channels, taps, 0, whole=False)
    types = common | weights | taps_given | logits
    types |= {"dx": STATE, "dh": STATE, "d_target": WIDE, "d_erase": WIDE, "partial": WIDE}
    dx_in = WIDE if taps > 1 and norm else STATE  # of two passes the first one makes it
    types |= {"row_in": WIDE, "stats": WIDE} | ({"d_context": dx_in} if reads else {})
    types |= {"dx_new": STATE, "dx_token": "i32", "dx_channel": "i32"} if store else {}
    sizes["UNIT"] = "direction_eps" in write
    types, sizes = types | past_types, sizes | past_none
    if taps <= 1 < channels and width * channels > WIDE_FROM:
        types["pulls"] = WIDE
        yield "wide_backward", wide.wide_backward, types, sizes, plan("wide", width, channels, taps)
        sizes = sizes | {"BLOCK": min(sizes["BLOCK"], 256)}
        options = plan("weights", width, channels, taps)
        yield "weights_backward", wide.weights_backward, types, sizes, options
        return
    options = plan("backward", width, channels, taps, writes="h" in write)
    yield "backward", backward.backward, types, sizes, options


DELTA = ("h", "target", "erase", "direction_eps")
KINDS: dict[str, Callable[[], Iterator[tuple]]] = {
    "plain": lambda: read(768, 1, 0, 0, ("h",)),
    "scalar": lambda: read(768, 1, 0, 1, DELTA),
    "channels": lambda: read(768, 4, 1, 1, DELTA),
    "tokens": lambda: read(768, 4, 4, 1, DELTA),
    "last": lambda: read(768, 4, 1, 0, DELTA, norm=False, store=False),
    "rewrite": lambda: read(768, 4, 0, 0, DELTA, norm=False, reads=False),
    "trail": lambda: read(768, 4, 1, 1, DELTA, trail=2),
    "long": lambda: read(5120, 1, 0, 0, ("h",)),
    "wide": lambda: read(4096, 4, 1, 1, DELTA),
    "wider": lambda: read(2048, 8, 1, 1, DELTA),
    "single": lambda: read(1, 1, 0, 0, ("h",)),
    "embedding": lambda: expansion(),
}
CHOSEN = {80: ("plain", "tokens", "embedding"), 90: tuple(KINDS), 100: ("channels", "tokens")}


def expansion(channels: int = 4, taps: int = 4):
    types = RUNTIME | {"x": STATE, "taps": WIDE, "starts": "*i1", "partial": WIDE, "dx": STATE}
    types |= {"out": STATE, "d_out": STATE}
    sizes = {"D": 768, "DV": channels, "K": taps, "BLOCK": 256}
    yield "expand_forward", embedding.expand_forward, types, sizes, {"num_warps": 2}
    yield "expand_backward", embedding.expand_backward, types, sizes, {"num_warps": 2}


def main() -> None:
    spills = {}
    for cap, kinds in CHOSEN.items():
        for kind in kinds:
            for name, *arguments in KINDS[kind]():
                spills[f"{kind} {name} sm_{cap}"] = spilled(*arguments, cap)
    print(json.dumps(spills))


if __name__ == "__main__":
    main()
