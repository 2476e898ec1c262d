"""The run folder: what a run finds there and what it leaves."""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from deep_delta.checkpoint import weights_sha256
from deep_delta.data import PackedSequences
from deep_delta.data.files import publish_folder, write_json_atomically
from deep_delta.errors import UserError
from deep_delta.model import DeepDeltaConfig, DeepDeltaForCausalLM
from deep_delta.report.provenance import commit, hardware, versions
from deep_delta.train.checkpoint import (
    STAGE,
    check_order,
    checkpoints,
    fault,
    newest_whole,
    put_others_aside,
    save_weights,
    step_of,
)
from deep_delta.train.groups import decayed_names, width_scaled_names
from deep_delta.train.metrics import read_metrics
from deep_delta.train.processes import in_main, is_main, on_main, processes
from deep_delta.train.recipe import REORDERS_SUMS, Recipe, load_recipe, save_recipe
from deep_delta.train.stop import NotFinite
from deep_delta.train.texts import Texts

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FINAL, RESULT, RECIPE, DATA = "final", "result.json", "recipe.yaml", "data.json"
DIVERGED = "diverged.json"
SHOWN = 4  # sequences of a diverged step that the one line names


@dataclass
class RunResult:
    """What a finished run leaves in result.json.

    val_loss: nats per token at the last step.
    test_loss: likewise on all of the test text, which nothing is chosen on; None without one.
    train_seconds: without evaluation and saving.
    tokens_per_s: tokens / train_seconds without the first logged interval, which warms up.
    peak_memory_bytes: highest use of the device's memory by the run (of the process on a CPU).
    flops_per_token: forward and backward.
    diverged: where the run stopped because a loss or gradient was no number, in one line; None if
        it did not. val_loss is None then.
    hardware, commit, versions: with what it was finished; None where that is not known.
    """

    variant: str
    seed: int
    parameters: int
    val_loss: float | None
    tokens: int
    train_seconds: float
    tokens_per_s: float
    peak_memory_bytes: int
    flops_per_token: float
    test_loss: float | None = None
    diverged: str | None = None
    hardware: str | None = None
    commit: str | None = None
    versions: dict[str, str] | None = None


class Diverged(UserError):
    """A run that stopped because a loss or gradient was no number; it has a result all the same."""


def read_result(folder: Path) -> RunResult:
    """What `save_result` left in a finished run folder."""
    return RunResult(**json.loads((folder / RESULT).read_text(encoding="utf-8")))


class Held(UserError):
    """A run folder in which another process trains."""


class Hold:
    """A run folder that no other process on machines with the same file system may train in.

    The lock is a file beside the folder, and ends with the process, however it ends.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._file: Any = None

    def take(self) -> None:
        """`Held` if another process has it. Where there are no locks, nothing is checked."""
        if fcntl is None:
            return
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.folder.with_name(f".{self.folder.name}.lock").open("a")
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Held(
                f"{self.folder} is being trained by another process: wait for its end, or choose "
                "another --out"
            ) from None
        except OSError:  # a file system without them, or without writing
            return

    def __enter__(self) -> "Hold":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()


class RunFolder:
    """The folder of one run: what it finds there, and what it leaves.

    Every process calls these methods; the main one does their work.
    """

    def __init__(self, recipe: Recipe):
        self.recipe, self.path = recipe, recipe.run_folder

    @in_main
    def finished(self) -> RunResult | None:
        """The result of the recipe's run, if it is finished; Diverged where it ended so."""
        if not (self.path / RESULT).is_file():
            return None
        result = read_result(self.path)
        if result.diverged:
            raise Diverged(result.diverged)
        return result

    @in_main
    def prepare(self, config: DeepDeltaConfig, texts: Texts) -> Path | None:
        """Make the run folder; the checkpoint to go on from, or None.

        UserError if the folder has begun with another recipe or other data, or if the checkpoint
        that the recipe names does not fit.
        """
        if self.recipe.resume == "never" and self.path.exists():
            number = 1
            while (aside := self.path.with_name(f"{self.path.name}.old-{number}")).exists():
                number += 1
            self.path.rename(aside)  # nothing is lost by starting over
        identity = self._identity(texts)
        if self.path.exists():
            shutil.rmtree(self.path / STAGE, ignore_errors=True)
        newest, finished = newest_whole(self.path), (self.path / RESULT).is_file()
        begun = load_recipe(self.path / RECIPE) if newest or finished else None
        start = None
        # The same command again goes on with what it has begun.
        if self.recipe.resume not in ("auto", "never") and not (
            begun and begun.resume == self.recipe.resume
        ):
            start = Path(self.recipe.resume)
            self._check_checkpoint(start, config)
            if finished:
                raise UserError(
                    f"{self.path} is finished: choose another --out to go on from {start}"
                )
        if begun:  # else there is nothing that other choices spoil
            changed = self.recipe.differences(begun)
            before = json.loads((self.path / DATA).read_text(encoding="utf-8"))
            if identity.get("init") != before.get("init") and self.recipe.init == begun.init:
                changed.append(f"other weights in {self.recipe.init}")
            if {**identity, "init": None} != {**before, "init": None}:
                changed.append(f"other data in {self.recipe.data}")
            if changed:
                raise UserError(
                    f"{self.path} holds a run of another recipe ({'; '.join(changed)}): choose "
                    "another --out, or start over by ddl train --resume never"
                )
        if finished:
            return None
        begins_at = start or newest
        if begins_at:
            check_order(begins_at)
        self.path.mkdir(parents=True, exist_ok=True)
        if start:
            put_others_aside(self.path, start)
        save_recipe(self.recipe, self.path / RECIPE)
        write_json_atomically(self.path / DATA, identity)
        return begins_at

    def _identity(self, texts: Texts) -> dict[str, list[str]]:
        """Hashes that tell data, and weights of `init`, from others by the same path."""
        splits = {"train": texts.train, "val": texts.val, "test": texts.test}
        hashes = {name: data.shards.sha256 for name, data in splits.items() if data is not None}
        if self.recipe.init is not None:
            hashes["init"] = list(weights_sha256(Path(self.recipe.init)).values())
        return {"tokenizer": [texts.manifest.tokenizer_sha256], **hashes}

    def _check_checkpoint(self, checkpoint: Path, config: DeepDeltaConfig) -> None:
        """UserError unless it is a checkpoint of this model that this recipe can go on from."""
        if not checkpoint.is_dir():
            raise UserError(f"there is no checkpoint folder {checkpoint}")
        step = step_of(checkpoint)
        if step is None:
            raise UserError(
                f"{checkpoint} is not named checkpoint-STEP, as what a run goes on from is: a new "
                f"run begins with the weights of a model there by --init {checkpoint}"
            )
        wrong = fault(checkpoint)
        if wrong is not None:
            raise UserError(f"{checkpoint} is not a whole checkpoint: {wrong}")
        if step >= self.recipe.steps:
            raise UserError(
                f"{checkpoint} has no step left to train of the recipe's {self.recipe.steps}"
            )
        origin = checkpoint.resolve().parent / RECIPE
        if not origin.is_file():
            raise UserError(
                f"{checkpoint} has no {RECIPE} of its run beside it, so that batch_size and "
                "seq_len are not known, nor its place in the data: put it there, or begin a new "
                f"run with its weights by --init {checkpoint}"
            )
        before = load_recipe(origin)
        sizes = [(r.batch_size, r.seq_len) for r in (before, self.recipe)]
        if sizes[0] != sizes[1]:  # a step is a place in the data
            old, new = (f"{batch} × {length}" for batch, length in sizes)
            raise UserError(
                f"{checkpoint} is of batches of {old} tokens, the recipe's are {new}: keep "
                "batch_size and seq_len, or its place in the data would be another"
            )
        if self.recipe.init not in (None, before.init):
            raise UserError(
                f"{checkpoint} is of a run that did not begin with {self.recipe.init}: give "
                "--init or --resume, not both"
            )
        theirs = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
        ours = json.loads(config.to_json_string(use_diff=False))
        skip = {"dtype", "architectures", "transformers_version", "use_cache", *REORDERS_SUMS}
        changed = [
            f"{name}: {theirs[name]} -> {value}"
            for name, value in ours.items()
            if name not in skip and name in theirs and theirs[name] != value
        ]
        if changed:
            raise UserError(f"{checkpoint} is of another model ({'; '.join(changed)})")

    @in_main
    def check_disk(self, model: nn.Module) -> None:
        """UserError where the disk has no room for the run's checkpoints."""
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        saved = self.recipe.keep_checkpoints + 1 if self.recipe.save_every else 1  # Ctrl-C's
        needed = weights * (1 + 3 * saved)  # a checkpoint holds two moments beside the weights
        free = shutil.disk_usage(self.path).free
        # Those that are there already will make room for the next.
        kept = [
            file for path in checkpoints(self.path) for file in path.rglob("*") if file.is_file()
        ]
        if free + sum(file.stat().st_size for file in kept) < needed:
            raise UserError(
                f"{self.path} has {free / 2**20:,.0f} MiB free, the run needs about "
                f"{needed / 2**20:,.0f} MiB: make room or choose another out"
            )

    @in_main
    def save_weight_decay(self, model: PreTrainedModel) -> None:
        """List the tensors with and without weight decay, with their shapes.

        Under µP also those that learn more slowly than the others ("width_scaled"), and their
        factors on learning rate and weight decay.
        """
        decayed = set(decayed_names(model, self.recipe.decay_residual))
        listing: dict[str, dict[str, Any]] = {"decayed": {}, "not_decayed": {}}
        for name, parameter in model.named_parameters():
            kind = "decayed" if name in decayed else "not_decayed"
            listing[kind][name] = list(parameter.shape)
        scaled = width_scaled_names(model)
        if scaled:
            ratio = model.config.width_ratio
            factors = {"learning_rate": 1 / ratio, "weight_decay": ratio}
            listing["width_scaled"] = {**factors, "tensors": scaled}
        write_json_atomically(self.path / "weight_decay.json", listing)

    @in_main
    def save_divergence(self, event: NotFinite, data: PackedSequences) -> str:
        """Leave diverged.json with the step and its data; what happened in one line."""
        places = []
        for sequence in event.sequences:
            shard, offset = data.shards.place(sequence * self.recipe.seq_len)
            places.append({"sequence": sequence, "shard": shard, "token": offset})
        newest = newest_whole(self.path)
        report = {
            "step": event.step,
            event.what: str(event.value),
            "sequences": places,
            "checkpoint": None if newest is None else newest.name,
        }
        write_json_atomically(self.path / DIVERGED, report)
        named = ", ".join(
            f"{place['shard']} from token {place['token']:,}" for place in places[:SHOWN]
        )
        more = len(places) - SHOWN
        return (
            f"{event}; its batch: {named}{f' and {more} more' if more > 0 else ''} (see "
            f"{self.path / DIVERGED}); last good checkpoint: {newest or 'none'}"
        )

    def save_final(self, model: DeepDeltaForCausalLM, tokenizer: Path) -> None:
        """Weights, configuration and the tokenizer of a folder, complete or not there at all."""
        final = self.path / FINAL
        temporary = final.with_name(final.name + ".tmp")
        on_main(lambda: shutil.rmtree(temporary, ignore_errors=True))
        save_weights(model, temporary)
        if not is_main():
            return
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(tokenizer / name, temporary / name)
        publish_folder(temporary, final)

    @in_main
    def save_result(self, **found: Any) -> RunResult:
        """Write result.json from the logged rows and the `found` fields of a RunResult."""
        rows = read_metrics(self.path / "metrics.jsonl")
        logged = [row for row in rows if "loss" in row]
        evaluated = [row for row in rows if "val_loss" in row]
        first, last = logged[0], logged[-1]
        if len(logged) > 1:  # the first interval pays for first calls
            speed = (last["tokens"] - first["tokens"]) / (last["seconds"] - first["seconds"])
        else:  # which may have begun at a checkpoint's step
            speed = last["tokens_per_s"]
        result = RunResult(
            variant=self.recipe.variant,
            seed=self.recipe.seed,
            val_loss=None if found.get("diverged") else evaluated[-1]["val_loss"],
            tokens=last["tokens"],
            train_seconds=last["seconds"],
            tokens_per_s=speed,
            **found,
        )
        write_json_atomically(self.path / RESULT, asdict(result))
        return result


@in_main
def provenance() -> dict[str, Any]:
    """What a RunResult says of that; to be asked for when a run begins, since files may change."""
    return {
        "hardware": hardware(processes()),
        "commit": commit(),
        "versions": versions("torch", "triton", "transformers", "accelerate"),
    }
