"""What `ddl train`'s loop adds to a training step: the loop itself and a bare one, in turns.

    python3 scripts/loop_overhead.py --variants additive,ddl-cc

trains each variant twice from the same weights on the same batches: by `deep_delta.train.run.train`
with its batches, signals and one log a round, and by forward, backward, clipping, AdamW and
schedule alone, on batches that lie on the device already. They take turns by rounds, to and fro. A
variant whose two losses part in the first steps gets no figures.

"host" is the time that Python needs to queue a step on an idle GPU: where that is longer than the
step, the GPU waits for Python. On a CPU the figures only show that the script works.
"""

import argparse
import contextlib
import functools
import io
import json
import shlex
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also where nothing is installed

import numpy as np
import torch
from torch import Tensor
from transformers import set_seed

from deep_delta import DeepDeltaForCausalLM
from deep_delta.bench.model import STATE_DTYPES
from deep_delta.bench.record import environment, table
from deep_delta.data.manifest import Manifest
from deep_delta.data.tokenizer import load_tokenizer
from deep_delta.data.writer import ShardWriter, WriterState
from deep_delta.errors import UserError
from deep_delta.model.compile import compile_layers
from deep_delta.train import run
from deep_delta.train.batches import collate
from deep_delta.train.groups import parameter_groups
from deep_delta.train.loop import Loop
from deep_delta.train.recipe import Recipe, load_recipe, merge
from deep_delta.train.schedule import rate_factor
from deep_delta.train.stop import StopOnSignal

SIDES = ("loop", "bare")
CHECKED = 10  # steps before the rounds, whose losses are compared one by one
HOST_STEPS = 4
# How far the two losses of a checked step may lie apart, in nats. The sums are the same, but a GPU
# adds gradients in an order that changes from run to run, and bf16 rounds. Weights shaken by 1e-6
# moved the losses of ten bf16 steps (6 layers of 128, on a CPU) by at most 4e-4; without clipping
# they were off by 0.9e-2 to 1.5e-2, with a schedule one step late by 4e-2.
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-3}


def random_tokens(folder: Path, vocab_size: int, train: int, val: int) -> None:
    """Make a data folder of random ids, small ones oftener: there is something to learn."""
    folder.mkdir()
    tokenizer, generator = load_tokenizer(None), np.random.default_rng(0)
    splits = {}
    for split, count in {"train": train, "val": val}.items():
        writer = ShardWriter(folder, split, np.dtype("<u2"), count, WriterState())
        writer.add((vocab_size ** generator.random(count)).astype("<u2"), 1, count)
        splits[split] = writer.finish()
    tokenizer.save(folder)
    manifest = Manifest(
        dtype="uint16",
        vocab_size=vocab_size,
        eot_id=tokenizer.eot_id,
        tokenizer_name=tokenizer.name,
        tokenizer_sha256=tokenizer.sha256,
        settings={},
        empty_documents=0,
        splits=splits,
    )
    manifest.save(folder)


@dataclass
class Result:
    """Seconds a step: the mean of each round, and on the host of single steps, by side."""

    rounds: dict[str, list[float]] = field(default_factory=lambda: {side: [] for side in SIDES})
    host: dict[str, list[float]] = field(default_factory=lambda: {side: [] for side in SIDES})
    loss_difference: float = 0.0

    def ms(self, side: str) -> float:
        return 1e3 * statistics.median(self.rounds[side])

    def ratios(self) -> list[float]:
        """Loop over bare, by round."""
        return [one / other for one, other in zip(*self.rounds.values(), strict=True)]


class Measured(Exception):
    """All rounds are done: there is nothing to evaluate or save."""

    def __init__(self, result: Result):
        super().__init__()
        self.result = result


class BareLoop:
    """Nothing but steps, on the given batches, from a run's initial weights."""

    def __init__(self, recipe: Recipe, batches: list[Tensor]):
        self.recipe, self.batches, self.taken = recipe, iter(batches), 0
        where, (sequences, length) = batches[0].device, batches[0].shape
        # A tensor as in the loop, so that both sides run the same compiled graphs.
        self.predictions = torch.tensor(sequences * (length - 1), device=where)
        self.autocast = torch.autocast(
            where.type, torch.bfloat16, enabled=recipe.precision == "bf16"
        )
        set_seed(recipe.seed)
        self.model = DeepDeltaForCausalLM(run.model_config(recipe)).to(where).train()
        if recipe.compile:
            compile_layers(self.model)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, recipe.lr, recipe.weight_decay, recipe.decay_residual),
            betas=(recipe.beta1, recipe.beta2),
            fused=True,
        )
        self.ids: list[Tensor] = []
        self.losses: list[Tensor] = []

    def step(self) -> None:
        ids = next(self.batches)
        with self.autocast:
            loss = self.model(
                ids,
                labels=ids,
                num_items_in_batch=self.predictions,
                skip_logits=True,
                use_cache=False,
            ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.lr * rate_factor(self.recipe, self.taken)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.taken += 1
        self.ids.append(ids)
        self.losses.append(loss.detach())


class Watched(Loop):
    """The run's loop, which keeps batches and losses and lets a bare one have its turns."""

    def __init__(self, recipe: Recipe, *arguments, rounds: int):
        super().__init__(recipe, *arguments)
        self.rounds = rounds
        self.ids: list[Tensor] = []
        self.losses: list[Tensor] = []
        batches = [
            collate(self.data, self.order(step), self.devices.device)["input_ids"]
            for step in range(recipe.steps)
        ]
        self.bare_loop = BareLoop(recipe, batches)

    def forward_backward(self, batch, count):
        loss = super().forward_backward(batch, count)
        self.ids.append(batch["input_ids"])
        self.losses.append(loss)
        return loss

    def run(self, stop: StopOnSignal) -> int | None:
        own, others = self.bare.state_dict(), self.bare_loop.model.state_dict()
        if not all(torch.equal(tensor, others[name]) for name, tensor in own.items()):
            raise UserError("the run and the bare loop start from other weights: no figures")
        self.metrics.start_clock()
        with self.watch, stop:
            self.watch.begin("the measurement", "its end")
            result = self.measure(stop)
        result.loss_difference = self.check(TOLERANCE[self.recipe.precision])
        raise Measured(result)

    def measure(self, stop: StopOnSignal) -> Result:
        for side in SIDES:
            self.steps(side, CHECKED, stop)
        result = Result()
        for number in range(self.rounds):
            for side in SIDES if number % 2 == 0 else reversed(SIDES):
                synchronize()
                start = time.perf_counter()
                self.steps(side, self.recipe.log_every, stop)
                synchronize()
                result.rounds[side].append((time.perf_counter() - start) / self.recipe.log_every)
        for side in SIDES:
            for _ in range(HOST_STEPS):
                synchronize()
                start = time.perf_counter()
                self.steps(side, 1, stop, log=False)
                result.host[side].append(time.perf_counter() - start)
        return result

    def steps(self, side: str, count: int, stop: StopOnSignal, log: bool = True) -> None:
        """As `Loop.run` takes them, with one log at the end; or of the bare loop."""
        for _ in range(count):
            if side == "bare":
                self.bare_loop.step()
                continue
            rate, norm = self.train_step()
            stop.agree()
        if side == "loop" and log:
            self.log(rate, norm)

    def check(self, tolerance: float) -> float:
        """The largest difference of losses in the checked steps; UserError if it is too large."""
        if not all(torch.equal(*pair) for pair in zip(self.ids, self.bare_loop.ids, strict=True)):
            raise UserError("the run and the bare loop saw other batches: no figures")
        pairs = list(zip(self.losses[:CHECKED], self.bare_loop.losses[:CHECKED], strict=True))
        differences = [abs(float(one) - float(other)) for one, other in pairs]
        for step, difference in enumerate(differences, start=1):
            if not difference <= tolerance:
                one, other = map(float, pairs[step - 1])
                raise UserError(
                    f"losses part at step {step}: {one:.5f} by the run, {other:.5f} by the "
                    f"bare loop (more than {tolerance:g} apart): no figures"
                )
        return max(differences)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(recipe: Recipe, rounds: int) -> Result:
    """UserError if the two sides do not train the same."""
    # All that `train` sets up is measured; only the class of its loop is another one.
    watched = functools.partial(Watched, rounds=rounds)
    # The progress line's speed would hold the bare loop's time.
    quiet = contextlib.redirect_stderr(io.StringIO())
    try:
        with mock.patch.object(run, "Loop", watched), quiet:
            run.train(recipe)
    except Measured as done:
        return done.result
    raise AssertionError("the run ended before its measurement")


def recipe_of(variant: str, options: argparse.Namespace, folder: Path) -> Recipe:
    """The shipped recipe of that size, but for what is asked here; its data in `folder`."""
    # One step more than are taken: the run is left at its start.
    steps = CHECKED + options.rounds * options.steps + HOST_STEPS + 1
    cuda = torch.cuda.is_available()
    recipe = merge(
        load_recipe(options.size),
        {
            "variant": variant,
            "model": {"state_dtype": options.state_dtype},
            "data": str(folder / "data"),
            "out": str(folder / "runs"),
            "steps": steps,
            "batch_size": options.batch,
            "micro_batch_size": options.batch,
            "seq_len": options.seq_len,
            "warmup_steps": CHECKED // 2,  # so that the checked steps change the weights
            "log_every": options.steps,
            "eval_every": steps,
            "eval_sequences": 1,
            "save_every": None,
            "precision": "bf16" if cuda else "fp32",
            "compile": cuda,
        },
    )
    if not (folder / "data").exists():  # all variants of a size train on the same
        tokens = steps * options.batch * options.seq_len
        vocab_size = run.model_config(recipe).vocab_size
        random_tokens(folder / "data", vocab_size, tokens, options.seq_len)
    return recipe


def row(variant: str, result: Result, tokens: int) -> dict[str, str]:
    loop, bare, by_round = result.ms("loop"), result.ms("bare"), result.ratios()
    host = {
        side: f"{1e3 * statistics.median(result.host[side]):.1f}"
        if torch.cuda.is_available()
        else "–"  # where Python computes, queuing a step is taking it
        for side in SIDES
    }
    return {
        "variant": variant,
        "bare ms": f"{bare:.2f}",
        "loop ms": f"{loop:.2f}",
        "loop/bare": f"{loop / bare:.4f}",
        "by round": f"{min(by_round):.4f}–{max(by_round):.4f}",
        "bare tokens/s": f"{1e3 * tokens / bare:,.0f}",
        "loop tokens/s": f"{1e3 * tokens / loop:,.0f}",
        "bare host ms": host["bare"],
        "loop host ms": host["loop"],
        "losses differ by": f"{result.loss_difference:.1e}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", default="additive,ddl-cc")
    parser.add_argument("--size", default="small", help="tiny, small or medium")
    parser.add_argument("--batch", type=int, default=64, help="sequences a step, in one pass")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=20, help="steps a round, and between logs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--state-dtype", choices=STATE_DTYPES, default="float32")
    parser.add_argument("--json", type=Path, help="also write the figures of every round there")
    options = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for variant in options.variants.split(","):
            begin = time.perf_counter()
            try:
                recipe = recipe_of(variant, options, Path(folder))
                found[variant] = measure(recipe, options.rounds)
            except UserError as error:
                sys.exit(f"error: {variant}: {error}")
            print(f"{variant}: measured in {time.perf_counter() - begin:.0f} s", flush=True)
    where = environment(shlex.join(["scripts/loop_overhead.py", *sys.argv[1:]]))
    if options.json is not None:
        record = {**where, "seconds a step": {name: asdict(r) for name, r in found.items()}}
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    tokens = options.batch * options.seq_len
    print("\n" + table([row(variant, result, tokens) for variant, result in found.items()]), end="")
    print(
        f"medians of {options.rounds} rounds of {options.steps} steps, in turns; "
        f"size={options.size} batch={options.batch} seq_len={options.seq_len} "
        f"state={options.state_dtype}; {where['device']}, torch {where['torch']}, "
        f"transformers {where['transformers']}, commit {where['commit']}"
    )


if __name__ == "__main__":
    main()
