"""A folder that `save_pretrained` or `ddl train` wrote: checked, and its model loaded."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from tokenizers import Tokenizer
from transformers.utils import logging as transformers_logging

from deep_delta.data import TokenShards, check_tokenizer
from deep_delta.data.files import sha256_of
from deep_delta.data.texts import one_line
from deep_delta.data.tokenizer import TOKENIZER_NAME
from deep_delta.errors import UserError
from deep_delta.model import DeepDeltaConfig, DeepDeltaForCausalLM

CONFIG_NAME = "config.json"
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
T = TypeVar("T")


def load_model(folder: Path, **changes: Any) -> DeepDeltaForCausalLM:
    """The model of a checkpoint, in evaluation mode, on the GPU if there is one.

    changes: fields of the configuration, and the dtype, in place of the checkpoint's own.
    Errors: UserError for a folder that is missing, no checkpoint, of another model family, or
    whose weights are missing, damaged or do not fit its config.json.
    """
    model = _load(DeepDeltaForCausalLM.from_pretrained, folder, changes)
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def load_config(folder: Path, **changes: Any) -> DeepDeltaConfig:
    """A checkpoint's configuration, with fields changed; UserError as `load_model` raises it."""
    return _load(DeepDeltaConfig.from_pretrained, folder, changes)


def _load(load: Callable[..., T], folder: Path, changes: dict[str, Any]) -> T:
    check_folder(folder)
    try:
        return load(folder, **changes)
    except Exception as error:  # transformers, safetensors and torch raise a dozen kinds
        raise UserError(f"can't load {folder}: {one_line(error)}") from error


def weights_sha256(folder: Path) -> dict[str, str]:
    """The hash of each weights file of a checkpoint, by name."""
    files = [path for pattern in WEIGHTS for path in sorted(folder.glob(pattern))]
    return {path.name: sha256_of(path) for path in files}


def check_fits(folder: Path, model: DeepDeltaForCausalLM, shards: TokenShards) -> Tokenizer:
    """The shards' tokenizer, if the checkpoint in `folder` was trained with it.

    The same vocabulary counts as the same tokenizer: transformers saves it again in other bytes.
    A checkpoint without a tokenizer is only asked whether its vocabulary is large enough.

    Errors: UserError where model or tokenizer does not fit, or the tokenizer can't be read.
    """
    check_tokenizer(shards.manifest, model.config.vocab_size)
    tokenizer = Tokenizer.from_file(str(shards.folder / TOKENIZER_NAME))
    own = folder / TOKENIZER_NAME
    if own.is_file() and sha256_of(own) != shards.manifest.tokenizer_sha256:
        try:
            theirs = Tokenizer.from_file(str(own))
        except Exception as error:  # tokenizers raises plain Exception
            line = f"the tokenizer in {folder} can't be read: {one_line(error)}"
            raise UserError(line) from error
        if theirs.get_vocab() != tokenizer.get_vocab():
            raise UserError(
                f"{folder} has another tokenizer than the data ({shards.manifest.tokenizer_name}): "
                f"prepare the text with --tokenizer {folder}"
            )
    return tokenizer


def quiet_transformers() -> None:
    """No bars and no advice of transformers in between: a command has one progress line."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def check_folder(folder: Path) -> None:
    """UserError unless the folder looks like a checkpoint of this model family."""
    if not folder.is_dir():
        raise UserError(f"there is no checkpoint folder {folder}")
    config = folder / CONFIG_NAME
    if not config.is_file():
        final = folder / "final" / CONFIG_NAME
        hint = f"did you mean {final.parent}?" if final.is_file() else "ddl train leaves one, final"
        raise UserError(f"{folder} is no checkpoint, it has no {CONFIG_NAME}: {hint}")
    try:
        family = json.loads(config.read_bytes()).get("model_type")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{config} is damaged: it is no JSON object") from error
    if family != DeepDeltaConfig.model_type:
        raise UserError(
            f"{folder} is a checkpoint of model type {family!r}, not {DeepDeltaConfig.model_type!r}"
        )
    if not any(any(folder.glob(pattern)) for pattern in WEIGHTS):
        raise UserError(f"{folder} has no weights: it needs model.safetensors")
