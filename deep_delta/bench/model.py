"""`ddl bench model`: training steps and prefill of whole models, each checked first."""

import functools
import gc
import statistics
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from deep_delta.accounting import PeakMemory, peak_flops
from deep_delta.bench.op import available_providers
from deep_delta.bench.record import OK, Record, chosen, table
from deep_delta.bench.subject import Setup, Subject, Wrong, graphs_apart
from deep_delta.bench.timing import device, host_time, times
from deep_delta.errors import UserError
from deep_delta.model.flops import flops_per_token
from deep_delta.model.loss import LOSSES, resolve_loss
from deep_delta.model.presets import SIZES, VARIANTS

MODES = ("train", "prefill")
STATE_DTYPES = ("bfloat16", "float16", "float32")
BASELINE = "additive"
ROUNDS = 4
ONCE_A_MODE = ("time", "host", "tokens/s", "ratio")
ONCE = ("peak memory", "memory ratio", "MFU", "first step")  # with the first mode
FILLED = 0.85  # of the GPU's memory that all models and the largest step may take together


def bench_model(
    *,
    variants: Sequence[str],
    size: str,
    batch: int,
    seq_len: int,
    state_dtype: str,
    providers: Sequence[str] | None,
    rebuild: Sequence[int | str],
    gradient_checkpointing: bool,
    cuda_graphs: bool,
    loss: str,
    modes: Sequence[str],
    steps: int,
    warmup: int,
    csv: Path | None,
    command: str,
) -> bool:
    """Measure every variant with every provider; False if any of them got no figures.

    The arguments are the options of the command. The additive model of every provider is added
    and comes first.

    Raises:
        UserError: a name that does not exist, or something this machine cannot run.
    """
    where = device()
    chosen("--size", [size], list(SIZES))
    chosen("--state-dtype", [state_dtype], STATE_DTYPES)
    chosen("--loss", [loss], list(LOSSES))
    default = ["triton" if where.type == "cuda" else "reference"]
    provider_names = available_providers(providers or default)
    others = [name for name in chosen("--variants", variants, list(VARIANTS)) if name != BASELINE]
    if cuda_graphs and where.type != "cuda":
        raise UserError("--cuda-graphs needs a GPU")
    try:
        resolve_loss(loss, where)
    except ValueError as error:
        raise UserError(f"--loss: {error}") from None
    setup = Setup(
        where, size, batch, seq_len, state_dtype, gradient_checkpointing, cuda_graphs, loss,
        tuple(chosen("--modes", modes, MODES)),
    )  # fmt: skip
    subjects = [Subject(BASELINE, provider, "speed", setup) for provider in provider_names]
    for variant in others:
        for provider in provider_names:
            # What is rebuilt is a matter of the fused operations.
            settings = dict.fromkeys(rebuild) if provider == "triton" else ["speed"]
            subjects += [Subject(variant, provider, setting, setup) for setting in settings]
    with graphs_apart():
        return Benchmark(setup, steps, warmup, Record(command, csv)).run(subjects)


class Benchmark:
    """Times of many models: each alone, then, if all fit in memory, in turns."""

    def __init__(self, setup: Setup, steps: int, warmup: int, record: Record):
        self.setup, self.steps, self.warmup, self.record = setup, steps, warmup, record
        self.seconds: dict[Subject, dict[str, float]] = {}  # medians
        self.host: dict[tuple[Subject, str], float | None] = {}
        self.peak: dict[Subject, int] = {}
        self.rows: dict[Subject, dict[str, str]] = {}
        self.kept: list[Subject] = []
        self.interleave = True

    def run(self, subjects: Sequence[Subject]) -> bool:
        """Measure and report; whether all subjects got figures."""
        for subject in subjects:
            status = self._attempt(subject)
            if status != OK:
                self._report(subject, "alone", status)
            self._make_room(subject, status)
        footer = [f"medians of {self.steps} steps, one model after the other; {self.setup}"]
        if self.kept:
            first = self.kept[0]
            before = dict(self.seconds[first])
            if len(self.kept) > 1 and self._in_turns():
                footer = [f"medians of {self.steps} steps in {ROUNDS} rounds; {self.setup}"]
            for mode in self.setup.modes:
                drift = 100 * (self._alone(first, mode) / before[mode] - 1)
                footer.append(f"{first}, {mode}, at the end against the start: {drift:+.1f} % time")
        baseline = self._baseline()
        if baseline is not None:
            footer.append(f"ratios: tokens/s and peak memory over those of {baseline}")
        print("\n" + table([self.rows[subject] for subject in subjects]) + "\n".join(footer))
        return not self.record.failed

    def _attempt(self, subject: Subject) -> str:
        """Begin, warm up, measure alone: OK, or why not; the next subject still runs."""
        try:
            held = _allocated()
            subject.begin()
            self.seconds[subject] = {}
            # Training comes first, so that this is the peak of training steps if there are any.
            for mode in self.setup.modes:
                own = _allocated() - held
                with PeakMemory() as peak:
                    subject.capture(mode)
                    self.seconds[subject][mode] = self._alone(subject, mode)
                self.peak.setdefault(subject, own + peak.bytes)
                work = functools.partial(subject.work, mode)
                self.host[subject, mode] = host_time(work)
            self._report(subject, "alone", OK)
        except Wrong as error:
            return str(error)
        except ValueError as error:
            return " ".join(f"not available: {error}".split())
        except torch.OutOfMemoryError:
            return f"out of memory beside {len(self.kept)} other models"
        except Exception as error:
            traceback.print_exc()
            return f"failed: {type(error).__name__}"
        return OK

    def _alone(self, subject: Subject, mode: str) -> float:
        work = functools.partial(subject.work, mode)
        return statistics.median(times([work], self.steps, self.warmup))

    def _make_room(self, subject: Subject, status: str) -> None:
        """Keep a model for the rounds as long as memory lasts; the first baseline always."""
        if status != OK:
            self.seconds.pop(subject, None)
            subject.release()
        elif self.interleave or not self.kept:
            self.kept.append(subject)
        else:
            subject.release()
        gc.collect()
        if self.setup.device.type != "cuda":
            return
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        if _allocated() + max(self.peak.values(), default=0) > FILLED * total:
            self.interleave = False
            for kept in self.kept[1:]:
                kept.release()
            del self.kept[1:]

    def _in_turns(self) -> bool:
        """Time all models in rounds, so that a drift of the clocks hits all alike.

        False, and nothing is changed, if the memory is too fragmented for that.
        """
        seconds: dict[tuple[Subject, str], list[float]] = {}
        try:
            for turn in range(ROUNDS):
                # To and fro: a GPU at its power limit is slower behind a model that heats it more.
                for subject in self.kept[:: -1 if turn % 2 else 1]:
                    for mode in self.setup.modes:
                        work = functools.partial(subject.work, mode)
                        found = times([work], -(-self.steps // ROUNDS), self.warmup)
                        seconds.setdefault((subject, mode), []).extend(found)
        except torch.OutOfMemoryError:
            return False
        for (subject, mode), all_of_them in seconds.items():
            self.seconds[subject][mode] = statistics.median(all_of_them)
        for subject in self.kept:
            self._report(subject, "in turns", OK)
        return True

    def _baseline(self) -> Subject | None:
        """The fastest additive model measured so far."""
        mode = self.setup.modes[0]
        found = [s for s in self.seconds if s.variant == BASELINE and mode in self.seconds[s]]
        return min(found, key=lambda subject: self.seconds[subject][mode], default=None)

    def _report(self, subject: Subject, timing: str, status: str) -> None:
        """Record a subject, one row a mode, and make or renew its row of the table."""
        shared: dict[str, Any] = {
            "level": "model",
            "name": subject.variant,
            "provider": subject.provider,
            "timing": timing,
            "settings": subject.settings,
            "dtype": self.setup.state_dtype,
            "status": status,
        }
        modes = self.setup.modes
        cells = dict.fromkeys([f"{mode} {name}" for mode in modes for name in ONCE_A_MODE], "")
        cells |= dict.fromkeys(ONCE, "")
        if status != OK:
            cells[f"{modes[0]} time"] = status
            self.record.add(str(subject), **shared, **{"pass": "+".join(modes)})
        else:
            for mode in modes:
                figures, shown = self._figures(subject, mode)
                line = ", ".join(f"{name} {cell}" for name, cell in shown.items())
                row = {**shared, **figures, "pass": mode}
                self.record.add(f"{subject}, {timing}: {line}", **row)
                cells |= shown
        self.rows[subject] = {"model": str(subject), **cells}

    def _figures(self, subject: Subject, mode: str) -> tuple[dict[str, str], dict[str, str]]:
        """The columns of the CSV, and the cells of the table, that one mode fills."""
        seconds, peak = self.seconds[subject][mode], self.peak[subject]
        speed = self.setup.tokens / seconds
        figures = {"ms": f"{seconds * 1e3:.5g}", "tokens_per_s": f"{speed:.0f}"}
        shown = {f"{mode} time": f"{seconds * 1e3:.2f} ms", f"{mode} tokens/s": f"{speed:,.0f}"}
        baseline = self._baseline()
        if baseline is not None:
            ratio = self.seconds[baseline][mode] / seconds
            figures["ratio"], shown[f"{mode} ratio"] = f"{ratio:.4f}", f"{ratio:.3f}"
        host = self.host[subject, mode]
        if host is not None:
            figures["host_ms"], shown[f"{mode} host"] = f"{host * 1e3:.4g}", f"{host * 1e3:.1f} ms"
        if mode != self.setup.modes[0]:
            return figures, shown
        figures["peak_gib"] = f"{peak / 2**30:.3f}"
        shown["peak memory"] = f"{peak / 2**30:.2f} GiB"
        if baseline is not None and self.peak[baseline]:
            ratio = peak / self.peak[baseline]
            figures["peak_ratio"], shown["memory ratio"] = f"{ratio:.4f}", f"{ratio:.2f}"
        if subject.first_step is not None:
            figures["first_step_s"] = shown["first step"] = f"{subject.first_step:.1f}"
            shown["first step"] += " s"
            flops = speed * flops_per_token(subject.config(), self.setup.seq_len)
            most = peak_flops(self.record.environment["device"])
            if most is not None:
                figures["mfu"] = f"{flops / most:.4f}"
                shown["MFU"] = f"{100 * flops / most:.1f} %"
        return figures, shown


def _allocated() -> int:
    """Bytes that tensors take on the GPU; 0 without one."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
