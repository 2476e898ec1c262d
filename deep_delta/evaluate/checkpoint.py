"""A checkpoint folder to be evaluated: its model, its tokenizer, and what it is called."""

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from deep_delta.checkpoint import load_model, weights_sha256
from deep_delta.data.files import sha256_of
from deep_delta.data.texts import one_line
from deep_delta.data.tokenizer import TOKENIZER_NAME
from deep_delta.errors import UserError
from deep_delta.model import DeepDeltaForCausalLM
from deep_delta.model.presets import size_of, variant_of

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
    """Load a checkpoint and hash its files. Errors: UserError as `load_model` raises it."""
    model = load_model(folder)
    tokenizer = folder / TOKENIZER_NAME
    return Checkpoint(
        folder,
        model,
        variant_of(model.config) or CUSTOM,
        size_of(model.config) or CUSTOM,
        weights_sha256=weights_sha256(folder),
        tokenizer_sha256=sha256_of(tokenizer) if tokenizer.is_file() else None,
    )
