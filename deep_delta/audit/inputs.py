"""What an audit reads: the checkpoint, the text, and the bins that its tokens fall into."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from deep_delta.data import Manifest, TokenShards, check_tokenizer, prepare_bundled
from deep_delta.data.files import sha256_of
from deep_delta.data.tokenizer import TOKENIZER_NAME
from deep_delta.errors import UserError
from deep_delta.model import DeepDeltaConfig, DeepDeltaForCausalLM

SPLIT = "val"
LONGEST = 1024  # tokens of a sequence, unless told otherwise
FREQUENCIES = (10, 100, 1_000, 10_000)  # borders: occurrences per million tokens
COUNT_AT_ONCE = 1 << 22


def load(path: Path, device: torch.device) -> DeepDeltaForCausalLM:
    """A checkpoint of this library by the reference, everything in fp32, ready for evaluation.

    Errors: UserError for a folder that is none, or holds another kind of model.
    """
    config_path = path / "config.json"
    if not config_path.is_file():
        hint = f": give {path / 'final'}" if (path / "final" / "config.json").is_file() else ""
        raise UserError(f"{path} is no checkpoint (it has no config.json){hint}")
    if not any(path.glob("*.safetensors")):
        raise UserError(f"{path} is no checkpoint: it has a config.json, but no *.safetensors")
    try:
        kind = json.loads(config_path.read_text(encoding="utf-8")).get("model_type")
        if kind != DeepDeltaConfig.model_type:
            raise UserError(
                f"{path} holds a model of the type {kind!r}; audit reads deep_delta's own"
            )
        config = DeepDeltaConfig.from_pretrained(path)
        config.backend, config.state_dtype = "reference", None
        loaded: Any = DeepDeltaForCausalLM.from_pretrained(
            path, config=config, dtype="float32", output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} cannot be loaded: {reason}") from None
    model, info = loaded
    for name in sorted(info["missing_keys"]):  # transformers would fill them with random numbers
        raise UserError(f"{path} cannot be loaded: its weights lack {name}")
    return model.to(device).eval()


def trained_on(checkpoint: Path, model: DeepDeltaForCausalLM) -> tuple[int, bool]:
    """(tokens of a sequence, whether documents are kept apart) of the training, if known.

    That is what recipe.yaml says, which `ddl train` leaves beside the checkpoint; without it the
    longest sequence that the model takes, at most LONGEST, and documents that follow one another.
    """
    recipe = checkpoint.resolve().parent / "recipe.yaml"
    fields: Any = None
    if recipe.is_file():
        import yaml

        try:
            fields = yaml.safe_load(recipe.read_text(encoding="utf-8"))
        except yaml.YAMLError:
            raise UserError(f"{recipe} is not YAML: mend it or move it away") from None
    fields = fields if isinstance(fields, dict) else {}
    longest = min(LONGEST, model.config.max_position_embeddings)
    return int(fields.get("seq_len", longest)), bool(fields.get("mask_documents", False))


def open_text(folder: str, out: Path) -> TokenShards:
    """The validation split of a prepared folder; "bundled" is the package's text, below `out`."""
    path = prepare_bundled(out / "data") if folder == "bundled" else Path(folder)
    return TokenShards.open(path, SPLIT)


def check_fits(checkpoint: Path, model: DeepDeltaForCausalLM, manifest: Manifest) -> None:
    """UserError unless the text was made with the tokenizer the model was trained with.

    A checkpoint without a tokenizer is only asked whether its vocabulary is large enough.
    """
    tokenizer = checkpoint / TOKENIZER_NAME
    if tokenizer.is_file() and sha256_of(tokenizer) != manifest.tokenizer_sha256:
        raise UserError(
            f"{checkpoint} has another tokenizer than the data ({manifest.tokenizer_name}): "
            "prepare the text with the checkpoint's own (ddl prepare --tokenizer)"
        )
    check_tokenizer(manifest, model.config.vocab_size)


def position_bins(seq_len: int) -> tuple[list[str], Tensor]:
    """Labels of bins that double in width (0, 1, 2–3, 4–7, …), and each position's bin (T,)."""
    starts = [0, *(1 << power for power in range((seq_len - 1).bit_length()))]
    ends = [*starts[1:], seq_len]
    labels = [
        str(start) if end - start == 1 else f"{start}–{end - 1}"
        for start, end in zip(starts, ends, strict=True)
    ]
    bins = torch.bucketize(torch.arange(seq_len), torch.tensor(starts[1:]), right=True)
    return labels, bins


def frequency_bins(shards: TokenShards, vocab_size: int) -> tuple[list[str], Tensor]:
    """Labels of bins by occurrences per million tokens of the split; each id's bin (vocab,)."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for start in range(0, len(shards), COUNT_AT_ONCE):
        ids = shards.tokens(start, min(start + COUNT_AT_ONCE, len(shards)))
        counts += np.bincount(ids, minlength=vocab_size)
    rate = torch.from_numpy(counts * (1e6 / len(shards)))
    borders = [f"{border:,}" for border in FREQUENCIES]
    labels = [f"< {borders[0]}"]
    labels += [f"{low}–{high}" for low, high in itertools.pairwise(borders)]
    labels.append(f"≥ {borders[-1]}")
    edges = torch.tensor(FREQUENCIES, dtype=torch.float64)
    return labels, torch.bucketize(rate, edges, right=True)
