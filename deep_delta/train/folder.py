"""The run folder: what a run finds there and what it leaves."""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from deep_delta.data import Manifest, TokenShards
from deep_delta.data.files import publish_folder, write_json_atomically
from deep_delta.errors import UserError
from deep_delta.model import DeepDeltaConfig, DeepDeltaForCausalLM
from deep_delta.model.flops import flops_per_token
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
from deep_delta.train.processes import is_main, on_main, processes
from deep_delta.train.recipe import REORDERS_SUMS, Recipe, load_recipe, save_recipe
from deep_delta.train.stop import NotFinite

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

    val_loss: nats per token at the last step. train_seconds: without evaluation and saving.
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


def prepare_folder(recipe: Recipe, config: DeepDeltaConfig, data: Manifest) -> Path | None:
    """Make the run folder; the checkpoint to go on from, or None.

    UserError if the folder has begun with another recipe or other data, or if the checkpoint that
    the recipe names does not fit.
    """
    folder = recipe.run_folder
    if recipe.resume == "never" and folder.exists():
        number = 1
        while (aside := folder.with_name(f"{folder.name}.old-{number}")).exists():
            number += 1
        folder.rename(aside)  # nothing is lost by starting over
    identity = _data_identity(data)
    if folder.exists():
        shutil.rmtree(folder / STAGE, ignore_errors=True)
    newest, finished = newest_whole(folder), (folder / RESULT).is_file()
    begun = load_recipe(folder / RECIPE) if newest or finished else None
    start = None
    # The same command again goes on with what it has begun.
    if recipe.resume not in ("auto", "never") and not (begun and begun.resume == recipe.resume):
        start = Path(recipe.resume)
        _check_checkpoint(start, recipe, config)
        if finished:
            raise UserError(f"{folder} is finished: choose another --out to go on from {start}")
    if begun:  # else there is nothing that other choices spoil
        changed = recipe.differences(begun)
        if identity != json.loads((folder / DATA).read_text(encoding="utf-8")):
            changed.append(f"other data in {recipe.data}")
        if changed:
            raise UserError(
                f"{folder} holds a run of another recipe ({'; '.join(changed)}): choose another "
                "--out, or start over by ddl train --resume never"
            )
    if finished:
        return None
    begins_at = start or newest
    if begins_at:
        check_order(begins_at)
    folder.mkdir(parents=True, exist_ok=True)
    if start:
        put_others_aside(folder, start)
    save_recipe(recipe, folder / RECIPE)
    write_json_atomically(folder / DATA, identity)
    return begins_at


def _data_identity(data: Manifest) -> dict[str, list[str]]:
    """What tells one prepared folder from another, wherever it lies: its hashes."""
    shards = {name: [s.sha256 for s in split.shards] for name, split in data.splits.items()}
    return {"tokenizer": [data.tokenizer_sha256], **shards}


def _check_checkpoint(checkpoint: Path, recipe: Recipe, config: DeepDeltaConfig) -> None:
    """UserError unless the folder is a checkpoint of this model that this recipe can go on from."""
    if not checkpoint.is_dir():
        raise UserError(f"there is no checkpoint folder {checkpoint}")
    wrong = fault(checkpoint)
    if wrong is not None:
        raise UserError(f"{checkpoint} is not a whole checkpoint: {wrong}")
    step = step_of(checkpoint)
    if step is None:
        raise UserError(f"{checkpoint} is not named checkpoint-STEP")
    if step >= recipe.steps:
        raise UserError(f"{checkpoint} has no step left to train of the recipe's {recipe.steps}")
    origin = checkpoint.resolve().parent / RECIPE
    if origin.is_file():
        before = load_recipe(origin)
        sizes = [(r.batch_size, r.seq_len) for r in (before, recipe)]
        if sizes[0] != sizes[1]:  # a step is a place in the data
            old, new = (f"{batch} × {length}" for batch, length in sizes)
            raise UserError(
                f"{checkpoint} is of batches of {old} tokens, the recipe's are {new}: keep "
                "batch_size and seq_len, or its place in the data would be another"
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


def check_disk(folder: Path, model: nn.Module, recipe: Recipe) -> None:
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    saved = recipe.keep_checkpoints + 1 if recipe.save_every else 1  # Ctrl-C's
    needed = weights * (1 + 3 * saved)  # a checkpoint holds two moments beside the weights
    free = shutil.disk_usage(folder).free
    # Those that are there already will make room for the next.
    kept = [file for path in checkpoints(folder) for file in path.rglob("*") if file.is_file()]
    if free + sum(file.stat().st_size for file in kept) < needed:
        raise UserError(
            f"{folder} has {free / 2**20:,.0f} MiB free, the run needs about "
            f"{needed / 2**20:,.0f} MiB: make room or choose another out"
        )


def save_weight_decay(model: PreTrainedModel, decay_residual: bool, path: Path) -> None:
    """List the tensors with and without weight decay, with their shapes.

    Under µP also those that learn more slowly than the others ("width_scaled"), and their factors
    on learning rate and weight decay.
    """
    decayed = set(decayed_names(model, decay_residual))
    listing: dict[str, dict[str, Any]] = {"decayed": {}, "not_decayed": {}}
    for name, parameter in model.named_parameters():
        kind = "decayed" if name in decayed else "not_decayed"
        listing[kind][name] = list(parameter.shape)
    scaled = width_scaled_names(model)
    if scaled:
        ratio = model.config.width_ratio
        factors = {"learning_rate": 1 / ratio, "weight_decay": ratio}
        listing["width_scaled"] = {**factors, "tensors": scaled}
    write_json_atomically(path, listing)


def save_divergence(event: NotFinite, shards: TokenShards, seq_len: int, folder: Path) -> str:
    """Leave diverged.json with the step and its data; what happened in one line."""
    places = []
    for sequence in event.sequences:
        shard, offset = shards.place(sequence * seq_len)
        places.append({"sequence": sequence, "shard": shard, "token": offset})
    newest = newest_whole(folder)
    report = {
        "step": event.step,
        event.what: str(event.value),
        "sequences": places,
        "checkpoint": None if newest is None else newest.name,
    }
    write_json_atomically(folder / DIVERGED, report)
    named = ", ".join(f"{place['shard']} from token {place['token']:,}" for place in places[:SHOWN])
    more = len(places) - SHOWN
    return (
        f"{event}; its batch: {named}{f' and {more} more' if more > 0 else ''} (see "
        f"{folder / DIVERGED}); last good checkpoint: {newest or 'none'}"
    )


def save_final(model: DeepDeltaForCausalLM, data_folder: Path, final: Path) -> None:
    """Weights, configuration and tokenizer, complete or not there at all."""
    temporary = final.with_name(final.name + ".tmp")
    on_main(lambda: shutil.rmtree(temporary, ignore_errors=True))
    save_weights(model, temporary)
    if not is_main():
        return
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(data_folder / name, temporary / name)
    publish_folder(temporary, final)


def provenance() -> dict[str, Any]:
    """What a RunResult says of that; to be asked for when a run begins, since files may change."""
    return {
        "hardware": hardware(processes()),
        "commit": commit(),
        "versions": versions("torch", "triton", "transformers", "accelerate"),
    }


def save_result(
    recipe: Recipe,
    config: DeepDeltaConfig,
    parameters: int,
    folder: Path,
    memory: int,
    made_with: dict[str, Any],
    diverged: str | None = None,
) -> RunResult:
    rows = read_metrics(folder / "metrics.jsonl")
    logged = [row for row in rows if "loss" in row]
    evaluated = [row for row in rows if "val_loss" in row]
    first, last = logged[0], logged[-1]
    if len(logged) > 1:  # the first interval pays for first calls
        speed = (last["tokens"] - first["tokens"]) / (last["seconds"] - first["seconds"])
    else:  # which may have begun at a checkpoint's step
        speed = last["tokens_per_s"]
    result = RunResult(
        variant=recipe.variant,
        seed=recipe.seed,
        parameters=parameters,
        val_loss=None if diverged else evaluated[-1]["val_loss"],
        tokens=last["tokens"],
        train_seconds=last["seconds"],
        tokens_per_s=speed,
        peak_memory_bytes=memory,
        flops_per_token=flops_per_token(config, recipe.seq_len),
        diverged=diverged,
        **made_with,
    )
    write_json_atomically(folder / RESULT, asdict(result))
    return result
