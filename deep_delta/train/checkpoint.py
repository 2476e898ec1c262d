"""Checkpoints that are whole or not there: written aside, hashed, made durable, then renamed."""

import errno
import json
import os
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from transformers import PreTrainedModel

from deep_delta.data.files import publish_folder, sha256_of, write_json_atomically
from deep_delta.errors import UserError
from deep_delta.train.processes import is_main, on_each, on_main

PREFIX = "checkpoint-"  # before the step
CONTENTS = "contents.json"  # size and SHA-256 of every other file
STAGE = "unfinished"  # in the run folder: where a checkpoint is written
ORDER = "data_order.json"
DATA_ORDER = 2  # which order of the data a step is a place in; 1: Trainer's
OPTIMIZER = "optimizer.pt"
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def step_of(checkpoint: Path) -> int | None:
    """The step of a folder named checkpoint-STEP, None for other names."""
    step = checkpoint.name.removeprefix(PREFIX)
    return int(step) if checkpoint.name.startswith(PREFIX) and step.isdecimal() else None


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run folder, oldest first, whole or not."""
    found = [path for path in folder.glob(f"{PREFIX}*") if step_of(path) is not None]
    return sorted(found, key=lambda path: step_of(path) or 0)


def publish(staged: Path, folder: Path, keep: int) -> None:
    """Make a staged checkpoint one of the run folder, and delete all but the newest `keep`.

    A process killed at any moment leaves it whole in the run folder or not there at all.
    """
    files = sorted(path for path in staged.rglob("*") if path.is_file())
    contents = {
        path.relative_to(staged).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": sha256_of(path),
        }
        for path in files
    }
    write_json_atomically(staged / CONTENTS, contents)
    publish_folder(staged, folder / staged.name)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)


def fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None if they are all as they were written."""
    try:
        contents = json.loads((checkpoint / CONTENTS).read_text(encoding="utf-8"))
        for name, expected in contents.items():
            path = checkpoint / name
            if not path.is_file():
                return f"it has no {name}"
            size = path.stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size:,} bytes instead of {expected['bytes']:,}"
            if sha256_of(path) != expected["sha256"]:
                return f"{name} is corrupt"
    except FileNotFoundError:
        return f"it has no {CONTENTS}"
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return f"its {CONTENTS} cannot be read"
    return None


def check_order(checkpoint: Path) -> None:
    """UserError for a checkpoint of a version whose data order was another."""
    path = checkpoint / ORDER
    order = json.loads(path.read_bytes())["data_order"] if path.is_file() else 1
    if order != DATA_ORDER:
        raise UserError(
            f"{checkpoint} was left by another version of this package, whose data came in another "
            "order: end the run with that version, or start over by ddl train --resume never"
        )


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint of a run folder whose files are whole.

    Newer ones are put aside as broken-checkpoint-STEP, with a line on stderr each.
    """
    for checkpoint in reversed(checkpoints(folder)):
        wrong = fault(checkpoint)
        if wrong is None:
            return checkpoint
        _put_aside(checkpoint, "broken", f"is not whole ({wrong})")
    return None


def put_others_aside(folder: Path, start: Path) -> None:
    """Rename the checkpoints of a run folder that do not lead to the one it is to start from.

    They would be taken for the newest, or be kept in place of newer ones.
    """
    for checkpoint in checkpoints(folder):
        own = start.resolve().parent == folder.resolve()
        if not own or (step_of(checkpoint) or 0) > (step_of(start) or 0):
            _put_aside(checkpoint, "other", f"does not lead on from {start}")


def _put_aside(checkpoint: Path, kind: str, why: str) -> None:
    aside = checkpoint.with_name(f"{kind}-{checkpoint.name}")
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.rename(aside)
    print(f"ddl: {checkpoint} {why}: put aside as {aside.name}", file=sys.stderr)


def save_checkpoint(
    folder: Path,
    step: int,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    keep: int,
) -> None:
    """Leave checkpoint-STEP in the run folder, whole; on an error what is there already stays.

    All processes must call it; it holds whole tensors, whatever wraps or shards them, so that any
    number of processes can go on from it. All but the newest `keep` are deleted.
    """
    stage = folder / STAGE
    staged = stage / f"{PREFIX}{step}"
    try:
        save_weights(model, staged)
        state = get_optimizer_state_dict(model, optimizer, options=WHOLE)
        on_main(lambda: torch.save(state, staged / OPTIMIZER))
        on_main(lambda: write_json_atomically(staged / ORDER, {"data_order": DATA_ORDER}))
        on_main(lambda: publish(staged, folder, keep))
    except RuntimeError as error:
        if "inline_container" not in str(error):
            raise
        # torch's writer of zip files says where it broke off, and not that the disk is full.
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(stage)) from error
    finally:
        if is_main():
            shutil.rmtree(stage, ignore_errors=True)


def save_weights(model: PreTrainedModel, folder: Path) -> None:
    """Configuration and whole weights, as `from_pretrained` loads them; all processes must call it.

    A tied tensor, which comes twice out of shards, is saved once.
    """
    state = get_model_state_dict(model, options=WHOLE)
    once = {name: x for name, x in state.items() if name not in model.all_tied_weights_keys}
    on_main(lambda: model.save_pretrained(folder, state_dict=once))


def load_optimizer(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, checkpoint: Path
) -> None:
    """Load a checkpoint's optimizer state, in every process; how many there are may have changed.

    Learning rate, weight decay and momenta stay those that the optimizer was made with.

    Errors: UserError for a file with anything but tensors, numbers and names.
    """
    state = on_each(lambda: _numbers(checkpoint / OPTIMIZER))
    settings = [
        {name: value for name, value in group.items() if name != "params"}
        for group in optimizer.param_groups
    ]
    set_optimizer_state_dict(model, optimizer, state, options=WHOLE)
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)


def _numbers(path: Path) -> Any:
    """What `torch.save` left; UserError unless it is tensors, numbers and names."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} holds more than numbers; it was not read: use another checkpoint"
        ) from None
