"""`ddl bench op`: time and share of the copy bandwidth of single operations, checked first."""

import statistics
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._functorch import config as functorch_config

from deep_delta.bench.cases import OPS, SEQUENCE, Case, Tensors, cases, make_inputs, minimum_bytes
from deep_delta.bench.check import operation_difference
from deep_delta.bench.record import OK, Record, chosen, table
from deep_delta.bench.timing import Work, copy_bandwidth, device, replayed, sets_beyond_cache, times
from deep_delta.errors import UserError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SWEEP = {"widths": [768, 1024, 2048, 4096], "channels": [1, 2, 4, 8]}
LEAST_TOKENS = {"cuda": 32768, "cpu": SEQUENCE}
PASSES = ("forward", "backward")
REPLAYED = 3e9  # bytes that one CUDA graph moves: a millisecond, beside which its launch is nothing

Operation = Callable[[Tensors], Tensors]


def _compiled(call: Callable[..., Tensors]) -> Operation:
    # One graph per case: a limit on recompilations, or shapes that become symbols, would time
    # something else than the first case got.
    torch.compiler.reset()
    return torch.compile(partial(call, backend="reference"), dynamic=False, fullgraph=True)


PROVIDERS: dict[str, Callable[[Callable[..., Tensors]], Operation]] = {
    "reference": lambda call: partial(call, backend="reference"),
    "compile": _compiled,
    "triton": lambda call: partial(call, backend="triton"),
}


def available_providers(asked: Sequence[str] | None) -> list[str]:
    """The providers asked for, or all that this machine can run; UserError for one it cannot."""
    if asked is None:
        return [name for name in PROVIDERS if name != "triton" or torch.cuda.is_available()]
    names = chosen("--providers", asked, list(PROVIDERS))
    if "triton" in names and not torch.cuda.is_available():
        raise UserError("--providers: triton needs a GPU; on a CPU there are reference and compile")
    return names


def bench_op(
    *,
    ops: Sequence[str],
    width: int,
    value_channels: Sequence[int],
    kernel_sizes: Sequence[int],
    tokens: int | None,
    dtype: str,
    providers: Sequence[str] | None,
    repeats: int,
    sweep: bool,
    csv: Path | None,
    command: str,
) -> bool:
    """Measure every case with every provider; False if any of them got no figures.

    tokens: B·T; None for 32,768 on a GPU and 2,048 on a CPU. sweep: widths and channels of SWEEP
    instead of `width` and `value_channels`. The other arguments are the options of the command.

    Raises:
        UserError: a name that does not exist, or a shape too small to say anything.
    """
    where = device()
    names = chosen("--ops", ops, list(OPS))
    chosen("--dtype", [dtype], list(DTYPES))
    provider_names = available_providers(providers)
    tokens = tokens or (2 * SEQUENCE if where.type == "cpu" else LEAST_TOKENS["cuda"])
    least = LEAST_TOKENS[where.type]
    if tokens < least or tokens % SEQUENCE:
        raise UserError(f"--tokens is {tokens}; it must be a multiple of {SEQUENCE} from {least}")
    widths = SWEEP["widths"] if sweep else [width]
    channels = SWEEP["channels"] if sweep else list(value_channels)
    todo = cases(names, widths, channels, list(kernel_sizes), tokens, DTYPES[dtype])

    record = Record(command, csv)
    copy = copy_bandwidth()
    print(f"copy bandwidth {copy / 1e9:,.0f} GB/s ({record.environment['device']})", flush=True)
    rows = []
    for case in todo:
        for provider in provider_names:
            status, seconds = _attempt(case, provider, repeats, where)
            rows += _report(record, case, provider, status, seconds, copy)
            if where.type == "cuda":
                torch.cuda.empty_cache()
    print(f"\n{table(rows)}", end="")
    print(f"share: minimum bytes / time / copy bandwidth ({copy / 1e9:,.0f} GB/s, this run)")
    return not record.failed


def _attempt(
    case: Case, provider: str, repeats: int, where: torch.device
) -> tuple[str, tuple[float, ...]]:
    """OK and the median seconds of each pass, or why there are none; the next case still runs."""
    try:
        return measure(case, provider, repeats, where)
    except torch.OutOfMemoryError:
        return "out of memory", ()
    except Exception as error:
        traceback.print_exc()
        return f"failed: {type(error).__name__}", ()


def measure(
    case: Case, provider: str, repeats: int, where: torch.device
) -> tuple[str, tuple[float, ...]]:
    """Check one provider on one case and, if it is right, time it: (OK, median seconds).

    The seconds are those of the forward and of the backward pass alone; without them the first
    value says what is wrong.
    """
    generator = torch.Generator(where).manual_seed(0)
    operation = PROVIDERS[provider](OPS[case.op])
    sets = [make_inputs(case, where, generator)]
    autocast = torch.autocast(where.type, case.dtype, enabled=case.dtype != torch.float32)
    # A backward pass that is called again must not give away what it reads.
    with autocast, functorch_config.patch(donated_buffer=False):
        wrong = operation_difference(case, operation, sets[0], generator)
        if wrong is not None:
            return f"differs from the reference: {wrong}", ()
        while len(sets) < sets_beyond_cache(minimum_bytes(case)[0]):
            sets.append(make_inputs(case, where, generator))
        medians = []
        for make, moved in zip((_forward, _backward), minimum_bytes(case), strict=True):
            works: list[Work] = [partial(make, operation, inputs) for inputs in sets]
            count = 1
            if where.type == "cuda":
                count = len(sets) * max(round(REPLAYED / moved / len(sets)), 1)
                replay, result = replayed(works, count)
                replay()()
                launched: Any = works[(count - 1) % len(sets)]()()
                if not _same(result, launched):
                    return "differs as a CUDA graph", ()
                works = [replay]
            medians.append(statistics.median(times(works, repeats)) / count)
    return OK, tuple(medians)


def _forward(operation: Operation, inputs: Tensors) -> Callable[[], list[Tensor]]:
    return lambda: list(operation(inputs).values())


def _backward(operation: Operation, inputs: Tensors) -> Callable[[], Sequence[Tensor]]:
    """A forward pass; the call gives all gradients by random ones of the outputs, repeatedly."""
    outputs = list(operation(inputs).values())
    generator = torch.Generator(outputs[0].device).manual_seed(0)
    # They lie in memory as the outputs do, as those of a model's next sublayer would.
    gradients = [torch.empty_like(x).normal_(generator=generator) for x in outputs]
    leaves = list(inputs.values())
    return lambda: torch.autograd.grad(outputs, leaves, gradients, retain_graph=True)


def _same(these: Sequence[Tensor], those: Sequence[Tensor]) -> bool:
    """Whether two runs of one call agree but for the order of sums."""
    pairs = [
        (this.detach().float(), that.detach().float())
        for this, that in zip(these, those, strict=True)
    ]
    return all(torch.allclose(x, y, rtol=0, atol=1e-2 * float(y.abs().max())) for x, y in pairs)


def _report(
    record: Record, case: Case, provider: str, status: str, seconds: Sequence[float], copy: float
) -> list[dict[str, str]]:
    """Record the two passes of a case; their rows of the table."""
    rows = []
    for index, moved in enumerate(minimum_bytes(case)):
        shown = {"op": case.op, "case": str(case), "provider": provider, "pass": PASSES[index]}
        figures, cells = {}, {"time": status, "GB/s": "", "share of copy": ""}
        if status == OK:
            speed = moved / seconds[index]
            figures = {
                "ms": f"{seconds[index] * 1e3:.5g}",
                "share_of_copy": f"{speed / copy:.4f}",
                "tokens_per_s": f"{case.tokens / seconds[index]:.0f}",
            }
            cells = {
                "time": f"{seconds[index] * 1e3:.3f} ms",
                "GB/s": f"{speed / 1e9:,.0f}",
                "share of copy": f"{100 * speed / copy:.0f} %",
            }
        line = " ".join(shown.values())
        if status == OK:
            line += f": {cells['time']}, {cells['GB/s']} GB/s, {cells['share of copy']} of copy"
        record.add(
            line,
            **{
                "level": "op",
                "name": case.op,
                "provider": provider,
                "pass": PASSES[index],
                "settings": str(case),
                "dtype": str(case.dtype).removeprefix("torch."),
                "bytes": moved,
                "copy_gb_per_s": f"{copy / 1e9:.1f}",
                "status": status,
                **figures,
            },
        )
        rows.append(shown | cells)
    return rows
