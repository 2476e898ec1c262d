"""A checkpoint folder to be evaluated: its model, its tokenizer, and what it is called."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from deep_delta.data.files import sha256_of
from deep_delta.data.texts import one_line
from deep_delta.data.tokenizer import TOKENIZER_NAME
from deep_delta.errors import UserError
from deep_delta.model import DeepDeltaConfig, DeepDeltaForCausalLM
from deep_delta.model.presets import size_of, variant_of

CONFIG_NAME = "config.json"
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
CUSTOM = "custom"


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint.

    model: in evaluation mode, on the GPU if there is one.
    variant, size: names of presets, or "custom".
    weights_sha256: of each weights file, by name.
    tokenizer_sha256: of tokenizer.json; None for a checkpoint without.
    """

    folder: Path
    model: DeepDeltaForCausalLM
    variant: str
    size: str
    weights_sha256: dict[str, str]
    tokenizer_sha256: str | None

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The checkpoint's own tokenizer. UserError if it has none, or one that can't be read."""
        if self.tokenizer_sha256 is None:
            raise UserError(
                f"{self.folder} has no {TOKENIZER_NAME}, which tasks need: copy it from the data "
                "the model was trained on"
            )
        try:
            return PreTrainedTokenizerFast.from_pretrained(str(self.folder))
        except Exception as error:  # tokenizers raises plain Exception
            raise UserError(
                f"the tokenizer in {self.folder} can't be read: {one_line(error)}"
            ) from error


def load_checkpoint(folder: Path) -> Checkpoint:
    """Load what `save_pretrained` or `ddl train` wrote.

    Errors: UserError for a folder that is missing, no checkpoint, of another model family, or
    whose weights are missing, damaged or do not fit its config.json.
    """
    check_folder(folder)
    loaded: Any
    try:
        loaded = DeepDeltaForCausalLM.from_pretrained(folder, output_loading_info=True)
    except Exception as error:  # transformers, safetensors and torch raise a dozen kinds
        raise UserError(f"can't load {folder}: {one_line(error)}") from error
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(f"{folder} lacks {len(missing)} of the model's weights, first {missing[0]}")
    tokenizer = folder / TOKENIZER_NAME
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Checkpoint(
        folder,
        model.eval().to(device),
        variant_of(model.config) or CUSTOM,
        size_of(model.config) or CUSTOM,
        weights_sha256={
            path.name: sha256_of(path)
            for pattern in WEIGHTS
            for path in sorted(folder.glob(pattern))
        },
        tokenizer_sha256=sha256_of(tokenizer) if tokenizer.is_file() else None,
    )


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
